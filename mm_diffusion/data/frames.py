"""Images for training an upsampler, in pairs of large and degraded small: files or video frames."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from fractions import Fraction

import cv2
import numpy as np
import torch as th
from torch.utils.data import Dataset

from .. import logger, rng
from ..config import FrameDataConfig
from ..dist_util import World
from . import decode, images
from .cache import DiskCache, Parts
from .clips import frame_counts, is_mirrored, locate
from .index import (
    VIDEO_EXTENSIONS,
    ClipIndex,
    cache_path,
    find_files,
    folders_in,
)
from .loader import endless_batches
from .probing import Probe, probe_files
from .shared import SharedArray

cv2.setNumThreads(1)  # images are resized in several processes
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")
NOISE_SHARE, MAX_NOISE_SIGMA = 0.5, 20.0  # of the small images; on the scale 0..255
JPEG_SHARE, JPEG_QUALITIES = 0.5, (20, 80)


@dataclasses.dataclass(frozen=True)
class FrameInfo:
    """What an image file or a video file holds."""

    is_video: bool
    duration_seconds: float = 0.0  # of a video
    note: str = ""


FrameIndex = ClipIndex[FrameInfo]
Pair = tuple[th.Tensor, dict[str, th.Tensor]]


def find_frames(config: FrameDataConfig) -> FrameIndex:
    """`find_images` in data_dir, logged; DataError as in `ClipIndex.refuse_if_bad`."""
    index = find_images(config.data_dir, config.num_workers)
    videos, seconds = index.column("is_video").sum(), index.column("duration_seconds").sum()
    count = f"{len(index.clips) - videos} images and {videos} videos ({seconds:.1f} s)"
    logger.log(f"{config.data_dir}: {index.report(count)}")
    index.refuse_if_bad(config.max_bad_share, lister="the log above")
    return index


def find_images(data_dir: str, num_workers: int = 4) -> FrameIndex:
    """The images and video files below `data_dir` (one folder or a comma list).

    Rank 0 searches, all ranks probe: must be called on every rank. DataError where a folder is
    missing or holds neither.
    """
    remedy = "check --data_dir, or extract frames of videos with py_scripts/extract_video.py"
    kinds = IMAGE_EXTENSIONS + VIDEO_EXTENSIONS
    find = functools.partial(find_files, folders_in(data_dir), kinds, "images or videos", remedy)
    probe = Probe(_probe, FrameInfo, cache_path(data_dir, kind="frames"), num_workers)
    return ClipIndex(*probe_files(find, probe), data_dir)


def _probe(path: str) -> FrameInfo:
    """What the file holds; MediaError where it cannot be used."""
    if not path.lower().endswith(IMAGE_EXTENSIONS):
        return FrameInfo(is_video=True, duration_seconds=decode.video_duration(path))
    images.check_image(path)
    return FrameInfo(is_video=False)


def opencv_cubic(image: th.Tensor, size: list[int]) -> th.Tensor:
    """[3, h, w] uint8 -> [3, *size]: as published, without antialiasing."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    resized = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_CUBIC)
    return th.from_numpy(resized).permute(2, 0, 1)


def choose_resize(antialias: bool) -> images.Resize:
    """How images for the upsampler are resized."""
    return images.antialiased_bicubic if antialias else opencv_cubic


def degrade(
    large: th.Tensor, small_size: int, generator: np.random.Generator, antialias: bool = False
) -> th.Tensor:
    """[3, H, W] uint8 -> [3, s, s] uint8: bicubic; half with Gaussian noise; then half as JPEG."""
    small = images.fit_image(large, small_size, small_size, choose_resize(antialias))
    if generator.random() < NOISE_SHARE:
        sigma = generator.uniform(0, MAX_NOISE_SIGMA)
        noise = th.from_numpy(generator.standard_normal(small.shape, dtype=np.float32))
        small = (small + sigma * noise).round_().clamp_(0, 255).to(th.uint8)
    if generator.random() < JPEG_SHARE:
        quality = generator.integers(*JPEG_QUALITIES, endpoint=True)
        small = images.jpeg_round_trip(small, int(quality))
    return small


class FrameDataset(Dataset):
    """All images, and all frames at `video_fps` of all video files, of an index.

    Item `(epoch, index)`, or `index` for epoch 0, is (large [3, L, L], {"low_res": [3, S, S]}),
    float32 in [-1, 1]: fitted into the square on black, decoded once if there is a `disk`, and
    degraded as (seed, epoch, index) decides. MediaError where its file cannot be decoded.
    """

    def __init__(
        self, index: FrameIndex, config: FrameDataConfig, disk: DiskCache | None = None
    ) -> None:
        self.index, self.files, self.config, self.disk = index, index.clips, config, disk
        self.parts: Parts = [((3, config.large_size, config.large_size), "uint8")]
        frames = frame_counts(index.column("duration_seconds"), config.video_fps)
        self.ends = SharedArray.of(np.cumsum(np.where(index.column("is_video"), frames, 1)))

    @property
    def first_after(self) -> np.ndarray:
        """Of each file: the first item of the next one."""
        return self.ends.values

    def __len__(self) -> int:
        return int(self.first_after[-1]) if len(self.first_after) else 0

    def __getitem__(self, key: int | tuple[int, int]) -> Pair:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        config, seed, large = self.config, self.config.seed, self._large(index)
        if config.random_flip and is_mirrored(seed, epoch, index):
            large = large.flip(-1)
        generator = np.random.default_rng(rng.derive_seed(seed, "degrade", epoch, index))
        small = degrade(large, config.small_size, generator, config.antialias)
        return images.to_float(large.contiguous()), {"low_res": images.to_float(small.contiguous())}

    def source(self, index: int) -> tuple[str, int | None]:
        """Index -> (path, frame at `video_fps`; None for an image file)."""
        file, number = locate(index, self.first_after)
        path, info = self.files[file]
        return path, number if info.is_video else None

    def image(self, index: int) -> th.Tensor:
        """[3, h, w] uint8 at the size in the file."""
        path, number = self.source(index)
        if number is None:
            return images.read_image(path)
        return next(decode.read_frames(path, number, 1, self.config.video_fps))

    def _large(self, index: int) -> th.Tensor:
        """[3, L, L] uint8, upright and fitted."""
        side, (path, number) = self.config.large_size, self.source(index)

        def read() -> tuple[th.Tensor]:
            resize = choose_resize(self.config.antialias)
            return (images.fit_image(self.image(index), side, side, resize).contiguous(),)

        seconds = None if number is None else number / Fraction(self.config.video_fps)
        item = {
            "seconds": seconds,
            "antialias": self.config.antialias,
            "opencv": cv2.__version__,
        }
        parts = self.disk.get(path, item, self.parts, read) if self.disk else read()
        return parts[0]


def load_frames(
    index: FrameIndex, config: FrameDataConfig, world: World | None = None, start_sample: int = 0
) -> Iterator[Pair]:
    """-> endless (large [B, 3, L, L], {"low_res": [B, 3, S, S]}), float32 in [-1, 1].

    index: from `find_frames`. start_sample: how many samples all ranks have taken before.
    ValueError (an unusable cache_dir) at once, DataError when too many files turn out undecodable.
    """
    world = world or World()
    disk = DiskCache(config.cache_dir, index.data_dir) if config.cache_dir else None
    dataset = FrameDataset(index, config, disk)
    return map(tuple, endless_batches(dataset, config, world, start_sample))
