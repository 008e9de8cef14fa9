"""The models that are measured, and what they are measured on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch as th
from measure import device, flop_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mm_diffusion import checkpoint
from mm_diffusion.dist_util import World
from mm_diffusion.respace import SpacedDiffusion
from mm_diffusion.sampling import InferenceModel, bind
from mm_diffusion.script_util import (
    SR,
    TrainConfig,
    create_model_and_diffusion,
    image_sr_create_model_and_diffusion,
    image_sr_model_and_diffusion_defaults,
    model_and_diffusion_defaults,
)
from mm_diffusion.train_util import TrainLoop
from mm_diffusion.tree import Tree, tree_map
from mm_diffusion.unet import window_shift

SEED = 0
MIDDLE_STEP = 371  # a timestep like any other
SMALL_FLAGS = {
    "video_size": "8,3,32,32",
    "audio_size": "2,8192",
    "channel_mult": "1,2,3",
    "num_channels": 64,
}
SMALL_SR_FLAGS = {
    "small_size": 32,
    "large_size": 128,
    "sr_num_channels": 64,
    "sr_num_res_blocks": 1,
}


@dataclass(frozen=True)
class Size:
    """A model by its flags, with weights drawn at random or from a checkpoint, whose flags count."""

    flags: dict[str, Any] = field(default_factory=dict)
    upsampler: bool = False
    weights: str = ""


MODELS = {
    "base": Size(),
    "small_base": Size(SMALL_FLAGS),
    "upsampler": Size(upsampler=True),
    "small_upsampler": Size(SMALL_SR_FLAGS, upsampler=True),
}
UPSAMPLED_BY = {"base": "upsampler", "small_base": "small_upsampler"}


def build(size: Size, **flags: Any) -> tuple[nn.Module, SpacedDiffusion]:
    """Model and diffusion, `flags` before all others.

    Random weights predict the clip: noise that they predict would drive every sample to the ends of its range.
    """
    th.manual_seed(SEED)
    prefix = SR if size.upsampler else ""
    target = {} if size.weights else {f"{prefix}predict_xstart": True}
    model, diffusion = create(size, **target | flags)
    if size.weights:
        checkpoint.load_weights(model, size.weights)
    else:
        stir(model)
    return model.to(device()), diffusion


def create(size: Size, **flags: Any) -> tuple[nn.Module, SpacedDiffusion]:
    """As built, of the flags of this size, those that its checkpoint carries, and `flags`, the last counting most."""
    known = (
        image_sr_model_and_diffusion_defaults()
        if size.upsampler
        else model_and_diffusion_defaults()
    )
    carried = checkpoint.load_state(size.weights)[1] if size.weights else {}
    kept = {name: value for name, value in carried.items() if name in known}
    make = image_sr_create_model_and_diffusion if size.upsampler else create_model_and_diffusion
    return make(**size.flags | kept | flags)


@th.no_grad()
def stir(model: nn.Module) -> None:
    """Noise, scaled by the inputs of each layer, for the weights that start at zero."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=0.5 * parameter[0].numel() ** -0.5)


def sample_of(model: nn.Module, batch: int = 1) -> tuple[Tree, dict[str, Any]]:
    """What the model is trained on, `(x_start, cond)`: noise within [-1, 1], on the model's device."""
    network: Any = model
    if hasattr(network, "large_size"):
        large, small = ((3, n, n) for n in (network.large_size, network.small_size))
        shapes: Any = (large, {"low_res": small})
    else:
        shapes = ({"video": network.video_size, "audio": network.audio_size}, {})
    th.manual_seed(SEED)
    where = next(model.parameters()).device
    x, cond = (
        tree_map(lambda shape: th.randn(batch, *shape, device=where).clamp(-1, 1), tree)
        for tree in shapes
    )
    return x, cond


def forward_of(model: nn.Module, batch: int = 1) -> Callable[[], Tree]:
    """A pass through the model, or its prepared copy, without gradients."""
    network: Any = model.model if isinstance(model, InferenceModel) else model
    x, cond = sample_of(network, batch)
    t = th.full((batch,), MIDDLE_STEP, device=next(model.parameters()).device)
    return th.no_grad()(lambda: bind(model, cond)(x, t))


def forward_flop(size: Size) -> int:
    """FLOPs of a sample's way through the model, counted without computing it."""
    with (
        FakeTensorMode(),
        window_shift("max"),
    ):  # nothing that is drawn, which would have to be computed
        model, _ = create(size)
        return flop_of(forward_of(model))


def train_loop(
    size: Size, precision: str, folder: str, compiled: bool = False, **flags: Any
) -> TrainLoop:
    """The trainer as the scripts use it, but for its data: call `run_step` with a batch of `sample_of`."""
    model, diffusion = build(size, **flags)
    config = TrainConfig(
        output_dir=folder, precision=precision, preview_clips=0, keep_last=1, compile=str(compiled)
    )
    return TrainLoop(
        model, diffusion, lambda start_sample: iter(()), config, World(device=device())
    )
