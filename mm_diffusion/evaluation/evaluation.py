"""All metrics of a folder of clips: look at every clip, gather what was seen over ranks, score it, tell it.

A `Measure` looks at one clip and gives rows of fixed shape. Those of all clips are put in order and summed over ranks
(a rank has zeros for the clips of others), so that scores do not depend on how many ranks there are.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import blobfile as bf
import cv2
import numpy as np
import torch as th
from tqdm import tqdm

from .. import logger
from ..data import clips, decode, images, index, toy
from ..data.clips import ClipDataset, count_frames, count_windows, require_positive
from ..data.index import (
    VIDEO_EXTENSIONS,
    build_index,
    cache_folder,
    find_files,
    fingerprint,
    folders_in,
    identity,
)
from ..dist_util import World, all_sum, from_rank_0
from ..files import write_atomically, write_text
from ..script_util import EvalConfig, MetricsConfig, numbers, pick
from . import features, spatial_align, stereo, temporal_align
from .scores import Score, compute_scores, histograms, table

SLOW = 0.9  # of the frames per second asked for: a file below has not enough
READERS = (
    index,
    clips,
    decode,
    images,
    toy,
)  # whose code and constants decide what is seen of a clip
Rows = dict[str, th.Tensor]
LEFT_OUT = {
    "ref_path": ("comparisons with true clips", "a folder of them"),
    "i3d_path": ("FVD, KVD", features.I3D_SOURCE),
    "audio_embedding_path": ("FAD", features.EMBEDDING_SOURCE),
    "detector_path": ("Spatial AV-Align", "weights of --detector; or give --boxes_dir"),
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A window of a file: frames [F, 3, H, W] and sound [2, L] in [-1, 1]; rates in Hz."""

    video: th.Tensor
    audio: th.Tensor
    fps: float
    sample_rate: int
    path: str
    start: Fraction
    file_seconds: float
    file_fps: float


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is looked at in a clip; `key` is all that its rows depend on beside the clip."""

    look: Callable[[Clip], Rows]
    key: str = ""
    of_reference: bool = True  # whether true clips are looked at, too


# ---------------------------------------------------------------- measures


def make_measures(config: MetricsConfig, device: th.device) -> dict[str, Measure]:
    """The measures that the flags allow; ValueError, naming the flag, for a file that cannot be used."""
    paths = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name.endswith(("_path", "_dir"))
    }
    config = dataclasses.replace(
        config, **{name: os.path.expanduser(path) for name, path in paths.items()}
    )
    if config.ref_path:
        find_files(
            folders_in(config.ref_path),
            VIDEO_EXTENSIONS,
            "clips",
            "check --ref_path",
        )
    made = {
        "temporal": Measure(
            lambda c: temporal_align.look(c.video, c.audio, c.fps, c.sample_rate),
            f"opencv {cv2.__version__}",
        ),
        "stereo": Measure(lambda c: stereo.look(c.audio, c.sample_rate)),
        "thumbnail": Measure(lambda c: {"seen": features.thumbnail(c.video)}),
    }
    if config.i3d_path:
        i3d = features.load_i3d(config.i3d_path, device)
        key = f"{features.file_key(config.i3d_path)} {device.type}"
        made["i3d"] = Measure(lambda c: {"features": i3d(c.video)}, key)
    if config.audio_embedding_path:
        embed = features.load_audio_embedding(
            config.audio_embedding_path, config.audio_embedding_input, device
        )
        key = f"{features.file_key(config.audio_embedding_path)} {config.audio_embedding_input} {device.type}"
        made["embedding"] = Measure(lambda c: embed(c.audio, c.sample_rate), key)
    if config.boxes_dir or config.detector_path:
        made["spatial"] = _spatial_measure(config, device)
    elif config.events_dir:
        raise ValueError(
            f"--events_dir {config.events_dir}: needs boxes too; give --boxes_dir or --detector_path"
        )
    return made


def _spatial_measure(config: MetricsConfig, device: th.device) -> Measure:
    for flag in ("boxes_dir", "events_dir"):
        folder = getattr(config, flag)
        if folder and not os.path.isdir(folder):
            raise ValueError(f"--{flag} {folder}: no such folder")
    if config.boxes_dir and config.detector_path:
        raise ValueError("--boxes_dir and --detector_path: give one of them")
    if config.match_categories and not (config.boxes_dir and config.events_dir):
        raise ValueError(
            "--match_categories: only CSV files tell categories; give --boxes_dir and --events_dir"
        )
    detect = (
        None
        if config.boxes_dir
        else spatial_align.load_detector(config.detector, config.detector_path, device)
    )

    def look(clip: Clip) -> Rows:
        name = f"{Path(clip.path).stem}.csv"
        if detect:
            boxes, fps, boxes_start = detect(clip.video), clip.fps, clip.start
        else:  # all of the file's, so that those just outside the window count for events at its edges
            told = spatial_align.read_boxes(
                Path(config.boxes_dir, name), clip.file_fps, clip.file_seconds
            )
            boxes, fps, boxes_start = told, clip.file_fps, spatial_align.FILE_START
        if config.events_dir:
            heard = spatial_align.read_events(Path(config.events_dir, name), clip.file_seconds)
            events = spatial_align.within(
                heard, clip.start, Fraction(len(clip.video)) / Fraction(clip.fps)
            )
            events_start = spatial_align.FILE_START
        else:
            events, events_start = spatial_align.localise(clip.audio, clip.sample_rate), clip.start
        found, missed = spatial_align.hits(
            events, boxes, fps, config.match_categories, events_start, boxes_start
        )
        return {"hits": th.tensor(float(found)), "misses": th.tensor(float(missed))}

    from_files = bool(config.boxes_dir or config.events_dir)
    key = (
        ""
        if from_files
        else f"{features.file_key(config.detector_path)} {config.detector} {device.type}"
    )
    return Measure(look, key, of_reference=not from_files)


@functools.cache
def code_key() -> str:
    """What tells this version of the metrics from others, whose rows are not to be mixed: sha256 of their sources.

    Those of what reads clips are among them: other pictures give other rows.
    """
    sources = [
        *sorted(Path(__file__).parent.glob("*.py")),
        *(Path(str(module.__file__)) for module in READERS),
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


# ---------------------------------------------------------------- looking at clips


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How clips are read; a long file gives clips one after the other."""

    video_size: str
    audio_size: str
    video_fps: int
    audio_fps: int
    num_workers: int = 4
    max_bad_share: float = 0.1

    def mismatch(self) -> str:
        """What is wrong where picture and sound of a clip last unequally, by more than half a frame; else empty."""
        require_positive(video_fps=self.video_fps, audio_fps=self.audio_fps)
        shown = numbers("video_size", self.video_size, 4)[0] / self.video_fps
        heard = numbers("audio_size", self.audio_size, 2)[1] / self.audio_fps
        if abs(shown - heard) * self.video_fps <= 0.5:
            return ""
        return (
            f"--video_size {self.video_size} at --video_fps {self.video_fps} lasts {shown:g} s, but --audio_size"
            f" {self.audio_size} at --audio_fps {self.audio_fps} {heard:g} s"
        )


class ClipFolder:
    """The clips of a folder, by number; DataError for a folder without, or with too many bad ones."""

    def __init__(self, folder: str, sizes: Sizes, flag: str) -> None:
        index = build_index(folder, sizes.max_bad_share, num_workers=sizes.num_workers, flag=flag)
        frames = numbers("video_size", sizes.video_size, 4)[0]
        rates = sizes.video_fps, sizes.audio_fps
        options = {"random_flip": False, "clip_stride": frames, "cache_bytes": 0}
        self.windows = ClipDataset(index, sizes.video_size, sizes.audio_size, *rates, **options)  # type: ignore[arg-type]
        self.folder, self.bad, self.flag, self.sizes = folder, index.bad, flag, sizes
        self.short = sum(
            count_frames(info.duration_seconds, sizes.video_fps) < frames for _, info in index.clips
        )
        self.slow = sum(info.fps < SLOW * sizes.video_fps for _, info in index.clips)
        used = [
            (info, frames * count_windows(info, frames, sizes.video_fps, frames))
            for _, info in index.clips
        ]
        over = [
            count_frames(info.duration_seconds, sizes.video_fps) - count for info, count in used
        ]
        self.unused_seconds = [count / sizes.video_fps for count in over if count > 0]

    def __len__(self) -> int:
        return len(self.windows)

    def clip(self, number: int) -> Clip:
        """Clip `number`; MediaError where it cannot be decoded."""
        path, info, start = self.windows.place(number)
        sample, sizes = self.windows[number], self.sizes
        rates = sizes.video_fps, sizes.audio_fps
        return Clip(
            sample["video"], sample["audio"], *rates, path, start, info.duration_seconds, info.fps
        )

    def name(self, number: int) -> str:
        """What to call clip `number` in a report."""
        path, _, start = self.windows.place(number)
        return f"{path} at {float(start):g} s" if start else path

    def content(self) -> str:
        """What tells these clips from others, wherever they lie."""

        def known_by(path: str) -> list[Any]:
            return [identity(path)["size"], fingerprint(path)]

        with ThreadPoolExecutor(max(1, self.sizes.num_workers)) as pool:
            files = list(pool.map(known_by, [path for path, _ in self.windows.clips]))
        read = {
            k: v for k, v in vars(self.sizes).items() if k not in ("num_workers", "max_bad_share")
        }
        return json.dumps([code_key(), decode.DECODER, read, files], sort_keys=True)

    def notes(self) -> list[str]:
        """What a reader of scores should know of these clips."""
        seconds = self.windows.num_frames / self.sizes.video_fps
        found = (
            [f"--{self.flag}: {len(self.bad)} files left out: {'; '.join(self.bad.values())}"]
            if self.bad
            else []
        )
        if self.short:
            found.append(
                f"--{self.flag}: {self.short} files are shorter than {seconds:g} s: their last frame is repeated, and"
                " silence added"
            )
        if self.unused_seconds:
            found.append(
                f"--{self.flag}: {sum(self.unused_seconds):g} s at the end of {len(self.unused_seconds)} files are left"
                f" out, too short for another clip of {seconds:g} s"
            )
        if self.slow:
            found.append(
                f"--{self.flag}: {self.slow} files have fewer frames than --video_fps {self.sizes.video_fps} a second:"
                " frames are repeated, and Temporal AV-Align means little"
            )
        return found


def look_at(folder: ClipFolder, measures: Mapping[str, Measure], world: World) -> dict[str, Rows]:
    """Measure -> its rows [N, ...] of all clips, on every rank; the ranks share the work."""
    mine = range(world.rank, len(folder), world.size)

    def look(number: int) -> dict[str, Rows]:
        clip = folder.clip(number)
        return {name: measure.look(clip) for name, measure in measures.items()}

    if not measures:
        return {}
    with ThreadPoolExecutor(max(1, folder.sizes.num_workers)) as pool:
        bar = {"total": len(mine), "unit": "clip", "leave": False, "disable": world.rank > 0}
        seen = list(tqdm(pool.map(look, mine), Path(folder.folder).name, **bar))
    shapes = from_rank_0(
        lambda: {m: {row: x.shape for row, x in rows.items()} for m, rows in seen[0].items()}
    )
    found: dict[str, Rows] = {}
    for measure, rows in shapes.items():
        found[measure] = {}
        for row, shape in rows.items():
            whole = th.zeros(len(folder), *shape)
            for number, clip in zip(mine, seen, strict=True):
                whole[number] = clip[measure][row]
            found[measure][row] = all_sum(whole)
    return found


def look_at_reference(
    folder: ClipFolder, measures: Mapping[str, Measure], world: World
) -> dict[str, Rows]:
    """`look_at`, but what was seen of the same content before is taken from the cache."""
    content = from_rank_0(folder.content)

    def place(name: str) -> Path:
        key = hashlib.sha256(f"{name} {measures[name].key} {content}".encode()).hexdigest()[:24]
        return cache_folder() / f"metrics_{key}.npz"

    wanted = {name: measure for name, measure in measures.items() if measure.of_reference}
    known = from_rank_0(lambda: {name: _read(place(name), len(folder)) for name in wanted})
    fresh = look_at(
        folder, {name: wanted[name] for name, rows in known.items() if rows is None}, world
    )
    if world.rank == 0:
        for name, rows in fresh.items():
            _write(place(name), rows)
    return {name: fresh[name] if rows is None else rows for name, rows in known.items()}


def _read(path: Path, count: int) -> Rows | None:
    """What `_write` left; None where there is nothing that can be read."""
    try:
        with np.load(path, allow_pickle=False) as held:
            rows = {name: th.from_numpy(held[name]) for name in held.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return rows if rows and all(len(x) == count for x in rows.values()) else None


def _write(path: Path, rows: Rows) -> None:
    arrays: dict[str, Any] = {name: x.numpy() for name, x in rows.items()}
    try:
        write_atomically(path, lambda temporary: np.savez(temporary, **arrays))
    except OSError as error:
        logger.warn(
            f"{path.parent}: cannot be written ({error.strerror}); the reference is looked at every time"
        )


# ---------------------------------------------------------------- all of it


@dataclasses.dataclass(frozen=True)
class Report:
    """Scores, and all that they depend on."""

    scores: list[Score]
    notes: list[str]
    left_out: list[str]
    settings: dict[str, Any]
    histograms: dict[str, Any] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """The table, what to know when reading it, and what would need which flag."""
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join(
            [table(self.scores), *notes, *(f"left out: {line}" for line in self.left_out)]
        )

    def save(self, folder: str) -> str:
        """Write metrics.json into the folder; another report that is there is kept, and this one numbered."""
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"
        for number in range(1, 10**6):
            path = bf.join(folder, f"metrics_{number}.json" if number > 1 else "metrics.json")
            if not bf.exists(path):
                write_text(path, text)
                return path
            with bf.BlobFile(path, "r") as file:
                if file.read() == text:
                    return path
        raise AssertionError("unreachable")


def check_metrics_config(config: MetricsConfig) -> None:
    """ValueError for metrics flags without --ref_path, where nothing else asks for metrics."""
    given = [
        f.name for f in dataclasses.fields(MetricsConfig) if getattr(config, f.name) != f.default
    ]
    if given and not config.ref_path:
        raise ValueError(f"--{given[0]}: is for metrics, which --ref_path asks for")


def evaluate(
    samples: str, config: MetricsConfig, sizes: Sizes, measures: Mapping[str, Measure], world: World
) -> Report:
    """The report on a folder of clips, on every rank; must be called on all. DataError, MediaError, ValueError."""
    ours = ClipFolder(samples, sizes, "samples_path")
    if config.boxes_dir or config.events_dir:
        _refuse_equal_names([path for path, _ in ours.windows.clips])
    true = ClipFolder(config.ref_path, sizes, "ref_path") if config.ref_path else None
    seen = look_at(ours, measures, world)
    known = look_at_reference(true, measures, world) if true else {}
    scores, notes = compute_scores(seen, known, ours.name, true.name if true else str)
    shown = {f.name: getattr(config, f.name) for f in dataclasses.fields(MetricsConfig)}
    counts = {"samples": len(ours), "reference": len(true) if true else 0}
    settings = {
        "samples_path": samples,
        **shown,
        **vars(sizes),
        "clips": counts,
        "code": code_key(),
    }
    settings |= {"measures": {name: measure.key for name, measure in measures.items()}}
    mismatch = [sizes.mismatch()] if sizes.mismatch() else []
    notes = [*mismatch, *ours.notes(), *(true.notes() if true else []), *notes]
    return Report(scores, notes, _left_out(config), settings, histograms(seen, known))


def _refuse_equal_names(paths: list[str]) -> None:
    """ValueError for clips of other folders, or kinds, that would share the CSV of their name."""
    first: dict[str, str] = {}
    for path in paths:
        if (other := first.setdefault(Path(path).stem, path)) != path:
            raise ValueError(
                f"{other} and {path}: would share {Path(path).stem}.csv; with --boxes_dir or --events_dir every clip"
                " needs a name of its own: rename one, or evaluate their folders one by one"
            )


def _left_out(config: MetricsConfig) -> list[str]:
    missing = [flag for flag in LEFT_OUT if not getattr(config, flag)]
    if config.boxes_dir:
        missing = [flag for flag in missing if flag != "detector_path"]
    return [f"{LEFT_OUT[flag][0]}; --{flag} adds them ({LEFT_OUT[flag][1]})" for flag in missing]


def tell(report: Report, folder: str, world: World) -> None:
    """Show the report and save it into the folder, once for all ranks."""
    if world.rank == 0:
        logger.log(f"{report.settings['samples_path']}\n{report.text()}")
        logger.log(f"all of it: {report.save(folder)}")


def evaluate_drawn(
    folder: str,
    config: MetricsConfig,
    sizes: Mapping[str, Sizes],
    measures: Mapping[str, Measure],
    world: World,
) -> None:
    """Evaluate each of the folders below `folder` that `sizes` names, by itself."""
    for kind, read in sizes.items():
        clips = os.path.join(folder, kind)
        tell(evaluate(clips, config, read, measures, world), clips, world)


def sizes_asked(flags: Mapping[str, Any]) -> Sizes:
    """How the flags ask clips to be read; ValueError where picture and sound would not last equally long."""
    sizes = pick(Sizes, flags)
    if mismatch := sizes.mismatch():
        raise ValueError(f"{mismatch}: make them equal")
    return sizes


def report_folder(config: EvalConfig) -> str:
    """Where the report goes; ValueError where several folders of samples leave that open."""
    folders = folders_in(config.samples_path)
    if config.output_dir in ("", config.samples_path) and len(folders) > 1:
        raise ValueError(
            f"--samples_path {config.samples_path}: are several; give --output_dir for the report"
        )
    return os.path.expanduser(config.output_dir or "".join(folders))


def sizes_of_samples(flags: Mapping[str, Any], upsampler: Mapping[str, Any]) -> dict[str, Sizes]:
    """Folder of clips that were drawn -> how to read them; `upsampler` is its description, empty without one."""
    sizes = {"original": pick(Sizes, flags)}
    if upsampler:
        frames, channels, _, _ = numbers("video_size", flags["video_size"], 4)
        large = upsampler["sr_sizes"][1]
        sizes["sr_mp4"] = dataclasses.replace(
            sizes["original"], video_size=f"{frames},{channels},{large},{large}"
        )
    return sizes
