"""Batches in an order that depends on the seed and the position only."""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch as th
from torch.utils.data import DataLoader, Dataset, Sampler

from .. import logger, rng
from ..tree import Tree, tree_map
from . import MediaError

BATCHES_AHEAD = 2  # that each worker makes before they are asked for


class GlobalOrder(Sampler):
    """Rank `rank`'s share of every global batch, without end, as lists of (epoch, window).

    All windows of an epoch in an order drawn from (seed, epoch), epoch after epoch, are one stream. Global batch n is
    its n-th piece of `batch_size * world_size` from position `start_sample` on, and rank r takes the r-th part of that.
    So how many ranks there are changes nothing but who decodes what, and what all of them took is told by one number.
    """

    def __init__(
        self,
        num_windows: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_sample: int = 0,
    ) -> None:
        self.num_windows, self.batch_size, self.seed = num_windows, batch_size, seed
        self.stride = batch_size * world_size
        self.first = start_sample + rank * batch_size
        self.permutation = functools.lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(rng.derive_seed(self.seed, "order", epoch)).permutation(
            self.num_windows
        )

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, window) at a position of the stream."""
        epoch, offset = divmod(position, self.num_windows)
        return epoch, int(self.permutation(epoch)[offset])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in itertools.count(self.first, self.stride):
            yield [self.at(position) for position in range(first, first + self.batch_size)]


def endless_batches(
    dataset: Dataset,
    batch_size: int,
    num_workers: int,
    seed: int,
    rank: int,
    world_size: int,
    start_sample: int,
) -> Iterator[Any]:
    """This rank's batches of items (epoch, index) in `GlobalOrder`, collated, made by worker processes if any."""
    warnings.filterwarnings(
        "ignore", "This DataLoader will create"
    )  # more workers than cores is the user's choice
    loader = DataLoader(
        dataset,
        batch_sampler=GlobalOrder(len(dataset), batch_size, seed, rank, world_size, start_sample),  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=th.cuda.is_available(),
        prefetch_factor=BATCHES_AHEAD if num_workers else None,
        worker_init_fn=functools.partial(_start_worker, rank),
        generator=rng.generator(
            seed, "loader"
        ),  # so that the caller's random state is none of its business
        multiprocessing_context=_worker_context() if num_workers else None,
    )
    batches = _batches(iter(loader))
    atexit.register(
        _close, weakref.ref(batches)
    )  # else the loader waits 5 s for each worker at exit
    return batches


def _worker_context():
    """Workers come from a clean process that imports once: forks of one with MPI, CUDA or threads may hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start_worker(rank: int, worker: int) -> None:
    th.set_num_threads(1)
    logger.configure(enabled=rank == worker == 0)  # a full disk is told once


def _close(batches: weakref.ref) -> None:
    if (generator := batches()) is not None:
        generator.close()


def _batches(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except (
        MediaError
    ) as error:  # a worker's comes with its traceback as text, and its own line last
        reason = str(error).strip().splitlines()[-1].split("MediaError: ", 1)[-1]
    del batches  # ends the workers; what is raised below no longer refers to them
    raise MediaError(reason)


def prefetch_to_device(
    batches: Iterable[tuple[Tree, ...]], device: th.device
) -> Iterator[tuple[Tree, ...]]:
    """The same batches, of trees of tensors, on `device`; with CUDA each is copied while the one before is in use."""
    if device.type != "cuda":
        yield from batches
        return
    side = th.cuda.Stream(device)

    def upload(batch: tuple[Tree, ...]) -> tuple[tuple[Tree, ...], th.cuda.Event]:
        with th.cuda.stream(side):
            copy = tuple(
                tree_map(lambda x: x.to(device, non_blocking=True), part) for part in batch
            )
            return copy, side.record_event()

    for batch, arrived in _one_ahead(map(upload, batches)):
        user = th.cuda.current_stream(device)
        user.wait_event(arrived)
        for part in batch:
            tree_map(
                lambda x, user=user: x.record_stream(user), part
            )  # its memory is not the side stream's before
        yield batch


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, each made before the one ahead of it is given out; an error comes in its own place."""
    items, ready = iter(items), []
    while True:
        try:
            ready.append(next(items))
        except StopIteration:
            yield from ready
            return
        except Exception:
            yield from ready
            raise
        if len(ready) > 1:
            yield ready.pop(0)
