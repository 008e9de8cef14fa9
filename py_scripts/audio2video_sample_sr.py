"""Draw pictures for the stereo sound of given clips, upsample them if an upsampler is given, and write them with the
sound, beside the clips as they were."""

from mm_diffusion import sample_runs
from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.script_util import (
    DataConfig,
    DiffusionConfig,
    GivenConfig,
    MetricsConfig,
    ModelConfig,
    SampleConfig,
    SRDiffusionConfig,
    SRModelConfig,
)

CONFIGS = (
    ModelConfig,
    DiffusionConfig,
    SRModelConfig,
    SRDiffusionConfig,
    DataConfig,
    SampleConfig,
    GivenConfig,
    MetricsConfig,
)
DEFAULTS = {"sample_fn": "ddpm", "random_flip": False, "sr_diffusion_steps": 1100}


def main() -> None:
    sample_runs.run(__doc__, CONFIGS, DEFAULTS, known="audio")


if __name__ == "__main__":
    with friendly_errors():
        main()
