"""Corrupt, odd and false videos and images: each is left out with a reason, or gives sane tensors.

They are read in a process of its own, which none of them may end, hold up or make noisy.
"""

import faulthandler
import functools
import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch as th
from media_files import NOT_VIDEOS, ODD_VIDEOS, damaged_clips, damaged_images

from mm_diffusion import logger
from mm_diffusion.config import DataConfig, FrameDataConfig
from mm_diffusion.data import MediaError, decode, images, probing
from mm_diffusion.data.clips import ClipDataset
from mm_diffusion.data.frames import FrameDataset, find_images
from mm_diffusion.data.index import build_index

FILE_SECONDS = 20  # a file may take; then the process ends with a traceback
MAX_BYTES = 3 * 2**30  # that the process may need
CLIP_SHAPES = [(4, 3, 16, 24), (2, 16000)]
IMAGE_SHAPES = [(3, 16, 16), (3, 8, 8)]


# ---------------------------------------------------------------- in the process that reads


def in_time(function: Callable) -> Callable:
    """The function, each of whose calls may take FILE_SECONDS."""

    @functools.wraps(function)
    def limited(*args):
        faulthandler.dump_traceback_later(FILE_SECONDS, exit=True)
        return function(*args)

    return limited


def read_clips(folder: str) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) of every clip; "" if nothing is."""
    decode.probe = in_time(decode.probe)
    index = build_index(folder, max_bad_share=1, num_workers=1)
    dataset = ClipDataset(index, DataConfig(video_size="4,3,16,24", audio_size="2,16000"))
    return itertools.chain(index.bad.items(), try_all(dataset, index.clips, CLIP_SHAPES))


def read_images(folder: str) -> Iterator[tuple[str, str]]:
    """The same of every image, and of the frames of every video."""
    images.check_image, decode.video_duration = (
        in_time(images.check_image),
        in_time(decode.video_duration),
    )
    index = find_images(folder, num_workers=1)
    dataset = FrameDataset(index, FrameDataConfig(large_size=16, small_size=8))
    return itertools.chain(index.bad.items(), try_all(dataset, index.clips, IMAGE_SHAPES))


def try_all(dataset, files: list, shapes: list) -> Iterator[tuple[str, str]]:
    """(path, why the first, the middle or the last item of each file is not what it should be)."""
    for (path, _), first, end in zip(
        files, [0, *dataset.first_after], dataset.first_after, strict=False
    ):
        reasons = (
            try_item(dataset, item, shapes) for item in sorted({first, (first + end) // 2, end - 1})
        )
        yield path, next(filter(None, reasons), "")


def try_item(dataset, item: int, shapes: list) -> str:
    try:
        sample = in_time(dataset.__getitem__)(item)
    except MediaError as error:
        return str(error)
    parts = [*sample.values()] if isinstance(sample, dict) else [sample[0], sample[1]["low_res"]]
    assert [part.shape for part in parts] == shapes
    assert all(part.isfinite().all() and part.abs().max() <= 1 for part in parts)
    return ""


def main(*folders: str) -> None:
    """Print what is wrong with each file of "clips:folder" or "images:folder", and peak memory."""
    th.set_num_threads(1)
    logger.configure(enabled=False)
    probing.tqdm = functools.partial(probing.tqdm, file=open(os.devnull, "w"))  # noqa: SIM115
    reasons: dict[str, str] = {}
    for what, folder in (argument.split(":", 1) for argument in folders):
        reasons |= dict({"clips": read_clips, "images": read_images}[what](folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    json.dump({"reasons": reasons, "peak": peak}, sys.stdout)


# ---------------------------------------------------------------- in the process that tests


def read_in_process(cache: Path, **folders: Path) -> dict[str, dict[str, str]]:
    """Kind -> file name -> what is wrong with it; the process must end well, quiet and small."""
    environment = os.environ | {"MM_DIFFUSION_CACHE": str(cache)}
    command = [sys.executable, __file__, *(f"{what}:{folder}" for what, folder in folders.items())]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["peak"] < MAX_BYTES
    for path, reason in found["reasons"].items():
        assert "\n" not in reason
        assert not reason or reason.startswith(f"{path}: ")
    assert sorted(found["reasons"]) == sorted(
        str(path) for folder in folders.values() for path in folder.iterdir()
    )
    return {
        what: {path.name: found["reasons"][str(path)] for path in sorted(folder.iterdir())}
        for what, folder in folders.items()
    }


def check_clips(reasons: dict[str, str], count: int) -> None:
    assert all(reasons[name] for name in [*NOT_VIDEOS, "silent.mp4"])
    assert not any(
        reasons[name]
        for name in reasons
        if name in ODD_VIDEOS or name.startswith(("intact", "misnamed"))
    )
    damaged = [bool(reason) for name, reason in reasons.items() if name[0].isdigit()]
    assert len(damaged) == count
    assert (
        count / 8 < sum(damaged) < count * 7 / 8
    )  # else the damage is not worth the name, or too much of it


def check_images(reasons: dict[str, str]) -> None:
    assert not any(reasons[f"intact{suffix}"] for suffix in (".jpg", ".png"))
    assert all(reasons[f"{name}.jpg"] for name in ("empty", "text", "zip", "gif"))
    assert any(reason for name, reason in reasons.items() if name[0].isdigit())


def test_corrupt_odd_and_false_files_are_left_out_with_a_reason_or_give_sane_tensors(tmp_path):
    damaged_clips(tmp_path / "clips", 40)
    damaged_images(tmp_path / "images", 60)
    reasons = read_in_process(
        tmp_path / "index", clips=tmp_path / "clips", images=tmp_path / "images"
    )
    check_clips(reasons["clips"], 40)
    check_images(reasons["images"])


@pytest.mark.slow
def test_two_hundred_corrupt_videos_are_left_out_with_a_reason_or_give_sane_clips(tmp_path):
    damaged_clips(tmp_path / "clips", 200)
    check_clips(read_in_process(tmp_path / "index", clips=tmp_path / "clips")["clips"], 200)


@pytest.mark.slow
def test_corrupt_videos_are_left_out_with_a_reason_or_give_sane_frames_whatever_their_audio(
    tmp_path,
):
    damaged_clips(tmp_path / "clips", 200)
    reasons = read_in_process(tmp_path / "index", images=tmp_path / "clips")["images"]
    assert not any(
        reasons[name]
        for name in reasons
        if name in [*ODD_VIDEOS, "silent.mp4"] or name.startswith("intact")
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
