"""The shell scripts: what they run, what they refuse, and the environment they make."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
LAUNCHERS = sorted((REPO / "ssh_scripts").glob("*.sh"))
NEEDED_PATH = {
    "multimodal_train": "DATA_DIR",
    "image_sr_train": "DATA_DIR",
    "multimodal_sample_sr": "MODEL_PATH",
}
OTHER_PATHS = ("SR_MODEL_PATH", "LOAD_NOISE", "REF_PATH")
NEEDS_PATH = pytest.mark.parametrize("name", NEEDED_PATH)

# Stands in for python, mpiexec and srun: answers questions about itself, records other calls.
RECORDER = """#!/bin/bash
if [ "$1" = -c ]; then echo "$0"; exit 0; fi
printf '%s\\0' "$(basename "$0")" "$@" >"$RECORD"
"""
# Stands in for an environment's python: pip fails if $PIP_FAILS; calls are counted in $RECORD.
FAKE_PIP = """#!/bin/bash
[ "$3" = install ] || exit 0
echo call >>"$RECORD"
[ -z "$PIP_FAILS" ] || { echo "ERROR: no such version"; exit 1; }
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(
    name: str, *args: str, path: str = "", **variables: str | Path
) -> subprocess.CompletedProcess:
    """Run ssh_scripts/NAME.sh in an environment that holds `variables` and little else."""
    env = {"PATH": f"{path}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    command = ["bash", str(REPO / f"ssh_scripts/{name}.sh"), *args]
    return subprocess.run(
        command,
        env=env | {k: str(v) for k, v in variables.items()},
        capture_output=True,
        text=True,
        timeout=60,
    )


def recorded(tmp_path: Path, name: str, *args: str, **variables: str | Path) -> list[str]:
    """The command line that a launcher ends in."""
    for program in ("python", "mpiexec", "srun"):
        write_program(tmp_path / f"bin dir/{program}", RECORDER)
    done = run(name, *args, path=str(tmp_path / "bin dir"), RECORD=tmp_path / "record", **variables)
    assert done.returncode == 0, done.stderr
    return (tmp_path / "record").read_text().split("\0")[:-1]


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode in (1, 2)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("path", [*LAUNCHERS, REPO / ".ci/run"], ids=lambda path: path.name)
def test_every_launcher_parses(path):
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=10)


@NEEDS_PATH
def test_a_path_that_is_not_given_is_asked_for_in_one_line(name):
    assert_refused(run(name), NEEDED_PATH[name])


@NEEDS_PATH
def test_a_path_that_does_not_exist_is_named_in_one_line(name, tmp_path):
    missing = tmp_path / "no such place"
    assert_refused(
        run(name, **{NEEDED_PATH[name]: f"{tmp_path},{missing}"}), NEEDED_PATH[name], str(missing)
    )


@NEEDS_PATH
def test_paths_with_spaces_and_extra_flags_arrive_whole(name, tmp_path):
    place = tmp_path / "my clips"
    place.mkdir()
    line = recorded(
        tmp_path,
        name,
        "--seed",
        "7 8",
        NUM_GPUS="1",
        OUTPUT_DIR="out dir",
        **{NEEDED_PATH[name]: place},
    )
    assert line[:2] == ["python", str(REPO / f"py_scripts/{name}.py")]
    assert {str(place), "out dir"} <= set(line)
    assert line[-2:] == ["--seed", "7 8"]


@NEEDS_PATH
def test_several_ranks_are_started_by_mpiexec_and_eight_are_the_default(name, tmp_path):
    for given, count in (({}, "8"), ({"NUM_GPUS": "2"}, "2")):
        line = recorded(tmp_path, name, **given, **{NEEDED_PATH[name]: tmp_path})
        assert line[:4] == ["mpiexec", "-n", count, "python"]


@NEEDS_PATH
@pytest.mark.parametrize("count", ["0", "two", "-1"])
def test_an_impossible_number_of_ranks_is_refused(name, count, tmp_path):
    write_program(tmp_path / "bin/python", RECORDER)
    assert_refused(
        run(name, path=str(tmp_path / "bin"), NUM_GPUS=count, **{NEEDED_PATH[name]: tmp_path}),
        "NUM_GPUS",
    )


@NEEDS_PATH
def test_every_variable_can_be_set_from_outside(name, tmp_path):
    text = (REPO / f"ssh_scripts/{name}.sh").read_text()
    names = re.findall(r'^: "\$\{(\w+):?=', text, re.MULTILINE)
    values = {variable: f"value of {variable}" for variable in names} | {
        "NUM_GPUS": "1",
        NEEDED_PATH[name]: tmp_path,
    }
    values |= {variable: tmp_path for variable in OTHER_PATHS if variable in names}
    line = recorded(tmp_path, name, **values)
    assert {str(value) for variable, value in values.items() if variable != "NUM_GPUS"} <= set(line)


@NEEDS_PATH
def test_every_flag_of_a_launcher_is_known_to_its_script(name, tmp_path):
    line = recorded(tmp_path, name, NUM_GPUS="1", **{NEEDED_PATH[name]: tmp_path})
    command = [sys.executable, *line[1:], "--no_such_flag", "1"]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert_refused(done, "unrecognized arguments: --no_such_flag 1 ")


@pytest.mark.parametrize("name", ["multimodal_sample_sr", "audio2video_sample_sr"])
def test_any_sampler_of_the_upsampler_is_chosen_by_its_name_alone(name, tmp_path):
    """Fault: ddim25 was set for every sampler, which dpm_solver refuses."""
    given = {"NUM_GPUS": "1", "MODEL_PATH": tmp_path, "DATA_DIR": tmp_path}
    line = recorded(tmp_path, name, SR_SAMPLE_FN="dpm_solver", **given)
    assert line[line.index("--sr_sample_fn") + 1] == "dpm_solver"
    assert "--sr_timestep_respacing" not in line
    line = recorded(tmp_path, name, SR_TIMESTEP_RESPACING="ddim10", **given)
    assert line[line.index("--sr_timestep_respacing") + 1] == "ddim10"


# Several hosts


@NEEDS_PATH
def test_every_launcher_starts_its_ranks_on_the_hosts_of_a_file(name, tmp_path):
    """NUM_GPUS counts on each host."""
    hosts = tmp_path / "my hosts"
    hosts.write_text("# two of them\nnode1\n\n  node2:8\n")
    given = {"HOSTFILE": hosts, "MPIEXEC_FLAGS": "-iface eth1", NEEDED_PATH[name]: tmp_path}
    for count, total in (("1", "2"), ("4", "8")):
        line = recorded(tmp_path, name, NUM_GPUS=count, **given)
        flags = ["-iface", "eth1", "-f", str(hosts), "-ppn", count, "-n", total]
        assert line[:11] == ["mpiexec", *flags, "python", str(REPO / f"py_scripts/{name}.py")]


@NEEDS_PATH
def test_every_launcher_can_use_torchrun_or_srun(name, tmp_path):
    script, path = str(REPO / f"py_scripts/{name}.py"), {NEEDED_PATH[name]: tmp_path}
    torchrun = ["python", "-m", "torch.distributed.run"]
    line = recorded(tmp_path, name, LAUNCHER="torchrun", NUM_GPUS="2", **path)
    assert line[:7] == [*torchrun, "--standalone", "--nproc_per_node", "2", script]
    place = {"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "node1"}
    line = recorded(tmp_path, name, LAUNCHER="torchrun", NUM_GPUS="2", **place, **path)
    where = [
        "--nnodes",
        "3",
        "--node_rank",
        "1",
        "--master_addr",
        "node1",
        "--master_port",
        "29500",
    ]
    assert line[:14] == [*torchrun, *where, "--nproc_per_node", "2", script]
    line = recorded(tmp_path, name, LAUNCHER="srun", **path)
    assert line[:4] == ["srun", "--kill-on-bad-exit=1", "python", script]


@pytest.mark.parametrize(
    ("variables", "culprit"),
    [
        ({"LAUNCHER": "qsub"}, "LAUNCHER=qsub"),
        ({"LAUNCHER": "torchrun", "NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
        ({"LAUNCHER": "torchrun", "NNODES": "2", "MASTER_ADDR": "node1"}, "NODE_RANK"),
        ({"HOSTFILE": os.devnull}, "names no host"),
    ],
)
def test_a_way_to_start_ranks_that_cannot_work_is_refused_in_one_line(variables, culprit, tmp_path):
    for program in ("python", "mpiexec"):
        write_program(tmp_path / f"bin/{program}", RECORDER)
    done = run("multimodal_train", path=str(tmp_path / "bin"), DATA_DIR=tmp_path, **variables)
    assert_refused(done, culprit)


@pytest.mark.parametrize(
    ("version", "is_known"),
    [("HYDRA build details:\n    Version: 5.0.2", False), ("mpirun (Open MPI) 4.1.4", True)],
)
def test_a_flag_of_open_mpi_is_refused_where_mpich_is_started(tmp_path, version, is_known):
    """Published command lines have --allow-run-as-root, which MPICH does not know."""
    text = (
        f'#!/bin/bash\n[ "$1" != --version ] || {{ echo "{version}"; exit; }}\necho started "$@"\n'
    )
    write_program(tmp_path / "bin/mpiexec", text)
    write_program(tmp_path / "bin/python", RECORDER)
    variables = {"DATA_DIR": tmp_path, "MPIEXEC_FLAGS": "--allow-run-as-root -v"}
    done = run("multimodal_train", path=str(tmp_path / "bin"), RECORD=os.devnull, **variables)
    if is_known:
        assert "started --allow-run-as-root -v -n 8 python" in done.stdout
    else:
        assert_refused(done, "--allow-run-as-root is a flag of Open MPI", "MPICH", "leave it out")


def test_the_launcher_for_hosts_wants_a_file_of_them(tmp_path):
    assert_refused(run("multimodal_train_hosts", DATA_DIR=tmp_path), "HOSTFILE")
    assert_refused(
        run("multimodal_train_hosts", DATA_DIR=tmp_path, HOSTFILE="no such file"),
        "HOSTFILE=no such file",
    )


def test_the_launcher_for_hosts_is_the_trainers_on_many_hosts(tmp_path):
    (tmp_path / "hosts").write_text("node1\nnode2\n")
    given = {
        "HOSTFILE": tmp_path / "hosts",
        "GPUS_PER_NODE": "4",
        "DATA_DIR": tmp_path,
        "LR": "5e-5",
    }
    line = recorded(tmp_path, "multimodal_train_hosts", "--seed", "7 8", **given)
    start = ["mpiexec", "-f", str(tmp_path / "hosts"), "-ppn", "4", "-n", "8"]
    assert line[:9] == [*start, "python", str(REPO / "py_scripts/multimodal_train.py")]
    assert {"5e-5", str(tmp_path)} <= set(line)
    assert line[-2:] == ["--seed", "7 8"]


def slurm_job(tmp_path: Path, trainer: str, *args: str) -> tuple[subprocess.Popen, Path]:
    """The batch script as Slurm runs it, a copy elsewhere; `trainer` is srun."""
    copy = tmp_path / "spool/slurm_script"
    write_program(copy, (REPO / "ssh_scripts/multimodal_train_slurm.sh").read_text())
    for program, text in (("python", RECORDER), ("scontrol", RECORDER), ("srun", trainer)):
        write_program(tmp_path / f"bin/{program}", text)
    env = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "DATA_DIR": str(tmp_path),
        "RECORD": str(tmp_path / "record"),
    }
    env |= {"SLURM_SUBMIT_DIR": str(REPO), "SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "6"}
    job = subprocess.Popen(["bash", str(copy), *args], env=env, stderr=subprocess.PIPE, text=True)
    return job, tmp_path / "record"


def test_a_job_of_slurm_runs_the_trainer_on_its_tasks_with_their_cores(tmp_path):
    trainer = RECORDER.replace('"$@" >', '"$@" "$OMP_NUM_THREADS" "$SRUN_CPUS_PER_TASK" >')
    job, record = slurm_job(tmp_path, trainer, "--seed", "7 8")
    assert job.wait(timeout=60) == 0
    line = record.read_text().split("\0")[:-1]
    assert line[:4] == [
        "srun",
        "--kill-on-bad-exit=1",
        "python",
        str(REPO / "py_scripts/multimodal_train.py"),
    ]
    assert line[-4:] == ["--seed", "7 8", "6", "6"]


# It waits for the signal, as the trainer does, and takes a moment to save.
WAITING = """#!/bin/bash
trap 'sleep 0.3; exit STATUS' USR1
touch "$RECORD.waits"
while sleep 0.1; do :; done
"""


@pytest.mark.parametrize(("status", "calls"), [(0, ["scontrol", "requeue", "4711"]), (3, [])])
def test_a_job_of_slurm_out_of_time_goes_back_into_the_queue_once_the_trainer_has_saved(
    tmp_path, status, calls
):
    job, record = slurm_job(tmp_path, WAITING.replace("STATUS", str(status)))
    deadline = time.monotonic() + 60
    while not Path(f"{record}.waits").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == status
    assert (record.read_text().split("\0")[:-1] if record.exists() else []) == calls


def test_a_job_of_slurm_called_elsewhere_names_the_remedy(tmp_path):
    assert_refused(run("multimodal_train_slurm", SLURM_SUBMIT_DIR=tmp_path), "REPO")


# The environment


def test_a_folder_that_is_no_environment_is_not_touched(tmp_path):
    (tmp_path / "precious").write_text("data")
    assert_refused(run("install", VENV=tmp_path), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_unsupported_python_is_refused_in_one_line(tmp_path):
    write_program(tmp_path / "python2", "#!/bin/bash\nexit 1\n")
    assert_refused(
        run("install", VENV=tmp_path / "venv", PYTHON=tmp_path / "python2"), "3.11 or 3.12"
    )


def test_launchers_and_setup_agree_on_python_versions():
    assert 'python_requires=">=3.11,<3.13"' in (REPO / "setup.py").read_text()
    assert "(3, 11) <= sys.version_info < (3, 13)" in (REPO / "ssh_scripts/env.sh").read_text()


def test_pip_runs_once_and_again_only_after_it_failed(tmp_path):
    venv, record = tmp_path / "my venv", tmp_path / "record"
    write_program(venv / "bin/python", FAKE_PIP)
    assert_refused(
        run("install", VENV=venv, RECORD=record, PIP_FAILS="1"), "ERROR: no such version", "pip.log"
    )
    calls = []
    for _ in range(2):
        done = run("install", VENV=venv, RECORD=record)
        assert done.returncode == 0, done.stderr
        calls.append(len(record.read_text().split()))
    assert calls == [3, 3]  # one that failed, then the pins and the package
