"""The shell scripts: what they run, what they refuse, and the environment they make."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
LAUNCHERS = sorted((REPO / "ssh_scripts").glob("*.sh"))
NEEDED_PATH = {"multimodal_train": "DATA_DIR", "image_sr_train": "DATA_DIR", "multimodal_sample_sr": "MODEL_PATH"}
OTHER_PATHS = ("SR_MODEL_PATH", "LOAD_NOISE")
NEEDS_PATH = pytest.mark.parametrize("name", NEEDED_PATH)

# Stands in for python and mpiexec: answers the launchers' questions about itself, writes down any other call.
RECORDER = """#!/bin/bash
if [ "$1" = -c ]; then echo "$0"; exit 0; fi
printf '%s\\0' "$(basename "$0")" "$@" >"$RECORD"
"""
# Stands in for an environment's python: pip fails where $PIP_FAILS is set; calls are counted in $RECORD.
FAKE_PIP = """#!/bin/bash
[ "$3" = install ] || exit 0
echo call >>"$RECORD"
[ -z "$PIP_FAILS" ] || { echo "ERROR: no such version"; exit 1; }
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(name: str, *args: str, path: str = "", **variables: str | Path) -> subprocess.CompletedProcess:
    """Run ssh_scripts/NAME.sh in an environment that holds `variables` and little else."""
    env = {"PATH": f"{path}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    command = ["bash", str(REPO / f"ssh_scripts/{name}.sh"), *args]
    return subprocess.run(
        command, env=env | {k: str(v) for k, v in variables.items()}, capture_output=True, text=True, timeout=60
    )


def recorded(tmp_path: Path, name: str, *args: str, **variables: str | Path) -> list[str]:
    """The command line that a launcher ends in."""
    for program in ("python", "mpiexec"):
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
    assert_refused(run(name, **{NEEDED_PATH[name]: f"{tmp_path},{missing}"}), NEEDED_PATH[name], str(missing))


@NEEDS_PATH
def test_paths_with_spaces_and_extra_flags_arrive_whole(name, tmp_path):
    place = tmp_path / "my clips"
    place.mkdir()
    line = recorded(tmp_path, name, "--seed", "7 8", NUM_GPUS="1", OUTPUT_DIR="out dir", **{NEEDED_PATH[name]: place})
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
    assert_refused(run(name, path=str(tmp_path / "bin"), NUM_GPUS=count, **{NEEDED_PATH[name]: tmp_path}), "NUM_GPUS")


@NEEDS_PATH
def test_every_variable_can_be_set_from_outside(name, tmp_path):
    text = (REPO / f"ssh_scripts/{name}.sh").read_text()
    names = re.findall(r'^: "\$\{(\w+):?=', text, re.MULTILINE)
    values = {variable: f"value of {variable}" for variable in names} | {"NUM_GPUS": "1", NEEDED_PATH[name]: tmp_path}
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


def test_a_folder_that_is_no_environment_is_not_touched(tmp_path):
    (tmp_path / "precious").write_text("data")
    assert_refused(run("install", VENV=tmp_path), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_unsupported_python_is_refused_in_one_line(tmp_path):
    write_program(tmp_path / "python2", "#!/bin/bash\nexit 1\n")
    assert_refused(run("install", VENV=tmp_path / "venv", PYTHON=tmp_path / "python2"), "3.11 or 3.12")


def test_launchers_and_setup_agree_on_python_versions():
    assert 'python_requires=">=3.11,<3.13"' in (REPO / "setup.py").read_text()
    assert "(3, 11) <= sys.version_info < (3, 13)" in (REPO / "ssh_scripts/env.sh").read_text()


def test_pip_runs_once_and_again_only_after_it_failed(tmp_path):
    venv, record = tmp_path / "my venv", tmp_path / "record"
    write_program(venv / "bin/python", FAKE_PIP)
    assert_refused(run("install", VENV=venv, RECORD=record, PIP_FAILS="1"), "ERROR: no such version", "pip.log")
    calls = []
    for _ in range(2):
        done = run("install", VENV=venv, RECORD=record)
        assert done.returncode == 0, done.stderr
        calls.append(len(record.read_text().split()))
    assert calls == [3, 3]  # one that failed, then the pins and the package
