"""Scores from what was computed of each clip, with the counts and notes needed to judge them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch as th

from . import stereo, temporal_av_align
from .clips import Results
from .distances import (
    TooFewError,
    earth_movers_distance,
    frechet_distance,
    gaussian_distance,
    kernel_distance,
    nearest,
)
from .features import VIEWS

FEW = 30  # scores of fewer clips are unreliable
BLACK = -0.98  # the brightest pixel of a black clip
NUM_CLOSEST = 3  # pairs of a sample and its nearest reference clip that are named
PUBLISHED_FAD_SCALE = 1000
TEMPORAL = {
    "temporal": "Temporal AV-Align",
    "temporal_published": "Temporal AV-Align, published count",
}
SEGMENTS = "segments of 0.1 s"
# Bin edges of the histograms: dB, ms.
EDGES = {
    "ild": stereo.ILD_EDGES_DB,
    "ild_band": stereo.BAND_EDGES_DB,
    "itd": 1e3 * stereo.ITD_EDGES_SECONDS,
}
Figure = tuple[float | None, int, str]  # value, number of clips (events, ...) behind it, note


@dataclasses.dataclass(frozen=True)
class Score:
    """A figure of the samples and, where defined, of the reference clips.

    A value of None comes with a note that says why. `better` is "lower", "higher", or "" where
    the reference's value is the aim. Counts are of `unit`.
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


def compute_scores(
    generated: Results,
    reference: Results,
    name: Callable[[int], str] = str,
    reference_name: Callable[[int], str] = str,
) -> tuple[list[Score], list[str]]:
    """All scores, and notes on them, in which clips have these names; `reference` may be empty."""
    both = generated, reference
    scores = _feature_distances(*both)
    for measure, title in TEMPORAL.items():
        if measure in generated:
            mean_overlap = functools.partial(_mean_overlap, measure)
            scores += _made_of(measure, _compare(title, mean_overlap, *both, "higher"))
    if "spatial" in generated:
        score = _compare("Spatial AV-Align", _hit_share, *both, "higher", "events")
        scores += _made_of("spatial", score)
    scores += _made_of("stereo", *_stereo_scores(*both))
    notes = _set_notes("samples", generated)
    if reference:
        notes += _set_notes("reference", reference)
        score, pairs = _memorisation(*both, name, reference_name)
        scores += _made_of("thumbnail", score)
        notes += pairs
    return scores, notes


def _made_of(measure: str, *scores: Score) -> list[Score]:
    return [dataclasses.replace(score, measure=measure) for score in scores]


def scores_of_mono(scores: list[Score]) -> list[Score]:
    """Those that mean something for mono, whose left and right channel are equal."""
    others = [view for view in VIEWS if view != "mid"]
    stereo_only = {f"{distance} {view}" for view in others for distance in ("FAD", "KAD")}
    return [s for s in scores if s.measure != "stereo" and s.name not in stereo_only]


def published_scale(scores: list[Score]) -> list[Score]:
    """FAD as the published evaluations print it: of the mean of both channels, times 1000."""
    scaled = []
    for score in scores:
        if score.name == "FAD mid" and score.value is not None:
            name, value = f"FAD mid x {PUBLISHED_FAD_SCALE}", PUBLISHED_FAD_SCALE * score.value
            scaled.append(dataclasses.replace(score, name=name, value=value))
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


def _compare(
    name: str,
    figure: Callable[[Results], Figure],
    generated: Results,
    reference: Results,
    better: str = "",
    unit: str = "clips",
) -> Score:
    """The same figure of the samples and, if there are any, of the reference clips."""
    value, count, note = figure(generated)
    true_value, true_count, true_note = figure(reference) if reference else (None, 0, "")
    if true_note:
        note = "; ".join(filter(None, [note, f"reference: {true_note}"]))
    return Score(name, value, true_value, better, count, true_count, unit, note)


# ---------------------------------------------------------------- distances to the reference


def _feature_distances(generated: Results, reference: Results) -> list[Score]:
    scores = []
    if "i3d" in reference:
        points = generated["i3d"]["features"], reference["i3d"]["features"]
        fvd = _distance("FVD", frechet_distance, *points)
        kvd = _distance("KVD", kernel_distance, *points)
        mmd = _distance("I3D MMD (Gaussian)", gaussian_distance, *points)
        scores += _made_of("i3d", fvd, kvd, mmd)
    if "embedding" in reference:
        for view in VIEWS:
            x = generated["embedding"][view].flatten(0, 1)
            y = reference["embedding"][view].flatten(0, 1)
            fad = _distance(f"FAD {view}", frechet_distance, x, y, unit="patches")
            kad = _distance(f"KAD {view}", gaussian_distance, x, y, unit="patches")
            scores += _made_of("embedding", fad, kad)
    return scores


def _distance(
    name: str,
    distance: Callable[[th.Tensor, th.Tensor], float],
    x: th.Tensor,
    y: th.Tensor,
    unit: str = "clips",
) -> Score:
    size, note = x.shape[1], ""
    if distance is frechet_distance and min(len(x), len(y)) <= size:
        note = f"too few: not more than the {size} features, far too large"
    try:
        value = distance(x, y)
    except TooFewError as error:
        value, note = None, str(error)
    return Score(name, value, None, "lower", len(x), len(y), unit, note)


# ---------------------------------------------------------------- alignment


def _mean_overlap(measure: str, results: Results) -> Figure:
    """Mean over the clips that have onsets or peaks."""
    overlap = temporal_av_align.overlap(**results[measure])
    undefined = len(results[measure]["pairs"]) - len(overlap)
    note = f"{undefined} clips without onsets or peaks of motion left out" if undefined else ""
    value = overlap.double().mean().item() if len(overlap) else None
    return value, len(overlap), note


def _hit_share(results: Results) -> Figure:
    """TP / (TP + FN) over all events of all clips."""
    if "spatial" not in results:
        return None, 0, "the CSV files are of the samples only"
    hits = int(results["spatial"]["hits"].double().sum())
    events = hits + int(results["spatial"]["misses"].double().sum())
    return (hits / events, events, "") if events else (None, 0, "no audio events")


# ---------------------------------------------------------------- stereo


def _stereo_scores(generated: Results, reference: Results) -> list[Score]:
    both = generated, reference
    mean_ild, mean_itd = functools.partial(_mean_size, "ild"), functools.partial(_mean_size, "itd")
    scores = [
        _compare("ILD, mean |R - L| (dB)", mean_ild, *both, unit=SEGMENTS),
        _compare("ITD, mean |L - R| (ms)", mean_itd, *both, unit=SEGMENTS),
        _compare("left-right correlation", functools.partial(_mean_row, "correlation"), *both),
        _compare("SMR, side to mid (dB)", functools.partial(_mean_row, "smr"), *both),
    ]
    if reference:
        scores.append(_histogram_distance("ILD distance (dB)", *both, "ild"))
        scores.append(_histogram_distance("ITD distance (ms)", *both, "itd"))
        scores.append(_histogram_distance("ILD-W (dB)", *both, "ild_band"))
        scores.append(_error_of_mean("SMR-Err (dB)", scores[3]))
    return scores


def _error_of_mean(name: str, score: Score) -> Score:
    """|samples - reference| of a score."""
    known = score.value is not None and score.reference is not None
    error = abs(score.value - score.reference) if known else None  # type: ignore[operator]
    return dataclasses.replace(score, name=name, value=error, reference=None, better="lower")


def _counts(results: Results, row: str) -> th.Tensor:
    """Histogram [K] over all clips."""
    return results["stereo"][row].double().sum(dim=0)


def _mean_size(row: str, results: Results) -> Figure:
    """Mean absolute value of a histogram, each bin by its centre."""
    counts = _counts(results, row)
    total = counts.sum()
    if not total:
        return None, 0, _why_undefined(results)
    centres = (EDGES[row][1:] + EDGES[row][:-1]) / 2
    return ((counts * centres.abs()).sum() / total).item(), int(total), ""


def _mean_row(row: str, results: Results) -> Figure:
    """Mean over the clips where it is defined."""
    values = results["stereo"][row]
    defined = values[~values.isnan()]
    if not len(defined):
        return None, 0, _why_undefined(results)
    return defined.double().mean().item(), len(defined), ""


def _why_undefined(results: Results) -> str:
    """Why differences between the channels are undefined."""
    is_audible = results["stereo"]["audible"].any()
    return "one channel is always silent" if is_audible else "all clips are silent"


def _histogram_distance(name: str, generated: Results, reference: Results, row: str) -> Score:
    """Wasserstein-1 distance."""
    x, y = _counts(generated, row), _counts(reference, row)
    notes = []
    if not x.any():
        notes.append(f"samples: {_why_undefined(generated)}")
    if not y.any():
        notes.append(f"reference: {_why_undefined(reference)}")
    bin_width = float(EDGES[row][1] - EDGES[row][0])
    value = None if notes else earth_movers_distance(x, y, bin_width)
    counts = int(x.sum()), int(y.sum())
    return Score(name, value, None, "lower", *counts, SEGMENTS, "; ".join(notes))


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
    counts = _counts(results, row)
    return (counts / counts.sum()).tolist() if counts.any() else None


# ---------------------------------------------------------------- memorisation


def _memorisation(
    generated: Results,
    reference: Results,
    name: Callable[[int], str],
    reference_name: Callable[[int], str],
) -> tuple[Score, list[str]]:
    """Distance of thumbnails to the nearest reference clip, and the closest pairs.

    Training flips clips, so a sample may be close to a flipped one. The reference's value is the
    distance of each clip to its nearest other one, also flipped: samples that are much closer
    are memorised.
    """
    x, y = generated["thumbnail"]["pixels"], reference["thumbnail"]["pixels"]
    distance, index, is_flipped = _nearest_or_flipped(x, y)
    own_value, note = None, "one reference clip only"
    if len(y) > 1:
        own_value, note = _nearest_or_flipped(y, y, skip_same_index=True)[0].median().item(), ""
    pairs = []
    for k in distance.argsort()[:NUM_CLOSEST].tolist():
        pair = f"{name(k)} and {reference_name(int(index[k]))}"
        flipped = " (flipped)" if is_flipped[k] else ""
        pairs.append(f"nearest reference clip, distance {distance[k]:.3f}: {pair}{flipped}")
    title, value = "nearest reference clip (RMS, median)", distance.median().item()
    return Score(title, value, own_value, "", len(x), len(y), note=note), pairs


def _nearest_or_flipped(
    x: th.Tensor, y: th.Tensor, skip_same_index: bool = False
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """`nearest` of x [N, ...] as it is or flipped -> (distance, index, is flipped), each [N]."""
    as_is = nearest(x.flatten(1), y.flatten(1), skip_same_index)
    flipped = nearest(x.flip(-1).flatten(1), y.flatten(1), skip_same_index)
    is_flipped = flipped[0] < as_is[0]
    distance = th.minimum(as_is[0], flipped[0])
    return distance, th.where(is_flipped, flipped[1], as_is[1]), is_flipped
