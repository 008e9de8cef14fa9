"""What is computed of each clip: rows of fixed shape, from which `scores` makes figures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch as th

from ..config import MetricsConfig
from ..data.clips import count_frames
from ..data.index import VIDEO_EXTENSIONS, find_files, folders_in
from . import features, spatial_av_align, stereo, temporal_av_align
from .clips import Clip, Rows
from .spatial_av_align import Box, Boxes, Events

FOLDERS = ("boxes_dir", "events_dir")
LEFT_OUT = {
    "ref_path": ("comparisons with reference clips", "a folder of them"),
    "i3d_path": ("FVD, KVD", features.I3D_SOURCE),
    "audio_embedding_path": ("FAD", features.EMBEDDING_SOURCE),
    "detector_path": ("Spatial AV-Align", "weights of --detector; or give --boxes_dir"),
}


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is computed of a clip; `key` identifies all that the rows depend on beside the clip."""

    compute: Callable[[Clip], Rows]
    key: str = ""
    of_reference: bool = True  # whether it is computed of reference clips, too


def make_measures(config: MetricsConfig, device: th.device) -> dict[str, Measure]:
    """The measures that the flags allow; ValueError, naming the flag, for an unusable file."""
    config = _expand_paths(config)
    if config.ref_path:
        find_files(folders_in(config.ref_path), VIDEO_EXTENSIONS, "clips", "check --ref_path")
    made = {"stereo": Measure(_stereo), "thumbnail": Measure(_thumbnail)}
    if not temporal_av_align.why_no_onsets():
        made["temporal"] = Measure(_temporal, temporal_av_align.version_key())
    if config.i3d_path:
        made["i3d"] = _i3d_measure(config, device)
    if config.audio_embedding_path:
        made["embedding"] = _embedding_measure(config, device)
    if config.boxes_dir or config.detector_path:
        made["spatial"] = _spatial_measure(config, device)
    elif config.events_dir:
        raise ValueError("--events_dir also needs boxes: give --boxes_dir or --detector_path")
    return made


def left_out(config: MetricsConfig) -> list[str]:
    """What the flags and libraries at hand do not allow: a line each that says what adds it."""
    lines = []
    if why := temporal_av_align.why_no_onsets():
        lines.append(f"Temporal AV-Align; {temporal_av_align.INSTALL} adds it ({why})")
    for flag, (what, source) in LEFT_OUT.items():
        has_boxes = flag == "detector_path" and config.boxes_dir
        if not getattr(config, flag) and not has_boxes:
            lines.append(f"{what}; --{flag} adds them ({source})")
    return lines


def _expand_paths(config: MetricsConfig) -> MetricsConfig:
    """ "~" in paths expanded."""
    names = [field.name for field in dataclasses.fields(config)]
    paths = [name for name in names if name.endswith(("_path", "_dir"))]
    expanded = {name: os.path.expanduser(getattr(config, name)) for name in paths}
    return dataclasses.replace(config, **expanded)


def _temporal(clip: Clip) -> Rows:
    return temporal_av_align.compute(clip.video, clip.audio, clip.fps, clip.sample_rate)


def _stereo(clip: Clip) -> Rows:
    return stereo.compute(clip.audio, clip.sample_rate)


def _thumbnail(clip: Clip) -> Rows:
    return {"pixels": features.thumbnail(clip.video)}


def _i3d_measure(config: MetricsConfig, device: th.device) -> Measure:
    i3d = features.load_i3d(config.i3d_path, device)

    def compute(clip: Clip) -> Rows:
        return {"features": i3d(clip.video)}

    return Measure(compute, f"{features.file_key(config.i3d_path)} {device.type}")


def _embedding_measure(config: MetricsConfig, device: th.device) -> Measure:
    path, kind = config.audio_embedding_path, config.audio_embedding_input
    embed = features.load_audio_embedding(path, kind, device)

    def compute(clip: Clip) -> Rows:
        return embed(clip.audio, clip.sample_rate)

    return Measure(compute, f"{features.file_key(path)} {kind} {device.type}")


@dataclasses.dataclass(frozen=True)
class SpatialAlign:
    """Clip -> {"hits": [], "misses": []} of its audio events.

    Boxes are from CSV files or a detector, events from CSV files or the localiser.
    """

    config: MetricsConfig
    detect: Callable[[th.Tensor], list[Box]] | None

    def __call__(self, clip: Clip) -> Rows:
        name = f"{Path(clip.path).stem}.csv"
        events, boxes = self._events(clip, name), self._boxes(clip, name)
        match = self.config.match_categories
        hits, misses = spatial_av_align.count_hits(events, boxes, match_categories=match)
        return {"hits": th.tensor(float(hits)), "misses": th.tensor(float(misses))}

    def _boxes(self, clip: Clip, name: str) -> Boxes:
        if self.detect:
            return Boxes(self.detect(clip.video), clip.fps, len(clip.video), clip.start)
        path = Path(self.config.boxes_dir, name)
        # All of the file: boxes just outside the window count for events at its edges.
        rows = spatial_av_align.read_boxes(path, clip.file_fps, clip.file_seconds)
        return Boxes(rows, clip.file_fps, count_frames(clip.file_seconds, clip.file_fps))

    def _events(self, clip: Clip, name: str) -> Events:
        if not self.config.events_dir:
            rows = spatial_av_align.localise(clip.audio, clip.sample_rate)
            return Events(rows, clip.start)
        path = Path(self.config.events_dir, name)
        rows = spatial_av_align.read_events(path, clip.file_seconds)
        seconds = len(clip.video) / Fraction(clip.fps)
        return Events(spatial_av_align.select_window(rows, clip.start, seconds))


def _spatial_measure(config: MetricsConfig, device: th.device) -> Measure:
    for flag in FOLDERS:
        folder = getattr(config, flag)
        if folder and not os.path.isdir(folder):
            raise ValueError(f"--{flag} {folder}: no such folder")
    if config.boxes_dir and config.detector_path:
        raise ValueError("--boxes_dir and --detector_path: give one of them")
    if config.match_categories and not (config.boxes_dir and config.events_dir):
        raise ValueError("--match_categories needs the categories of --boxes_dir and --events_dir")
    if config.boxes_dir:
        return Measure(SpatialAlign(config, detect=None), of_reference=False)
    name, path = config.detector, config.detector_path
    compute = SpatialAlign(config, spatial_av_align.load_detector(name, path, device))
    if config.events_dir:
        return Measure(compute, of_reference=False)
    return Measure(compute, f"{features.file_key(path)} {name} {device.type}")
