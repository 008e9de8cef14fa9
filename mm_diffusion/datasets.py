"""Clips for training: windows of files as tensors, in an order that depends on the seed and the position only."""

from __future__ import annotations

import atexit
import bisect
import errno
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import shutil
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from . import logger, media, rng
from .clip_index import ClipIndex, absolute, build_index, folders_in, identity
from .dist_util import World
from .media import ClipInfo, MediaError
from .script_util import DataConfig, numbers, pick
from .tree import Tree, tree_map

Sample = dict[str, th.Tensor]
Parts = Sequence[tuple[tuple[int, ...], str]]  # shape and type of each array of a decoded item
CACHE_BYTES = 2**28
CACHE_FORMAT = (
    1  # of the files in a cache folder; raised whenever the same settings decode to something else
)
SPARED_BYTES = 2**31  # of a disk are left to others: a full one would stop checkpoints, too
BATCHES_AHEAD = 2  # that each worker makes before they are asked for
ROUNDING_FRAMES = 0.05  # a film that ends so much before its last frame would, has that frame


def mirror(sample: Sample) -> Sample:
    """The clip seen in a mirror: picture and stereo channels change sides together. Twice is the identity."""
    return {"video": sample["video"].flip(-1), "audio": sample["audio"].flip(-2)}


def is_mirrored(seed: int, epoch: int, index: int) -> bool:
    """Whether window `index` is shown mirrored in this epoch: a fair coin for each."""
    return rng.derive_seed(seed, "mirror", epoch, index) % 2 == 1


def count_frames(seconds: float, fps: float) -> int:
    """How many frames at `fps` a film of this length has, at least 1; containers round their times."""
    return max(1, int(seconds * fps + ROUNDING_FRAMES))


def count_windows(info: ClipInfo, num_frames: int, fps: float, clip_stride: int) -> int:
    """How many windows of `num_frames` begin every `clip_stride` frames; 1 in a file just long enough, or short."""
    return max(0, count_frames(info.duration_seconds, fps) - num_frames) // clip_stride + 1


def locate(item: int, first_after: Sequence[int]) -> tuple[int, int]:
    """Item of all -> (file, item of that file), where file f ends before item `first_after[f]`."""
    file = bisect.bisect_right(first_after, item)
    return file, item - (first_after[file - 1] if file else 0)


def require_positive(**flags: float) -> None:
    """ValueError that names the first flag that is not above 0 and finite."""
    for flag, value in flags.items():
        if not 0 < value < math.inf:
            raise ValueError(f"--{flag} {value}: must be positive and finite")


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
        decode: Callable[[], tuple[th.Tensor, ...]],
    ) -> tuple[th.Tensor, ...]:
        """What `decode()` makes of the file: tensors of the shapes and types `parts`, from disk if there.

        item: all that it depends on beside the file. MediaError where the file is gone, or as `decode` raises it.
        """
        file = {"path": absolute(path), **identity(path)}
        key = json.dumps(
            [CACHE_FORMAT, media.DECODER, file, item, parts], sort_keys=True, default=str
        )
        name = hashlib.sha256(key.encode()).hexdigest()
        place = self.folder / name[:2] / f"{name[2:]}.raw"
        held = self._read(place, key, parts)
        if held is None:
            held = decode()
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
            media.atomically(place, write)
        except OSError as error:
            self.writes = False
            logger.warn(
                f"--cache_dir {self.folder}: takes no more ({error.strerror}); the rest is decoded every time"
            )


def _checksum(arrays: list[np.ndarray]) -> int:
    return functools.reduce(lambda value, array: zlib.crc32(array.data, value), arrays, 0)


class ClipDataset(Dataset):
    """All windows of all clips of an index.

    Item `(epoch, window)`, or just `window` for epoch 0, is {"video": [F, 3, H, W], "audio": [2, L]}, float32 in
    [-1, 1]. A file that cannot be decoded raises MediaError; nothing is put in its place. Decoded windows are kept in
    memory until `cache_bytes` are full, and in `disk`. ValueError for impossible sizes and rates.
    """

    def __init__(
        self,
        index: ClipIndex,
        video_size: str | Sequence[int],
        audio_size: str | Sequence[int],
        video_fps: float = 4,
        audio_fps: int = 16000,
        random_flip: bool = True,
        clip_stride: int = 1,
        seed: int = 42,
        cache_bytes: int = CACHE_BYTES,
        disk: DiskCache | None = None,
    ) -> None:
        self.num_frames, video_channels, self.height, self.width = numbers(
            "video_size", video_size, 4
        )
        audio_channels, self.num_samples = numbers("audio_size", audio_size, 2)
        if video_channels != 3 or audio_channels != 2:
            raise ValueError(
                f"clips are RGB and stereo: --video_size {video_size} needs C 3, --audio_size {audio_size} 2"
            )
        require_positive(video_fps=video_fps, audio_fps=audio_fps, clip_stride=clip_stride)
        self.clips, self.video_fps, self.audio_fps = index.clips, video_fps, audio_fps
        self.random_flip, self.clip_stride, self.seed = random_flip, clip_stride, seed
        counts = [
            count_windows(info, self.num_frames, video_fps, clip_stride) for _, info in self.clips
        ]
        self.first_after = list(
            itertools.accumulate(counts)
        )  # window numbers up to this belong to clip i or earlier
        self.parts: Parts = [
            ((self.num_frames, self.height, self.width, 3), "uint8"),
            ((audio_channels, self.num_samples), "float32"),
        ]
        self.cache_bytes, self.disk = cache_bytes, disk
        self.cache: dict[int, tuple[th.Tensor, ...]] = {}

    def __len__(self) -> int:
        return self.first_after[-1]

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, window = key if isinstance(key, tuple) else (0, key)
        frames, audio = self._decoded(window)
        sample = {"video": media.to_float(frames.permute(0, 3, 1, 2)), "audio": audio.clone()}
        return (
            mirror(sample) if self.random_flip and is_mirrored(self.seed, epoch, window) else sample
        )

    def place(self, window: int) -> tuple[str, ClipInfo, Fraction]:
        """Window -> (path, info, start in seconds)."""
        clip, number = locate(window, self.first_after)
        return *self.clips[clip], number * self.clip_stride / Fraction(self.video_fps)

    def _decoded(self, window: int) -> tuple[th.Tensor, ...]:
        """([F, H, W, 3] uint8, [2, L] float32), from memory where it has room."""
        if window in self.cache:
            return self.cache[window]
        path, info, start = self.place(window)
        streams = (info.video_stream, info.audio_stream)
        rates = {
            "start": start,
            "video_fps": float(self.video_fps),
            "audio_fps": self.audio_fps,
            "streams": streams,
        }

        def decode() -> tuple[th.Tensor, th.Tensor]:
            sizes = (self.height, self.width, self.audio_fps, self.num_samples)
            return media.read_window(path, start, self.num_frames, self.video_fps, *sizes, *streams)

        decoded = self.disk.get(path, rates, self.parts, decode) if self.disk else decode()
        size = sum(part.nbytes for part in decoded)
        if (len(self.cache) + 1) * size <= self.cache_bytes:
            self.cache[window] = decoded
        return decoded


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


def read_clips(
    folder: str,
    video_size: str | Sequence[int],
    audio_size: str | Sequence[int],
    video_fps: float,
    audio_fps: int,
    most: int | None = None,
) -> Sample:
    """The first clips of a folder, or all: {"video" [N, F, 3, H, W], "audio" [N, 2, L]}.

    Must be called on every rank. Errors: see `load_data`.
    """
    clips = ClipDataset(
        build_index(folder), video_size, audio_size, video_fps, audio_fps, random_flip=False
    )
    return default_collate([clips[k] for k in range(len(clips))[:most]])


def joint_data(
    flags: Mapping[str, Any], world: World
) -> Callable[[int], Iterator[tuple[Sample, dict]]]:
    """The flags of a training script -> `load_data` as a function of `start_sample`, for this rank."""
    shared = {name: flags[name] for name in ("batch_size", "video_size", "audio_size", "seed")}
    own = vars(pick(DataConfig, flags)) | shared | {"rank": world.rank, "world_size": world.size}
    return lambda start_sample: load_data(**own, start_sample=start_sample)


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    video_size: str | Sequence[int],
    audio_size: str | Sequence[int],
    video_fps: float = 4,
    audio_fps: int = 16000,
    random_flip: bool = True,
    clip_stride: int = 1,
    num_workers: int = 4,
    seed: int = 42,
    rank: int = 0,
    world_size: int = 1,
    start_sample: int = 0,
    max_bad_share: float = 0.1,
    video_stream: int | None = None,
    audio_stream: int | None = None,
    cache_bytes: int = CACHE_BYTES,
    cache_dir: str = "",
) -> Iterator[tuple[Sample, dict]]:
    """-> endless ({"video": [B, F, 3, H, W], "audio": [B, 2, L]}, {}), float32 in [-1, 1], from the stream's position
    `start_sample` on: how many samples all ranks have taken before.

    Must be called on every rank. `cache_bytes` is what decoded windows may take in memory on this rank, `cache_dir`
    where they are kept on disk. DataError (a bad folder), ValueError (an impossible size) at once, MediaError when a
    file turns out to be undecodable.
    """
    require_positive(batch_size=batch_size)
    disk = DiskCache(cache_dir, data_dir) if cache_dir else None
    empty: ClipIndex[ClipInfo] = ClipIndex([], {})
    options = (video_size, audio_size, video_fps, audio_fps, random_flip, clip_stride, seed)
    ClipDataset(empty, *options)  # a wrong size is cheaper to tell than to probe all files first
    streams = {"video_stream": video_stream, "audio_stream": audio_stream}
    index = build_index(data_dir, max_bad_share, num_workers=num_workers, **streams)
    dataset = ClipDataset(
        index, *options, cache_bytes=cache_bytes // max(1, num_workers), disk=disk
    )
    if rank == 0:
        logger.log(f"{data_dir}: {index.report()}")
        if disk:
            logger.log(disk.report(len(dataset), dataset.parts))
    batches = endless_batches(
        dataset, batch_size, num_workers, seed, rank, world_size, start_sample
    )
    return ((batch, {}) for batch in batches)


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
