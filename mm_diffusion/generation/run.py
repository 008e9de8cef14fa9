"""From checkpoints to files: models as they are sampled, folders of clips, and previews beside training."""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch as th
from torch import nn
from torch.utils.data import default_collate
from tqdm import tqdm

from .. import checkpoint, logger
from ..data.decode import ClipInfo
from ..data.index import ClipIndex
from ..dist_util import World, barrier, from_rank_0, setup_dist
from ..evaluation import evaluation
from ..files import absolute, short_names
from ..sampling import (
    Sampler,
    make_sampler,
    part_of,
    sample_joint,
)
from ..script_util import (
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
    parse,
    pick,
)
from .conditioning import ConditioningClips, clip_name, find_given
from .load import (
    Upscale,
    check_frames_fit,
    check_sample_config,
    load_model,
    load_upsampler,
    solver_settings,
)
from .output import LARGE, TRUTH, missing_clips, show_gallery, write_sample, write_truth

BAR = "{l_bar}{bar}| {n:.1f}/{total} clips, {remaining} left"
UPSAMPLING_SHARE = 0.85  # of the work of a clip, at the published sizes; for the progress bar


@contextmanager
def background(most_waiting: int = 16) -> Iterator[Callable[..., None]]:
    """`call(name, function, *args)` that returns at once: files are encoded beside the model, in order.

    At most `most_waiting` calls wait; one more waits for the oldest. Leaving waits for all of them. The first error of
    a call, with a note of its `name`, is raised by the next call, or on leaving; what has been drawn is still written.
    """
    waiting: deque[Future] = deque()

    def named(name: str, function: Callable, *args: Any) -> None:
        try:
            function(*args)
        except Exception as error:
            error.add_note(f"while saving {name}")
            raise

    def call(name: str, function: Callable, *args: Any) -> None:
        while waiting and (len(waiting) >= most_waiting or waiting[0].done()):
            waiting.popleft().result()
        waiting.append(pool.submit(named, name, function, *args))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder") as pool:
        yield call
        for future in waiting:
            future.result()


def generate_clips(
    model: nn.Module,
    sampler: Sampler,
    indices: Sequence[int],
    batch_size: int,
    seed: int,
    device: th.device | str,
    save: Callable[[int, th.Tensor, th.Tensor, th.Tensor | None], None],
    progress: Callable[[float], None] | None = None,
    upscale: Upscale | None = None,
    given: Callable[[int], dict[str, th.Tensor]] | None = None,
) -> None:
    """Draw clips number `indices` and `save(index, video [F, C, H, W], audio [C, L], large)` each, beside the model.

    `large` is the upsampled video, None without `upscale`. `given(index)` is the modality of a clip that is known.
    `progress` is called with the number of clips done, fractions included.
    """
    share = UPSAMPLING_SHARE if upscale else 0.0
    with background() as call:
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            drawn = start + len(batch) * (1 - share)
            known = default_collate([given(index) for index in batch]) if given else None
            sample = sample_joint(
                model, sampler, batch, seed, device, part_of(progress, start, drawn), known
            )
            for k, (index, video, audio) in enumerate(
                zip(batch, sample["video"], sample["audio"], strict=True)
            ):
                span = drawn + k * share, drawn + (k + 1) * share
                large = upscale(index, video, part_of(progress, *span)) if upscale else None
                call(f"clip {index}", save, index, video, audio, large)


@dataclasses.dataclass(frozen=True)
class SampleRun:
    """What all checkpoints of one command line have in common. `told`: the flags that were given explicitly."""

    flags: dict[str, Any]
    told: set[str]
    config: SampleConfig
    world: World
    upsampler: tuple[Upscale | None, dict[str, Any]]
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
    check_sample_config(config)
    judge = pick(MetricsConfig, flags)
    evaluation.check_metrics_config(judge)
    world = setup_dist(config.devices)
    logger.configure(enabled=world.rank == 0)
    for note in notes_on(told, *flag_configs):
        logger.log(note)
    paths = checkpoint.find_checkpoints(config.multimodal_model_path)
    upsampler = load_upsampler(config, flags, told, world.device)
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


def sample_from(path: str, folder: str, this: SampleRun) -> dict[str, evaluation.Sizes]:
    """Fill `folder` with clips of one checkpoint; those that are there are kept. -> its folders, how to read them."""
    config, world = this.config, this.world
    weights, trained = checkpoint.load_state(path)
    flags = merge_checkpoint_flags(this.flags, this.told, trained, path)
    upscale, upsampler_description = this.upsampler
    check_frames_fit(flags["video_size"], upsampler_description)
    model, diffusion = load_model(path, weights, flags, config, world.device)
    settings = solver_settings(config)
    scale = pick(GivenConfig, flags).classifier_scale if this.known else 0.0
    sampler = make_sampler(
        config.sample_fn, diffusion, config.clip_denoised, classifier_scale=scale, **settings
    )
    clips = ConditioningClips(this.known, this.index, flags) if this.index else None
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
    todo = from_rank_0(lambda: missing_clips(folder, names, description))
    mine = todo[world.rank :: world.size]
    if clips and world.rank == 0:
        logger.log(f"{clips.data_dir}: {clips.index.report(f'{len(clips)} clips to be given')}")
        clips.write_sources(folder, stem)
    logger.log(f"{path}: {count - len(todo)} clips are there, drawing {len(todo)} into {folder}")

    def save(index: int, video: th.Tensor, audio: th.Tensor, large: th.Tensor | None) -> None:
        if clips:
            write_truth(folder, names[index], clips.truth(index), *rates)
        write_sample(folder, names[index], video, audio, *rates, large)

    with tqdm(total=len(mine), disable=world.rank > 0, bar_format=BAR) as bar:
        options = (model, sampler, mine, config.batch_size, config.seed, world.device, save)
        generate_clips(
            *options, lambda done: bar.update(done - bar.n), upscale, clips.given if clips else None
        )
    barrier()
    kinds = ["original", *([LARGE] if upscale else []), *([TRUTH] if clips else [])]
    logger.log(f"{count} clips in {folder}: {', '.join(kinds)} and audios")
    if config.gallery and world.rank == 0:
        show_gallery(folder)
    return evaluation.sizes_of_samples(flags, upsampler_description)
