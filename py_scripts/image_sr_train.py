"""Train the upsampler on pictures, such as extract_video.py makes from videos, or on the frames of videos."""

import torch as th

from mm_diffusion import drawing, logger
from mm_diffusion.dist_util import friendly_errors, setup_dist
from mm_diffusion.frames import load_frames
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
from mm_diffusion.train_util import TrainLoop, flags_to_start_with

CONFIGS = (SRModelConfig, SRDiffusionConfig, FilesConfig, TrainConfig)
DEFAULTS = {"lr": 1e-4, "batch_size": 6, "sample_fn": "ddim", "preview_clips": 4}


def main() -> None:
    flags, given = parse(__doc__, *CONFIGS, defaults=DEFAULTS)
    world = setup_dist(flags["devices"])
    logger.configure(flags["output_dir"] or None, world.rank == 0, flags["use_db"], flags["use_tensorboard"])
    flags = flags_to_start_with(flags, given, SR_CARRIED_FLAGS)
    config = pick(TrainConfig, flags)
    th.manual_seed(config.seed)  # every rank starts from the same weights
    model, diffusion = image_sr_create_model_and_diffusion(
        **{name: flags[name] for name in image_sr_model_and_diffusion_defaults()}
    )
    for note in notes_on(given, *CONFIGS):
        logger.log(note)

    def data(start_sample: int, **changes):
        options = {**vars(pick(FilesConfig, flags)), "batch_size": config.batch_size, "seed": config.seed, **changes}
        return load_frames(
            **options,
            large_size=flags["large_size"],
            small_size=flags["small_size"],
            rank=world.rank,
            world_size=world.size,
            start_sample=start_sample,
        )

    pictures = None
    if config.preview_clips:
        large, cond = next(data(0, batch_size=config.preview_clips, num_workers=0, random_flip=False))
        pictures = large, cond["low_res"]
    preview = drawing.make_sr_preview(flags, config.sample_fn, pictures, config.output_dir, world)
    logger.log(f"{sum(p.numel() for p in model.parameters()):,} parameters on {world.size} x {world.device}")
    TrainLoop(model, diffusion, data, config, world, use_fp16=sr_half(flags), flags=flags, preview=preview).run_loop()


if __name__ == "__main__":
    with friendly_errors():
        main()
