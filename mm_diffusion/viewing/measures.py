"""What the gallery measures of a clip: scores, and horizontal positions of object and audio."""

from __future__ import annotations

import dataclasses
import math

import torch as th

from ..evaluation import bright_object, stereo
from ..evaluation.scores import BLACK

# Mean square of the brightness above the frame's median below which nothing stands out.
BLANK = (0.5 / 127.5) ** 2
FAINT = 0.05  # share of a clip's mean energy below which a frame has no position


@dataclasses.dataclass(frozen=True)
class Score:
    """Name, number format and meaning of a score on the page."""

    label: str
    form: str
    meaning: str


ALIGNMENT = (
    "correlation over time of the object's horizontal position and the interaural level difference;"
    " 1 is best"
)
BALANCE = "(right - left) / (right + left) of the energies, -1 to 1"
MOTION = "mean change of a pixel from frame to frame, of the full range"
SCORES = {
    "alignment": Score("Spatial alignment", "{:z.2f}", ALIGNMENT),
    "level": Score("Level", "{:.1f} dB", "root mean square of both channels, 0 dB: full scale"),
    "correlation": Score("Channel correlation", "{:z.2f}", "of left and right; 1: mono"),
    "balance": Score("Balance", "{:+z.2f}", BALANCE),
    "motion": Score("Motion", "{:.1f} %", MOTION),
}


def measure(video: th.Tensor, audio: th.Tensor) -> dict[str, float | str]:
    """[F, 3, H, W] and [2, L] in [-1, 1] -> each of SCORES, or the reason why it is undefined."""
    scores: dict[str, float | str] = dict.fromkeys(SCORES, "silent")
    scores["motion"] = "one frame"
    if len(video) > 1:
        scores["motion"] = 50 * video.diff(dim=0).abs().mean().item()
    if is_silent(audio):
        return scores
    energies = audio.double().square().mean(dim=-1)
    scores["alignment"] = _alignment(video, audio)
    scores["level"] = 10 * energies.mean().log10().item()
    scores["correlation"] = _correlation(audio)
    scores["balance"] = (energies.diff() / energies.sum()).item()
    return scores


def is_silent(audio: th.Tensor) -> bool:
    """[C, L] -> whether its RMS is below the silence threshold of the metrics."""
    return not stereo.is_audible(audio.double()[None]).item()


def why_no_object(video: th.Tensor) -> str:
    """Why no object can be detected in [F, 3, H, W]; empty if one can."""
    if video.max() < BLACK:
        return "black"
    energy = bright_object.horizontal_position(video[None])[1]
    return "no object stands out" if energy.mean().item() < _blank_energy(video) else ""


def positions(video: th.Tensor, audio: th.Tensor) -> tuple[list[float | None], list[float | None]]:
    """[F, 3, H, W], [2, L] -> positions of object and audio per frame, -1 left to 1 right.

    None where there is next to no energy. That of audio is its interaural level difference.
    """
    position, level = _detected(video, audio)
    return _with_gaps(2 * position - 1), _with_gaps(level)


def _detected(video: th.Tensor, audio: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Position of the object [F] and level difference [F]; NaN below a threshold or FAINT."""
    position, brightness = bright_object.horizontal_position(video[None])
    level, energy = bright_object.level_difference(audio[None], len(video))
    silent = 2 * stereo.SILENT**2 * audio.shape[-1] / len(video)
    position[brightness < max(_blank_energy(video), FAINT * brightness.mean().item())] = math.nan
    level[energy < max(silent, FAINT * energy.mean().item())] = math.nan
    return position[0], level[0]


def _with_gaps(values: th.Tensor) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 4) for value in values.tolist()]


def _blank_energy(video: th.Tensor) -> float:
    """The object energy of a frame below which nothing stands out from the ground."""
    return BLANK * video.shape[-2] * video.shape[-1]


def _alignment(video: th.Tensor, audio: th.Tensor) -> float | str:
    """Spatial alignment of a clip that is not silent, or the reason why it is undefined."""
    if len(video) < 2:
        return "one frame"
    if reason := why_no_object(video):
        return reason
    position, level = _detected(video, audio)
    both = ~(position + level).isnan()
    reason = bright_object.why_uncorrelated(position[both], level[both])
    return reason or bright_object.spatial_alignment(video[None], audio[None])


def _correlation(audio: th.Tensor) -> float | str:
    """Pearson correlation of the channels, or the reason why it is undefined."""
    for side, channel in zip(("left", "right"), audio, strict=True):
        if is_silent(channel[None]):
            return f"{side} is silent"
    correlation = stereo.correlation(audio)
    return "a channel is constant" if math.isnan(correlation) else correlation
