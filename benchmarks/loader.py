"""Clips per second of the training loader: decoded each time or cached, in process or by workers.

The clips are written by the benchmark: soft shapes that move, and stereo noise. The disk cache is
as warm as the machine's memory makes it.
"""

import itertools
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch as th
import torch.nn.functional as F
from bench import Bench
from measure import device
from report import Figure

from mm_diffusion import rng
from mm_diffusion.config import DataConfig
from mm_diffusion.data import encode
from mm_diffusion.data.clips import load_data
from mm_diffusion.data.loader import BATCHES_AHEAD, prefetch_to_device

FILE_FPS = 25
BATCH_SIZE = 4
NUM_WORKERS = 2
REPEATS = 3


@dataclass(frozen=True)
class Files:
    """Clips on disk, read at the size they have, and the batches of a repeat."""

    count: int
    side: int
    seconds: float
    batches: int

    @property
    def num_samples(self) -> int:
        return round(self.seconds * DataConfig.audio_fps)


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
        cache_dir = f"{folder}/cache"
        fill = load_data(config_of(folder, files, cache_dir, num_workers=0))
        for _ in itertools.islice(fill, math.ceil(files.count / BATCH_SIZE)):
            pass
        for num_workers in (0, NUM_WORKERS):
            decoded = config_of(folder, files, "", num_workers)
            cached = config_of(folder, files, cache_dir, num_workers)
            report(bench, "decoded", decoded, files.batches)
            report(bench, "from disk", cached, files.batches)


def report(bench: Bench, how: str, config: DataConfig, num_batches: int) -> None:
    where = f"{config.num_workers} workers" if config.num_workers else "in process"
    what = f"{config.video_size[3]} pixels, {how}, {where}"
    rates = clips_per_second(config, num_batches)
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
    return th.stack(frames), th.rand(2, files.num_samples, generator=generator) - 0.5


def config_of(folder: str, files: Files, cache_dir: str, num_workers: int) -> DataConfig:
    num_frames = round(files.seconds * DataConfig.video_fps)
    return DataConfig(
        data_dir=f"{folder}/clips",
        batch_size=BATCH_SIZE,
        video_size=(num_frames, 3, files.side, files.side),
        audio_size=(2, files.num_samples),
        cache_dir=cache_dir,
        num_workers=num_workers,
    )


def clips_per_second(config: DataConfig, num_batches: int) -> list[float]:
    """Of each repeat, once all workers run."""
    batches = prefetch_to_device(load_data(config), device())
    for _ in itertools.islice(batches, 1 + BATCHES_AHEAD * config.num_workers):
        pass
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in itertools.islice(batches, num_batches):
            pass
        rates.append(num_batches * BATCH_SIZE / (time.perf_counter() - start))
    batches.close()
    return rates
