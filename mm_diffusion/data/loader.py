"""Batches in an order that depends on the seed and the position only."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import itertools
import re
import shutil
import signal
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from .. import logger, rng
from ..config import FilesConfig
from ..dist_util import World, print_any_name
from ..tree import Tree, tree_map
from . import DataError, MediaError
from .workers import clean_context

if TYPE_CHECKING:
    from .index import ClipIndex  # which loads the decoder

BATCHES_AHEAD = 2  # that each worker prepares
MAX_ATTEMPTS = 10  # at an item: those after the first are at others in its place
Failures = dict[str, str]  # path -> why an item of that file cannot be decoded
NO_SHARED_MEMORY = re.compile(r"torch_\w+>|shared memory|shm|Bus error")


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


@functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    windows = np.arange(count, dtype=np.min_scalar_type(count))  # small: there may be millions
    return np.random.default_rng(rng.derive_seed(seed, "order", epoch)).permutation(windows)


class ReplacingDataset(Dataset):
    """(item, why others failed) of a dataset; where an item cannot be decoded, of another one.

    Which one takes its place depends on (seed, epoch, index) only. DataError after MAX_ATTEMPTS.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Failures]:
        epoch, index = key
        failures: Failures = {}
        for attempt in range(MAX_ATTEMPTS):
            place = self._replacement(epoch, index, attempt) if attempt else index
            try:
                return self.dataset[epoch, place], failures
            except MediaError as error:
                failures[self.dataset.source(place)[0]] = str(error)
        reasons = "; ".join(failures.values())
        raise DataError(f"{MAX_ATTEMPTS} items in a row cannot be decoded ({reasons})")

    def _replacement(self, epoch: int, index: int, attempt: int) -> int:
        number = rng.derive_seed(self.seed, "replacement", epoch, index, attempt)
        return number % len(self.dataset)


def _collate(pairs: list[tuple[Any, Failures]]) -> tuple[Any, Failures]:
    failures: Failures = {}
    for _, of_one in pairs:
        failures |= of_one
    return default_collate([item for item, _ in pairs]), failures


def endless_batches(
    dataset: Any, config: FilesConfig, world: World, start_sample: int
) -> Iterator[Any]:
    """This rank's batches of items (epoch, index) in `GlobalOrder`, collated, by workers if any.

    An item that cannot be decoded is replaced (`ReplacingDataset`), and its file reported once.
    DataError where more than `max_bad_share` of the files are bad, or a worker fails.
    """
    if dataset.disk and world.rank == 0:
        logger.log(dataset.disk.report(len(dataset), dataset.parts))
    # More workers than cores is the user's choice.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    batch_size, seed, workers = config.batch_size, config.seed, config.num_workers
    order = GlobalOrder(len(dataset), batch_size, seed, world.rank, world.size, start_sample)
    loader = DataLoader(
        ReplacingDataset(dataset, seed),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=th.cuda.is_available(),
        prefetch_factor=BATCHES_AHEAD if workers else None,
        worker_init_fn=functools.partial(_start_worker, world.rank),
        generator=rng.generator(seed, "loader"),  # the caller's random state stays as it is
        multiprocessing_context=clean_context() if workers else None,
    )
    bad_files = _BadFiles(dataset.index, config.max_bad_share, world.rank)
    batches = _batches(iter(loader), bad_files, workers)
    # Otherwise the loader waits 5 s for each worker at exit.
    atexit.register(_close, weakref.ref(batches))
    return batches


def _start_worker(rank: int, worker: int) -> None:
    th.set_num_threads(1)
    print_any_name()
    logger.configure(enabled=rank == worker == 0)  # a full disk is reported once


def _close(batches: weakref.ref) -> None:
    if (generator := batches()) is not None:
        generator.close()


@dataclasses.dataclass
class _BadFiles:
    """An index without the files that this rank finds to be bad while it loads them."""

    index: ClipIndex
    max_bad_share: float
    rank: int

    def add(self, failures: Failures) -> None:
        """Report files that are new; DataError where there are too many."""
        new = {path: reason for path, reason in failures.items() if path not in self.index.bad}
        if not new:
            return
        self.index = self.index.leave_out(new)
        for reason in new.values():
            self._warn(f"{reason}; another clip or image takes its place")
        self.index.refuse_if_bad(self.max_bad_share, "py_scripts/check_data.py --full True")

    def _warn(self, text: str) -> None:
        if self.rank == 0:
            logger.warn(text)
        else:  # rank 0 does not know
            tqdm.write(f"[rank {self.rank}] warning: {text}", file=sys.stderr)


def _batches(batches: Iterator[Any], bad_files: _BadFiles, workers: int) -> Iterator[Any]:
    try:
        for batch, failures in batches:
            bad_files.add(failures)
            yield batch
    except DataError as error:
        # A worker's error has its traceback as text, and its own message in the last line.
        reason = str(error).strip().splitlines()[-1].split("DataError: ", 1)[-1]
    except RuntimeError as error:
        reason = _worker_failure(str(error), getattr(batches, "_workers", []), workers)
        if not reason:
            raise
    del batches  # ends the workers; what is raised below no longer refers to them
    raise DataError(reason)


def _worker_failure(text: str, processes: list[Any], workers: int) -> str:
    """What has probably ended a worker, and what to try; "" where nothing points to that."""
    codes = {process.exitcode for process in processes} - {None, 0}
    flag = f"--num_workers {workers}"
    if -signal.SIGBUS in codes or NO_SHARED_MEMORY.search(text):
        size = shutil.disk_usage("/dev/shm").total / 2**20
        return (
            f"{flag}: the data workers ran out of shared memory (/dev/shm has {size:.0f} MB); start"
            " Docker with --shm-size 1g or --ipc=host, or set --num_workers 0"
        )
    if "exited unexpectedly" not in text:
        return ""
    if codes & {-signal.SIGSEGV, -signal.SIGABRT}:
        return (
            f"{flag}: a file has crashed a data worker;"
            " py_scripts/check_data.py --full True names it"
        )
    return (
        f"{flag}: a data worker was killed, probably for lack of memory; set fewer --num_workers,"
        " a smaller --batch_size, or give the job more memory"
    )


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
