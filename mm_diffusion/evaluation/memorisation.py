"""Memorised samples: those nearer to a reference clip than clips of different files are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch as th

from .clips import Results
from .distances import nearest

# A sample at most this far is memorised: the quantile of the reference clips' own distances to
# the nearest clip of another file. Of samples of the same distribution, about this share is as
# near. Windows of one file may be as alike as copies, and do not count.
QUANTILE = 0.01
NUM_CLOSEST = 3  # pairs that are named


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Of each sample: distance to the nearest reference clip [N], its number, if it is mirrored.

    `own` [M]: distance of each reference clip to the nearest one of another file; None if all are
    of one file.
    """

    distance: th.Tensor
    index: th.Tensor
    is_flipped: th.Tensor
    own: th.Tensor | None

    @property
    def threshold(self) -> float | None:
        """The distance up to which a sample is memorised; None without distances to compare."""
        if self.own is None:
            return None
        return self.own.quantile(QUANTILE, interpolation="lower").item()

    def closest(self) -> list[int]:
        """The samples nearest to a reference clip, the nearest first."""
        return self.distance.argsort(stable=True)[:NUM_CLOSEST].tolist()

    def notes(self, name: Callable[[int], str], reference_name: Callable[[int], str]) -> list[str]:
        """The closest pairs and the threshold; clips have these names."""
        lines = []
        for k in self.closest():
            pair = f"{name(k)} and {reference_name(int(self.index[k]))}"
            flipped = " (flipped)" if self.is_flipped[k] else ""
            lines.append(
                f"nearest reference clip, distance {self.distance[k]:.3f}: {pair}{flipped}"
            )
        if self.threshold is not None:
            nearest_ones = f"the nearest {QUANTILE:.0%} of reference clips, one at least"
            lines.append(
                f"memorised: at a distance of {self.threshold:.3f} or less, as {nearest_ones},"
                " are to one of another file"
            )
        if self.threshold == 0:
            lines.append("reference: files with equal clips, so that memorised means equal")
        return lines


def find_neighbours(
    generated: Results, reference: Results, files: th.Tensor | None = None
) -> Neighbours:
    """By thumbnails. Training flips clips, so both kinds of distances are to flipped ones, too.

    `files` [M]: the file of each reference clip; None: each has one of its own.
    """
    x, y = generated["thumbnail"]["pixels"], reference["thumbnail"]["pixels"]
    files = th.arange(len(y)) if files is None else files
    own = _nearest_or_flipped(y, y, files)[0] if len(files.unique()) > 1 else None
    return Neighbours(*_nearest_or_flipped(x, y), own)


def _nearest_or_flipped(
    x: th.Tensor, y: th.Tensor, groups: th.Tensor | None = None
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """`nearest` of x [N, ...] as it is or flipped -> (distance, index, is flipped), each [N]."""
    as_is = nearest(x.flatten(1), y.flatten(1), groups)
    flipped = nearest(x.flip(-1).flatten(1), y.flatten(1), groups)
    is_flipped = flipped[0] < as_is[0]
    distance = th.minimum(as_is[0], flipped[0])
    return distance, th.where(is_flipped, flipped[1], as_is[1]), is_flipped
