"""The runs of learn_toy.py: what each shows, and its flags."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Variant:
    """A run: what it shows, its flags, and whether all images are mirrored without their audio."""

    text: str
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    mirrors_images: bool = False


# The thresholding of dpm_solver++ bounds what the first evaluations make of errors in the noise.
PREDICTS_NOISE = {"predict_xstart": False, "sample_fn": "dpm_solver++"}
PREDICTS_V = {"predict_xstart": False, "prediction": "v"}
NO_SHIFT = {"cross_attention_shift": False}
ROPE = {"cross_attention_rope": True}
MIXED = {"task_mix": "joint:0.5,video2audio:0.25,audio2video:0.25"}
VARIANTS = {
    "no_shift": Variant("windows not shifted; predicts the clip", NO_SHIFT),
    "picture_flip": Variant(
        "the same, but every image mirrored and no channels swapped, as published",
        NO_SHIFT | {"random_flip": False},
        mirrors_images=True,
    ),
    "shift": Variant("windows shifted at random, as published; predicts the clip"),
    "noise": Variant(
        "windows not shifted; predicts the noise, as published", NO_SHIFT | PREDICTS_NOISE
    ),
    "published": Variant(
        "windows shifted at random; predicts the noise: both as published", PREDICTS_NOISE
    ),
    "mixed": Variant("no_shift with mixed tasks", NO_SHIFT | MIXED),
    "mixed_rope": Variant("mixed with rotary time positions", NO_SHIFT | ROPE | MIXED),
    "rope": Variant("shift with rotary time positions", ROPE),
    "rope_mixed": Variant("shift with rotary time positions and mixed tasks", ROPE | MIXED),
    "v": Variant("no_shift, but predicts v", NO_SHIFT | PREDICTS_V),
    "rope_v": Variant("shift with rotary time positions, predicts v", ROPE | PREDICTS_V),
    "rope_v_mixed": Variant(
        "shift with rotary time positions and mixed tasks, predicts v", ROPE | PREDICTS_V | MIXED
    ),
    "published_rope": Variant("published with rotary time positions", ROPE | PREDICTS_NOISE),
}
DEFAULTS = {
    "video_size": "8,3,16,16",
    "audio_size": "2,4096",  # enough samples to be recognisable in as much noise as the video
    "video_fps": 8,  # the toy audio pulses 4 to 5 times a second
    "audio_fps": 4096,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1,2,2",
    "predict_xstart": True,
    "num_head_channels": 32,
    "batch_size": 8,
    "lr": 1e-3,
    "lr_warmup_steps": 200,
    "grad_clip": 1.0,
    "ema_rate": "0.999",
    "num_workers": 1,
    "save_interval": 500,
    "keep_last": 1,
    "output_dir": "output/learn_toy",
}
SHORT_DEFAULTS = {  # as in ssh_scripts/demo.sh
    "video_size": "8,3,8,8",
    "audio_size": "2,1024",
    "video_fps": 4,
    "audio_fps": 512,
    "channel_mult": "1,2,2",
    "batch_size": 16,
    "lr_warmup_steps": 100,
    "ema_rate": "0.995",
    "save_interval": 250,
    "num_clips": 512,
    "minutes": 15.0,
    "output_dir": "output/learn_toy_short",
}
