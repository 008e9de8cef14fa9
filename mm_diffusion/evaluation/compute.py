"""Measures of all clips of a folder: shared by the ranks, and cached for reference clips."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from tqdm import tqdm

from .. import logger
from ..data.index import cache_folder
from ..dist_util import World, all_sum, from_rank_0
from ..files import write_atomically
from .clips import ClipFolder, Rows
from .measures import Measure

FORMAT = 3  # of cached rows; raised whenever what is measured of a clip, or how it is read, changes


def compute_all(
    folder: ClipFolder, measures: Mapping[str, Measure], world: World
) -> dict[str, Rows]:
    """Measure -> its rows [N, ...] of all clips, on every rank; the ranks share the work.

    A rank has zeros for the clips of others, and rows are summed over ranks: they do not depend
    on the number of ranks.
    """
    if not measures:
        return {}
    mine = range(world.rank, len(folder), world.size)

    def compute(number: int) -> dict[str, Rows]:
        clip = folder.clip(number)
        return {name: measure.compute(clip) for name, measure in measures.items()}

    title, is_quiet = Path(folder.folder).name, world.rank > 0
    with ThreadPoolExecutor(max(1, folder.config.num_workers)) as pool:
        found = pool.map(compute, mine)
        computed = list(tqdm(found, title, len(mine), False, disable=is_quiet, unit="clip"))
    results: dict[str, Rows] = {name: {} for name in measures}
    for name, rows in from_rank_0(lambda: computed[0]).items():
        for row, example in rows.items():
            values = th.zeros(len(folder), *example.shape)
            for number, clip in zip(mine, computed, strict=True):
                values[number] = clip[name][row]
            results[name][row] = all_sum(values)
    return results


def compute_reference(
    folder: ClipFolder, measures: Mapping[str, Measure], world: World
) -> dict[str, Rows]:
    """`compute_all`, but rows of the same content are taken from the cache."""
    content = from_rank_0(folder.content)
    wanted = {name: measure for name, measure in measures.items() if measure.of_reference}
    paths = {name: _cache_path(name, measure, content) for name, measure in wanted.items()}
    cached = from_rank_0(lambda: {name: _read(path) for name, path in paths.items()})
    missing = {name: measure for name, measure in wanted.items() if not cached[name]}
    fresh = compute_all(folder, missing, world)
    if world.rank == 0:
        for name, rows in fresh.items():
            _write(paths[name], rows)
    return cached | fresh


def _cache_path(name: str, measure: Measure, content: str) -> Path:
    key = hashlib.sha256(f"{FORMAT} {name} {measure.key} {content}".encode()).hexdigest()[:24]
    return cache_folder() / f"metrics_{key}.npz"


def _read(path: Path) -> Rows:
    """The rows in a file; empty if it does not exist or cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: th.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}


def _write(path: Path, rows: Rows) -> None:
    arrays: dict[str, Any] = {name: values.numpy() for name, values in rows.items()}
    try:
        write_atomically(path, lambda temporary: np.savez(temporary, **arrays))
    except OSError as error:
        folder, reason = path.parent, error.strerror
        logger.warn(f"{folder}: not writable ({reason}); reference measurements are not cached")
