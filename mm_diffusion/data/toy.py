"""Toy clips in the shape of SAVGBench: bright objects move over dark texture, each audibly.

An object's position sets pixels and panning, its loudness brightness and envelope. Clip k depends
on (config, k) only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from tqdm import tqdm

from ..config.flags import Config, flag, positive
from . import encode

METADATA_HZ = 10
METADATA_PIXELS = 256  # SAVGBench states positions as if every frame were this wide and high
MAX_EAR_DELAY_SECONDS = 6e-4  # interaural time difference of a source hard to one side
SPEECH, INSTRUMENT = 0, 1
COLOURS = {SPEECH: (1.0, 0.75, 0.45), INSTRUMENT: (0.5, 0.85, 1.0)}
FUNDAMENTALS_HZ = {SPEECH: (90, 150), INSTRUMENT: (65, 120)}
BELL_PARTIALS = [(1, 1.0), (2.0, 0.15), (2.99, 0.1), (4.2, 0.08), (5.4, 0.05)]


@dataclasses.dataclass(frozen=True)
class ToyConfig(Config):
    """Properties of the clips."""

    height: int = flag(256, "frame height in pixels", positive)
    width: int = flag(256, "frame width in pixels", positive)
    fps: float = flag(4.0, "frames per second", positive)
    seconds: float = flag(5.0, "duration of a clip", positive)
    sample_rate: int = flag(16000, "audio samples per second", positive)
    num_objects: int = flag(1, "audible objects per clip", positive)
    seed: int = flag(0, "of all randomness: clip k depends on these values and k only")

    @property
    def num_frames(self) -> int:
        return max(1, round(self.seconds * self.fps))

    @property
    def num_samples(self) -> int:
        return max(1, round(self.seconds * self.sample_rate))


@dataclasses.dataclass(frozen=True)
class SoundSource:
    """One audible object."""

    category: int
    radius: float  # fraction of the width
    start: float  # position on its path at 0 s, in crossings
    crossings_per_second: float  # signed
    height_phase: float
    bursts_per_second: float
    burst_phase: float
    fundamental_hz: float
    formants_hz: tuple[float, ...]

    def position(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds -> (x, y) as fractions of the range it moves in: (0, 0) is top left."""
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
        # The end of the stroke before fades out: the envelope does not jump.
        return attack * np.exp(-since_stroke) + (1 - attack) * np.exp(-1.0)

    def waveform(self, t: np.ndarray, max_hz: float) -> np.ndarray:
        """Seconds -> waveform within about -1..1, without partials above `max_hz`."""
        phase = 2 * np.pi * self.fundamental_hz * t
        if self.category == SPEECH:
            phase = phase + 0.3 * np.sin(2 * np.pi * 5 * t)  # vibrato
        wave, partials = np.zeros_like(t), self._partials()
        for ratio, gain in partials:
            if ratio * self.fundamental_hz < max_hz:
                wave += gain * np.sin(ratio * phase)
        return wave * self.loudness(t) / sum(gain for _, gain in partials)

    def _partials(self) -> list[tuple[float, float]]:
        """(frequency ratio, gain): harmonics under formants, or the stretched ones of a bell."""
        # The first dominates, so that a low sample rate keeps the level.
        if self.category == INSTRUMENT:
            return BELL_PARTIALS
        harmonics = np.arange(1, 25)
        distance = harmonics[:, None] * self.fundamental_hz - np.array(self.formants_hz)
        formant_gain = 0.06 * np.exp(-0.5 * (distance / 150) ** 2).sum(axis=1)
        gains = 0.25 ** (harmonics - 1.0) + formant_gain
        return list(zip(harmonics, gains, strict=True))


def sample_sources(config: ToyConfig, rng: np.random.Generator) -> list[SoundSource]:
    """The objects of one clip; categories alternate from a random first one."""
    first = int(rng.integers(2))
    return [_sample_source((first + i) % 2, config, rng) for i in range(config.num_objects)]


def _sample_source(category: int, config: ToyConfig, rng: np.random.Generator) -> SoundSource:
    return SoundSource(
        category=category,
        radius=min(rng.uniform(0.17, 0.2), 0.35 * config.height / config.width),
        start=rng.uniform(0, 2),
        crossings_per_second=rng.choice([-1, 1]) * rng.uniform(0.2, 0.5),
        height_phase=rng.uniform(0, 2 * np.pi),
        bursts_per_second=rng.uniform(4, 5),
        burst_phase=rng.uniform(0, 1),
        fundamental_hz=rng.uniform(*FUNDAMENTALS_HZ[category]),
        formants_hz=(rng.uniform(400, 800), rng.uniform(1000, 2000), rng.uniform(2300, 3000)),
    )


def centre_pixels(
    source: SoundSource, t: np.ndarray, config: ToyConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds -> (x, y) of its centre in pixels; it stays inside the frame."""
    radius = source.radius * config.width
    x, y = source.position(t)
    return radius + x * (config.width - 2 * radius), radius + y * (config.height - 2 * radius)


def render_frames(
    sources: Iterable[SoundSource], config: ToyConfig, rng: np.random.Generator
) -> np.ndarray:
    """-> [F, H, W, 3] uint8. A frame shows the middle of the time for which it is displayed."""
    rows, columns = np.ogrid[0.5 : config.height, 0.5 : config.width]
    texture = _texture(rows, columns, rng)
    frames = np.broadcast_to(texture, (config.num_frames, *texture.shape))
    t = (np.arange(config.num_frames) + 0.5) / config.fps
    for source in sources:
        x, y = (centre[:, None, None] for centre in centre_pixels(source, t, config))
        distance = 1.15 * np.maximum(abs(columns - x), abs(rows - y))
        if source.category == SPEECH:
            distance = np.hypot(columns - x, rows - y)
        cover = np.clip(source.radius * config.width - distance + 0.5, 0, 1)[..., None]
        brightness = 0.75 + 0.25 * source.loudness(t)[:, None, None, None]
        frames = frames * (1 - cover) + cover * brightness * np.array(COLOURS[source.category])
    return np.round(255 * np.clip(frames, 0, 1)).astype(np.uint8)


def _texture(rows: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[H, W, 3] dark: a few plane waves of random direction and colour."""
    height, width = len(rows), columns.size
    texture = np.full((height, width, 3), 0.08)
    for _ in range(4):
        down, across = rng.uniform(-6, 6, size=2)
        angle = 2 * np.pi * (down * rows / height + across * columns / width)
        wave = np.sin(angle + rng.uniform(0, 2 * np.pi))
        texture += 0.012 * wave[..., None] * rng.uniform(0.5, 1, size=3)
    return texture


def render_audio(sources: list[SoundSource], config: ToyConfig) -> np.ndarray:
    """-> [2, L] in [-1, 1]: constant-power panning, and the farther ear hears it later."""
    t = np.arange(config.num_samples) / config.sample_rate
    ears = np.zeros((2, config.num_samples))
    for source in sources:
        x, _ = source.position(t)
        for ear, nearness in enumerate((1 - x, x)):
            delay = MAX_EAR_DELAY_SECONDS * np.clip(1 - 2 * nearness, 0, 1)
            gain = np.sin(np.pi / 2 * nearness)
            ears[ear] += gain * source.waveform(t - delay, config.sample_rate / 2)
    return np.clip(ears / len(sources), -1, 1)


def metadata_rows(sources: list[SoundSource], config: ToyConfig) -> list[str]:
    """`frame,category,x,y` at 10 Hz, positions in 0..255 at any frame size."""
    rows, sides = [], np.array([config.width, config.height])
    for frame in range(max(1, int(config.seconds * METADATA_HZ))):
        for source in sources:
            centre = np.stack(centre_pixels(source, np.array(frame / METADATA_HZ), config))
            x, y = np.clip(METADATA_PIXELS * centre / sides, 0, METADATA_PIXELS - 1).astype(int)
            rows.append(f"{frame},{source.category},{x},{y}")
    return rows


def make_clip(config: ToyConfig, index: int) -> tuple[th.Tensor, th.Tensor, list[str]]:
    """Clip `index` -> (video [F, 3, H, W] uint8, audio [2, L] float32, metadata rows)."""
    rng = np.random.default_rng([config.seed, index])
    sources = sample_sources(config, rng)
    video = th.from_numpy(render_frames(sources, config, rng)).permute(0, 3, 1, 2)
    audio = th.from_numpy(render_audio(sources, config)).float()
    return video, audio, metadata_rows(sources, config)


def write_toy_dataset(out_dir: str | Path, num_clips: int, config: ToyConfig) -> None:
    """Write video_dev/toy_NNNNN.mp4 and metadata_dev/toy_NNNNN.csv; complete clips are kept.

    ValueError where the folder holds anything else, or clips of another config.
    """
    positive("num_clips", num_clips)
    root = Path(out_dir)
    videos = [root / f"video_dev/toy_{k:05d}.mp4" for k in range(num_clips)]
    tables = [root / f"metadata_dev/toy_{k:05d}.csv" for k in range(num_clips)]
    _claim_folder(root, {*videos, *tables}, dataclasses.asdict(config))
    for k in tqdm(range(num_clips), str(out_dir), unit="clip"):
        if videos[k].exists():
            continue
        video, audio, rows = make_clip(config, k)
        tables[k].write_text("\n".join(rows) + "\n")
        encode.write_clip(videos[k], video, config.fps, audio, config.sample_rate)


def _claim_folder(root: Path, targets: set[Path], settings: dict[str, Any]) -> None:
    """Make the folders and record the settings; ValueError where `root` cannot be used."""
    record, text = root / "toy.json", json.dumps(settings, indent=1)
    files = {path for path in root.rglob("*") if path.is_file() and path.name[0] != "."}
    others = files - targets - {record}
    if record.exists() and record.read_text() != text:
        others.add(record)
    if others:
        raise ValueError(f"{root} already holds other data ({min(others)}); choose an empty folder")
    for folder in ("video_dev", "metadata_dev"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    record.write_text(text)
