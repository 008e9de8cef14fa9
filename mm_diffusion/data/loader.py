"""Batches in an order that depends on the seed and the position only."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import itertools
import multiprocessing
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch as th
from torch.utils.data import DataLoader

from .. import logger, rng
from ..config import FilesConfig
from ..dist_util import World
from ..tree import Tree, tree_map
from . import MediaError

BATCHES_AHEAD = 2  # that each worker prepares


@dataclasses.dataclass(frozen=True)
class GlobalOrder:
    """Rank `rank`'s share of every global batch, without end, as lists of (epoch, window).

    All windows, in an order that depends on (seed, epoch), are one stream. Global batch n is its
    n-th piece of `batch_size * world_size` from `start_sample` on, of which rank r takes the r-th
    part: the number of ranks changes only who decodes what.
    """

    num_windows: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    start_sample: int = 0

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, window) at a position of the stream."""
        epoch, offset = divmod(position, self.num_windows)
        return epoch, int(_permutation(self.seed, epoch, self.num_windows)[offset])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start_sample + self.rank * self.batch_size
        for begin in itertools.count(first, self.batch_size * self.world_size):
            yield [self.at(position) for position in range(begin, begin + self.batch_size)]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng(rng.derive_seed(seed, "order", epoch)).permutation(count)


def endless_batches(
    dataset: Any, config: FilesConfig, world: World, start_sample: int
) -> Iterator[Any]:
    """This rank's batches of items (epoch, index) in `GlobalOrder`, collated, by workers if any."""
    if dataset.disk and world.rank == 0:
        logger.log(dataset.disk.report(len(dataset), dataset.parts))
    # More workers than cores is the user's choice.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    batch_size, seed, workers = config.batch_size, config.seed, config.num_workers
    order = GlobalOrder(len(dataset), batch_size, seed, world.rank, world.size, start_sample)
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        pin_memory=th.cuda.is_available(),
        prefetch_factor=BATCHES_AHEAD if workers else None,
        worker_init_fn=functools.partial(_start_worker, world.rank),
        generator=rng.generator(seed, "loader"),  # the caller's random state stays as it is
        multiprocessing_context=_worker_context() if workers else None,
    )
    batches = _batches(iter(loader))
    # Otherwise the loader waits 5 s for each worker at exit.
    atexit.register(_close, weakref.ref(batches))
    return batches


def _worker_context() -> Any:
    """Workers come from a clean process that imports once: forks with MPI or CUDA may hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.frames"])  # imports the decoder
    return context


def _start_worker(rank: int, worker: int) -> None:
    th.set_num_threads(1)
    logger.configure(enabled=rank == worker == 0)  # a full disk is reported once


def _close(batches: weakref.ref) -> None:
    if (generator := batches()) is not None:
        generator.close()


def _batches(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except MediaError as error:
        # A worker's error has its traceback as text, and its own message in the last line.
        reason = str(error).strip().splitlines()[-1].split("MediaError: ", 1)[-1]
    del batches  # ends the workers; what is raised below no longer refers to them
    raise MediaError(reason)


def prefetch_to_device(
    batches: Iterable[tuple[Tree, ...]], device: th.device
) -> Iterator[tuple[Tree, ...]]:
    """The same batches of trees on `device`; CUDA copies each while the one before is in use."""
    if device.type != "cuda":
        yield from batches
        return
    side = th.cuda.Stream(device)

    def upload(batch: tuple[Tree, ...]) -> tuple[tuple[Tree, ...], th.cuda.Event]:
        with th.cuda.stream(side):
            parts = [tree_map(lambda x: x.to(device, non_blocking=True), part) for part in batch]
            return tuple(parts), side.record_event()

    for batch, arrived in _one_ahead(map(upload, batches)):
        user = th.cuda.current_stream(device)
        user.wait_event(arrived)
        for part in batch:  # the side stream gets the memory back only when `user` is done with it
            tree_map(lambda x, user=user: x.record_stream(user), part)
        yield batch


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, each made before the previous one is passed on; errors keep their place."""
    previous: list[Any] = []
    try:
        for item in items:
            yield from previous
            previous = [item]
    except Exception:
        yield from previous
        raise
    yield from previous
