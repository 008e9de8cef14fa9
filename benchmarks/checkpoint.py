"""How long a save keeps training waiting, against torch.save of the same state, and how long reading takes.

The state is copied while the next forward and backward run; only where they are shorter training waits for the rest.
"""

import os
import shutil
import tempfile
import time
from typing import Any

import torch as th
from bench import Bench
from measure import LeftOut, repeat, synchronise
from models import Size, train_loop
from report import Figure

from mm_diffusion.checkpoint import load_weights
from mm_diffusion.train_util import TrainLoop
from mm_diffusion.training.resume import model_path
from mm_diffusion.training.states import states_in

SAVES = 3
STATES_ON_DISK = 4  # one by torch.save, one that stays, one that is written, and room
STAGES = ("pause of training", "copied beside the next step", "written")


def measure_checkpoint(bench: Bench) -> None:
    """The section "checkpoint"."""
    for name, size in bench.sizes.items():
        with bench.report.trying("checkpoint", name), tempfile.TemporaryDirectory() as folder:
            measure_saves(bench, name, size, folder)


def measure_saves(bench: Bench, name: str, size: Size, folder: str) -> None:
    loop = train_loop(size, "fp32", folder)
    for parameter in loop.params:  # a state as after a step
        parameter.grad = th.zeros_like(parameter)
    loop.optimizer.step()
    state = {
        "model": loop.model.state_dict(),
        "opt": loop.optimizer.state_dict(),
        "emas": loop.emas,
    }
    check_room(folder, loop)

    def add(what: str, seconds: list[float], **facts: Any) -> None:
        bench.report.add(Figure("checkpoint", name, what, seconds, "s", facts=facts))

    path = os.path.join(folder, "plain.pt")
    plain = repeat(lambda: th.save(state, path), bench.seconds)
    add("torch.save", plain, megabytes=os.path.getsize(path) / 1e6)
    os.remove(path)
    for what, seconds in zip(STAGES, zip(*stages(loop), strict=True), strict=True):
        add(what, list(seconds))
    newest = model_path(folder, states_in(folder)[0].step)
    add("weights read", repeat(lambda: load_weights(loop.model, newest), bench.seconds))


def check_room(folder: str, loop: TrainLoop) -> None:
    """LeftOut where the disk has no room for the states: weights, their average and two moments."""
    need = STATES_ON_DISK * 4 * sum(p.numel() * p.element_size() for p in loop.params)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise LeftOut(
            f"{folder} has {free / 1e9:.0f} GB free, need {need / 1e9:.0f}; set TMPDIR to a larger place"
        )


def stages(loop: TrainLoop) -> list[list[float]]:
    """Seconds from the beginning of a save to the end of each of its stages, save by save, after one to warm up."""
    rows = []
    for step in range(1 + SAVES):
        loop.step = step
        synchronise()
        start = time.perf_counter()
        row = []
        for stage in (loop.save, loop.writer.wait_for_copy, loop.writer.wait):
            stage()
            row.append(time.perf_counter() - start)
        rows.append(row)
    return rows[1:]
