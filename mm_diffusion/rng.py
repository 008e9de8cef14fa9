"""Randomness as a function of what it is for: (seed, step, sample) and the like give a generator of their own."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch as th


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
