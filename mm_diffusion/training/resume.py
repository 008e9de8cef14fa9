"""What a run starts from: its own states, else another run's, else initial weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import blobfile as bf
from torch import nn

from .. import checkpoint, logger
from ..checkpoint import EMA_FILE, CheckpointError
from ..config import TrainConfig, pick
from ..dist_util import from_rank_0
from ..files import absolute
from ..script_util import CARRIED_FLAGS, merge_checkpoint_flags
from .states import State, newest_intact, states_in

# Files of a run. Any other name stands for weights alone, as in the published code.
RUN_FILE = re.compile(rf"(model|opt)\d+\.pt|{EMA_FILE.pattern}")


class InitialWeights(NamedTuple):
    """The weights that a new run starts from, and the flag that names them."""

    flag: str
    path: str


def initial_weights(config: TrainConfig) -> InitialWeights | None:
    """What --init_checkpoint names, or --resume_checkpoint if that is no file of a run.

    ValueError where both name weights.
    """
    init, resume = config.init_checkpoint, config.resume_checkpoint
    if not _names_weights(resume):
        return InitialWeights("--init_checkpoint", init) if init else None
    if init:
        raise ValueError(
            f"--resume_checkpoint {resume} and --init_checkpoint {init} both name weights for a new"
            " run; give one of them"
        )
    return InitialWeights("--resume_checkpoint", resume)


def _names_weights(path: str) -> bool:
    """Whether a --resume_checkpoint is a file of weights, which starts a run at step 0."""
    name = bf.basename(path)
    return name.endswith((".pt", ".pth", ".safetensors")) and not RUN_FILE.fullmatch(name)


def find_state(config: TrainConfig, warn: Callable[[str], None] = logger.warn) -> State | None:
    """The state to resume: of the output folder, else --resume_checkpoint; None for a new run.

    ValueError where the output folder holds states of another run than the one asked for.
    """
    folder, path = config.output_dir, config.resume_checkpoint
    if path == "none" and states_in(folder):
        raise ValueError(f"{folder}: holds a run already; choose another --output_dir")
    own = newest_intact(folder, warn)
    if path in ("", "auto", "none") or _names_weights(path):
        return own
    source = absolute(path)
    if own and source not in (absolute(folder), absolute(own.path("model")), own.resumed_from):
        raise ValueError(
            f"{folder}: its states do not descend from --resume_checkpoint {path}; leave that out,"
            " or choose another --output_dir"
        )
    return own or _named_state(path, warn)._replace(resumed_from=source)


def _named_state(path: str, warn: Callable[[str], None]) -> State:
    """The state of a file modelNNNNNN.pt, or the newest intact one of a folder."""
    if bf.isdir(path):
        state = newest_intact(path, warn)
        if not state:
            raise CheckpointError(f"{path}: holds no state to resume; name a modelNNNNNN.pt")
        return state
    folder, name = os.path.split(path)
    state = State(folder, checkpoint.steps_done(name), files={})
    if name != bf.basename(state.path("model")):
        raise ValueError(
            f"--resume_checkpoint {path}: need a modelNNNNNN.pt, a folder or auto; to start a new"
            " run from other weights, give --init_checkpoint"
        )
    return state


def flags_to_start_with(
    values: dict[str, Any], explicit: set[str], carried: Collection[str] = CARRIED_FLAGS
) -> dict[str, Any]:
    """Flags, whose defaults are those of the checkpoint that the run resumes or starts from.

    ValueError where an explicit flag contradicts the run that is resumed.
    """
    config = pick(TrainConfig, values)
    state = from_rank_0(lambda: find_state(config, warn=lambda text: None))  # TrainLoop warns
    initial = initial_weights(config)
    if state:
        path = state.path("model")
    elif initial:
        path = initial.path
    else:
        return values
    trained = from_rank_0(lambda: checkpoint.load_state(path)[1])
    if state:
        return merge_checkpoint_flags(values, explicit, trained, path, carried)
    given = {name: values[name] for name in explicit & values.keys()}
    return merge_checkpoint_flags(values, set(), trained, path, carried) | given


def start_from(path: str, model: nn.Module) -> None:
    """Fill the model with the tensors of a checkpoint that fit; log the others.

    CheckpointError if none fits.
    """
    left_out = checkpoint.load_weights(model, path, strict=False)
    own = checkpoint.published_names(model)
    new = [name for name in left_out if name in own]
    unknown = [name for name in left_out if name not in own]
    logger.log(f"{path}: {len(own) - len(new)} of the model's {len(own)} tensors taken")
    for what, names in (("start anew", new), ("have no place in the model", unknown)):
        if names:
            logger.log(f"  {len(names)} {what}: {', '.join(names)}")
