"""Draw stereo sound for the pictures of given clips, and write it with them, beside the clips as they were."""

from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.generation.run import configs, run
from mm_diffusion.script_util import DrawConfig

CONFIGS = configs(DrawConfig, given=True)
DEFAULTS = {"sample_fn": "ddpm", "random_flip": False}


def main() -> None:
    run(__doc__, CONFIGS, DEFAULTS, known="video")


if __name__ == "__main__":
    with friendly_errors():
        main()
