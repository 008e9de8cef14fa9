"""Sample clips of video and stereo audio; upsample their frames if an upsampler is given."""

from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.generation.run import JOINT, UPSAMPLING, run

CONFIGS = (*JOINT, *UPSAMPLING)
DEFAULTS = {
    "sr_diffusion_steps": 1100
}  # as published, for upsamplers that do not carry their flags


def main() -> None:
    run(__doc__, CONFIGS, DEFAULTS)


if __name__ == "__main__":
    with friendly_errors():
        main()
