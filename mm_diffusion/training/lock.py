"""A lock of the output folder: two runs in one folder would overwrite each other."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..files import is_remote

LOCK = ".lock"
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 120.0  # without a heartbeat from another host: its process is gone


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Within it this process alone may write to the folder; remote folders are not locked.

    ValueError, naming the holder, where another process holds it. A lock is stale, and taken over,
    if its process on this host is gone, or if another host's has no recent heartbeat.
    """
    if is_remote(folder):
        yield
        return
    path, ended = Path(folder, LOCK), threading.Event()
    _acquire(path)
    threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        _release(path)


def _acquire(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(path) as file:
        holder = _read(file)
        if holder and _is_alive(holder, last_beat=os.fstat(file.fileno()).st_mtime):
            raise ValueError(
                f"{path.parent}: process {holder['process']} on {holder['host']} trains here; stop"
                f" it, or choose another --output_dir (if it is gone, remove {path})"
            )
        file.truncate(0)
        file.write(json.dumps(_this_process()))


def _release(path: Path) -> None:
    with contextlib.suppress(OSError), _exclusive(path) as file:
        if _read(file) in (None, _this_process()):
            path.unlink()


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[TextIO]:
    """The file at `path`, made if missing, while no other process is in here with it."""
    while True:
        with open(path, "a+") as file:
            with contextlib.suppress(OSError):  # file systems without locks: two may come in
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return


def _this_process() -> dict[str, Any]:
    """What the file holds. A process number has a meaning within its namespace, as a container."""
    number, namespace = os.getpid(), ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "namespace": namespace,
        "process": number,
        "started": _start_of(number),
    }


def _start_of(process: int) -> str:
    """When a live process started, in clock ticks since the host did; "" for one that is gone."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]


def _read(file: TextIO) -> dict[str, Any] | None:
    """The process that holds the lock; None where there is none, or the file is corrupt."""
    file.seek(0)
    try:
        holder = json.load(file)
        return holder if holder.keys() == _this_process().keys() else None
    except (ValueError, AttributeError):
        return None


def _is_alive(holder: dict[str, Any], last_beat: float) -> bool:
    """Whether another process holds the lock."""
    own = _this_process()
    if holder == own:
        return False
    if all(holder[key] == own[key] for key in ("host", "namespace")):
        return holder["started"] != "" and holder["started"] == _start_of(holder["process"])
    return time.time() - last_beat < STALE_SECONDS
