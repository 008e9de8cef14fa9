"""Train the coupled U-Net on clips of video and stereo sound."""

import torch as th

from mm_diffusion import logger
from mm_diffusion.data.clips import joint_data
from mm_diffusion.dist_util import friendly_errors, setup_dist
from mm_diffusion.generation import previews
from mm_diffusion.script_util import (
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    TrainConfig,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    notes_on,
    parse,
    pick,
)
from mm_diffusion.train_util import TrainLoop, check_train_config
from mm_diffusion.training.resume import flags_to_start_with

CONFIGS = (ModelConfig, DiffusionConfig, DataConfig, TrainConfig)


def main() -> None:
    flags, given = parse(__doc__, *CONFIGS)
    check_train_config(pick(TrainConfig, flags))
    world = setup_dist(flags["devices"])
    logger.configure(
        flags["output_dir"], world.rank == 0, flags["use_db"], flags["use_tensorboard"]
    )
    flags = flags_to_start_with(flags, given)
    config, data_config = pick(TrainConfig, flags), pick(DataConfig, flags)
    th.manual_seed(config.seed)  # every rank starts from the same weights
    model, diffusion = create_model_and_diffusion(
        **{name: flags[name] for name in model_and_diffusion_defaults()}
    )
    preview = previews.make_preview(
        diffusion,
        config.sample_fn,
        config.save_type,
        config.preview_clips,
        config.output_dir,
        data_config,
        world,
    )
    for note in notes_on(given, *CONFIGS):
        logger.log(note)

    logger.log(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {world.size} x {world.device}"
    )
    data = joint_data(flags, world)
    TrainLoop(
        model,
        diffusion,
        data,
        config,
        world,
        use_fp16=flags["use_fp16"],
        flags=flags,
        preview=preview,
    ).run_loop()


if __name__ == "__main__":
    with friendly_errors():
        main()
