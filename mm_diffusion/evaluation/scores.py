"""From what was seen in clips to scores, with the counts and warnings without which they mean nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch as th

from . import stereo, temporal_align
from .distances import (
    TooFewError,
    earth_movers_distance,
    frechet_distance,
    kernel_distance,
    nearest,
)
from .features import VIEWS

Seen = Mapping[str, dict[str, th.Tensor]]  # measure -> rows [N, ...]
FEW = 30  # scores of fewer clips mean little
BLACK = -0.98  # the brightest spot of a black clip
CLOSEST = 3  # pairs of a sample and its nearest true clip that are named
MIRRORED = " (mirrored)"
EDGES = {
    "levels": stereo.LEVEL_BINS_DB,
    "delays": 1e3 * stereo.DELAY_BINS_SECONDS,
}  # of the histograms: dB, ms


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


def compute_scores(
    ours: Seen, true: Seen, name: Callable[[int], str], true_name: Callable[[int], str]
) -> tuple[list[Score], list[str]]:
    """All scores of what was seen, and notes on it; `name` and `true_name` tell what a clip is called."""
    scores = [
        *_distances(ours, true),
        _compared("Temporal AV-Align", _mean_overlap, ours, true, "higher"),
    ]
    if "spatial" in ours:
        scores.append(_compared("Spatial AV-Align", _hit_share, ours, true, "higher", "events"))
    scores += _stereo(ours["stereo"], true.get("stereo"))
    notes = [
        note
        for which, seen in (("samples", ours), ("reference", true))
        for note in _oddities(which, seen)
    ]
    if true:
        score, pairs = _memorisation(
            ours["thumbnail"]["seen"], true["thumbnail"]["seen"], name, true_name
        )
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
    notes = [
        f"{which}: {int(which_ones.sum())} of {count} clips {kind}"
        for kind, which_ones in odd.items()
    ]
    notes = [note for note, which_ones in zip(notes, odd.values(), strict=True) if which_ones.any()]
    if count < FEW:
        notes.append(f"{which}: {count} clips only; scores of fewer than {FEW} mean little")
    return notes


# ---------------------------------------------------------------- distances to the true clips


def _distances(ours: Seen, true: Seen) -> list[Score]:
    made = []
    if "i3d" in ours and true:
        points = ours["i3d"]["features"], true["i3d"]["features"]
        made += [
            _distance("FVD", frechet_distance, *points),
            _distance("KVD", kernel_distance, *points),
        ]
    if "embedding" in ours and true:
        for view in VIEWS:
            points = ours["embedding"][view].flatten(0, 1), true["embedding"][view].flatten(0, 1)
            made.append(_distance(f"FAD {view}", frechet_distance, *points, unit="patches"))
    return made


def _distance(
    name: str,
    distance: Callable[[th.Tensor, th.Tensor], float],
    x: th.Tensor,
    y: th.Tensor,
    unit: str = "clips",
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


Figure = tuple[
    float | None, int, str
]  # what it is, how many it is made from, and what to know of it


def _compared(
    name: str,
    figure: Callable[[Any], Figure],
    ours: Any,
    true: Any,
    better: str = "",
    unit: str = "clips",
) -> Score:
    """The same figure of the samples and, where there are any, of the true clips, with what to know of either."""
    value, count, note = figure(ours)
    reference, reference_count, true_note = figure(true) if true else (None, 0, "")
    notes = [note, f"true clips: {true_note}" if true_note else ""]
    return Score(
        name, value, reference, better, count, reference_count, unit, "; ".join(filter(None, notes))
    )


def _mean_overlap(seen: Seen) -> Figure:
    """Mean over the clips that have anything to compare."""
    overlap = temporal_align.overlap(**seen["temporal"])
    undecided = len(seen["temporal"]["pairs"]) - len(overlap)
    note = f"{undecided} clips without onsets or peaks of motion left out" if undecided else ""
    return overlap.double().mean().item() if len(overlap) else None, len(overlap), note


def _hit_share(seen: Seen) -> Figure:
    """TP / (TP + FN) over all events of all clips."""
    if "spatial" not in seen:
        return None, 0, "the CSV files are of the samples"
    found, missed = (int(seen["spatial"][name].double().sum()) for name in ("hits", "misses"))
    every = found + missed
    return found / every if every else None, every, "" if every else "no sound events"


# ---------------------------------------------------------------- sound alone


def _stereo(ours: dict[str, th.Tensor], true: dict[str, th.Tensor] | None) -> list[Score]:
    unit = "tenths of a second"
    levels, delays = (functools.partial(_mean_of_bins, row) for row in EDGES)
    made = [
        _compared("level difference, mean |R - L| (dB)", levels, ours, true, unit=unit),
        _compared("delay, mean |L - R| (ms)", delays, ours, true, unit=unit),
        _compared("left-right correlation", _mean_correlation, ours, true),
    ]
    if true:
        made.append(_histograms_apart("level differences apart (dB)", ours, true, "levels"))
        made.append(_histograms_apart("delays apart (ms)", ours, true, "delays"))
    return made


def _mean_of_bins(row: str, seen: dict[str, th.Tensor]) -> Figure:
    """Mean distance from 0 of what the histograms [N, K] count, each bin by its centre."""
    total = seen[row].double().sum(dim=0)
    centres = (EDGES[row][1:] + EDGES[row][:-1]) / 2
    count = total.sum()
    mean = ((total * centres.abs()).sum() / count).item() if count > 0 else None
    return mean, int(count), "" if count > 0 else _why_none(seen)


def _mean_correlation(seen: dict[str, th.Tensor]) -> Figure:
    known = seen["correlation"][~seen["correlation"].isnan()]
    count = len(known)
    return known.double().mean().item() if count else None, count, "" if count else _why_none(seen)


def _why_none(seen: dict[str, th.Tensor]) -> str:
    """Why nothing is known of how channels differ."""
    return "never heard in both channels" if seen["heard"].any() else "nothing is heard"


def _histograms_apart(name: str, ours: dict, true: dict, row: str) -> Score:
    x, y = ours[row].double().sum(dim=0), true[row].double().sum(dim=0)
    score = Score(name, None, None, "lower", int(x.sum()), int(y.sum()), "tenths of a second")
    try:
        return dataclasses.replace(
            score, value=earth_movers_distance(x, y, float(EDGES[row][1] - EDGES[row][0]))
        )
    except TooFewError:
        empty = {"samples": ours} if not x.any() else {}
        empty |= {"true clips": true} if not y.any() else {}
        return dataclasses.replace(
            score, note="; ".join(f"{who}: {_why_none(seen)}" for who, seen in empty.items())
        )


def histograms(ours: Seen, true: Seen) -> dict[str, Any]:
    """{"level difference, R - L (dB)", "delay, L - R (ms)"} -> bin edges [K + 1], and the share [K] of what is heard.

    Shares are of "samples" and "reference", None where there is nothing; what is beyond is in the outermost bins.
    """

    def shares(seen: Seen, row: str) -> list[float] | None:
        counts = seen["stereo"][row].double().sum(dim=0) if seen else th.zeros(1)
        return (counts / counts.sum()).tolist() if counts.any() else None

    names = {"levels": "level difference, R - L (dB)", "delays": "delay, L - R (ms)"}
    return {
        name: {
            "edges": EDGES[row].tolist(),
            "samples": shares(ours, row),
            "reference": shares(true, row),
        }
        for row, name in names.items()
    }


# ---------------------------------------------------------------- memorisation


def _memorisation(
    x: th.Tensor, y: th.Tensor, name: Callable[[int], str], true_name: Callable[[int], str]
) -> tuple[Score, list[str]]:
    """Thumbnails [N, F, 3, h, w] of samples and true clips -> how near the nearest is, and the closest pairs.

    Training shows clips mirrored, too, so a sample may be near a mirrored one. The figure of the true clips is that
    between each and its nearest other one, also mirrored: samples that are much nearer have been learnt by heart.
    """
    distance, index, side = _nearest_of_either_side(x, y)
    try:
        reference, note = _nearest_of_either_side(y, y, leave_own_out=True)[0].median().item(), ""
    except TooFewError:
        reference, note = None, "one true clip only"
    pairs = [
        f"nearest true clip, {distance[k]:.3f} away: {name(k)} and {true_name(int(index[k]))}{MIRRORED * bool(side[k])}"
        for k in distance.argsort()[:CLOSEST].tolist()
    ]
    value = distance.median().item()
    return Score(
        "nearest true clip (RMS, median)", value, reference, "", len(x), len(y), note=note
    ), pairs


def _nearest_of_either_side(
    x: th.Tensor, y: th.Tensor, **options: bool
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """`nearest` for each of x [N, ...] as it is or mirrored -> (distance [N], number [N], whether mirrored [N])."""
    seen = [nearest(side.flatten(1), y.flatten(1), **options) for side in (x, x.flip(-1))]
    distance, side = th.stack([distances for distances, _ in seen]).min(dim=0)
    return (
        distance,
        th.stack([indices for _, indices in seen]).gather(0, side[None])[0],
        side.bool(),
    )


# ---------------------------------------------------------------- telling


def table(scores: list[Score]) -> str:
    """The scores as text, a row each; a figure that cannot be had is a dash."""

    def figure(value: float | None) -> str:
        assert value is None or math.isfinite(value)
        return "-" if value is None else f"{value:.4g}"

    rows = [("metric", "samples", "true clips", "better", "from", "")]
    for s in scores:
        counts = (
            f"{s.count} / {s.reference_count} {s.unit}"
            if s.reference_count
            else f"{s.count} {s.unit}"
        )
        rows.append((s.name, figure(s.value), figure(s.reference), s.better, counts, s.note))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)
