"""A run of two ranks, killed at random moments, ends with the weights of an uninterrupted one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch as th

from mm_diffusion import checkpoint
from mm_diffusion.files import UNFINISHED
from mm_diffusion.training.states import states_in

KILLS = 20
STEPS, SAVE_INTERVAL = 240, 4
START_SECONDS = 120

SCRIPT = """
import os, sys
import test_train, tiny
import torch as th
from mm_diffusion.dist_util import friendly_errors, setup_dist

with friendly_errors():
    folder, steps, save_interval = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    th.set_num_threads(1)
    world = setup_dist()
    trainer = test_train.loop(
        folder, world=world, lr_anneal_steps=steps, save_interval=save_interval,
        log_interval=1000, batch_size=1, ema_rate="0.9999,0.9",
        schedule_sampler="loss-second-moment", flags={"dropout": 0.1}, keep_last=3,
    )
    with open(f"{folder}.rank{world.rank}", "w") as file:
        file.write(str(os.getpid()))
    trainer.run_loop()
"""


def start(folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """Start the run, and wait until both ranks train."""
    marks = [Path(f"{folder}.rank{rank}") for rank in range(2)]
    for mark in marks:
        mark.unlink(missing_ok=True)
    tests = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}
    command = [
        "mpiexec",
        "-n",
        "2",
        sys.executable,
        "-c",
        SCRIPT,
        str(folder),
        str(STEPS),
        str(SAVE_INTERVAL),
    ]
    log = open(f"{folder}.log", "a")  # noqa: SIM115 (the process keeps it)
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    give_up = time.monotonic() + START_SECONDS
    while not all(mark.exists() and mark.read_text() for mark in marks):
        assert process.poll() is None or all(mark.exists() for mark in marks), Path(
            f"{folder}.log"
        ).read_text()
        assert time.monotonic() < give_up, Path(f"{folder}.log").read_text()
        time.sleep(0.02)
    return process, [int(mark.read_text()) for mark in marks]


def wait_for_the_moment(folder: Path, process: subprocess.Popen, rng: random.Random) -> None:
    """Half of the time any moment, half of the time while a file is being written."""
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, 4))
        return
    until = time.monotonic() + rng.uniform(0, 3)
    while process.poll() is None and (time.monotonic() < until or not is_saving(folder)):
        time.sleep(0.001)


def is_saving(folder: Path) -> bool:
    """Whether a file is being written in the folder."""
    return any(UNFINISHED.fullmatch(path.name) for path in folder.glob(".*"))


def assert_intact(folder: Path) -> None:
    """Whatever has a final name is complete."""
    for state in states_in(str(folder)):
        assert state.corruption() == ""
    for path in folder.glob("[!.]*.pt"):
        checkpoint.load(str(path))
    for path in folder.glob("[!.]*.json"):
        json.loads(path.read_text())


@pytest.mark.slow
def test_a_run_that_is_killed_20_times_ends_with_the_weights_of_one_that_is_not(tmp_path):
    rng = random.Random(0)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process, _ = start(straight)
    assert process.wait(600) == 0, Path(f"{straight}.log").read_text()
    kills = in_saves = 0
    while kills < KILLS:
        process, ranks = start(killed)
        wait_for_the_moment(killed, process, rng)
        if process.poll() is not None:
            break
        in_saves += is_saving(killed)
        for rank in rng.sample(ranks, rng.choice([1, 2])):  # both, or one that takes the other down
            os.kill(rank, signal.SIGKILL)
        assert process.wait(60) != 0
        kills += 1
        assert_intact(killed)
    process, _ = start(killed)
    assert process.wait(600) == 0, Path(f"{killed}.log").read_text()
    assert kills == KILLS, "the run was over too soon; raise STEPS"
    assert in_saves >= 3, f"only {in_saves} kills came while a file was being written"
    final = f"{STEPS:06d}.pt"
    for name in (f"model{final}", f"ema_0.9999_{final}", f"ema_0.9_{final}", f"opt{final}"):
        same(checkpoint.load(str(straight / name)), checkpoint.load(str(killed / name)), name)


def same(a, b, name):
    """Equal bit for bit, all the way down."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            same(a[key], b[key], f"{name}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{name}/{k}")
    elif isinstance(a, th.Tensor):
        assert th.equal(a, b), name
    else:
        assert a == b, name
