"""Spatial AV-Align (arXiv 2412.13462): is an object detected where an audio event is?

Audio events are CSV rows `frame,category,x` at 10 Hz (more columns may follow, as in SAVGBench's
metadata), boxes are rows `frame,category,x0,y0,x1,y1` at the frame rate of the video file.
Positions are in pixels of an image 256 wide.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch as th
import torchvision

from ..data.clips import ROUNDING_FRAMES
from . import stereo

PIXELS, EVENT_HZ = 256, 10
REACH_PIXELS = 40  # a box that overlaps x +- this is a hit,
REACH_FRAMES = 1  # if it is at most this many frames before or after
MIN_ILD_DB = 1.0  # below it the position follows from the ITD
MAX_ITD_SECONDS = 6e-4  # of a source at the edge of the image
PERSON = 1  # COCO class of torchvision's detectors
MIN_CONFIDENCE = 0.5
NO_CATEGORY = -1


@dataclasses.dataclass(frozen=True)
class Event:
    """An audio event at `frame` / 10 s, at horizontal position x."""

    frame: int
    category: int
    x: float


@dataclasses.dataclass(frozen=True)
class Box:
    """An object detected in video frame `frame`."""

    frame: int
    category: int
    x0: float
    y0: float
    x1: float
    y1: float


@dataclasses.dataclass(frozen=True)
class Events:
    """Audio events; frame 0 is at `start` seconds of the file."""

    rows: list[Event]
    start: Fraction = Fraction(0)


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Boxes in `num_frames` frames at `fps`; frame 0 is at `start` seconds of the file."""

    rows: list[Box]
    fps: float
    num_frames: int
    start: Fraction = Fraction(0)


def count_hits(events: Events, boxes: Boxes, match_categories: bool = False) -> tuple[int, int]:
    """-> (TP, FN): events with and without a box that overlaps x +- 40 px within +- 1 video frame.

    As published, the video frame of an event is the nearest to its time, round(time * fps), at
    most the last one. `match_categories`: only boxes of the event's category count.
    """
    hits = 0
    for event in events.rows:
        seconds = events.start + Fraction(event.frame, EVENT_HZ) - boxes.start
        frame = min(round(seconds * Fraction(boxes.fps)), boxes.num_frames - 1)
        near = [box for box in boxes.rows if abs(box.frame - frame) <= REACH_FRAMES]
        if match_categories:
            near = [box for box in near if box.category == event.category]
        hits += any(_overlaps(box, event.x) for box in near)
    return hits, len(events.rows) - hits


def _overlaps(box: Box, x: float) -> bool:
    return box.x0 <= x + REACH_PIXELS and box.x1 >= x - REACH_PIXELS


# ---------------------------------------------------------------- CSV files


def read_rows(path: Path, columns: int) -> list[list[float]]:
    """The first `columns` values of every row below an optional header.

    ValueError, naming file and row, for anything but numbers.
    """
    try:
        with open(path, newline="") as file:
            rows = list(enumerate(csv.reader(file), 1))
    except FileNotFoundError:
        message = f"{path}: missing; every clip needs one, empty where there is nothing"
        raise ValueError(message) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as CSV ({error})") from None
    rows = [(number, row) for number, row in rows if "".join(row).strip()]
    if rows and rows[0][1][0].strip().lower() == "frame":
        del rows[0]
    return [_parse_row(f"{path}, row {number}", row, columns) for number, row in rows]


def _parse_row(where: str, row: list[str], columns: int) -> list[float]:
    try:
        values = [float(cell) for cell in row[:columns]]
    except ValueError:
        values = []
    if len(values) < columns or not all(map(math.isfinite, values)):
        raise ValueError(f"{where}: {','.join(row)!r} does not begin with {columns} numbers")
    if not (values[0].is_integer() and values[1].is_integer()):
        raise ValueError(f"{where}: frame {row[0]} and category {row[1]} must be integers")
    return values


def read_events(path: Path, seconds: float) -> list[Event]:
    """Events of a file of this duration; ValueError for a time or position outside it."""
    events = []
    for number, (frame, category, x) in enumerate(read_rows(path, 3), 1):
        _check_time(path, number, int(frame), EVENT_HZ, seconds)
        if not 0 <= x <= PIXELS:
            raise ValueError(f"{path}, event {number}: x {x:g} is outside 0..{PIXELS}")
        events.append(Event(int(frame), int(category), x))
    return events


def read_boxes(path: Path, fps: float, seconds: float) -> list[Box]:
    """Boxes of a file, clipped to the image; ValueError for an empty box or one outside it."""
    boxes = []
    for number, (frame, category, *corners) in enumerate(read_rows(path, 6), 1):
        _check_time(path, number, int(frame), fps, seconds)
        left, top, right, bottom = corners
        is_box = left <= right and top <= bottom
        if not is_box or max(left, top) > PIXELS or min(right, bottom) < 0:
            need = f"is not a box in {PIXELS} x {PIXELS} pixels, x0 <= x1 and y0 <= y1"
            raise ValueError(f"{path}, box {number}: x0,y0,x1,y1 {corners} {need}")
        clipped = np.clip(corners, 0, PIXELS).tolist()
        boxes.append(Box(int(frame), int(category), *clipped))
    return boxes


def _check_time(path: Path, number: int, frame: int, rate: float, seconds: float) -> None:
    """ValueError for a frame that begins after the end; containers round durations."""
    if not 0 <= frame < math.ceil(seconds * rate - ROUNDING_FRAMES):
        found = f"frame {frame} at {rate:g} Hz is outside the clip of {seconds:.2f} s"
        raise ValueError(f"{path}, row {number} of data: {found}")


def select_window(events: list[Event], start: Fraction, seconds: Fraction) -> list[Event]:
    """The events of a file within a window."""
    return [event for event in events if start <= Fraction(event.frame, EVENT_HZ) < start + seconds]


# ---------------------------------------------------------------- audio and frames


def localise(audio: th.Tensor, sample_rate: int) -> list[Event]:
    """[2, L] -> an event at the position of the strongest source for each audible 0.1 s.

    Under constant-power panning x = atan(|R| / |L|) 2 / pi of the width. Where the ILD is below
    1 dB the ITD decides: x = 1/2 + ITD / 1.2 ms.
    """
    pieces = stereo.segments(audio, sample_rate)
    left, right = pieces.square().sum(dim=-1).sqrt().unbind(dim=1)
    from_ild = th.atan2(right, left) * 2 / math.pi
    itd = stereo.time_difference(pieces, sample_rate)
    from_itd = (0.5 + itd / (2 * MAX_ITD_SECONDS)).clamp(0, 1)
    is_level = stereo.level_difference_db(pieces).abs() < MIN_ILD_DB
    positions = th.where(is_level, from_itd, from_ild) * PIXELS
    audible = stereo.is_audible(pieces).nonzero().flatten().tolist()
    return [Event(t, NO_CATEGORY, positions[t].item()) for t in audible]


def load_detector(name: str, path: str, device: th.device) -> Callable[[th.Tensor], list[Box]]:
    """A torchvision detector with these weights, as a function [F, 3, H, W] in [-1, 1] -> boxes.

    Only persons count, COCO's class for who speaks or plays. ValueError, naming the flag, for an
    unknown detector or weights that do not match.
    """
    known = torchvision.models.list_models(module=torchvision.models.detection)
    if name not in known:
        raise ValueError(f"--detector {name}: choose from {', '.join(known)}")
    if not Path(path).is_file():
        url = torchvision.models.get_model_weights(name).DEFAULT.url
        raise ValueError(f"--detector_path {path}: no such file; weights of {name} are at {url}")
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    try:
        model.load_state_dict(th.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # unpickling raises whatever the bytes suggest
        message = f"--detector_path {path}: does not hold the weights of {name} ({error})"
        raise ValueError(message[:300]) from None
    model.eval().to(device)

    @th.no_grad()
    def detect(video: th.Tensor) -> list[Box]:
        boxes = []
        for number, frame in enumerate(video):
            detection = model([(frame.to(device) + 1) / 2])[0]
            boxes += person_boxes(number, detection, video.shape)
        return boxes

    return detect


def person_boxes(frame: int, detection: dict[str, th.Tensor], shape: th.Size) -> list[Box]:
    """A detection in a frame [..., H, W] -> boxes of persons in pixels of 256 x 256."""
    height, width = shape[-2:]
    kept = (detection["labels"] == PERSON) & (detection["scores"] >= MIN_CONFIDENCE)
    scale = PIXELS / th.tensor([width, height, width, height])
    corners = (detection["boxes"][kept].cpu() * scale).tolist()
    return [Box(frame, PERSON, *box) for box in corners]
