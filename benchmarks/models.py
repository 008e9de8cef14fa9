"""The models that are measured, and their inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch as th
from measure import device, flop_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mm_diffusion import checkpoint
from mm_diffusion.config import SR, TrainConfig
from mm_diffusion.dist_util import World
from mm_diffusion.respace import SpacedDiffusion
from mm_diffusion.sampling import InferenceModel, bind
from mm_diffusion.script_util import (
    create_model_and_diffusion,
    image_sr_create_model_and_diffusion,
    image_sr_model_and_diffusion_defaults,
    model_and_diffusion_defaults,
)
from mm_diffusion.train_util import TrainLoop
from mm_diffusion.tree import Tree
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
    """A model by its flags, with random weights or those of a checkpoint, whose flags count."""

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
    """Model and diffusion; `flags` override those of the size.

    Random weights predict x_0: samples of a random noise prediction would saturate.
    """
    th.manual_seed(SEED)
    prefix = SR if size.upsampler else ""
    target = {} if size.weights else {f"{prefix}predict_xstart": True}
    model, diffusion = create(size, **target | flags)
    if size.weights:
        checkpoint.load_weights(model, size.weights)
    else:
        fill_zeros(model)
    return model.to(device()), diffusion


def create(size: Size, **flags: Any) -> tuple[nn.Module, SpacedDiffusion]:
    """Model and diffusion, untrained; `flags` override the checkpoint's, those the size's."""
    make, defaults = create_model_and_diffusion, model_and_diffusion_defaults
    if size.upsampler:
        make, defaults = image_sr_create_model_and_diffusion, image_sr_model_and_diffusion_defaults
    carried = checkpoint.load_state(size.weights)[1] if size.weights else {}
    known = {name: carried[name] for name in carried.keys() & defaults().keys()}
    return make(**size.flags | known | flags)


@th.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Noise, scaled by the inputs of each layer, for the weights that start at zero."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=0.5 * parameter[0].numel() ** -0.5)


def sample_of(model: nn.Module, batch: int = 1) -> tuple[Tree, dict[str, Any]]:
    """A training batch `(x_start, cond)` for the model: noise in [-1, 1], on its device."""
    network: Any = model
    where = next(model.parameters()).device

    def noise(shape: tuple[int, ...]) -> th.Tensor:
        return th.randn(batch, *shape, device=where).clamp(-1, 1)

    th.manual_seed(SEED)
    if hasattr(network, "large_size"):
        large, small = ((3, side, side) for side in (network.large_size, network.small_size))
        return noise(large), {"low_res": noise(small)}
    return {"video": noise(network.video_size), "audio": noise(network.audio_size)}, {}


def batch_that_fits() -> int:
    """Clips in a training step of the published joint model: 4, or 1 on a small GPU or a CPU."""
    return 4 if th.cuda.is_available() and th.cuda.mem_get_info()[0] > 36 * 2**30 else 1


def forward_of(model: nn.Module, batch: int = 1) -> Callable[[], Tree]:
    """A pass through the model, or through a prepared one, without gradients."""
    network: Any = model.model if isinstance(model, InferenceModel) else model
    x, cond = sample_of(network, batch)
    t = th.full((batch,), MIDDLE_STEP, device=next(model.parameters()).device)
    return th.no_grad()(lambda: bind(model, cond)(x, t))


def forward_flop(size: Size) -> int:
    """FLOPs of a pass of one sample through the model, counted without computing it."""
    with FakeTensorMode(), window_shift("max"):  # a random shift would have to be computed
        model, _ = create(size)
        return flop_of(forward_of(model))


def train_loop(
    size: Size, precision: str, folder: str, compiled: str = "False", **flags: Any
) -> TrainLoop:
    """The trainer without data: call `run_step` with a batch of `sample_of`.

    compiled: a value of --compile.
    """
    model, diffusion = build(size, **flags)
    options: dict[str, Any] = {"precision": precision, "compile": compiled}
    config = TrainConfig(output_dir=folder, preview_clips=0, keep_last=1, **options)
    return TrainLoop(model, diffusion, lambda start: iter(()), config, World(device=device()))
