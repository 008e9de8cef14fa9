"""Draw pictures for the stereo sound of given clips, upsample them if an upsampler is given, and write them with the
sound, beside the clips as they were."""

from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.generation.run import configs, run

CONFIGS = configs(given=True)
DEFAULTS = {"sample_fn": "ddpm", "random_flip": False, "sr_diffusion_steps": 1100}


def main() -> None:
    run(__doc__, CONFIGS, DEFAULTS, known="audio")


if __name__ == "__main__":
    with friendly_errors():
        main()
