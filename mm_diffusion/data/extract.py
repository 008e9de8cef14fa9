"""Frames of films written as image files, once, which load several times faster in training (extract_video.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import blobfile
from tqdm import tqdm

from ..files import absolute
from . import DataError, MediaError, decode, images
from .clips import count_frames, require_positive
from .index import VIDEO_EXTENSIONS, find_files, fingerprint, identity

FORMATS = ("png", "jpg")
RECORD = "extracted.jsonl"  # first line: the settings; then one for each clip that is complete
FRAME_NAME = re.compile(r"\.?image_(.+)_\d+\.(?:png|jpg)")  # hidden until the clip is complete


@dataclasses.dataclass(frozen=True)
class ExtractSettings:
    """What one folder of frames has in common; ValueError naming a flag that is impossible."""

    fps: float = 4.0
    format: str = "png"
    quality: int = 95
    size: int = 0

    def __post_init__(self) -> None:
        require_positive(fps=self.fps, quality=self.quality)
        if self.format not in FORMATS or self.quality > 100 or self.size < 0:
            raise ValueError(
                "--format is png or jpg, --quality 1 to 100, --size pixels (0: as the video has them)"
            )

    def told(self) -> dict[str, Any]:
        """What decides the frames."""
        settings = dataclasses.asdict(self)
        return (
            settings
            if self.format == "jpg"
            else {name: settings[name] for name in settings if name != "quality"}
        )


def extract_videos(
    sources: Sequence[str], target: str, settings: ExtractSettings, num_workers: int = 4
) -> tuple[dict[str, int], dict[str, str]]:
    """Write the frames of all films (files, or below folders) as `target`/image_<clip>_<n>.<format>, clips in parallel.

    -> (clip -> frames it has, path -> why it has none). What is complete already is kept, other clips are done anew.
    DataError, before anything is written, where that would mix two sources or settings. Frames of a clip appear when
    all of them are there.
    """
    require_positive(num_workers=num_workers)
    films, folder = films_by_name(sources), Path(target)
    held, on_disk = _claim(folder, settings), _frames_by_clip(folder)
    complete = {
        clip: held[clip]["frames"]
        for clip in films
        if _is_complete(films[clip], held.get(clip), on_disk[clip])
    }
    bad, stop = {}, threading.Event()
    pool = ThreadPoolExecutor(num_workers)  # decoders and encoders let go of the interpreter
    try:
        todo = [clip for clip in films if clip not in complete]
        running = {
            pool.submit(_extract, films[clip], clip, folder, settings, on_disk[clip], stop): clip
            for clip in todo
        }
        for done in tqdm(as_completed(running), "clips", len(running), unit="clip", leave=False):
            try:
                complete[running[done]] = done.result()
            except MediaError as error:
                bad[films[running[done]]] = str(error)
    finally:
        stop.set()  # where something failed or the user interrupts: no waiting for the ends of long films
        pool.shutdown(cancel_futures=True)
    return complete, bad


def films_by_name(sources: Sequence[str]) -> dict[str, str]:
    """Clip name (the file's, without its suffix) -> path; DataError where two files share one, or there is none."""
    sources = [os.path.expanduser(source) for source in sources]
    paths = {os.path.abspath(source) for source in sources if os.path.isfile(source)}
    if folders := [source for source in sources if not os.path.isfile(source)]:
        if missing := [folder for folder in folders if not blobfile.isdir(folder)]:
            raise DataError(f"{missing[0]}: no such file or folder; check -s")
        found = find_files(folders, VIDEO_EXTENSIONS, "videos", "check -s")
        paths |= {absolute(path) for path in found}
    films: dict[str, str] = {}
    for path in sorted(paths):
        _refuse_two(films.setdefault(Path(path).stem, path), path)
    return films


def _refuse_two(one: str, other: str) -> None:
    if one != other:
        names = f"image_{Path(one).stem}_*"
        raise DataError(
            f"{one} and {other}: frames of both would be {names}; rename one, or extract it elsewhere (-t)"
        )


def _claim(folder: Path, settings: ExtractSettings) -> dict[str, dict]:
    """Clip -> what the folder's record says of it. Begins the record; DataError if it holds other frames."""
    wanted, record = settings.told(), folder / RECORD
    lines = []
    for line in record.read_text().splitlines() if record.exists() else []:
        with contextlib.suppress(
            json.JSONDecodeError
        ):  # one that was cut short; its clip is done anew
            lines.append(json.loads(line))
    if not lines and _frames_by_clip(folder):
        raise DataError(
            f"{folder}: holds frames but no record ({RECORD}) of their source; choose another folder (-t)"
        )
    if not lines:
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(wanted))
    elif not lines[0].items() >= wanted.items():
        flags = " ".join(f"--{name} {value}" for name, value in lines[0].items())
        raise DataError(
            f"{folder}: its frames were extracted with {flags}; use these, or another folder (-t)"
        )
    return {entry["clip"]: entry for entry in lines[1:]}


def _frames_by_clip(folder: Path) -> dict[str, list[str]]:
    """Clip -> names of its frames in the folder."""
    names = sorted(os.listdir(folder)) if folder.exists() else []
    by_clip = defaultdict(list)
    for name in names:
        if match := FRAME_NAME.fullmatch(name):
            by_clip[match[1]].append(name)
    return by_clip


def _is_complete(path: str, entry: dict | None, names: list[str]) -> bool:
    """Whether a film's frames are all there; DataError if they are another film's."""
    if entry is None:
        return False
    is_same = _is_same(path, entry)
    if not is_same:
        _refuse_two(entry["path"], path)
    return is_same and len(names) == entry["frames"]


def _is_same(path: str, entry: dict) -> bool:
    """Whether a film is the one recorded, be it elsewhere or copied."""
    now = identity(path)
    if entry.items() >= now.items():
        return True
    return entry["size"] == now["size"] and entry.get("fingerprint") == fingerprint(path)


def _extract(
    path: str,
    clip: str,
    folder: Path,
    settings: ExtractSettings,
    leftovers: list[str],
    stop: threading.Event,
) -> int:
    """Write and record all frames of a film; how many. MediaError if not all can be decoded: then none stays."""
    entry = {
        "clip": clip,
        "path": path,
        **identity(path),
        "fingerprint": fingerprint(path),
    }
    _remove([folder / name for name in leftovers])
    hidden: list[Path] = []
    try:
        count = count_frames(decode.video_duration(path), settings.fps)
        for number, frame in enumerate(decode.read_frames(path, 0, count, settings.fps)):
            if stop.is_set():
                raise InterruptedError(path)
            hidden.append(folder / f".image_{clip}_{number:06d}.{settings.format}")
            frame = (
                images.fit_image(frame, settings.size, settings.size) if settings.size else frame
            )
            images.write_image(hidden[-1], frame, settings.quality)
        for place in hidden:
            place.rename(place.with_name(place.name[1:]))
    except BaseException:
        _remove(hidden)
        raise
    with open(folder / RECORD, "a") as record:  # one write, so that lines of threads do not mix
        record.write("\n" + json.dumps(entry | {"frames": count}))
    return count


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
