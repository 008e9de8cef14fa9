"""Processes that read files: one that a file kills is replaced, and the file is named."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch as th

from . import MediaError

PRELOADED = f"{__package__}.frames"  # imports the decoder


def clean_context() -> Any:
    """How processes are started: from a clean one that imports once.

    Forks of a process with MPI or CUDA may hang.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


class ReaderPool:
    """At most `size` processes, started when they are needed; a context manager.

    `call(function, path, ...)` may be called from as many threads. The function must be at the top
    level of a module.
    """

    def __init__(self, size: int) -> None:
        self.readers = [_Reader() for _ in range(size)]
        self.idle: queue.LifoQueue[_Reader] = queue.LifoQueue()  # few start where few do
        for reader in self.readers:
            self.idle.put(reader)

    def __enter__(self) -> ReaderPool:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self.readers:
            reader.stop()

    def call(self, function: Callable[..., Any], path: str, *rest: Any) -> Any:
        """`function(path, *rest)` in another process; MediaError where the file kills that."""
        reader = self.idle.get()
        try:
            return reader.call(function, path, *rest)
        finally:
            self.idle.put(reader)


class _Reader:
    """A process that answers one call after the other."""

    def __init__(self) -> None:
        self.process: Any = None
        self.connection: Any = None

    def call(self, function: Callable[..., Any], path: str, *rest: Any) -> Any:
        is_new = self.process is None
        if is_new:
            self._start()
        try:
            self.connection.send((function, (path, *rest)))
            result, error = self.connection.recv()
        except (EOFError, OSError):
            ending = self.stop()
            if not is_new:  # an earlier file may have corrupted its memory
                return self.call(function, path, *rest)
            raise MediaError(f"{path}: kills the process that reads it ({ending})") from None
        if error:
            raise error
        return result

    def _start(self) -> None:
        context = clean_context()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.connection.recv()
        except EOFError:
            raise RuntimeError(f"a process that reads files cannot start ({self.stop()})") from None

    def stop(self) -> str:
        """End the process -> how it ended."""
        if self.process is None:
            return ""
        self.connection.close()
        self.process.join()
        status, self.process = self.process.exitcode, None
        if status >= 0:
            return f"exit status {status}"
        memory = ", perhaps for lack of memory" if status == -signal.SIGKILL else ""
        return f"{signal.Signals(-status).name}{memory}"


def _serve(connection: Connection) -> None:
    """Answer calls until the other end closes: with (result, error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reports
    th.set_num_threads(1)
    connection.send("ready")
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = function(*arguments), None
        except MediaError as error:
            answer = None, error
        except Exception:
            answer = None, RuntimeError(f"{arguments[0]}: {traceback.format_exc()}")
        connection.send(answer)
