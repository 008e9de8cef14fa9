"""Train the coupled U-Net on clips of video and stereo audio."""

import functools

import torch as th

from mm_diffusion import logger
from mm_diffusion.config import (
    DataConfig,
    DiffusionConfig,
    JointTrainConfig,
    ModelConfig,
    notes_on,
    parse,
    pick,
)
from mm_diffusion.data.clips import index_clips, load_data
from mm_diffusion.dist_util import friendly_errors, setup_dist
from mm_diffusion.generation.previews import make_preview
from mm_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from mm_diffusion.train_util import TrainLoop
from mm_diffusion.training.coupling import make_meter
from mm_diffusion.training.resume import flags_to_start_with
from mm_diffusion.training.trackers import make_trackers

CONFIGS = (ModelConfig, DiffusionConfig, DataConfig, JointTrainConfig)


def main() -> None:
    flags, explicit = parse(__doc__, *CONFIGS)
    config = pick(JointTrainConfig, flags)
    world = setup_dist(config.devices, config.deterministic)
    logger.configure(config.output_dir, world.rank == 0, make_trackers(flags, world.rank))
    for note in notes_on(explicit, *CONFIGS):
        logger.log(note)

    flags = flags_to_start_with(flags, explicit)
    data_config = pick(DataConfig, flags)
    th.manual_seed(config.seed)  # every rank starts from the same weights
    model_flags = {name: flags[name] for name in model_and_diffusion_defaults()}
    model, diffusion = create_model_and_diffusion(**model_flags)
    size = sum(p.numel() for p in model.parameters())
    logger.log(f"{size:,} parameters on {world.size} x {world.device}")

    index, share = index_clips(data_config), config.held_out_share
    data = functools.partial(load_data, data_config, world, val_share=share, index=index)
    options = {
        "use_fp16": flags["use_fp16"],
        "flags": flags,
        "preview": make_preview(diffusion, config, data_config, world),
        "task_mix": config.task_mix,
        "meter": make_meter(diffusion, config, data_config, world, index),
    }
    TrainLoop(model, diffusion, data, config, world, **options).run_loop()


if __name__ == "__main__":
    with friendly_errors():
        main()
