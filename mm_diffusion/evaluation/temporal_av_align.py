"""Temporal AV-Align (arXiv 2309.16429): do audio onsets coincide with peaks of the motion?

There are two counts. Ours pairs an onset with one peak only, in the clip as it is read. The
published one lets several onsets share a peak, in the frames and audio of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch as th

from .. import logger
from ..data import images
from ..files import cache_folder, write_atomically
from .clips import Clip, Rows

cv2.setNumThreads(1)  # clips are evaluated in parallel
# Farneback's flow: pyramid scale, levels, window, iterations, neighbourhood, its sigma, flags.
FARNEBACK = (0.5, 3, 15, 3, 5, 1.2, 0)
STILL_PIXELS = 1e-3  # a smaller mean displacement is no motion
ONSET_HZ = 22050  # sample rate of the published onset detection
INSTALL = "pip install librosa==0.11.0 (or pip install -e .[eval])"
_loading = threading.Lock()  # clips are evaluated in parallel


def why_no_onsets() -> str:
    """Why librosa, which detects the onsets, cannot be imported; empty if it can."""
    try:
        load_librosa()
    except ImportError as error:
        return str(error)
    return ""


def load_librosa() -> Any:
    """librosa with `librosa.onset`, whose import compiles for 15 s unless that is cached."""
    import librosa  # alone it is loaded lazily, and compiles nothing

    with _loading:
        if "librosa.onset" not in sys.modules:
            with compiled_by_numba(_compiled_path()):
                import librosa.onset
    return librosa


def _compiled_path() -> Path:
    """Where librosa's compiled functions are kept for this processor and these versions."""
    from llvmlite import binding

    names = ("librosa", "numba", "llvmlite", "numpy")
    versions = [platform.python_version(), *map(metadata.version, names)]
    processor = [binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()]
    key = hashlib.sha256(" ".join(versions + processor).encode()).hexdigest()[:24]
    return cache_folder() / f"librosa_{key}.zip"


@contextlib.contextmanager
def compiled_by_numba(archive: Path) -> Iterator[None]:
    """Keep in this file what numba compiles and caches meanwhile; what it holds is not compiled.

    Where several processes fill numba's own folder at once, functions are stored in each other's
    place: whoever loads them crashes, now and later. Here every process has a folder of its own.
    """
    import numba

    config: Any = numba.config
    before = config.CACHE_DIR
    with tempfile.TemporaryDirectory() as folder:
        _unpack(archive, folder)
        known = _files(folder)
        config.CACHE_DIR = folder
        try:
            yield
        finally:
            config.CACHE_DIR = before
        if _files(folder) != known:
            _pack(folder, archive)


def _files(folder: str) -> set[Path]:
    return set(Path(folder).rglob("*"))


def _unpack(archive: Path, folder: str) -> None:
    """Fill the folder, unless the file is missing or damaged."""
    try:
        shutil.unpack_archive(archive, folder)
    except Exception:  # damaged zip files raise errors of many types
        shutil.rmtree(folder)
        os.mkdir(folder)


def _pack(folder: str, archive: Path) -> None:
    def pack(temporary: str) -> None:
        shutil.make_archive(temporary.removesuffix(archive.suffix), "zip", folder)

    try:
        write_atomically(archive, pack)
    except OSError as error:
        where, reason = archive.parent, error.strerror
        logger.warn(f"{where}: not writable ({reason}); librosa compiles for 15 s in every run")


def version_key() -> str:
    """Versions of the libraries that the counts depend on."""
    return f"opencv {cv2.__version__} librosa {metadata.version('librosa')}"


def motion(frames: Iterable[th.Tensor]) -> list[float]:
    """F frames [3, H, W] (uint8, or in [-1, 1]) -> F - 1 mean lengths of the flow in pixels."""
    rgb = (images.to_uint8(frame).permute(1, 2, 0).contiguous().numpy() for frame in frames)
    grey = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in rgb)
    lengths = []
    for before, after in itertools.pairwise(grey):
        flow = cv2.calcOpticalFlowFarneback(before, after, None, *FARNEBACK)  # type: ignore[call-overload]
        lengths.append(np.hypot(flow[..., 0], flow[..., 1]).mean().item())
    return lengths


def motion_peaks(frames: Iterable[th.Tensor], fps: float, least: float) -> list[float]:
    """F frames -> times in seconds of local maxima of the motion, above `least` pixels.

    Motion from frame i - 1 to frame i is at i / fps.
    """
    strength = motion(frames)
    peaks = []
    for i in range(1, len(strength) - 1):
        before, here, after = strength[i - 1 : i + 2]
        if before < here > after and here > least:
            peaks.append((i + 1) / fps)
    return peaks


def onsets(audio: th.Tensor, sample_rate: int) -> list[float]:
    """[2, L] -> times of onsets in seconds: librosa's defaults on the mean of both channels."""
    librosa = load_librosa()
    mono = audio.mean(dim=0).numpy()
    mono = librosa.resample(mono, orig_sr=sample_rate, target_sr=ONSET_HZ)
    strength = librosa.onset.onset_strength(y=mono, sr=ONSET_HZ)
    times = librosa.onset.onset_detect(onset_envelope=strength, sr=ONSET_HZ, units="time")
    return times.tolist()


def count_pairs(first: list[float], second: list[float], window_seconds: float) -> int:
    """The most pairs, one time of each ascending list, at most the window apart.

    No time is in two pairs.
    """
    pairs = i = j = 0
    while i < len(first) and j < len(second):
        if abs(first[i] - second[j]) <= window_seconds + 1e-9:
            pairs, i, j = pairs + 1, i + 1, j + 1
        elif first[i] < second[j]:
            i += 1
        else:
            j += 1
    return pairs


def count_onsets(peaks: list[float], onsets: list[float], window_seconds: float) -> int:
    """As published: the onsets less than the window away from any peak."""
    return sum(any(abs(onset - peak) < window_seconds for peak in peaks) for onset in onsets)


def compute(clip: Clip) -> Rows:
    """How many [] peaks of motion, onsets, and pairs of them at most one frame apart."""
    peaks = motion_peaks(clip.video, clip.fps, least=STILL_PIXELS)
    found = onsets(clip.audio, clip.sample_rate)
    return _rows(peaks, found, count_pairs(peaks, found, 1 / clip.fps))


def compute_published(clip: Clip) -> Rows:
    """The same, counted as published, of frames and audio at the size and rate of the file."""
    fps = min(clip.fps, clip.file.fps)
    peaks = motion_peaks(clip.original_frames(), fps, least=0.0)
    found = onsets(clip.original_audio(), clip.file.sample_rate)
    return _rows(peaks, found, count_onsets(peaks, found, 1 / fps))


def _rows(peaks: list[float], onsets: list[float], pairs: int) -> Rows:
    counts = {"peaks": len(peaks), "onsets": len(onsets), "pairs": pairs}
    return {name: th.tensor(float(count)) for name, count in counts.items()}


def overlap(peaks: th.Tensor, onsets: th.Tensor, pairs: th.Tensor) -> th.Tensor:
    """Counts [N] of clips -> intersection over union [N], NaN without peaks and onsets.

    Published counts may exceed 1: with 1 peak and 4 onsets near it they give 4 / (1 + 4 - 4).
    """
    union = peaks + onsets - pairs
    return th.where(union > 0, pairs / union.clamp(min=1), th.nan)
