"""From what was seen in clips to scores, with the counts and warnings without which they mean nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch as th

from . import stereo, temporal_align
from .distances import TooFewError, earth_movers_distance, frechet_distance, kernel_distance, nearest
from .features import VIEWS

Seen = Mapping[str, dict[str, th.Tensor]]  # measure -> rows [N, ...]
FEW = 30  # scores of fewer clips mean little
BLACK = -0.98  # the brightest spot of a black clip
CLOSEST = 3  # pairs of a sample and its nearest true clip that are named
MIRRORED = " (mirrored)"


@dataclasses.dataclass(frozen=True)
class Score:
    """A figure of the samples, and of the true clips where it can be had of them; None comes with a note that says why.

    `better` is "lower", "higher", or "" where the true clips' figure is the aim; counts are of what it is made from.
    """

    name: str
    value: float | None
    reference: float | None = None
    better: str = ""
    count: int = 0
    reference_count: int = 0
    unit: str = "clips"
    note: str = ""


def rated(
    ours: Seen, true: Seen, name: Callable[[int], str], true_name: Callable[[int], str]
) -> tuple[list[Score], list[str]]:
    """All scores of what was seen, and notes on it; `name` and `true_name` tell what a clip is called."""
    scores = [
        *_distances(ours, true),
        _temporal(ours, true),
        *_spatial(ours, true),
        *_stereo(ours["stereo"], true.get("stereo")),
    ]
    notes = [note for which, seen in (("samples", ours), ("reference", true)) for note in _oddities(which, seen)]
    if true:
        score, pairs = _memorisation(ours["thumbnail"]["seen"], true["thumbnail"]["seen"], name, true_name)
        return [*scores, score], notes + pairs
    return scores, notes


def _oddities(which: str, seen: Seen) -> list[str]:
    if not seen:
        return []
    count = len(seen["stereo"]["heard"])
    odd = {
        "silent": seen["stereo"]["heard"] == 0,
        "black": seen["thumbnail"]["seen"].flatten(1).amax(dim=1) < BLACK,
    }
    notes = [f"{which}: {int(which_ones.sum())} of {count} clips {kind}" for kind, which_ones in odd.items()]
    notes = [note for note, which_ones in zip(notes, odd.values(), strict=True) if which_ones.any()]
    if count < FEW:
        notes.append(f"{which}: {count} clips only; scores of fewer than {FEW} mean little")
    return notes


# ---------------------------------------------------------------- distances to the true clips


def _distances(ours: Seen, true: Seen) -> list[Score]:
    made = []
    if "i3d" in ours and true:
        points = ours["i3d"]["features"], true["i3d"]["features"]
        made += [_distance("FVD", frechet_distance, *points), _distance("KVD", kernel_distance, *points)]
    if "embedding" in ours and true:
        for view in VIEWS:
            points = ours["embedding"][view].flatten(0, 1), true["embedding"][view].flatten(0, 1)
            made.append(_distance(f"FAD {view}", frechet_distance, *points, unit="patches"))
    return made


def _distance(
    name: str, distance: Callable[[th.Tensor, th.Tensor], float], x: th.Tensor, y: th.Tensor, unit: str = "clips"
) -> Score:
    score = Score(name, None, better="lower", count=len(x), reference_count=len(y), unit=unit)
    try:
        value = distance(x, y)
    except TooFewError as error:
        return dataclasses.replace(score, note=str(error))
    few = distance is frechet_distance and min(len(x), len(y)) <= x.shape[1]
    note = f"too few: not more than the {x.shape[1]} features, far too large" if few else ""
    return dataclasses.replace(score, value=value, note=note)


# ---------------------------------------------------------------- picture and sound


def _temporal(ours: Seen, true: Seen) -> Score:
    value, count, undecided = _mean_overlap(ours)
    reference, reference_count, _ = _mean_overlap(true)
    note = f"{undecided} clips without onsets or peaks of motion left out" if undecided else ""
    return Score("Temporal AV-Align", value, reference, "higher", count, reference_count, note=note)


def _mean_overlap(seen: Seen) -> tuple[float | None, int, int]:
    """-> mean over clips, their number, the number of clips without anything to compare."""
    if not seen:
        return None, 0, 0
    overlap = temporal_align.overlap(**seen["temporal"])
    undecided = len(seen["temporal"]["pairs"]) - len(overlap)
    return overlap.double().mean().item() if len(overlap) else None, len(overlap), undecided


def _spatial(ours: Seen, true: Seen) -> list[Score]:
    if "spatial" not in ours:
        return []
    (value, count), (reference, reference_count) = (_hit_share(seen) for seen in (ours, true))
    note = "" if count else "no sound events"
    return [Score("Spatial AV-Align", value, reference, "higher", count, reference_count, "events", note)]


def _hit_share(seen: Seen) -> tuple[float | None, int]:
    """TP / (TP + FN) over all events of all clips, and their number."""
    if "spatial" not in seen:
        return None, 0
    found, missed = (int(seen["spatial"][name].double().sum()) for name in ("hits", "misses"))
    return found / (found + missed) if found + missed else None, found + missed


# ---------------------------------------------------------------- sound alone


def _stereo(ours: dict[str, th.Tensor], true: dict[str, th.Tensor] | None) -> list[Score]:
    figures = {
        "level difference, mean |R - L| (dB)": _mean_level,
        "delay, mean |L - R| (ms)": _mean_delay,
        "left-right correlation": _mean_correlation,
    }
    made = []
    for name, figure in figures.items():
        value, count = figure(ours)
        reference, reference_count = figure(true) if true else (None, 0)
        unit = "clips" if figure is _mean_correlation else "tenths of a second"
        note = "" if count else "nothing is heard"
        made.append(Score(name, value, reference, "", count, reference_count, unit, note))
    if true:
        made.append(_histograms("level differences apart (dB)", ours, true, "levels", _level_width()))
        made.append(_histograms("delays apart (ms)", ours, true, "delays", _delay_width()))
    return made


def _level_width() -> float:
    return float(stereo.LEVEL_BINS_DB[1] - stereo.LEVEL_BINS_DB[0])


def _delay_width() -> float:
    return 1e3 * 2 * stereo.MAX_DELAY_SECONDS / stereo.DELAY_BINS


def _mean_of_bins(counts: th.Tensor, width: float) -> tuple[float | None, int]:
    """Histograms [N, K] of bins around 0 -> mean distance from 0 of what they count, and how much that is."""
    total = counts.double().sum(dim=0)
    centres = (th.arange(len(total)) - (len(total) - 1) / 2) * width
    heard = total.sum()
    return ((total * centres.abs()).sum() / heard).item() if heard > 0 else None, int(heard)


def _mean_level(seen: dict[str, th.Tensor]) -> tuple[float | None, int]:
    return _mean_of_bins(seen["levels"], _level_width())


def _mean_delay(seen: dict[str, th.Tensor]) -> tuple[float | None, int]:
    return _mean_of_bins(seen["delays"], _delay_width())


def _mean_correlation(seen: dict[str, th.Tensor]) -> tuple[float | None, int]:
    known = seen["correlation"][~seen["correlation"].isnan()]
    return known.double().mean().item() if len(known) else None, len(known)


def _histograms(name: str, ours: dict, true: dict, row: str, width: float) -> Score:
    x, y = ours[row].double().sum(dim=0), true[row].double().sum(dim=0)
    score = Score(name, None, None, "lower", int(x.sum()), int(y.sum()), "tenths of a second")
    try:
        return dataclasses.replace(score, value=earth_movers_distance(x, y, width))
    except TooFewError:
        return dataclasses.replace(score, note="nothing is heard in one of them")


# ---------------------------------------------------------------- memorisation


def _memorisation(
    x: th.Tensor, y: th.Tensor, name: Callable[[int], str], true_name: Callable[[int], str]
) -> tuple[Score, list[str]]:
    """Thumbnails [N, F, 3, h, w] of samples and true clips -> how near the nearest is, and the closest pairs.

    Training shows clips mirrored, too, so a sample may be near a mirrored one. The figure of the true clips is that
    between each and its nearest other one: samples that are much nearer have been learnt by heart.
    """
    seen = [nearest(side.flatten(1), y.flatten(1)) for side in (x, x.flip(-1))]
    distance, side = th.stack([distances for distances, _ in seen]).min(dim=0)
    index = th.stack([indices for _, indices in seen]).gather(0, side[None])[0]
    try:
        reference, note = nearest(y.flatten(1), y.flatten(1), leave_own_out=True)[0].median().item(), ""
    except TooFewError:
        reference, note = None, "one true clip only"
    pairs = [
        f"nearest true clip, {distance[k]:.3f} away: {name(k)} and {true_name(int(index[k]))}{MIRRORED * bool(side[k])}"
        for k in distance.argsort()[:CLOSEST].tolist()
    ]
    value = distance.median().item()
    return Score("nearest true clip (RMS, median)", value, reference, "", len(x), len(y), note=note), pairs


# ---------------------------------------------------------------- telling


def table(scores: list[Score]) -> str:
    """The scores as text, a row each; a figure that cannot be had is a dash."""

    def figure(value: float | None) -> str:
        assert value is None or math.isfinite(value)
        return "-" if value is None else f"{value:.4g}"

    rows = [("metric", "samples", "true clips", "better", "from", "")]
    for s in scores:
        counts = f"{s.count} / {s.reference_count} {s.unit}" if s.reference_count else f"{s.count} {s.unit}"
        rows.append((s.name, figure(s.value), figure(s.reference), s.better, counts, s.note))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
