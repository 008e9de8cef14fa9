"""A small joint model with weights that make every parameter count, and data for it."""

import golden_data
import torch as th

from mm_diffusion.checkpoint import load_weights, published_state_dict
from mm_diffusion.script_util import create_model_and_diffusion, image_sr_create_model_and_diffusion

FLAGS = {
    "video_size": "4,3,8,8",
    "audio_size": "2,64",
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "num_heads": 2,
    "num_head_channels": 32,
    "cross_attention_resolutions": "1,2",
    "cross_attention_windows": "1,2",
    "video_attention_resolutions": "2",
    "diffusion_steps": 100,
}
PUBLISHED_UPSAMPLER = {
    "large_size": 256,
    "small_size": 64,
    "sr_num_channels": 192,
    "sr_num_res_blocks": 2,
    "sr_num_heads": 4,
    "sr_num_head_channels": -1,
    "sr_num_heads_upsample": -1,
    "sr_attention_resolutions": "8,16,32",
    "sr_dropout": 0.0,
    "sr_class_cond": False,
    "sr_use_scale_shift_norm": True,
    "sr_resblock_updown": True,
    "sr_learn_sigma": True,
    "sr_diffusion_steps": 1000,
    "sr_timestep_respacing": "",
}
SR_FLAGS = {
    "large_size": 32,
    "small_size": 8,
    "sr_num_channels": 32,
    "sr_num_res_blocks": 1,
    "sr_channel_mult": "1,2",
    "sr_num_heads": 2,
    "sr_attention_resolutions": "2",
    "sr_diffusion_steps": 100,
}
SHAPES = {"video": (4, 3, 8, 8), "audio": (2, 64)}


def filled(model):
    """The model with weights that depend on the published names; as built, its outputs are zero."""
    shapes = {name: tuple(value.shape) for name, value in published_state_dict(model).items()}
    load_weights(model, golden_data.weights(shapes))
    return model


def build(as_built=False, **flags):
    model, diffusion = create_model_and_diffusion(**{**FLAGS, **flags})
    return model if as_built else filled(model), diffusion


def build_upsampler(as_built=False, **flags):
    model, diffusion = image_sr_create_model_and_diffusion(**{**SR_FLAGS, **flags})
    return model if as_built else filled(model), diffusion


def clips(first, count):
    """Clips number first .. first + count - 1 of an endless data set."""
    return {
        key: th.stack(
            [
                (0.4 * golden_data.noise(f"{key} {i}", shape)).clamp(-1, 1)
                for i in range(first, first + count)
            ]
        )
        for key, shape in SHAPES.items()
    }


def inputs(batch=2, shapes=SHAPES):
    return (
        golden_data.noise("tiny.video", (batch, *shapes["video"])),
        golden_data.noise("tiny.audio", (batch, *shapes["audio"])),
        th.tensor([3, 71])[:batch],
    )
