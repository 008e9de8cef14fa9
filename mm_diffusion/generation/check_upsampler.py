"""How near an upsampler comes to true frames, at what cost: to choose its sampler and steps."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..config import FrameDataConfig, UpsamplerCheckConfig, pick
from ..data import decode, images
from ..data.clips import count_frames
from ..data.frames import FrameIndex, choose_resize
from ..evaluation import image_quality
from ..evaluation.distances import frechet_distance
from .load import Upsampler, load_upsampler

Figures = dict[str, float | None]
TITLES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "frechet": "Frechet",
    "flicker": "flicker (grey levels)",
    "passes": "passes",
    "seconds": "s per frame",
}


def true_clips(
    index: FrameIndex, config: FrameDataConfig, num_frames: int
) -> Iterator[tuple[str, th.Tensor]]:
    """(path, frames [F, 3, h, w] uint8) of each file: its first `num_frames`, one of an image."""
    for path, info in index.clips:
        if not info.is_video:
            yield path, images.read_image(path)[None]
        else:
            count = min(num_frames, count_frames(info.duration_seconds, config.video_fps))
            yield path, th.stack([*decode.read_frames(path, 0, count, config.video_fps)])


def load_upsamplers(
    flags: dict[str, Any], explicit: set[str], device: th.device
) -> dict[str, Upsampler]:
    """The upsampler with each of --samplers, or with --sr_sample_fn; one network for all.

    All are made before the first is used, so that a wrong setting costs no time.
    """
    config = pick(UpsamplerCheckConfig, flags)
    chosen: dict[str, dict[str, Any]] = config.sampler_flags or {flags["sr_sample_fn"]: {}}
    if twice := explicit & set(chain.from_iterable(chosen.values())):
        raise ValueError(f"--{min(twice)}: --samplers sets it; leave one of them out")
    upsamplers: dict[str, Upsampler] = {}
    for name, more in chosen.items():
        upsampler = load_upsampler(flags | more, explicit | more.keys(), device)
        if upsampler is None:
            raise ValueError("--sr_model_path is empty: name the upsampler to check")
        first = next(iter(upsamplers.values()), upsampler)
        upsamplers[name] = dataclasses.replace(upsampler, model=first.model)
    return upsamplers


def check(
    upsampler: Upsampler, index: FrameIndex, config: FrameDataConfig, num_frames: int
) -> dict[str, Any]:
    """{"mean": {"upsampled", "bicubic": figures}, "clips": {path: the same}}.

    Flicker is None for images. The means have the Frechet distance of the patches of all clips to
    the true ones as well.
    """
    clips: dict[str, dict[str, Figures]] = {}
    patches: dict[str, list[th.Tensor]] = defaultdict(list)
    files = tqdm(true_clips(index, config, num_frames), total=len(index.clips), unit="clip")
    for number, (path, frames) in enumerate(files):
        true, low_res = _pair(frames, upsampler)
        with _measured(upsampler.model, len(frames)) as cost:
            upsampled = upsampler(number, low_res, lambda done: None)
        bicubic = F.interpolate(low_res, true.shape[-2:], mode="bicubic").clamp(-1, 1)
        kinds = {"upsampled": upsampled, "bicubic": bicubic}
        clips[path] = {kind: _figures(x, true) for kind, x in kinds.items()}
        clips[path]["upsampled"] |= cost
        for kind, x in {**kinds, "true": true}.items():
            patches[kind].append(image_quality.patches(x))
    points = {kind: th.cat(parts) for kind, parts in patches.items()}
    means: dict[str, Figures] = {}
    for kind in ("upsampled", "bicubic"):
        distance = frechet_distance(points[kind], points["true"])
        means[kind] = _mean([clip[kind] for clip in clips.values()]) | {"frechet": distance}
    return {"mean": means, "clips": clips}


def _pair(frames: th.Tensor, upsampler: Upsampler) -> tuple[th.Tensor, th.Tensor]:
    """[F, 3, h, w] uint8 -> true frames and small ones, as in training without noise and JPEG."""
    large_size, small_size = upsampler.model.model.large_size, upsampler.small_size
    resize = choose_resize(upsampler.antialias)
    large = th.stack([images.fit_image(x, large_size, large_size, resize) for x in frames])
    small = th.stack([images.fit_image(x, small_size, small_size, resize) for x in large])
    return images.to_float(large), images.to_float(small)


@contextmanager
def _measured(model: nn.Module, num_frames: int) -> Iterator[Figures]:
    """What the work inside costs per frame, once it is done: passes of the model, and seconds."""
    cost: Figures = {}
    batches: list[int] = []

    def count(module: nn.Module, args: tuple[th.Tensor, ...]) -> None:
        batches.append(len(args[0]))

    handle = model.register_forward_pre_hook(count)
    start = time.perf_counter()
    try:
        yield cost
    finally:
        handle.remove()
    cost["passes"] = sum(batches) / num_frames
    cost["seconds"] = (time.perf_counter() - start) / num_frames


def _figures(frames: th.Tensor, true: th.Tensor) -> Figures:
    flicker = image_quality.flicker(frames, true)
    return {
        "psnr": image_quality.psnr(frames, true),
        "ssim": image_quality.ssim(frames, true),
        "flicker": None if math.isnan(flicker) else flicker,
    }


def _mean(rows: list[Figures]) -> Figures:
    """Mean of each figure over the clips that have it."""
    means: Figures = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row[name]) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means


def table(reports: dict[str, dict[str, Any]]) -> str:
    """A row for each sampler of `reports` (sampler -> what `check` found), and for bicubic."""
    rows = {name: report["mean"]["upsampled"] for name, report in reports.items()}
    rows["bicubic"] = next(iter(reports.values()))["mean"]["bicubic"]
    width = max(map(len, rows))
    lines = ["  ".join([" " * width, *TITLES.values()])]
    for label, figures in rows.items():
        cells = [label.ljust(width)]
        for name, title in TITLES.items():
            value = figures.get(name)
            cells.append(("-" if value is None else f"{value:.4g}").rjust(len(title)))
        lines.append("  ".join(cells))
    return "\n".join(lines)
