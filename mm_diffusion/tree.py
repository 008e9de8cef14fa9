"""A sample is a tree: one tensor, or a dict of tensors keyed by modality.

Diffusion, solvers, resampler and trainer work on trees and never name a modality.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch as th

Tree = th.Tensor | dict[str, th.Tensor]
Generators = th.Generator | Sequence[th.Generator] | None


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
    """`x` on `device`; the host does not wait for the copy, nor for what the device has been given before."""
    device = th.device(device)
    if x.device.type != "cpu" or device.type == "cpu":
        return x.to(device)
    return (x.pin_memory() if th.cuda.is_available() else x).to(device, non_blocking=True)


def append_dims(values: th.Tensor, like: th.Tensor) -> th.Tensor:
    """[B] -> [B, 1, ..., 1] with as many axes as `like`."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def mean_flat(x: th.Tensor) -> th.Tensor:
    """[B, ...] -> [B]: the mean over everything but the batch."""
    return x.flatten(1).mean(dim=1)


def weighted_sum(*terms: tuple[th.Tensor, Tree]) -> Tree:
    """Sum of weight * tree over `(weight [B] or [1], tree)` terms, in float32 whatever comes in."""
    weights, device = [weight for weight, _ in terms], leaves(terms[0][1])[0].device
    if any(
        weight.device != device for weight in weights
    ):  # a solver's, which take one copy together
        weights = list(to_device(th.stack(th.broadcast_tensors(*weights)), device))

    def total(*xs: th.Tensor) -> th.Tensor:
        scaled = [append_dims(w, x) * x.float() for w, x in zip(weights, xs, strict=True)]
        return functools.reduce(th.add, scaled)

    return tree_map(total, *(tree for _, tree in terms))


def split_doubled(output: th.Tensor, like: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Halves of a model output with twice the channels of its input `like`: the prediction and the variance values.

    The channel axis is the one axis on which the two shapes differ, by a factor of two.
    """
    differing = [
        i for i, (a, b) in enumerate(zip(output.shape, like.shape, strict=False)) if a != b
    ]
    if (
        output.ndim != like.ndim
        or len(differing) != 1
        or output.shape[differing[0]] != 2 * like.shape[differing[0]]
    ):
        raise ValueError(
            f"learned sigma: output {list(output.shape)} for input {list(like.shape)}, need twice the channels "
            "and nothing else different"
        )
    first, second = output.chunk(2, dim=differing[0])
    return first, second


def checked_given(given: dict[str, th.Tensor] | None, x: Tree) -> dict[str, th.Tensor]:
    """The known leaves `given` of samples like `x`, in float32 on its device; empty for none.

    ValueError unless they leave something to generate and have the shapes of theirs in `x`.
    """
    if not given:
        return {}
    if not isinstance(x, dict) or not given.keys() < x.keys():
        known = sorted(x) if isinstance(x, dict) else "one tensor"
        raise ValueError(
            f"given {sorted(given)}, sampled {known}: give some but not all of what is sampled"
        )
    for key, leaf in given.items():
        if leaf.shape != x[key].shape:
            raise ValueError(
                f"given {key} is {list(leaf.shape)}, sampled {key} is {list(x[key].shape)}: make them equal"
            )
    return {key: leaf.float().to(x[key].device) for key, leaf in given.items()}


def randn_like(tree: Tree, generator: Generators = None) -> Tree:
    """Standard normal noise in the shape of `tree`.

    `generator`: None (torch's global state), one generator, or one per sample of the batch; with one per sample a
    sample's noise does not depend on its neighbours, and samples with the very same generator share their noise. Noise
    is drawn on the generator's device, once, and moved in one piece.
    """
    if generator is None:
        return tree_map(th.randn_like, tree)
    if isinstance(generator, th.Generator):
        return tree_map(lambda x: _randn(x.shape, x, generator), tree)
    return tree_map(lambda x: _randn_each(x, _one_each(generator, x)), tree)


def _randn(shape: Sequence[int], like: th.Tensor, generator: th.Generator) -> th.Tensor:
    return to_device(
        th.randn(shape, generator=generator, device=generator.device, dtype=like.dtype), like.device
    )


def _randn_each(x: th.Tensor, generators: Sequence[th.Generator]) -> th.Tensor:
    distinct = list({id(g): g for g in generators}.values())
    drawn = [th.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype) for g in distinct]
    moved = to_device(th.stack(drawn), x.device)
    if len(distinct) == len(generators):
        return moved
    place = {id(g): i for i, g in enumerate(distinct)}
    return th.stack([moved[place[id(g)]] for g in generators])


def _one_each(generators: Sequence[th.Generator], x: th.Tensor) -> Sequence[th.Generator]:
    if len(generators) != x.shape[0]:
        raise ValueError(
            f"{len(generators)} generators for a batch of {x.shape[0]}: need one per sample"
        )
    return generators


def _describe(tree: Any) -> str:
    return str(sorted(tree)) if isinstance(tree, dict) else type(tree).__name__
