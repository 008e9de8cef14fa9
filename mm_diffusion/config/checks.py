"""Settings of scripts that check: metrics on clips that are spoiled, upsamplers on true frames."""

from __future__ import annotations

from dataclasses import dataclass

from .evaluation import MetricsConfig
from .flags import Config, at_least, flag, positive
from .subjects import ClipReadingConfig, DeviceConfig


@dataclass(frozen=True)
class CheckMetricsConfig(MetricsConfig, ClipReadingConfig, DeviceConfig):
    """Check of the metrics on clips that are spoiled on purpose."""

    data_dir: str = flag("", "folder of true clips; several with commas")
    sample_num: int = flag(0, "clips to take, the first ones; 0: all", at_least(0))
    bright_object: bool = flag(
        False, "toy data: also correlate the bright object with panning and loudness"
    )

    def check(self) -> None:
        for name in ("ref_path", "boxes_dir", "events_dir"):
            value = getattr(self, name)
            if value:
                reason = "the true clips are the reference"
                if name != "ref_path":
                    reason = "such a file knows nothing of the changes; give --detector_path"
                raise ValueError(f"--{name} {value}: {reason}")


@dataclass(frozen=True)
class UpsamplerCheckConfig(Config):
    """Check of an upsampler on true frames."""

    num_frames: int = flag(20, "frames of each video file, the first ones", positive)
