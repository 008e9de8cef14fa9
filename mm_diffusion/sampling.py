"""From trained models to clips: precision, compilation, samplers, clips of (seed, index)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch as th
from torch import nn

from . import rng
from .calls import Progress, bind
from .devices.compiled import Compiled, map_output
from .dpm_solver import DPMSolver
from .gaussian_diffusion import ModelMeanType
from .nn import store_channels_last
from .respace import SpacedDiffusion
from .rng import Generators
from .tree import Tree, check_conditioning, leaves, to_device, tree_map
from .unet import ImageSuperResModel, window_shift

DTYPES = {"fp32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}

Settings = dict[str, dict[str, Any]]  # sampler -> arguments of DPMSolver and its `sample`

# As published; ddpm and ddim run the diffusion's loops.
SAMPLERS: Settings = {
    "ddpm": {},
    "ddim": {},
    "dpm_solver": {"steps": 20, "order": 3, "method": "singlestep", "skip_type": "logSNR"},
    "dpm_solver++": {"predict_x0": True, "thresholding": True, "order": 2, "method": "adaptive"},
}
MODEL_TYPES = {  # of DPMSolver
    ModelMeanType.EPSILON: "noise",
    ModelMeanType.START_X: "x_start",
    ModelMeanType.V: "v",
}
LOOPS = ("ddpm", "ddim")  # which alone can be guided, since guidance is defined step by step
# What replaces these settings in the previews of training, and in the upsampler.
PREVIEW_SETTINGS: Settings = {"dpm_solver": {"steps": 50, "skip_type": "time_uniform"}}
_MULTISTEP = {"steps": 50, "order": 2, "method": "multistep", "skip_type": "time_uniform"}
SR_SETTINGS: Settings = {"dpm_solver": _MULTISTEP, "dpm_solver++": _MULTISTEP}

CPU_ACTIVATION_BYTES = 2**31  # for the frames that go through the upsampler together on a CPU
GPU_ACTIVATION_SHARE = 0.6  # of the free memory of a GPU
Conditioning = dict[str, th.Tensor]  # modality -> [B, ...]

# ---------------------------------------------------------------- how a model is run


def with_clean(model_fn: Callable[..., Tree], keys: Sequence[str]) -> Callable[..., Tree]:
    """A model of samples with leaves `keys` as one of those leaves that `x` holds.

    The others come as keywords: clean clips, which go in at timestep 0. A sampler of `x` so sees a
    conditional model, whatever the sampler.
    """

    def conditional(x: Any, t: th.Tensor, **known: th.Tensor) -> Tree:
        clips = {key: known[key] if key in known else x[key] for key in keys}
        timesteps = {key: th.zeros_like(t) if key in known else t for key in keys}
        output: Any = model_fn(clips, timesteps)
        return {key: output[key] for key in x}

    return conditional


def choose_precision(precision: str, use_fp16: bool, device: th.device) -> str:
    """What --precision and --use_fp16 mean together on this device.

    `use_fp16` alone is bfloat16 where the device computes in it, and on CPUs, else float16.
    """
    if precision:
        return precision
    if not use_fp16:
        return "fp32"
    if device.type == "cuda" and not th.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"


class InferenceModel(nn.Module):
    """A copy of the model as the samplers run it (same call, float32 in and out).

    precision: "fp32", "bf16" or "fp16", of weights and activations; norms, softmax and the schedule
        stay in float32.
    compile_mode: "blocks", or a mode of torch.compile, "" for none; `options` are more of
        torch.compile's.
    """

    def __init__(
        self, model: nn.Module, precision: str = "fp32", compile_mode: str = "", **options: Any
    ) -> None:
        super().__init__()
        if precision not in DTYPES:
            raise ValueError(f"precision {precision!r}: choose from {', '.join(DTYPES)}")
        self.precision = precision
        self.model: Any = copy.deepcopy(model).requires_grad_(False).to(DTYPES[precision]).eval()
        store_channels_last(self.model)
        self.run: nn.Module = self.model
        if compile_mode:
            self.run = Compiled(self.model, compile_mode, **options).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return map_output(th.Tensor.float, self.run(*args, **kwargs))


prepare = InferenceModel  # its public name


def _network(model: nn.Module) -> Any:
    return model.model if isinstance(model, InferenceModel) else model


# ---------------------------------------------------------------- samplers


@dataclass(frozen=True)
class Sampler:
    """A sampler by name, made by `make_sampler`."""

    name: str
    diffusion: SpacedDiffusion
    clip_denoised: bool
    classifier_scale: float
    conditioning: str  # "clean" or "replacement"
    settings: dict[str, Any]

    @property
    def passes(self) -> int:
        """Evaluations of the model per sample; 0 where adaptive steps leave it open."""
        if self.name in LOOPS:
            return self.diffusion.num_timesteps
        return 0 if self.settings["method"] == "adaptive" else self.settings["steps"]

    def __call__(
        self,
        model_fn: Callable[..., Tree],
        x_T: Tree,
        generator: Generators = None,
        progress: Progress | None = None,
        cond: dict[str, th.Tensor] | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tree:
        """Noise `x_T` -> a sample.

        cond: keywords of model_fn. conditioning: {key: clip} of leaves that are known, which the
        result holds exactly. progress: called with the fraction done.
        """
        if conditioning and self.conditioning == "clean":
            keys, known = list(x_T), check_conditioning(conditioning, x_T)
            generated = {key: x_T[key] for key in keys if key not in known}
            conditional = with_clean(partial(model_fn, **(cond or {})), keys)
            sample: Any = self(conditional, generated, generator, progress, cond=known)
            return {key: known[key] if key in known else sample[key] for key in keys}
        common: dict[str, Any] = {"conditioning": conditioning, "progress": progress}
        if self.name not in LOOPS:
            return self._solve(model_fn, x_T, cond=cond, **common)
        diffusion = self.diffusion
        loop = diffusion.p_sample_loop if self.name == "ddpm" else diffusion.ddim_sample_loop
        common["clip_denoised"] = self.clip_denoised
        common["classifier_scale"] = self.classifier_scale
        return loop(partial(model_fn, **(cond or {})), x_T, generator, **common)

    def _solve(self, model_fn: Callable[..., Tree], x_T: Tree, **options: Any) -> Tree:
        diffusion = self.diffusion
        # One step size per sample: a clip does not depend on its neighbours.
        settings = {"step_control": "sample", **self.settings}
        predict_x0 = settings.pop("predict_x0", False)
        thresholding = settings.pop("thresholding", False)
        model_type = MODEL_TYPES[diffusion.model_mean_type]

        def rescaled(x: Tree, t: th.Tensor, **cond: Any) -> Tree:
            return model_fn(x, diffusion.model_timesteps(t), **cond)

        alphas = diffusion.alphas_cumprod
        solver = DPMSolver(rescaled, alphas, predict_x0, thresholding, model_type)
        return solver.sample(x_T, **settings, **options)


def make_sampler(
    name: str,
    diffusion: SpacedDiffusion,
    clip_denoised: bool = True,
    prefix: str = "",
    classifier_scale: float = 0.0,
    conditioning: str = "replacement",
    **settings: Any,
) -> Sampler:
    """The sampler `name`; `settings` replace its own (see SAMPLERS).

    classifier_scale: how strongly conditioning leaves guide the others; 0: they are replaced by
        their noisy selves, no more. `prefix` is that of the flags that an error names.
    conditioning: "clean" gives the model conditioning leaves as they are, at timestep 0, which it
        must have been trained for (`task_mix`); "replacement" with noise of each step's level.
    ValueError for an unknown name, or for settings that the sampler does not have.
    """
    if name not in SAMPLERS:
        raise ValueError(f"{prefix}sample_fn {name!r}: choose from {', '.join(SAMPLERS)}")
    if not 0 <= classifier_scale < math.inf:
        raise ValueError(f"classifier_scale {classifier_scale}: need 0 (none) or a positive number")
    this, respacing = f"{prefix}sample_fn {name}", f"{prefix}timestep_respacing"
    if name in LOOPS and settings:
        raise ValueError(f"{this} has no {', '.join(settings)}: {respacing} sets its steps")
    if name not in LOOPS and classifier_scale:
        remedy = f"choose {' or '.join(LOOPS)}, or classifier_scale 0"
        raise ValueError(f"classifier_scale {classifier_scale}: no guidance in {this}; {remedy}")
    if name not in LOOPS and diffusion.num_timesteps != diffusion.original_num_steps:
        remedy = f"leave it empty, and set {prefix}sample_steps"
        raise ValueError(f"{respacing} does not go with {this}: {remedy}")
    if conditioning == "clean" and classifier_scale:
        remedy = "choose conditioning replacement, or classifier_scale 0"
        raise ValueError(f"classifier_scale {classifier_scale}: no guidance here; {remedy}")
    settings = SAMPLERS[name] | settings
    return Sampler(name, diffusion, clip_denoised, classifier_scale, conditioning, settings)


# ---------------------------------------------------------------- clips


def part_of(progress: Progress | None, first: float, last: float) -> Progress:
    """The progress function of a part of the work: its 0..1 are `first`..`last` of the whole."""

    def report(fraction: float) -> None:
        if progress:
            progress(first + fraction * (last - first))

    return report


@th.no_grad()
def sample_joint(
    model: nn.Module,
    sampler: Sampler,
    indices: Sequence[int],
    seed: int,
    device: th.device | str = "cpu",
    progress: Progress | None = None,
    conditioning: Conditioning | None = None,
) -> dict[str, th.Tensor]:
    """Clips number `indices` of `seed` -> {"video" [B, F, C, H, W], "audio" [B, C, L]}.

    In [-1, 1], on the CPU. Noise is drawn per clip and on the CPU, window shifts per evaluation: a
    clip depends on its number and the seed, not on batch, ranks or device. `conditioning` is part
    of the result as it is. FloatingPointError where the model gives NaN or Inf.
    """
    network = _network(model)
    generators = rng.per_sample(seed, "sample", indices=indices)
    x_T: Any = {}
    for name, shape in (("video", network.video_size), ("audio", network.audio_size)):
        x_T[name] = rng.draw(th.randn, (len(indices), *shape), generators, device)
    with window_shift(rng.generator(seed, "window shift")):
        sample: Any = sampler(bind(model), x_T, generators, progress, conditioning=conditioning)
    return _finished(sample) | (conditioning or {})


@th.no_grad()
def upsample_video(
    model: nn.Module,
    sampler: Sampler,
    video: th.Tensor,
    seed: int,
    index: int,
    *,
    frames_at_once: int = 0,
    noise: th.Tensor | None = None,
    device: th.device | str = "cpu",
    progress: Progress | None = None,
) -> th.Tensor:
    """Frames [F, 3, h, w] of clip `index` of `seed` -> [F, 3, H, W]; in [-1, 1], on the CPU.

    All frames of a clip start from one noise image [3, H, W] (of seed and index unless `noise` is
    given) and share the noise of every step: a still scene stays still, and a frame does not depend
    on how many go through the model at a time (`frames_at_once`; 0: what fits in memory).
    """
    network = _network(model)
    size, num_frames = network.large_size, len(video)
    small = (3, network.small_size, network.small_size)
    if tuple(video.shape[1:]) != small:
        raise ValueError(f"frames {list(video.shape[1:])}: the upsampler takes {list(small)}")
    if noise is None:
        noise = th.randn(3, size, size, generator=rng.generator(seed, "upsampler", index))
    most = frames_at_once or frames_that_fit(network, th.device(device), num_frames)
    noise = to_device(noise, device)
    chunks = video.tensor_split(math.ceil(num_frames / most))  # equal sizes are compiled once
    done: list[th.Tensor] = []
    first = 0
    for chunk in chunks:
        last = first + len(chunk)
        step_noise = [rng.generator(seed, "upsampler step", index)] * len(chunk)
        report = part_of(progress, first / num_frames, last / num_frames)
        cond = {"low_res": to_device(chunk, device)}
        x_T = noise.expand(len(chunk), -1, -1, -1)
        done.append(_finished(sampler(bind(model), x_T, step_noise, report, cond)))
        first = last
    return th.cat(done)


def _finished(sample: Any) -> Any:
    """The sample within [-1, 1], on the CPU; FloatingPointError for NaN or Inf."""
    if not all(leaf.isfinite().all() for leaf in leaves(sample)):
        raise FloatingPointError(
            "model output contains NaN or Inf (not finite): try --precision fp32"
        )
    return tree_map(lambda leaf: leaf.clamp(-1, 1).cpu(), sample)


def frames_that_fit(network: ImageSuperResModel, device: th.device, num_frames: int) -> int:
    """How many frames may go through the upsampler together, by the memory there is."""
    budget: float = CPU_ACTIVATION_BYTES
    if device.type == "cuda":
        unused = th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)
        budget = GPU_ACTIVATION_SHARE * (th.cuda.mem_get_info(device)[0] + unused)
    most = int(budget / network.activation_bytes_per_image())
    return max(1, min(num_frames, most))
