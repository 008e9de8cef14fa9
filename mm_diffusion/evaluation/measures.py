"""What is computed of each clip: rows of fixed shape, from which `scores` makes figures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch as th

from ..config import ClipReadingConfig, MetricsConfig
from ..data.clips import count_frames
from ..data.index import VIDEO_EXTENSIONS, find_files, folders_in
from . import features, i3d, spatial_av_align, stereo, temporal_av_align
from .clips import Clip, Rows
from .spatial_av_align import Box, Boxes, Events

FOLDERS = ("boxes_dir", "events_dir")
LEFT_OUT = {
    "ref_path": ("comparisons with reference clips", "a folder of them"),
    "i3d_path": ("FVD, KVD", features.I3D_SOURCE),
    "audio_embedding_path": ("FAD, KAD", features.EMBEDDING_SOURCE),
    "detector_path": ("Spatial AV-Align", "weights of --detector; or give --boxes_dir"),
}


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is computed of a clip; `key` identifies all that the rows depend on beside the clip."""

    compute: Callable[[Clip], Rows]
    key: str = ""
    of_reference: bool = True  # whether it is computed of reference clips, too
    how: str = ""  # what a reader has to know to compare its figures with others


def make_measures(config: MetricsConfig, device: th.device) -> dict[str, Measure]:
    """The measures that the flags allow; ValueError, naming the flag, for an unusable file."""
    config = _expand_paths(config)
    if config.ref_path:
        find_files(folders_in(config.ref_path), VIDEO_EXTENSIONS, "clips", "check --ref_path")
    made = {
        "stereo": Measure(_stereo, how="both channels in segments of 0.1 s"),
        "thumbnail": Measure(_thumbnail, how="8 x 8 pixels, as it is or mirrored"),
    }
    if not temporal_av_align.why_no_onsets():
        made |= _temporal_measures()
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


def check_i3d_frames(config: MetricsConfig, sizes: ClipReadingConfig) -> None:
    """ValueError if clips of these sizes have too few frames for the published I3D."""
    if not config.i3d_path or features.is_script(os.path.expanduser(config.i3d_path)):
        return
    frames, fps = sizes.video_size[0], sizes.video_fps
    i3d.check_frames(config.i3d_frames or round(frames / fps * (config.i3d_fps or fps)))


def _expand_paths(config: MetricsConfig) -> MetricsConfig:
    """ "~" in paths expanded."""
    names = [field.name for field in dataclasses.fields(config)]
    paths = [name for name in names if name.endswith(("_path", "_dir"))]
    expanded = {name: os.path.expanduser(getattr(config, name)) for name in paths}
    return dataclasses.replace(config, **expanded)


def _temporal_measures() -> dict[str, Measure]:
    key = temporal_av_align.version_key()
    ours = "clips as they are read; an onset and a peak count once"
    published = "size and rate of the file, at most --video_fps; onsets may share a peak"
    return {
        "temporal": Measure(temporal_av_align.compute, key, how=ours),
        "temporal_published": Measure(temporal_av_align.compute_published, key, how=published),
    }


def _stereo(clip: Clip) -> Rows:
    return stereo.compute(clip.audio, clip.sample_rate)


def _thumbnail(clip: Clip) -> Rows:
    return {"pixels": features.thumbnail(clip.video)}


def _i3d_measure(config: MetricsConfig, device: th.device) -> Measure:
    path, num_frames, fps = config.i3d_path, config.i3d_frames, config.i3d_fps
    network = features.load_i3d(path, device)

    def compute(clip: Clip) -> Rows:
        if not (num_frames or fps):
            return {"features": network(clip.video)}
        rate = fps or clip.fps
        count = num_frames or round(len(clip.video) / clip.fps * rate)
        return {"features": network(clip.frames_at(rate, count))}

    frames = f"first {num_frames} frames" if num_frames else "all frames"
    at = f"{fps} fps" if fps else "the rate of the clip"
    kind = "features of TorchScript" if features.is_script(path) else "logits of Inception I3D"
    how = f"{frames} at {at}, shorter side to 224 (bilinear), centre crop; {kind} {Path(path).name}"
    key = f"{features.file_key(path)} {num_frames} {fps} {device.type}"
    return Measure(compute, key, how=how)


def _embedding_measure(config: MetricsConfig, device: th.device) -> Measure:
    path, kind = config.audio_embedding_path, config.audio_embedding_input
    rate, num_samples = config.audio_embedding_fps, config.audio_embedding_samples
    embed = features.load_audio_embedding(path, kind, device, rate)

    def compute(clip: Clip) -> Rows:
        if rate == features.EMBEDDING_HZ and not num_samples:
            return embed(clip.audio, clip.sample_rate)
        count = num_samples or round(clip.audio.shape[-1] / clip.sample_rate * rate)
        return embed(clip.audio_at(rate, count), rate)

    samples = f"first {num_samples} samples" if num_samples else "all samples"
    how = f"{samples} at {rate} Hz as {kind}; output of {Path(path).name}"
    key = f"{features.file_key(path)} {kind} {rate} {num_samples} {device.type}"
    return Measure(compute, key, how=how)


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
        file = clip.file
        rows = spatial_av_align.read_boxes(path, file.fps, file.duration_seconds)
        return Boxes(rows, file.fps, count_frames(file.duration_seconds, file.fps))

    def _events(self, clip: Clip, name: str) -> Events:
        if not self.config.events_dir:
            rows = spatial_av_align.localise(clip.audio, clip.sample_rate)
            return Events(rows, clip.start)
        path = Path(self.config.events_dir, name)
        rows = spatial_av_align.read_events(path, clip.file.duration_seconds)
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
    events = "events of --events_dir" if config.events_dir else "events localised in the audio"
    if config.boxes_dir:
        how = f"boxes of --boxes_dir, {events}"
        return Measure(SpatialAlign(config, detect=None), of_reference=False, how=how)
    name, path = config.detector, config.detector_path
    how = f"boxes of {name} in the clips as they are read, {events}"
    compute = SpatialAlign(config, spatial_av_align.load_detector(name, path, device))
    if config.events_dir:
        return Measure(compute, of_reference=False, how=how)
    return Measure(compute, f"{features.file_key(path)} {name} {device.type}", how=how)
