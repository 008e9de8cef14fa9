"""Evaluation: every distance has its closed form, every score its known value, and bad input is told in words."""

import math

import pytest
import torch as th

from mm_diffusion.metrics.distances import (
    TooFewError,
    earth_movers_distance,
    frechet_distance,
    kernel_distance,
    nearest,
)


def noise(*shape, seed=0):
    return th.randn(*shape, generator=th.Generator().manual_seed(seed), dtype=th.float64)


def with_moments(mean, covariance_root, count=64):
    """Points [N, D] whose sample mean and unbiased covariance are exactly mean and root^T root."""
    raw = noise(count, len(mean))
    raw -= raw.mean(dim=0)
    white = th.linalg.qr(raw)[0] * math.sqrt(count - 1)
    return white @ covariance_root + mean


# ---------------------------------------------------------------- distances


def test_frechet_distance_of_axis_parallel_gaussians_is_the_closed_form():
    """sum (mu_i - nu_i)^2 + (sigma_i - tau_i)^2."""
    mu, nu, sigma, tau = th.tensor([[0.0, 1, -2, 3], [1, 1, 0, 0], [1, 2, 0.5, 3], [2, 2, 0, 1]], dtype=th.float64)
    expected = ((mu - nu).square() + (sigma - tau).square()).sum().item()
    x, y = with_moments(mu, sigma.diag()), with_moments(nu, tau.diag(), count=50)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_any_gaussians_takes_the_root_of_the_product_of_covariances():
    a, b = noise(5, 5, seed=1), noise(5, 5, seed=2)
    x, y = with_moments(th.zeros(5).double(), a), with_moments(th.zeros(5).double(), b)
    roots = th.linalg.eigvals((a.T @ a) @ (b.T @ b)).real.sqrt().sum()
    assert frechet_distance(x, y) == pytest.approx((a.square().sum() + b.square().sum() - 2 * roots).item(), rel=1e-9)


@pytest.mark.parametrize(("count", "dimensions"), [(40, 7), (6, 30)])
def test_frechet_distance_is_symmetric_zero_for_one_set_and_blind_to_rotations(count, dimensions):
    x, y = noise(count, dimensions), 2 * noise(count + 3, dimensions, seed=1) + 0.5
    rotation = th.linalg.qr(noise(dimensions, dimensions, seed=2))[0]
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(x @ rotation, y @ rotation), rel=1e-9)
    assert frechet_distance(x, x + 1) == pytest.approx(dimensions, rel=1e-9)


def test_kernel_distance_is_the_mean_over_pairs_written_out():
    x, y = noise(5, 3).float(), noise(4, 3, seed=1).float() + 1

    def k(a, b):
        return (float(a.double() @ b.double()) / 3 + 1) ** 3

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    xx, yy = (mean(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) for z in (x, y))
    assert kernel_distance(x, y) == pytest.approx(xx + yy - 2 * mean(k(a, b) for a in x for b in y), rel=1e-12)


def test_kernel_distance_is_unbiased():
    """Over all ways to split a population in two, sets of one distribution are 0 apart on average."""
    trials = [kernel_distance(noise(6, 2, seed=k), noise(6, 2, seed=1000 + k)) for k in range(400)]
    error = th.tensor(trials).std().item() / math.sqrt(len(trials))
    assert abs(sum(trials) / len(trials)) < 4 * error
    assert min(trials) < 0 < max(trials)


def test_kernel_distance_does_not_depend_on_blocks(monkeypatch):
    x, y = noise(9, 4), noise(7, 4, seed=1)
    whole = kernel_distance(x, y), nearest(x, y)[0]
    monkeypatch.setattr("mm_diffusion.metrics.distances.BLOCK", 2)
    assert kernel_distance(x, y) == pytest.approx(whole[0], rel=1e-12)
    assert nearest(x, y)[0].equal(whole[1])


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_one_point_has_no_spread_and_that_is_said(distance):
    with pytest.raises(TooFewError, match="at least 2 in either set, got 1 and 5"):
        distance(noise(1, 3), noise(5, 3))


def test_moving_a_histogram_by_k_bins_costs_k_bin_widths():
    x = th.tensor([0, 3, 1, 0, 0, 0])
    assert earth_movers_distance(x, x.roll(2), 0.5) == pytest.approx(1.0)
    assert earth_movers_distance(x, 7 * x) == 0
    with pytest.raises(TooFewError):
        earth_movers_distance(x, 0 * x)


def test_the_nearest_is_found_and_a_point_is_no_neighbour_of_itself():
    y = th.tensor([[0.0, 0], [3, 0], [10, 10]])
    distance, index = nearest(th.tensor([[3.0, 4], [0, 0]]), y)
    assert index.tolist() == [1, 0]
    assert distance.tolist() == pytest.approx([4 / math.sqrt(2), 0])
    assert nearest(y, y, leave_own_out=True)[1].tolist() == [1, 0, 1]
    with pytest.raises(TooFewError):
        nearest(y[:1], y[:1], leave_own_out=True)
