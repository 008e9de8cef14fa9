"""What was decoded once, kept on disk."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from .. import logger
from ..files import absolute, write_atomically
from . import decode
from .index import folders_in, identity

Parts = Sequence[tuple[tuple[int, ...], str]]  # shape and type of each array of a decoded item
CACHE_FORMAT = (
    1  # of the files in a cache folder; raised whenever the same settings decode to something else
)
SPARED_BYTES = 2**31  # of a disk are left to others: a full one would stop checkpoints, too


class DiskCache:
    """What was decoded once, below a folder: a file for each item, shared by workers, ranks and runs.

    Nothing is ever deleted: it grows to one file for every item of a data set, for each way to decode it. A file is
    there whole or not at all, and is taken only if its header and checksum are right. On a full disk nothing more is
    written. ValueError for a folder that cannot be one.
    """

    def __init__(self, folder: str, data_dir: str) -> None:
        if "://" in folder:
            raise ValueError(f"--cache_dir {folder}: must be a local folder")
        self.folder, self.writes = Path(folder).expanduser().absolute(), True
        if any(self.folder.is_relative_to(absolute(part)) for part in folders_in(data_dir)):
            raise ValueError(
                f"--cache_dir {folder}: lies in the data folder; choose one outside it"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--cache_dir {folder}: cannot be made ({error.strerror})") from error

    def report(self, count: int, parts: Parts) -> str:
        """What `count` such items will take, in words."""
        item = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in parts)
        free = shutil.disk_usage(self.folder).free
        return (
            f"{self.folder}: keeps what is decoded, up to {count:,} x {item / 1e6:.2f} MB = {count * item / 1e9:.2f} GB"
            f" ({free / 1e9:.2f} GB are free)"
        )

    def get(
        self,
        path: str,
        item: dict[str, Any],
        parts: Parts,
        make: Callable[[], tuple[th.Tensor, ...]],
    ) -> tuple[th.Tensor, ...]:
        """What `make()` makes of the file: tensors of the shapes and types `parts`, from disk if there.

        item: all that it depends on beside the file. MediaError where the file is gone, or as `make` raises it.
        """
        file = {"path": absolute(path), **identity(path)}
        key = json.dumps(
            [CACHE_FORMAT, decode.DECODER, file, item, parts], sort_keys=True, default=str
        )
        name = hashlib.sha256(key.encode()).hexdigest()
        place = self.folder / name[:2] / f"{name[2:]}.raw"
        held = self._read(place, key, parts)
        if held is None:
            held = make()
            self._write(place, key, [part.contiguous().numpy() for part in held])
        return held

    def _read(self, place: Path, key: str, parts: Parts) -> tuple[th.Tensor, ...] | None:
        """The item of this key; None where there is no file, or one that is not as `_write` left it."""
        try:
            with open(place, "rb") as file:
                checksum, told = file.readline().split(b" ", 1)
                flat = [np.fromfile(file, dtype, math.prod(shape)) for shape, dtype in parts]
            if told.decode() != key + "\n" or int(checksum) != _checksum(flat):
                return None
            return tuple(
                th.from_numpy(array.reshape(shape))
                for array, (shape, _) in zip(flat, parts, strict=True)
            )
        except (OSError, ValueError):
            return None

    def _write(self, place: Path, key: str, arrays: list[np.ndarray]) -> None:
        def write(temporary: str) -> None:
            with open(temporary, "wb") as file:
                file.write(f"{_checksum(arrays)} {key}\n".encode())
                for array in arrays:
                    file.write(array.data)

        if not self.writes:
            return
        try:
            if shutil.disk_usage(self.folder).free < SPARED_BYTES:
                raise OSError(errno.ENOSPC, f"less than {SPARED_BYTES / 1e9:.1f} GB are free")
            write_atomically(place, write)
        except OSError as error:
            self.writes = False
            logger.warn(
                f"--cache_dir {self.folder}: takes no more ({error.strerror}); the rest is decoded every time"
            )


def _checksum(arrays: list[np.ndarray]) -> int:
    return functools.reduce(lambda value, array: zlib.crc32(array.data, value), arrays, 0)
