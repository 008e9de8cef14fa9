"""All settings: one frozen dataclass per subject, and the command line that is made from them.

A field stands once, with its default and help text; what subjects share is a base class. Flags have
the fields' names, those of the upsampler begin with "sr_". A list is text with commas on the
command line and in checkpoints ("2,4,8"), and a tuple in a config.
"""

# ruff: noqa: F401 (names for other modules)

from .checks import CheckMetricsConfig, UpsamplerCheckConfig
from .command_line import Parser, flag_defaults, notes_on, parse, pick
from .diffusion import DiffusionConfig, SRDiffusionConfig
from .evaluation import EVALUATION_PRESETS, EvalConfig, MetricsConfig
from .flags import SR, Config, channel_multipliers, require_positive
from .subjects import (
    TASKS,
    BatchConfig,
    ClipConfig,
    ClipReadingConfig,
    CrossModalConfig,
    DataConfig,
    DeviceConfig,
    FilesConfig,
    FrameDataConfig,
    JointTrainConfig,
    ModelConfig,
    SamplerConfig,
    SamplingConfig,
    SRSamplerConfig,
    TrainConfig,
    UpsamplerConfig,
    UpsamplingConfig,
)
