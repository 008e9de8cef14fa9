"""Which timesteps to train on (Nichol and Dhariwal 2021, arXiv 2102.09672)."""

from __future__ import annotations

import torch as th

from .dist_util import all_gather
from .rng import Generators, draw


class UniformSampler:
    """Every timestep with equal probability; the base of samplers with other `probabilities`."""

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps
        self.uniform = th.full((num_timesteps,), 1 / num_timesteps, dtype=th.float64)

    def to(self, device: th.device | str) -> None:
        """Keep the state on this device, so that no step waits for it."""
        self.uniform = self.uniform.to(device)

    def probabilities(self) -> th.Tensor:
        """[T] float64 that sum to one."""
        return self.uniform

    def sample(
        self, batch_size: int, device: th.device | str, generator: Generators = None
    ) -> tuple[th.Tensor, th.Tensor]:
        """Timesteps [B] long and importance weights [B] float 1 / (T p_t), of expectation one.

        generator: None (the CPU's state), one, or one per sample; with one per sample a timestep
            depends on neither neighbours nor rank.
        """
        self.to(device)
        p = self.probabilities()
        uniform = draw(th.rand, (batch_size,), generator, p.device, th.float64)
        t = th.searchsorted(p.cumsum(0), uniform, right=True).clamp(max=self.num_timesteps - 1)
        return t, (1 / (self.num_timesteps * p[t])).float()

    def update_with_local_losses(self, t: th.Tensor, losses: th.Tensor) -> None:
        """Record the losses [B] at timesteps [B] of this rank; all ranks must call it together."""

    def state_dict(self) -> dict[str, th.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, th.Tensor]) -> None:
        if state:
            raise ValueError("schedule_sampler uniform keeps no state, the checkpoint has one")


class LossSecondMomentResampler(UniformSampler):
    """p_t proportional to sqrt(E[L_t^2]) over the last `history_per_term` losses of t (Eq. 18).

    Uniform until every timestep has that many. A share `uniform_prob` stays uniform.
    """

    def __init__(self, num_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001):
        super().__init__(num_timesteps)
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        # A ring buffer per timestep, and how many losses it has taken so far.
        self.losses = th.zeros(num_timesteps, history_per_term, dtype=th.float64)
        self.counts = th.zeros(num_timesteps, dtype=th.long)

    def probabilities(self) -> th.Tensor:
        moments = self.losses.square().mean(dim=1).sqrt().clamp(min=1e-30)
        p = (1 - self.uniform_prob) * moments / moments.sum() + self.uniform_prob * self.uniform
        full = (self.counts >= self.history_per_term).all()
        return th.where(full, p, self.uniform)  # no branch: the host would wait for the device

    def to(self, device: th.device | str) -> None:
        super().to(device)
        self.losses, self.counts = self.losses.to(device), self.counts.to(device)

    def update_with_local_losses(self, t: th.Tensor, losses: th.Tensor) -> None:
        t, losses = all_gather(t.detach()), all_gather(losses.detach().double())
        self.to(t.device)
        # Indices stay tensors [1] and every loss is written: the host does not wait for the device.
        for step, loss in zip(t.split(1), losses.split(1), strict=True):
            slot = self.counts[step] % self.history_per_term
            finite = loss.isfinite()  # a step that overflowed says nothing about its timestep
            self.losses[step, slot] = th.where(finite, loss, self.losses[step, slot])
            self.counts[step] += finite.long()

    def state_dict(self) -> dict[str, th.Tensor]:
        return {"losses": self.losses.cpu().clone(), "counts": self.counts.cpu().clone()}

    def load_state_dict(self, state: dict[str, th.Tensor]) -> None:
        for name, own in self.state_dict().items():
            if name not in state or state[name].shape != own.shape:
                remedy = "keep diffusion_steps and schedule_sampler of the run that is resumed"
                raise ValueError(f"schedule_sampler: no state {name!r} {list(own.shape)}; {remedy}")
        self.losses = state["losses"].to(self.losses)
        self.counts = state["counts"].to(self.counts)


SCHEDULE_SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}


def create_named_schedule_sampler(name: str, num_timesteps: int) -> UniformSampler:
    """The timestep sampler called `name`."""
    if name not in SCHEDULE_SAMPLERS:
        known = ", ".join(SCHEDULE_SAMPLERS)
        raise ValueError(f"schedule_sampler {name!r} is unknown: choose one of {known}")
    return SCHEDULE_SAMPLERS[name](num_timesteps)
