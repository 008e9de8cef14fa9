"""Temporal AV-Align (arXiv 2309.16550): do audio onsets coincide with peaks of the motion?"""

from __future__ import annotations

import itertools
from importlib import metadata

import cv2
import numpy as np
import torch as th

from ..data import images

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


def motion(frames: th.Tensor) -> th.Tensor:
    """[F, 3, H, W] in [-1, 1] -> [F - 1] mean length of the optical flow in pixels."""
    rgb = images.to_uint8(frames).permute(0, 2, 3, 1).contiguous().numpy()
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in rgb]
    lengths = []
    for before, after in itertools.pairwise(grey):
        flow = cv2.calcOpticalFlowFarneback(before, after, None, *FARNEBACK)  # type: ignore[call-overload]
        lengths.append(np.hypot(flow[..., 0], flow[..., 1]).mean().item())
    return th.tensor(lengths)


def motion_peaks(frames: th.Tensor, fps: float) -> list[float]:
    """[F, 3, H, W] -> times in seconds of local maxima of the motion.

    Motion from frame i - 1 to frame i is at i / fps.
    """
    strength = motion(frames).tolist()
    peaks = []
    for i in range(1, len(strength) - 1):
        before, here, after = strength[i - 1 : i + 2]
        if before < here > after and here > STILL_PIXELS:
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

    No time is in two pairs; the published count lets several onsets share a peak.
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


def compute(
    video: th.Tensor, audio: th.Tensor, fps: float, sample_rate: int
) -> dict[str, th.Tensor]:
    """A clip -> how many [] peaks of motion, onsets, and pairs of them at most one frame apart."""
    peaks, found = motion_peaks(video, fps), onsets(audio, sample_rate)
    pairs = count_pairs(peaks, found, 1 / fps)
    counts = {"peaks": len(peaks), "onsets": len(found), "pairs": pairs}
    return {name: th.tensor(float(count)) for name, count in counts.items()}


def overlap(peaks: th.Tensor, onsets: th.Tensor, pairs: th.Tensor) -> th.Tensor:
    """Counts [N] of clips -> intersection over union [N'], N' clips with peaks or onsets."""
    union = peaks + onsets - pairs
    return (pairs / union.clamp(min=1))[union > 0]
