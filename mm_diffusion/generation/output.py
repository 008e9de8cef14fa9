"""Folders of generated clips: files, names, and the record of what they are."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch as th

from .. import logger
from ..config import SR
from ..data import encode
from ..files import is_remote, remove_unfinished, write_text
from ..viewing import gallery

LARGE, TRUTH = "sr_mp4", "ground_truth"  # folders of clips beside original/
RECORD = "sampling.json"


def clip_name(stem: str, number: int) -> str:
    """The name of the files of a clip."""
    return f"{stem}_{number:05d}"


def clip_paths(folder: str | os.PathLike, name: str, *more: str) -> list[Path]:
    """The files of a clip: wav, mp4, and the mp4 in the folders `more` (LARGE, TRUTH)."""
    videos = [Path(folder, kind, f"{name}.mp4") for kind in ("original", *more)]
    return [Path(folder, "audios", f"{name}.wav"), *videos]


class ClipFormat(NamedTuple):
    """Rates of a clip in Hz, and the audio codec of its mp4 files."""

    video_fps: int
    audio_fps: int
    audio_codec: str = "flac"

    def write(self, path: Path, video: th.Tensor, audio: th.Tensor) -> None:
        """Write a clip [F, C, H, W], [C, L] as mp4."""
        encode.write_clip(path, video, self.video_fps, audio, self.audio_fps, self.audio_codec)


def write_sample(
    folder: str | os.PathLike,
    name: str,
    video: th.Tensor,
    audio: th.Tensor,
    how: ClipFormat,
    large: th.Tensor | None = None,
) -> None:
    """A clip [F, C, H, W], [C, L] -> audios/NAME.wav and original/NAME.mp4.

    `large`, the upsampled video, goes to sr_mp4/NAME.mp4; both mp4 files have the audio.
    """
    wav, mp4, sr_mp4 = clip_paths(folder, name, LARGE)
    encode.write_wav(wav, audio, how.audio_fps)
    how.write(mp4, video, audio)
    if large is not None:
        how.write(sr_mp4, large, audio)


def write_truth(
    folder: str | os.PathLike, name: str, truth: Mapping[str, th.Tensor], how: ClipFormat
) -> None:
    """The clip that the conditioning modality is from -> ground_truth/NAME.mp4."""
    *_, mp4 = clip_paths(folder, name, TRUTH)
    how.write(mp4, truth["video"], truth["audio"])


def show_gallery(folder: str) -> None:
    """Write the gallery of a local folder of clips and log where it is; a failure is a warning."""
    if is_remote(folder):
        return
    try:
        logger.log(f"gallery of the clips: {gallery.write_gallery(folder)}")
    except (ValueError, OSError) as error:
        logger.warn(f"{folder}: no gallery ({error})")


class GalleryDrawer:
    """Draws the gallery of a local folder of clips in a process of its own."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.process: Any = None

    def draw(self) -> None:
        """Start to draw and log what is there, after what it may be drawing still."""
        self.wait()
        self._start(show_gallery)

    def draw_meanwhile(self) -> None:
        """Start to draw what is there, unless it is drawing still; the log says nothing of it."""
        if not self.process or not self.process.is_alive():
            self._start(_draw_quietly)

    def _start(self, function: Callable[[str], None]) -> None:
        if is_remote(self.folder):
            return
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=function, args=(self.folder,))
        self.process.start()

    def wait(self) -> None:
        """Wait until it has drawn."""
        if self.process:
            self.process.join()


def _draw_quietly(folder: str) -> None:
    """A failure is logged when the whole gallery is drawn."""
    with suppress(ValueError, OSError):
        gallery.write_gallery(folder)


def claim_folder(folder: str | os.PathLike, description: dict[str, Any]) -> None:
    """Record in sampling.json what the clips of this folder are; ValueError where it holds others.

    What describes the upsampling ("upsampler", "sr_...") must agree once there are upsampled clips,
    the rest once there are any.
    """
    record, remedy = Path(folder, RECORD), "choose another --output_dir"
    try:
        known: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    except ValueError:
        raise ValueError(f"{record} is corrupt: {remedy}") from None
    has_clips, has_large = _holds_clips(folder, "original"), _holds_clips(folder, LARGE)
    if has_clips and not record.exists():
        raise ValueError(f"{folder} holds clips of unknown origin (no {RECORD}): {remedy}")
    wanted: dict[str, Any] = json.loads(json.dumps(description))
    kept = {}
    for key, value in known.items():
        is_kept = has_large if key.startswith(("upsampler", SR)) else has_clips
        if is_kept:
            kept[key] = value
    different = ", ".join(key for key in wanted if kept.get(key, wanted[key]) != wanted[key])
    if different:
        raise ValueError(f"{folder} holds clips of another run ({different} differ): {remedy}")
    write_text(record, json.dumps(kept | wanted, indent=1, sort_keys=True))


def _holds_clips(folder: str | os.PathLike, kind: str) -> bool:
    return any(Path(folder, kind).glob("[!.]*.mp4"))


def missing_clips(
    folder: str | os.PathLike, names: Sequence[str], description: dict[str, Any], *more: str
) -> list[int]:
    """Claim the folder -> numbers of the clips of these names whose files are not all there."""
    claim_folder(folder, description)
    for path in clip_paths(folder, "", *more):
        remove_unfinished(path.parent)
    paths = [clip_paths(folder, name, *more) for name in names]
    return [number for number, files in enumerate(paths) if not all(map(Path.exists, files))]


@contextmanager
def background(most_waiting: int = 16) -> Iterator[Callable[..., None]]:
    """`call(name, function, *args)` that returns at once: files are encoded beside the model.

    At most `most_waiting` calls wait; one more waits for the oldest. Leaving waits for all of them.
    The first error of a call, with a note of its `name`, is raised by the next call or on leaving;
    what was generated before is still written.
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
