"""Distances between sets of points: Frechet, polynomial kernel, histograms, nearest neighbours.

All are computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch as th

KERNEL_DEGREE = 3  # of the published kernel distance: (x . y / D + 1)^3
BLOCK = 1024  # rows compared with all others at a time
MEDIAN_POINTS = 2048  # of which the median distance is taken, evenly chosen
Kernel = Callable[[th.Tensor, th.Tensor], th.Tensor]  # [N, D], [M, D] -> [N, M]


class TooFewError(ValueError):
    """A set is too small for a distance."""


def frechet_distance(x: th.Tensor, y: th.Tensor) -> float:
    """[N, D], [M, D] -> squared Frechet distance of Gaussians with their means and covariances.

    |mu_x - mu_y|^2 + tr A + tr B - 2 tr (A B)^(1/2), arXiv 1706.08500, covariances unbiased.
    With A = R^T R and B = S^T S from QR decompositions of the centred points, the last trace is
    the nuclear norm of R S^T. No matrix root is taken, so sets smaller than D are exact, too.
    TooFewError for fewer than 2 points.
    """
    _require("a Frechet distance", 2, x, y)
    x, y = x.double(), y.double()
    between_means = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    r, s = _covariance_root(x), _covariance_root(y)
    cross = th.linalg.svdvals(r @ s.T).sum()
    distance = between_means + r.square().sum() + s.square().sum() - 2 * cross
    return max(0.0, distance.item())


def standard_frechet_distance(x: th.Tensor, y: th.Tensor) -> float:
    """`frechet_distance` with each dimension divided by the standard deviation of y.

    A dimension in which y is constant is not scaled.
    """
    spread = y.double().std(dim=0)
    spread = th.where(spread > 0, spread, 1.0)
    return frechet_distance(x / spread, y / spread)


def _covariance_root(x: th.Tensor) -> th.Tensor:
    """[N, D] -> R [min(N, D), D] such that R^T R is the covariance."""
    centred = x - x.mean(dim=0)
    return th.linalg.qr(centred / (len(x) - 1) ** 0.5, mode="r").R


def kernel_distance(x: th.Tensor, y: th.Tensor) -> float:
    """[N, D], [M, D] -> unbiased squared maximum mean discrepancy under k = (x . y / D + 1)^3.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),
    arXiv 1801.01401. For two sets of one distribution it is 0 on average and often negative.
    TooFewError for fewer than 2 points.
    """
    return _mean_discrepancy(_polynomial, x, y)


def gaussian_distance(x: th.Tensor, y: th.Tensor) -> float:
    """The same under k = exp(-|x - y|^2 / (2 s^2)), arXiv 2502.15602 (KAD, without a factor).

    s is the median distance of different points of y. TooFewError for fewer than 2 points, or
    where s is 0.
    """
    _require("a kernel distance", 2, x, y)
    bandwidth = _median_distance(y.double())
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


def _mean_discrepancy(kernel: Kernel, x: th.Tensor, y: th.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy; TooFewError for fewer than 2 points."""
    _require("a kernel distance", 2, x, y)
    x, y = x.double(), y.double()
    between = _kernel_sum(kernel, x, y) / (len(x) * len(y))
    return _mean_within(kernel, x) + _mean_within(kernel, y) - 2 * between


def _mean_within(kernel: Kernel, x: th.Tensor) -> float:
    """Mean of the kernel over all pairs of different points."""
    return _kernel_sum(kernel, x, x, skip_same_index=True) / (len(x) * (len(x) - 1))


def _kernel_sum(kernel: Kernel, x: th.Tensor, y: th.Tensor, skip_same_index: bool = False) -> float:
    total = 0.0
    for start in range(0, len(x), BLOCK):
        values = kernel(x[start : start + BLOCK], y)
        if skip_same_index:
            values.diagonal(start).fill_(0)
        total += values.sum().item()
    return total


def _require(what: str, least: int, x: th.Tensor, y: th.Tensor) -> None:
    if min(len(x), len(y)) < least:
        raise TooFewError(f"{what} needs at least {least} in each set, got {len(x)} and {len(y)}")


def earth_movers_distance(x: th.Tensor, y: th.Tensor, bin_width: float = 1.0) -> float:
    """Counts [K], [K] in equal bins -> Wasserstein-1 distance, in the unit of `bin_width`.

    TooFewError for an empty histogram.
    """
    if not (x.any() and y.any()):
        raise TooFewError("a distance of histograms needs counts in both")
    x, y = x.double(), y.double()
    difference = (x / x.sum() - y / y.sum()).cumsum(dim=0)
    return bin_width * difference.abs().sum().item()


def nearest(
    x: th.Tensor, y: th.Tensor, skip_same_index: bool = False
) -> tuple[th.Tensor, th.Tensor]:
    """[N, D], [M, D] -> (RMS difference to the nearest point of y [N], its index [N]).

    `skip_same_index`: x is y, perhaps flipped, and a point is no neighbour of itself.
    TooFewError where no neighbour is left.
    """
    _require("a nearest neighbour", 2 if skip_same_index else 1, x, y)
    found = []
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK].double()
        distance = th.cdist(rows, y.double(), compute_mode="donot_use_mm_for_euclid_dist")
        if skip_same_index:
            distance.diagonal(start).fill_(th.inf)
        found.append(distance.min(dim=1))
    values, indices = (th.cat(parts) for parts in zip(*found, strict=True))
    return values / x.shape[1] ** 0.5, indices
