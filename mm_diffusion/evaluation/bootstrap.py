"""Bootstrap over files: how much a figure depends on which clips happened to be there.

A draw gives every file a weight, the number of times that it was drawn; all windows of a file have
it. A figure is computed under R weightings at once, of which the first is all ones: its value.
"""

from __future__ import annotations

import dataclasses
import math
import statistics

import torch as th

from .. import rng
from .clips import Results

LEVEL = 0.95
SEED = 0
LEAST_FILES = 5  # of 4 that are alike, one set in 8 has all differences of one sign
Interval = tuple[float, float] | None


def weightings(num_files: int, draws: int, name: str) -> th.Tensor:
    """[1 + draws, num_files]: a row of ones, then how often each file was drawn of so many."""
    generator = rng.generator(SEED, "bootstrap", name, num_files)
    drawn = th.randint(max(1, num_files), (draws, num_files), generator=generator)
    counts = th.zeros(draws, num_files, dtype=th.float64)
    counts.scatter_add_(1, drawn, th.ones_like(counts))
    return th.cat([th.ones(1, num_files, dtype=th.float64), counts])


@dataclasses.dataclass(frozen=True)
class ClipSet:
    """What was computed of N clips, the file of each [N], and weights of the files [R, files]."""

    rows: Results
    files: th.Tensor
    weights: th.Tensor

    @property
    def num_files(self) -> int:
        """How many files the clips are of."""
        return self.weights.shape[1]

    @property
    def clip_weights(self) -> th.Tensor:
        """[R, N]."""
        return self.weights[:, self.files]


@dataclasses.dataclass(frozen=True)
class Resampling:
    """The file [N] of every clip of both sets, and how often files are drawn.

    Equally many files are drawn alike: runs of as many samples are compared file by file, such as
    those of one seed, and against the same draws of the reference.
    """

    files: th.Tensor
    reference_files: th.Tensor
    draws: int

    @property
    def is_possible(self) -> bool:
        """Whether each set has enough files."""
        sets = [files for files in (self.files, self.reference_files) if len(files)]
        return all(_count(files) >= LEAST_FILES for files in sets)

    def sets(self, generated: Results, reference: Results) -> tuple[ClipSet, ClipSet]:
        """Both sets with their weights."""
        draws = self.draws if self.is_possible else 0
        weights = weightings(_count(self.files), draws, "samples")
        samples = ClipSet(generated, self.files, weights)
        weights = weightings(_count(self.reference_files), draws, "reference")
        return samples, ClipSet(reference, self.reference_files, weights)


def _count(files: th.Tensor) -> int:
    return int(files.max()) + 1 if len(files) else 0


def as_they_are(rows: Results) -> ClipSet:
    """The clips without draws."""
    count = len(rows["stereo"]["audible"]) if rows else 0
    return ClipSet(rows, th.zeros(count, dtype=th.long), weightings(1, 0, ""))


@dataclasses.dataclass(frozen=True)
class Draws:
    """A figure under R weightings [R], the first of which gives its value, of so many files."""

    values: th.Tensor
    files: int

    def __sub__(self, other: Draws) -> Draws:
        """The difference of two figures, of which the one of fewer files says how sure it is."""
        return Draws(self.values - other.values, min(self.files, other.files))


def tail(files: int) -> float:
    """The share of draws beyond either end of an interval of a figure of n files.

    It is Phi(-t sqrt(n / (n - 1))), the expanded percentile of Hesterberg (2015): draws of n files
    vary less than sets of n files do, and n files know their variance as well as Student's t says.
    t is of n - 1 degrees of freedom, to 0.5 % (Wallace, 1959).
    """
    normal, freedom = statistics.NormalDist(), files - 1
    z = normal.inv_cdf((1 + LEVEL) / 2) * (8 * freedom + 3) / (8 * freedom + 1)
    t = math.sqrt(freedom * math.expm1(z**2 / freedom))
    return normal.cdf(-t * math.sqrt(files / freedom))


def interval(figure: Draws, centred: bool = False) -> Interval:
    """The draws of a figure but for the `tail` at either end.

    None without draws in which the figure is defined. `centred`: shifted so that the mean of the
    draws is the value.
    """
    value, draws = figure.values[0], figure.values[1:]
    draws = draws[draws.isfinite()]
    if not len(draws) or not value.isfinite():
        return None
    beyond = tail(figure.files)
    ends = th.tensor([beyond, 1 - beyond], dtype=draws.dtype)
    shift = value - draws.mean() if centred else 0
    low, high = (draws.quantile(ends) + shift).tolist()
    return low, high


def distance_interval(figure: Draws) -> Interval:
    """`interval` of a distance between sets.

    Draws of two sets are farther apart on average than the sets are, as small sets are than large
    ones: that mean difference is taken off. A distance without negative draws ends at 0.
    """
    found, values = interval(figure, centred=True), figure.values
    if found and values[values.isfinite()].min() >= 0:
        return max(0.0, found[0]), max(0.0, found[1])
    return found
