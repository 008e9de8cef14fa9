"""A share of the files of a data set that is not trained on."""

from __future__ import annotations

import hashlib
import os

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
    is_held_out = np.array([_fraction(path, folders) < share for path, _ in index.clips])
    training = ClipIndex(index.choose(~is_held_out), index.bad, index.data_dir)
    return training, ClipIndex(index.choose(is_held_out), {}, index.data_dir)


def _fraction(path: str, folders: list[str]) -> float:
    """In [0, 1), by the hash of the path below the folder that holds it."""
    full = absolute(path)
    below = min((full.removeprefix(folder) for folder in folders), key=len)
    return int(hashlib.sha256(os.fsencode(below)).hexdigest()[:13], 16) / 16**13
