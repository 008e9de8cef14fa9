"""The settings of evaluation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from .flags import Config, at_least, flag, one_of, path, positive
from .subjects import ClipReadingConfig, DeviceConfig

# What the published evaluations read of a clip; --preset takes these in place of defaults.
_AUDIOCLIP = {
    "audio_embedding_input": "waveform",
    "audio_embedding_fps": 44100,
    "audio_embedding_samples": 80000,
}
EVALUATION_PRESETS: dict[str, dict[str, Any]] = {
    "savgbench": {"i3d_fps": 10, "i3d_frames": 20, **_AUDIOCLIP},
    "mm_diffusion": {"i3d_fps": 10, "i3d_frames": 16, **_AUDIOCLIP},
}


@dataclass(frozen=True)
class MetricsConfig(Config):
    """Metrics."""

    preset: str = flag(
        "",
        "read clips for I3D and the audio embedding as a published evaluation does; explicit flags"
        " prevail: savgbench or mm_diffusion",
        one_of(("", *EVALUATION_PRESETS)),
    )
    ref_path: str = flag("", "folder of reference clips; several with commas")
    i3d_path: str = flag("", "I3D for FVD and KVD: i3d_pretrained_400.pt, or TorchScript")
    i3d_fps: int = flag(0, "frames per second for I3D; 0: video_fps", at_least(0))
    i3d_frames: int = flag(0, "frames for I3D, from a clip's start; 0: all", at_least(0))
    audio_embedding_path: str = flag("", "TorchScript audio embedding, for FAD and KAD")
    audio_embedding_input: str = flag("logmel", "logmel (as VGGish) or waveform")
    audio_embedding_fps: int = flag(16000, "samples per second of its input", positive)
    audio_embedding_samples: int = flag(
        0, "samples of its input, from a clip's start; 0: all", at_least(0)
    )
    detector_path: str = flag("", "weights of the detector of Spatial AV-Align")
    detector: str = flag("fasterrcnn_resnet50_fpn_v2", "of torchvision.models.detection")
    boxes_dir: str = flag("", "CLIP.csv of frame,category,x0,y0,x1,y1 (256 px)")
    events_dir: str = flag("", "CLIP.csv of frame,category,x (10 Hz); empty: localised")
    match_categories: bool = flag(False, "boxes count only for events of their own category")
    bootstrap_draws: int = flag(1000, "draws of files for the intervals; 0: none", at_least(0))


@dataclass(frozen=True)
class EvalConfig(MetricsConfig, ClipReadingConfig, DeviceConfig):
    """Evaluation of a folder of clips."""

    samples_path: str = flag("", "folders of clips to evaluate as one")
    compare: str = flag("", "folders to compare, with commas, in place of samples_path")
    output_dir: str = flag("", "where metrics.json goes; empty: samples_path", path)
    fake_dir: str = flag("", "published name of samples_path")
    ref_dir: str = flag("", "published name of ref_path")
    sample_num: int = flag(
        0, "clips of each folder to evaluate, the first ones; 0: all", at_least(0)
    )

    def check(self) -> None:
        super().check()
        for published, own in {"fake_dir": "samples_path", "ref_dir": "ref_path"}.items():
            value, other = getattr(self, published), getattr(self, own)
            if value and other not in ("", value):
                both = f"--{published} {value} and --{own} {other}"
                raise ValueError(f"{both}: two names of one setting; give one of them")
            object.__setattr__(self, own, value or other)
        if self.compare:
            self._check_comparison()

    def _check_comparison(self) -> None:
        folders = [part.strip() for part in self.compare.split(",") if part.strip()]
        if len(folders) < 2 or len({os.path.normpath(part) for part in folders}) < len(folders):
            need = "need two or more different folders, with commas between"
            raise ValueError(f"--compare {self.compare}: {need}")
        for name in ("samples_path", "boxes_dir", "events_dir"):
            if value := getattr(self, name):
                remedy = f"of one run only; leave out --{name}"
                raise ValueError(f"--compare and --{name} {value}: {remedy}")
        if not self.output_dir:
            raise ValueError("--compare: give --output_dir for the comparison")
