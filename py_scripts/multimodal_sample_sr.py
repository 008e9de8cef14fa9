"""Draw clips of video and stereo sound from a trained model."""

import os

from tqdm import tqdm

from mm_diffusion import checkpoint, logger, sampling
from mm_diffusion.dist_util import World, barrier, friendly_errors, from_rank_0, setup_dist
from mm_diffusion.script_util import (
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    SampleConfig,
    create_model_and_diffusion,
    merge_checkpoint_flags,
    model_and_diffusion_defaults,
    notes_on,
    parse,
    pick,
)


def main() -> None:
    flags, given = parse(__doc__, ModelConfig, DiffusionConfig, DataConfig, SampleConfig)
    config = pick(SampleConfig, flags)
    sampling.check_sample_config(config)
    world = setup_dist(config.devices)
    logger.configure(enabled=world.rank == 0)
    for note in notes_on(given):
        logger.log(note)
    paths = checkpoint.find_checkpoints(config.multimodal_model_path)
    for path in paths:
        name = os.path.splitext(os.path.basename(path))[0]
        folder = config.output_dir if len(paths) == 1 else os.path.join(config.output_dir, name)
        sample_from(path, folder, flags, given, config, world)


def sample_from(path: str, folder: str, flags: dict, given: set, config: SampleConfig, world: World) -> None:
    """Fill `folder` with clips of one checkpoint; clips that are there already are kept."""
    weights, trained = checkpoint.load_state(path)
    flags = merge_checkpoint_flags(flags, given, trained, path)
    model, diffusion = create_model_and_diffusion(**{name: flags[name] for name in model_and_diffusion_defaults()})
    settings = sampling.solver_settings(
        config.sample_steps, config.solver_order, config.solver_method, config.skip_type
    )
    sampler = sampling.make_sampler(config.sample_fn, diffusion, config.clip_denoised, **settings)
    misfits = checkpoint.load_weights(model, weights, strict=config.is_strict, name=path)
    if misfits:
        logger.warn(f"{path}: {len(misfits)} tensors left out: {', '.join(misfits)}")
    precision = sampling.half_precision(world.device) if flags["use_fp16"] else "fp32"
    model = sampling.prepare(model.to(world.device), precision)
    stem = f"{config.sample_fn}_samples_{checkpoint.steps_done(path)}_{config.seed}"
    rates = [flags["video_fps"], flags["audio_fps"]]
    description = {
        "checkpoint": checkpoint.fingerprint(weights),
        "sampler": [config.sample_fn, settings, flags["timestep_respacing"], config.clip_denoised],
        "seed": config.seed,
        "precision": precision,
        "rates": rates,
    }
    todo = from_rank_0(lambda: sampling.missing_clips(folder, stem, config.all_save_num, description))
    mine = todo[world.rank :: world.size]
    logger.log(f"{path}: {config.all_save_num - len(todo)} clips are there, drawing {len(todo)} into {folder}")
    with tqdm(
        total=len(mine),
        unit="clip",
        disable=world.rank > 0,
        bar_format="{l_bar}{bar}| {n:.1f}/{total} clips, {remaining} left",
    ) as bar:
        sampling.draw_clips(
            model,
            sampler,
            mine,
            config.batch_size,
            config.seed,
            world.device,
            save=lambda k, video, audio: sampling.write_sample(folder, f"{stem}_{k:05d}", video, audio, *rates),
            progress=lambda done: bar.update(done - bar.n),
        )
    barrier()
    logger.log(f"{config.all_save_num} clips in {folder}/original (mp4) and {folder}/audios (wav)")


if __name__ == "__main__":
    with friendly_errors():
        main()
