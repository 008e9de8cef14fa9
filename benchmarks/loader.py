"""Clips per second of the training loader: decoded each time, and from the disk cache; in this process, and by workers.

The clips are written for the occasion: soft shapes that move, and stereo noise. The disk cache is as warm as the
machine's memory makes it.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch as th
import torch.nn.functional as F
from bench import Bench
from measure import device
from report import Figure

from mm_diffusion import rng
from mm_diffusion.data import encode
from mm_diffusion.data.clips import load_data
from mm_diffusion.data.loader import BATCHES_AHEAD, prefetch_to_device
from mm_diffusion.script_util import DataConfig

FILE_FPS = 25
BATCH_SIZE = 4
NUM_WORKERS = 2
REPEATS = 3


@dataclass(frozen=True)
class Files:
    """Clips on disk, read at the size they have, and how many batches of them make a repeat."""

    count: int
    side: int
    seconds: float
    batches: int


PUBLISHED = Files(24, 256, 5.0, 6)  # a file of the data set, before it is made smaller
QUICK = Files(4, 64, 1.0, 2)


def measure_loader(bench: Bench) -> None:
    """The section "loader"."""
    files = QUICK if bench.quick else PUBLISHED
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict("os.environ", MM_DIFFUSION_CACHE=f"{folder}/index"),
    ):
        write_clips(Path(folder, "clips"), files)
        ways = {"decoded": "", "from disk": f"{folder}/kept"}
        fill = load(folder, files, ways["from disk"], 0)
        next(itertools.islice(fill, -(-files.count // BATCH_SIZE) - 1, None))
        for (how, cache_dir), num_workers in itertools.product(ways.items(), (0, NUM_WORKERS)):
            what = f"{files.side} pixels, {how}, {f'{num_workers} workers' if num_workers else 'in process'}"
            rates = clips_per_second(
                lambda c=cache_dir, n=num_workers: load(folder, files, c, n), num_workers, files
            )
            bench.report.add(Figure("loader", "", what, rates, "clips/s"))


def write_clips(folder: Path, files: Files) -> None:
    for k in range(files.count):
        video, audio = make_clip(k, files)
        encode.write_clip(folder / f"{k:03d}.mp4", video, FILE_FPS, audio, DataConfig.audio_fps)


def make_clip(number: int, files: Files) -> tuple[th.Tensor, th.Tensor]:
    """-> ([F, 3, side, side], [2, L]) in [-1, 1]: a soft random pattern that drifts, and noise."""
    generator = rng.generator("clip", number)
    coarse = th.rand(1, 3, 24, 24, generator=generator) * 2 - 1
    pattern = F.interpolate(coarse, (files.side, files.side), mode="bicubic").clamp(-1, 1)[0]
    frames = [pattern.roll((2 * k, 3 * k), (1, 2)) for k in range(round(files.seconds * FILE_FPS))]
    return th.stack(frames), th.rand(
        2, round(files.seconds * DataConfig.audio_fps), generator=generator
    ) - 0.5


def load(folder: str, files: Files, cache_dir: str, num_workers: int) -> itertools.chain:
    return load_data(
        data_dir=f"{folder}/clips",
        batch_size=BATCH_SIZE,
        video_size=(round(files.seconds * DataConfig.video_fps), 3, files.side, files.side),
        audio_size=(2, round(files.seconds * DataConfig.audio_fps)),
        video_fps=DataConfig.video_fps,
        audio_fps=DataConfig.audio_fps,
        cache_bytes=0,
        cache_dir=cache_dir,
        num_workers=num_workers,
    )


def clips_per_second(load: Callable, num_workers: int, files: Files) -> list[float]:
    """Of each repeat, once all workers run."""
    batches = prefetch_to_device(load(), device())
    for _ in itertools.islice(batches, 1 + BATCHES_AHEAD * num_workers):
        pass
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in itertools.islice(batches, files.batches):
            pass
        rates.append(files.batches * BATCH_SIZE / (time.perf_counter() - start))
    batches.close()
    return rates
