"""From a trained model to clips: samplers by name, precision, and clips that depend on (seed, index) only."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch as th
from torch import nn
from tqdm import tqdm

from . import logger, media, rng
from .checkpoint import load_weights
from .dist_util import World
from .dpm_solver import DPMSolver
from .gaussian_diffusion import ModelMeanType
from .respace import SpacedDiffusion
from .script_util import DataConfig, SampleConfig, create_model_and_diffusion, model_and_diffusion_defaults
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

BAR = "{l_bar}{bar}| {n:.1f}/{total} clips, {remaining} left"

Sampler = Callable[..., Tree]


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


def solver_settings(config: SampleConfig) -> dict[str, Any]:
    """Flags -> settings; 0 and empty leave the sampler's own."""
    chosen = {
        "steps": config.sample_steps,
        "order": config.solver_order,
        "method": config.solver_method,
        "skip_type": config.skip_type,
    }
    return {key: value for key, value in chosen.items() if value}


def load_model(
    path: str, weights: dict[str, th.Tensor], flags: Mapping[str, Any], strict: bool, device: th.device
) -> tuple[Prepared, SpacedDiffusion]:
    """The model of a checkpoint, ready for the samplers on `device`, and its diffusion; misfits are listed."""
    model, diffusion = create_model_and_diffusion(**{name: flags[name] for name in model_and_diffusion_defaults()})
    misfits = load_weights(model, weights, strict, name=path)
    if misfits:
        logger.warn(f"{path}: {len(misfits)} tensors left out: {', '.join(misfits)}")
    return prepare(model.to(device), half_precision(device) if flags["use_fp16"] else "fp32"), diffusion


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
    network: Any = model.model if isinstance(model, Prepared) else model
    generators = rng.per_sample(seed, "sample", indices=indices)
    shapes = {"video": network.video_size, "audio": network.audio_size}
    x_T = {
        name: th.stack([th.randn(shape, generator=g) for g in generators]).to(device) for name, shape in shapes.items()
    }
    with window_shift(rng.generator(seed, "window shift")):
        sample = sampler(bind(model), x_T, generators, progress)
    return tree_map(lambda x: x.clamp(-1, 1).cpu(), sample)


# ---------------------------------------------------------------- clips on disk


def clip_paths(folder: str | os.PathLike, name: str) -> tuple[Path, Path]:
    """(mp4, wav) of a clip below an output folder."""
    return Path(folder, "original", f"{name}.mp4"), Path(folder, "audios", f"{name}.wav")


def write_sample(
    folder: str | os.PathLike, name: str, video: th.Tensor, audio: th.Tensor, video_fps: int, audio_fps: int
) -> None:
    """A clip [F, C, H, W], [C, L] -> original/NAME.mp4 (with its sound) and audios/NAME.wav; the mp4 comes last."""
    mp4, wav = clip_paths(folder, name)
    for path in (wav, mp4):
        path.parent.mkdir(parents=True, exist_ok=True)
    media.write_wav(wav, audio, audio_fps)
    media.write_clip(mp4, video, video_fps, audio, audio_fps)


@contextmanager
def background(most_waiting: int = 16) -> Iterator[Callable[..., None]]:
    """`call(function, *args)` that returns at once, to encode files beside the model. Errors surface on leaving."""
    waiting: list[Future] = []
    with ThreadPoolExecutor(max_workers=1) as pool:

        def call(function: Callable, *args: Any) -> None:
            waiting.append(pool.submit(function, *args))
            while len(waiting) > most_waiting:
                waiting.pop(0).result()

        yield call
        for future in waiting:
            future.result()


def draw_clips(
    model: nn.Module,
    sampler: Sampler,
    indices: Sequence[int],
    batch_size: int,
    seed: int,
    device: th.device | str,
    save: Callable[[int, th.Tensor, th.Tensor], None],
    progress: Callable[[float], None] | None = None,
) -> None:
    """Draw clips number `indices` and `save(index, video [F, C, H, W], audio [C, L])` each, beside the model's work.

    `progress` is called with the number of clips done, fractions included.
    """
    with background() as call:
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]

            def report(fraction: float, start: int = start, size: int = len(batch)) -> None:
                if progress:
                    progress(start + fraction * size)

            sample = sample_joint(model, sampler, batch, seed, device, report)
            report(1.0)
            for index, video, audio in zip(batch, sample["video"], sample["audio"], strict=True):
                call(save, index, video, audio)


def claim_folder(folder: str | os.PathLike, description: dict[str, Any]) -> None:
    """Note in sampling.json what the clips of this folder are, or ValueError where it holds other ones."""
    note, text = Path(folder, "sampling.json"), json.dumps(description, indent=1, sort_keys=True)
    if note.exists():
        known = json.loads(note.read_text())
        different = [key for key in description if known.get(key) != description[key]]
        if different:
            raise ValueError(
                f"{folder} holds clips of another run ({', '.join(different)} differ): choose another --output_dir"
            )
        return
    if any(Path(folder, "original").glob("*.mp4")):
        raise ValueError(f"{folder} holds clips of unknown origin (no sampling.json): choose another --output_dir")
    note.parent.mkdir(parents=True, exist_ok=True)
    temporary = note.with_suffix(".partial")
    temporary.write_text(text)
    os.replace(temporary, note)


def missing_clips(folder: str | os.PathLike, stem: str, count: int, description: dict[str, Any]) -> list[int]:
    """Claim the folder, and the numbers of the clips STEM_NNNNN out of `count` that it does not hold whole."""
    claim_folder(folder, description)
    return [k for k in range(count) if not all(path.exists() for path in clip_paths(folder, f"{stem}_{k:05d}"))]


def check_sample_config(config: SampleConfig) -> None:
    """ValueError, naming the flag, for what cannot be sampled."""
    if not config.output_dir:
        raise ValueError("output_dir is empty: say where the clips go with --output_dir")
    for name in ("all_save_num", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)}: need at least 1")
    if config.sample_fn not in SAMPLERS:
        raise ValueError(f"sample_fn {config.sample_fn!r}: choose from {', '.join(SAMPLERS)}")
    if config.sr_model_path:
        raise ValueError("sr_model_path: this version has no upsampler; leave it empty")


def make_preview(
    diffusion: SpacedDiffusion,
    sample_fn: str,
    save_type: str,
    clips_per_rank: int,
    folder: str,
    data: DataConfig,
    world: World,
) -> Callable[[nn.Module, int], None] | None:
    """A function `(model, step)` that draws a few clips into `folder`/samples/NNNNNN, always the same numbers."""
    if save_type not in ("mp4", "wav"):
        raise ValueError(f"save_type {save_type!r}: choose mp4 or wav")
    sampler = make_sampler(sample_fn, diffusion, **PREVIEW_SETTINGS.get(sample_fn, {}))
    if clips_per_rank == 0:
        return None
    indices = range(world.rank * clips_per_rank, (world.rank + 1) * clips_per_rank)

    def preview(model: nn.Module, step: int) -> None:
        bar = tqdm(
            total=1.0, desc="preview", leave=False, disable=world.rank > 0, bar_format="{l_bar}{bar}| {remaining} left"
        )
        with bar:
            sample = sample_joint(model, sampler, indices, 0, world.device, lambda done: bar.update(done - bar.n))
        for k, video, audio in zip(indices, sample["video"], sample["audio"], strict=True):
            path = Path(folder, "samples", f"{step:06d}", f"{sample_fn}_samples_{step}_0_{k:05d}.{save_type}")
            path.parent.mkdir(parents=True, exist_ok=True)
            if save_type == "wav":
                media.write_wav(path, audio, data.audio_fps)
            else:
                media.write_clip(path, video, data.video_fps, audio, data.audio_fps)

    return preview
