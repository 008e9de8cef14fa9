"""Clips of a data folder, one modality of which conditions the generation of the other."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch as th

from ..config import DataConfig
from ..data.clips import ClipDataset, frame_counts, locate_all
from ..data.decode import ClipInfo
from ..data.index import ClipIndex
from ..files import write_text
from .output import clip_name

SOURCES = "sources.csv"


class ConditioningClips:
    """The clips of an index, numbered, with the `modality` that conditions a model.

    Number k is the first window of file k; then come the second windows of those files that have
    one, and so on: few clips are from many files. DataError where too many files are shorter than
    the model's clips.
    """

    def __init__(self, modality: str, index: ClipIndex[ClipInfo], config: DataConfig) -> None:
        self.modality = modality
        self.index = long_enough(index, config)
        self.dataset = ClipDataset(self.index, config)
        _, numbers = locate_all(self.dataset.first_after)
        # A stable sort: windows of the same number stay in the order of their files.
        self.order = np.argsort(numbers, kind="stable")

    def __len__(self) -> int:
        return len(self.order)

    def truth(self, number: int) -> dict[str, th.Tensor]:
        """A clip: {"video" [F, 3, H, W], "audio" [2, L]} in [-1, 1]."""
        return self.dataset[int(self.order[number])]

    def conditioning(self, number: int) -> dict[str, th.Tensor]:
        """The conditioning modality of a clip."""
        return {self.modality: self.truth(number)[self.modality]}

    def fingerprint(self) -> str:
        """A short name of these clips in this order: names, sizes and streams of files, windows."""
        index, config = self.index, self.dataset.config
        names = map(os.path.basename, index.paths())
        streams = index.column("video_stream").tolist(), index.column("audio_stream").tolist()
        files = [*zip(names, index.file_sizes().tolist(), *streams, strict=True)]
        order = self.order.tolist()
        facts = [files, order, config.clip_stride, config.random_flip, config.antialias]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def write_sources(self, folder: str | os.PathLike, stem: str) -> None:
        """sources.csv: the file of each clip, generated or not, and its start in seconds."""
        table = io.StringIO()
        rows = csv.writer(table)
        rows.writerow(["clip", "file", "start_seconds"])
        paths = self.index.paths()
        files, windows = (part[self.order] for part in locate_all(self.dataset.first_after))
        starts = [float(self.dataset.start(k)) for k in range(windows.max() + 1)]
        sources = zip(files.tolist(), windows.tolist(), strict=True)
        for number, (file, window) in enumerate(sources):
            rows.writerow([clip_name(stem, number), paths[file], starts[window]])
        write_text(Path(folder, SOURCES), table.getvalue())


def long_enough(index: ClipIndex[ClipInfo], config: DataConfig) -> ClipIndex[ClipInfo]:
    """The index without files shorter than a clip; DataError where nothing or too little remains.

    In training such clips are padded; here the padding would be conditioned on.
    """
    num_frames, fps = config.video_size[0], config.video_fps
    seconds = index.column("duration_seconds")
    is_short = frame_counts(seconds, fps) < num_frames
    need = f"need {num_frames / fps:.2f} s ({num_frames} frames at {fps} per second)"
    short = {
        path: f"{path}: lasts {info.duration_seconds:.2f} s, {need}"
        for path, info in index.choose(is_short)
    }
    kept = index.leave_out(short)
    kept.refuse_if_bad(config.max_bad_share)
    return kept
