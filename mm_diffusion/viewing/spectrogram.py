"""Spectrograms of stereo audio as images."""

from __future__ import annotations

import math

import numpy as np
import torch as th
import torch.nn.functional as F
import torchaudio.functional as AF
from matplotlib import colormaps

from ..evaluation.stereo import SILENT

WINDOW_SECONDS = 1 / 50  # rounded down to a power of 2 samples
RANGE_DB = 80  # from the loudest value to black
MAX_ROWS, MAX_COLUMNS = 64, 400  # of a channel
MEL_CORNER_HZ = 700  # where the mel scale turns from linear to logarithmic


def spectrogram(audio: th.Tensor, sample_rate: int) -> th.Tensor:
    """[2, L] -> [3, rows, columns] uint8: left above right, 0 Hz to sample_rate / 2 upwards.

    Frequencies are at their `mel_height`.
    """
    n_fft = max(64, 2 ** int(math.log2(sample_rate * WINDOW_SECONDS)))
    padded = F.pad(audio, (0, max(0, n_fft - audio.shape[-1])))
    window = th.hann_window(n_fft)
    hop = n_fft // 4
    power = AF.spectrogram(padded, 0, window, n_fft, hop, n_fft, power=2.0, normalized="window")
    rows, columns = min(MAX_ROWS, power.shape[1]), min(MAX_COLUMNS, power.shape[2])
    power = _mel_bands(power.double(), rows=rows, top_hz=sample_rate / 2)
    power = F.adaptive_avg_pool1d(power, columns).flip(1)
    loudest = max(power.max().item(), SILENT**2)
    decibel = AF.amplitude_to_DB(power, 10.0, amin=1e-16, db_multiplier=math.log10(loudest))
    index = ((decibel / RANGE_DB + 1).clamp(0, 1) * 255).long()
    colours = th.from_numpy(colormaps["magma"](np.arange(256), bytes=True)[:, :3].copy())
    left, right = colours[index]
    gap = th.full((1, columns, 3), 128, dtype=th.uint8)
    return th.cat([left, gap, right]).permute(2, 0, 1).contiguous()


def mel_height(hz: float, top_hz: float) -> float:
    """The height of a frequency on the mel scale, 0 at 0 Hz to 1 at top_hz."""
    return math.log1p(hz / MEL_CORNER_HZ) / math.log1p(top_hz / MEL_CORNER_HZ)


def _mel_bands(power: th.Tensor, rows: int, top_hz: float) -> th.Tensor:
    """Power [2, K, T] at frequencies 0..top_hz -> its means [2, rows, T] in equal mel steps."""
    bins = power.shape[1]
    height = th.linspace(0, 1, rows + 1, dtype=th.float64)
    hz = MEL_CORNER_HZ * th.expm1(height * math.log1p(top_hz / MEL_CORNER_HZ))
    edges = 0.5 + (bins - 1) * hz / top_hz  # bin k lies between k and k + 1
    whole = edges.long()
    running = F.pad(power.cumsum(1), (0, 0, 1, 0))
    below = running[:, whole] + (edges - whole)[:, None] * power[:, whole]
    return below.diff(dim=1).clamp(min=0) / edges.diff()[:, None]
