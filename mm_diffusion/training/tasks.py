"""Mixed tasks: in a share of the clips one modality is known, goes in clean, and has no loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch as th

from .. import rng
from ..config import TASKS
from ..tree import append_dims, to_device

Terms = dict[str, th.Tensor]  # name -> [B]
Known = dict[str, th.Tensor]  # modality -> [B] bool: the clips in which it is known


class TaskMix:
    """Draws a task for every clip, by its share. `tasks` below are [B] places in `names`."""

    def __init__(self, shares: Mapping[str, float] | None = None) -> None:
        self.names, self.shares = zip(*(shares or {"joint": 1.0}).items(), strict=True)
        self.is_mixed = any(TASKS[name] for name in self.names)

    def draw(self, seed: int, step: int, indices: Sequence[int], device: th.device) -> th.Tensor:
        """The tasks of the clips in these places of a step's global batch."""
        if not self.is_mixed:
            return th.zeros(len(indices), dtype=th.long, device=device)
        generators = rng.per_sample(seed, step, "task", indices=indices)
        uniform = rng.draw(th.rand, (len(indices),), generators, "cpu", th.float64)
        ends = th.tensor(self.shares, dtype=th.float64).cumsum(0)
        tasks = th.searchsorted(ends, uniform, right=True).clamp(max=len(ends) - 1)
        return to_device(tasks, device)

    def known(self, tasks: th.Tensor) -> Known:
        """Which modality of which clip is known; {} where all clips are joint."""
        masks: Known = {}
        for place, name in enumerate(self.names):
            if key := TASKS[name]:
                masks[key] = tasks == place
        return masks

    def counted(self, terms: Terms, tasks: th.Tensor) -> tuple[Terms, Known]:
        """The terms with the loss of each task, and for a term [B] whether it counts in the log.

        Where all clips are joint, the terms as they are, of which all count.
        """
        counted: Known = {}
        if not self.is_mixed:
            return terms, counted
        for key, mask in self.known(tasks).items():
            counted |= {name: ~mask for name in terms if name.endswith(f"_{key}")}
        losses = {f"loss_{name}": terms["loss"] for name in self.names}
        counted |= {f"loss_{name}": tasks == place for place, name in enumerate(self.names)}
        return terms | losses, counted


def bind_known(model_fn: Callable[..., Any], x_start: Any, known: Known) -> Callable[..., Any]:
    """A model that gets known modalities as they are in `x_start`, at timestep 0."""
    if not known:
        return model_fn

    def conditional(x_t: Any, t: th.Tensor) -> Any:
        timesteps = dict.fromkeys(x_t, t)
        for key, mask in known.items():
            clean = x_start[key].to(x_t[key].dtype)
            x_t = x_t | {key: th.where(append_dims(mask, clean), clean, x_t[key])}
            timesteps[key] = th.where(mask, th.zeros_like(t), t)
        return model_fn(x_t, timesteps)

    return conditional


def without_known(terms: Terms, known: Known) -> Terms:
    """The terms of a loss, those of known modalities 0, and `loss`, their sum."""
    if not known:
        return terms
    terms = {name: term for name, term in terms.items() if name != "loss"}
    for key, mask in known.items():
        for name in terms:
            if name.endswith(f"_{key}"):
                terms[name] = terms[name].masked_fill(mask, 0.0)
    return {"loss": th.stack(list(terms.values())).sum(dim=0), **terms}
