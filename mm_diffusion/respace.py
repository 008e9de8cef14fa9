"""A diffusion that visits only some of the timesteps of another one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> list[int]:
    """The timesteps to keep, ascending.

    section_counts: "ddimN" for N steps at a fixed stride from 0 (arXiv 2010.02502); "a,b,c" or
        [a, b, c] for a steps spread evenly over the first third, and so on; "" for all.
    """
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _strided(num_timesteps, _count(section_counts[4:], section_counts))
    parts = section_counts.split(",") if isinstance(section_counts, str) else section_counts
    counts = [_count(part, section_counts) for part in parts] if section_counts else [num_timesteps]
    size, extra = divmod(num_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        section = size + (i < extra)
        if count > section:
            asked = f"timestep_respacing {section_counts!r}: {count} steps of section {i}"
            raise ValueError(f"{asked}, which has {section}")
        stride = (section - 1) / (count - 1) if count > 1 else 1
        positions = itertools.accumulate(itertools.repeat(stride, count - 1), initial=0.0)
        kept += [start + round(position) for position in positions]
        start += section
    return kept


def _strided(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps + 1):
        steps = range(0, num_timesteps, stride)
        if len(steps) == count:
            return list(steps)
    problem = f"no integer stride makes {count} of {num_timesteps} steps; choose a divisor"
    raise ValueError(f"timestep_respacing 'ddim{count}': {problem}")


def _count(text: str | int, where: object) -> int:
    if not str(text).strip().isdecimal() or int(text) < 1:
        forms = "write e.g. 'ddim25', '250' or '10,20'"
        raise ValueError(f"timestep_respacing {where!r}: {text!r} is no number of steps; {forms}")
    return int(text)


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion over the steps `use_timesteps` of a longer one, with the same alpha_bar there.

    `timestep_map` holds the original number of each step, which is what the model receives.
    """

    def __init__(self, use_timesteps: Iterable[int], *, betas: np.ndarray, **kwargs: Any):
        kept = sorted(set(use_timesteps))
        if not kept or kept[0] < 0 or kept[-1] >= len(betas):
            raise ValueError(f"use_timesteps: need some, all in 0 .. {len(betas) - 1}")
        alpha_bar = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))[kept]
        super().__init__(betas=1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1]), **kwargs)
        self.timestep_map = kept
        self.original_num_steps = len(betas)
