"""Scores from what was computed of each clip, with the counts and notes needed to judge them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch as th

from . import stereo, temporal_av_align
from .bootstrap import (
    LEAST_FILES,
    ClipSet,
    Draws,
    Interval,
    Resampling,
    as_they_are,
    distance_interval,
    interval,
)
from .clips import Results, Rows
from .distances import (
    Points,
    TooFewError,
    earth_movers_distance,
    frechet_distances,
    gaussian_distances,
    kernel_distances,
    weighted_median,
)
from .features import VIEWS
from .memorisation import Neighbours, find_neighbours

FEW = 30  # scores of fewer clips are unreliable
BLACK = -0.98  # the brightest pixel of a black clip
PUBLISHED_FAD_SCALE = 1000
TEMPORAL, TEMPORAL_PUBLISHED = "Temporal AV-Align", "Temporal AV-Align, published count"
SPATIAL = "Spatial AV-Align"
ILD, ITD = "ILD, mean |R - L| (dB)", "ITD, mean |L - R| (ms)"
CORRELATION, SMR = "left-right correlation", "SMR, side to mid (dB)"
NEAREST, MEMORISED = "nearest reference clip (RMS, median)", "memorised (share)"
SEGMENTS = "segments of 0.1 s"
# Bin edges of the histograms: dB, ms.
EDGES = {
    "ild": stereo.ILD_EDGES_DB,
    "ild_band": stereo.BAND_EDGES_DB,
    "itd": 1e3 * stereo.ITD_EDGES_SECONDS,
}
# Of each clip [N]: numerator and denominator, 0 where the clip has no say. The figure of a set is
# the ratio of their sums.
Ratio = tuple[th.Tensor, th.Tensor]


@dataclasses.dataclass(frozen=True)
class Score:
    """A figure of the samples and, where defined, of the reference clips.

    A value of None comes with a note that says why. `better` is "lower", "higher", or "" where
    the reference's value is the aim. Counts are of `unit`. Intervals are of the bootstrap.
    """

    name: str
    value: float | None
    reference: float | None = None
    better: str = ""
    count: int = 0
    reference_count: int = 0
    unit: str = "clips"
    note: str = ""
    measure: str = ""  # what it is made of; the report says how that was computed
    interval: Interval = None
    reference_interval: Interval = None
    # For comparisons of runs, not part of a report.
    draws: Draws | None = dataclasses.field(default=None, repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """All but the draws."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if name != "draws"}


def make_score(
    name: str, figure: Draws | None, reference: Draws | None = None, **more: Any
) -> Score:
    """A score from a figure and that of the reference; a value that is not finite is undefined."""
    more |= {"interval": interval(figure) if figure else None}
    more |= {"reference_interval": interval(reference) if reference else None}
    return Score(name, _value(figure), _value(reference), draws=figure, **more)


def make_distance(name: str, figure: Draws | None, **more: Any) -> Score:
    """The same of distances between samples and reference."""
    score = make_score(name, figure, better="lower", **more)
    spread = distance_interval(figure) if figure else None
    return dataclasses.replace(score, interval=spread)


def _value(figure: Draws | None) -> float | None:
    if figure is None or not figure.values[0].isfinite():
        return None
    return figure.values[0].item()


def compute_scores(
    generated: Results,
    reference: Results,
    resampling: Resampling | None = None,
    neighbours: Neighbours | None = None,
) -> tuple[list[Score], list[str]]:
    """All scores, and notes on them; `reference` may be empty.

    They have intervals with `resampling`. `neighbours`: by `find_neighbours`, if known.
    """
    sets = as_they_are(generated), as_they_are(reference)
    notes = _set_notes("samples", generated)
    if reference:
        notes += _set_notes("reference", reference)
    if resampling:
        sets = resampling.sets(generated, reference)
        if not resampling.is_possible:
            notes.append(f"no intervals: they need {LEAST_FILES} files in each set")
    scores = [*_feature_distances(*sets), *_figure_scores(*sets), *_stereo_distances(*sets)]
    if reference:
        found = neighbours or find_neighbours(generated, reference)
        scores += _memorisation(*sets, found)
    return scores, notes


def scores_of_mono(scores: list[Score]) -> list[Score]:
    """Those that mean something for mono, whose left and right channel are equal."""
    others = [view for view in VIEWS if view != "mid"]
    stereo_only = {f"{distance} {view}" for view in others for distance in ("FAD", "KAD")}
    return [s for s in scores if s.measure != "stereo" and s.name not in stereo_only]


def published_scale(scores: list[Score]) -> list[Score]:
    """FAD as the published evaluations print it: of the mean of both channels, times 1000."""
    scaled = []
    for score in scores:
        if score.name == "FAD mid" and score.draws is not None:
            fields = ("count", "reference_count", "unit", "note", "measure")
            kept = {field: getattr(score, field) for field in fields}
            name = f"FAD mid x {PUBLISHED_FAD_SCALE}"
            draws = Draws(PUBLISHED_FAD_SCALE * score.draws.values, score.draws.files)
            scaled.append(make_distance(name, draws, **kept))
    return scaled


def _set_notes(which: str, results: Results) -> list[str]:
    """Notes on silent, black and few clips."""
    audible, pixels = results["stereo"]["audible"], results["thumbnail"]["pixels"]
    count = len(audible)
    notes = []
    if silent := int((audible == 0).sum()):
        notes.append(f"{which}: {silent} of {count} clips silent")
    if black := int((pixels.flatten(1).amax(dim=1) < BLACK).sum()):
        notes.append(f"{which}: {black} of {count} clips black")
    if count < FEW:
        notes.append(f"{which}: {count} clips only; scores of fewer than {FEW} are unreliable")
    return notes


# ---------------------------------------------------------------- distances to the reference


def _feature_distances(generated: ClipSet, reference: ClipSet) -> list[Score]:
    scores = []
    if "i3d" in reference.rows:
        x, y = _points(generated, "i3d", "features"), _points(reference, "i3d", "features")
        scores.append(_distance("FVD", frechet_distances, x, y, "i3d"))
        scores.append(_distance("KVD", kernel_distances, x, y, "i3d"))
        scores.append(_distance("I3D MMD (Gaussian)", gaussian_distances, x, y, "i3d"))
    if "embedding" in reference.rows:
        for view in VIEWS:
            x, y = _points(generated, "embedding", view), _points(reference, "embedding", view)
            scores.append(_distance(f"FAD {view}", frechet_distances, x, y, "embedding"))
            scores.append(_distance(f"KAD {view}", gaussian_distances, x, y, "embedding"))
    return scores


def _points(clips: ClipSet, measure: str, row: str) -> Points:
    """Features [N, D], or [N, P, D] of P patches of a clip, as points."""
    features = clips.rows[measure][row]
    patches = features.shape[1] if features.ndim > 2 else 1
    files = clips.files.repeat_interleave(patches)
    return Points(features.reshape(-1, features.shape[-1]), files, clips.weights)


def _distance(
    name: str,
    distance: Callable[[Points, Points], th.Tensor],
    x: Points,
    y: Points,
    measure: str,
) -> Score:
    figure, note, size = None, "", x.x.shape[1]
    if distance is frechet_distances and min(len(x.x), len(y.x)) <= size:
        note = f"too few: not more than the {size} features, far too large"
    try:
        figure = Draws(distance(x, y), min(x.weights.shape[1], y.weights.shape[1]))
    except TooFewError as error:
        note = str(error)
    more: dict[str, Any] = {"unit": "clips" if measure == "i3d" else "patches", "note": note}
    more |= {"count": len(x.x), "reference_count": len(y.x), "measure": measure}
    return make_distance(name, figure, **more)


# ---------------------------------------------------------------- ratios of sums over clips


def _overlap(rows: Rows) -> Ratio:
    overlap = temporal_av_align.overlap(**rows)
    return overlap.nan_to_num(), (~overlap.isnan()).double()


def _hits(rows: Rows) -> Ratio:
    """TP of TP + FN."""
    return rows["hits"], rows["hits"] + rows["misses"]


def _sizes(row: str, rows: Rows) -> Ratio:
    """Sum of the absolute values of a histogram, each bin by its centre, and its count."""
    centres = (EDGES[row][1:] + EDGES[row][:-1]) / 2
    return rows[row].double() @ centres.abs(), rows[row].double().sum(dim=1)


def _values(row: str, rows: Rows) -> Ratio:
    """The values that are defined."""
    return rows[row].nan_to_num(), (~rows[row].isnan()).double()


def _without_onsets(rows: Rows) -> str:
    undefined = int((_overlap(rows)[1] == 0).sum())
    return f"{undefined} clips without onsets or peaks of motion left out" if undefined else ""


def _without_events(rows: Rows) -> str:
    return "" if _hits(rows)[1].any() else "no audio events"


def _why_undefined(rows: Rows) -> str:
    """Why differences between the channels are undefined."""
    return "one channel is always silent" if rows["audible"].any() else "all clips are silent"


def _without_differences(ratio: Callable[[Rows], Ratio], rows: Rows) -> str:
    return "" if ratio(rows)[1].any() else _why_undefined(rows)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure that is a ratio of sums over clips, and a note on clips that have no say in it."""

    measure: str
    ratio: Callable[[Rows], Ratio]
    note: Callable[[Rows], str]
    better: str = ""
    unit: str = "clips"


def _stereo_figure(ratio: Callable[[Rows], Ratio], unit: str = "clips") -> Figure:
    return Figure("stereo", ratio, functools.partial(_without_differences, ratio), unit=unit)


FIGURES = {
    TEMPORAL: Figure("temporal", _overlap, _without_onsets, "higher"),
    TEMPORAL_PUBLISHED: Figure("temporal_published", _overlap, _without_onsets, "higher"),
    SPATIAL: Figure("spatial", _hits, _without_events, "higher", "events"),
    ILD: _stereo_figure(functools.partial(_sizes, "ild"), SEGMENTS),
    ITD: _stereo_figure(functools.partial(_sizes, "itd"), SEGMENTS),
    CORRELATION: _stereo_figure(functools.partial(_values, "correlation")),
    SMR: _stereo_figure(functools.partial(_values, "smr")),
}


def clip_values(results: Results, neighbours: Neighbours | None = None) -> dict[str, th.Tensor]:
    """Name of a score -> its value of each clip alone [N], NaN where undefined."""
    values = {}
    for name, figure in FIGURES.items():
        if figure.measure in results:
            numerator, denominator = figure.ratio(results[figure.measure])
            values[name] = numerator.double() / denominator
    if neighbours:
        values[NEAREST] = neighbours.distance
    return values


def _figure_scores(generated: ClipSet, reference: ClipSet) -> list[Score]:
    scores = []
    for name, figure in FIGURES.items():
        if figure.measure not in generated.rows:
            continue
        ours, count, note = _evaluate(figure, generated)
        true, true_count, true_note = None, 0, ""
        if figure.measure in reference.rows:
            true, true_count, true_note = _evaluate(figure, reference)
        elif reference.rows:
            true_note = "the CSV files are of the samples only"
        if true_note:
            note = "; ".join(filter(None, [note, f"reference: {true_note}"]))
        more: dict[str, Any] = {"count": count, "reference_count": true_count, "unit": figure.unit}
        more |= {"better": figure.better, "note": note, "measure": figure.measure}
        scores.append(make_score(name, ours, true, **more))
    return scores


def _evaluate(figure: Figure, clips: ClipSet) -> tuple[Draws, int, str]:
    """The figure, number of clips (events, ...) behind it, note."""
    rows = clips.rows[figure.measure]
    numerator, denominator = (part.double() for part in figure.ratio(rows))
    values = (clips.clip_weights @ numerator) / (clips.clip_weights @ denominator)
    return Draws(values, clips.num_files), int(denominator.sum()), figure.note(rows)


# ---------------------------------------------------------------- distances of stereo


def _stereo_distances(generated: ClipSet, reference: ClipSet) -> list[Score]:
    if not reference.rows:
        return []
    return [
        _histogram_distance("ILD distance (dB)", generated, reference, "ild"),
        _histogram_distance("ITD distance (ms)", generated, reference, "itd"),
        _histogram_distance("ILD-W (dB)", generated, reference, "ild_band"),
        _error_of_mean("SMR-Err (dB)", FIGURES[SMR], generated, reference),
    ]


def _error_of_mean(name: str, figure: Figure, generated: ClipSet, reference: ClipSet) -> Score:
    """|samples - reference| of a figure."""
    figures, counts, notes = [], [], []
    for which, clips in {"samples": generated, "reference": reference}.items():
        found, count, note = _evaluate(figure, clips)
        figures.append(found)
        counts.append(count)
        notes += [f"{which}: {note}"] if note else []
    more: dict[str, Any] = {"note": "; ".join(notes), "unit": figure.unit}
    more |= {"count": counts[0], "reference_count": counts[1], "measure": figure.measure}
    difference = figures[0] - figures[1]
    return make_distance(name, Draws(difference.values.abs(), difference.files), **more)


def _histogram_distance(name: str, generated: ClipSet, reference: ClipSet, row: str) -> Score:
    """Wasserstein-1 distance."""
    histograms, notes = [], []
    for which, clips in {"samples": generated, "reference": reference}.items():
        histograms.append(clips.clip_weights @ clips.rows["stereo"][row].double())
        if not histograms[-1][0].any():
            notes.append(f"{which}: {_why_undefined(clips.rows['stereo'])}")
    x, y = histograms
    values = earth_movers_distance(x, y, float(EDGES[row][1] - EDGES[row][0]))
    figure = Draws(values, min(generated.num_files, reference.num_files))
    more: dict[str, Any] = {"count": int(x[0].sum()), "reference_count": int(y[0].sum())}
    more |= {"unit": SEGMENTS, "note": "; ".join(notes), "measure": "stereo"}
    return make_distance(name, figure, **more)


def histograms(generated: Results, reference: Results) -> dict[str, Any]:
    """For ILD and ITD {"edges": [K + 1], "samples": [K], "reference": [K]}.

    The shares of audible segments, None where there are none. Values beyond the edges are in the
    outermost bins.
    """
    found = {}
    for row, title in {"ild": "ILD, R - L (dB)", "itd": "ITD, L - R (ms)"}.items():
        shares = {"samples": _shares(generated, row), "reference": _shares(reference, row)}
        found[title] = {"edges": EDGES[row].tolist(), **shares}
    return found


def _shares(results: Results, row: str) -> list[float] | None:
    if not results:
        return None
    counts = results["stereo"][row].double().sum(dim=0)
    return (counts / counts.sum()).tolist() if counts.any() else None


# ---------------------------------------------------------------- memorisation


def _memorisation(generated: ClipSet, reference: ClipSet, found: Neighbours) -> list[Score]:
    """Distances to the nearest reference clip, and the share of samples that are memorised.

    The reference's values are of the distance of each of its clips to the nearest of other files.
    Draws keep the nearest clips that were found.
    """
    counts = {"count": len(generated.files), "reference_count": len(reference.files)}
    more: dict[str, Any] = {"measure": "thumbnail", **counts}
    medians = _median(found.distance, generated)
    if found.own is None or found.threshold is None:
        more["note"] = "one reference file only"
        memorised = make_score(MEMORISED, None, better="lower", **more)
        return [make_score(NEAREST, medians, **more), memorised]
    own_medians = _median(found.own, reference)
    shares = _share(found.distance <= found.threshold, generated)
    own_shares = _share(found.own <= found.threshold, reference)
    memorised = make_score(MEMORISED, shares, own_shares, better="lower", **more)
    return [make_score(NEAREST, medians, own_medians, **more), memorised]


def _median(values: th.Tensor, clips: ClipSet) -> Draws:
    """The median of values [N] of the clips."""
    return Draws(weighted_median(values, clips.clip_weights), clips.num_files)


def _share(chosen: th.Tensor, clips: ClipSet) -> Draws:
    """The share of the clips [N] that are chosen."""
    weights = clips.clip_weights
    return Draws((weights @ chosen.double()) / weights.sum(dim=1), clips.num_files)
