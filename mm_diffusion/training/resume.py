"""Where a run resumes from."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection

import blobfile as bf
from torch import nn

from .. import checkpoint, logger
from ..checkpoint import CheckpointError
from ..dist_util import from_rank_0
from ..script_util import CARRIED_FLAGS, TrainConfig, merge_checkpoint_flags, pick
from . import states


def origin_of(config: TrainConfig) -> str:
    """What tells states of a run that was told to resume another checkpoint from all others; "" for other runs."""
    path = config.resume_checkpoint
    if path in ("", "auto", "none"):
        return ""
    path, folder = (p if "://" in p else os.path.abspath(p) for p in (path, config.output_dir))
    return "" if path == folder else path


def find_state(
    config: TrainConfig, warn: Callable[[str], None] = logger.warn
) -> tuple[str, int] | None:
    """The folder and step to resume from, None to start anew.

    In this order: what a run with the same `resume_checkpoint` has left in the output folder; the file or folder that
    it names; the output folder ("" and "auto"). "none" starts anew; ValueError if the output folder holds a run then.
    """
    path = config.resume_checkpoint
    if (origin := origin_of(config)) and (
        state := states.newest_intact(config.output_dir, warn, origin)
    ):
        return config.output_dir, state.step
    if path in ("", "auto", "none") or bf.isdir(path):
        folder = config.output_dir if path in ("", "auto", "none") else path
        if path == "none":
            if states.states_in(folder):
                raise ValueError(
                    f"{folder} holds a run already: choose another --output_dir, or leave out --resume_checkpoint"
                )
            return None
        state = states.newest_intact(folder, warn)
        if not state and path not in ("", "auto"):
            raise CheckpointError(
                f"{folder}: holds no state to resume (stateNNNNNN.json); name a modelNNNNNN.pt"
            )
        return (folder, state.step) if state else None
    folder, name = os.path.split(path)
    match = re.fullmatch(r"model(\d+)\.pt", name)
    if not match or name != os.path.basename(model_path("", int(match[1]))):
        raise ValueError(
            f"resume_checkpoint {path}: need a file named modelNNNNNN.pt, a folder or auto; to start a new run from"
            " other weights, give them as --init_checkpoint"
        )
    return folder, int(match[1])


def model_path(folder: str, step: int) -> str:
    return bf.join(folder, f"model{step:06d}.pt")


def flags_to_start_with(
    values: dict, given: set[str], carried: Collection[str] = CARRIED_FLAGS
) -> dict:
    """Flags with those of the checkpoint that a run resumes, or starts from, in the place of defaults.

    ValueError where an explicit flag contradicts the run that is resumed.
    """
    state = from_rank_0(
        lambda: find_state(pick(TrainConfig, values), warn=lambda text: None)
    )  # TrainLoop tells
    path = model_path(*state) if state else values["init_checkpoint"]
    if not path:
        return values
    trained = checkpoint.load_state(path)[1]
    if not state:
        trained = {name: value for name, value in trained.items() if name not in given}
    return merge_checkpoint_flags(values, given, trained, path, carried)


def start_from(path: str, model: nn.Module) -> None:
    """Fill the model with those tensors of a checkpoint that fit, and tell which; CheckpointError if none does."""
    left = checkpoint.load_weights(model, path, strict=False)
    own = checkpoint.published_names(model)
    new, unknown = (
        [name for name in left if name in own],
        [name for name in left if name not in own],
    )
    logger.log(f"{path}: {len(own) - len(new)} of the model's {len(own)} tensors taken")
    for names, what in (
        (new, "start anew"),
        (unknown, "of the checkpoint have no place in the model"),
    ):
        if names:
            logger.log(f"  {len(names)} {what}: {', '.join(names)}")
