"""Clips whose one modality conditions the other."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch as th

from ..data.clips import ClipDataset, count_frames, locate, require_positive
from ..data.decode import ClipInfo
from ..data.index import ClipIndex, identity, probe_folders, refuse_if_bad
from ..files import write_atomically
from ..script_util import (
    DataConfig,
    numbers,
    pick,
)

SOURCES = "sources.csv"


class ConditioningClips:
    """The clips of a data folder, numbered, with one modality (`known`) to be given to a model.

    Number k is the first window of file k, then come the second windows of those files that have one, and so on, so
    that few clips are from many files. They are as long as the model's: DataError where too many files are shorter.
    """

    def __init__(self, known: str, index: ClipIndex[ClipInfo], flags: Mapping[str, Any]) -> None:
        self.known, self.data_dir = known, index.data_dir
        config = pick(DataConfig, flags)
        require_positive(
            video_fps=config.video_fps, audio_fps=config.audio_fps, clip_stride=config.clip_stride
        )
        num_frames = numbers("video_size", flags["video_size"], 4)[0]
        self.index = long_enough(index, num_frames, config.video_fps, config.max_bad_share)
        sizes = (flags["video_size"], flags["audio_size"], config.video_fps, config.audio_fps)
        self.windows = ClipDataset(
            self.index, *sizes, config.random_flip, config.clip_stride, flags["seed"]
        )
        self.order = sorted(
            range(len(self.windows)), key=lambda w: locate(w, self.windows.first_after)[::-1]
        )

    def __len__(self) -> int:
        return len(self.order)

    def truth(self, k: int) -> dict[str, th.Tensor]:
        """Clip k: {"video" [F, 3, H, W], "audio" [2, L]} in [-1, 1]."""
        return self.windows[self.order[k]]

    def given(self, k: int) -> dict[str, th.Tensor]:
        """What is given of clip k."""
        return {self.known: self.truth(k)[self.known]}

    def fingerprint(self) -> str:
        """A short name of which clips these are, in this order: files by name, size and streams, and places in them."""
        files = [
            [os.path.basename(path), identity(path)["size"], info.video_stream, info.audio_stream]
            for path, info in self.index.clips
        ]
        told = [files, self.order, self.windows.clip_stride, self.windows.random_flip]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def write_sources(self, folder: str | os.PathLike, stem: str) -> None:
        """sources.csv: the file of each clip, drawn or not, and at how many seconds it begins."""

        def write(temporary: str) -> None:
            with open(temporary, "w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["clip", "file", "start_seconds"])
                for k, window in enumerate(self.order):
                    path, _, start = self.windows.place(window)
                    rows.writerow([clip_name(stem, k), path, float(start)])

        write_atomically(Path(folder, SOURCES), write)


def long_enough(
    index: ClipIndex[ClipInfo], num_frames: int, video_fps: float, max_bad_share: float
) -> ClipIndex[ClipInfo]:
    """The index without files shorter than `num_frames`; DataError where nothing or too little remains.

    In training such clips are drawn out; here the given modality would not be the one in the file.
    """
    need = f"need {num_frames / video_fps:.2f} s ({num_frames} frames at {video_fps} per second)"
    short = {
        path: f"{path}: lasts {info.duration_seconds:.2f} s, {need}"
        for path, info in index.clips
        if count_frames(info.duration_seconds, video_fps) < num_frames
    }
    clips = [(path, info) for path, info in index.clips if path not in short]
    kept = ClipIndex(clips, index.bad | short, index.data_dir)
    refuse_if_bad(index.data_dir, kept, max_bad_share)
    return kept


def clip_name(stem: str, k: int) -> str:
    return f"{stem}_{k:05d}"


def find_given(flags: Mapping[str, Any]) -> ClipIndex[ClipInfo]:
    """The index of `data_dir`; DataError where it is no folder of clips."""
    config = pick(DataConfig, flags)
    return probe_folders(
        config.data_dir, config.num_workers, config.video_stream, config.audio_stream
    )
