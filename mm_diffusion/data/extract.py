"""Frames of video files as image files, which load several times faster (extract_video.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import blobfile
from tqdm import tqdm

from ..config import require_positive
from ..files import absolute, unambiguous
from . import DataError, MediaError, decode, images
from .clips import count_frames
from .frames import choose_resize
from .index import VIDEO_EXTENSIONS, Found, find_files
from .probing import fingerprint

FORMATS = ("png", "jpg")
MAX_NAME_BYTES = 255 - len(".image__00000000.png")  # of a clip, as file systems allow 255 in all
RECORD = "extracted.jsonl"  # first line: the settings; then one for each complete clip
FRAME_NAME = re.compile(r"\.?image_(.+)_\d+\.(?:png|jpg)")  # hidden until the clip is complete


@dataclasses.dataclass(frozen=True)
class ExtractSettings:
    """What all frames of a folder share; ValueError naming an impossible flag."""

    fps: float = 4.0
    format: str = "png"
    quality: int = 95
    size: int = 0
    antialias: bool = False

    def __post_init__(self) -> None:
        require_positive(fps=self.fps, quality=self.quality)
        if self.format not in FORMATS or self.quality > 100 or self.size < 0:
            raise ValueError("--format is png or jpg, --quality 1 to 100, --size 0 or pixels")

    def recorded(self) -> dict[str, Any]:
        """The settings that decide the frames: a png has no quality, a full frame no resizing."""
        used = dataclasses.asdict(self)
        if self.format == "png":
            del used["quality"]
        if not self.size:
            del used["antialias"]
        return used


def extract_videos(
    sources: Sequence[str], target: str, settings: ExtractSettings, num_workers: int = 4
) -> tuple[dict[str, int], dict[str, str]]:
    """Write all frames as `target`/image_<clip>_<n>.<format>; sources are files or folders.

    -> (clip -> number of its frames, path -> why it has none). Complete clips are kept, others
    extracted again; frames of a clip appear all at once. DataError, before anything is written,
    where that would mix two sources or settings.
    """
    require_positive(num_workers=num_workers)
    found, folder = find_videos(sources), Path(target)
    paths = paths_by_clip(found.paths)
    entries, on_disk = _open_record(folder, settings), _frames_by_clip(folder)
    complete = {c for c in paths if _is_complete(paths[c], entries.get(c), on_disk[c])}
    counts = {clip: entries[clip]["frames"] for clip in complete}
    bad, stop = dict(found.unreadable), threading.Event()
    pool = ThreadPoolExecutor(num_workers)  # decoders and encoders release the interpreter
    try:
        jobs = {}
        for clip in sorted(paths.keys() - complete):
            _remove(folder / name for name in on_disk[clip])
            jobs[pool.submit(_extract, paths[clip], folder, settings, stop)] = clip
        for job in tqdm(as_completed(jobs), "clips", len(jobs), unit="clip", leave=False):
            try:
                counts[jobs[job]] = job.result()
            except MediaError as error:
                bad[paths[jobs[job]]] = str(error)
    finally:
        stop.set()  # an error or interrupt does not wait for the ends of long files
        pool.shutdown(cancel_futures=True)
    return counts, bad


def paths_by_clip(files: Sequence[str]) -> dict[str, str]:
    """Clip name (see `clip_name`) -> path; DataError where two files have one name."""
    paths: dict[str, str] = {}
    for path in files:
        _refuse_two(paths.setdefault(clip_name(path), path), path)
    return paths


def find_videos(sources: Sequence[str]) -> Found:
    """These files, and all videos below these folders; DataError for a missing one."""
    sources = [unambiguous(os.path.expanduser(source)) for source in sources]
    files = {source for source in sources if os.path.isfile(source)}
    folders = sorted(set(sources) - files)
    for folder in folders:
        if not blobfile.isdir(folder):
            raise DataError(f"{folder}: no such file or folder; check -s")
    found = Found([], {})
    if folders:
        found = find_files(folders, VIDEO_EXTENSIONS, "videos", "check -s")
    return Found(sorted({absolute(path) for path in [*files, *found.paths]}), found.unreadable)


def clip_name(path: str) -> str:
    """The file's name without suffix; if that is too long, its beginning and a hash of it."""
    name = Path(path).stem
    encoded = os.fsencode(name)
    if len(encoded) <= MAX_NAME_BYTES:
        return name
    suffix = f"~{hashlib.sha256(encoded).hexdigest()[:16]}"
    return encoded[: MAX_NAME_BYTES - len(suffix)].decode("utf-8", "ignore") + suffix


def _refuse_two(one: str, other: str) -> None:
    if one != other:
        clash = f"frames of both would be image_{clip_name(one)}_*"
        raise DataError(f"{one} and {other}: {clash}; rename one, or choose another folder (-t)")


def _open_record(folder: Path, settings: ExtractSettings) -> dict[str, dict]:
    """Clip -> its entry in the record, which is begun if missing; DataError for other frames."""
    wanted, record, lines = settings.recorded(), folder / RECORD, []
    remedy = "choose another folder (-t)"
    for line in record.read_text().splitlines() if record.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # cut short: its clip is extracted again
            lines.append(json.loads(line))
    if not lines and _frames_by_clip(folder):
        raise DataError(f"{folder}: has frames, no record ({RECORD}) of their source; {remedy}")
    if not lines:
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(wanted))
    elif not lines[0].items() >= wanted.items():
        flags = " ".join(f"--{name} {value}" for name, value in lines[0].items())
        raise DataError(f"{folder}: its frames were extracted with {flags}; use these or {remedy}")
    return {entry["clip"]: entry for entry in lines[1:]}


def _frames_by_clip(folder: Path) -> dict[str, list[str]]:
    """Clip -> names of its frames in the folder."""
    by_clip = defaultdict(list)
    for name in os.listdir(folder) if folder.exists() else []:
        if match := FRAME_NAME.fullmatch(name):
            by_clip[match[1]].append(name)
    return by_clip


def _is_complete(path: str, entry: dict | None, names: list[str]) -> bool:
    """Whether all frames of a file are there; DataError if they are of another file."""
    if entry is None:
        return False
    if entry["fingerprint"] != fingerprint(path):
        _refuse_two(entry["path"], path)
        return False
    return len(names) == entry["frames"]


def _extract(path: str, folder: Path, settings: ExtractSettings, stop: threading.Event) -> int:
    """Write and record all frames of a file; their number. MediaError, and none, if one fails."""
    clip = clip_name(path)
    entry = {"clip": clip, "path": path, "fingerprint": fingerprint(path)}
    hidden: list[Path] = []
    try:
        count = count_frames(decode.video_duration(path), settings.fps)
        for number, frame in enumerate(decode.read_frames(path, 0, count, settings.fps)):
            if stop.is_set():
                raise InterruptedError(path)
            hidden.append(folder / f".image_{clip}_{number:06d}.{settings.format}")
            if settings.size:
                resize = choose_resize(settings.antialias)
                frame = images.fit_image(frame, settings.size, settings.size, resize)
            images.write_image(hidden[-1], frame, settings.quality)
        for temporary in hidden:
            temporary.rename(temporary.with_name(temporary.name[1:]))
    except BaseException:
        _remove(hidden)
        raise
    with open(folder / RECORD, "a") as record:  # one write: lines of threads do not mix
        record.write("\n" + json.dumps(entry | {"frames": count}))
    return count


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
