"""Toy clips in the shape of SAVGBench: bright objects move over a dark textured ground, and each sounds from its place.

An object's picture and its sound come from one `Thing`: where it is, `place(t)`, sets the pixels and the panning, and
how loud it is, `loudness(t)`, sets the brightness and the envelope. Clip k depends on (config, seed, k) only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch as th

from . import encode

METADATA_HZ = 10
METADATA_PIXELS = 256  # SAVGBench gives places as if every picture were this wide and high
MAX_EAR_DELAY_SECONDS = 6e-4  # a source hard to one side reaches the far ear this much later
SPEECH, INSTRUMENT = 0, 1
COLOURS = {SPEECH: (1.0, 0.75, 0.45), INSTRUMENT: (0.5, 0.85, 1.0)}


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """What the clips are like; sizes in pixels, rates in Hz."""

    height: int = 256
    width: int = 256
    fps: float = 4.0
    seconds: float = 5.0
    sample_rate: int = 16000
    num_objects: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width", "fps", "seconds", "sample_rate", "num_objects"):
            if getattr(self, name) <= 0:
                raise ValueError(f"toy data: {name} is {getattr(self, name)}, must be positive")

    @property
    def num_frames(self) -> int:
        return max(1, round(self.seconds * self.fps))

    @property
    def num_samples(self) -> int:
        return max(1, round(self.seconds * self.sample_rate))


@dataclasses.dataclass(frozen=True)
class Thing:
    """One sounding object; places are fractions of the range it moves in (0 left or top, 1 right or bottom)."""

    category: int
    radius: float  # fraction of the width
    start: float  # where in its path it begins, in crossings
    crossings_per_second: float  # signed
    height_phase: float
    bursts_per_second: float
    burst_phase: float
    fundamental_hz: float
    formants_hz: tuple[float, ...]

    def place(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds -> (x, y) in 0..1: to and fro across the picture, gently up and down."""
        x = 0.5 - 0.5 * np.cos(np.pi * (self.start + self.crossings_per_second * t))
        y = 0.5 + 0.3 * np.sin(self.height_phase + 1.3 * self.crossings_per_second * t)
        return x, y

    def loudness(self, t: np.ndarray) -> np.ndarray:
        """Seconds -> 0..1: syllables swell and fade, strokes jump up and decay."""
        cycle = self.bursts_per_second * t + self.burst_phase
        if self.category == SPEECH:
            return 0.3 + 0.7 * np.sin(np.pi * cycle) ** 2
        since_stroke = cycle % 1
        attack = np.minimum(since_stroke / 0.06, 1)
        tail = np.exp(-1.0) * (
            1 - attack
        )  # what the stroke before left, so that the envelope has no jump
        return attack * np.exp(-since_stroke) + tail

    def tone(self, t: np.ndarray, highest_hz: float) -> np.ndarray:
        """Seconds -> waveform within about -1..1, partials above `highest_hz` left out."""
        phase = 2 * np.pi * self.fundamental_hz * t
        if self.category == SPEECH:
            phase = phase + 0.3 * np.sin(2 * np.pi * 5 * t)  # vibrato
        wave = np.zeros_like(t)
        for ratio, gain in self._partials():
            if ratio * self.fundamental_hz < highest_hz:
                wave += gain * np.sin(ratio * phase)
        return wave * self.loudness(t) / sum(gain for _, gain in self._partials())

    def _partials(self) -> list[tuple[float, float]]:
        """(frequency ratio, gain): harmonics under formants, or a bell's stretched ones.

        The first is about 1 and the others far below, so that little of the level is lost at a low sample rate.
        """
        if self.category == INSTRUMENT:
            return [(1, 1.0), (2.0, 0.15), (2.99, 0.1), (4.2, 0.08), (5.4, 0.05)]
        harmonics = np.arange(1, 25)
        distance = harmonics[:, None] * self.fundamental_hz - np.array(self.formants_hz)
        formant_gain = 0.06 * np.exp(-0.5 * (distance / 150) ** 2).sum(axis=1)
        return list(
            zip(
                harmonics.tolist(), (0.25 ** (harmonics - 1.0) + formant_gain).tolist(), strict=True
            )
        )


def draw_things(config: ToyConfig, rng: np.random.Generator) -> list[Thing]:
    """The objects of one clip; classes alternate from a random first one."""
    first = int(rng.integers(2))
    return [_draw_thing((first + i) % 2, config, rng) for i in range(config.num_objects)]


def _draw_thing(category: int, config: ToyConfig, rng: np.random.Generator) -> Thing:
    low_hz, high_hz = {SPEECH: (90, 150), INSTRUMENT: (65, 120)}[category]
    return Thing(
        category=category,
        radius=min(rng.uniform(0.17, 0.2), 0.35 * config.height / config.width),
        start=rng.uniform(0, 2),
        crossings_per_second=rng.choice([-1, 1]) * rng.uniform(0.2, 0.5),
        height_phase=rng.uniform(0, 2 * np.pi),
        bursts_per_second=rng.uniform(4, 5),
        burst_phase=rng.uniform(0, 1),
        fundamental_hz=rng.uniform(low_hz, high_hz),
        formants_hz=(rng.uniform(400, 800), rng.uniform(1000, 2000), rng.uniform(2300, 3000)),
    )


def centre_pixels(thing: Thing, t: np.ndarray, config: ToyConfig) -> tuple[np.ndarray, np.ndarray]:
    """Seconds -> (x, y) of its centre in pixels; it stays inside the picture."""
    radius = thing.radius * config.width
    x, y = thing.place(t)
    return radius + x * (config.width - 2 * radius), radius + y * (config.height - 2 * radius)


def render_frames(
    things: Iterable[Thing], config: ToyConfig, rng: np.random.Generator
) -> np.ndarray:
    """-> [F, H, W, 3] uint8. A frame shows the middle of the time for which it is on the screen."""
    rows = np.arange(config.height)[:, None] + 0.5
    columns = np.arange(config.width)[None, :] + 0.5
    frames = np.broadcast_to(
        _ground(rows, columns, config, rng), (config.num_frames, config.height, config.width, 3)
    )
    t = (np.arange(config.num_frames) + 0.5) / config.fps
    for thing in things:
        x, y = (place[:, None, None] for place in centre_pixels(thing, t, config))
        across, down = np.abs(columns - x), np.abs(rows - y)
        radius = thing.radius * config.width
        distance = (
            np.hypot(across, down) if thing.category == SPEECH else 1.15 * np.maximum(across, down)
        )
        cover = np.clip(radius - distance + 0.5, 0, 1)[..., None]
        brightness = 0.75 + 0.25 * thing.loudness(t)[:, None, None, None]
        frames = frames * (1 - cover) + cover * brightness * np.array(COLOURS[thing.category])
    return np.round(255 * np.clip(frames, 0, 1)).astype(np.uint8)


def _ground(
    rows: np.ndarray, columns: np.ndarray, config: ToyConfig, rng: np.random.Generator
) -> np.ndarray:
    """[H, W, 3] dark texture: a few plane waves of random direction and colour."""
    ground = np.full((config.height, config.width, 3), 0.08)
    for _ in range(4):
        waves_down, waves_across = rng.uniform(-6, 6, size=2)
        angle = (
            2 * np.pi * (waves_down * rows / config.height + waves_across * columns / config.width)
        )
        ground += (
            0.012
            * np.sin(angle + rng.uniform(0, 2 * np.pi))[..., None]
            * rng.uniform(0.5, 1, size=3)
        )
    return ground


def render_sound(things: list[Thing], config: ToyConfig) -> np.ndarray:
    """-> [2, L] float in [-1, 1]: constant-power panning, and the farther ear hears it later."""
    t = np.arange(config.num_samples) / config.sample_rate
    ears = np.zeros((2, config.num_samples))
    for thing in things:
        x, _ = thing.place(t)
        for ear, nearness in enumerate((1 - x, x)):
            delay = MAX_EAR_DELAY_SECONDS * np.clip(1 - 2 * nearness, 0, 1)
            ears[ear] += np.sin(np.pi / 2 * nearness) * thing.tone(
                t - delay, config.sample_rate / 2
            )
    return np.clip(ears / len(things), -1, 1)


def metadata_rows(things: list[Thing], config: ToyConfig) -> list[str]:
    """`frame,category,x,y` at 10 Hz, places in 0..255 whatever the picture's size."""
    rows = []
    for frame in range(max(1, int(config.seconds * METADATA_HZ))):
        for thing in things:
            pixels = centre_pixels(thing, np.array(frame / METADATA_HZ), config)
            scaled = [
                METADATA_PIXELS * p / side
                for p, side in zip(pixels, (config.width, config.height), strict=True)
            ]
            x, y = (int(np.clip(place, 0, METADATA_PIXELS - 1)) for place in scaled)
            rows.append(f"{frame},{thing.category},{x},{y}")
    return rows


def make_clip(config: ToyConfig, index: int) -> tuple[th.Tensor, th.Tensor, list[str]]:
    """Clip `index` -> (video [F, 3, H, W] uint8, audio [2, L] float32, metadata rows)."""
    rng = np.random.default_rng([config.seed, index])
    things = draw_things(config, rng)
    video = th.from_numpy(render_frames(things, config, rng)).permute(0, 3, 1, 2)
    return video, th.from_numpy(render_sound(things, config)).float(), metadata_rows(things, config)


def write_toy_dataset(
    out_dir: str | Path, num_clips: int, config: ToyConfig | None = None, progress=iter
) -> None:
    """Write `video_dev/toy_NNNNN.mp4` and `metadata_dev/toy_NNNNN.csv` below `out_dir`; complete clips are kept.

    `progress` wraps the clip numbers (tqdm, say). ValueError where the folder holds anything else, or clips of another
    config.
    """
    config = config or ToyConfig()
    if num_clips < 1:
        raise ValueError(f"toy data: {num_clips} clips asked for, need at least 1")
    root = Path(out_dir)
    targets = [
        (root / f"video_dev/toy_{k:05d}.mp4", root / f"metadata_dev/toy_{k:05d}.csv")
        for k in range(num_clips)
    ]
    _claim_folder(
        root,
        {path for pair in targets for path in pair},
        json.dumps(dataclasses.asdict(config), indent=1),
    )
    for index in progress(range(num_clips)):
        video_path, rows_path = targets[index]
        if video_path.exists():
            continue
        video, audio, rows = make_clip(config, index)
        rows_path.write_text("\n".join(rows) + "\n")
        encode.write_clip(video_path, video, config.fps, audio, config.sample_rate)


def _claim_folder(root: Path, targets: set[Path], description: str) -> None:
    """Make the folders and note the config in toy.json, or say why this folder cannot be used."""
    note = root / "toy.json"
    strangers = {path for path in root.rglob("*") if path.is_file()} - targets - {note}
    strangers = {path for path in strangers if not path.name.startswith(".")}
    if strangers or (note.exists() and note.read_text() != description):
        culprit = min(strangers) if strangers else note
        raise ValueError(
            f"{root} already holds other data ({culprit}): choose an empty folder for the toy data"
        )
    for folder in ("video_dev", "metadata_dev"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    note.write_text(description)
