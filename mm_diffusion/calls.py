"""Models and arguments as callers have them -> what the loops of the diffusion take.

guided-diffusion's callers have a network and a shape, `loop(model, shape, noise=..., model_kwargs=
{...})`, where ours have a function of `(x, t)` and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch as th
from torch import nn

from .rng import Generators, draw
from .tree import Tree, leaves, tree_map

Progress = Callable[[float], None]  # called with the fraction that is done, 0 to 1
# What is in guided-diffusion's calls, but has no counterpart here unless it is None
WITHOUT_COUNTERPART = ("denoised_fn", "cond_fn")


def bind(model: nn.Module, cond: Mapping[str, Any] | None = None) -> Callable[..., Tree]:
    """A model as `(x, t, **more conditions) -> tree`; a dict goes in as a keyword per modality."""

    def model_fn(x: Tree, t: th.Tensor, **more: Any) -> Tree:
        keywords = {**(cond or {}), **more}
        if isinstance(x, dict):
            return dict(zip(x, model(**x, timesteps=t, **keywords), strict=True))
        return model(x, t, **keywords)

    return model_fn


def with_conditions(model: Any, model_kwargs: Mapping[str, Any] | None) -> Callable[..., Tree]:
    """A network, or a function of `(x, t, **model_kwargs)` -> a function of `(x, t)`."""
    if isinstance(model, nn.Module):
        return bind(model, model_kwargs)
    return partial(model, **model_kwargs) if model_kwargs else model


def loop_arguments(
    model: Any, x_T: Any, generator: Generators, options: dict[str, Any]
) -> tuple[Callable[..., Tree], Tree, dict[str, Any]]:
    """Arguments of a sampling loop, ours or guided-diffusion's -> model_fn, x_T, other options.

    x_T: noise, or its shape, or a dict of shapes by modality; then `noise` is taken instead, or
        drawn. `shape` may be given instead of x_T.
    ValueError for what has no counterpart here.
    """
    options = dict(options)
    unknown = [name for name in WITHOUT_COUNTERPART if options.pop(name, None) is not None]
    if unknown:
        raise ValueError(f"{unknown[0]}: has no counterpart here; wrap it into the model function")
    model_fn = with_conditions(model, options.pop("model_kwargs", None))
    shape, noise, device = (options.pop(name, None) for name in ("shape", "noise", "device"))
    start = shape if x_T is None else x_T
    if start is None:
        raise ValueError("x_T: give noise, or a shape")
    if isinstance(leaves(start)[0], th.Tensor):
        if noise is not None:
            raise ValueError("noise: x_T is noise already; give a shape, or leave noise out")
        return model_fn, start, options
    if noise is None:
        device = device or device_of(model)
        noise = tree_map(lambda size: draw(th.randn, size, generator, device), start)
    sizes, found = (tree_map(tuple, start), tree_map(lambda x: tuple(x.shape), noise))
    if sizes != found:
        raise ValueError(f"noise {found}: need the shape {sizes}")
    return model_fn, noise, options


def device_of(model: Any) -> th.device:
    """The device of a network's weights; the CPU for any other function."""
    weights = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((weight.device for weight in weights), th.device("cpu"))
