"""Clips for training: windows of video files as tensors, in an order set by seed and position."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch as th
from torch.utils.data import Dataset, default_collate

from .. import logger, rng
from ..config import DataConfig
from ..dist_util import World
from . import MediaError, decode, images
from .cache import DiskCache, Parts
from .decode import ClipInfo
from .held_out import split
from .index import ClipIndex, build_index
from .loader import endless_batches
from .shared import SharedArray

Sample = dict[str, th.Tensor]
ROUNDING_FRAMES = 0.05  # a video that ends this much before a frame would, still has that frame
PIECE_FILES = 1000  # whose windows are looked at together
SPANS = ("duration_seconds", "audio_begin_seconds", "audio_end_seconds")
LEAST_AUDIO_SHARE = 0.9  # of a window; windows with less are reported


def mirror(sample: Sample) -> Sample:
    """The clip with left and right swapped, in the frames and in the channels, if it has two."""
    return {"video": sample["video"].flip(-1), "audio": sample["audio"].flip(-2)}


def is_mirrored(seed: int, epoch: int, index: int) -> bool:
    """Whether window `index` is mirrored in this epoch: a fair coin for each."""
    return rng.derive_seed(seed, "mirror", epoch, index) % 2 == 1


def frame_counts(seconds: np.ndarray | float, fps: float) -> np.ndarray:
    """Frames at `fps` of videos of these durations, at least 1; containers round durations."""
    return np.maximum(1, np.asarray(seconds * fps + ROUNDING_FRAMES).astype(int))


def count_frames(seconds: float, fps: float) -> int:
    """`frame_counts` of one video."""
    return int(frame_counts(seconds, fps))


def window_counts(
    seconds: np.ndarray | float, num_frames: int, fps: float, clip_stride: int
) -> np.ndarray:
    """Windows of `num_frames` that begin every `clip_stride` frames; 1 in a shorter file."""
    return np.maximum(0, frame_counts(seconds, fps) - num_frames) // clip_stride + 1


def count_windows(info: ClipInfo, num_frames: int, fps: float, clip_stride: int) -> int:
    """`window_counts` of one file."""
    return int(window_counts(info.duration_seconds, num_frames, fps, clip_stride))


def audio_shares(
    index: ClipIndex[ClipInfo], num_frames: int, fps: float, clip_stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each window of all files: its file, and the share of its video that has audio, 0 to 1."""
    seconds, audio_begin, audio_end = (index.column(name).astype(float) for name in SPANS)
    counts = window_counts(seconds, num_frames, fps, clip_stride)
    files, numbers = locate_all(np.cumsum(counts))
    starts = numbers * clip_stride / fps
    ends = np.minimum(starts + num_frames / fps, seconds[files])
    first = np.maximum(starts, audio_begin[files])
    last = np.minimum(ends, audio_end[files])
    return files, np.clip(last - first, 0, None) / np.maximum(ends - starts, 1e-6)


def notes_on_audio(index: ClipIndex[ClipInfo], config: DataConfig) -> list[str]:
    """What the user should know: windows without audio, and files of several mono streams."""
    sizes = (config.video_size[0], config.video_fps, config.clip_stride)
    without = little = 0  # windows without audio, with little
    quiet: list[int] = []  # files
    gaps = _gaps_in_audio(index, config)
    for begin in range(0, len(gaps), PIECE_FILES):
        piece = gaps[begin : begin + PIECE_FILES]
        part = ClipIndex(index.choose(piece), {}, index.data_dir)
        files, shares = audio_shares(part, *sizes)
        without += (shares <= 0).sum()
        little += ((shares > 0) & (shares < LEAST_AUDIO_SHARE)).sum()
        quiet += piece[np.unique(files[shares < LEAST_AUDIO_SHARE])].tolist()
    notes = []
    if quiet:
        windows = window_counts(index.column("duration_seconds"), *sizes).sum()
        less = f"{little} have it for less than {LEAST_AUDIO_SHARE:.0%} of their time"
        where = f"in {len(quiet)} files, for example {index.clips[quiet[0]][0]}"
        notes.append(f"{without} of {windows} windows have no audio, {less} ({where})")
    mono = np.flatnonzero(np.fromiter(map(len, index.column("mono_streams")), int) > 1)
    if len(mono) and config.audio_stream is None:
        path, info = index.clips[int(mono[0])]
        streams = info.mono_streams
        pair = ",".join(map(str, streams[:2]))
        example = f"for example {path}: {', '.join(map(str, streams))}"
        notes.append(
            f"{len(mono)} files have several mono streams ({example});"
            f" --audio_stream {pair} reads two as left and right"
        )
    return notes


def _gaps_in_audio(index: ClipIndex[ClipInfo], config: DataConfig) -> np.ndarray:
    """Numbers of the files that may have a window with less than LEAST_AUDIO_SHARE of audio."""
    duration, audio_begin, audio_end = map(index.column, SPANS)
    late, early = np.maximum(0, audio_begin), np.maximum(0, duration - audio_end)
    window = np.minimum(config.video_size[0] / config.video_fps, duration)
    # Half of what may be missing: the ends of windows are rounded.
    return np.flatnonzero(late + early >= (1 - LEAST_AUDIO_SHARE) / 2 * window)


def locate(item: int, first_after: np.ndarray) -> tuple[int, int]:
    """Item of all files -> (file, item of that file); file f ends before item `first_after[f]`."""
    file = int(np.searchsorted(first_after, item, side="right"))
    return file, int(item - (first_after[file - 1] if file else 0))


def locate_all(first_after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`locate` of every item."""
    counts = np.diff(first_after, prepend=0)
    files = np.repeat(np.arange(len(counts)), counts)
    return files, np.arange(len(files)) - (first_after - counts)[files]


class ClipDataset(Dataset):
    """All windows of all clips of an index.

    Item `(epoch, window)`, or `window` for epoch 0, is {"video": [F, 3, H, W], "audio": [C, L]},
    float32 in [-1, 1], decoded once if there is a `disk`. Mono is the mean of left and right.
    MediaError where decoding fails.
    """

    def __init__(
        self, index: ClipIndex[ClipInfo], config: DataConfig, disk: DiskCache | None = None
    ) -> None:
        self.index, self.clips, self.config, self.disk = index, index.clips, config, disk
        num_frames, _, height, width = config.video_size
        sizes = (num_frames, config.video_fps, config.clip_stride)
        counts = window_counts(index.column("duration_seconds"), *sizes)
        self.ends = SharedArray.of(np.cumsum(counts))
        frames = ((num_frames, height, width, 3), "uint8")
        self.parts: Parts = [frames, ((2, config.audio_size[1]), "float32")]

    @property
    def first_after(self) -> np.ndarray:
        """Of each clip: the first window of the next one."""
        return self.ends.values

    def __len__(self) -> int:
        return int(self.first_after[-1])

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, window = key if isinstance(key, tuple) else (0, key)
        frames, audio = self._decoded(window)
        if self.config.audio_size[0] == 1:
            audio = audio.mean(dim=0, keepdim=True)
        sample = {"video": images.to_float(frames.permute(0, 3, 1, 2)), "audio": audio}
        if self.config.random_flip and is_mirrored(self.config.seed, epoch, window):
            return mirror(sample)
        return sample

    def source(self, window: int) -> tuple[str, ClipInfo, Fraction]:
        """Window -> (path, info, start in seconds)."""
        clip, number = locate(window, self.first_after)
        return *self.clips[clip], self.start(number)

    def start(self, number: int) -> Fraction:
        """Where window `number` of a file begins, in seconds."""
        return number * self.config.clip_stride / Fraction(self.config.video_fps)

    def _decoded(self, window: int) -> tuple[th.Tensor, ...]:
        """Window -> ([F, H, W, 3] uint8, [2, L] float32)."""
        config, (path, info, start) = self.config, self.source(window)
        num_frames, _, height, width = config.video_size
        rates = {"video_fps": config.video_fps, "audio_fps": config.audio_fps}
        streams = (info.video_stream, info.audio_stream)
        video = (num_frames, config.video_fps, height, width)
        audio = (config.audio_fps, config.audio_size[1])
        where = path, start, *video, *audio, *streams
        read = functools.partial(decode.read_window, *where, antialias=config.antialias)
        item = {"start": start, "streams": streams, "antialias": config.antialias, **rates}
        return self.disk.get(path, item, self.parts, read) if self.disk else read()


def index_clips(config: DataConfig) -> ClipIndex[ClipInfo]:
    """The index of `data_dir`; must be called on every rank. DataError: see `build_index`."""
    return build_index(
        config.data_dir,
        config.max_bad_share,
        num_workers=config.num_workers,
        video_stream=config.video_stream,
        audio_stream=config.audio_stream,
    )


def read_clips(folder: str, config: DataConfig, most: int | None = None) -> Sample:
    """The first `most` clips of a folder, or all: {"video" [N, F, 3, H, W], "audio" [N, C, L]}.

    Must be called on every rank. Errors: see `load_data`.
    """
    config = dataclasses.replace(config, data_dir=folder, random_flip=False)
    clips = ClipDataset(index_clips(config), config)
    return default_collate([clips[k] for k in range(len(clips))[:most]])


def read_held_out(
    config: DataConfig,
    val_dir: str,
    val_share: float,
    most: int,
    index: ClipIndex[ClipInfo] | None = None,
) -> Sample | None:
    """Up to `most` clips of `val_dir`, or of the share of `data_dir`; None where there are none.

    Windows of equal distances among all: of as many files as there are. Those that cannot be
    decoded are left out, with a warning. index: of `data_dir`, if it is there already. Must be
    called on every rank. Errors: see `load_data`.
    """
    if val_dir:
        index = index_clips(dataclasses.replace(config, data_dir=val_dir))
    else:
        index = split(index or index_clips(config), val_share)[1]
    if not index.clips:
        return None
    dataset = ClipDataset(index, dataclasses.replace(config, random_flip=False))
    clips, failures = [], {}
    count = min(most, len(dataset))
    for window in (k * len(dataset) // count for k in range(count)):
        try:
            clips.append(dataset[window])
        except MediaError as error:
            failures[dataset.source(window)[0]] = str(error)
    for reason in failures.values():
        logger.warn(f"{reason}; held-out clips of it are left out")
    return default_collate(clips) if clips else None


def load_data(
    config: DataConfig,
    world: World | None = None,
    start_sample: int = 0,
    val_share: float = 0.0,
    index: ClipIndex[ClipInfo] | None = None,
) -> Iterator[tuple[Sample, dict]]:
    """-> endless ({"video": [B, F, 3, H, W], "audio": [B, C, L]}, {}), float32 in [-1, 1].

    start_sample: how many samples all ranks have taken before. val_share: of the files, which
    are held out (see held_out.py). index: of `data_dir`, if it is there already. Must be called
    on every rank.
    DataError (an unusable folder) and ValueError (an unusable cache_dir, video and audio of
    different duration) at once; DataError when too many files turn out to be undecodable
    (`endless_batches`).
    """
    config.check_durations()
    world = world or World()
    disk = DiskCache(config.cache_dir, config.data_dir) if config.cache_dir else None
    index, held_out = split(index or index_clips(config), val_share)
    if world.rank == 0:
        logger.log(f"{config.data_dir}: {index.report()}")
        if held_out.clips:
            logger.log(f"{len(held_out.clips)} more are held out (--val_share {val_share})")
        for note in notes_on_audio(index, config):
            logger.warn(f"{config.data_dir}: {note}")
    dataset = ClipDataset(index, config, disk)
    return ((batch, {}) for batch in endless_batches(dataset, config, world, start_sample))
