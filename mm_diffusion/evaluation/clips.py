"""The clips of a folder, as they are read for evaluation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import torch as th

from ..config import ClipReadingConfig, DataConfig
from ..data import decode
from ..data.clips import ClipDataset, count_frames, count_windows
from ..data.decode import ClipInfo
from ..data.index import ClipIndex, build_index, fingerprint, identity

MIN_RATE = 0.9  # share of --video_fps below which a file's own frame rate is too low
Rows = dict[str, th.Tensor]  # what a measure computes: of one clip, or of all clips [N, ...]
Results = Mapping[str, Rows]  # measure -> rows [N, ...]


@dataclasses.dataclass(frozen=True)
class Clip:
    """A window of a file: frames [F, 3, H, W] and audio [2, L] in [-1, 1], rates in Hz."""

    video: th.Tensor
    audio: th.Tensor
    fps: float
    sample_rate: int
    path: str
    start: Fraction  # seconds
    file_seconds: float
    file_fps: float


class ClipFolder:
    """The clips of a folder, by number; DataError for none, or for too many unusable files."""

    def __init__(self, folder: str, config: ClipReadingConfig, flag: str) -> None:
        index = build_index(folder, config.max_bad_share, num_workers=config.num_workers, flag=flag)
        self.folder, self.config, self.flag, self.bad = folder, config, flag, index.bad
        self.dataset = _open_dataset(index, config)
        self.files = self.dataset.clips

    def __len__(self) -> int:
        return len(self.dataset)

    def clip(self, number: int) -> Clip:
        """Clip `number`; MediaError where it cannot be decoded."""
        path, info, start = self.dataset.source(number)
        sample = self.dataset[number]
        fps, rate = self.config.video_fps, self.config.audio_fps
        file = path, start, info.duration_seconds, info.fps
        return Clip(sample["video"], sample["audio"], fps, rate, *file)

    def name(self, number: int) -> str:
        """The name of clip `number` in a report."""
        path, _, start = self.dataset.source(number)
        return f"{path} at {float(start):g} s" if start else path

    def content(self) -> str:
        """Identifies the clips by their files' content and the way they are read."""
        with ThreadPoolExecutor(max(1, self.config.num_workers)) as pool:
            files = list(pool.map(_file_content, [path for path, _ in self.files]))
        config = self.config
        rates = config.video_fps, config.audio_fps
        return json.dumps([decode.DECODER, [config.video_size, config.audio_size, rates], files])

    def notes(self) -> list[str]:
        """What a reader of scores should know of these clips."""
        num_frames, fps = self.config.video_size[0], self.config.video_fps
        seconds = f"{num_frames / fps:g} s"
        short = slow = cut = unused = 0
        for _, info in self.files:
            used = num_frames * count_windows(info, num_frames, fps, num_frames)
            rest = count_frames(info.duration_seconds, fps) - used
            short += rest < 0
            cut += rest > 0
            unused += max(0, rest)
            slow += info.fps < MIN_RATE * fps
        padded = "their last frame is repeated, their audio padded with silence"
        end = f"{unused / fps:g} s at the end of {cut} files"
        slow_effect = "frames are repeated and Temporal AV-Align is unreliable"
        notes = {
            f"{len(self.bad)} files left out: {'; '.join(self.bad.values())}": len(self.bad),
            f"{short} files are shorter than {seconds}: {padded}": short,
            f"{end} are left out, too short for another clip of {seconds}": cut,
            f"{slow} files have a frame rate below --video_fps {fps}: {slow_effect}": slow,
        }
        return [f"--{self.flag}: {note}" for note, count in notes.items() if count]


def _open_dataset(index: ClipIndex[ClipInfo], config: ClipReadingConfig) -> ClipDataset:
    """Consecutive windows, never flipped."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return ClipDataset(
        index, DataConfig(random_flip=False, clip_stride=config.video_size[0], **fields)
    )


def _file_content(path: str) -> list[Any]:
    """Length and fingerprint of a file: of a long one only the ends are read."""
    return [identity(path)["size"], fingerprint(path)]
