"""Temporal AV-Align (arXiv 2309.16429): do audio onsets coincide with peaks of the motion?

There are two counts. Ours pairs an onset with one peak only, in the clip as it is read. The
published one lets several onsets share a peak, in the frames and audio of the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from importlib import metadata

import cv2
import numpy as np
import torch as th

from ..data import images
from .clips import Clip, Rows

cv2.setNumThreads(1)  # clips are evaluated in parallel
# Farneback's flow: pyramid scale, levels, window, iterations, neighbourhood, its sigma, flags.
FARNEBACK = (0.5, 3, 15, 3, 5, 1.2, 0)
STILL_PIXELS = 1e-3  # a smaller mean displacement is no motion
ONSET_HZ = 22050  # sample rate of the published onset detection
INSTALL = "pip install librosa==0.11.0 (or pip install -e .[eval])"


def why_no_onsets() -> str:
    """Why librosa, which detects the onsets, cannot be imported; empty if it can."""
    try:
        import librosa.onset  # noqa: F401 (librosa alone is loaded lazily)
    except ImportError as error:
        return str(error)
    return ""


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
    import librosa

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
