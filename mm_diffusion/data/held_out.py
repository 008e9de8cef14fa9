"""A share of the files of a data set that is not trained on."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator

import numpy as np

from ..files import absolute
from .decode import ClipInfo
from .index import ClipIndex, folders_in

LEAST_FILES = 4  # that a share must be expected to hold: smaller data sets are all trained on

Index = ClipIndex[ClipInfo]


def split(index: Index, share: float) -> tuple[Index, Index]:
    """(training, held out): a file belongs to one or the other by the hash of its path.

    The path below its data folder, so that neither new files nor another place change it. Nothing
    is held out of fewer than LEAST_FILES / share files.
    """
    if share * len(index.clips) < LEAST_FILES:
        return index, ClipIndex([], {}, index.data_dir)
    folders = [absolute(folder) for folder in folders_in(index.data_dir)]
    is_held_out = _fractions(index.paths(), folders) < share
    training = ClipIndex(index.choose(~is_held_out), index.bad, index.data_dir)
    return training, ClipIndex(index.choose(is_held_out), {}, index.data_dir)


def _fractions(paths: list[str], folders: list[str]) -> np.ndarray:
    """[N] in [0, 1), by the hash of each path below the folder that holds it."""
    hashes = [hashlib.sha256(os.fsencode(path)).digest()[:8] for path in _below(paths, folders)]
    return (np.frombuffer(b"".join(hashes), ">u8") >> 12) / 2**52


def _below(paths: list[str], folders: list[str]) -> Iterator[str]:
    """What each path adds to the folder that holds it."""
    from_root = functools.cache(lambda folder: os.path.join(absolute(folder), ""))
    for path in paths:
        name = path.rfind("/") + 1
        full = from_root(path[:name]) + path[name:]
        yield min([full.removeprefix(folder) for folder in folders], key=len)
