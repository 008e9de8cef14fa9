"""How long a save takes, against torch.save of the same tensors, and how long reading takes."""

import os
import shutil
import tempfile
from functools import partial
from typing import Any

import torch as th
from bench import Bench
from measure import LeftOut, repeat, seconds_of
from models import Size, train_loop
from report import Figure

from mm_diffusion.checkpoint import load_weights
from mm_diffusion.train_util import TrainLoop
from mm_diffusion.training.states import states_in

SAVES = 3
STATES_ON_DISK = 4  # one by torch.save, one kept, one being written, and room


def measure_checkpoint(bench: Bench) -> None:
    """The section "checkpoint"."""
    for name, size in bench.sizes.items():
        with bench.report.trying("checkpoint", name), tempfile.TemporaryDirectory() as folder:
            measure_saves(bench, name, size, folder)


def measure_saves(bench: Bench, name: str, size: Size, folder: str) -> None:
    """Add the figures of one model."""
    loop = train_loop(size, "fp32", folder)
    for parameter in loop.params:  # a state as after a step
        parameter.grad = th.zeros_like(parameter)
    loop.optimizer.step()
    check_space(folder, loop)

    def add(what: str, seconds: list[float], **facts: Any) -> None:
        bench.report.add(Figure("checkpoint", name, what, seconds, "s", facts=facts))

    path = os.path.join(folder, "plain.pt")
    optimizer = loop.optimizer.state_dict()
    state = {"model": loop.model.state_dict(), "opt": optimizer, "emas": loop.emas}
    plain = repeat(partial(th.save, state, path), bench.seconds)
    add("torch.save", plain, megabytes=os.path.getsize(path) / 1e6)
    os.remove(path)
    add("save", [save_seconds(loop, step) for step in range(1 + SAVES)][1:])
    newest = states_in(folder)[0].path("model")
    add("load_weights", repeat(partial(load_weights, loop.model, newest), bench.seconds))


def check_space(folder: str, loop: TrainLoop) -> None:
    """LeftOut where the disk has no space for the states: weights, an average and two moments."""
    need = STATES_ON_DISK * 4 * sum(p.numel() * p.element_size() for p in loop.params)
    free = shutil.disk_usage(folder).free
    if free < need:
        sizes = f"{free / 1e9:.0f} GB free, need {need / 1e9:.0f}"
        raise LeftOut(f"{folder}: {sizes}; set TMPDIR to a larger disk")


def save_seconds(loop: TrainLoop, step: int) -> float:
    """How long it takes to save the state as that of a step."""
    loop.step = step
    return seconds_of(loop.save)
