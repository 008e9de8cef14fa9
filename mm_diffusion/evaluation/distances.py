"""Distances between sets of points: Frechet, polynomial kernel, histograms, nearest neighbours.

All are computed in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch as th

KERNEL_DEGREE = 3  # of the published kernel distance: (x . y / D + 1)^3
BLOCK = 1024  # rows compared with all others at a time
MEDIAN_POINTS = 2048  # of which the median distance is taken, evenly chosen
Kernel = Callable[[th.Tensor, th.Tensor], th.Tensor]  # [N, D], [M, D] -> [N, M]


class TooFewError(ValueError):
    """A set is too small for a distance."""


@dataclasses.dataclass(frozen=True)
class Points:
    """A set of points [N, D], the group of each [N], and R weightings of the groups [R, G].

    Points of a group, such as those of a file, are drawn together: a weight says how often.
    """

    x: th.Tensor
    groups: th.Tensor
    weights: th.Tensor

    @classmethod
    def unweighted(cls, x: th.Tensor) -> Points:
        """One group of weight 1."""
        return cls(x, th.zeros(len(x), dtype=th.long), th.ones(1, 1, dtype=th.float64))

    @property
    def counts(self) -> th.Tensor:
        """[G]: how many points a group has."""
        return self.groups.bincount(minlength=self.weights.shape[1]).double()


def frechet_distances(x: Points, y: Points) -> th.Tensor:
    """Squared Frechet distance [R] of Gaussians with the means and covariances of weighted points.

    |mu_x - mu_y|^2 + tr A + tr B - 2 tr (A B)^(1/2), arXiv 1706.08500, covariances unbiased.
    With A = R^T R and B = S^T S from the centred points, the last trace is the nuclear norm of
    R S^T. No matrix root is taken, so sets smaller than D are exact, too. NaN under weights that
    leave a single point. TooFewError for fewer than 2 points.
    """
    _require("a Frechet distance", 2, x, y)
    first, second = x.x.double(), y.x.double()
    pairs = zip(x.weights[:, x.groups], y.weights[:, y.groups], strict=True)
    return th.stack([_frechet_distance(first, second, *weights) for weights in pairs])


def _frechet_distance(x: th.Tensor, y: th.Tensor, w: th.Tensor, v: th.Tensor) -> th.Tensor:
    if min(w.count_nonzero(), v.count_nonzero()) < 2:
        return th.tensor(th.nan, dtype=th.float64)
    mean_x, r = _moments(x, w)
    mean_y, s = _moments(y, v)
    between_means = (mean_x - mean_y).square().sum()
    cross = th.linalg.svdvals(r @ s.T).sum()
    return (between_means + r.square().sum() + s.square().sum() - 2 * cross).clamp(min=0)


def frechet_distance(x: th.Tensor, y: th.Tensor) -> float:
    """[N, D], [M, D] -> `frechet_distances` of points that all have one weight."""
    return frechet_distances(Points.unweighted(x), Points.unweighted(y)).item()


def standard_frechet_distance(x: th.Tensor, y: th.Tensor) -> float:
    """[N, D], [M, D] -> `frechet_distance`, each dimension divided by the standard deviation of y.

    A dimension in which y is constant is not scaled.
    """
    spread = y.double().std(dim=0)
    spread = th.where(spread > 0, spread, 1.0)
    return frechet_distance(x / spread, y / spread)


def _moments(x: th.Tensor, w: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """[N, D], weights [N] -> (mean [D], R [min(N, D), D] such that R^T R is the covariance).

    It is divided by 1 - sum p^2, with p the share of a point: as it would be for distinct points.
    """
    x, w = x[w > 0], w[w > 0]
    p = w / w.sum()
    mean = p @ x
    root = (p / (1 - p.square().sum())).sqrt()[:, None] * (x - mean)
    return mean, th.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root


def kernel_distances(x: Points, y: Points) -> th.Tensor:
    """Unbiased squared maximum mean discrepancy [R] under k = (x . y / D + 1)^3.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),
    arXiv 1801.01401. For two sets of one distribution it is 0 on average and often negative.
    TooFewError for fewer than 2 points.
    """
    return _mean_discrepancy(_polynomial, x, y)


def gaussian_distances(x: Points, y: Points) -> th.Tensor:
    """`kernel_distances` under k = exp(-|x - y|^2 / (2 s^2)), arXiv 2502.15602 (KAD, unscaled).

    s is the median distance of different points of y, unweighted. TooFewError for fewer than 2
    points, or where s is 0.
    """
    _require("a kernel distance", 2, x, y)
    bandwidth = _median_distance(y.x.double())
    if not bandwidth:
        raise TooFewError("a kernel distance needs reference points that differ")

    def kernel(a: th.Tensor, b: th.Tensor) -> th.Tensor:
        return (-0.5 * (th.cdist(a, b) / bandwidth).square()).exp()

    return _mean_discrepancy(kernel, x, y)


def _median_distance(y: th.Tensor) -> float:
    chosen = th.linspace(0, len(y) - 1, min(len(y), MEDIAN_POINTS)).round().long()
    return th.pdist(y[chosen]).median().item()


def _polynomial(x: th.Tensor, y: th.Tensor) -> th.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** KERNEL_DEGREE


def _mean_discrepancy(kernel: Kernel, x: Points, y: Points) -> th.Tensor:
    """Unbiased squared maximum mean discrepancy [R]; TooFewError for fewer than 2 points.

    NaN under weights that leave no pair.
    """
    _require("a kernel distance", 2, x, y)
    sums = ((x.weights @ _group_sums(kernel, x, y)) * y.weights).sum(dim=1)
    between = sums / ((x.weights @ x.counts) * (y.weights @ y.counts))
    return _mean_within(kernel, x) + _mean_within(kernel, y) - 2 * between


def _mean_within(kernel: Kernel, x: Points) -> th.Tensor:
    """Mean [R] of the kernel over pairs of different points.

    Pairs of two groups count as often as the product of their weights, and those within a group as
    often as its weight. So copies of a group make no pairs, and the mean over draws is unbiased.
    """
    sums = _group_sums(kernel, x, x, skip_same_index=True)
    pairs = x.counts.outer(x.counts) - x.counts.diag()
    return _over_pairs(sums, x.weights) / _over_pairs(pairs, x.weights)


def _over_pairs(sums: th.Tensor, weights: th.Tensor) -> th.Tensor:
    """[G, G], [R, G] -> [R]."""
    within = sums.diagonal()
    between = sums - within.diag()
    return ((weights @ between) * weights).sum(dim=1) + weights @ within


def _group_sums(kernel: Kernel, x: Points, y: Points, skip_same_index: bool = False) -> th.Tensor:
    """[G, H]: the sum of the kernel over the points of each group of x and each one of y."""
    first, second = x.x.double(), y.x.double()
    sizes = x.weights.shape[1], y.weights.shape[1]
    total = th.zeros(*sizes, dtype=th.float64)
    for start in range(0, len(first), BLOCK):
        values = kernel(first[start : start + BLOCK], second)
        if skip_same_index:
            values.diagonal(start).fill_(0)
        rows = th.zeros(len(values), sizes[1], dtype=th.float64).index_add_(1, y.groups, values)
        total.index_add_(0, x.groups[start : start + BLOCK], rows)
    return total


def _require(what: str, least: int, x: Points, y: Points) -> None:
    sizes = len(x.x), len(y.x)
    if min(sizes) < least:
        raise TooFewError(
            f"{what} needs at least {least} in each set, got {sizes[0]} and {sizes[1]}"
        )


def earth_movers_distance(x: th.Tensor, y: th.Tensor, bin_width: float = 1.0) -> th.Tensor:
    """Counts [..., K], [..., K] in equal bins -> Wasserstein-1 distance [...].

    In the unit of `bin_width`; NaN for an empty histogram.
    """
    x, y = x.double(), y.double()
    shares = x / x.sum(dim=-1, keepdim=True), y / y.sum(dim=-1, keepdim=True)
    return bin_width * (shares[0] - shares[1]).cumsum(dim=-1).abs().sum(dim=-1)


def weighted_median(values: th.Tensor, weights: th.Tensor) -> th.Tensor:
    """[N], [R, N] -> [R]: the first value up to which half of the weight lies."""
    ordered, order = values.sort()
    below = weights[:, order].cumsum(dim=1)
    return ordered[(below >= below[:, -1:] / 2).long().argmax(dim=1)]


def nearest(
    x: th.Tensor, y: th.Tensor, groups: th.Tensor | None = None
) -> tuple[th.Tensor, th.Tensor]:
    """[N, D], [M, D] -> (RMS difference to the nearest point of y [N], its index [N]).

    `groups` [N]: x is y, perhaps flipped, and points of a group, such as those of a file, are no
    neighbours. TooFewError where no neighbour is left.
    """
    count = len(y) if groups is None else len(groups.unique())
    if count < (1 if groups is None else 2):
        raise TooFewError(f"no neighbour among {len(y)} points of {count} groups")
    found = []
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK].double()
        distance = th.cdist(rows, y.double(), compute_mode="donot_use_mm_for_euclid_dist")
        if groups is not None:
            distance[groups[start : start + BLOCK, None] == groups] = th.inf
        found.append(distance.min(dim=1))
    values, indices = (th.cat(parts) for parts in zip(*found, strict=True))
    return values / x.shape[1] ** 0.5, indices
