"""Evaluation of a folder of clips: compute the measures of every clip, score them, report."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch as th

from ..config import EVALUATION_PRESETS, ClipReadingConfig, EvalConfig, MetricsConfig, pick
from ..config.flags import as_text
from ..data.index import folders_in
from ..dist_util import World, from_rank_0
from ..files import absolute, short_names
from .bootstrap import Resampling
from .clips import ClipFolder, Results
from .comparison import Comparison
from .compute import FORMAT, compute_all, compute_reference
from .measures import Measure, check_i3d_frames, left_out
from .memorisation import QUANTILE, Neighbours, find_neighbours
from .report import CLIPS, Report, publish
from .scores import (
    Score,
    clip_values,
    compute_scores,
    histograms,
    published_scale,
    scores_of_mono,
)

MONO = "figures of stereo and localised events; --audio_size 1,L says that the clips are mono"


def evaluate(
    samples: str,
    config: MetricsConfig,
    sizes: ClipReadingConfig,
    measures: Mapping[str, Measure],
    world: World,
    sample_num: int = 0,
) -> Report:
    """The report on a folder of clips, or its first `sample_num`, on every rank.

    Must be called on all ranks. DataError, MediaError, ValueError.
    """
    check_i3d_frames(config, sizes)
    open_folder = functools.partial(ClipFolder, config=sizes, most=sample_num)
    folder = open_folder(samples, flag="samples_path")
    true_folder = open_folder(config.ref_path, flag="ref_path") if config.ref_path else None
    is_mono = sizes.audio_size[0] == 1
    if is_mono and not config.events_dir:  # which localising needs two channels
        measures = {name: m for name, m in measures.items() if name != "spatial"}
    if config.boxes_dir or config.events_dir:
        _check_names([path for path, _ in folder.files])
    generated, reference = compute_all(folder, measures, world), {}
    if true_folder:
        reference = compute_reference(true_folder, measures, world)
    settings = {
        "samples_path": samples,
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(MetricsConfig)},
        **dataclasses.asdict(sizes),
        "video_size": as_text(sizes.video_size),
        "audio_size": as_text(sizes.audio_size),
        "sample_num": sample_num,
        "format": FORMAT,
        "measures": {name: measure.key for name, measure in measures.items()},
    }
    how = {CLIPS: folder.how(), **{name: measure.how for name, measure in measures.items()}}
    evaluation = Evaluation(config, folder, true_folder, generated, reference)
    return from_rank_0(lambda: _report(evaluation, settings, how))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The clips, and what was computed of them; without a reference its rows are empty."""

    config: MetricsConfig
    folder: ClipFolder
    true_folder: ClipFolder | None
    generated: Results
    reference: Results

    @property
    def is_mono(self) -> bool:
        """Whether the clips are read for a mono model."""
        return self.folder.config.audio_size[0] == 1

    @functools.cached_property
    def neighbours(self) -> Neighbours | None:
        """The nearest reference clips."""
        if not self.true_folder:
            return None
        return find_neighbours(self.generated, self.reference, self.true_folder.file_numbers())

    def files(self) -> tuple[th.Tensor, th.Tensor]:
        """The file of each clip [N], and of each reference clip [M]."""
        true = self.true_folder
        return self.folder.file_numbers(), true.file_numbers() if true else th.zeros(0).long()

    def scores(self) -> tuple[list[Score], list[str]]:
        """The scores that these clips have, and notes on them."""
        draws = self.config.bootstrap_draws
        resampling = Resampling(*self.files(), draws) if draws else None
        scores, notes = compute_scores(self.generated, self.reference, resampling, self.neighbours)
        if self.config.preset:
            scores += published_scale(scores)
        return scores_of_mono(scores) if self.is_mono else scores, notes

    def notes(self) -> list[str]:
        """What a reader should know of the clips."""
        notes = [*filter(None, [self.folder.config.duration_mismatch()]), *self.folder.notes()]
        return notes + (self.true_folder.notes() if self.true_folder else [])

    def pairs(self) -> dict[str, Any]:
        """The threshold of memorisation and the nearest pairs; empty without a reference."""
        if not (self.neighbours and self.true_folder):
            return {}
        pairs = []
        for k in self.neighbours.closest():
            pairs.append(
                {
                    "sample": self.folder.place(k),
                    "reference": self.true_folder.place(int(self.neighbours.index[k])),
                    "distance": self.neighbours.distance[k].item(),
                    "mirrored": bool(self.neighbours.is_flipped[k]),
                }
            )
        return {"threshold": self.neighbours.threshold, "quantile": QUANTILE, "pairs": pairs}


def _report(this: Evaluation, settings: dict[str, Any], how: dict[str, str]) -> Report:
    scores, notes = this.scores()
    if this.neighbours and this.true_folder:
        notes += this.neighbours.notes(this.folder.name, this.true_folder.name)
    missing = left_out(this.config)
    if this.is_mono:
        missing.append(MONO)
    counts = {"samples": len(this.folder), "reference": len(this.true_folder or [])}
    files, true_files = (len(numbers.unique()) for numbers in this.files())
    return Report(
        scores,
        this.notes() + notes,
        missing,
        {**settings, "clips": counts, "files": {"samples": files, "reference": true_files}},
        {} if this.is_mono else histograms(this.generated, this.reference),
        how,
        clips=[this.folder.place(number) for number in range(len(this.folder))],
        clip_values=_listed(clip_values(this.generated, this.neighbours), scores),
        memorisation=this.pairs(),
    )


def _listed(
    values: Mapping[str, th.Tensor], scores: Collection[Score]
) -> dict[str, list[float | None]]:
    """Those of the given scores, None where undefined."""
    found = {}
    for score in scores:
        if score.name in values:
            row = values[score.name].tolist()
            found[score.name] = [None if math.isnan(value) else value for value in row]
    return found


def _check_names(paths: list[str]) -> None:
    """ValueError for clips of different folders, or kinds, with the same CSV file."""
    known: dict[str, str] = {}
    for path in paths:
        stem = Path(path).stem
        if stem in known:
            shared = f"{known[stem]} and {path}: would share {stem}.csv"
            raise ValueError(f"{shared}; rename one, or evaluate the folders separately")
        known[stem] = path


def evaluate_samples(
    folder: str,
    config: MetricsConfig,
    sizes: Mapping[str, ClipReadingConfig],
    measures: Mapping[str, Measure],
    world: World,
) -> list[str]:
    """Evaluate the folders below `folder` that `sizes` names, each by itself.

    Returns the paths of their reports; none but on rank 0.
    """
    paths = []
    for kind, size in sizes.items():
        path = os.path.join(folder, kind)
        paths.append(publish(evaluate(path, config, size, measures, world), path, world))
    return [path for path in paths if path]


def compare(
    config: EvalConfig,
    sizes: ClipReadingConfig,
    measures: Mapping[str, Measure],
    world: World,
) -> Comparison:
    """Every folder of --compare against the same reference; on all ranks."""
    folders = folders_in(config.compare)
    names = short_names([Path(absolute(folder)) for folder in folders])
    runs = {}
    for name, folder in zip(names, folders, strict=True):
        runs[name] = evaluate(folder, config, sizes, measures, world, config.sample_num)
    return Comparison(runs)


# ---------------------------------------------------------------- flags


def with_preset(flags: Mapping[str, Any], explicit: Collection[str]) -> dict[str, Any]:
    """The flags, whose defaults are those of --preset; ValueError for an unknown preset."""
    preset = EVALUATION_PRESETS.get(pick(MetricsConfig, flags).preset, {})
    return {**flags, **{name: value for name, value in preset.items() if name not in explicit}}


def check_metrics_config(config: MetricsConfig) -> None:
    """ValueError for metrics flags without --ref_path in a sampling script."""
    fields = dataclasses.fields(MetricsConfig)
    given = [field.name for field in fields if getattr(config, field.name) != field.default]
    if given and not config.ref_path:
        raise ValueError(f"--{given[0]}: needs --ref_path, which turns metrics on")


def sizes_from_flags(flags: Mapping[str, Any]) -> ClipReadingConfig:
    """How the flags say clips are read; ValueError if video and audio differ in duration."""
    sizes = pick(ClipReadingConfig, flags)
    if mismatch := sizes.duration_mismatch():
        raise ValueError(f"{mismatch}: make them equal")
    return sizes


def sizes_of_samples(
    flags: Mapping[str, Any], upsampler: Mapping[str, Any]
) -> dict[str, ClipReadingConfig]:
    """Folder of generated clips -> how to read it; `upsampler` is empty or describes one."""
    size = pick(ClipReadingConfig, flags)
    if not upsampler:
        return {"original": size}
    side = upsampler["sr_sizes"][1]
    large = dataclasses.replace(size, video_size=(*size.video_size[:2], side, side))
    return {"original": size, "sr_mp4": large}


def report_folder(config: EvalConfig) -> str:
    """Where the report goes; ValueError if there are several folders of samples to choose from."""
    if config.compare:
        return os.path.expanduser(config.output_dir)
    folders = folders_in(config.samples_path)
    if config.output_dir in ("", config.samples_path) and len(folders) > 1:
        where = f"--samples_path {config.samples_path}"
        raise ValueError(f"{where}: several folders; give --output_dir for the report")
    return os.path.expanduser(config.output_dir or "".join(folders))
