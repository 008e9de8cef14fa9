"""The clips of a folder, as they are read for evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import torch as th

from ..config import ClipReadingConfig, DataConfig
from ..data import decode, images
from ..data.clips import ClipDataset, count_frames, count_windows, locate_all
from ..data.decode import ClipInfo
from ..data.index import ClipIndex, build_index
from ..data.probing import fingerprint, identity

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
    file: ClipInfo
    antialias: bool

    def frames_at(self, fps: float, num_frames: int) -> th.Tensor:
        """[num_frames, 3, H, W] from the clip's start on, read at another rate."""
        frames, _ = self._read((num_frames, fps, *self.video.shape[-2:]), (self.sample_rate, 1))
        return images.to_float(frames.permute(0, 3, 1, 2))

    def audio_at(self, sample_rate: int, num_samples: int) -> th.Tensor:
        """[2, num_samples] from the clip's start on, read at another rate."""
        return self._read((1, self.fps, 8, 8), (sample_rate, num_samples))[1]

    def _read(
        self, frames: tuple[int, float, int, int], samples: tuple[int, int]
    ) -> tuple[th.Tensor, th.Tensor]:
        streams = self.file.video_stream, self.file.audio_stream
        where = self.path, self.start, *frames, *samples, *streams
        return decode.read_window(*where, antialias=self.antialias)

    def original_frames(self) -> Iterator[th.Tensor]:
        """[3, h, w] uint8, at the size in the file and its rate, or that of the clip if lower."""
        fps = Fraction(min(self.fps, self.file.fps))
        seconds = min(len(self.video) / self.fps, self.file.duration_seconds - float(self.start))
        count = count_frames(seconds, float(fps))
        return decode.read_frames(self.path, self.start * fps, count, fps)

    def original_audio(self) -> th.Tensor:
        """[2, L] at the sample rate of the file."""
        seconds = self.audio.shape[-1] / self.sample_rate
        rate = self.file.sample_rate
        return self.audio_at(rate, round(seconds * rate))


class ClipFolder:
    """The first `most` clips of a folder (0: all), by number.

    They have two channels, equal ones for mono. DataError for none, or for too many unusable files.
    """

    def __init__(self, folder: str, config: ClipReadingConfig, flag: str, most: int = 0) -> None:
        index = build_index(folder, config.max_bad_share, num_workers=config.num_workers, flag=flag)
        self.folder, self.config, self.flag, self.bad = folder, config, flag, index.bad
        self.dataset = _open_dataset(index, config)
        self.files, self.most = self.dataset.clips, most

    def __len__(self) -> int:
        return min(len(self.dataset), self.most or len(self.dataset))

    def clip(self, number: int) -> Clip:
        """Clip `number`; MediaError where it cannot be decoded."""
        path, info, start = self.dataset.source(number)
        sample = self.dataset[number]
        config = self.config
        return Clip(
            sample["video"],
            sample["audio"],
            fps=config.video_fps,
            sample_rate=config.audio_fps,
            path=path,
            start=start,
            file=info,
            antialias=config.antialias,
        )

    def name(self, number: int) -> str:
        """The name of clip `number` in a report."""
        path, _, start = self.dataset.source(number)
        return f"{path} at {float(start):g} s" if start else path

    def place(self, number: int) -> dict[str, Any]:
        """Where clip `number` is: {"path", "start": seconds}."""
        path, _, start = self.dataset.source(number)
        return {"path": path, "start": float(start)}

    def file_numbers(self) -> th.Tensor:
        """[N]: the file of each clip."""
        files, _ = locate_all(self.dataset.first_after)
        return th.from_numpy(files[: len(self)])

    def content(self) -> str:
        """Identifies the clips by their files' content and the way they are read."""
        with ThreadPoolExecutor(max(1, self.config.num_workers)) as pool:
            files = list(pool.map(_file_content, self.dataset.index.paths()))
        config = self.config
        how = config.video_size, config.audio_size, config.video_fps, config.audio_fps
        return json.dumps([decode.DECODER, [*how, config.antialias, self.most], files])

    def how(self) -> str:
        """How the clips are read."""
        config = self.config
        num_frames, _, height, width = config.video_size
        frames = f"{num_frames} frames at {config.video_fps} fps, {width} x {height} pixels"
        resized = f"resized (bicubic) {'with' if config.antialias else 'without'} antialiasing"
        return f"{frames}, {resized}; {config.audio_size[1]} samples at {config.audio_fps} Hz"

    def notes(self) -> list[str]:
        """What a reader of scores should know of these clips."""
        num_frames, fps = self.config.video_size[0], self.config.video_fps
        seconds = f"{num_frames / fps:g} s"
        short = slow = cut = unused = 0
        last_file = int(self.file_numbers()[-1])
        for _, info in itertools.islice(self.files, last_file + 1):
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
            f"{len(self)} clips, fewer than --sample_num {self.most}": len(self) < self.most,
        }
        return [f"--{self.flag}: {note}" for note, count in notes.items() if count]


def _open_dataset(index: ClipIndex[ClipInfo], config: ClipReadingConfig) -> ClipDataset:
    """Consecutive windows, never flipped, with two channels."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields |= {"audio_size": (2, config.audio_size[1]), "clip_stride": config.video_size[0]}
    return ClipDataset(index, DataConfig(random_flip=False, **fields))


def _file_content(path: str) -> list[Any]:
    """Length and fingerprint of a file: of a long one only the ends are read."""
    return [identity(path)["size"], fingerprint(path)]
