"""One thread per test process: the models are tiny, and other processes share the cores."""

import os

import pytest
import torch as th

from mm_diffusion import logger

th.set_num_threads(1)
if not th.cuda.is_available():  # Triton's kernels then run in its interpreter, on CPUs
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _own_logger():
    """No test logs to the folder, or with the silence, of another."""
    yield
    logger.configure()
