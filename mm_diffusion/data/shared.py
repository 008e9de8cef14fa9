"""Bytes and numbers that the processes of a host share instead of copying them."""

from __future__ import annotations

import functools
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from multiprocessing import context, reduction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th

from .. import logger
from ..dist_util import barrier, broadcast, from_all, from_rank_0, group_rank

PIECE_BYTES = 2**24  # that are copied at a time
BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells hosts apart


class SharedBytes:
    """Bytes that processes started by this one share instead of copying them.

    They lie in a nameless temporary file: what happens to the file that they come from, on this
    or another host, does not reach those who read them.
    """

    def __init__(self, file: Any, buffer: Any) -> None:
        self.file, self.buffer = file, buffer

    @classmethod
    def of(cls, content: bytes) -> SharedBytes:
        """Copy the bytes into a file; where there is no space for it, keep them in memory."""
        return cls.fill(_new_file(len(content)), [content])

    @classmethod
    def read(cls, path: Path) -> SharedBytes:
        """The bytes of a file as it is now; none where it cannot be read."""
        try:
            with open(path, "rb") as source:
                size = os.fstat(source.fileno()).st_size
                pieces = iter(functools.partial(source.read, PIECE_BYTES), b"")
                return cls.fill(_new_file(size), pieces)
        except OSError:
            return cls(None, b"")

    @classmethod
    def fill(cls, file: Any, pieces: Iterable[Any]) -> SharedBytes:
        """The pieces, one after the other, in this file; in memory without one."""
        if file is None:
            return cls(None, b"".join(map(bytes, pieces)))
        file.writelines(pieces)
        file.flush()
        return cls.map(file)

    @classmethod
    def map(cls, file: Any) -> SharedBytes:
        return cls(file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def __reduce__(self) -> tuple:
        if self.file is None or context.get_spawning_popen() is None:
            return SharedBytes, (None, bytes(self.buffer))
        return _inherit, (reduction.DupFd(self.file.fileno()),)


def _inherit(descriptor: Any) -> SharedBytes:
    return SharedBytes.map(os.fdopen(descriptor.detach(), "rb"))


def _new_file(length: int) -> Any:
    """A nameless file with space for so many bytes; None for no bytes, or without the space."""
    if not length:
        return None
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as it is mapped)
        if hasattr(os, "posix_fallocate"):  # macOS has none, and fails at the first write instead
            os.posix_fallocate(file.fileno(), 0, length)
    except OSError as error:
        logger.warn(
            f"{tempfile.gettempdir()}: cannot hold the index ({error.strerror}), so each data"
            " worker keeps a copy; set TMPDIR to a folder with space"
        )
        return None
    return file


class SharedArray:
    """Numbers in `SharedBytes`."""

    def __init__(self, content: SharedBytes, dtype: str) -> None:
        self.content, self.values = content, np.frombuffer(content.buffer, dtype)

    @classmethod
    def of(cls, values: np.ndarray) -> SharedArray:
        return cls(SharedBytes.of(values.tobytes()), values.dtype.str)

    def __reduce__(self) -> tuple:
        return SharedArray, (self.content, self.values.dtype.str)


# ---------------------------------------------------------------- ranks


class Offer(NamedTuple):
    """A file that a rank has open, for the other ranks of its host."""

    host: str
    path: str
    device: int
    inode: int

    @classmethod
    def of(cls, file: Any) -> Offer:
        stat = os.fstat(file.fileno())
        return cls(_host(), f"/proc/{os.getpid()}/fd/{file.fileno()}", stat.st_dev, stat.st_ino)

    def accept(self) -> Any:
        """The file; None on another host, or where it must not be opened."""
        try:
            stat = os.stat(self.path)
            if (_host(), stat.st_dev, stat.st_ino) == (self.host, self.device, self.inode):
                return open(self.path, "rb")
        except OSError:
            pass
        return None


def _host() -> str:
    """Names this host, whatever containers run on it; "" where the system does not say."""
    return BOOT.read_text() if BOOT.exists() else ""


def share(content: SharedBytes | None) -> SharedBytes:
    """Rank 0's `content`, on every rank: ranks of a host that can open one file all map that."""
    rank, size = group_rank()
    if content and size == 1:
        return content
    length = from_rank_0(lambda: len(content.buffer) if content else 0)
    hosts = from_all(_host())
    own = content.file if content else None
    if 0 < rank == hosts.index(hosts[rank]):
        own = _new_file(length)
    offers = from_all(own and Offer.of(own))
    accepted = _first_accepted(offers[:rank])
    pieces = _pieces_of_rank_0(content, length)
    if accepted or content:
        for _ in pieces:  # which other ranks take
            pass
    filled = content or accepted or SharedBytes.fill(own or _new_file(length), pieces)
    barrier()  # until the accepted file is complete
    return filled if isinstance(filled, SharedBytes) else SharedBytes.map(filled)


def _pieces_of_rank_0(content: SharedBytes | None, length: int) -> Iterator[np.ndarray]:
    """The bytes of rank 0, in the same memory one after the other; a collective call for each."""
    memory = th.empty(min(length, PIECE_BYTES), dtype=th.uint8)
    for begin in range(0, length, PIECE_BYTES):
        piece = memory[: length - begin]
        if content:
            piece.numpy()[:] = np.frombuffer(content.buffer, "u1", len(piece), begin)
        broadcast([piece])
        yield piece.numpy()


def _first_accepted(offers: list[Offer | None]) -> Any:
    for offer in filter(None, offers):
        if file := offer.accept():
            return file
    return None
