"""Which timesteps to train on (Nichol and Dhariwal 2021, arXiv 2102.09672)."""

from __future__ import annotations

from collections.abc import Sequence

import torch as th

from .dist_util import all_gather
from .tree import Generators


class UniformSampler:
    """Every timestep alike. Also what all samplers share: drawing from the probabilities that `probabilities` gives."""

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps
        self.uniform = th.full((num_timesteps,), 1 / num_timesteps, dtype=th.float64)

    def to(self, device: th.device | str) -> None:
        """Keep what is drawn from on this device, so that no step waits for it."""
        self.uniform = self.uniform.to(device)

    def probabilities(self) -> th.Tensor:
        """[T] float64 that sum to one."""
        return self.uniform

    def sample(
        self, batch_size: int, device: th.device | str, generator: Generators = None
    ) -> tuple[th.Tensor, th.Tensor]:
        """Timesteps [B] long and importance weights [B] float 1 / (T p_t), whose expectation is one.

        `generator`: None, one, or one per sample; then a sample's timestep depends on neither neighbours nor rank.
        """
        self.to(device)
        p = self.probabilities()
        uniform = _uniform(batch_size, generator).to(p.device)
        t = th.searchsorted(p.cumsum(0), uniform, right=True).clamp(max=self.num_timesteps - 1)
        return t, (1 / (self.num_timesteps * p[t])).float()

    def update_with_local_losses(self, t: th.Tensor, losses: th.Tensor) -> None:
        """Tell the sampler the losses [B] at timesteps [B] of this rank; all ranks must call it together."""

    def state_dict(self) -> dict[str, th.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, th.Tensor]) -> None:
        if state:
            raise ValueError(
                f"schedule_sampler uniform keeps no state, the checkpoint has {sorted(state)}"
            )


class LossSecondMomentResampler(UniformSampler):
    """p_t proportional to sqrt(E[L_t^2]) over the last `history_per_term` losses of each t (Eq. 18).

    Uniform until every timestep has that many. A share `uniform_prob` stays uniform.
    """

    def __init__(self, num_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001):
        super().__init__(num_timesteps)
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self.losses = th.zeros(
            num_timesteps, history_per_term, dtype=th.float64
        )  # a ring buffer per timestep
        self.counts = th.zeros(num_timesteps, dtype=th.long)  # losses ever seen

    def probabilities(self) -> th.Tensor:
        moments = self.losses.square().mean(dim=1).sqrt().clamp(min=1e-30)
        p = (1 - self.uniform_prob) * moments / moments.sum() + self.uniform_prob * self.uniform
        return th.where(
            (self.counts >= self.history_per_term).all(), p, self.uniform
        )  # no wait for the device

    def to(self, device: th.device | str) -> None:
        super().to(device)
        self.losses, self.counts = self.losses.to(device), self.counts.to(device)

    def update_with_local_losses(self, t: th.Tensor, losses: th.Tensor) -> None:
        t, losses = all_gather(t.detach()), all_gather(losses.detach().double())
        self.to(t.device)
        finite = losses.isfinite()  # a step that overflowed says nothing about its timestep
        same = (t[:, None] == t[None, :]) & finite
        earlier = same.tril(-1).sum(dim=1)  # occurrences of the same timestep before this one
        kept = finite & (earlier >= same.sum(dim=1) - self.history_per_term)
        places = t * self.history_per_term + (self.counts[t] + earlier) % self.history_per_term
        beyond = (
            self.losses.numel()
        )  # where what is not kept goes: masks would make the host wait for the device
        flat = th.cat([self.losses.flatten(), self.losses.new_zeros(1)])
        flat[th.where(kept, places, beyond)] = losses
        self.losses = flat[:beyond].view_as(self.losses)
        self.counts.index_add_(0, t, finite.long())

    def state_dict(self) -> dict[str, th.Tensor]:
        return {"losses": self.losses.cpu().clone(), "counts": self.counts.cpu().clone()}

    def load_state_dict(self, state: dict[str, th.Tensor]) -> None:
        for name, mine in self.state_dict().items():
            if name not in state or state[name].shape != mine.shape:
                found = list(state[name].shape) if name in state else "missing"
                raise ValueError(
                    f"schedule_sampler state {name!r}: {found}, need {list(mine.shape)}; keep diffusion_steps and "
                    "schedule_sampler of the run that is resumed"
                )
        self.losses = state["losses"].to(self.losses)
        self.counts = state["counts"].to(self.counts)


SCHEDULE_SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}


def create_named_schedule_sampler(name: str, num_timesteps: int) -> UniformSampler:
    """The timestep sampler called `name`."""
    if name not in SCHEDULE_SAMPLERS:
        raise ValueError(
            f"schedule_sampler {name!r} is unknown: choose one of {', '.join(SCHEDULE_SAMPLERS)}"
        )
    return SCHEDULE_SAMPLERS[name](num_timesteps)


def _uniform(batch_size: int, generator: Generators) -> th.Tensor:
    """[B] float64 in [0, 1). Without a generator they come from the CPU's global state, alike for all devices."""
    if not isinstance(generator, Sequence):
        device = generator.device if generator is not None else None
        return th.rand(batch_size, generator=generator, device=device, dtype=th.float64)
    if len(generator) != batch_size:
        raise ValueError(
            f"{len(generator)} generators for a batch of {batch_size}: need one per sample"
        )
    return th.cat([th.rand(1, generator=g, device=g.device, dtype=th.float64) for g in generator])
