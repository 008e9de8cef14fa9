"""Spatial AV-Align (arXiv 2412.13462): is there an object where a sound comes from?

Sound events are rows `frame,category,x` at 10 Hz (more columns may follow, as in the metadata of SAVGBench), objects
are rows `frame,category,x0,y0,x1,y1` at the rate of the video file; places are in pixels of a picture 256 wide.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch as th
import torchvision

from ..data import toy
from ..data.clips import ROUNDING_FRAMES
from . import stereo

PIXELS, EVENT_HZ, EAR_SECONDS = toy.METADATA_PIXELS, toy.METADATA_HZ, toy.MAX_EAR_DELAY_SECONDS
REACH_PIXELS = 40  # a box that overlaps x +- this is a hit,
REACH_FRAMES = 1  # if it is seen at most so many frames before or after
LEVEL_DB = 1.0  # a difference of level below this says nothing, and that of time decides
PERSON = 1  # of COCO, whose classes torchvision's detectors know
MIN_CONFIDENCE = 0.5
NO_CATEGORY = -1
FILE_START = Fraction(0)  # in its own seconds


@dataclasses.dataclass(frozen=True)
class Event:
    """A sound heard at `frame` / 10 s from x."""

    frame: int
    category: int
    x: float


@dataclasses.dataclass(frozen=True)
class Box:
    """An object seen in video frame `frame`."""

    frame: int
    category: int
    x0: float
    y0: float
    x1: float
    y1: float


def hits(
    events: list[Event],
    boxes: list[Box],
    fps: float,
    match_categories: bool = False,
    events_start: Fraction = FILE_START,
    boxes_start: Fraction = FILE_START,
) -> tuple[int, int]:
    """-> (TP, FN): events with and without a box that overlaps x +- 40 px within +- 1 video frame.

    The video frame of an event is the one shown at its time, floor(time * fps). `events_start` and `boxes_start` are
    when, in seconds of the file, their frames 0 are.
    """
    seen: dict[int, list[Box]] = {}
    for box in boxes:
        seen.setdefault(box.frame, []).append(box)
    found = 0
    for event in events:
        shown = math.floor(
            (events_start + Fraction(event.frame, EVENT_HZ) - boxes_start) * Fraction(fps)
        )
        found += any(
            box.x0 <= event.x + REACH_PIXELS
            and box.x1 >= event.x - REACH_PIXELS
            and (box.category == event.category or not match_categories)
            for frame in range(shown - REACH_FRAMES, shown + REACH_FRAMES + 1)
            for box in seen.get(frame, ())
        )
    return found, len(events) - found


# ---------------------------------------------------------------- from files


def read_rows(path: Path, columns: int) -> list[list[float]]:
    """The first `columns` numbers of every row; ValueError, naming file and row, for anything else but a header."""
    try:
        with open(path, newline="") as file:
            rows = [
                (number, row)
                for number, row in enumerate(csv.reader(file), 1)
                if any(c.strip() for c in row)
            ]
    except FileNotFoundError:
        raise ValueError(
            f"{path}: is missing; every clip needs one, empty where nothing is found"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as CSV ({error})") from None
    if rows and rows[0][1][0].strip().lower() == "frame":
        del rows[0]
    return [_numbers(f"{path}, row {number}", row, columns) for number, row in rows]


def _numbers(where: str, row: list[str], columns: int) -> list[float]:
    try:
        values = [float(cell) for cell in row[:columns]]
    except ValueError:
        values = []
    if len(values) < columns or not all(map(math.isfinite, values)):
        raise ValueError(f"{where}: {','.join(row)!r} is not {columns} numbers or more")
    if any(value != int(value) for value in values[:2]):
        raise ValueError(f"{where}: frame {row[0]} and category {row[1]} must be whole numbers")
    return values


def read_events(path: Path, seconds: float) -> list[Event]:
    """Events of a clip that lasts so long; ValueError, naming file and row, for a time or place outside it."""
    events = [Event(int(frame), int(category), x) for frame, category, x in read_rows(path, 3)]
    for number, event in enumerate(events, 1):
        _check_time(path, number, event.frame, EVENT_HZ, seconds)
        if not 0 <= event.x <= PIXELS:
            raise ValueError(f"{path}, event {number}: x {event.x:g} is outside 0..{PIXELS}")
    return events


def read_boxes(path: Path, fps: float, seconds: float) -> list[Box]:
    """Boxes of a clip, clipped to the picture; ValueError as above, or for a box inside out or outside the picture."""
    boxes = []
    for number, (frame, category, *corners) in enumerate(read_rows(path, 6), 1):
        _check_time(path, number, int(frame), fps, seconds)
        x0, y0, x1, y1 = (min(max(corner, 0.0), float(PIXELS)) for corner in corners)
        left, top, right, bottom = corners
        if not (
            left <= right and top <= bottom and max(left, top) <= PIXELS and min(right, bottom) >= 0
        ):
            raise ValueError(
                f"{path}, box {number}: x0,y0,x1,y1 {corners} is no box in a picture of {PIXELS} x {PIXELS} (x0 <= x1,"
                " y0 <= y1)"
            )
        boxes.append(Box(int(frame), int(category), x0, y0, x1, y1))
    return boxes


def _check_time(path: Path, number: int, frame: int, rate: float, seconds: float) -> None:
    """ValueError for a frame that does not begin before the clip ends, whose length the container has rounded."""
    if not 0 <= frame < math.ceil(seconds * rate - ROUNDING_FRAMES):
        raise ValueError(
            f"{path}, row {number} of data: frame {frame} at {rate:g} Hz is not in the clip of {seconds:.2f} s"
        )


def within(events: list[Event], start: Fraction, seconds: Fraction) -> list[Event]:
    """Those of a file's events that fall into the window."""
    return [event for event in events if start <= Fraction(event.frame, EVENT_HZ) < start + seconds]


# ---------------------------------------------------------------- from sound and picture


def localise(audio: th.Tensor, sample_rate: int) -> list[Event]:
    """[2, L] -> at most one event for each tenth of a second that is heard: where the strongest sound comes from.

    Under constant-power panning x = atan(|R| / |L|) 2 / pi of the width. Where the levels agree the delay between the
    channels, if there is any, decides: x = 1/2 + delay / 1.2 ms.
    """
    pieces = stereo.stretches(audio, sample_rate)
    left, right = pieces.square().sum(dim=-1).sqrt().unbind(dim=1)
    by_level = th.atan2(right, left) * 2 / math.pi
    by_delay = (0.5 + stereo.time_difference(pieces, sample_rate) / (2 * EAR_SECONDS)).clamp(0, 1)
    places = (
        th.where(stereo.level_difference_db(pieces).abs() < LEVEL_DB, by_delay, by_level) * PIXELS
    )
    heard = stereo.is_heard(pieces).tolist()
    return [
        Event(t, NO_CATEGORY, x)
        for t, (x, loud) in enumerate(zip(places.tolist(), heard, strict=True))
        if loud
    ]


def load_detector(name: str, path: str, device: th.device) -> Callable[[th.Tensor], list[Box]]:
    """A detector of torchvision, by its name there, with these weights -> a function [F, 3, H, W] in [-1, 1] -> boxes.

    Boxes are those of persons, COCO's class for whoever speaks or plays. ValueError, naming the flag, for an unknown
    name or weights that do not fit.
    """
    known = torchvision.models.list_models(module=torchvision.models.detection)
    if name not in known:
        raise ValueError(f"--detector {name}: choose from {', '.join(known)}")
    if not Path(path).is_file():
        url = torchvision.models.get_model_weights(name).DEFAULT.url
        raise ValueError(
            f"--detector_path {path}: no such file; the weights of {name} are at {url}"
        )
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    try:
        model.load_state_dict(th.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # unpickling raises whatever the bytes suggest
        raise ValueError(
            f"--detector_path {path}: does not hold the weights of {name} ({error})"[:300]
        ) from None
    model.eval().requires_grad_(False).to(device)

    @th.no_grad()
    def detect(video: th.Tensor) -> list[Box]:
        found = [model([(frame.to(device) + 1) / 2])[0] for frame in video]
        return [box for frame, told in enumerate(found) for box in _boxes(frame, told, video.shape)]

    return detect


def _boxes(frame: int, told: dict[str, th.Tensor], shape: th.Size) -> list[Box]:
    height, width = shape[-2:]
    kept = (told["labels"] == PERSON) & (told["scores"] >= MIN_CONFIDENCE)
    scale = PIXELS / th.tensor([width, height, width, height])
    return [
        Box(frame, PERSON, *corners) for corners in (told["boxes"][kept].cpu() * scale).tolist()
    ]
