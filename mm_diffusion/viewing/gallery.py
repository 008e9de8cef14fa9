"""A page of the clips in a folder: players, frames, spectrograms, positions and scores.

`index.html` lies in the folder and needs only a browser. Images are files in `gallery/` beside it,
which the browser fetches as they come near: a page of 1,000 clips is 2 MB and opens in a second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch as th
from tqdm import tqdm

from ..data import DataError, MediaError, decode, images
from ..data.index import VIDEO_EXTENSIONS, find_files
from ..data.probing import identity
from ..files import write_text
from . import pages
from .measures import SCORES, Score, is_silent, measure, positions, why_no_object
from .spectrogram import RANGE_DB, mel_height, spectrogram

PAGE, IMAGES, SHEET = "index.html", "gallery", "contact_sheet.png"
KINDS = ("poster", "strip", "spectrogram")  # images of a clip
MEASURES_FORMAT = 3  # of the JSON file beside a clip's images; raised when Clip changes
TEMPLATE = "gallery.html"

MAX_SECONDS = 60  # decoded of a clip
MAX_FRAMES = 80  # spread over them
MAX_SIDE = 128  # pixels of a decoded frame
MAX_SAMPLE_RATE = 16000
STRIP_FRAMES, SHEET_FRAMES, SHEET_CLIPS, SHEET_SIDE = 10, 8, 48, 64
MARKED_HZ = 1000  # labelled beside the spectrogram
JPEG_QUALITY = 85
MIN_PLAYABLE_RATE = 3000  # Hz, of browsers
PLAYABLE = (".mp4", ".mov", ".webm")
FROM_FILE = "file: "  # prefix of the keys of scores from the scores file


@dataclasses.dataclass(frozen=True)
class Clip:
    """What the page shows of a file. A score is a number, or the reason why it is undefined."""

    seconds: float
    shown_seconds: float
    width: int
    height: int
    fps: float
    sample_rate: int
    top_hz: float  # of the spectrogram
    images: dict[str, str]  # of KINDS -> file in IMAGES
    scores: dict[str, float | str]
    object_positions: list[float | None]  # per frame, -1 left to 1 right
    audio_positions: list[float | None]
    notes: list[str]


def write_gallery(
    folder: str | os.PathLike, scores_file: str | os.PathLike = "", num_workers: int = 4
) -> Path:
    """Write the page of the clips below a local folder and a contact sheet -> path of the page.

    A clip is decoded again only if an image of it is missing or the file has changed.
    `scores_file`: see `read_scores`; default `folder`/scores.json if it exists. DataError if no
    clip can be read.
    """
    root = Path(os.path.abspath(os.path.expanduser(folder)))
    paths = find_files([os.fspath(root)], VIDEO_EXTENSIONS, "clips", "give a folder of clips").paths
    names = {path: os.path.relpath(path, root) for path in paths}
    scores_path = Path(scores_file or root / "scores.json")
    has_scores = scores_file or scores_path.exists()
    extra = read_scores(scores_path, names.values()) if has_scores else {}
    clips, bad = {}, {}
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        loading = [pool.submit(load_clip, path, root / IMAGES) for path in paths]
        shown = tqdm(loading, "clips", unit="clip", leave=False)
        for (path, name), clip in zip(names.items(), shown, strict=True):
            try:
                clips[name] = clip.result()
            except MediaError as error:
                bad[name] = str(error).removeprefix(f"{path}: ")
    if not clips:
        name, reason = next(iter(bad.items()))
        raise DataError(f"{root}: none of its {len(bad)} files can be read ({name}: {reason})")
    clips = {name: clips[name] for name in sorted(clips, key=_order)}
    write_sheet(root / IMAGES, clips.values())
    write_text(root / PAGE, render(root.name, clips, extra=extra, bad=bad))
    return root / PAGE


def _order(name: str) -> tuple:
    """By file name, then folder, numbers by value: clips stand beside their ground truth."""
    folder, file = os.path.split(os.path.splitext(name)[0])
    return _natural(file), _natural(folder), name


def _natural(text: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part.casefold() for part in re.split(r"(\d+)", text)]


def load_clip(path: str, folder: Path) -> Clip:
    """What `examine` found at an earlier time if it is still valid, otherwise what it finds now."""
    source = identity(path)
    if not source["size"]:
        raise MediaError(f"{path}: is empty (0 bytes)")
    relative = os.fsencode(os.path.relpath(path, folder))
    stem = hashlib.sha256(relative).hexdigest()[:16]
    measures = folder / f"{stem}_v{MEASURES_FORMAT}.json"
    if measures.exists():
        stored = json.loads(measures.read_text(encoding="utf-8"))
        clip = Clip(**stored["clip"])
        if stored["source"] == source and all((folder / f).exists() for f in clip.images.values()):
            return clip
    clip = examine(path, folder, stem=stem)
    write_text(measures, json.dumps({"source": source, "clip": dataclasses.asdict(clip)}))
    return clip


def examine(path: str, folder: Path, stem: str) -> Clip:
    """Measure a clip and write its images, named `stem`, to `folder`.

    MediaError if it cannot be decoded.
    """
    info = decode.probe(path)
    seconds = max(min(info.duration_seconds, MAX_SECONDS), 1 / info.fps)
    fps = min(info.fps, MAX_FRAMES / seconds)
    rate = min(info.sample_rate, MAX_SAMPLE_RATE)
    frames = _read_frames(path, count=max(1, round(seconds * fps)), fps=fps)
    _, audio = decode.read_window(path, 0, 1, fps, 1, 1, rate, max(1, round(seconds * rate)))
    video = images.to_float(frames)
    files = {kind: f"{stem}_{kind}.jpg" for kind in KINDS}
    poster = images.enlarge(frames[len(frames) // 2])
    made = poster, strip(frames), spectrogram(audio, rate)
    for file, image in zip(files.values(), made, strict=True):
        images.write_image(folder / file, image, JPEG_QUALITY)
    object_positions, audio_positions = positions(video, audio)
    return Clip(
        seconds=info.duration_seconds,
        shown_seconds=seconds,
        width=info.width,
        height=info.height,
        fps=info.fps,
        sample_rate=info.sample_rate,
        top_hz=rate / 2,
        images=files,
        scores=measure(video, audio),
        object_positions=object_positions,
        audio_positions=audio_positions,
        notes=_notes(path, info, video=video, audio=audio),
    )


def _read_frames(path: str, count: int, fps: float) -> th.Tensor:
    """The first frames [F, 3, h, w] uint8, shrunk to MAX_SIDE, all of the size of the first."""
    stream = decode.read_frames(path, 0, count, fps)
    first = next(stream)
    scale = min(1, MAX_SIDE / max(first.shape[-2:]))
    height, width = (max(1, round(side * scale)) for side in first.shape[-2:])
    frames = [images.fit_image(first, height, width)]
    frames += [images.fit_image(frame, height, width) for frame in stream]
    return th.stack(frames)


def _notes(path: str, info: decode.ClipInfo, video: th.Tensor, audio: th.Tensor) -> list[str]:
    """What one should know of a clip before reading its scores."""
    suffix = Path(path).suffix.lower()
    no_object = why_no_object(video)
    notes = {
        "silent": is_silent(audio),
        no_object: bool(no_object),
        "mono": info.channels == 1,
        f"only the first {MAX_SECONDS} s are shown": info.duration_seconds > MAX_SECONDS,
        f"browsers play no audio at {info.sample_rate} Hz": info.sample_rate < MIN_PLAYABLE_RATE,
        f"browsers play no {suffix} files": suffix not in PLAYABLE,
    }
    return [note for note, holds in notes.items() if holds]


def strip(frames: th.Tensor) -> th.Tensor:
    """[F, 3, h, w] uint8 -> [3, H, n W]: n <= STRIP_FRAMES from the middle of equal time spans."""
    n = min(STRIP_FRAMES, len(frames))
    chosen = frames[((th.arange(n) + 0.5) * len(frames) / n).long()]
    return th.cat(list(images.enlarge(chosen)), dim=-1)


def write_sheet(folder: Path, clips: Iterable[Clip]) -> None:
    """A contact sheet of the first SHEET_CLIPS: SHEET_FRAMES of each, from its strip."""
    rows = []
    for clip in list(clips)[:SHEET_CLIPS]:
        count = _strip_frames(clip)
        frames = images.read_image(folder / clip.images["strip"]).chunk(count, dim=-1)
        chosen = th.linspace(0, count - 1, SHEET_FRAMES).round().long().tolist()
        rows.append(th.stack([images.fit_image(frames[k], SHEET_SIDE, SHEET_SIDE) for k in chosen]))
    images.save_contact_sheet(folder / SHEET, rows)


def _strip_frames(clip: Clip) -> int:
    return min(STRIP_FRAMES, len(clip.object_positions))


def read_scores(path: Path, names: Collection[str]) -> dict[str, dict[str, float | None]]:
    """JSON {"clip name": {"score": number or null}} -> the same for those of `names` that it has.

    A clip is named by its path below the folder, with or without suffix, or by its file name
    without suffix. ValueError if the file has another form or names none of the clips.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(stored, dict) or not all(isinstance(row, dict) for row in stored.values()):
        raise ValueError(f'{path}: need {{"clip name": {{"score": number}}}}')
    scores = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        keys = [key for key in (name, stem, os.path.basename(stem)) if key in stored]
        if not keys:
            continue
        scores[name] = stored[keys[0]]
        for label, value in scores[name].items():
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ValueError(f"{path}: {label} of {keys[0]} is {value!r}, need a number")
    if stored and not scores:
        first = f"its first name: {next(iter(stored))!r}"
        raise ValueError(f"{path}: names none of the {len(names)} clips ({first})")
    return scores


def render(
    title: str,
    clips: Mapping[str, Clip],
    extra: Mapping[str, Mapping[str, float | None]],
    bad: Mapping[str, str],
) -> str:
    """The page: the clips in this order, `extra` scores by clip, and why other files are absent."""
    scores = dict(SCORES)
    for label in dict.fromkeys(label for row in extra.values() for label in row):
        scores[FROM_FILE + label] = Score(label, "{:.4g}", "from the scores file")
    rows = [_row(name, clip, scores, extra.get(name, {})) for name, clip in clips.items()]
    folder_medians = {}
    for folder in sorted({row["folder"] for row in rows}):
        folder_medians[folder] = _medians(scores, [row for row in rows if row["folder"] == folder])
    return pages.render(
        TEMPLATE,
        title=title,
        rows=rows,
        scores=scores,
        medians=_medians(scores, rows),
        missing={key: sum(key not in row["values"] for row in rows) for key in scores},
        folder_medians=folder_medians,
        minutes=sum(clip.seconds for clip in clips.values()) / 60,
        bad=bad,
        images=IMAGES,
        sheet=SHEET,
        sheet_clips=SHEET_CLIPS,
        range_db=RANGE_DB,
        marked_hz=MARKED_HZ,
    )


def anchor(name: str) -> str:
    """The id of a clip on the page, by its path below the folder."""
    return f"clip-{quote(os.fsencode(name))}"


def _row(
    name: str, clip: Clip, scores: Mapping[str, Score], extra: Mapping[str, float | None]
) -> dict[str, Any]:
    """What the template needs of a clip."""
    found = clip.scores | {FROM_FILE + label: value for label, value in extra.items()}
    values, reasons = {}, {}
    for key in scores:
        value = found.get(key, "not in the scores file")
        if isinstance(value, str):
            reasons[key] = value
        elif value is None or not math.isfinite(value):
            reasons[key] = "undefined"
        else:
            values[key] = float(value)
    marked = ""
    if clip.top_hz >= 4 * MARKED_HZ:
        marked = f"{50 * (1 - mel_height(MARKED_HZ, clip.top_hz)):.1f}%"
    return {
        "clip": clip,
        "name": os.path.splitext(name)[0],
        "folder": os.path.dirname(name),
        "src": quote(os.fsencode(name)),
        "anchor": anchor(name),
        "frames": _strip_frames(clip),
        "marked": marked,
        "object_path": svg_path(clip.object_positions),
        "audio_path": svg_path(clip.audio_positions),
        "values": values,
        "reasons": reasons,
    }


def _medians(scores: Mapping[str, Score], rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The median of every score over the clips that have it."""
    medians = {}
    for key, score in scores.items():
        values = [row["values"][key] for row in rows if key in row["values"]]
        medians[key] = score.form.format(statistics.median(values)) if values else "no values"
    return medians


def svg_path(positions: Sequence[float | None]) -> str:
    """Positions -1..1 -> path in an SVG of 1000 x 100: time across, left at the top, None a gap."""
    path = ""
    previous = None
    for k, position in enumerate(positions):
        if position is not None:
            point = f"{1000 * (k + 0.5) / len(positions):.0f} {50 + 48 * position:.1f}"
            path += f"M{point}h.1" if previous is None else f"L{point}"  # h: a dot if alone
        previous = position
    return path
