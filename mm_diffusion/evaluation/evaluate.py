"""Evaluation of a folder of clips: compute the measures of every clip, score them, report."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..config import EVALUATION_PRESETS, ClipReadingConfig, EvalConfig, MetricsConfig, pick
from ..config.flags import as_text
from ..data.index import folders_in
from ..dist_util import World
from .clips import ClipFolder
from .compute import FORMAT, compute_all, compute_reference
from .measures import Measure, left_out
from .report import CLIPS, Report, publish
from .scores import compute_scores, histograms, published_scale, scores_of_mono

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
    open_folder = functools.partial(ClipFolder, config=sizes, most=sample_num)
    folder = open_folder(samples, flag="samples_path")
    true_folder = open_folder(config.ref_path, flag="ref_path") if config.ref_path else None
    is_mono = sizes.audio_size[0] == 1
    if is_mono and not config.events_dir:  # which localising needs two channels
        measures = {name: m for name, m in measures.items() if name != "spatial"}
    if config.boxes_dir or config.events_dir:
        _check_names([path for path, _ in folder.files])
    generated, reference = compute_all(folder, measures, world), {}
    notes = [*filter(None, [sizes.duration_mismatch()]), *folder.notes()]
    names = [folder.name]
    if true_folder:
        reference = compute_reference(true_folder, measures, world)
        notes += true_folder.notes()
        names.append(true_folder.name)
    scores, score_notes = compute_scores(generated, reference, *names)
    if config.preset:
        scores += published_scale(scores)
    if is_mono:
        scores = scores_of_mono(scores)
    settings = {
        "samples_path": samples,
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(MetricsConfig)},
        **dataclasses.asdict(sizes),
        "video_size": as_text(sizes.video_size),
        "audio_size": as_text(sizes.audio_size),
        "sample_num": sample_num,
        "clips": {"samples": len(folder), "reference": len(true_folder or [])},
        "format": FORMAT,
        "measures": {name: measure.key for name, measure in measures.items()},
    }
    how = {CLIPS: folder.how(), **{name: measure.how for name, measure in measures.items()}}
    missing = left_out(config)
    if is_mono:
        missing.append(MONO)
    shares = {} if is_mono else histograms(generated, reference)
    return Report(scores, notes + score_notes, missing, settings, shares, how)


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
) -> None:
    """Evaluate the folders below `folder` that `sizes` names, each by itself."""
    for kind, size in sizes.items():
        path = os.path.join(folder, kind)
        publish(evaluate(path, config, size, measures, world), path, world)


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
    folders = folders_in(config.samples_path)
    if config.output_dir in ("", config.samples_path) and len(folders) > 1:
        where = f"--samples_path {config.samples_path}"
        raise ValueError(f"{where}: several folders; give --output_dir for the report")
    return os.path.expanduser(config.output_dir or "".join(folders))
