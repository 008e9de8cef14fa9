"""Do metrics measure what they claim? Every figure of true clips under every change of them.

The reference is always the unchanged clips. What a figure should do is in EXPECTED.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch as th
from tqdm import tqdm

from . import bright_object
from .changes import CHANGES, change_clip
from .clips import Clip, Rows
from .features import VIEWS
from .measures import Measure
from .scores import compute_scores

UNCHANGED = "unchanged"
FALL, STAY, RISE, OPEN = "fall", "stay", "rise", "open"
SIGNS = {FALL: "↓", STAY: "=", RISE: "↑"}
# Of `bright_object`.
PANNING, LOUDNESS = "object and panning, correlation", "object and loudness, correlation"
LEGEND = "↓ fell, = stayed, ↑ rose; !↓ it should have fallen; without a sign: nothing is expected"
Values = dict[str, float | None]  # figure -> its value


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What a figure should do; under changes that are not named it should stay.

    It stays if it moves by at most `tolerance`, in the unit of the figure or, if `is_share`, as a
    share of the largest value under any change.
    """

    tolerance: float
    fall: tuple[str, ...] = ()
    rise: tuple[str, ...] = ()
    open: tuple[str, ...] = ()
    is_share: bool = False

    def of(self, change: str) -> str:
        """FALL, STAY, RISE, or OPEN where nothing is expected."""
        for what, changes in {FALL: self.fall, RISE: self.rise, OPEN: self.open}.items():
            if change in changes:
                return what
        return STAY


ONE_MIRRORED = ("image mirrored", "channels swapped")
SWAPPED, MIRRORED = ("channels swapped", "both mirrored"), ("image mirrored", "both mirrored")
ONE_LATE, FOUR_LATE = ("audio 1 frame late",), ("audio 4 frames late",)
MONO, OTHER, REVERSED = ("mono",), ("other audio",), ("time reversed",)
IMAGE_NOISE, AUDIO_NOISE, DARKER = ("image noise",), ("audio noise",), ("darker",)

# Distances to the unchanged clips. A network may, but need not, notice mirroring, delays and the
# direction of time.
_video_distance = Expectation(
    1e-4, rise=IMAGE_NOISE + DARKER, open=MIRRORED + REVERSED, is_share=True
)
_mid = Expectation(1e-4, rise=AUDIO_NOISE, open=ONE_LATE + FOUR_LATE + REVERSED, is_share=True)
_channel = dataclasses.replace(_mid, rise=AUDIO_NOISE + MONO, open=_mid.open + SWAPPED)
# These two tolerate one frame. Reversed audio has other onsets. Mono is localised in the middle,
# which is within reach of wide objects.
_temporal = Expectation(
    0.04,
    fall=FOUR_LATE + OTHER,
    open=ONE_LATE + MONO + IMAGE_NOISE + AUDIO_NOISE + REVERSED,
)
_spatial = Expectation(
    0.04, fall=ONE_MIRRORED + FOUR_LATE + OTHER, open=ONE_LATE + MONO + IMAGE_NOISE + AUDIO_NOISE
)
# A delay cuts the audio into other segments: levels move a little, time differences more.
# How far swapped channels are from the reference depends on how lopsided that is.
_histogram = Expectation(0.6, rise=MONO + AUDIO_NOISE, open=SWAPPED)
EXPECTED = {
    **dict.fromkeys(("FVD", "KVD", "I3D MMD (Gaussian)"), _video_distance),
    **{f"{kind} {view}": _channel for kind in ("FAD", "KAD") for view in VIEWS},
    **dict.fromkeys(("FAD mid", "KAD mid"), _mid),
    "Temporal AV-Align": _temporal,
    "Temporal AV-Align, published count": _temporal,
    "Spatial AV-Align": _spatial,
    "ILD, mean |R - L| (dB)": Expectation(0.6, fall=MONO + AUDIO_NOISE),
    "ITD, mean |L - R| (ms)": Expectation(0.03, fall=MONO, open=AUDIO_NOISE + ONE_LATE + FOUR_LATE),
    "left-right correlation": Expectation(0.02, rise=MONO, fall=AUDIO_NOISE),
    "SMR, side to mid (dB)": Expectation(0.3, fall=MONO, rise=AUDIO_NOISE),
    "ILD distance (dB)": _histogram,
    # What is later on the left is earlier on the left in reversed time.
    "ITD distance (ms)": Expectation(
        0.03, rise=MONO + AUDIO_NOISE, open=SWAPPED + REVERSED + ONE_LATE + FOUR_LATE
    ),
    "ILD-W (dB)": _histogram,
    "SMR-Err (dB)": Expectation(0.3, rise=MONO + AUDIO_NOISE),
    "nearest reference clip (RMS, median)": Expectation(0.01, rise=IMAGE_NOISE + DARKER + REVERSED),
    # A change may stay below the threshold, which depends on how alike the clips are.
    "memorised (share)": Expectation(0.01, open=IMAGE_NOISE + DARKER + REVERSED),
    PANNING: Expectation(
        0.01,
        fall=ONE_MIRRORED + ONE_LATE + FOUR_LATE + MONO + OTHER,
        open=IMAGE_NOISE + AUDIO_NOISE,
    ),
    LOUDNESS: Expectation(
        0.02, fall=ONE_LATE + FOUR_LATE + OTHER, open=MONO + IMAGE_NOISE + AUDIO_NOISE
    ),
}


# ---------------------------------------------------------------- figures


def figures_under_changes(
    clips: Sequence[Clip],
    measures: Mapping[str, Measure],
    has_bright_objects: bool = False,
    num_workers: int = 1,
) -> dict[str, Values]:
    """Change -> figures of the changed clips against the unchanged ones.

    `has_bright_objects` adds what `bright_object` computes. ValueError for fewer than two clips.
    """
    if len(clips) < 2:
        raise ValueError(f"{len(clips)} clip: the audio of another one is needed; give at least 2")
    found: dict[str, Values] = {}
    reference: dict[str, Rows] = {}
    for name, change in tqdm(CHANGES.items(), "changes", leave=False):
        # Half of the set away: windows of one file are alike.
        others = [clips[(k + len(clips) // 2) % len(clips)] for k in range(len(clips))]
        changed = [change_clip(*pair, change) for pair in zip(clips, others, strict=True)]
        rows = _compute(changed, measures, num_workers)
        reference = reference or rows
        scores, _ = compute_scores(rows, reference)
        found[name] = {score.name: score.value for score in scores}
        if has_bright_objects:
            found[name] |= _object_figures(changed)
    return found


def _compute(
    clips: Sequence[Clip], measures: Mapping[str, Measure], num_workers: int
) -> dict[str, Rows]:
    """Measure -> its rows [N, ...]."""
    results = {}
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        for name, measure in measures.items():
            rows = list(pool.map(measure.compute, clips))
            results[name] = {row: th.stack([clip[row] for clip in rows]) for row in rows[0]}
    return results


def _object_figures(clips: Sequence[Clip]) -> Values:
    videos = th.stack([clip.video for clip in clips])
    audios = th.stack([clip.audio for clip in clips])
    values = {
        PANNING: bright_object.spatial_alignment(videos, audios),
        LOUDNESS: bright_object.temporal_alignment(videos, audios),
    }
    # What does not move has no correlation, and is no sign of alignment.
    return {name: 0.0 if math.isnan(value) else value for name, value in values.items()}


# ---------------------------------------------------------------- judgement


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A figure under a change: its value, what it did, and what it should do."""

    figure: str
    change: str
    value: float | None
    did: str  # FALL, STAY, RISE, or "" where it is undefined
    should: str

    @property
    def is_wrong(self) -> bool:
        return self.should not in (OPEN, self.did)

    def cell(self) -> str:
        """For the table."""
        value = "-" if self.value is None else f"{self.value:.3g}"
        if self.should == OPEN:
            return value
        did = SIGNS.get(self.did, "undefined")
        return f"{value} {did} !{SIGNS[self.should]}" if self.is_wrong else f"{value} {did}"


def judge(found: Mapping[str, Values]) -> list[Outcome]:
    """Change -> figures: what each did under each change, and whether that is right.

    A figure that is undefined for the unchanged clips is not judged.
    """
    outcomes = []
    for figure, before in found[UNCHANGED].items():
        expected = EXPECTED[figure]
        values = {change: values[figure] for change, values in found.items()}
        sizes = [abs(value) for value in values.values() if value is not None]
        tolerance = expected.tolerance * (max(sizes, default=0) if expected.is_share else 1)
        for change, value in values.items():
            is_judged = change != UNCHANGED and before is not None
            should = expected.of(change) if is_judged else OPEN
            did = _moved(before, value, tolerance)
            outcomes.append(Outcome(figure, change, value, did, should))
    return outcomes


def _moved(before: float | None, after: float | None, tolerance: float) -> str:
    if before is None or after is None:
        return ""
    if abs(after - before) <= tolerance:
        return STAY
    return RISE if after > before else FALL


def table(outcomes: Sequence[Outcome]) -> str:
    """A row for each figure, a column for each change, as Markdown."""
    rows: dict[str, list[str]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.figure, []).append(outcome.cell())
    grid = [["metric", *CHANGES], *([_escaped(figure), *cells] for figure, cells in rows.items())]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    grid.insert(1, ["-" * width for width in widths])
    lines = []
    for cells in grid:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """For a cell of Markdown."""
    return text.replace("|", r"\|")


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each figure that did not do what it should."""
    lines = []
    for outcome in outcomes:
        if outcome.is_wrong:
            did = {FALL: "fell", STAY: "stayed", RISE: "rose"}.get(outcome.did, "is undefined")
            lines.append(f"{outcome.figure}, {outcome.change}: {did}, should {outcome.should}")
    return lines
