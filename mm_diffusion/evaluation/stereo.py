"""How sound is spread between left and right: differences of level and time, correlation of the channels."""

from __future__ import annotations

import torch as th

LEVEL_BINS_DB = th.linspace(
    -24.5, 24.5, 50, dtype=th.float64
)  # edges, 0 dB in the middle of a bin; beyond: the outermost bins
MAX_DELAY_SECONDS = 1e-3  # between two ears it is 0.7 ms
DELAY_BINS_SECONDS = th.linspace(
    -MAX_DELAY_SECONDS, MAX_DELAY_SECONDS, 42, dtype=th.float64
)  # likewise
STRETCH_SECONDS = 0.1
SILENT = 1e-4  # RMS, -80 dB: a sound below has neither direction nor onsets
TINY = 1e-12


def stretches(audio: th.Tensor, sample_rate: int) -> th.Tensor:
    """[2, L] -> [T, 2, S], a tenth of a second each; what is left at the end is padded with zeros."""
    size = max(8, round(STRETCH_SECONDS * sample_rate))
    padded = th.nn.functional.pad(audio, (0, -audio.shape[-1] % size))
    return padded.unfold(-1, size, size).transpose(0, 1).double()


def is_heard(pieces: th.Tensor) -> th.Tensor:
    """[T, 2, S] -> [T]: louder than silence."""
    return pieces.square().mean(dim=(1, 2)).sqrt() > SILENT


def is_heard_twice(pieces: th.Tensor) -> th.Tensor:
    """[T, 2, S] -> [T]: either channel louder than silence, without which there is no delay between them."""
    return (pieces.square().mean(dim=2).sqrt() > SILENT).all(dim=1)


def level_difference_db(pieces: th.Tensor) -> th.Tensor:
    """[T, 2, S] -> [T]: 10 log10(E_R / E_L), positive where right is louder."""
    left, right = (pieces.square().sum(dim=-1) + TINY).unbind(dim=1)
    return 10 * (right / left).log10()


def time_difference(pieces: th.Tensor, sample_rate: int) -> th.Tensor:
    """[T, 2, S] -> [T] seconds by which left comes later than right: positive for sounds from the right, as above.

    The peak of the whitened cross-correlation (GCC-PHAT) within a millisecond, refined by a parabola.
    """
    size = pieces.shape[-1]
    left, right = th.fft.rfft(pieces, 2 * size).unbind(dim=1)
    cross = left * right.conj()
    strength = cross.abs()
    floor = 1e-3 * strength.amax(dim=-1, keepdim=True)  # bins without sound have no phase
    correlation = th.fft.irfft(cross / (strength + floor + TINY), 2 * size)
    reach = min(size - 1, max(1, round(MAX_DELAY_SECONDS * sample_rate)))
    around = th.cat(
        [correlation[:, -reach - 1 :], correlation[:, : reach + 2]], dim=-1
    )  # lags -reach-1 .. reach+1
    peak = around[:, 1:-1].argmax(dim=-1, keepdim=True) + 1
    before, here, after = (around.gather(1, peak + step).squeeze(1) for step in (-1, 0, 1))
    bend = before - 2 * here + after
    shift = th.where(bend < -TINY, 0.5 * (before - after) / bend.clamp(max=-TINY), 0.0).clamp(
        -0.5, 0.5
    )
    return (peak.squeeze(1) - reach - 1 + shift) / sample_rate


def correlation(audio: th.Tensor) -> float:
    """[2, L] -> Pearson correlation of left and right, nan where one of them is constant."""
    left, right = (audio - audio.mean(dim=-1, keepdim=True)).double()
    power = (left.square().sum() * right.square().sum()).sqrt()
    return ((left * right).sum() / power).item() if power > TINY else float("nan")


def _histogram(values: th.Tensor, edges: th.Tensor) -> th.Tensor:
    """How many values [T] are in each of K bins [K], those beyond in the outermost; edges [K + 1]."""
    return th.histogram(values.double().clamp(edges[0], edges[-1]), edges).hist


def look(audio: th.Tensor, sample_rate: int) -> dict[str, th.Tensor]:
    """[2, L] -> histograms of differences over stretches that are heard, their number, correlation (nan: undefined).

    Delays are those of stretches in which both channels are heard.
    """
    pieces = stretches(audio, sample_rate)
    pieces = pieces[is_heard(pieces)]
    both = pieces[is_heard_twice(pieces)]
    delays = time_difference(both, sample_rate) if len(both) else th.zeros(0)
    return {
        "levels": _histogram(level_difference_db(pieces), LEVEL_BINS_DB),
        "delays": _histogram(delays, DELAY_BINS_SECONDS),
        "heard": th.tensor(float(len(pieces))),
        "correlation": th.tensor(correlation(audio)),
    }
