"""From trained models to clips: samplers by name, precision, and clips that depend on (seed, index) only."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch as th
from torch import nn

from . import rng
from .compiling import Compiled
from .dpm_solver import DPMSolver
from .gaussian_diffusion import ModelMeanType
from .respace import SpacedDiffusion
from .tree import Generators, Tree, leaves, to_device, tree_map
from .unet import ImageSuperResModel, window_shift

DTYPES = {"fp32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}

# Settings of DPMSolver and its `sample`, as published; the other two run the loops of the diffusion.
SAMPLERS: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "ddim": {},
    "dpm_solver": {
        "steps": 20,
        "order": 3,
        "method": "singlestep",
        "skip_type": "logSNR",
        "step_control": "sample",
    },
    "dpm_solver++": {
        "predict_x0": True,
        "thresholding": True,
        "order": 2,
        "method": "adaptive",
        "skip_type": "time_uniform",
        "step_control": "sample",
    },
}
GUIDED = ("ddpm", "ddim")  # with guidance by a given modality, which is defined step by step
# What replaces them in the previews of training, and in the upsampler.
PREVIEW_SETTINGS: dict[str, dict[str, Any]] = {
    "dpm_solver": {"steps": 50, "skip_type": "time_uniform"}
}
_MULTISTEP = {"steps": 50, "order": 2, "method": "multistep", "skip_type": "time_uniform"}
SR_SETTINGS: dict[str, dict[str, Any]] = {"dpm_solver": _MULTISTEP, "dpm_solver++": _MULTISTEP}

CPU_ACTIVATION_BYTES = 2**31  # what frames that go through the upsampler together may take on a CPU
GPU_ACTIVATION_SHARE = 0.6  # and of the free memory of a GPU

Sampler = Callable[..., Tree]


def part_of(
    progress: Callable[[float], None] | None, first: float, last: float
) -> Callable[[float], None]:
    """The progress function of a part of the work: its 0..1 are `first`..`last` of the whole."""

    def report(fraction: float) -> None:
        if progress:
            progress(first + fraction * (last - first))

    return report


def bind(model: nn.Module, cond: dict[str, Any] | None = None) -> Callable[..., Tree]:
    """A model as `(x, t, **more conditions) -> tree`, conditions bound; a dict goes in as one keyword per modality."""

    def model_fn(x: Tree, t: th.Tensor, **more: Any) -> Tree:
        if isinstance(x, dict):
            return dict(zip(x, model(**x, timesteps=t, **(cond or {}), **more), strict=True))
        return model(x, t, **(cond or {}), **more)

    return model_fn


def half_precision(device: th.device) -> str:
    """What `use_fp16` means on this device: bfloat16 where it is native, and on CPUs, else float16."""
    if device.type == "cuda" and not th.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"


def choose_precision(precision: str, use_fp16: bool, device: th.device) -> str:
    """What `--precision` and `--use_fp16` mean together; ValueError for an unknown precision."""
    if precision not in ("", *DTYPES):
        raise ValueError(f"precision {precision!r}: choose from {', '.join(DTYPES)}")
    return precision or (half_precision(device) if use_fp16 else "fp32")


class InferenceModel(nn.Module):
    """A model as the samplers run it: evaluation mode, weights in the working precision, float32 in and out."""

    def __init__(
        self, model: nn.Module, precision: str, compile_mode: str = "", **options: Any
    ) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(model).requires_grad_(False).to(DTYPES[precision]).eval()
        for weight in self.model.parameters():
            if (
                weight.ndim == 4
            ):  # of a convolution in two dimensions, which would rearrange it at every call
                weight.data = weight.data.contiguous(memory_format=th.channels_last)
        self.precision = precision
        self.run: nn.Module = (
            Compiled(self.model, compile_mode, **options).eval() if compile_mode else self.model
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.run(*args, **kwargs)
        return tuple(x.float() for x in out) if isinstance(out, tuple) else out.float()


def prepare(
    model: nn.Module, precision: str = "fp32", compile_mode: str = "", **options: Any
) -> InferenceModel:
    """A copy of the model as the samplers run it (same call, float32 in and out).

    `precision`: "fp32", "bf16" or "fp16", of weights and maps; norms, softmax and the schedule stay in float32.
    `compile_mode`: of torch.compile, "" for none; `options` are more of torch.compile's.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r}: choose from {', '.join(DTYPES)}")
    return InferenceModel(model, precision, compile_mode, **options)


def make_sampler(
    name: str,
    diffusion: SpacedDiffusion,
    clip_denoised: bool = True,
    prefix: str = "",
    classifier_scale: float = 0.0,
    **settings: Any,
) -> Sampler:
    """A function `(model_fn, x_T, generator=None, progress=None, cond=None, given=None) -> tree`.

    `cond`: keywords of model_fn; `given`: {key: clip} of leaves that are known and come back as they are, followed the
    more closely the larger `classifier_scale` (0: replaced by their noisy selves, no more). `settings` replace those
    of SAMPLERS. ValueError for an unknown name, or for settings that the sampler does not have; `prefix` is that of
    the flags it names.
    """
    if name not in SAMPLERS:
        raise ValueError(f"{prefix}sample_fn {name!r}: choose from {', '.join(SAMPLERS)}")
    if not 0 <= classifier_scale < math.inf:
        raise ValueError(
            f"classifier_scale {classifier_scale}: need 0 (no guidance) or a positive number"
        )
    if name in GUIDED:
        if settings:
            raise ValueError(
                f"{prefix}sample_fn {name} has no {', '.join(settings)}: its steps are set by"
                f" {prefix}timestep_respacing"
            )
        loop = {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}[name]
        return _loop(loop, clip_denoised=clip_denoised, classifier_scale=classifier_scale)
    if classifier_scale:
        raise ValueError(
            f"classifier_scale {classifier_scale}: there is no guidance in sample_fn {name}; choose"
            f" {' or '.join(GUIDED)}, or classifier_scale 0"
        )
    if diffusion.num_timesteps != diffusion.original_num_steps:
        raise ValueError(
            f"{prefix}timestep_respacing does not go with {prefix}sample_fn {name}: leave it empty, and set"
            f" {prefix}sample_steps"
        )
    return _solver(diffusion, SAMPLERS[name] | settings)


def _loop(loop: Callable[..., Tree], **options: Any) -> Sampler:
    return lambda model_fn, x_T, generator=None, progress=None, cond=None, given=None: loop(
        partial(model_fn, **(cond or {})), x_T, generator, given=given, progress=progress, **options
    )


def _solver(diffusion: SpacedDiffusion, settings: dict[str, Any]) -> Sampler:
    made = {key: value for key, value in settings.items() if key in ("predict_x0", "thresholding")}
    run = {key: value for key, value in settings.items() if key not in made}
    kind = "x_start" if diffusion.model_mean_type == ModelMeanType.START_X else "noise"

    def sample(
        model_fn: Callable,
        x_T: Tree,
        generator: Generators = None,
        progress: Callable | None = None,
        cond: dict[str, th.Tensor] | None = None,
        given: dict[str, th.Tensor] | None = None,
    ) -> Tree:
        def rescaled(x: Tree, t: th.Tensor, **now: Any) -> Tree:
            return model_fn(x, diffusion.model_timesteps(t), **now)

        solver = DPMSolver(rescaled, diffusion.alphas_cumprod, model_type=kind, **made)
        return solver.sample(x_T, progress=progress, cond=cond, given=given, **run)

    return sample


@th.no_grad()
def sample_joint(
    model: nn.Module,
    sampler: Sampler,
    indices: Sequence[int],
    seed: int,
    device: th.device | str = "cpu",
    progress: Callable[[float], None] | None = None,
    given: dict[str, th.Tensor] | None = None,
) -> dict[str, th.Tensor]:
    """Clips number `indices` of `seed` -> {"video" [B, F, C, H, W], "audio" [B, C, L]} in [-1, 1], on the CPU.

    Noise is drawn per clip and on the CPU, window shifts per evaluation: a clip depends on its number and the seed, not
    on the batch, the ranks or the device. `given`: {modality: [B, ...]} that is known and comes back as it is.
    """
    network: Any = model.model if isinstance(model, InferenceModel) else model
    generators = rng.per_sample(seed, "sample", indices=indices)
    shapes = {"video": network.video_size, "audio": network.audio_size}
    x_T = {
        name: to_device(th.stack([th.randn(shape, generator=g) for g in generators]), device)
        for name, shape in shapes.items()
    }
    with window_shift(rng.generator(seed, "window shift")):
        sample: Any = sampler(bind(model), x_T, generators, progress, given=given)
    return _finished(sample) | (given or {})


@th.no_grad()
def upscale_video(
    model: nn.Module,
    sampler: Sampler,
    video: th.Tensor,
    seed: int,
    index: int,
    *,
    frames_at_once: int = 0,
    noise: th.Tensor | None = None,
    device: th.device | str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> th.Tensor:
    """Frames [F, 3, h, w] of clip `index` of `seed` -> [F, 3, H, W]; both in [-1, 1], the result on the CPU.

    All frames of a clip start from one noise picture [3, H, W] (drawn from seed and index unless `noise` is given) and
    share the noise of every step, so that a still scene stays still, and a frame does not depend on how many go
    through the model at a time (`frames_at_once`; 0: what fits in memory).
    """
    network: Any = model.model if isinstance(model, InferenceModel) else model
    size, num_frames = network.large_size, len(video)
    if tuple(video.shape[1:]) != (3, network.small_size, network.small_size):
        raise ValueError(
            f"frames {list(video.shape[1:])}: the upsampler takes [3, {network.small_size}, {network.small_size}]"
        )
    if noise is None:
        noise = th.randn(3, size, size, generator=rng.generator(seed, "upsampler", index))
    most = frames_at_once or frames_that_fit(network, th.device(device), num_frames)
    done: list[th.Tensor] = []
    for part in video.tensor_split(
        math.ceil(num_frames / most)
    ):  # alike in size, as compiled networks want them
        low_res, start = to_device(part, device), sum(map(len, done))
        generators = [rng.generator(seed, "upsampler step", index)] * len(
            low_res
        )  # one: the frames share its noise
        x_T = to_device(noise, device).expand(len(low_res), -1, -1, -1)
        report = part_of(progress, start / num_frames, (start + len(low_res)) / num_frames)
        sample: Any = sampler(bind(model), x_T, generators, report, {"low_res": low_res})
        done.append(_finished(sample))
    return th.cat(done)


def _finished(sample: Any) -> Any:
    """The sample within [-1, 1], on the CPU; FloatingPointError where the model has given other things than numbers."""
    if not all(leaf.isfinite().all() for leaf in leaves(sample)):
        raise FloatingPointError(
            "what the model draws is not finite: try --precision fp32, or another checkpoint"
        )
    return tree_map(lambda leaf: leaf.clamp(-1, 1).cpu(), sample)


def frames_that_fit(network: ImageSuperResModel, device: th.device, num_frames: int) -> int:
    """How many frames may go through the upsampler together, from its maps' sizes and the memory there is."""
    if device.type == "cuda":
        unused = th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)
        budget = GPU_ACTIVATION_SHARE * (th.cuda.mem_get_info(device)[0] + unused)
    else:
        budget = CPU_ACTIVATION_BYTES
    return max(1, min(num_frames, int(budget / network.bytes_per_picture())))
