"""Probing files: once, by all ranks together, and remembered in a file."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import blobfile
import numpy as np
from tqdm import tqdm

from .. import logger
from ..dist_util import from_rank_0, group_rank, to_rank_0
from ..files import is_remote, write_atomically
from . import MediaError
from .shared import SharedBytes, share
from .table import IDENTITY, Table, encode, is_intact, number_fields, row_type, text_of
from .workers import ReaderPool

FINGERPRINT_BYTES = 2**20  # at either end of a file
PIECE_FILES = 1000  # that a rank probes before all meet, so that none waits for long
SAVE_SECONDS = 60.0  # of probing are lost at most, beside a piece, where a run is interrupted
NOT_FOUND = (OSError, blobfile.Error)
Info = TypeVar("Info")
Result = Any  # an info, or the MediaError of a bad file


class Found(NamedTuple):
    """Files, sorted, and folder -> why it could not be searched."""

    paths: list[str]
    unreadable: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Probe(Generic[Info]):
    """How files are probed: `function(path, *arguments)`, an info or MediaError for a bad file.

    The function is called in other processes (see `ReaderPool`). kind: the dataclass of its infos,
    which have numbers and what JSON can hold. cache: the file that remembers them.
    """

    function: Callable[..., Info]
    kind: type[Info]
    cache: Path
    num_workers: int = 4
    arguments: Sequence[Any] = ()


class Probed(NamedTuple):
    """Good files with what is known of each, and why the others are bad."""

    clips: Table[Any]
    bad: dict[str, str]


def probe_files(find: Callable[[], Found], probe: Probe) -> Probed:
    """Probe what `find()` returns on rank 0; must be called on every rank.

    Good files of unchanged size and time are taken from the cache; what failed may work this time.
    """
    rank, _ = group_rank()
    files: Any = _Files(find(), probe) if rank == 0 else None
    for results in _probe_together(from_rank_0(lambda: files.waiting()), probe):
        if files:
            files.add(results)
    content = files.finish() if files else None
    bad = from_rank_0(lambda: files.unreadable | dict(sorted(files.bad.items())))
    return Probed(Table(probe.kind, share(content)), bad)


def _probe_together(paths: list[str], probe: Probe) -> Iterator[list[Result]]:
    """Pieces of the results in the order of the paths, on rank 0; elsewhere empty ones."""
    rank, size = group_rank()
    workers = max(1, probe.num_workers)
    pieces = [paths[k : k + PIECE_FILES] for k in range(0, len(paths), PIECE_FILES)]

    def call(path: str) -> Result:
        try:
            return readers.call(probe.function, path, *probe.arguments)
        except MediaError as error:
            return error

    bar = tqdm(total=len(paths), desc="files", unit="file", leave=False, disable=rank > 0)
    with ReaderPool(workers) as readers, ThreadPoolExecutor(workers) as threads, bar:
        for first in range(0, len(pieces), size):
            own = []
            for piece in pieces[first + rank : first + rank + 1]:
                for result in threads.map(call, piece):
                    own.append(result)
                    bar.update()
            results = list(itertools.chain(*to_rank_0(own)))
            bar.update(max(0, len(results) - len(own)))
            yield results


class _Files:
    """On rank 0, the files that were found: rows from an earlier run, or by probing."""

    def __init__(self, found: Found, probe: Probe) -> None:
        self.paths, self.probe = found.paths, probe
        self.unreadable, self.bad = found.unreadable, dict[str, str]()
        self.numbers = number_fields(probe.kind)
        self.rows = np.zeros(len(self.paths), row_type(probe.kind))
        self._identify()
        self.is_known = np.zeros(len(self.paths), bool)
        self.texts: dict[str, int] = {}
        self.content = self._recall()
        unknown = np.flatnonzero(~self.is_known).tolist()
        self.todo = [number for number in unknown if self.paths[number] not in self.bad]
        self.next = iter(self.todo)
        self.saved, self.can_save = time.monotonic(), True

    def _identify(self) -> None:
        """Size and time of every file."""
        begins = range(0, len(self.paths), PIECE_FILES)
        pieces = [self.paths[k : k + PIECE_FILES] for k in begins]
        with ThreadPoolExecutor(max(1, self.probe.num_workers)) as threads:
            results = threads.map(_identities, pieces)
            for begin, (identities, bad) in zip(begins, results, strict=True):
                rows = self.rows[begin : begin + PIECE_FILES]
                for name in IDENTITY:
                    rows[name] = identities[name]
                self.bad |= bad

    def _recall(self) -> SharedBytes | None:
        """Take rows of unchanged files from the cache -> its content, if that is still right."""
        content = SharedBytes.read(self.probe.cache)
        if not is_intact(content, self.probe.kind):
            return None
        known = Table(self.probe.kind, content)
        self.texts = {text: k for k, text in enumerate(known.texts.all())}
        numbers = _places(self.paths, known.paths())
        ours = np.flatnonzero(numbers >= 0)
        theirs = numbers[ours]
        for name in IDENTITY:
            same = self.rows[name][ours] == known.rows[name][theirs]
            ours, theirs = ours[same], theirs[same]
        self.rows[ours] = known.rows[theirs]
        self.is_known[ours] = True
        return content if len(ours) == len(known) else None

    def waiting(self) -> list[str]:
        """The files to be probed."""
        return [self.paths[number] for number in self.todo]

    def add(self, results: list[Result]) -> None:
        """Results for the next files to be probed; now and then they are saved."""
        for result, number in zip(results, self.next, strict=False):
            path, row = self.paths[number], self.rows[number]
            if isinstance(result, MediaError):
                self.bad[path] = str(result)
                continue
            row["text"] = self.texts.setdefault(text_of(result, self.numbers), len(self.texts))
            for name in self.numbers:
                row[name] = getattr(result, name)
            self.is_known[number], self.content = True, None
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self._save()

    def finish(self) -> SharedBytes:
        """The encoded table, saved if it has changed."""
        return self.content or SharedBytes.of(self._save())

    def _save(self) -> bytes:
        """Encode the files that are known, and write them to the cache."""
        paths = list(itertools.compress(self.paths, self.is_known))
        rows, texts = self.rows[self.is_known], list(self.texts)
        used, rows["text"] = np.unique(rows["text"], return_inverse=True)
        content = encode(rows, paths, [texts[number] for number in used])
        if self.can_save:
            self.can_save = _write(self.probe.cache, content)
        self.saved = time.monotonic()
        return content


def _places(paths: list[str], known: list[str]) -> np.ndarray:
    """Where each path is among the known ones, -1 for the others."""
    if paths == known:
        return np.arange(len(paths))
    place = {path: k for k, path in enumerate(known)}
    return np.fromiter((place.get(path, -1) for path in paths), int, len(paths))


def _identities(paths: list[str]) -> tuple[np.ndarray, dict[str, str]]:
    """Size and time of each file, and why some are bad: empty or missing."""
    found: list[tuple[int, float]] = []
    bad: dict[str, str] = {}
    for path in paths:
        try:
            found.append(_size_and_time(path))
        except MediaError as error:
            bad[path] = str(error)
            found.append((0, 0.0))
            continue
        if not found[-1][0]:
            bad[path] = f"{path}: is empty (0 bytes)"
    return np.array(found, [*IDENTITY.items()]), bad


def _write(cache: Path, content: bytes) -> bool:
    """Whether the cache could be written."""
    try:
        write_atomically(cache, lambda temporary: Path(temporary).write_bytes(content))
    except OSError as error:
        logger.warn(
            f"{cache}: cannot be written ({error.strerror}), so the files are probed again next"
            " time; set MM_DIFFUSION_CACHE to a folder with space"
        )
        return False
    return True


def identity(path: str) -> dict[str, float]:
    """Size and time, which change with the file; MediaError where it is missing."""
    size, mtime = _size_and_time(path)
    return {"size": size, "mtime": mtime}


def _size_and_time(path: str) -> tuple[int, float]:
    try:
        if is_remote(path):
            remote = blobfile.stat(path)
            return remote.size, remote.mtime
        stat = os.stat(path)  # blobfile takes ten times as long
        return stat.st_size, stat.st_mtime
    except NOT_FOUND as error:
        raise _missing(path, error) from error


def fingerprint(path: str) -> str:
    """sha256 of a file's size and first and last MiB; MediaError as above."""
    try:
        with blobfile.BlobFile(path, "rb") as file:
            first, size = file.read(FINGERPRINT_BYTES), file.seek(0, os.SEEK_END)
            file.seek(max(0, size - FINGERPRINT_BYTES))
            return hashlib.sha256(b"%d " % size + first + file.read()).hexdigest()
    except NOT_FOUND as error:
        raise _missing(path, error) from error


def _missing(path: str, error: Exception) -> MediaError:
    reason = getattr(error, "strerror", None) or error
    return MediaError(f"{path}: cannot be found ({reason})")
