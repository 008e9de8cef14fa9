"""Draw clips of video and stereo sound from a trained model, and upsample their frames if an upsampler is given."""

import os

import torch as th
from tqdm import tqdm

from mm_diffusion import checkpoint, drawing, logger
from mm_diffusion.dist_util import World, barrier, friendly_errors, from_rank_0, setup_dist
from mm_diffusion.metrics import evaluation
from mm_diffusion.sampling import make_sampler
from mm_diffusion.script_util import (
    DataConfig,
    DiffusionConfig,
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

CONFIGS = (ModelConfig, DiffusionConfig, SRModelConfig, SRDiffusionConfig, DataConfig, SampleConfig, MetricsConfig)
DEFAULTS = {"sr_diffusion_steps": 1100}  # as published, for upsamplers that do not carry their flags


def main() -> None:
    flags, given = parse(__doc__, *CONFIGS, defaults=DEFAULTS)
    config = pick(SampleConfig, flags)
    drawing.check_sample_config(config)
    judge = pick(MetricsConfig, flags)
    evaluation.check_metrics_config(judge)
    world = setup_dist(config.devices)
    logger.configure(enabled=world.rank == 0)
    for note in notes_on(given, *CONFIGS):
        logger.log(note)
    paths = checkpoint.find_checkpoints(config.multimodal_model_path)
    upsampler = drawing.load_upsampler(config, flags, given, world.device)
    measures = evaluation.make_measures(judge, world.device) if judge.ref_path else {}
    for path in paths:
        name = os.path.splitext(os.path.basename(path))[0]
        folder = config.output_dir if len(paths) == 1 else os.path.join(config.output_dir, name)
        sizes = sample_from(path, folder, flags, given, config, world, upsampler)
        if judge.ref_path:
            evaluation.evaluate_drawn(folder, judge, sizes, measures, world)


def sample_from(
    path: str, folder: str, flags: dict, given: set, config: SampleConfig, world: World, upsampler: tuple
) -> dict[str, evaluation.Sizes]:
    """Fill `folder` with clips of one checkpoint; those that are there are kept. -> its folders, how to read them."""
    weights, trained = checkpoint.load_state(path)
    flags = merge_checkpoint_flags(flags, given, trained, path)
    upscale, upsampler_description = upsampler
    drawing.check_frames_fit(flags["video_size"], upsampler_description)
    model, diffusion = drawing.load_model(path, weights, flags, config, world.device)
    settings = drawing.solver_settings(config)
    sampler = make_sampler(config.sample_fn, diffusion, config.clip_denoised, **settings)
    stem = f"{config.sample_fn}_samples_{checkpoint.steps_done(path)}_{config.seed}"
    rates = [flags["video_fps"], flags["audio_fps"]]
    description = {
        "checkpoint": checkpoint.fingerprint(weights),
        "sampler": [config.sample_fn, settings, config.clip_denoised],
        "process": vars(pick(DiffusionConfig, flags)),
        "seed": config.seed,
        "precision": model.precision,
        "rates": rates,
        **upsampler_description,
    }
    todo = from_rank_0(lambda: drawing.missing_clips(folder, stem, config.all_save_num, description))
    mine = todo[world.rank :: world.size]
    logger.log(f"{path}: {config.all_save_num - len(todo)} clips are there, drawing {len(todo)} into {folder}")

    def save(index: int, video: th.Tensor, audio: th.Tensor, large: th.Tensor | None) -> None:
        drawing.write_sample(folder, f"{stem}_{index:05d}", video, audio, *rates, large)

    with tqdm(total=len(mine), disable=world.rank > 0, bar_format=drawing.BAR) as bar:
        run = (model, sampler, mine, config.batch_size, config.seed, world.device, save)
        drawing.draw_clips(*run, lambda done: bar.update(done - bar.n), upscale)
    barrier()
    logger.log(f"{config.all_save_num} clips in {folder}: {'original, sr_mp4' if upscale else 'original'} and audios")
    return evaluation.sizes_of_samples(flags, upsampler_description)


if __name__ == "__main__":
    with friendly_errors():
        main()
