"""Generate video for the stereo audio of given clips, and upsample it if an upsampler is given.

It is written with the audio, beside the clips that the audio is from.
"""

from mm_diffusion.config import CrossModalConfig
from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.generation.run import JOINT, UPSAMPLING, run

CONFIGS = (*JOINT, *UPSAMPLING, CrossModalConfig)
DEFAULTS = {"sample_fn": "ddpm", "random_flip": False, "sr_diffusion_steps": 1100}


def main() -> None:
    run(__doc__, CONFIGS, DEFAULTS, modality="audio")


if __name__ == "__main__":
    with friendly_errors():
        main()
