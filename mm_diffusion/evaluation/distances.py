"""How far two sets of points lie apart: Frechet, polynomial kernel, histograms, nearest neighbours. All in float64."""

from __future__ import annotations

import torch as th

KERNEL_DEGREE = 3  # of the kernel distances as published: (x . y / D + 1)^3
BLOCK = 1024  # rows that are compared with everything at a time


class TooFewError(ValueError):
    """A set that is too small for a distance."""


def frechet_distance(x: th.Tensor, y: th.Tensor) -> float:
    """[N, D], [M, D] -> squared Frechet distance of the Gaussians with their means and (unbiased) covariances.

    |mu_x - mu_y|^2 + tr A + tr B - 2 tr (A B)^(1/2), arXiv 1706.08500. With A = R^T R and B = S^T S from the QR
    decompositions of the centred points the last trace is the nuclear norm of R S^T: no root of a matrix is taken, so
    sets smaller than D are as exact as others. TooFewError for fewer than 2 points.
    """
    _require("a Frechet distance", 2, x, y)
    x, y = x.double(), y.double()
    r, s = _root_of_covariance(x), _root_of_covariance(y)
    apart = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    shared = th.linalg.svdvals(r @ s.T).sum()
    return max(0.0, (apart + r.square().sum() + s.square().sum() - 2 * shared).item())


def standard_frechet_distance(x: th.Tensor, y: th.Tensor) -> float:
    """As `frechet_distance`, each dimension in units of y's standard deviation, so that all of them count alike.

    A dimension in which y does not vary is taken as it is.
    """
    _require("a Frechet distance", 2, x, y)
    spread = y.double().std(dim=0)
    spread = th.where(spread > 0, spread, 1.0)
    return frechet_distance(x / spread, y / spread)


def _root_of_covariance(x: th.Tensor) -> th.Tensor:
    """[N, D] -> R [min(N, D), D] with R^T R the covariance."""
    return th.linalg.qr((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5, mode="r")[1]


def kernel_distance(x: th.Tensor, y: th.Tensor) -> float:
    """[N, D], [M, D] -> unbiased estimate of the squared maximum mean discrepancy under (x . y / D + 1)^3.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j), arXiv 1801.01401: about 0, and
    as often below as above it, for sets of one distribution. TooFewError for fewer than 2 points.
    """
    _require("a kernel distance", 2, x, y)
    x, y = x.double(), y.double()

    def within(z: th.Tensor) -> float:
        return (_kernel_sum(z, z) - _kernel(z.square().sum(dim=1), z.shape[1]).sum().item()) / (
            len(z) * (len(z) - 1)
        )

    return within(x) + within(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def _kernel(dot: th.Tensor, dimensions: int) -> th.Tensor:
    return (dot / dimensions + 1) ** KERNEL_DEGREE


def _kernel_sum(x: th.Tensor, y: th.Tensor) -> float:
    return sum(_kernel(rows @ y.T, x.shape[1]).sum().item() for rows in x.split(BLOCK))


def _require(what: str, least: int, *sets: th.Tensor) -> None:
    if min(map(len, sets)) < least:
        raise TooFewError(
            f"{what} needs at least {least} in either set, got {' and '.join(str(len(s)) for s in sets)}"
        )


def earth_movers_distance(x: th.Tensor, y: th.Tensor, bin_width: float = 1.0) -> float:
    """Counts [K], [K] in equal bins -> Wasserstein-1 distance of the two distributions, in the unit of `bin_width`.

    TooFewError for an empty histogram.
    """
    if not (x.sum() > 0 and y.sum() > 0):
        raise TooFewError("a distance of histograms needs something in both")
    x, y = x.double(), y.double()
    return bin_width * (x / x.sum() - y / y.sum()).cumsum(dim=0).abs().sum().item()


def nearest(x: th.Tensor, y: th.Tensor, leave_own_out: bool = False) -> tuple[th.Tensor, th.Tensor]:
    """[N, D], [M, D] -> (root mean square difference to the nearest of y [N], its number [N]).

    `leave_own_out`: x is y, perhaps mirrored, and a point is no neighbour of itself. TooFewError where none is left.
    """
    _require("a nearest neighbour", 2 if leave_own_out else 1, x, y)
    found = []
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK].double()
        distance = th.cdist(rows, y.double(), compute_mode="donot_use_mm_for_euclid_dist")
        if leave_own_out:
            distance[th.arange(len(rows)), start + th.arange(len(rows))] = th.inf
        found.append(distance.min(dim=1))
    return th.cat([f.values for f in found]) / x.shape[1] ** 0.5, th.cat([f.indices for f in found])
