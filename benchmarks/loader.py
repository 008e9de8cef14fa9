"""Clips per second of the training loader: decoded each time, and from the disk cache; in this process, and by workers.

The clips are written for the occasion: soft shapes that move, and stereo noise. The disk cache is as warm as the
machine's memory makes it. With --step_seconds, a training step is stood in for by a pause of that length.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch as th
import torch.nn.functional as F
from measure import device

from mm_diffusion import logger, media, rng
from mm_diffusion.datasets import BATCHES_AHEAD, load_data, prefetch_to_device
from mm_diffusion.dist_util import friendly_errors

SAMPLE_RATE, VIDEO_FPS = 16000, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num_clips", type=int, default=24)
    parser.add_argument("--side", type=int, default=256, help="pixels, of the files and of what is read")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--file_fps", type=float, default=25, help="of the files; 4 are read a second")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--batches", type=int, default=12, help="that are timed")
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--step_seconds", type=float, default=0, help="pause after each batch")
    args = parser.parse_args()
    logger.configure(enabled=False)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MM_DIFFUSION_CACHE"] = f"{folder}/index"
        write_clips(Path(folder, "clips"), args)
        compare(folder, args)


def write_clips(folder: Path, args: argparse.Namespace) -> None:
    for k in range(args.num_clips):
        video, audio = make_clip(k, args.side, args.seconds, args.file_fps)
        media.write_clip(folder / f"{k:03d}.mp4", video, args.file_fps, audio, SAMPLE_RATE)
    size = sum(path.stat().st_size for path in folder.iterdir()) / args.num_clips
    print(f"{args.num_clips} clips of {args.side} pixels and {args.seconds:g} s, {size / 1e6:.2f} MB each")


def make_clip(number: int, side: int, seconds: float, fps: float) -> tuple[th.Tensor, th.Tensor]:
    """-> ([F, 3, side, side], [2, L]) in [-1, 1]: a soft random pattern that drifts, and noise."""
    generator = rng.generator("clip", number)
    coarse = th.rand(1, 3, 24, 24, generator=generator) * 2 - 1
    pattern = F.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)[0]
    frames = [pattern.roll((2 * k, 3 * k), (1, 2)) for k in range(round(seconds * fps))]
    return th.stack(frames), th.rand(2, round(seconds * SAMPLE_RATE), generator=generator) - 0.5


def compare(folder: str, args: argparse.Namespace) -> None:
    """Print clips per second of every way to load."""
    options = {
        "data_dir": f"{folder}/clips",
        "batch_size": args.batch_size,
        "video_size": (round(args.seconds * VIDEO_FPS), 3, args.side, args.side),
        "audio_size": (2, round(args.seconds * SAMPLE_RATE)),
        "video_fps": VIDEO_FPS,
        "audio_fps": SAMPLE_RATE,
        "cache_bytes": 0,
    }
    all_clips = -(-args.num_clips // args.batch_size)
    next(itertools.islice(load_data(**options, num_workers=0, cache_dir=f"{folder}/kept"), all_clips - 1, None))
    rows = []
    for (how, cache_dir), num_workers in itertools.product(
        {"decoded": "", "from disk": f"{folder}/kept"}.items(), (0, args.num_workers)
    ):
        rate = clips_per_second(
            lambda n=num_workers, c=cache_dir: load_data(**options, num_workers=n, cache_dir=c), args
        )
        rows.append(f"{how:<12}{num_workers or 'in process':>12}{rate:>12.1f}{1000 / rate:>12.1f}")
    print("\n".join([f"{'clips':<12}{'workers':>12}{'clips/s':>12}{'ms/clip':>12}", *rows]))


def clips_per_second(load: Callable, args: argparse.Namespace) -> float:
    batches = prefetch_to_device(load(), device())
    for _ in itertools.islice(batches, 1 + BATCHES_AHEAD * args.num_workers):  # all workers run
        pass
    start = time.perf_counter()
    for _ in itertools.islice(batches, args.batches):
        time.sleep(args.step_seconds)
    taken = time.perf_counter() - start
    batches.close()
    return args.batches * args.batch_size / taken


if __name__ == "__main__":
    with friendly_errors():
        main()
