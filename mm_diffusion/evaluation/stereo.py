"""Stereo image of audio: interaural level and time differences, correlation of the channels.

ILD is in dB, positive where the right channel is louder. ITD is in seconds, positive where the
left channel is later. Both are positive for a source on the right.
"""

from __future__ import annotations

import torch as th
import torch.nn.functional as F

SEGMENT_SECONDS = 0.1
SILENT = 1e-4  # RMS (-80 dB) below which audio has neither direction nor onsets
MAX_ITD_SECONDS = 1e-3  # between two ears it is 0.7 ms
# Bin edges: 0 is in the middle of a bin, values beyond are counted in the outermost bins.
ILD_EDGES_DB = th.linspace(-24.5, 24.5, 50, dtype=th.float64)
ITD_EDGES_SECONDS = th.linspace(-MAX_ITD_SECONDS, MAX_ITD_SECONDS, 42, dtype=th.float64)
# ILD-W: level differences in the band where they tell directions, in fine bins.
BAND_HZ = (1700, 4600)
BAND_EDGES_DB = th.linspace(-24, 24, 401, dtype=th.float64)
MAX_SIDE_TO_MID_DB = 60.0  # beyond it, one of the two is silence
TINY = 1e-12


def segments(audio: th.Tensor, sample_rate: int) -> th.Tensor:
    """[2, L] -> [T, 2, S], 0.1 s each; the last one is padded with zeros."""
    size = max(8, round(SEGMENT_SECONDS * sample_rate))
    padded = F.pad(audio, (0, -audio.shape[-1] % size))
    return padded.unfold(-1, size, size).transpose(0, 1).double()


def is_audible(pieces: th.Tensor) -> th.Tensor:
    """[T, 2, S] -> [T]: whether the RMS of both channels together is above silence."""
    return pieces.square().mean(dim=(1, 2)).sqrt() > SILENT


def are_both_audible(pieces: th.Tensor) -> th.Tensor:
    """[T, 2, S] -> [T]: whether each channel is above silence; otherwise there is no ITD."""
    return (pieces.square().mean(dim=2).sqrt() > SILENT).all(dim=1)


def level_difference_db(pieces: th.Tensor) -> th.Tensor:
    """[T, 2, S] -> ILD [T] = 10 log10(E_R / E_L)."""
    left, right = (pieces.square().sum(dim=-1) + TINY).unbind(dim=1)
    return 10 * (right / left).log10()


def band_level_difference_db(pieces: th.Tensor, sample_rate: int) -> th.Tensor:
    """[T, 2, S] -> ILD [T'] from 1.7 to 4.6 kHz, of the T' pieces that are audible there.

    Energies are those of the spectrum under a Hann window.
    """
    size = pieces.shape[-1]
    spectrum = th.fft.rfft(pieces * th.hann_window(size, dtype=pieces.dtype))
    hz = th.fft.rfftfreq(size, 1 / sample_rate)
    power = spectrum[..., (hz >= BAND_HZ[0]) & (hz <= BAND_HZ[1])].abs().square()
    left, right = power.sum(dim=-1).unbind(dim=1)
    # Parseval: two channels of this RMS, half of the spectrum, 3/8 of the energy in the window.
    audible = left + right > SILENT**2 * size**2 * 3 / 8
    return 10 * ((right[audible] + TINY) / (left[audible] + TINY)).log10()


def side_to_mid_db(audio: th.Tensor) -> float:
    """[2, L] -> SMR = 10 log10(E_side / E_mid), within +-60 dB; NaN for silence."""
    left, right = audio.double()
    mid, side = (left + right).square().mean(), (left - right).square().mean()
    if not is_audible(audio.double()[None]).any():
        return float("nan")
    ratio = 10 * ((side + TINY) / (mid + TINY)).log10()
    return ratio.clamp(-MAX_SIDE_TO_MID_DB, MAX_SIDE_TO_MID_DB).item()


def time_difference(pieces: th.Tensor, sample_rate: int) -> th.Tensor:
    """[T, 2, S] -> ITD [T]: the lag of the left channel, at most 1 ms.

    It is the peak of the whitened cross-correlation (GCC-PHAT), refined by a parabola.
    """
    size = pieces.shape[-1]
    left, right = th.fft.rfft(pieces, 2 * size).unbind(dim=1)
    cross = left * right.conj()
    magnitude = cross.abs()
    floor = 1e-3 * magnitude.amax(dim=-1, keepdim=True)  # the phase of empty bins is noise
    correlation = th.fft.irfft(cross / (magnitude + floor + TINY), 2 * size)
    reach = min(size - 1, max(1, round(MAX_ITD_SECONDS * sample_rate)))
    negative, positive = correlation[:, -reach - 1 :], correlation[:, : reach + 2]
    lags = th.cat([negative, positive], dim=-1)  # -reach - 1 .. reach + 1
    peak = lags[:, 1:-1].argmax(dim=-1, keepdim=True) + 1
    before, top, after = (lags.gather(1, peak + step).squeeze(1) for step in (-1, 0, 1))
    bend = before - 2 * top + after
    shift = th.where(bend < -TINY, 0.5 * (before - after) / bend.clamp(max=-TINY), 0.0)
    return (peak.squeeze(1) - reach - 1 + shift.clamp(-0.5, 0.5)) / sample_rate


def correlation(audio: th.Tensor) -> float:
    """[2, L] -> Pearson correlation of left and right; NaN where one of them is constant."""
    audio = audio.double()  # of float32, a constant less its mean is not zero
    left, right = audio - audio.mean(dim=-1, keepdim=True)
    power = (left.square().sum() * right.square().sum()).sqrt()
    return ((left * right).sum() / power).item() if power > TINY else float("nan")


def _histogram(values: th.Tensor, edges: th.Tensor) -> th.Tensor:
    """[T], edges [K + 1] -> counts [K]."""
    return th.histogram(values.double().clamp(edges[0], edges[-1]), edges).hist


def compute(audio: th.Tensor, sample_rate: int) -> dict[str, th.Tensor]:
    """[2, L] -> {"ild", "ild_band", "itd": histograms, "audible", "correlation", "smr": []}.

    Histograms count audible segments, for ITD those with two audible channels. "audible" is the
    number of audible segments; an undefined correlation or SMR is NaN.
    """
    pieces = segments(audio, sample_rate)
    pieces = pieces[is_audible(pieces)]
    both = pieces[are_both_audible(pieces)]
    ild_band = band_level_difference_db(pieces, sample_rate) if len(pieces) else th.zeros(0)
    itd = time_difference(both, sample_rate) if len(both) else th.zeros(0)
    return {
        "ild": _histogram(level_difference_db(pieces), ILD_EDGES_DB),
        "ild_band": _histogram(ild_band, BAND_EDGES_DB),
        "itd": _histogram(itd, ITD_EDGES_SECONDS),
        "audible": th.tensor(float(len(pieces))),
        "correlation": th.tensor(correlation(audio)),
        "smr": th.tensor(side_to_mid_db(audio)),
    }
