"""A page that shows a folder of clips: players, frames, spectrograms, places seen and heard, scores.

`index.html` lies in the folder and needs nothing but a browser. Its pictures are files of their own, in `gallery/`
beside it, which the browser fetches as they come near: with 1,000 clips the page is 2 MB and opens in a second, where
the same pictures inside it would be 30 MB to read before anything shows.
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

import jinja2
import numpy as np
import torch as th
import torch.nn.functional as F
import torchaudio.functional as AF
from matplotlib import colormaps

from ..data import MediaError, decode, images
from ..data.index import VIDEO_EXTENSIONS, find_files, look_up, refuse_if_bad
from ..evaluation import stereo
from ..evaluation.scores import BLACK
from ..evaluation.spatial import STILL, horizontal_place, level_difference, spatial_alignment
from ..files import absolute, remove_unfinished, write_text

PAGE, PICTURES, SHEET = "index.html", "gallery", "contact_sheet.png"
MEASURED = "measured_2.json"  # below PICTURES: what is known of clips that have not changed; 2 is its format
KINDS = ("poster", "strip", "sound")  # of pictures that a clip has
GENERATOR = "mm-diffusion-stereo gallery"  # by which the page is known as ours
OURS = re.compile(
    rf"[0-9a-f]{{16}}_({'|'.join(KINDS)})\.jpg|measured_\d+\.json"
)  # below PICTURES, beside SHEET
TEMPLATE = Path(__file__).with_name("gallery.html")

MAX_SECONDS = 60  # of a clip that are looked at
MAX_FRAMES = 80  # spread over them
MAX_SIDE = 128  # pixels of a frame that is looked at
STRIP_FRAMES, SHEET_FRAMES, SHEET_CLIPS, SHEET_SIDE = 10, 8, 48, 64
MAX_RATE = 16000  # Hz, of the sound that is looked at
WINDOW_SECONDS = 1 / 50  # of the spectrogram, about
RANGE_DB = 80  # from the loudest to what is drawn black
SPECTROGRAM = (64, 400)  # most rows for a channel, and columns
MEL_CORNER_HZ = 700  # above which the scale of frequencies turns from linear to logarithmic
MARKED_HZ = 1000  # marked beside the spectrogram
JPEG_QUALITY = 85

BLANK = (
    0.5 / 127.5
) ** 2  # mean square of the brightness above its median, below which a picture shows nothing
FAINT = 0.05  # share of the mean energy of a clip's frames below which a frame has no place
LOWEST_RATE, PLAYABLE = 3000, (".mp4", ".mov", ".webm")  # Hz, and containers that browsers play


@dataclasses.dataclass(frozen=True)
class Score:
    """What a number on the page is called, how it is written and what it means."""

    label: str
    form: str
    meaning: str


SCORES = {
    "alignment": Score(
        "Spatial alignment",
        "{:z.2f}",
        "correlation over the clip of the object's horizontal place and the left-right level difference; 1 is best",
    ),
    "level": Score("Level", "{:.1f} dB", "root mean square of both channels, 0 dB at full scale"),
    "correlation": Score(
        "Left-right correlation", "{:z.2f}", "of the samples of the two channels; 1: mono"
    ),
    "balance": Score(
        "Balance", "{:+z.2f}", "(right - left) / (right + left) of the energies, -1 to 1"
    ),
    "motion": Score(
        "Motion", "{:.1f} %", "mean change of a pixel from frame to frame, of the full range"
    ),
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """What is shown of one file. A score is a number, or the words why there is none."""

    seconds: float
    shown_seconds: float  # of the pictures
    width: int
    height: int
    fps: float
    sample_rate: int
    pictures: dict[str, str]  # of KINDS -> file below PICTURES
    top_hz: float  # of the spectrogram
    scores: dict[str, float | str]
    seen: list[float | None]  # the object's place in each frame, -1 left to 1 right
    heard: list[float | None]  # the level difference meanwhile
    notes: list[str]


def measure(video: th.Tensor, audio: th.Tensor) -> dict[str, float | str]:
    """[F, 3, H, W] and [2, L] in [-1, 1] -> the SCORES of a clip, each a number or the words why there is none."""
    energies = audio.double().square().mean(dim=-1)
    silent, quiet = _is_silent(audio), [_is_silent(channel[None]) for channel in audio]
    both = math.nan if any(quiet) else stereo.correlation(audio.double())
    steady = (
        "a channel does not vary"
        if not any(quiet)
        else f"{'left' if quiet[0] else 'right'} is silent"
    )
    return {
        "alignment": _why_unaligned(video, audio, silent)
        or spatial_alignment(video[None], audio[None]),
        "level": "silent" if silent else 10 * energies.mean().log10().item(),
        "correlation": "silent" if silent else steady if math.isnan(both) else both,
        "balance": "silent" if silent else (energies.diff() / energies.sum()).item(),
        "motion": 50 * video.diff(dim=0).abs().mean().item() if len(video) > 1 else "one frame",
    }


def _is_silent(audio: th.Tensor) -> bool:
    """[C, L] -> whether it is silent as a whole, to the ears of the metrics."""
    return not stereo.is_heard(audio.double()[None]).item()


def _why_unaligned(video: th.Tensor, audio: th.Tensor, silent: bool) -> str:
    """Why a clip has no spatial alignment; empty if it has."""
    if len(video) < 2:
        return "one frame"
    if silent:
        return "silent"
    if unseen := _why_unseen(video):
        return unseen
    seen, heard = places(video, audio)
    together = [(a, b) for a, b in zip(seen, heard, strict=True) if a is not None and b is not None]
    if len(together) < 2:
        return "never seen and heard at once"
    spreads = [max(values) - min(values) for values in zip(*together, strict=True)]
    return (
        "the object stays where it is"
        if spreads[0] < STILL
        else "the sound stays"
        if spreads[1] < STILL
        else ""
    )


def _why_unseen(video: th.Tensor) -> str:
    """Why nothing is to be seen in a picture; empty if something is."""
    if video.max() < BLACK:
        return "black"
    blank = (
        horizontal_place(video[None])[1].mean().item() < BLANK * video.shape[-2] * video.shape[-1]
    )
    return "nothing stands out in the picture" if blank else ""


def places(video: th.Tensor, audio: th.Tensor) -> tuple[list[float | None], list[float | None]]:
    """[F, 3, H, W], [2, L] -> where the object is seen and the sound heard in each frame, -1 left to 1 right.

    None where next to nothing is to be seen or heard.
    """
    place, shown = (x[0] for x in horizontal_place(video[None]))
    level, loud = (x[0] for x in level_difference(audio[None], len(video)))
    least_shown = max(FAINT * shown.mean().item(), BLANK * video.shape[-2] * video.shape[-1])
    least_loud = max(
        FAINT * loud.mean().item(), 2 * stereo.SILENT**2 * audio.shape[-1] / len(video)
    )
    return _kept(2 * place - 1, shown >= least_shown), _kept(level, loud >= least_loud)


def _kept(values: th.Tensor, keep: th.Tensor) -> list[float | None]:
    return [round(v, 4) if k else None for v, k in zip(values.tolist(), keep.tolist(), strict=True)]


def spectrogram(audio: th.Tensor, sample_rate: int) -> th.Tensor:
    """[2, L] -> [3, rows, columns] uint8: left above right, 0 Hz to half the rate upwards, RANGE_DB from black on.

    Frequencies are at their `mel_height`.
    """
    n_fft = max(64, 2 ** int(math.log2(sample_rate * WINDOW_SECONDS)))
    padded = F.pad(audio, (0, max(0, n_fft - audio.shape[-1])))
    power = AF.spectrogram(
        padded, 0, th.hann_window(n_fft), n_fft, n_fft // 4, n_fft, 2.0, normalized="window"
    )
    rows, columns = (
        min(most, size) for most, size in zip(SPECTROGRAM, power.shape[1:], strict=True)
    )
    power = F.adaptive_avg_pool1d(_mel_rows(power.double(), rows, sample_rate / 2), columns).flip(1)
    loudest = max(power.max().item(), stereo.SILENT**2)
    decibel = AF.amplitude_to_DB(power, 10.0, amin=1e-16, db_multiplier=math.log10(loudest))
    index = ((decibel / RANGE_DB + 1).clamp(0, 1) * 255).byte()
    colours = th.from_numpy(colormaps["magma"](np.arange(256), bytes=True)[:, :3].copy())
    left, right = colours[index.long()]
    gap = th.full((1, columns, 3), 128, dtype=th.uint8)
    return th.cat([left, gap, right]).permute(2, 0, 1).contiguous()


def mel_height(hz: float, top_hz: float) -> float:
    """Where a frequency is in a spectrogram up to top_hz, 0 at the bottom to 1 at the top, by the mel scale."""
    return math.log1p(hz / MEL_CORNER_HZ) / math.log1p(top_hz / MEL_CORNER_HZ)


def _mel_rows(power: th.Tensor, rows: int, top_hz: float) -> th.Tensor:
    """[2, K, T] power in bands around K frequencies from 0 to top_hz -> [2, rows, T]: between steps of `mel_height`."""
    bands = power.shape[1]
    share = th.linspace(0, 1, rows + 1, dtype=th.float64)
    hz = MEL_CORNER_HZ * th.expm1(share * math.log1p(top_hz / MEL_CORNER_HZ))
    edges = 0.5 + (bands - 1) * hz / top_hz  # band k lies between k and k + 1
    band = edges.long()
    below = F.pad(power.cumsum(1), (0, 0, 1, 0))[:, band] + (edges - band)[:, None] * power[:, band]
    return below.diff(dim=1).clamp(min=0) / edges.diff()[:, None]


def strip(frames: th.Tensor) -> th.Tensor:
    """[F, 3, h, w] uint8 -> [3, H, n W]: n <= STRIP_FRAMES of them side by side, those in the middle of equal spans."""
    n = min(STRIP_FRAMES, len(frames))
    chosen = frames[((th.arange(n) + 0.5) * len(frames) / n).long()]
    return th.cat(list(images.enlarge(chosen)), dim=-1)


def curve(values: Sequence[float | None]) -> str:
    """Places -1..1 -> the path of an SVG of 1000 x 100: time across, left at the top; gaps where there is none."""
    path, running = [], False
    for k, value in enumerate(values):
        if value is not None:
            x, y = 1000 * (k + 0.5) / len(values), 50 + 48 * value
            alone = not running and (k + 1 == len(values) or values[k + 1] is None)
            path.append(f"{'L' if running else 'M'}{x:.0f} {y:.1f}" + ("h.1" if alone else ""))
        running = value is not None
    return "".join(path)


def write_sheet(path: Path, strips: Iterable[tuple[Path, int]]) -> None:
    """A contact sheet of the first SHEET_CLIPS of (picture, its number of frames): SHEET_FRAMES of each."""
    rows = []
    for picture, count in strips:
        frames = images.read_image(picture).chunk(count, dim=-1)
        chosen = th.linspace(0, count - 1, SHEET_FRAMES).round().long().tolist()
        rows.append(th.stack([images.fit_image(frames[k], SHEET_SIDE, SHEET_SIDE) for k in chosen]))
    images.save_contact_sheet(path, rows)


def examine(path: str, pictures: Path) -> Clip:
    """Measure a clip and write its pictures; MediaError where it cannot be decoded."""
    info = decode.probe(path)
    seconds = max(min(info.duration_seconds, MAX_SECONDS), 1 / info.fps)
    fps = min(info.fps, MAX_FRAMES / seconds)
    rate = min(info.sample_rate, MAX_RATE)
    stream = decode.read_frames(path, 0, max(1, round(seconds * fps)), fps)
    first = _small(next(stream))
    frames = th.stack([first, *(images.fit_image(image, *first.shape[-2:]) for image in stream)])
    _, audio = decode.read_window(path, 0, 1, fps, 1, 1, rate, max(1, round(seconds * rate)))
    video = images.to_float(frames)
    name = hashlib.sha256(os.fsencode(os.path.relpath(path, pictures))).hexdigest()[:16]
    files = {kind: f"{name}_{kind}.jpg" for kind in KINDS}
    drawn = images.enlarge(frames[len(frames) // 2]), strip(frames), spectrogram(audio, rate)
    for file, picture in zip(files.values(), drawn, strict=True):
        images.write_image(pictures / file, picture, JPEG_QUALITY)
    seen, heard = places(video, audio)
    return Clip(
        seconds=info.duration_seconds,
        shown_seconds=seconds,
        width=info.width,
        height=info.height,
        fps=info.fps,
        sample_rate=info.sample_rate,
        pictures=files,
        top_hz=rate / 2,
        scores=measure(video, audio),
        seen=seen,
        heard=heard,
        notes=_notes(path, info, video, audio),
    )


def _small(image: th.Tensor) -> th.Tensor:
    """[3, h, w] uint8, shrunk to MAX_SIDE if it is larger."""
    scale = min(1, MAX_SIDE / max(image.shape[-2:]))
    return images.fit_image(image, *(max(1, round(side * scale)) for side in image.shape[-2:]))


def _notes(path: str, info: decode.ClipInfo, video: th.Tensor, audio: th.Tensor) -> list[str]:
    """What one should know of a clip before reading its numbers."""
    unseen = _why_unseen(video)
    found = {
        "silent": _is_silent(audio),
        unseen: bool(unseen),
        "mono": info.channels == 1,
        f"only the first {MAX_SECONDS} s are shown": info.duration_seconds > MAX_SECONDS,
        f"browsers play no sound of {info.sample_rate} Hz": info.sample_rate < LOWEST_RATE,
        f"browsers play no {Path(path).suffix}": Path(path).suffix.lower() not in PLAYABLE,
    }
    return [note for note, holds in found.items() if holds]


def write_gallery(
    folder: str | os.PathLike, scores_file: str | os.PathLike = "", num_workers: int = 4
) -> Path:
    """Write the page of the clips below `folder` (local) and a contact sheet; -> the path of the page.

    Clips that have not changed since the last time, and whose pictures are there, are not looked at again. Files that
    cannot be read are listed on the page. `scores_file`: see `read_scores`; empty: `folder`/scores.json if it is there.
    DataError where no clip can be read, ValueError where the folder holds a page of someone else's or the scores make
    no sense.
    """
    root = Path(absolute(os.path.expanduser(os.fspath(folder))))
    paths = find_files([os.fspath(root)], VIDEO_EXTENSIONS, "clips", "give a folder of clips")
    names = {path: os.path.relpath(path, root) for path in paths}
    given = Path(scores_file) if scores_file else root / "scores.json"
    more = read_scores(given, names.values()) if scores_file or given.exists() else {}
    cache = _claim(root)
    pictures = cache.parent

    def look(path: str) -> dict[str, Any]:
        return dataclasses.asdict(examine(path, pictures))

    index = look_up(paths, look, cache, num_workers)
    refuse_if_bad(os.fspath(root), index, max_bad_share=1.0)
    found = [(path, Clip(**info)) for path, info in index.clips]
    _redraw_lost(found, pictures, num_workers)
    clips = {
        names[path]: clip for path, clip in sorted(found, key=lambda pair: _order(names[pair[0]]))
    }
    first = list(clips.values())[:SHEET_CLIPS]
    write_sheet(
        pictures / SHEET,
        [(pictures / c.pictures["strip"], min(STRIP_FRAMES, len(c.seen))) for c in first],
    )
    bad = {names[path]: reason.removeprefix(f"{path}: ") for path, reason in index.bad.items()}
    text = render(root.name, clips, more, bad)
    write_text(root / PAGE, text)
    _sweep(pictures, clips.values())
    return root / PAGE


def _order(name: str) -> tuple:
    """By file name, numbers by their value, then by folder: what was generated stands beside its ground truth."""
    folder, file = os.path.split(os.path.splitext(name)[0])
    return _natural(file), _natural(folder), name


def _natural(text: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part.casefold() for part in re.split(r"(\d+)", text)]


def _claim(root: Path) -> Path:
    """Make the folder of the pictures, and the path of what is remembered there; ValueError where it is not ours."""
    page, pictures = root / PAGE, root / PICTURES
    if page.exists() and GENERATOR not in page.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f"{page} is no gallery of ours: move it, or put the clips into a folder of their own"
        )
    held = {path.name for path in pictures.iterdir()} if pictures.exists() else set()
    ours = set(filter(OURS.fullmatch, held))
    strange = sorted(held - ours - ({SHEET} if ours else set()))
    if strange and not any(name.startswith("measured_") for name in ours):
        raise ValueError(
            f"{pictures} holds something else ({strange[0]}): rename it, or put the clips into a folder of their own"
        )
    pictures.mkdir(exist_ok=True)
    cache = pictures / MEASURED
    cache.touch()
    return cache


def _redraw_lost(clips: Iterable[tuple[str, Clip]], pictures: Path, num_workers: int) -> None:
    """Draw the pictures of clips of which one has been removed or damaged since it was drawn."""
    lost = [
        path
        for path, clip in clips
        if not all(_is_whole(pictures / file) for file in clip.pictures.values())
    ]
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        for future in [pool.submit(examine, path, pictures) for path in lost]:
            future.result()


def _is_whole(picture: Path) -> bool:
    try:
        images.check_image(picture)
    except MediaError:
        return False
    return True


def _sweep(pictures: Path, clips: Iterable[Clip]) -> None:
    """Remove what earlier runs left of clips that are gone; files that are not of OURS stay."""
    used = {MEASURED, *(file for clip in clips for file in clip.pictures.values())}
    for path in pictures.iterdir():
        if path.is_file() and OURS.fullmatch(path.name) and path.name not in used:
            path.unlink(missing_ok=True)
    remove_unfinished(pictures)


def read_scores(path: Path, names: Collection[str]) -> dict[str, dict[str, float]]:
    """{"clip name": {"score": number}} in a JSON file -> the same by the names of `names`.

    A clip is named by its path below the folder, with or without suffix, or by its file name without suffix.
    ValueError, naming the file, where it is not of that form or names none of the clips. nan stands for null.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(held, dict) or not all(isinstance(row, dict) for row in held.values()):
        raise ValueError(f'{path}: need {{"clip name": {{"score": number}}}}')
    scores: dict[str, dict[str, float]] = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        for key in (name, stem, os.path.basename(stem)):
            if key in held:
                scores[name] = {
                    label: _number(path, key, label, value) for label, value in held[key].items()
                }
                break
    if held and not scores:
        raise ValueError(
            f"{path}: names none of the {len(names)} clips (first of its own: {next(iter(held))!r})"
        )
    return scores


def _number(path: Path, clip: str, label: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path}: {label} of {clip} is {value!r}, need a number")
    return float(value)


def render(
    title: str,
    clips: Mapping[str, Clip],
    more: Mapping[str, Mapping[str, float]],
    bad: Mapping[str, str],
) -> str:
    """The page: clips in that order, what `more` scores there are, and the reasons why other files cannot be shown."""
    given = {
        name: {f"given {label}": value for label, value in row.items()}
        for name, row in more.items()
    }
    labels = SCORES | {
        key: Score(key.removeprefix("given "), "{:.4g}", "from the file of scores")
        for row in given.values()
        for key in row
    }
    rows = [_row(name, clip, labels, given.get(name, {})) for name, clip in clips.items()]
    folders = sorted({row["folder"] for row in rows})
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        generator=GENERATOR,
        title=_printable(title),
        rows=rows,
        scores=[
            {
                "key": key,
                "score": score,
                "median": median,
                "missing": sum(key not in row["numbers"] for row in rows),
            }
            for (key, score), median in zip(labels.items(), _medians(labels, rows), strict=True)
        ],
        medians={f: _medians(labels, [row for row in rows if row["folder"] == f]) for f in folders},
        minutes=sum(clip.seconds for clip in clips.values()) / 60,
        bad={_printable(name): _printable(reason) for name, reason in bad.items()},
        sheet=f"{PICTURES}/{SHEET}",
        range_db=RANGE_DB,
        marked_hz=MARKED_HZ,
        sheet_clips=min(SHEET_CLIPS, len(rows)),
    )


def _row(
    name: str, clip: Clip, labels: Mapping[str, Score], more: dict[str, float]
) -> dict[str, Any]:
    """What the template needs of one clip."""
    values = {key: (clip.scores | more).get(key, "not given") for key in labels}
    values = {
        key: v if isinstance(v, str) or math.isfinite(v) else "not a number"
        for key, v in values.items()
    }
    return {
        "name": _printable(os.path.splitext(name)[0]),
        "folder": _printable(os.path.dirname(name)),
        "src": quote(os.fsencode(name)),
        **{kind: f"{PICTURES}/{file}" for kind, file in clip.pictures.items()},
        "aspect": f"{clip.width} / {clip.height}",
        "frames": min(STRIP_FRAMES, len(clip.seen)),
        "marked": f"{50 * (1 - mel_height(MARKED_HZ, clip.top_hz)):.1f}%"
        if clip.top_hz >= 4 * MARKED_HZ
        else "",
        "seen": curve(clip.seen),
        "heard": curve(clip.heard),
        "clip": clip,
        "numbers": {key: v for key, v in values.items() if not isinstance(v, str)},
        "texts": [
            (labels[key].label, None if isinstance(v, str) else labels[key].form.format(v), v)
            for key, v in values.items()
        ],
    }


def _printable(text: str) -> str:
    """A file name that may not be Unicode, as text."""
    return os.fsencode(text).decode("utf-8", errors="replace")


def _medians(labels: Mapping[str, Score], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The median of every score over the clips that have it."""
    values = {key: [row["numbers"][key] for row in rows if key in row["numbers"]] for key in labels}
    return [
        labels[key].form.format(statistics.median(v)) if v else "no clip has it"
        for key, v in values.items()
    ]
