"""One thread per test process: the models are tiny, and other processes share the cores."""

import os
import tempfile

import pytest
import torch as th

from mm_diffusion import logger

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the folder
    _cache = tempfile.TemporaryDirectory()
    os.environ["MM_DIFFUSION_CACHE"] = _cache.name
th.set_num_threads(1)
if not th.cuda.is_available():  # Triton's kernels then run in its interpreter, on CPUs
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _own_logger():
    """No test logs to the folder, or with the silence, of another."""
    yield
    logger.configure()


@pytest.fixture(scope="session")
def compiled_librosa():
    """librosa's compiled functions, for cache folders of tests: to compile them takes 15 s."""
    from mm_diffusion.evaluation import temporal_av_align  # once Triton knows how to run

    temporal_av_align.load_librosa()
    return temporal_av_align._compiled_path()
