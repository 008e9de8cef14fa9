"""The lock of the output folder: who may write, and what a second run reads."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import loop

from mm_diffusion.training import lock
from mm_diffusion.training.lock import LOCK, STALE_SECONDS, locked

REPO = Path(__file__).resolve().parents[1]
HOLDER = """
import sys, time
from mm_diffusion.training.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def foreign(folder, age, **changes):
    """The lock of a process on another host that gave a sign `age` seconds ago."""
    folder.mkdir(exist_ok=True)
    content = lock._this_process() | {"host": "elsewhere", "process": 77} | changes
    (folder / LOCK).write_text(json.dumps(content))
    os.utime(folder / LOCK, (time.time() - age,) * 2)


def test_the_second_run_in_a_folder_is_told_who_holds_it(tmp_path, holder):
    before = (tmp_path / "run" / LOCK).read_text()
    words = rf"run: process {holder.pid} on \S+ trains here; .*--output_dir .*remove .*{LOCK}"
    with pytest.raises(ValueError, match=words):
        loop(tmp_path / "run")
    assert (tmp_path / "run" / LOCK).read_text() == before
    assert os.listdir(tmp_path / "run") == [LOCK]


def test_a_killed_run_frees_its_folder_at_once_even_as_a_zombie(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table
    with locked(str(tmp_path / "run")):
        assert f'"process": {os.getpid()}' in (tmp_path / "run" / LOCK).read_text()


def test_a_process_that_got_the_number_of_the_holder_does_not_hold_the_folder(tmp_path, holder):
    content = json.loads((tmp_path / "run" / LOCK).read_text())
    (tmp_path / "run" / LOCK).write_text(json.dumps(content | {"started": "1"}))
    with locked(str(tmp_path / "run")):
        pass


@pytest.mark.parametrize("changes", [{}, {"host": lock._this_process()["host"], "namespace": "x"}])
def test_the_lock_of_another_host_or_container_holds_while_it_gives_signs(tmp_path, changes):
    foreign(tmp_path / "run", STALE_SECONDS - 20, **changes)
    with pytest.raises(ValueError, match="process 77 on"), locked(str(tmp_path / "run")):
        pass
    foreign(tmp_path / "run", STALE_SECONDS + 1, **changes)
    with locked(str(tmp_path / "run")):
        pass


def test_a_holder_gives_signs(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    with locked(str(tmp_path)):
        os.utime(tmp_path / LOCK, (1, 1))
        give_up = time.monotonic() + 20
        while (tmp_path / LOCK).stat().st_mtime == 1:
            assert time.monotonic() < give_up
            time.sleep(0.01)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"process": 1}'])
def test_a_corrupt_lock_holds_nobody(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with locked(str(tmp_path)):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_run_holds_its_folder_until_it_ends(tmp_path):
    trainer = loop(tmp_path, lr_anneal_steps=1)
    assert (tmp_path / LOCK).exists()
    trainer.run_loop()
    assert not (tmp_path / LOCK).exists()
    resumed = loop(tmp_path, lr_anneal_steps=2)  # the same process may go on
    assert resumed.step == 1


def test_a_remote_folder_is_not_locked():
    with locked("gs://bucket/run"):
        pass
