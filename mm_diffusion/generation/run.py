"""A sampling script from its flags to its folders: new clips, or one modality from the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
from torch import nn
from torch.utils.data import default_collate
from tqdm import tqdm

from .. import checkpoint, logger
from ..config import (
    TASKS,
    ClipReadingConfig,
    Config,
    CrossModalConfig,
    DataConfig,
    DiffusionConfig,
    MetricsConfig,
    ModelConfig,
    SamplerConfig,
    SamplingConfig,
    SRDiffusionConfig,
    SRSamplerConfig,
    UpsamplerConfig,
    UpsamplingConfig,
    notes_on,
    parse,
    pick,
)
from ..config.flags import shares_of
from ..data import encode
from ..data.decode import ClipInfo
from ..data.index import ClipIndex, build_index, probe_folders
from ..dist_util import World, barrier, from_rank_0, setup_dist
from ..evaluation.evaluate import (
    check_metrics_config,
    evaluate_samples,
    sizes_of_samples,
    with_preset,
)
from ..evaluation.measures import check_i3d_frames, make_measures
from ..files import absolute, short_names
from ..nn import use_norm_kernel
from ..sampling import Progress, Sampler, make_sampler, part_of, sample_joint
from ..script_util import merge_checkpoint_flags
from ..viewing.metrics_page import write_metrics_page
from . import output
from .conditioning import ConditioningClips
from .load import Upsampler, Weights, check_frames_fit, load_model, load_upsampler

BAR = "{l_bar}{bar}| {n:.1f}/{total} clips, {remaining} left"
UPSAMPLING_SHARE = 0.85  # of the work of a clip, at the published sizes; for the progress bar

JOINT = (ModelConfig, DiffusionConfig, DataConfig, SamplingConfig, SamplerConfig, MetricsConfig)
UPSAMPLING = (UpsamplerConfig, SRDiffusionConfig, SRSamplerConfig, UpsamplingConfig)

Save = Callable[[int, th.Tensor, th.Tensor, th.Tensor | None], None]


def generate_clips(
    model: nn.Module,
    sampler: Sampler,
    indices: Sequence[int],
    save: Save,
    *,
    batch_size: int,
    seed: int,
    device: th.device | str = "cpu",
    progress: Progress | None = None,
    upsampler: Callable[[int, th.Tensor, Progress], th.Tensor] | None = None,
    conditioning: Callable[[int], dict[str, th.Tensor]] | None = None,
) -> None:
    """Generate clips number `indices` and `save(index, video, audio, large)` each meanwhile.

    video [F, C, H, W], audio [C, L]; `large` is the upsampled video, None without `upsampler`.
    conditioning: index -> the modality that is known. progress: called with the number of clips
    done, fractions included.
    """
    share = UPSAMPLING_SHARE if upsampler else 0.0
    with output.background() as call:
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            sampled = start + len(batch) * (1 - share)  # clips' worth of work done after sampling
            known = default_collate([conditioning(k) for k in batch]) if conditioning else None
            part = part_of(progress, start, sampled)
            sample = sample_joint(model, sampler, batch, seed, device, part, known)
            clips = zip(batch, sample["video"], sample["audio"], strict=True)
            for k, (index, video, audio) in enumerate(clips):
                large = None
                if upsampler:
                    part = part_of(progress, sampled + k * share, sampled + (k + 1) * share)
                    large = upsampler(index, video, part)
                call(f"clip {index}", save, index, video, audio, large)


@dataclass(frozen=True)
class SamplingRun:
    """What all checkpoints of one command line have in common."""

    flags: dict[str, Any]
    explicit: set[str]
    config: SamplingConfig
    world: World
    upsampler: Upsampler | None
    modality: str = ""  # that conditions the other one
    index: ClipIndex[ClipInfo] | None = None


def run(
    text: str,
    configs: Sequence[type[Config]],
    defaults: Mapping[str, Any] | None = None,
    modality: str = "",
) -> None:
    """A sampling script: `text` is its help, `modality` the conditioning one, if any."""
    flags, explicit = parse(text, *configs, defaults=defaults)
    pick(SamplerConfig, flags)  # an early error
    check_metrics_config(pick(MetricsConfig, flags))
    flags = with_preset(flags, explicit)
    config, metrics = pick(SamplingConfig, flags), pick(MetricsConfig, flags)
    world = setup_dist(config.devices, config.deterministic)
    use_norm_kernel(config.norm_kernel)
    logger.configure(enabled=world.rank == 0)
    for note in notes_on(explicit, *configs):
        logger.log(note)
    if modality and metrics.ref_path and not flags["data_dir"]:  # as published
        logger.log(f"--ref_path {metrics.ref_path}: its clips condition, too, without --data_dir")
        flags["data_dir"] = metrics.ref_path
    paths = checkpoint.find_checkpoints(config.multimodal_model_path)
    has_upsampler = UpsamplingConfig in configs
    upsampler = load_upsampler(flags, explicit, world.device) if has_upsampler else None
    index = find_clips(flags) if modality else None
    this = SamplingRun(flags, explicit, config, world, upsampler, modality, index)
    measures = make_measures(metrics, world.device) if metrics.ref_path else {}
    # What is refused is refused before anything is sampled.
    if metrics.ref_path:
        find_references(metrics.ref_path, flags)
    for path in paths[1:]:
        load_checked(path, this)
    for path, folder in zip(paths, output_folders(config.output_dir, paths), strict=True):
        sizes = sample_from(path, folder, this)
        if metrics.ref_path:
            for report in evaluate_samples(folder, metrics, sizes, measures, world):
                logger.log(f"page of the metrics: {write_metrics_page(report)}")


def output_folders(output_dir: str, checkpoints: Sequence[str]) -> list[str]:
    """The output folder of each checkpoint: a folder of its own if there are several."""
    if len(checkpoints) == 1:
        return [output_dir]
    names = short_names([Path(absolute(path)).with_suffix("") for path in checkpoints])
    return [os.path.join(output_dir, name) for name in names]


def find_clips(flags: Mapping[str, Any]) -> ClipIndex[ClipInfo]:
    """The index of `data_dir`; DataError where it is no folder of clips."""
    config = pick(DataConfig, flags)
    streams = config.video_stream, config.audio_stream
    return probe_folders(config.data_dir, config.num_workers, *streams)


def find_references(ref_path: str, flags: Mapping[str, Any]) -> None:
    """Index the reference clips, as the evaluation will; DataError where that cannot be done."""
    reading = pick(ClipReadingConfig, flags)
    options = {"num_workers": reading.num_workers, "flag": "ref_path"}
    build_index(ref_path, reading.max_bad_share, **options)


def load_checked(path: str, this: SamplingRun) -> tuple[Weights, dict[str, Any]]:
    """The weights of a checkpoint, and the flags that they are sampled with.

    ValueError where its clips could not be made or written as the flags say.
    """
    weights, trained = checkpoint.load_state(path)
    flags = merge_checkpoint_flags(this.flags, this.explicit, trained, path)
    data = pick(DataConfig, flags)
    data.check_durations()
    pick(ModelConfig, flags)
    encode.check_audio_codec(this.config.audio_codec, data.audio_fps)
    check_frames_fit(data.video_size, this.upsampler)
    check_i3d_frames(pick(MetricsConfig, flags), pick(ClipReadingConfig, flags))
    return weights, flags


def sample_from(path: str, folder: str, this: SamplingRun) -> dict[str, ClipReadingConfig]:
    """Fill `folder` with clips of one checkpoint, keeping those that are there.

    Returns its folders of clips and how to read them.
    """
    config, world, upsampler = this.config, this.world, this.upsampler
    weights, flags = load_checked(path, this)
    data, how = pick(DataConfig, flags), pick(SamplerConfig, flags)
    model, diffusion = load_model(path, weights, flags, config, world.device)
    cross = conditioning_settings(flags, this.modality) if this.modality else {}
    settings = {**cross, **how.solver_settings()}
    sampler = make_sampler(how.sample_fn, diffusion, config.clip_denoised, **settings)
    clips = ConditioningClips(this.modality, this.index, data) if this.index else None
    count = min(config.all_save_num, len(clips)) if clips else config.all_save_num
    stem = f"{how.sample_fn}_samples_{checkpoint.steps_done(path)}_{config.seed}"
    names = [output.clip_name(stem, k) for k in range(count)]
    more = [output.LARGE] if upsampler else []
    more += [output.TRUTH] if clips else []
    upsampling = upsampler.description if upsampler else {}
    description = {
        "checkpoint": checkpoint.fingerprint(weights),
        "precision": model.precision,
        "given": [this.modality, *cross.values(), from_rank_0(clips.fingerprint)] if clips else [],
        **describe(flags),
        **upsampling,
    }
    todo = from_rank_0(lambda: output.missing_clips(folder, names, description, *more))
    if clips and world.rank == 0:
        report = clips.index.report(f"{len(clips)} conditioning clips")
        logger.log(f"{clips.index.data_dir}: {report}")
        clips.write_sources(folder, stem)
    logger.log(f"{path}: {count - len(todo)} clips exist, generating {len(todo)} in {folder}")
    clip_format = output.ClipFormat(data.video_fps, data.audio_fps, config.audio_codec)
    # On a CPU it would take the cores that sampling needs.
    draws = config.gallery and world.rank == 0 and world.device.type == "cuda"
    drawer = output.GalleryDrawer(folder) if draws else None
    save = saver(folder, names, clip_format, clips, drawer)
    mine = todo[world.rank :: world.size]
    with tqdm(total=len(mine), disable=world.rank > 0, bar_format=BAR) as bar:
        options: dict[str, Any] = {
            "batch_size": config.batch_size,
            "seed": config.seed,
            "device": world.device,
            "progress": lambda done: bar.update(done - bar.n),
            "upsampler": upsampler,
            "conditioning": clips.conditioning if clips else None,
        }
        generate_clips(model, sampler, mine, save, **options)
    barrier()
    logger.log(f"{count} clips in {folder}: {', '.join(['original', *more])} and audios")
    if drawer:
        drawer.wait()
    if config.gallery and world.rank == 0:
        output.show_gallery(folder)
    return sizes_of_samples(flags, upsampling)


def conditioning_settings(flags: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """How make_sampler conditions on `modality`: `auto` is clean if the checkpoint learned that."""
    config = pick(CrossModalConfig, flags)
    learned = shares_of(TASKS)("task_mix", flags.get("task_mix", "joint"))
    has_learned = modality in [TASKS[name] for name in learned]
    way = config.conditioning
    if way == "auto":
        way = "clean" if has_learned and not config.classifier_scale else "replacement"
    logger.log(f"conditioning on {modality}: {way}")
    if way == "clean" and not has_learned:
        logger.warn("the checkpoint has not learned that (--task_mix); try --conditioning auto")
    return {"classifier_scale": config.classifier_scale, "conditioning": way}


def describe(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the clips of a checkpoint, as far as flags do."""
    config, how = pick(SamplingConfig, flags), pick(SamplerConfig, flags)
    data = pick(DataConfig, flags)
    return {
        "sampler": [how.sample_fn, how.solver_settings(), config.clip_denoised],
        "process": vars(pick(DiffusionConfig, flags)),
        "seed": config.seed,
        "rates": [data.video_fps, data.audio_fps],
        "audio_codec": config.audio_codec,
    }


def saver(
    folder: str,
    names: Sequence[str],
    how: output.ClipFormat,
    clips: ConditioningClips | None,
    drawer: output.GalleryDrawer | None = None,
) -> Save:
    """A function that writes the files of a clip, and of the one it is conditioned on.

    Meanwhile the `drawer`, if any, draws the clips that are there.
    """

    def save(index: int, video: th.Tensor, audio: th.Tensor, large: th.Tensor | None) -> None:
        if clips:
            output.write_truth(folder, names[index], clips.truth(index), how)
        output.write_sample(folder, names[index], video, audio, how, large)
        if drawer:
            drawer.draw_meanwhile()

    return save
