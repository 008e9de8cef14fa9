"""Clips for training: windows of files as tensors, in an order that depends on the seed and the position only."""

from __future__ import annotations

import atexit
import bisect
import functools
import itertools
import multiprocessing
import weakref
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch as th
from torch.utils.data import DataLoader, Dataset, Sampler

from . import logger, media, rng
from .clip_index import ClipIndex, build_index
from .media import ClipInfo, MediaError

Sample = dict[str, th.Tensor]
CACHE_BYTES = 2**28
ROUNDING_FRAMES = 0.05  # a film that ends so much before its last frame would, has that frame


def parse_size(text: str | Sequence[int], flag: str, axes: str) -> tuple[int, ...]:
    """ "20,3,64,64" -> (20, 3, 64, 64). ValueError naming the flag unless it is positive numbers, one for each axis."""
    try:
        size = tuple(int(part) for part in (text.split(",") if isinstance(text, str) else text))
    except ValueError:
        size = ()
    if len(size) != len(axes.split(",")) or min(size) < 1:
        raise ValueError(f"{flag} {text!r}: need {axes} as positive whole numbers")
    return size


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
    """ValueError that names the first flag below or at 0."""
    for flag, value in flags.items():
        if value <= 0:
            raise ValueError(f"--{flag} {value}: must be positive")


class ClipDataset(Dataset):
    """All windows of all clips of an index.

    Item `(epoch, window)`, or just `window` for epoch 0, is {"video": [F, 3, H, W], "audio": [2, L]}, float32 in
    [-1, 1]. A file that cannot be decoded raises MediaError; nothing is put in its place. Decoded windows are kept in
    memory until `cache_bytes` are full. ValueError for impossible sizes and rates.
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
    ) -> None:
        self.num_frames, video_channels, self.height, self.width = parse_size(video_size, "--video_size", "F,C,H,W")
        audio_channels, self.num_samples = parse_size(audio_size, "--audio_size", "C,L")
        if video_channels != 3 or audio_channels != 2:
            raise ValueError(
                f"clips are RGB and stereo: --video_size {video_size} needs C 3, --audio_size {audio_size} 2"
            )
        require_positive(video_fps=video_fps, audio_fps=audio_fps, clip_stride=clip_stride)
        self.clips, self.video_fps, self.audio_fps = index.clips, video_fps, audio_fps
        self.random_flip, self.clip_stride, self.seed = random_flip, clip_stride, seed
        counts = [count_windows(info, self.num_frames, video_fps, clip_stride) for _, info in self.clips]
        self.first_after = list(itertools.accumulate(counts))  # window numbers up to this belong to clip i or earlier
        self.cache_bytes = cache_bytes
        self.cache: dict[int, tuple[th.Tensor, th.Tensor]] = {}

    def __len__(self) -> int:
        return self.first_after[-1]

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, window = key if isinstance(key, tuple) else (0, key)
        frames, audio = self._decoded(window)
        sample = {"video": media.to_float(frames.permute(0, 3, 1, 2)), "audio": audio.clone()}
        return mirror(sample) if self.random_flip and is_mirrored(self.seed, epoch, window) else sample

    def place(self, window: int) -> tuple[str, ClipInfo, Fraction]:
        """Window -> (path, info, start in seconds)."""
        clip, number = locate(window, self.first_after)
        return *self.clips[clip], number * self.clip_stride / Fraction(self.video_fps)

    def _decoded(self, window: int) -> tuple[th.Tensor, th.Tensor]:
        """([F, H, W, 3] uint8, [2, L] float32), from memory where it has room."""
        if window in self.cache:
            return self.cache[window]
        path, info, start = self.place(window)
        decoded = media.read_window(
            path,
            start,
            self.num_frames,
            self.video_fps,
            self.height,
            self.width,
            self.audio_fps,
            self.num_samples,
            info.video_stream,
            info.audio_stream,
        )
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
        self, num_windows: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start_sample: int = 0
    ) -> None:
        self.num_windows, self.batch_size, self.seed = num_windows, batch_size, seed
        self.stride = batch_size * world_size
        self.first = start_sample + rank * batch_size
        self.permutation = functools.lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(rng.derive_seed(self.seed, "order", epoch)).permutation(self.num_windows)

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, window) at a position of the stream."""
        epoch, offset = divmod(position, self.num_windows)
        return epoch, int(self.permutation(epoch)[offset])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in itertools.count(self.first, self.stride):
            yield [self.at(position) for position in range(first, first + self.batch_size)]


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
) -> Iterator[tuple[Sample, dict]]:
    """-> endless ({"video": [B, F, 3, H, W], "audio": [B, 2, L]}, {}), float32 in [-1, 1], from the stream's position
    `start_sample` on: how many samples all ranks have taken before.

    Must be called on every rank. `cache_bytes` is what decoded windows may take in memory on this rank. DataError (a
    bad folder), ValueError (an impossible size) at once, MediaError when a file turns out to be undecodable.
    """
    require_positive(batch_size=batch_size)
    empty: ClipIndex[ClipInfo] = ClipIndex([], {})
    options = (video_size, audio_size, video_fps, audio_fps, random_flip, clip_stride, seed)
    ClipDataset(empty, *options)  # a wrong size is cheaper to tell than to probe all files first
    streams = {"video_stream": video_stream, "audio_stream": audio_stream}
    index = build_index(data_dir, max_bad_share, num_workers=max(1, num_workers), rank=rank, **streams)
    if rank == 0:
        logger.log(f"{data_dir}: {index.report()}")
    dataset = ClipDataset(index, *options, cache_bytes=cache_bytes // max(1, num_workers))
    batches = endless_batches(dataset, batch_size, num_workers, seed, rank, world_size, start_sample)
    return ((batch, {}) for batch in batches)


def endless_batches(
    dataset: Dataset, batch_size: int, num_workers: int, seed: int, rank: int, world_size: int, start_sample: int
) -> Iterator[Any]:
    """This rank's batches of items (epoch, index) in `GlobalOrder`, collated, made by worker processes if any."""
    loader = DataLoader(
        dataset,
        batch_sampler=GlobalOrder(len(dataset), batch_size, seed, rank, world_size, start_sample),  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=th.cuda.is_available(),
        worker_init_fn=_start_worker,
        multiprocessing_context=_worker_context() if num_workers else None,
    )
    batches = _batches(iter(loader))
    atexit.register(_close, weakref.ref(batches))  # else the loader waits 5 s for each worker at exit
    return batches


def _worker_context():
    """Workers come from a clean process that imports once: forks of one with MPI, CUDA or threads may hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start_worker(_: int) -> None:
    th.set_num_threads(1)


def _close(batches: weakref.ref) -> None:
    if (generator := batches()) is not None:
        generator.close()


def _batches(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except MediaError as error:  # a worker's comes with its traceback as text, and its own line last
        reason = str(error).strip().splitlines()[-1].split("MediaError: ", 1)[-1]
    del batches  # ends the workers; what is raised below no longer refers to them
    raise MediaError(reason)
