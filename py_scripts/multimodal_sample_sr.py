"""Draw clips of video and stereo sound from a trained model."""

import os

import torch as th
from tqdm import tqdm

from mm_diffusion import checkpoint, logger, sampling
from mm_diffusion.dist_util import World, barrier, friendly_errors, from_rank_0, setup_dist
from mm_diffusion.script_util import (
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    SampleConfig,
    merge_checkpoint_flags,
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
    model, diffusion = sampling.load_model(path, weights, flags, config.is_strict, world.device)
    settings = sampling.solver_settings(config)
    sampler = sampling.make_sampler(config.sample_fn, diffusion, config.clip_denoised, **settings)
    stem = f"{config.sample_fn}_samples_{checkpoint.steps_done(path)}_{config.seed}"
    rates = [flags["video_fps"], flags["audio_fps"]]
    description = {
        "checkpoint": checkpoint.fingerprint(weights),
        "sampler": [config.sample_fn, settings, flags["timestep_respacing"], config.clip_denoised],
        "seed": config.seed,
        "use_fp16": flags["use_fp16"],
        "rates": rates,
    }
    todo = from_rank_0(lambda: sampling.missing_clips(folder, stem, config.all_save_num, description))
    mine = todo[world.rank :: world.size]
    logger.log(f"{path}: {config.all_save_num - len(todo)} clips are there, drawing {len(todo)} into {folder}")

    def save(index: int, video: th.Tensor, audio: th.Tensor) -> None:
        sampling.write_sample(folder, f"{stem}_{index:05d}", video, audio, *rates)

    with tqdm(total=len(mine), disable=world.rank > 0, bar_format=sampling.BAR) as bar:
        sampling.draw_clips(
            model,
            sampler,
            mine,
            config.batch_size,
            config.seed,
            world.device,
            save,
            lambda done: bar.update(done - bar.n),
        )
    barrier()
    logger.log(f"{config.all_save_num} clips in {folder}/original (mp4) and {folder}/audios (wav)")


if __name__ == "__main__":
    with friendly_errors():
        main()
