"""Settings of scripts that check: metrics on clips that are spoiled, upsamplers on true frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .evaluation import MetricsConfig
from .flags import SR, Config, at_least, flag, positive
from .subjects import ClipReadingConfig, DeviceConfig

# Sampler of the upsampler -> the flag that sets its steps, and how that flag is written
STEPS_FLAGS = {
    "ddpm": ("timestep_respacing", "{}"),
    "ddim": ("timestep_respacing", "ddim{}"),
    "dpm_solver": ("sample_steps", "{}"),
    "dpm_solver++": ("sample_steps", "{}"),
}


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


def names_with_steps(name: str, text: str | tuple[str, ...]) -> tuple[str, ...]:
    """ "ddim:25,dpm_solver:15" -> ("ddim:25", "dpm_solver:15")."""
    parts = text if isinstance(text, tuple) else tuple(filter(None, str(text).split(",")))
    for part in parts:
        sampler, _, steps = part.partition(":")
        if sampler not in STEPS_FLAGS or not steps.isdecimal() or not int(steps):
            known = ", ".join(STEPS_FLAGS)
            raise ValueError(f"--{name} {part!r}: need NAME:STEPS with commas between, of {known}")
    return parts


@dataclass(frozen=True)
class UpsamplerCheckConfig(Config):
    """Check of an upsampler on true frames."""

    num_frames: int = flag(20, "frames of each video file, the first ones", positive)
    samplers: tuple[str, ...] = flag(
        "",
        "samplers to compare, with their steps, such as ddim:25,dpm_solver:15; empty: sr_sample_fn",
        names_with_steps,
    )

    @property
    def sampler_flags(self) -> dict[str, dict[str, Any]]:
        """Each of the samplers -> the flags that choose it."""
        chosen: dict[str, dict[str, Any]] = {}
        for text in self.samplers:
            sampler, _, steps = text.partition(":")
            flag_name, form = STEPS_FLAGS[sampler]
            chosen[text] = {SR + "sample_fn": sampler, SR + flag_name: form.format(steps)}
        return chosen
