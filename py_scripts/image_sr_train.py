"""Train the upsampler on images (see extract_video.py), or on frames of videos."""

import dataclasses
import functools

import torch as th

from mm_diffusion import logger
from mm_diffusion.config import (
    FrameDataConfig,
    SRDiffusionConfig,
    TrainConfig,
    UpsamplerConfig,
    notes_on,
    parse,
    pick,
)
from mm_diffusion.data.frames import FrameDataset, find_frames, load_frames
from mm_diffusion.dist_util import friendly_errors, setup_dist
from mm_diffusion.generation.previews import make_sr_preview
from mm_diffusion.script_util import (
    SR_CARRIED_FLAGS,
    image_sr_create_model_and_diffusion,
    image_sr_model_and_diffusion_defaults,
)
from mm_diffusion.train_util import TrainLoop
from mm_diffusion.training.resume import flags_to_start_with
from mm_diffusion.training.trackers import make_trackers

CONFIGS = (UpsamplerConfig, SRDiffusionConfig, FrameDataConfig, TrainConfig)
DEFAULTS = {"lr": 1e-4, "batch_size": 6, "sample_fn": "ddim", "preview_clips": 4}


def main() -> None:
    flags, explicit = parse(__doc__, *CONFIGS, defaults=DEFAULTS)
    config = pick(TrainConfig, flags)
    world = setup_dist(config.devices, config.deterministic)
    logger.configure(config.output_dir, world.rank == 0, make_trackers(flags, world.rank))
    for note in notes_on(explicit, *CONFIGS):
        logger.log(note)

    flags = flags_to_start_with(flags, explicit, SR_CARRIED_FLAGS)
    data_config = pick(FrameDataConfig, flags)
    th.manual_seed(config.seed)  # every rank starts from the same weights
    model_flags = {name: flags[name] for name in image_sr_model_and_diffusion_defaults()}
    model, diffusion = image_sr_create_model_and_diffusion(**model_flags)
    size = sum(p.numel() for p in model.parameters())
    logger.log(f"{size:,} parameters on {world.size} x {world.device}")

    index = find_frames(data_config)
    data = functools.partial(load_frames, index, data_config, world)

    def preview_pairs() -> tuple[th.Tensor, th.Tensor]:
        """Large and low-res images: the same few at every save, others on every rank."""
        dataset = FrameDataset(index, dataclasses.replace(data_config, random_flip=False))
        first = world.rank * config.preview_clips
        items = [dataset[k % len(dataset)] for k in range(first, first + config.preview_clips)]
        large = th.stack([image for image, _ in items])
        return large, th.stack([cond["low_res"] for _, cond in items])

    preview = make_sr_preview(pick(SRDiffusionConfig, flags), config, preview_pairs, world)
    use_fp16 = pick(UpsamplerConfig, flags).half_precision
    options = {"use_fp16": use_fp16, "flags": flags, "preview": preview}
    TrainLoop(model, diffusion, data, config, world, **options).run_loop()


if __name__ == "__main__":
    with friendly_errors():
        main()
