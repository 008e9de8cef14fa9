"""Ranks from whoever started us, and a job that ends when one of them fails."""

import contextlib
import datetime
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch as th

from mm_diffusion import dist_util
from mm_diffusion.dist_util import World, barrier, friendly_errors, from_rank_0, setup_dist

REPOSITORY = Path(__file__).parent.parent
MPIEXEC = Path(sys.executable).parent / "mpiexec"
LAUNCHERS = {
    "mpiexec": [str(MPIEXEC), "-n", "2", sys.executable],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ],
}
OF_A_LAUNCHER = re.compile(
    "(RANK|WORLD_SIZE|LOCAL_|MASTER_|SLURM_|PMI|MPI_|OMPI_|MPI4PY_|GLOO_|TORCHELASTIC_)"
)
with_mpiexec = pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this Python")

by_each_launcher = pytest.mark.parametrize(
    ("launcher", "who"), [pytest.param("mpiexec", "0", marks=with_mpiexec), ("torchrun", "1")]
)


def untouched() -> dict[str, str]:
    """The environment as it is where no launcher has touched it."""
    return {name: value for name, value in os.environ.items() if not OF_A_LAUNCHER.match(name)}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables in an environment that no launcher has touched."""
    monkeypatch.setattr(os, "environ", untouched())
    return lambda **values: os.environ.update(values)


def test_nothing_at_all_is_one_process_without_a_group_or_mpi(environment):
    before = set(sys.modules)
    assert setup_dist() == World(
        0, 1, 0, th.device("cuda", 0) if th.cuda.is_available() else th.device("cpu")
    )
    assert not th.distributed.is_initialized()
    assert "mpi4py.MPI" not in set(sys.modules) - before
    barrier()
    assert from_rank_0(lambda: 3) == 3
    assert dist_util.all_sum(th.ones(2)).tolist() == [1, 1]


SBATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_JOB_NODELIST": "n[1-2]",
}
SRUN = SBATCH | {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "localhost,n2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


def test_torchrun_says_who_we_are_even_within_a_step_of_srun_or_a_rank_of_mpiexec(environment):
    environment(**SRUN, PMI_RANK="1", MPI_LOCALRANKID="1", RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")
    assert dist_util.read_rank() == (5, 8, 1)


@pytest.mark.parametrize("more", [{}, {"PMI_RANK": "3", "PMI_SIZE": "4"}, {"PMIX_RANK": "3"}])
def test_srun_says_who_we_are_whatever_mpi_it_offers(environment, more):
    environment(**SRUN, **more)
    assert dist_util.read_rank() == (3, 4, 1)


@pytest.mark.parametrize(
    "variables", [SBATCH, SBATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}]
)
def test_a_batch_script_or_an_interactive_shell_is_one_process_however_many_tasks_it_may_start(
    environment, variables
):
    """Fault: python in a batch script of several tasks waited for ranks that nobody had started."""
    environment(**variables)
    assert dist_util._launcher() == ""
    assert dist_util.read_rank() == (0, 1, 0)


@pytest.mark.parametrize("variable", dist_util.MPIEXEC_VARIABLES)
@pytest.mark.parametrize("around", [SBATCH, SRUN])
def test_mpiexec_says_who_we_are_though_it_may_reach_the_hosts_through_srun(
    environment, variable, around
):
    environment(**around, **{variable: "1"})
    assert dist_util._launcher() == "mpi"


def test_ranks_of_srun_meet_on_the_first_host_of_the_step_not_where_srun_was_called(environment):
    environment(**SRUN)
    dist_util.set_rendezvous()
    assert os.environ["MASTER_ADDR"] == "localhost"
    assert 1024 < int(os.environ["MASTER_PORT"]) < 32768


def test_ranks_of_srun_on_one_host_need_no_name(environment):
    environment(
        **SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "no-such-host.invalid"}
    )
    dist_util.set_rendezvous()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_two_steps_of_a_job_meet_at_different_ports(environment):
    ports = set()
    for step in range(3):
        environment(**SRUN | {"SLURM_STEP_ID": str(step)})
        os.environ.pop("MASTER_PORT", None)
        dist_util.set_rendezvous()
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 3


def test_a_host_without_an_address_is_named_with_the_remedy(environment):
    environment(**SRUN | {"SLURM_STEP_NODELIST": "no-such-host[3-4].invalid"})
    with pytest.raises(ValueError, match=r"no-such-host3\.invalid.*MASTER_ADDR"):
        dist_util.set_rendezvous()


def test_the_users_choice_of_where_to_meet_wins(environment):
    nodes = {"SLURM_STEP_NODELIST": "no-such-host.invalid"}
    environment(**SRUN | nodes, MASTER_ADDR="chosen", MASTER_PORT="1234")
    dist_util.set_rendezvous()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("chosen", "1234")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("node[01-03,07],gpu1", "node01"),
        ("node[7,9-11]", "node7"),
        ("rack[2-3]node[005-006]-ib,x", "rack2node005-ib"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list_of_slurm(nodes, first):
    assert dist_util.first_host(nodes) == first


def test_ranks_that_do_not_meet_say_where_and_what_to_look_at(environment, monkeypatch):
    monkeypatch.setattr(dist_util, "JOINING", datetime.timedelta(seconds=1))
    environment(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    with pytest.raises(
        ValueError, match=r"2 ranks did not meet at 127\.0\.0\.1:1: .*MASTER_ADDR"
    ) as caught:
        setup_dist()
    assert "\n" not in str(caught.value)


def test_ranks_of_a_foreign_mpi_are_refused(environment):
    """Fault: under another MPI every rank believed to be alone, and all wrote the same files."""
    environment(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="4")
    with pytest.raises(ValueError, match=r"4 ranks.*sees 1"):
        dist_util._check_mpi(1)
    dist_util._check_mpi(4)


class FakeStore(dict):
    set = dict.__setitem__

    def multi_get(self, names):
        return [str(self[name]).encode() for name in names]


def test_ranks_on_gpus_speak_also_from_host_to_host(environment, monkeypatch):
    """What they agree on before a step must not wait for the devices."""
    environment(MASTER_ADDR="127.0.0.1")
    store, joined = FakeStore(), []
    store.set_timeout = lambda timeout: None
    monkeypatch.setattr(
        th.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=device.index)
    )
    monkeypatch.setattr(
        th.distributed, "rendezvous", lambda *args, **options: iter([(store, 0, 1)])
    )
    monkeypatch.setattr(
        th.distributed, "init_process_group", lambda backend, **options: joined.append(backend)
    )
    for device in (th.device("cuda", 0), th.device("cpu")):
        dist_util._join(0, 1, device)
    assert joined == ["cpu:gloo,cuda:nccl", "gloo"]
    assert os.environ["GLOO_SOCKET_IFNAME"] == dist_util._interfaces()["127.0.0.1"]


@pytest.mark.parametrize(("ids", "clash"), [("abcd", False), ("abcb", True)])
def test_two_ranks_on_one_gpu_are_refused_by_rank_0(monkeypatch, ids, clash):
    monkeypatch.setattr(
        th.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=ids[device.index])
    )
    store = FakeStore()
    for rank in (3, 2, 1):
        dist_util._check_gpus(th.device("cuda", rank), rank, 4, store)
    with pytest.raises(ValueError, match="ranks 1 and 3") if clash else contextlib.nullcontext():
        dist_util._check_gpus(th.device("cuda", 0), 0, 4, store)


def test_the_choice_of_gpus_by_a_scheduler_is_left_alone(environment, monkeypatch):
    """Fault: CUDA_VISIBLE_DEVICES was overwritten."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(th.cuda, "device_count", lambda: 0)
    setup_dist()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(
    ("devices", "local_rank", "number"),
    [
        ("", 1, 1),
        ("", 5, 1),
        ("G4", 3, 3),
        ("G8", 3, 3),
        ("G8", 5, 1),
        ("G2", 3, 1),
        ("1,3", 0, 1),
        ("1,3", 1, 3),
        ("2", 1, 2),
    ],
)
def test_devices_are_dealt_out_by_local_rank(monkeypatch, devices, local_rank, number):
    monkeypatch.setattr(th.cuda, "device_count", lambda: 4)
    assert dist_util._device(devices, local_rank) == th.device("cuda", number)


@pytest.mark.parametrize(
    ("devices", "count"), [("0", 0), ("0,7", 4), ("all", 4), ("Gx", 4), ("G0", 4), ("Gx", 0)]
)
def test_devices_that_are_not_there_are_refused_with_the_flag_named(monkeypatch, devices, count):
    monkeypatch.setattr(th.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match="devices"):
        dist_util._device(devices, 0)


@pytest.mark.parametrize("devices", ["", "G8"])
def test_without_a_gpu_the_cpu_computes(monkeypatch, devices):
    monkeypatch.setattr(th.cuda, "device_count", lambda: 0)
    assert dist_util._device(devices, 3) == th.device("cpu")


def test_dev_is_the_device_that_was_set_up(environment):
    assert setup_dist().device == dist_util.dev()


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


JOB = """
import os, signal, sys, time
import torch as th
from mm_diffusion import dist_util
from mm_diffusion.dist_util import all_sum, barrier, friendly_errors, setup_dist
who, what = sys.argv[1:3]
dist_util.GRACE_SECONDS = float(sys.argv[3]) if sys.argv[3:] else dist_util.GRACE_SECONDS
with friendly_errors():
    if what == "early":
        from mpi4py import MPI
        rank = MPI.COMM_WORLD.Get_rank()
    else:
        rank = setup_dist().rank
        assert all_sum(th.ones(1)) == 2
    if who in ("all", str(rank)):
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "bug":
            raise RuntimeError("a bug of ours")
        raise ValueError("this rank cannot go on")
    if what == "early":
        setup_dist()
    barrier()
    time.sleep(60)
"""


def run_job(tmp_path, launcher: str, who: str, what: str) -> str:
    """What a job of two ranks, of which `who` fails, prints; it must fail within a minute."""
    (tmp_path / "job.py").write_text(JOB)
    command = [*LAUNCHERS[launcher], str(tmp_path / "job.py"), who, what]
    env = untouched() | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=90
    )
    assert done.returncode != 0
    assert time.monotonic() - start < 60
    return done.stdout


@with_mpiexec
@pytest.mark.parametrize(("who", "what"), [("1", "mistake"), ("all", "mistake"), ("1", "early")])
def test_a_rank_that_fails_ends_the_job_and_says_so_once_and_last(tmp_path, who, what):
    """Fault: a failing rank left the others hanging."""
    screen = run_job(tmp_path, "mpiexec", who, what)
    assert screen.count("this rank cannot go on") == 1
    assert screen.endswith("error: this rank cannot go on\n")
    assert "Traceback" not in screen


@by_each_launcher
def test_the_traceback_of_a_rank_that_fails_is_the_last_on_the_screen(tmp_path, launcher, who):
    """torchrun closes with a report of its own, which then ends in that traceback."""
    screen = run_job(tmp_path, launcher, who, "bug")
    assert re.search(r"RuntimeError: a bug of ours[\s=]*\Z", screen), screen
    assert screen.count("RuntimeError: ") == (1 if launcher == "mpiexec" else 2), (
        "only the rank that failed complains"
    )


@by_each_launcher
def test_a_rank_that_is_killed_ends_the_job_without_complaints_of_the_others(
    tmp_path, launcher, who
):
    screen = run_job(tmp_path, launcher, who, "kill")
    assert re.search(r"Killed|SIGKILL", screen)
    assert "RuntimeError: " not in screen


def test_without_a_launcher_that_ends_it_a_rank_ends_by_itself_when_another_is_gone(tmp_path):
    """As with srun, which lets the others run on by default."""
    (tmp_path / "job.py").write_text(JOB)
    env = untouched() | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(dist_util._free_port())}
    command = [sys.executable, str(tmp_path / "job.py"), "1", "kill", "1"]
    ranks = [
        subprocess.Popen(
            command, env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(2)
    ]
    screens = [rank.communicate(timeout=60)[0].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, -9]
    *before, last = screens[0].splitlines()
    assert last.startswith("error: another rank is gone (")
    assert all(line.startswith("warning: no GPU found: 2 ranks") for line in before)
