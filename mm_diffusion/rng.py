"""Randomness as a function of its purpose: each key, e.g. (seed, step, sample), has a generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from zlib import crc32

import numpy as np
import torch as th

from .tree import Tree, to_device, tree_map

Generators = th.Generator | Sequence[th.Generator] | None


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key, and on nothing else."""
    words = [crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def generator(*key: int | str, device: th.device | str = "cpu") -> th.Generator:
    """A fresh generator for this key."""
    return th.Generator(device).manual_seed(derive_seed(*key))


def per_sample(
    *key: int | str, indices: Sequence[int], device: th.device | str = "cpu"
) -> list[th.Generator]:
    """One generator per sample, which depends on the key and the sample's index only."""
    return [generator(*key, index, device=device) for index in indices]


def draw(
    distribution: Callable[..., th.Tensor],
    shape: Sequence[int],
    generators: Generators,
    device: th.device | str,
    dtype: th.dtype = th.float32,
) -> th.Tensor:
    """A batch [B, ...] of `distribution` (torch.rand, torch.randn), moved to `device` in one piece.

    generators: None (the CPU's global state), one generator, or one per sample. With one per sample
        the values of a sample do not depend on its neighbours, and samples with the very same
        generator share their values.
    """
    if generators is None:
        return to_device(distribution(shape, dtype=dtype), device)
    if isinstance(generators, th.Generator):
        values = distribution(shape, generator=generators, device=generators.device, dtype=dtype)
        return to_device(values, device)
    batch, *rest = shape
    if len(generators) != batch:
        raise ValueError(
            f"{len(generators)} generators for a batch of {batch}: need one per sample"
        )
    distinct = list(dict.fromkeys(generators))
    rows = [distribution(rest, generator=g, device=g.device, dtype=dtype) for g in distinct]
    values = to_device(th.stack(rows), device)
    if len(distinct) == batch:
        return values
    return th.stack([values[distinct.index(g)] for g in generators])


def randn_like(tree: Tree, generators: Generators = None) -> Tree:
    """Standard normal noise like `tree`, by `generators` as in `draw`; None: its device's state."""
    if generators is None:
        return tree_map(th.randn_like, tree)
    return tree_map(lambda x: draw(th.randn, x.shape, generators, x.device, x.dtype), tree)
