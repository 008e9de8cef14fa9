"""Clips for training: windows of files as tensors, in an order that depends on the seed and the position only."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch as th
from torch.utils.data import Dataset, default_collate

from .. import logger, rng
from ..dist_util import World
from ..script_util import DataConfig, numbers, pick
from . import decode, images
from .cache import DiskCache, Parts
from .decode import ClipInfo
from .index import ClipIndex, build_index
from .loader import endless_batches

Sample = dict[str, th.Tensor]
CACHE_BYTES = 2**28
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
        sample = {"video": images.to_float(frames.permute(0, 3, 1, 2)), "audio": audio.clone()}
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

        def make() -> tuple[th.Tensor, th.Tensor]:
            sizes = (self.height, self.width, self.audio_fps, self.num_samples)
            return decode.read_window(
                path, start, self.num_frames, self.video_fps, *sizes, *streams
            )

        decoded = self.disk.get(path, rates, self.parts, make) if self.disk else make()
        size = sum(part.nbytes for part in decoded)
        if (len(self.cache) + 1) * size <= self.cache_bytes:
            self.cache[window] = decoded
        return decoded


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
