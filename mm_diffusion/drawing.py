"""From checkpoints to files: models as they are sampled, folders of clips, and previews beside training."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import blobfile as bf
import numpy as np
import torch as th
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate
from tqdm import tqdm

from . import checkpoint, gallery, logger, media
from .compiling import compile_mode
from .dist_util import World, barrier
from .respace import SpacedDiffusion
from .sampling import (
    PREVIEW_SETTINGS,
    SAMPLERS,
    SR_SETTINGS,
    Prepared,
    Sampler,
    choose_precision,
    frames_that_fit,
    make_sampler,
    part_of,
    prepare,
    sample_joint,
    upscale_video,
)
from .script_util import (
    SR,
    SR_CARRIED_FLAGS,
    DataConfig,
    SampleConfig,
    create_diffusion,
    create_model_and_diffusion,
    image_sr_create_model_and_diffusion,
    image_sr_model_and_diffusion_defaults,
    merge_checkpoint_flags,
    model_and_diffusion_defaults,
    numbers,
    sr_half,
    sr_process,
)

BAR = "{l_bar}{bar}| {n:.1f}/{total} clips, {remaining} left"
UPSAMPLING_SHARE = 0.85  # of the work of a clip, at the published sizes; for the progress bar
SR_DDIM_STEPS = 25  # as published

LARGE, TRUTH = "sr_mp4", "ground_truth"  # folders of clips beside original/

Upscale = Callable[[int, th.Tensor, Callable[[float], None]], th.Tensor]


def solver_settings(config: SampleConfig, prefix: str = "") -> dict[str, Any]:
    """Flags (of the upsampler, with its prefix) -> settings; 0 and empty leave the sampler's own."""
    flags = {
        "steps": "sample_steps",
        "order": "solver_order",
        "method": "solver_method",
        "skip_type": "skip_type",
    }
    chosen = {setting: getattr(config, prefix + name) for setting, name in flags.items()}
    return {setting: value for setting, value in chosen.items() if value}


def load_model(
    path: str,
    weights: dict[str, th.Tensor],
    flags: Mapping[str, Any],
    config: SampleConfig,
    device: th.device,
) -> tuple[Prepared, SpacedDiffusion]:
    """The joint model of a checkpoint, ready for the samplers on `device`, and its diffusion; misfits are listed."""
    model, diffusion = create_model_and_diffusion(
        **{name: flags[name] for name in model_and_diffusion_defaults()}
    )
    precision = choose_precision(config.precision, flags["use_fp16"], device)
    return _filled(model, path, weights, config, precision, device), diffusion


def _filled(
    model: nn.Module,
    path: str,
    weights: dict[str, th.Tensor],
    config: SampleConfig,
    precision: str,
    device: th.device,
) -> Prepared:
    mode = compile_mode(config.compile)
    misfits = checkpoint.load_weights(model, weights, config.is_strict, name=path)
    if misfits:
        logger.warn(f"{path}: {len(misfits)} tensors left out: {', '.join(misfits)}")
    return prepare(model.to(device), precision, mode)


def load_upsampler(
    config: SampleConfig, flags: dict, given: set[str], device: th.device
) -> tuple[Upscale | None, dict[str, Any]]:
    """The upsampler as a function `(index, frames [F, 3, h, w], progress) -> [F, 3, H, W]`, and what describes it.

    (None, {}) without `sr_model_path`. Errors, naming the flag, where checkpoint, noise file and flags do not fit.
    """
    if not config.sr_model_path:
        if config.load_noise:
            raise ValueError(
                f"load_noise {config.load_noise}: is for the upsampler; give its --sr_model_path too"
            )
        return None, {}
    path, *more = checkpoint.find_checkpoints(config.sr_model_path)
    if more:
        raise ValueError(f"sr_model_path {config.sr_model_path}: need one checkpoint")
    weights, trained = checkpoint.load_state(path)
    flags = merge_checkpoint_flags(flags, given, trained, path, SR_CARRIED_FLAGS)
    if "sr_timestep_respacing" not in given and config.sr_sample_fn == "ddim":
        flags["sr_timestep_respacing"] = usual_respacing(flags["sr_diffusion_steps"])
    model, diffusion = image_sr_create_model_and_diffusion(
        **{name: flags[name] for name in image_sr_model_and_diffusion_defaults()}
    )
    settings = SR_SETTINGS.get(config.sr_sample_fn, {}) | solver_settings(config, SR)
    process = vars(sr_process(flags))
    sampler = make_sampler(config.sr_sample_fn, diffusion, config.clip_denoised, SR, **settings)
    noise = load_noise(config.load_noise, model.large_size) if config.load_noise else None
    own = config.precision if flags["sr_use_fp16"] is None else ""
    precision = choose_precision(own, sr_half(flags), device)
    prepared = _filled(model, path, weights, config, precision, device)
    frames_at_once = config.sr_batch_size

    def upscale(index: int, video: th.Tensor, progress: Callable[[float], None]) -> th.Tensor:
        nonlocal frames_at_once  # decided once: the free memory changes, and other sizes would be compiled anew
        frames_at_once = frames_at_once or frames_that_fit(prepared.model, device, len(video))
        return upscale_video(
            prepared,
            sampler,
            video,
            config.seed,
            index,
            frames_at_once=frames_at_once,
            noise=noise,
            device=device,
            progress=progress,
        )

    description = {
        "upsampler": checkpoint.fingerprint(weights),
        "sr_sampler": [config.sr_sample_fn, settings, config.clip_denoised],
        "sr_process": process,
        "sr_precision": precision,
        "sr_noise": checkpoint.fingerprint({"noise": noise}) if noise is not None else "",
        "sr_sizes": [model.small_size, model.large_size],
    }
    return upscale, description


def usual_respacing(steps: int) -> str:
    """The steps that DDIM keeps in the upsampler unless told otherwise."""
    return f"ddim{SR_DDIM_STEPS}" if steps % SR_DDIM_STEPS == 0 else str(min(SR_DDIM_STEPS, steps))


def check_frames_fit(video_size: str, upsampler: Mapping[str, Any]) -> None:
    """ValueError where the joint model makes frames that the upsampler (as described) does not take."""
    _, _, height, width = numbers("video_size", video_size, 4)
    small = upsampler["sr_sizes"][0] if upsampler else None
    if small not in (None, height) or small not in (None, width):
        raise ValueError(
            f"sr_model_path: this upsampler takes frames of {small} x {small}, the joint model makes"
            f" {width} x {height}; choose checkpoints that fit"
        )


def load_noise(path: str, size: int) -> th.Tensor:
    """A noise picture [3, size, size] from a .npy file; ValueError, naming the file, if it is no such thing."""
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"load_noise {path}: is no readable .npy file ({error})") from None
    if (
        not isinstance(noise, np.ndarray)
        or noise.shape != (3, size, size)
        or noise.dtype.kind not in "fiu"
    ):
        found = (
            f"{noise.dtype} {list(noise.shape)}"
            if isinstance(noise, np.ndarray)
            else "several arrays"
        )
        raise ValueError(
            f"load_noise {path}: holds {found}, need numbers of shape [3, {size}, {size}]"
        )
    if not np.isfinite(noise).all():
        raise ValueError(f"load_noise {path}: holds numbers that are not finite")
    return th.from_numpy(noise.astype(np.float32))


# ---------------------------------------------------------------- clips on disk


def clip_paths(folder: str | os.PathLike, name: str, *more: str) -> list[Path]:
    """The files of a clip below an output folder: wav, mp4 and the mp4 in folders `more` (LARGE, TRUTH)."""
    return [
        Path(folder, "audios", f"{name}.wav"),
        *(Path(folder, kind, f"{name}.mp4") for kind in ("original", *more)),
    ]


def write_sample(
    folder: str | os.PathLike,
    name: str,
    video: th.Tensor,
    audio: th.Tensor,
    video_fps: int,
    audio_fps: int,
    large: th.Tensor | None = None,
) -> None:
    """A clip [F, C, H, W], [C, L] -> audios/NAME.wav, original/NAME.mp4 and, if it is upsampled, sr_mp4/NAME.mp4.

    Both mp4 files have the sound.
    """
    wav, mp4, sr_mp4 = clip_paths(folder, name, LARGE)
    media.write_wav(wav, audio, audio_fps)
    media.write_clip(mp4, video, video_fps, audio, audio_fps)
    if large is not None:
        media.write_clip(sr_mp4, large, video_fps, audio, audio_fps)


def write_truth(
    folder: str | os.PathLike,
    name: str,
    truth: Mapping[str, th.Tensor],
    video_fps: int,
    audio_fps: int,
) -> None:
    """The clip that a modality was taken from -> ground_truth/NAME.mp4."""
    *_, mp4 = clip_paths(folder, name, TRUTH)
    media.write_clip(mp4, truth["video"], video_fps, truth["audio"], audio_fps)


def show_gallery(folder: str) -> None:
    """Write the gallery of a folder of clips and say where it is; what stands in its way is told, and no more."""
    if "://" in folder:
        return
    try:
        logger.log(f"look at the clips: {gallery.write_gallery(folder)}")
    except (ValueError, OSError) as error:
        logger.warn(f"{folder}: no gallery ({error})")


@contextmanager
def background(most_waiting: int = 16) -> Iterator[Callable[..., None]]:
    """`call(name, function, *args)` that returns at once: files are encoded beside the model, in order.

    At most `most_waiting` calls wait; one more waits for the oldest. Leaving waits for all of them. The first error of
    a call, with a note of its `name`, is raised by the next call, or on leaving; what has been drawn is still written.
    """
    waiting: deque[Future] = deque()

    def named(name: str, function: Callable, *args: Any) -> None:
        try:
            function(*args)
        except Exception as error:
            error.add_note(f"while saving {name}")
            raise

    def call(name: str, function: Callable, *args: Any) -> None:
        while waiting and (len(waiting) >= most_waiting or waiting[0].done()):
            waiting.popleft().result()
        waiting.append(pool.submit(named, name, function, *args))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder") as pool:
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
    save: Callable[[int, th.Tensor, th.Tensor, th.Tensor | None], None],
    progress: Callable[[float], None] | None = None,
    upscale: Upscale | None = None,
    given: Callable[[int], dict[str, th.Tensor]] | None = None,
) -> None:
    """Draw clips number `indices` and `save(index, video [F, C, H, W], audio [C, L], large)` each, beside the model.

    `large` is the upsampled video, None without `upscale`. `given(index)` is the modality of a clip that is known.
    `progress` is called with the number of clips done, fractions included.
    """
    share = UPSAMPLING_SHARE if upscale else 0.0
    with background() as call:
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            drawn = start + len(batch) * (1 - share)
            known = default_collate([given(index) for index in batch]) if given else None
            sample = sample_joint(
                model, sampler, batch, seed, device, part_of(progress, start, drawn), known
            )
            for k, (index, video, audio) in enumerate(
                zip(batch, sample["video"], sample["audio"], strict=True)
            ):
                span = drawn + k * share, drawn + (k + 1) * share
                large = upscale(index, video, part_of(progress, *span)) if upscale else None
                call(f"clip {index}", save, index, video, audio, large)


def claim_folder(folder: str | os.PathLike, description: dict[str, Any]) -> None:
    """Note in sampling.json what the clips of this folder are, or ValueError where it holds other ones.

    What says how large clips are made ("upsampler", "sr_...") must agree once there are large clips, the rest once
    there are any.
    """
    note = Path(folder, "sampling.json")
    try:
        known: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {}
    except ValueError:
        raise ValueError(f"{note} is damaged: choose another --output_dir") from None
    wanted: dict[str, Any] = json.loads(json.dumps(description))
    any_clips, any_large = (
        any(Path(folder, kind).glob("[!.]*.mp4")) for kind in ("original", LARGE)
    )
    if any_clips and not note.exists():
        raise ValueError(
            f"{folder} holds clips of unknown origin (no sampling.json): choose another --output_dir"
        )
    known = {
        key: v
        for key, v in known.items()
        if (any_large if key.startswith(("upsampler", SR)) else any_clips)
    }
    different = [key for key in wanted if known.get(key, wanted[key]) != wanted[key]]
    if different:
        raise ValueError(
            f"{folder} holds clips of another run ({', '.join(different)} differ): choose another --output_dir"
        )
    text = json.dumps(known | wanted, indent=1, sort_keys=True)
    media.atomically(note, lambda temporary: Path(temporary).write_text(text))


def missing_clips(
    folder: str | os.PathLike, names: Sequence[str], description: dict[str, Any]
) -> list[int]:
    """Claim the folder, and the numbers of the clips of these names that it does not hold whole."""
    claim_folder(folder, description)
    more = [LARGE] * ("upsampler" in description) + [TRUTH] * bool(description["given"])
    for path in clip_paths(folder, "", *more):
        media.remove_leftovers(path.parent)
    return [
        k
        for k, name in enumerate(names)
        if not all(p.exists() for p in clip_paths(folder, name, *more))
    ]


def check_sample_config(config: SampleConfig) -> None:
    """ValueError, naming the flag, for what cannot be sampled."""
    if not config.output_dir:
        raise ValueError("output_dir is empty: say where the clips go with --output_dir")
    if "://" in config.output_dir:
        raise ValueError(f"output_dir {config.output_dir}: clips are written to local folders only")
    if config.seed < 0:
        raise ValueError(f"seed {config.seed}: must not be negative")
    for name in ("all_save_num", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)}: need at least 1")
    if config.sr_batch_size < 0:
        raise ValueError(
            f"sr_batch_size {config.sr_batch_size}: need at least 1, or 0 for what fits in memory"
        )
    compile_mode(config.compile)
    for prefix in ("", SR):
        name = getattr(config, f"{prefix}sample_fn")
        if name not in SAMPLERS:
            raise ValueError(f"{prefix}sample_fn {name!r}: choose from {', '.join(SAMPLERS)}")


@contextmanager
def preview_bar(world: World) -> Iterator[Callable[[float], None]]:
    """A progress function, which rank 0 shows as a bar."""
    form = "{l_bar}{bar}| {remaining} left"
    with tqdm(
        total=1.0, desc="preview", leave=False, disable=world.rank > 0, bar_format=form
    ) as bar:
        yield lambda done: bar.update(done - bar.n)


@contextmanager
def warned_if_not_finite(step: int) -> Iterator[None]:
    """A preview that fails for it is told, and training goes on."""
    try:
        yield
    except FloatingPointError as error:
        logger.warn(f"no preview at step {step}: {error}")


def make_preview(
    diffusion: SpacedDiffusion,
    sample_fn: str,
    save_type: str,
    clips_per_rank: int,
    folder: str,
    data: DataConfig,
    world: World,
) -> Callable[[nn.Module, int], None] | None:
    """A function `(model, step)` that draws a few clips into `folder`/samples/NNNNNN, always the same numbers.

    Films are shown in `folder`/samples/index.html.
    """
    if save_type not in ("mp4", "wav"):
        raise ValueError(f"save_type {save_type!r}: choose mp4 or wav")
    sampler = make_sampler(sample_fn, diffusion, **PREVIEW_SETTINGS.get(sample_fn, {}))
    if clips_per_rank == 0:
        return None
    indices = range(world.rank * clips_per_rank, (world.rank + 1) * clips_per_rank)

    def preview(model: nn.Module, step: int) -> None:
        sample: dict[str, th.Tensor] = {}
        with preview_bar(world) as progress, warned_if_not_finite(step):
            sample = sample_joint(model, sampler, indices, 0, world.device, progress)
        for k, video, audio in (
            zip(indices, sample["video"], sample["audio"], strict=True) if sample else ()
        ):
            path = bf.join(
                folder,
                "samples",
                f"{step:06d}",
                f"{sample_fn}_samples_{step}_0_{k:05d}.{save_type}",
            )
            if save_type == "wav":
                media.write_wav(path, audio, data.audio_fps)
            else:
                media.write_clip(path, video, data.video_fps, audio, data.audio_fps)
            logger.log_clip(f"clip {k}", video, data.video_fps, audio, data.audio_fps, step)
        barrier()
        if save_type == "mp4" and world.rank == 0:
            show_gallery(bf.join(folder, "samples"))

    return preview


def psnr(images: th.Tensor, true: th.Tensor) -> float:
    """Peak signal to noise ratio in dB of images in [-1, 1]."""
    return float(10 * th.log10(4 / (images - true).square().mean()))


def make_sr_preview(
    flags: Mapping[str, Any],
    sample_fn: str,
    pictures: Callable[[], tuple[th.Tensor, th.Tensor]],
    folder: str,
    world: World,
) -> Callable[[nn.Module, int], None]:
    """A function `(model, step)` that upsamples the low-res ones of `pictures()` into `folder`/samples/NNNNNN.

    pictures: -> true [B, 3, H, W] and low-res [B, 3, h, w], always the same. A row of the contact sheet shows one:
    low-res, upsampled, bicubic, true.
    """
    process = sr_process(flags)
    respacing = usual_respacing(process.diffusion_steps) if sample_fn in ("ddpm", "ddim") else ""
    process = dataclasses.replace(process, timestep_respacing=respacing)
    sampler = make_sampler(sample_fn, create_diffusion(process), **SR_SETTINGS.get(sample_fn, {}))

    def upscale(
        model: nn.Module, small: th.Tensor, k: int, progress: Callable[[float], None]
    ) -> th.Tensor:
        part = part_of(progress, k / len(small), (k + 1) / len(small))
        return upscale_video(
            model, sampler, small[k : k + 1], 0, k, device=world.device, progress=part
        )

    def preview(model: nn.Module, step: int) -> None:
        true, small = pictures()
        size = true.shape[-2:]
        upsampled = None
        with preview_bar(world) as progress, warned_if_not_finite(step):
            upsampled = th.cat([upscale(model, small, k, progress) for k in range(len(small))])
        if upsampled is None:
            return
        bicubic = F.interpolate(small, size, mode="bicubic").clamp(-1, 1)
        columns = [F.interpolate(small, size, mode="nearest"), upsampled, bicubic, true]
        logger.log(
            f"upsampled {psnr(upsampled, true):.1f} dB, bicubic {psnr(bicubic, true):.1f} dB (PSNR) in the preview"
        )
        path = bf.join(folder, "samples", f"{step:06d}", f"upsampled_{step}_0_{world.rank:05d}.png")
        media.save_contact_sheet(path, th.stack(columns, dim=1))
        logger.log_image(
            "upsampled",
            th.cat([th.cat(list(row), dim=-1) for row in zip(*columns, strict=True)], dim=1),
            step,
        )

    return preview
