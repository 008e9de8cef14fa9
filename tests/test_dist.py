"""Ranks from whoever started us, and a job that ends when one of them fails."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch as th

from mm_diffusion import dist_util
from mm_diffusion.dist_util import World, barrier, friendly_errors, from_rank_0, setup_dist

MPIEXEC = Path(sys.executable).parent / "mpiexec"
REPOSITORY = Path(__file__).parent.parent
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID")
VARIABLES = (*LAUNCHERS, "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_LAUNCH_NODE_IPADDR", *dist_util.MPI_VARIABLES)


@pytest.fixture
def environment(monkeypatch):
    """Sets variables in an environment that no launcher has touched."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_nothing_at_all_is_one_process_without_a_group_or_mpi(environment):
    before = set(sys.modules)
    assert setup_dist() == World(0, 1, 0, th.device("cuda", 0) if th.cuda.is_available() else th.device("cpu"))
    assert not th.distributed.is_initialized()
    assert "mpi4py.MPI" not in set(sys.modules) - before
    barrier()
    assert from_rank_0(lambda: 3) == 3
    assert dist_util.all_sum(th.ones(2)).tolist() == [1, 1]


def test_torchrun_says_who_we_are(environment):
    environment(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", SLURM_NTASKS="3", SLURM_PROCID="2")
    assert dist_util._who_am_i() == (5, 8, 1)


def test_slurm_says_who_we_are_and_where_to_meet(environment):
    environment(
        SLURM_NTASKS="4", SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_JOB_ID="4711", SLURM_LAUNCH_NODE_IPADDR="10.0.0.7"
    )
    assert dist_util._who_am_i() == (3, 4, 1)
    assert os.environ["MASTER_ADDR"] == "10.0.0.7"
    assert 1024 < int(os.environ["MASTER_PORT"]) < 65536


def test_an_allocation_of_one_task_is_one_process(environment):
    environment(SLURM_NTASKS="1", SLURM_PROCID="0")
    assert dist_util._who_am_i() == (0, 1, 0)


def test_the_choice_of_gpus_by_a_scheduler_is_left_alone(environment, monkeypatch):
    """Fault: CUDA_VISIBLE_DEVICES was overwritten."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(th.cuda, "device_count", lambda: 0)
    setup_dist()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(
    ("devices", "local_rank", "number"),
    [("", 1, 1), ("", 5, 1), ("G4", 3, 3), ("1,3", 0, 1), ("1,3", 1, 3), ("2", 1, 2)],
)
def test_devices_are_dealt_out_by_local_rank(monkeypatch, devices, local_rank, number):
    monkeypatch.setattr(th.cuda, "device_count", lambda: 4)
    assert dist_util._device(devices, local_rank) == th.device("cuda", number)


@pytest.mark.parametrize(("devices", "count"), [("0", 0), ("G8", 4), ("0,7", 4), ("all", 4), ("Gx", 4)])
def test_devices_that_are_not_there_are_refused_with_the_flag_named(monkeypatch, devices, count):
    monkeypatch.setattr(th.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match="devices"):
        dist_util._device(devices, 0)


@pytest.mark.parametrize("error", [ValueError("bad\nflag"), OSError("no file")])
def test_a_mistake_of_the_user_is_one_line_and_status_1(environment, capsys, error):
    with pytest.raises(SystemExit) as caught, friendly_errors():
        raise error
    assert caught.value.code == 1
    assert capsys.readouterr().err in ("error: bad flag\n", "error: no file\n")


def test_a_mistake_of_ours_keeps_its_traceback(environment, capsys):
    with pytest.raises(SystemExit), friendly_errors():
        raise AssertionError("ours")
    assert "Traceback" in capsys.readouterr().err


WORKER = """
import sys, time
from mm_diffusion.dist_util import friendly_errors, setup_dist, barrier
who, when = sys.argv[1:]
with friendly_errors():
    if when == "after":
        world = setup_dist()
        rank = world.rank
    else:
        from mpi4py import MPI
        rank = MPI.COMM_WORLD.Get_rank()
    if who in ("all", str(rank)):
        raise ValueError("this rank cannot go on")
    if when == "after":
        barrier()
    else:
        setup_dist()
    time.sleep(60)
"""


@pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this Python")
@pytest.mark.parametrize(("who", "when"), [("1", "after"), ("all", "after"), ("1", "before")])
def test_a_rank_that_fails_ends_the_job_within_seconds_and_says_so_once(tmp_path, who, when):
    """Fault: a failing rank left the others hanging."""
    (tmp_path / "worker.py").write_text(WORKER)
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    env |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [str(MPIEXEC), "-n", "2", sys.executable, str(tmp_path / "worker.py"), who, when]
    start = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode != 0
    assert time.monotonic() - start < 45
    assert (done.stdout + done.stderr).count("this rank cannot go on") == 1
    assert "Traceback" not in done.stderr
