"""From a trained model to clips: samplers by name, precision, and clips that depend on (seed, index) only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch import nn

from . import rng
from .dpm_solver import DPMSolver
from .gaussian_diffusion import ModelMeanType
from .respace import SpacedDiffusion
from .tree import Generators, Tree, tree_map
from .unet import window_shift

DTYPES = {"fp32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}

# Settings of DPMSolver and its `sample`, as published; the other two run the loops of the diffusion.
SAMPLERS: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "ddim": {},
    "dpm_solver": {"steps": 20, "order": 3, "method": "singlestep", "skip_type": "logSNR"},
    "dpm_solver++": {
        "predict_x0": True,
        "thresholding": True,
        "order": 2,
        "method": "adaptive",
        "skip_type": "time_uniform",
        "step_control": "sample",
    },
}
PREVIEW_SETTINGS: dict[str, dict[str, Any]] = {"dpm_solver": {"steps": 50, "skip_type": "time_uniform"}}

Sampler = Callable[..., Tree]


def bind(model: nn.Module, cond: dict[str, Any] | None = None) -> Callable[..., Tree]:
    """A model as `(x, t, **more conditions) -> tree`, conditions bound; a dict goes in as keywords, one per modality."""

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


class Prepared(nn.Module):
    """A model as the samplers run it: evaluation mode, weights in the working precision, float32 in and out."""

    def __init__(self, model: nn.Module, dtype: th.dtype) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).to(dtype).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **kwargs)
        return tuple(x.float() for x in out) if isinstance(out, tuple) else out.float()


def prepare(model: nn.Module, precision: str = "fp32") -> Prepared:
    """A copy of the model as the samplers run it (same call, float32 in and out).

    `precision`: "fp32", "bf16" or "fp16", of weights and maps; norms, softmax and the schedule stay in float32.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r}: choose from {', '.join(DTYPES)}")
    return Prepared(model, DTYPES[precision])


def make_sampler(name: str, diffusion: SpacedDiffusion, clip_denoised: bool = True, **settings: Any) -> Sampler:
    """A function `(model_fn, x_T, generator, progress=None) -> tree`; `settings` replace those of SAMPLERS.

    ValueError for an unknown name, or for settings that the sampler does not have.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sample_fn {name!r}: choose from {', '.join(SAMPLERS)}")
    if name in ("ddpm", "ddim"):
        if settings:
            raise ValueError(f"sample_fn {name} has no {', '.join(settings)}: its steps are set by timestep_respacing")
        loop = {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}[name]
        return lambda model_fn, x_T, generator=None, progress=None: loop(
            model_fn, x_T, generator, clip_denoised=clip_denoised, progress=progress
        )
    if diffusion.num_timesteps != diffusion.original_num_steps:
        raise ValueError(f"timestep_respacing does not go with sample_fn {name}: leave it empty, and set sample_steps")
    return _solver(diffusion, SAMPLERS[name] | settings)


def _solver(diffusion: SpacedDiffusion, settings: dict[str, Any]) -> Sampler:
    made = {key: value for key, value in settings.items() if key in ("predict_x0", "thresholding")}
    run = {key: value for key, value in settings.items() if key not in made}
    kind = "x_start" if diffusion.model_mean_type == ModelMeanType.START_X else "noise"

    def sample(model_fn: Callable, x_T: Tree, generator: Generators = None, progress: Callable | None = None) -> Tree:
        def rescaled(x: Tree, t: th.Tensor, **cond: Any) -> Tree:
            return model_fn(x, diffusion.model_timesteps(t), **cond)

        solver = DPMSolver(rescaled, diffusion.alphas_cumprod, model_type=kind, **made)
        return solver.sample(x_T, progress=progress, **run)

    return sample


def solver_settings(steps: int, order: int, method: str, skip_type: str) -> dict[str, Any]:
    """Flags -> settings; 0 and empty leave the sampler's own."""
    chosen = {"steps": steps, "order": order, "method": method, "skip_type": skip_type}
    return {key: value for key, value in chosen.items() if value}


@th.no_grad()
def sample_joint(
    model: nn.Module,
    sampler: Sampler,
    indices: Sequence[int],
    seed: int,
    device: th.device | str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> dict[str, th.Tensor]:
    """Clips number `indices` of `seed` -> {"video" [B, F, C, H, W], "audio" [B, C, L]} in [-1, 1], on the CPU.

    Noise is drawn per clip and on the CPU, window shifts per evaluation: a clip depends on its number and the seed, not
    on the batch, the ranks or the device.
    """
    network = model.model if isinstance(model, Prepared) else model
    generators = rng.per_sample(seed, "sample", indices=indices)
    shapes = {"video": network.video_size, "audio": network.audio_size}
    x_T = {
        name: th.stack([th.randn(shape, generator=g) for g in generators]).to(device) for name, shape in shapes.items()
    }
    with window_shift(rng.generator(seed, "window shift")):
        sample = sampler(bind(model), x_T, generators, progress)
    return tree_map(lambda x: x.clamp(-1, 1).cpu(), sample)
