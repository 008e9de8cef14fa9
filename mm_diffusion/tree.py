"""A sample is a tree: one tensor, or a dict of tensors keyed by modality.

Diffusion, solver, resampler and trainer work on trees and never name a modality.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch as th

Tree = th.Tensor | dict[str, th.Tensor]


def tree_map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply `fn` leaf by leaf to trees of one structure; the result has that structure."""
    if not isinstance(tree, dict):
        return fn(tree, *rest)
    for other in rest:
        if not isinstance(other, dict) or other.keys() != tree.keys():
            raise ValueError(f"trees differ: {_describe(tree)} against {_describe(other)}")
    return {key: fn(leaf, *(other[key] for other in rest)) for key, leaf in tree.items()}


def leaves(tree: Any) -> list:
    """The leaves of a tree, in order."""
    return list(tree.values()) if isinstance(tree, dict) else [tree]


def to_device(x: th.Tensor, device: th.device | str) -> th.Tensor:
    """`x` on `device`; the host waits neither for the copy nor for the work queued before it."""
    device = th.device(device)
    if x.device.type != "cpu" or device.type == "cpu":
        return x.to(device)
    pinned = x.pin_memory() if th.cuda.is_available() else x
    return pinned.to(device, non_blocking=True)


def append_dims(values: th.Tensor, like: th.Tensor) -> th.Tensor:
    """[B] -> [B, 1, ..., 1] with as many axes as `like`."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def mean_flat(x: th.Tensor) -> th.Tensor:
    """[B, ...] -> [B]: the mean over everything but the batch."""
    return x.flatten(1).mean(dim=1)


def weighted_sum(*terms: tuple[th.Tensor, Tree]) -> Tree:
    """Sum of weight * tree over terms `(weight [B] or [1], tree)`, in float32 for any dtype."""
    weights = [weight for weight, _ in terms]
    device = leaves(terms[0][1])[0].device
    if any(weight.device != device for weight in weights):  # a solver's: one copy for all of them
        weights = list(to_device(th.stack(th.broadcast_tensors(*weights)), device))

    def total(*xs: th.Tensor) -> th.Tensor:
        scaled = [append_dims(w, x) * x.float() for w, x in zip(weights, xs, strict=True)]
        return functools.reduce(th.add, scaled)

    return tree_map(total, *(tree for _, tree in terms))


def split_doubled(output: Tree, like: Tree) -> tuple[Tree, Tree]:
    """Two halves of a tree whose leaves have twice the channels of `like`: prediction, variance."""
    halves = tree_map(_split_channels, output, like)
    return tree_map(itemgetter(0), halves), tree_map(itemgetter(1), halves)


def _split_channels(output: th.Tensor, like: th.Tensor) -> tuple[th.Tensor, ...]:
    """The channel axis is the one axis on which the two shapes differ, by a factor of two."""
    found, given = list(output.shape), list(like.shape)
    for axis, size in enumerate(given):
        if found == [*given[:axis], 2 * size, *given[axis + 1 :]]:
            return output.chunk(2, dim=axis)
    raise ValueError(f"learned sigma: output {found} for input {given}, need twice the channels")


def check_conditioning(conditioning: dict[str, th.Tensor] | None, x: Tree) -> dict[str, th.Tensor]:
    """The conditioning leaves of samples like `x`, in float32 on its device; empty for None.

    ValueError unless they leave something to generate and have the shapes of theirs in `x`.
    """
    if not conditioning:
        return {}
    if not isinstance(x, dict) or not conditioning.keys() < x.keys():
        keys = f"{sorted(conditioning)} of {_describe(x)}"
        raise ValueError(f"conditioning on {keys}: need some but not all modalities")
    for key, leaf in conditioning.items():
        given, sampled = list(leaf.shape), list(x[key].shape)
        if given != sampled:
            raise ValueError(f"conditioning {key}: need shape {sampled}, not {given}")
    return {key: leaf.float().to(x[key].device) for key, leaf in conditioning.items()}


def _describe(tree: Any) -> str:
    return str(sorted(tree)) if isinstance(tree, dict) else type(tree).__name__
