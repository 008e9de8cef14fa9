"""Temporal AV-Align (arXiv 2309.16550): do onsets of the sound fall together with peaks of the motion?"""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import torch as th
from torchaudio.transforms import MelSpectrogram

from ..data import images
from .stereo import SILENT

cv2.setNumThreads(1)  # clips go through beside each other
# Farneback's flow: scale between pyramid levels, levels, window, iterations, neighbourhood, its sigma, flags.
FARNEBACK = (0.5, 3, 15, 3, 5, 1.2, 0)
STILL_PIXELS = 1e-3  # a mean displacement below this is no motion
HOP_SECONDS, WINDOW_SECONDS = 0.01, 0.04  # of the spectra
ONSET_NEIGHBOURS = 3  # spectra on either side than which an onset must be stronger,
ONSET_SURROUNDINGS = 10  # over whose mean on either side it must stand out,
ONSET_SHARE = 0.07  # by this share of the strongest one,
ONSET_DB = 0.5  # and at least by this much: a steady sound has none,
ONSET_PAUSE_SECONDS = 0.03  # and which may not follow each other faster


def motion(frames: th.Tensor) -> th.Tensor:
    """[F, 3, H, W] in [-1, 1] -> [F - 1] mean length, in pixels, of the optical flow from each frame to the next."""
    rgb = images.to_uint8(frames).permute(0, 2, 3, 1).contiguous().numpy()
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in rgb]
    flows = [
        cv2.calcOpticalFlowFarneback(a, b, None, *FARNEBACK)  # type: ignore[call-overload]
        for a, b in itertools.pairwise(grey)
    ]
    return th.tensor([float(np.hypot(flow[..., 0], flow[..., 1]).mean()) for flow in flows])


def motion_peaks(frames: th.Tensor, fps: float) -> list[float]:
    """[F, 3, H, W] -> when, in seconds, motion is stronger than before and after; that into frame i is at i / fps."""
    strength = motion(frames).tolist()
    inner = zip(range(2, len(strength)), strength, strength[1:], strength[2:], strict=False)
    return [
        i / fps for i, before, here, after in inner if before < here > after and here > STILL_PIXELS
    ]


def spectral_flux(audio: th.Tensor, sample_rate: int) -> th.Tensor:
    """[2, L] -> [T]: dB that the power gains from each spectrum to the next (every 10 ms), mean over mel bands.

    The power is that of both channels, so that opposite phases do not cancel. 0 where either window leaves the clip:
    a sound that is cut is no onset.
    """
    window = max(16, round(WINDOW_SECONDS * sample_rate))
    hop = max(1, round(HOP_SECONDS * sample_rate))
    size = 2 ** (window - 1).bit_length()
    bands = max(2, min(64, size // 16))
    mel = MelSpectrogram(sample_rate, size, window, hop, n_mels=bands, pad_mode="constant")(
        audio
    ).mean(dim=0)
    level = 10 * mel.clamp(min=1e-10).log10()
    level = level.clamp(min=(level.max() - 80).item())
    flux = th.nn.functional.pad(level.diff(dim=-1).clamp(min=0).mean(dim=0), (1, 0))
    middle = th.arange(len(flux)) * hop
    return flux.where((middle - hop >= window / 2) & (middle + window / 2 <= audio.shape[-1]), 0.0)


def onsets(audio: th.Tensor, sample_rate: int) -> list[float]:
    """[2, L] -> when a sound sets in, in seconds: peaks of the spectral flux that stand out from their surroundings."""
    if audio.square().mean().sqrt() < SILENT:
        return []
    flux = spectral_flux(audio, sample_rate)
    strongest = _around(flux, ONSET_NEIGHBOURS).amax(dim=-1)
    stands_out = max(ONSET_SHARE * flux.max().item(), ONSET_DB)
    threshold = _around(flux, ONSET_SURROUNDINGS).mean(dim=-1) + stands_out
    hop = max(1, round(HOP_SECONDS * sample_rate))
    found: list[float] = []
    for index in th.where((flux == strongest) & (flux > threshold))[0].tolist():
        seconds = index * hop / sample_rate
        if not found or seconds - found[-1] > ONSET_PAUSE_SECONDS:
            found.append(seconds)
    return found


def _around(x: th.Tensor, reach: int) -> th.Tensor:
    """[T] -> [T, 2 reach + 1]: each value with its neighbours, zero beyond the ends."""
    return th.nn.functional.pad(x, (reach, reach)).unfold(0, 2 * reach + 1, 1)


def matched(first: list[float], second: list[float], window_seconds: float) -> int:
    """The most pairs, one of each list (ascending), that lie at most the window apart; nothing is in two pairs."""
    pairs = i = j = 0
    while i < len(first) and j < len(second):
        if abs(first[i] - second[j]) <= window_seconds + 1e-9:
            pairs, i, j = pairs + 1, i + 1, j + 1
        elif first[i] < second[j]:
            i += 1
        else:
            j += 1
    return pairs


def look(video: th.Tensor, audio: th.Tensor, fps: float, sample_rate: int) -> dict[str, th.Tensor]:
    """A clip -> how many [] peaks of motion, onsets, and pairs of them at most one frame apart."""
    seen, heard = motion_peaks(video, fps), onsets(audio, sample_rate)
    counts = {"peaks": len(seen), "onsets": len(heard), "pairs": matched(seen, heard, 1 / fps)}
    return {name: th.tensor(float(count)) for name, count in counts.items()}


def overlap(peaks: th.Tensor, onsets: th.Tensor, pairs: th.Tensor) -> th.Tensor:
    """Counts [N] of clips -> intersection over union of their peaks and onsets [N'], of clips that have any."""
    union = peaks + onsets - pairs
    return (pairs / union.clamp(min=1))[union > 0]
