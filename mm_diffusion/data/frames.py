"""Pictures to train an upsampler with, in pairs of large and degraded small: image files, or frames of films."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch as th
from torch.utils.data import Dataset

from .. import logger, rng
from ..dist_util import from_rank_0
from ..unet import check_factor
from . import decode, images
from .cache import DiskCache, Parts
from .clips import count_frames, is_mirrored, locate, require_positive
from .index import (
    VIDEO_EXTENSIONS,
    ClipIndex,
    cache_path,
    find_files,
    folders_in,
    look_up,
    refuse_if_bad,
)
from .loader import endless_batches

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")
NOISE_SHARE, MAX_NOISE_SIGMA = 0.5, 20.0  # of the small pictures; on the scale 0..255
JPEG_SHARE, JPEG_QUALITIES = 0.5, (20, 80)

Pair = tuple[th.Tensor, dict[str, th.Tensor]]


def find_frames(
    data_dir: str, num_workers: int = 4, max_bad_share: float = 0.1
) -> ClipIndex[float | None]:
    """`find_images`, told in the log; DataError where none, or too few, can be used: more than that share is bad."""
    index = find_images(data_dir, num_workers)
    logger.log(f"{data_dir}: {index.report(_count(index))}")
    refuse_if_bad(data_dir, index, max_bad_share, told_by="the log above")
    return index


def find_images(data_dir: str, num_workers: int = 4) -> ClipIndex[float | None]:
    """The images and films below `data_dir` (one folder or a comma list): a film's length in seconds, None for images.

    Rank 0 looks and tells the others: must be called on every rank. DataError where a folder is missing or holds
    neither.
    """
    remedy = "check --data_dir, or extract frames of videos with py_scripts/extract_video.py"
    kinds = IMAGE_EXTENSIONS + VIDEO_EXTENSIONS

    def find() -> ClipIndex[float | None]:
        paths = find_files(folders_in(data_dir), kinds, "images or videos", remedy)
        found = look_up(paths, _seconds, cache_path(data_dir, kind="frames"), num_workers)
        return dataclasses.replace(found, data_dir=data_dir)

    return from_rank_0(find)


def _seconds(path: str) -> float | None:
    if not path.lower().endswith(IMAGE_EXTENSIONS):
        return decode.video_duration(path)
    images.check_image(path)
    return None


def _count(index: ClipIndex[float | None]) -> str:
    """What there is, in words."""
    lengths = [seconds for _, seconds in index.clips if seconds is not None]
    return (
        f"{len(index.clips) - len(lengths)} images and {len(lengths)} videos ({sum(lengths):.1f} s)"
    )


def degrade(large: th.Tensor, small_size: int, generator: np.random.Generator) -> th.Tensor:
    """[3, H, W] uint8 -> [3, s, s] uint8: bicubic; half of them with Gaussian noise; then half of them through JPEG."""
    small = images.fit_image(large, small_size, small_size)
    if generator.random() < NOISE_SHARE:
        sigma = generator.uniform(0, MAX_NOISE_SIGMA)
        noise = th.from_numpy(generator.standard_normal(small.shape, dtype=np.float32))
        small = (small + sigma * noise).round_().clamp_(0, 255).to(th.uint8)
    if generator.random() < JPEG_SHARE:
        lowest, highest = JPEG_QUALITIES
        small = images.jpeg_round_trip(
            small, int(generator.integers(lowest, highest, endpoint=True))
        )
    return small


class FrameDataset(Dataset):
    """All images, and all frames at `video_fps` of all films, of an index.

    Item `(epoch, index)`, or just `index` for epoch 0, is (large [3, L, L], {"low_res": [3, S, S]}), float32 in
    [-1, 1]: fitted into the square on black, and degraded anew in every epoch. It depends on (seed, epoch, index)
    only. A file that cannot be decoded raises MediaError; nothing is put in its place. Large pictures are kept in
    `disk`. ValueError for impossible sizes.
    """

    def __init__(
        self,
        index: ClipIndex[float | None],
        large_size: int,
        small_size: int,
        video_fps: float = 4,
        random_flip: bool = True,
        seed: int = 42,
        disk: DiskCache | None = None,
    ) -> None:
        require_positive(video_fps=video_fps)
        check_factor(large_size, small_size)
        self.files, self.video_fps = index.clips, video_fps
        self.large_size, self.small_size, self.random_flip, self.seed = (
            large_size,
            small_size,
            random_flip,
            seed,
        )
        self.parts: Parts = [((3, large_size, large_size), "uint8")]
        self.disk = disk
        counts = [
            1 if seconds is None else count_frames(seconds, video_fps) for _, seconds in self.files
        ]
        self.first_after = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self.first_after[-1] if self.first_after else 0

    def __getitem__(self, key: int | tuple[int, int]) -> Pair:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        large = self._large(index)
        if self.random_flip and is_mirrored(self.seed, epoch, index):
            large = large.flip(-1)
        generator = np.random.default_rng(rng.derive_seed(self.seed, "degrade", epoch, index))
        small = degrade(large, self.small_size, generator)
        return images.to_float(large.contiguous()), {"low_res": images.to_float(small.contiguous())}

    def place(self, index: int) -> tuple[str, int | None]:
        """Index -> (path, frame at `video_fps`; None in an image)."""
        file, number = locate(index, self.first_after)
        path, seconds = self.files[file]
        return path, None if seconds is None else number

    def picture(self, index: int) -> th.Tensor:
        """[3, h, w] uint8 as the file has it."""
        path, number = self.place(index)
        return (
            images.read_image(path)
            if number is None
            else next(decode.read_frames(path, number, 1, self.video_fps))
        )

    def _large(self, index: int) -> th.Tensor:
        """[3, L, L] uint8, upright and fitted."""

        def decode() -> tuple[th.Tensor]:
            return (
                images.fit_image(
                    self.picture(index), self.large_size, self.large_size
                ).contiguous(),
            )

        if not self.disk:
            return decode()[0]
        path, number = self.place(index)
        seconds = None if number is None else number / Fraction(self.video_fps)
        return self.disk.get(path, {"seconds": seconds}, self.parts, decode)[0]


def load_frames(
    *,
    index: ClipIndex[float | None],
    batch_size: int,
    large_size: int,
    small_size: int,
    video_fps: float = 4,
    random_flip: bool = True,
    num_workers: int = 4,
    seed: int = 42,
    rank: int = 0,
    world_size: int = 1,
    start_sample: int = 0,
    cache_dir: str = "",
) -> Iterator[Pair]:
    """What `find_frames` found -> endless (large [B, 3, L, L], {"low_res": [B, 3, S, S]}), float32 in [-1, 1], from the
    stream's position `start_sample` on: how many samples all ranks have taken before.

    `cache_dir` is where decoded pictures are kept on disk. ValueError (an impossible size) at once, MediaError when a
    file turns out to be undecodable.
    """
    require_positive(batch_size=batch_size)
    disk = DiskCache(cache_dir, index.data_dir) if cache_dir else None
    dataset = FrameDataset(index, large_size, small_size, video_fps, random_flip, seed, disk)
    if disk and rank == 0:
        logger.log(disk.report(len(dataset), dataset.parts))
    batches = endless_batches(
        dataset, batch_size, num_workers, seed, rank, world_size, start_sample
    )
    return ((large, small) for large, small in batches)
