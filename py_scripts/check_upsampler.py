"""Upsample true frames that were made small, and compare: PSNR, SSIM, flicker, time per frame.

So that the sampler and the steps of an upsampler can be chosen by numbers.
"""

import json
import os

from mm_diffusion import logger
from mm_diffusion.config import (
    FrameDataConfig,
    SamplingConfig,
    UpsamplerCheckConfig,
    parse,
    pick,
)
from mm_diffusion.data.frames import find_frames
from mm_diffusion.dist_util import friendly_errors, setup_dist
from mm_diffusion.files import write_text
from mm_diffusion.generation.check_upsampler import check, table
from mm_diffusion.generation.load import load_upsampler
from mm_diffusion.generation.run import UPSAMPLING

CONFIGS = (UpsamplerCheckConfig, FrameDataConfig, SamplingConfig, *UPSAMPLING)
DEFAULTS = {"sr_diffusion_steps": 1100}  # as published


def main() -> None:
    flags, explicit = parse(__doc__, *CONFIGS, defaults=DEFAULTS)
    config = pick(SamplingConfig, flags)
    world = setup_dist(config.devices)
    logger.configure(enabled=world.rank == 0)
    upsampler = load_upsampler(flags, explicit, world.device)
    if upsampler is None:
        raise ValueError("--sr_model_path is empty: name the upsampler to check")
    data = pick(FrameDataConfig, flags)
    index = find_frames(data)
    found = check(upsampler, index, data, pick(UpsamplerCheckConfig, flags).num_frames)
    report = {**found, "settings": upsampler.description}
    path = os.path.join(config.output_dir, "upsampler.json")
    write_text(path, json.dumps(report, indent=1) + "\n")
    logger.log(f"{len(found['clips'])} clips of {data.data_dir}\n{table(found['mean'])}")
    logger.log(f"saved to {path}")


if __name__ == "__main__":
    with friendly_errors():
        main()
