"""Draw pictures for the stereo sound of given clips, upsample them if an upsampler is given, and write them with the
sound, beside the clips as they were."""

from mm_diffusion import sample_runs
from mm_diffusion.dist_util import friendly_errors

CONFIGS = sample_runs.configs(given=True)
DEFAULTS = {"sample_fn": "ddpm", "random_flip": False, "sr_diffusion_steps": 1100}


def main() -> None:
    sample_runs.run(__doc__, CONFIGS, DEFAULTS, known="audio")


if __name__ == "__main__":
    with friendly_errors():
        main()
