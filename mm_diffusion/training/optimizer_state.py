"""The optimizer's state on disk: that of torch's AdamW, its moments in the published order.

torch numbers moments by the place of their parameter. Published files and ours number them in the
published order of the parameters; ours record the published names beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch as th

from .. import logger
from ..checkpoint import CheckpointError, published_order

MOMENTS = ("exp_avg", "exp_avg_sq")
# What every version of AdamW has. How it is computed (fused, foreach) is no part of the state.
SETTINGS = ("lr", "betas", "eps", "weight_decay", "amsgrad")

Shapes = Mapping[str, th.Size]  # published name of each parameter, in our order -> its shape


def to_published(state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The state_dict of an optimizer over parameters of these published names -> a file's content.

    Its "names" are the published ones in the order of the moments.
    """
    (group,) = state["param_groups"]
    ordered = published_order(names)
    places = {name: place for place, name in enumerate(names)}
    moments = {
        number: state["state"][places[name]]
        for number, name in enumerate(ordered)
        if places[name] in state["state"]
    }
    settings = {key: group[key] for key in SETTINGS}
    groups = [settings | {"params": list(range(len(ordered)))}]
    return {"state": moments, "param_groups": groups, "names": ordered}


def from_published(content: Any, shapes: Shapes, path: str) -> dict[str, Any]:
    """A file's content -> the state_dict of an optimizer over these parameters.

    Files without "names" are published ones, or early ones of ours, with moments in our order.
    CheckpointError, naming `path`, unless every moment has its parameter's shape.
    """
    if not isinstance(content, dict) or not {"state", "param_groups"} <= content.keys():
        raise CheckpointError(f"{path}: holds no optimizer state")
    is_early = "names" not in content and "train" in content
    names = content.get("names", list(shapes) if is_early else published_order(shapes))
    groups = content["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    if len(numbers) < len(shapes) and len(numbers) <= 2:
        raise CheckpointError(
            f"{path}: holds moments of {len(numbers)} flat tensors, as published float16 runs write"
            " them, not of parameters; move it and the averages away to resume the weights alone,"
            " or start a new run with --init_checkpoint"
        )
    if len(groups) != 1 or len(numbers) != len(names) or set(names) != set(shapes):
        raise CheckpointError(
            f"{path}: holds moments of {len(numbers)} parameters, the model has {len(shapes)};"
            " check the model's flags"
        )
    moments = {
        name: _moments(content["state"][number], shapes[name], f"{path}: {name}")
        for number, name in zip(numbers, names, strict=True)
        if number in content["state"]
    }
    new = len(shapes) - len(moments)
    if new and moments:
        logger.warn(f"{path}: holds no moments of {new} parameters, whose moments start anew")
    state = {place: moments[name] for place, name in enumerate(shapes) if name in moments}
    return {"state": state, "param_groups": [groups[0] | {"params": list(range(len(shapes)))}]}


def _moments(found: Mapping[str, Any], shape: th.Size, culprit: str) -> dict[str, th.Tensor]:
    """Step count and moments of a parameter; CheckpointError where they are not of its shape."""
    for key in MOMENTS:
        shape_found = getattr(found.get(key), "shape", None)
        if shape_found != shape:
            raise CheckpointError(
                f"{culprit}: {key} has the shape {list(shape_found or ())}, its parameter"
                f" {list(shape)}; check the model's flags"
            )
    if "step" not in found:
        raise CheckpointError(
            f"{culprit}: no step count, so no state of Adam; move the file and the averages away to"
            " resume the weights alone"
        )
    step = th.tensor(float(found["step"]))  # an int in old versions of torch
    return {"step": step, **{key: found[key] for key in MOMENTS}}
