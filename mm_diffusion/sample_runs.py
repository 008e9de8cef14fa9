"""A sampling script from its flags to its folders: new clips, or one modality of clips to fit the other."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch as th
from tqdm import tqdm

from . import checkpoint, drawing, logger, media
from .clip_index import ClipIndex, absolute, identity, probe_folders, refuse_if_bad
from .curves import short_names
from .datasets import ClipDataset, count_frames, locate, require_positive
from .dist_util import World, barrier, from_rank_0, setup_dist
from .media import ClipInfo
from .metrics import evaluation
from .sampling import make_sampler
from .script_util import (
    DataConfig,
    DiffusionConfig,
    DrawConfig,
    GivenConfig,
    MetricsConfig,
    ModelConfig,
    SampleConfig,
    SRDiffusionConfig,
    SRModelConfig,
    merge_checkpoint_flags,
    notes_on,
    numbers,
    parse,
    pick,
)

SOURCES = "sources.csv"


class GivenClips:
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

        media.atomically(Path(folder, SOURCES), write)


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


@dataclasses.dataclass(frozen=True)
class SampleRun:
    """What all checkpoints of one command line have in common. `told`: the flags that were given explicitly."""

    flags: dict[str, Any]
    told: set[str]
    config: SampleConfig
    world: World
    upsampler: tuple[drawing.Upscale | None, dict[str, Any]]
    known: str = ""
    index: ClipIndex[ClipInfo] | None = None


def run(
    text: str,
    flag_configs: Sequence[type],
    defaults: Mapping[str, Any] | None = None,
    known: str = "",
) -> None:
    """A sampling script: `text` is its help, `flag_configs` its flags, `known` what it is given, if anything."""
    flags, told = parse(text, *flag_configs, defaults=defaults)
    draws = pick(SampleConfig if SampleConfig in flag_configs else DrawConfig, flags)
    config = SampleConfig(**dataclasses.asdict(draws))
    drawing.check_sample_config(config)
    judge = pick(MetricsConfig, flags)
    evaluation.check_metrics_config(judge)
    world = setup_dist(config.devices)
    logger.configure(enabled=world.rank == 0)
    for note in notes_on(told, *flag_configs):
        logger.log(note)
    paths = checkpoint.find_checkpoints(config.multimodal_model_path)
    upsampler = drawing.load_upsampler(config, flags, told, world.device)
    this = SampleRun(
        flags, told, config, world, upsampler, known, find_given(flags) if known else None
    )
    measures = evaluation.make_measures(judge, world.device) if judge.ref_path else {}
    names = (
        [""]
        if len(paths) == 1
        else short_names([Path(absolute(path)).with_suffix("") for path in paths])
    )
    for path, name in zip(paths, names, strict=True):
        folder = os.path.join(config.output_dir, name) if name else config.output_dir
        sizes = sample_from(path, folder, this)
        if judge.ref_path:
            evaluation.evaluate_drawn(folder, judge, sizes, measures, world)


def configs(draws: type = SampleConfig, given: bool = False) -> tuple[type, ...]:
    """The flags of a sampling script, with those of an upsampler unless it only `draws` as DrawConfig says."""
    upsampler = (SRModelConfig, SRDiffusionConfig) if draws is SampleConfig else ()
    known = (GivenConfig,) if given else ()
    return (ModelConfig, DiffusionConfig, *upsampler, DataConfig, draws, *known, MetricsConfig)


def find_given(flags: Mapping[str, Any]) -> ClipIndex[ClipInfo]:
    """The index of `data_dir`; DataError where it is no folder of clips."""
    config = pick(DataConfig, flags)
    return probe_folders(
        config.data_dir, config.num_workers, config.video_stream, config.audio_stream
    )


def sample_from(path: str, folder: str, this: SampleRun) -> dict[str, evaluation.Sizes]:
    """Fill `folder` with clips of one checkpoint; those that are there are kept. -> its folders, how to read them."""
    config, world = this.config, this.world
    weights, trained = checkpoint.load_state(path)
    flags = merge_checkpoint_flags(this.flags, this.told, trained, path)
    upscale, upsampler_description = this.upsampler
    drawing.check_frames_fit(flags["video_size"], upsampler_description)
    model, diffusion = drawing.load_model(path, weights, flags, config, world.device)
    settings = drawing.solver_settings(config)
    scale = pick(GivenConfig, flags).classifier_scale if this.known else 0.0
    sampler = make_sampler(
        config.sample_fn, diffusion, config.clip_denoised, classifier_scale=scale, **settings
    )
    clips = GivenClips(this.known, this.index, flags) if this.index else None
    count = min(config.all_save_num, len(clips)) if clips else config.all_save_num
    stem = f"{config.sample_fn}_samples_{checkpoint.steps_done(path)}_{config.seed}"
    names = [clip_name(stem, k) for k in range(count)]
    rates = flags["video_fps"], flags["audio_fps"]
    description = {
        "checkpoint": checkpoint.fingerprint(weights),
        "sampler": [config.sample_fn, settings, config.clip_denoised],
        "process": vars(pick(DiffusionConfig, flags)),
        "seed": config.seed,
        "precision": model.precision,
        "rates": rates,
        "given": [this.known, scale, from_rank_0(clips.fingerprint)] if clips else [],
        **upsampler_description,
    }
    todo = from_rank_0(lambda: drawing.missing_clips(folder, names, description))
    mine = todo[world.rank :: world.size]
    if clips and world.rank == 0:
        logger.log(f"{clips.data_dir}: {clips.index.report(f'{len(clips)} clips to be given')}")
        clips.write_sources(folder, stem)
    logger.log(f"{path}: {count - len(todo)} clips are there, drawing {len(todo)} into {folder}")

    def save(index: int, video: th.Tensor, audio: th.Tensor, large: th.Tensor | None) -> None:
        if clips:
            drawing.write_truth(folder, names[index], clips.truth(index), *rates)
        drawing.write_sample(folder, names[index], video, audio, *rates, large)

    with tqdm(total=len(mine), disable=world.rank > 0, bar_format=drawing.BAR) as bar:
        options = (model, sampler, mine, config.batch_size, config.seed, world.device, save)
        drawing.draw_clips(
            *options, lambda done: bar.update(done - bar.n), upscale, clips.given if clips else None
        )
    barrier()
    kinds = ["original", *([drawing.LARGE] if upscale else []), *([drawing.TRUTH] if clips else [])]
    logger.log(f"{count} clips in {folder}: {', '.join(kinds)} and audios")
    if config.gallery and world.rank == 0:
        drawing.show_gallery(folder)
    return evaluation.sizes_of_samples(flags, upsampler_description)
