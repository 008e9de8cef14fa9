"""Train the upsampler on pictures, such as extract_video.py makes from videos, or on the frames of videos."""

import torch as th

from mm_diffusion import logger
from mm_diffusion.data.frames import FrameDataset, find_frames, load_frames
from mm_diffusion.dist_util import friendly_errors, setup_dist
from mm_diffusion.generation import previews
from mm_diffusion.script_util import (
    SR_CARRIED_FLAGS,
    FilesConfig,
    SRDiffusionConfig,
    SRModelConfig,
    TrainConfig,
    image_sr_create_model_and_diffusion,
    image_sr_model_and_diffusion_defaults,
    notes_on,
    parse,
    pick,
    sr_half,
)
from mm_diffusion.train_util import TrainLoop, check_train_config
from mm_diffusion.training.resume import flags_to_start_with

CONFIGS = (SRModelConfig, SRDiffusionConfig, FilesConfig, TrainConfig)
DEFAULTS = {"lr": 1e-4, "batch_size": 6, "sample_fn": "ddim", "preview_clips": 4}


def main() -> None:
    flags, given = parse(__doc__, *CONFIGS, defaults=DEFAULTS)
    check_train_config(pick(TrainConfig, flags))
    world = setup_dist(flags["devices"])
    logger.configure(
        flags["output_dir"], world.rank == 0, flags["use_db"], flags["use_tensorboard"]
    )
    flags = flags_to_start_with(flags, given, SR_CARRIED_FLAGS)
    for note in notes_on(given, *CONFIGS):
        logger.log(note)
    config, files = pick(TrainConfig, flags), pick(FilesConfig, flags)
    th.manual_seed(config.seed)  # every rank starts from the same weights
    model, diffusion = image_sr_create_model_and_diffusion(
        **{name: flags[name] for name in image_sr_model_and_diffusion_defaults()}
    )
    preview = previews.make_sr_preview(
        flags, config.sample_fn, lambda: pictures(), config.output_dir, world
    )
    index = find_frames(files.data_dir, files.num_workers, files.max_bad_share)
    sizes = (flags["large_size"], flags["small_size"], files.video_fps)

    def pictures() -> tuple[th.Tensor, th.Tensor]:
        """The same few on every save, others on every rank."""
        dataset, first = (
            FrameDataset(index, *sizes, random_flip=False),
            world.rank * config.preview_clips,
        )
        items = [dataset[k % len(dataset)] for k in range(first, first + config.preview_clips)]
        return th.stack([large for large, _ in items]), th.stack(
            [cond["low_res"] for _, cond in items]
        )

    def data(start_sample: int):
        return load_frames(
            index=index,
            batch_size=config.batch_size,
            large_size=flags["large_size"],
            small_size=flags["small_size"],
            video_fps=files.video_fps,
            random_flip=files.random_flip,
            num_workers=files.num_workers,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            start_sample=start_sample,
            cache_dir=files.cache_dir,
        )

    logger.log(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {world.size} x {world.device}"
    )
    made = preview if config.preview_clips else None
    TrainLoop(
        model,
        diffusion,
        data,
        config,
        world,
        use_fp16=sr_half(flags),
        flags=flags,
        preview=made,
    ).run_loop()


if __name__ == "__main__":
    with friendly_errors():
        main()
