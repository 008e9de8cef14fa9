"""Upsample true frames that were made small, and compare: PSNR, SSIM, Frechet distance, flicker,
time per frame. So that the sampler and the steps of an upsampler can be chosen by numbers.
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
from mm_diffusion.generation.check_upsampler import check, load_upsamplers, table
from mm_diffusion.generation.run import UPSAMPLING

CONFIGS = (UpsamplerCheckConfig, FrameDataConfig, SamplingConfig, *UPSAMPLING)
DEFAULTS = {"sr_diffusion_steps": 1100}  # as published


def main() -> None:
    flags, explicit = parse(__doc__, *CONFIGS, defaults=DEFAULTS)
    config = pick(SamplingConfig, flags)
    world = setup_dist(config.devices)
    logger.configure(enabled=world.rank == 0)
    upsamplers = load_upsamplers(flags, explicit, world.device)
    data = pick(FrameDataConfig, flags)
    index = find_frames(data)
    num_frames = pick(UpsamplerCheckConfig, flags).num_frames
    reports = {}
    for name, upsampler in upsamplers.items():
        found = check(upsampler, index, data, num_frames)
        reports[name] = {**found, "settings": upsampler.description}
    path = os.path.join(config.output_dir, "upsampler.json")
    write_text(path, json.dumps(reports, indent=1) + "\n")
    logger.log(f"{len(index.clips)} clips of {data.data_dir}\n{table(reports)}")
    logger.log(f"saved to {path}")


if __name__ == "__main__":
    with friendly_errors():
        main()
