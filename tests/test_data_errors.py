"""Errors of the data while training: what was trained is saved before the run ends."""

import itertools
import subprocess
from pathlib import Path

import pytest
from test_dist import LAUNCHERS, untouched, with_mpiexec
from test_train import batches, files, loop

from mm_diffusion.data import DataError

REPO = Path(__file__).resolve().parents[1]


def failing(steps, world=None):
    """Data that is good for so many steps."""

    def data(start_sample):
        yield from itertools.islice(batches(2, world)(start_sample), steps)
        raise DataError("clips: 9 of 9 files cannot be used")

    return data


def test_a_run_saves_before_an_error_of_its_data_ends_it(tmp_path):
    previews = []
    trainer = loop(tmp_path, data=failing(3), preview=lambda *_: previews.append(1))
    with pytest.raises(DataError, match="9 of 9 files"):
        trainer.run_loop()
    assert "model000003.pt" in files(tmp_path)
    assert not previews
    resumed = loop(tmp_path, max_steps=4)
    assert resumed.step == 3
    resumed.run_loop()


def test_data_that_fails_before_the_first_step_leaves_no_state(tmp_path):
    with pytest.raises(DataError):
        loop(tmp_path, data=failing(0)).run_loop()
    assert not files(tmp_path)


JOB = """
import sys
import test_data_errors, test_train
from mm_diffusion.dist_util import friendly_errors, setup_dist
with friendly_errors():
    world = setup_dist()
    data = test_data_errors.failing(2, world) if world.rank == 1 else None
    test_train.loop(sys.argv[1], world=world, data=data, max_steps=50).run_loop()
"""


@with_mpiexec
def test_rank_0_saves_before_the_data_of_another_rank_ends_the_job(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    env = untouched() | {"PYTHONPATH": f"{REPO}:{REPO / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [*LAUNCHERS["mpiexec"], str(tmp_path / "job.py"), str(tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert done.stderr.rstrip().endswith("[rank 1] error: clips: 9 of 9 files cannot be used")
    assert files(tmp_path / "run")[-1] == "opt000002.pt"
