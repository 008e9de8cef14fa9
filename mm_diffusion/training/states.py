"""Training states on disk: written beside the training, complete or absent, found again, thinned out.

A state is ema_RATE_NNNNNN.pt, optNNNNNN.pt, modelNNNNNN.pt, in this order, and then stateNNNNNN.json: the manifest,
with the length and SHA-256 of each. Every file appears when it is complete. Folders may be remote, through blobfile.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import blobfile as bf
import torch as th

from .. import logger

MANIFEST, MODEL = re.compile(r"state(\d+)\.json"), re.compile(r"model(\d+)\.pt")
NUMBERED = re.compile(r"(?:model|opt|ema_[\d.]+_|state)(\d+)\.(?:pt|json)")
CHUNK_BYTES = 2**24

Save = Callable[[Any], None]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit."""


class StateError(OSError):
    """A state that could not be written; one line, with what is safe."""


@dataclass(frozen=True)
class State:
    """A state; `files`: names -> length and SHA-256, {} without a manifest, None where that cannot be read."""

    folder: str
    step: int
    files: Mapping[str, Mapping[str, Any]] | None
    origin: str = ""  # the checkpoint or folder that its run was told to resume, if any

    def damage(self, only: str = "") -> str:
        """What is wrong with it, or with one of its files; "" if nothing is."""
        if self.files is None:
            return f"{bf.join(self.folder, manifest_name(self.step))} is damaged"
        for name, wanted in self.files.items():
            if only and name != only:
                continue
            path = bf.join(self.folder, name)
            if not bf.exists(path):
                return f"{path} is missing"
            stat = bf.stat(path)
            if _checksum(path, stat.size, stat.mtime) != dict(wanted):
                return f"{path} is damaged (its checksum differs from the manifest's)"
        return ""


def states_in(folder: str) -> list[State]:
    """All states, newest first, unverified: with a manifest, or with a model and what the optimizer knows of it."""
    names = set(bf.listdir(folder)) if bf.isdir(folder) else set()
    steps = {
        int(match[1])
        for name in names
        if (match := MODEL.fullmatch(name)) and f"opt{match[1]}.pt" in names
    }
    steps |= {int(match[1]) for name in names if (match := MANIFEST.fullmatch(name))}
    return [State(folder, step, *_manifest(folder, step)) for step in sorted(steps, reverse=True)]


def manifest_name(step: int) -> str:
    return f"state{step:06d}.json"


def newest_intact(
    folder: str, warn: Callable[[str], None], origin: str | None = None
) -> State | None:
    """The newest state of the folder (of that origin) that is whole; each newer one that is not is told.

    None if there is no state; CheckpointError where there are states and none is whole.
    """
    states = [state for state in states_in(folder) if origin in (None, state.origin)]
    for state in states:
        reason = state.damage()
        if not reason:
            return state
        warn(f"{reason}: the state of step {state.step} cannot be used, trying the one before")
    if states:
        raise CheckpointError(
            f"{folder}: none of its {len(states)} states is whole; choose another --output_dir"
        )
    return None


def set_aside(folder: str, after: int) -> str:
    """Move the states of later steps into a folder of their own, so that none is overwritten -> that folder, or ""."""
    later = [state.step for state in states_in(folder) if state.step > after]
    if not later:
        return ""
    numbers = (k for k in itertools.count(1) if not bf.exists(bf.join(folder, f"abandoned_{k}")))
    target = bf.join(folder, f"abandoned_{next(numbers)}")
    bf.makedirs(target)
    for name in bf.listdir(folder):
        if (match := NUMBERED.fullmatch(name)) and int(match[1]) in later:
            bf.copy(bf.join(folder, name), bf.join(target, name))
            bf.remove(bf.join(folder, name))
    return target


def remove_leftovers(folder: str) -> None:
    """Remove what a save that was killed left under temporary names."""
    for name in bf.listdir(folder) if bf.isdir(folder) else []:
        if name.endswith(".partial") and NUMBERED.fullmatch(name.removesuffix(".partial")):
            bf.remove(bf.join(folder, name))


def refuse_damaged(path: str) -> None:
    """CheckpointError if a manifest beside this file says that it should be another; files without one pass."""
    folder, name = os.path.split(path)
    for state in states_in(folder or "."):
        if name in (state.files or {}) and (reason := state.damage(only=name)):
            raise CheckpointError(f"{reason}; use another checkpoint")


def _manifest(folder: str, step: int) -> tuple[Mapping[str, Mapping[str, Any]] | None, str]:
    """What the manifest says of files and origin; {} without one, None where it cannot be read."""
    path = bf.join(folder, manifest_name(step))
    if not bf.exists(path):
        return {}, ""
    try:
        with bf.BlobFile(path, "rb") as file:
            held = json.loads(file.read())
        files = {str(name): dict(checksum) for name, checksum in held["files"].items()}
        return files, str(held.get("origin", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, ""


@functools.lru_cache(maxsize=64)
def _checksum(path: str, size: int, mtime: float) -> dict[str, Any]:
    """Of the file as it is at this size and time, so that it need not be read again."""
    digest, length = hashlib.sha256(), 0
    with bf.BlobFile(path, "rb", streaming="://" in path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            length += len(chunk)
    return {"bytes": length, "sha256": digest.hexdigest()}


class _Hashing:
    """A file that knows the checksum of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.length = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.length += memoryview(data).nbytes
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()

    @property
    def checksum(self) -> dict[str, Any]:
        return {"bytes": self.length, "sha256": self.digest.hexdigest()}


def write_file(path: str, save: Save) -> dict[str, Any]:
    """`save(file)` into a file that appears at `path` when it is complete and on the disk -> its checksum."""
    if "://" in path:
        with bf.BlobFile(path, "wb") as remote:  # appears when it is closed
            return _saved(remote, save)
    temporary = f"{path}.partial"
    try:
        with open(temporary, "wb") as file:
            checksum = _saved(file, save)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(os.path.dirname(path) or ".")
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    return checksum


def _saved(file: Any, save: Save) -> dict[str, Any]:
    hashing = _Hashing(file)
    try:
        save(hashing)
    except RuntimeError:  # what torch.save makes of an error of the file
        raise hashing.error or OSError("torch.save failed") from None
    return hashing.checksum


def _sync_folder(folder: str) -> None:
    """The renaming, too, must be on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass
class StateWriter:
    """Writes states of a run beside the training, one at a time, and removes old ones.

    keep_last: how many newest states stay (0: all); keep_every: those at multiples of so many steps stay as well.
    """

    folder: str
    keep_last: int = 0
    keep_every: int = 0
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "state writer"))
    _running: Future | None = None
    _copying: threading.Event = field(default_factory=threading.Event)  # set once the copy is done

    def wait(self) -> None:
        """Until nothing is being written; StateError if that failed."""
        running, self._running = self._running, None
        if running:
            running.result()

    def __enter__(self) -> StateWriter:
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        """A state in hand is finished whatever happens, but for an impatient Ctrl-C."""
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            if kind is not KeyboardInterrupt:
                self.wait()

    def wait_for_copy(self) -> None:
        """Until what is being written may be changed."""
        if self._running:
            self._copying.wait()

    def check(self) -> None:
        """StateError if writing has failed meanwhile; does not wait."""
        if self._running and self._running.done():
            self.wait()

    def write(
        self,
        step: int,
        copy: Callable[[], Mapping[str, Save]],
        facts: Mapping[str, Any],
        then: Callable[[], None],
    ) -> None:
        """Begin to write a state, after the one before; `then()` is called when it is complete.

        `copy()` runs beside the training as well: until `wait_for_copy` returns, nothing that it copies may change.
        """
        self.wait()
        self._copying.clear()
        self._running = self._pool.submit(self._write, step, copy, facts, then)

    def _write(
        self,
        step: int,
        copy: Callable[[], Mapping[str, Save]],
        facts: Mapping[str, Any],
        then: Callable[[], None],
    ) -> None:
        checksums: dict[str, dict[str, Any]] = {}
        try:
            files = copy()
        finally:
            self._copying.set()
        try:
            bf.makedirs(self.folder)
            for name, save in files.items():
                checksums[name] = write_file(bf.join(self.folder, name), save)
            manifest = {"step": step, "files": checksums, **facts}
            text = json.dumps(manifest, indent=1).encode()
            write_file(bf.join(self.folder, manifest_name(step)), lambda file: file.write(text))
        except (OSError, bf.Error) as error:
            with contextlib.suppress(OSError, bf.Error):
                for name in checksums:  # of no use without a manifest
                    bf.remove(bf.join(self.folder, name))
            full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full" if full else " ".join(str(error).split())
            safe = next((state for state in states_in(self.folder) if not state.damage()), None)
            kept = (
                f"the state of step {safe.step} is intact" if safe else "no state was saved before"
            )
            raise StateError(f"{self.folder}: cannot save step {step}: {reason}; {kept}") from None
        then()
        try:
            self._thin_out(step)
        except (OSError, bf.Error) as error:
            logger.warn(f"{self.folder}: old states stay ({' '.join(str(error).split())})")

    def _thin_out(self, newest: int) -> None:
        """Remove what need not stay of the states up to the newest; of each the manifest first, then the model."""
        if not self.keep_last:
            return
        complete = [
            state for state in states_in(self.folder) if state.files and state.step <= newest
        ]
        for state in complete[self.keep_last :]:
            assert state.files
            if not (self.keep_every and state.step % self.keep_every == 0):
                for name in (manifest_name(state.step), *sorted(state.files, reverse=True)):
                    if bf.exists(path := bf.join(self.folder, name)):
                        bf.remove(path)


class HostCopy:
    """Copies of tensors on the host whose memory is used again by the next copy."""

    def __init__(self) -> None:
        self.buffers: dict[str, th.Tensor] = {}

    def take(self, name: str, tree: Any) -> Any:
        """`tree` (dicts, lists and tuples) with copies of its tensors; those of the last call are overwritten."""
        if isinstance(tree, dict):
            return {key: self.take(f"{name}/{key}", value) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self.take(f"{name}/{k}", value) for k, value in enumerate(tree))
        if not isinstance(tree, th.Tensor):
            return tree
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != tree.shape or buffer.dtype != tree.dtype:
            buffer = self.buffers[name] = th.empty_like(tree, device="cpu", pin_memory=tree.is_cuda)
        return buffer.copy_(tree.detach(), non_blocking=True)
