"""Draw clips of video and stereo sound from a trained model, and upsample their frames if an upsampler is given."""

from mm_diffusion import sample_runs
from mm_diffusion.dist_util import friendly_errors

CONFIGS = sample_runs.configs()
DEFAULTS = {
    "sr_diffusion_steps": 1100
}  # as published, for upsamplers that do not carry their flags


def main() -> None:
    sample_runs.run(__doc__, CONFIGS, DEFAULTS)


if __name__ == "__main__":
    with friendly_errors():
        main()
