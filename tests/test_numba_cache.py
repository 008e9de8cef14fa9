"""Compiled functions of librosa are kept for later processes; no two processes share a folder."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numba
import pytest
from test_dist import REPOSITORY, untouched

from mm_diffusion import logger
from mm_diffusion.evaluation import temporal_av_align

COMPILED = """
import numba
import numpy as np

signatures = ["void(int64[:], int64[:])", "void(float64[:], float64[:])"]

@numba.guvectorize(signatures, "(n)->(n)", cache=True)
def double(x, y):
    for i in range(len(x)):
        y[i] = 2 * x[i]

print(numba.config.CACHE_DIR, *double(np.arange(3)), *double(np.arange(3.0)))
"""
COMPILES = """
import sys
from pathlib import Path
from numba.core import caching
from mm_diffusion.evaluation.temporal_av_align import compiled_by_numba

save, saved = caching.IndexDataCacheFile.save, []
caching.IndexDataCacheFile.save = lambda *args: saved.append(args) or save(*args)
with compiled_by_numba(Path(sys.argv[1])):
    import compiled
print(bool(saved))
"""
RESULTS = "0 2 4 0.0 2.0 4.0"
FINDS_ONSETS = """
import torch as th
from mm_diffusion.evaluation.temporal_av_align import onsets

noise = th.randn(16000, generator=th.Generator().manual_seed(0))
fading = th.linspace(0.5, 0, 16000) * (th.arange(16000) >= 8000)
print(*onsets((noise * fading).expand(2, -1), 16000))
"""


def started(text, *arguments, **variables):
    env = untouched() | {"PYTHONPATH": str(REPOSITORY)} | variables
    line = [sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True)


def printed(processes):
    """What each printed, once all have ended well."""
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return texts


def compiling(folder, count=1, environment="environment"):
    """As many processes at once -> of each the folder, the results, and whether it compiled."""
    module = folder / environment / "compiled.py"
    module.parent.mkdir(exist_ok=True)
    module.write_text(COMPILED)
    archive, path = folder / "compiled.zip", f"{REPOSITORY}:{module.parent}"
    processes = [started(COMPILES, archive, PYTHONPATH=path) for _ in range(count)]
    words = [text.split() for text in printed(processes)]
    return [(used, " ".join(results), new == "True") for used, *results, new in words]


def unpacked(archive):
    """What a process finds compiled: name -> bytes."""
    with temporal_av_align.compiled_by_numba(archive):
        folder = Path(numba.config.CACHE_DIR)
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def both(folder):
    """Two processes that find nothing compiled."""
    return compiling(folder, 2)


def test_processes_that_compile_at_once_do_not_share_a_folder_and_later_ones_load(both, folder):
    folders, results, has_compiled = zip(*both, strict=True)
    assert len(set(folders)) == 2
    assert not any(Path(folder).exists() for folder in folders)
    assert set(results) == {RESULTS}
    assert all(has_compiled)
    assert compiling(folder)[0][1:] == (RESULTS, False)


@pytest.mark.usefixtures("both")
def test_compiled_functions_of_one_environment_stay_beside_those_of_another(folder):
    """numba tells functions apart by the path of their module."""
    assert compiling(folder, environment="other")[0][1:] == (RESULTS, True)
    assert compiling(folder, environment="other")[0][1:] == (RESULTS, False)
    assert compiling(folder)[0][1:] == (RESULTS, False)


@pytest.mark.usefixtures("both")
def test_a_damaged_archive_of_compiled_functions_is_written_anew(folder, tmp_path):
    content = (folder / "compiled.zip").read_bytes()
    (tmp_path / "compiled.zip").write_bytes(content[: len(content) // 2])
    assert compiling(tmp_path)[0][1:] == (RESULTS, True)
    assert compiling(tmp_path)[0][1:] == (RESULTS, False)


def test_of_a_damaged_archive_nothing_is_loaded_but_intact_files(tmp_path):
    """Whatever byte is damaged; most cost the whole content, some a file or nothing."""
    archive, files = tmp_path / "compiled.zip", tmp_path / "files"
    files.mkdir()
    for number in range(3):
        (files / f"{number}.nbc").write_bytes(bytes(range(100)) * 3)
    shutil.make_archive(str(archive.with_suffix("")), "zip", files)
    content, whole, results = archive.read_bytes(), unpacked(archive), []
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        archive.write_bytes(damaged)
        results.append(unpacked(archive))
    assert len(whole) == 3
    assert all(result.items() <= whole.items() for result in results)
    assert results.count({}) > len(results) / 2


def test_a_cache_folder_that_cannot_be_written_is_named_and_nothing_else_changes(
    tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    warnings, before = [], numba.config.CACHE_DIR
    monkeypatch.setattr(logger, "warn", warnings.append)
    with temporal_av_align.compiled_by_numba(tmp_path / "file/compiled.zip"):
        Path(numba.config.CACHE_DIR, "function").touch()
    assert before == numba.config.CACHE_DIR
    assert warnings == [
        f"{tmp_path / 'file'}: not writable (File exists); librosa compiles for 15 s in every run"
    ]


@pytest.mark.slow
def test_processes_that_load_librosa_at_once_find_the_same_onsets(tmp_path):
    """Of four that fill numba's own folder, two are killed by what they load from it."""
    found = []
    for number in range(3):
        processes = []
        for _ in range(4):
            processes.append(started(FINDS_ONSETS, MM_DIFFUSION_CACHE=str(tmp_path / str(number))))
            time.sleep(1)
        found += printed(processes)
    (onset,) = set(found)
    assert float(onset) == pytest.approx(0.5, abs=0.05)
