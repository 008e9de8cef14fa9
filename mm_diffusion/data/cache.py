"""A disk cache of decoded clips and images."""

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
from .index import folders_in
from .probing import identity

Tensors = tuple[th.Tensor, ...]
Parts = Sequence[tuple[tuple[int, ...], str]]  # shape and type of each array of a decoded item
CACHE_FORMAT = 3  # raised whenever the same settings decode to something else
SPARE_BYTES = 2**31  # stay free: a full disk would stop checkpoints, too


class DiskCache:
    """Decoded items below a folder, a file each, shared by workers, ranks and runs.

    Nothing is deleted. Files are written atomically and used only if header and checksum are right.
    A full disk ends writing. ValueError for an unusable folder.
    """

    def __init__(self, folder: str, data_dir: str) -> None:
        if "://" in folder:
            raise ValueError(f"--cache_dir {folder}: must be a local folder")
        self.folder, self.writes = Path(folder).expanduser().absolute(), True
        if any(self.folder.is_relative_to(absolute(part)) for part in folders_in(data_dir)):
            raise ValueError(f"--cache_dir {folder}: lies in the data folder; choose another")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--cache_dir {folder}: cannot be made ({error.strerror})") from error

    def report(self, count: int, parts: Parts) -> str:
        """A line on the space that `count` such items need."""
        item = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in parts)
        free = shutil.disk_usage(self.folder).free
        needed = f"{count:,} x {item / 1e6:.2f} MB = {count * item / 1e9:.2f} GB"
        return f"{self.folder}: caches decoded data, up to {needed} ({free / 1e9:.2f} GB are free)"

    def get(
        self, path: str, item: dict[str, Any], parts: Parts, make: Callable[[], Tensors]
    ) -> Tensors:
        """`make()`, tensors of the shapes and types `parts`, from disk if they are there.

        item: all that they depend on beside the file at `path`; MediaError where that is missing.
        """
        file = {"path": absolute(path), **identity(path)}
        content = [CACHE_FORMAT, decode.DECODER, file, item, parts]
        key = json.dumps(content, sort_keys=True, default=str)
        name = hashlib.sha256(key.encode()).hexdigest()
        target = self.folder / name[:2] / f"{name[2:]}.raw"
        tensors = _read(target, key, parts)
        if tensors is None:
            tensors = make()
            if self.writes:
                self._write(target, key, [tensor.contiguous().numpy() for tensor in tensors])
        return tensors

    def _write(self, target: Path, key: str, arrays: list[np.ndarray]) -> None:
        def write(temporary: str) -> None:
            with open(temporary, "wb") as file:
                file.write(f"{_checksum(arrays)} {key}\n".encode())
                file.writelines(array.data for array in arrays)

        try:
            if shutil.disk_usage(self.folder).free < SPARE_BYTES:
                raise OSError(errno.ENOSPC, f"less than {SPARE_BYTES / 1e9:.1f} GB are free")
            write_atomically(target, write)
        except OSError as error:
            self.writes = False
            logger.warn(f"--cache_dir {self.folder}: not written any more ({error.strerror})")


def _read(target: Path, key: str, parts: Parts) -> Tensors | None:
    """The item of this key; None where the file is missing, foreign or corrupt."""
    try:
        with open(target, "rb") as file:
            checksum, header = file.readline().split(b" ", 1)
            flat = [np.fromfile(file, dtype, math.prod(shape)) for shape, dtype in parts]
        if header.decode() != key + "\n" or int(checksum) != _checksum(flat):
            return None
        arrays = zip(flat, parts, strict=True)
        return tuple(th.from_numpy(array.reshape(shape)) for array, (shape, _) in arrays)
    except (OSError, ValueError):
        return None


def _checksum(arrays: list[np.ndarray]) -> int:
    return functools.reduce(lambda value, array: zlib.crc32(array.data, value), arrays, 0)
