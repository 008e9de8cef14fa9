"""Timestep samplers: unbiased weights, the published proportions, ranks and restarts."""

import pytest
import torch as th
import torch.distributed as dist
import torch.multiprocessing as mp

from mm_diffusion.resample import (
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)


def warmed(losses_per_step):
    """A sampler that saw, at each timestep t, ten losses of `losses_per_step[t]`."""
    sampler = LossSecondMomentResampler(len(losses_per_step))
    for _ in range(10):
        sampler.update_with_local_losses(th.arange(len(losses_per_step)), losses_per_step)
    return sampler


def test_unknown_sampler_lists_the_known():
    with pytest.raises(ValueError, match="uniform, loss-second-moment"):
        create_named_schedule_sampler("best", 10)


def test_uniform_weights_are_one_and_every_timestep_occurs():
    t, weights = create_named_schedule_sampler("uniform", 7).sample(1000, "cpu")
    assert t.dtype == th.long
    assert sorted(t.unique().tolist()) == list(range(7))
    th.testing.assert_close(weights, th.ones(1000))


def test_second_moment_is_uniform_until_every_timestep_has_its_history():
    sampler = LossSecondMomentResampler(5)
    for _ in range(9):
        sampler.update_with_local_losses(th.arange(5), th.arange(5.0) + 1)
    sampler.update_with_local_losses(th.arange(4), th.arange(4.0) + 1)
    th.testing.assert_close(sampler.probabilities(), UniformSampler(5).probabilities())
    sampler.update_with_local_losses(th.tensor([4]), th.tensor([5.0]))
    assert sampler.probabilities().argmax() == 4


def test_second_moment_follows_the_root_of_the_mean_square():
    """arXiv 2102.09672, Eq. 18, with a uniform share of 0.001; only the last ten losses count."""
    history = th.rand(6, 23, generator=th.Generator().manual_seed(0)) + 0.1
    sampler = LossSecondMomentResampler(6)
    for column in history.T:
        sampler.update_with_local_losses(th.arange(6), column)
    moments = history[:, -10:].double().square().mean(dim=1).sqrt()
    th.testing.assert_close(sampler.probabilities(), 0.999 * moments / moments.sum() + 0.001 / 6)


def test_one_update_with_repeated_timesteps_equals_many():
    t = th.tensor([2, 0, 2, 1, 2, 2] * 6)
    losses = th.arange(36.0)
    at_once, one_by_one = LossSecondMomentResampler(3), LossSecondMomentResampler(3)
    at_once.update_with_local_losses(t, losses)
    for i in range(36):
        one_by_one.update_with_local_losses(t[i : i + 1], losses[i : i + 1])
    assert th.equal(at_once.counts, one_by_one.counts)
    assert th.equal(at_once.losses, one_by_one.losses)


def test_losses_that_overflowed_are_not_remembered():
    sampler = warmed(th.ones(3))
    sampler.update_with_local_losses(th.tensor([0, 1]), th.tensor([float("inf"), float("nan")]))
    th.testing.assert_close(sampler.probabilities(), th.full((3,), 1 / 3, dtype=th.float64))


def test_weights_make_the_estimate_unbiased():
    losses = th.tensor([0.1, 1.0, 5.0, 2.0])
    sampler = warmed(losses)
    p = sampler.probabilities()
    t, weights = sampler.sample(200_000, "cpu", th.Generator().manual_seed(0))
    th.testing.assert_close(th.bincount(t, minlength=4) / len(t), p.float(), rtol=0.05, atol=2e-3)
    th.testing.assert_close(weights, (1 / (4 * p[t])).float())
    assert abs((losses[t] * weights).mean() - losses.mean()) < 0.02


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment"])
def test_with_one_generator_each_timesteps_do_not_depend_on_neighbours(name):
    sampler = create_named_schedule_sampler(name, 1000)

    def draw(seeds):
        generators = [th.Generator().manual_seed(s) for s in seeds]
        return sampler.sample(len(seeds), "cpu", generators)[0]

    assert draw([5, 6, 7]).tolist()[1:] == draw([6, 7]).tolist()
    with pytest.raises(ValueError, match="one per sample"):
        sampler.sample(3, "cpu", [th.Generator()])


def test_a_restart_continues_with_the_same_history():
    sampler, restarted = warmed(th.rand(8)), LossSecondMomentResampler(8)
    restarted.load_state_dict(sampler.state_dict())
    for each in (sampler, restarted):
        each.update_with_local_losses(th.tensor([1, 1]), th.tensor([9.0, 8.0]))
    assert th.equal(sampler.probabilities(), restarted.probabilities())
    with pytest.raises(ValueError, match="diffusion_steps"):
        LossSecondMomentResampler(9).load_state_dict(sampler.state_dict())
    UniformSampler(8).load_state_dict({})


def _rank(rank, world, address, results):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    sampler = LossSecondMomentResampler(6)
    share = th.arange(rank * 3, rank * 3 + 3)  # rank 0: 0, 1, 2; rank 1: 3, 4, 5
    sampler.update_with_local_losses(share, share.float() + 0.5)
    th.save(sampler.state_dict(), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_one_history(tmp_path):
    mp.start_processes(
        _rank, (2, f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=2, start_method="fork"
    )
    expected = LossSecondMomentResampler(6)
    expected.update_with_local_losses(th.arange(6), th.arange(6) + 0.5)
    for rank in range(2):
        state = th.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(th.equal(state[name], value) for name, value in expected.state_dict().items())
