"""Generate stereo audio for the video of given clips.

It is written with the video, beside the clips that the video is from.
"""

from mm_diffusion.config import CrossModalConfig
from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.generation.run import JOINT, run

CONFIGS = (*JOINT, CrossModalConfig)
DEFAULTS = {"sample_fn": "ddpm", "random_flip": False}


def main() -> None:
    run(__doc__, CONFIGS, DEFAULTS, modality="video")


if __name__ == "__main__":
    with friendly_errors():
        main()
