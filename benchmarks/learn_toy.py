"""How long until video and audio agree? Small joint models learn toy clips and are judged.

This is nearer to the published setting than the demo: 16 pixels, 1000 steps, all four levels with
their windows, two kinds of objects that move and pulse. Some runs add the random shift, or predict
the noise. --short True has the demo's model and clips instead, at 8 pixels. Nearer still, on a GPU:
--video_size 16,3,32,32 --audio_size 2,16384 --audio_fps 8192 --num_channels 64. At every save the
moving average is judged:

coupling   how much worse a modality of held-out clips is denoised beside another clip's other
           modality, at one noise level t / T: error(mismatched) / error(matched) - 1; 0 while the
           model ignores the other modality
spatial    correlation of the object's horizontal position and the level difference of the audio, of
           generated clips; v2a: of audio generated for held-out video, a2v: the other way round
temporal   correlation of the object's brightness and the loudness of the audio, likewise
FD         Frechet distance of generated and held-out clips, by a few features that need no weights
           (evaluation/bright_object.toy_features): of video, of audio, and of both together, which
           grows where they do not fit

--runs chooses what to train, one after the other; VARIANTS describes each. OUTPUT_DIR gets
learning.log (a line at every save), and at the end learning.md (tables) and learning.png (curves).
All values are in RUN/learning.csv, beside checkpoints and progress.csv (plot_log.py plots both).
The same command resumes, and --minutes includes earlier calls. Once they are spent it only makes
tables and curves, and with --samples_dir the clips that the README shows.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from learn_runs import DEFAULTS, SHORT_DEFAULTS, VARIANTS, Variant

from mm_diffusion import checkpoint, logger, rng
from mm_diffusion.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    JointTrainConfig,
    ModelConfig,
    TrainConfig,
    parse,
    pick,
)
from mm_diffusion.config.flags import flag
from mm_diffusion.data import encode, images
from mm_diffusion.data.clips import load_data, read_clips
from mm_diffusion.data.toy import ToyConfig, write_toy_dataset
from mm_diffusion.dist_util import World, friendly_errors, from_rank_0, setup_dist
from mm_diffusion.evaluation.bright_object import (
    draw_audio_position,
    mismatched_alignment,
    spatial_alignment,
    temporal_alignment,
    toy_features,
)
from mm_diffusion.evaluation.distances import standard_frechet_distance
from mm_diffusion.files import write_atomically, write_text
from mm_diffusion.respace import SpacedDiffusion
from mm_diffusion.sampling import Sampler, make_sampler, prepare, sample_joint
from mm_diffusion.script_util import (
    create_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from mm_diffusion.train_util import TrainLoop
from mm_diffusion.training.coupling import denoising_errors, mismatched
from mm_diffusion.training.resume import find_state, flags_to_start_with
from mm_diffusion.training.trackers import make_trackers
from mm_diffusion.viewing import curves

Clips = dict[str, th.Tensor]
Row = dict[str, float]

NOISE_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # t / T
FILE_PIXELS = 64  # the least side of the toy files, which are scaled down when they are read
HELD_OUT_SEED = 1  # of the toy clips that no run trains on
SHOWN_ROWS = 12  # of each run, evenly chosen, the last one among them
COLUMNS = {
    "step": "step",
    "minutes": "minutes",
    "spatial": "spatial",
    "spatial_mismatched": "mismatched",
    "spatial_v2a": "spatial v2a",
    "spatial_a2v": "spatial a2v",
    "temporal": "temporal",
    "temporal_mismatched": "mismatched",
    "coupling_video": "coupling v",
    "coupling_audio": "coupling a",
    "fd_video": "FD video",
    "fd_audio": "FD audio",
    "fd_joint": "FD joint",
}
NO_CURVES = ("step", "minutes", "spatial_mismatched", "temporal_mismatched")
CURVES = [key for key in COLUMNS if key not in NO_CURVES]
NUM_SAMPLES = 4
CHOICES = "; ".join(f"{name}: {variant.text}" for name, variant in VARIANTS.items())


@dataclasses.dataclass(frozen=True)
class LearnConfig(Config):
    """The benchmark."""

    runs: str = flag("no_shift,picture_flip,shift", f"which to train, in order ({CHOICES})")
    short: bool = flag(False, "8 pixels, 15 minutes and all else as in the demo, by default")
    minutes: float = flag(60.0, "of training and judging for each run, earlier calls included")
    num_clips: int = flag(1024, "toy clips to train on")
    held_out_clips: int = flag(64, "other toy clips, to compare with")
    generated_clips: int = flag(48, "clips to generate at every save")
    samples_dir: str = flag("", "for 4 clips of the run of least FD joint and an image of them")


CONFIGS = (ModelConfig, DiffusionConfig, DataConfig, JointTrainConfig, LearnConfig)


def main() -> None:
    flags, explicit = parse(__doc__, *CONFIGS, defaults=DEFAULTS)
    if flags["short"]:
        flags |= {name: x for name, x in SHORT_DEFAULTS.items() if name not in explicit}
    names = [name.strip() for name in flags["runs"].split(",")]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"--runs {unknown[0]!r}: choose from {', '.join(VARIANTS)}")
    world, root = setup_dist(flags["devices"]), Path(flags["output_dir"])
    logger.configure(enabled=world.rank == 0)
    if not flags["data_dir"]:
        flags["data_dir"] = from_rank_0(lambda: write_clips(root / "data", "num_clips", flags))
    folder = from_rank_0(lambda: write_clips(root / "held_out", "held_out_clips", flags))
    config = pick(DataConfig, flags)
    held_out = read_clips(folder, config)
    data = read_clips(flags["data_dir"], config, most=flags["generated_clips"])
    flags["cache_dir"] = flags["cache_dir"] or str(root / "cache")
    for name in names:
        variant = VARIANTS[name]
        run_flags = flags | variant.flags | {"output_dir": str(root / name)}
        if not train(run_flags, explicit | set(variant.flags), variant, held_out, world):
            logger.log("stopped; the same command resumes")
            break
    if world.rank == 0:
        conclude(root, flags, judge_data(data, held_out), world)


def write_clips(folder: Path, count: str, flags: Mapping[str, Any]) -> str:
    """A folder of so many (a flag) toy clips like the model's; ValueError if it holds others."""
    config = pick(DataConfig, flags)
    num_frames, _, height, width = config.video_size
    scale = max(1, -(-FILE_PIXELS // min(height, width)))
    seconds = num_frames / config.video_fps
    size = {"height": scale * height, "width": scale * width}
    seed = HELD_OUT_SEED if folder.name == "held_out" else 0
    toy = ToyConfig(**size, fps=config.video_fps, seconds=seconds, seed=seed)
    write_toy_dataset(folder, flags[count], toy)
    return str(folder)


def train(
    flags: dict[str, Any], explicit: set[str], variant: Variant, held_out: Clips, world: World
) -> bool:
    """Train and judge one run until its minutes are spent; False where a signal stopped it."""
    trackers = make_trackers(flags, world.rank)
    logger.configure(flags["output_dir"], world.rank == 0, trackers)
    flags = flags_to_start_with(flags, explicit)
    state = find_state(pick(TrainConfig, flags), warn=lambda text: None)
    judge = Judge(flags, held_out, world, last_step=state.step if state else -1)
    left = from_rank_0(lambda: flags["minutes"] - judge.minutes())
    if left <= 0:
        return True
    config = pick(JointTrainConfig, flags | {"max_hours": left / 60})
    data_config = pick(DataConfig, flags)
    th.manual_seed(config.seed)
    model, diffusion = create_from(flags)

    def data(start_sample: int) -> Iterator[Any]:
        batches = load_data(data_config, world, start_sample)
        return map(mirror_images, batches) if variant.mirrors_images else batches

    options = {"use_fp16": flags["use_fp16"], "flags": flags, "preview": judge.preview}
    options["task_mix"] = config.task_mix
    loop = TrainLoop(model, diffusion, data, config, world, **options)
    if loop.step == 0:
        with loop.ema_weights() as untrained:
            judge.preview(untrained, 0)
    loop.run_loop()
    return loop.step in judge.steps


def create_from(flags: Mapping[str, Any]) -> tuple[th.nn.Module, SpacedDiffusion]:
    """The joint model and diffusion of these flags, among others."""
    names = model_and_diffusion_defaults()
    return create_model_and_diffusion(**{name: flags[name] for name in names})


def mirror_images(batch: tuple[Clips, dict]) -> tuple[Clips, dict]:
    """The published fault: images are mirrored, and channels are not swapped."""
    clips, cond = batch
    return clips | {"video": clips["video"].flip(-1)}, cond


class Judge:
    """Measures a model at every save, and keeps the rows of learning.csv."""

    def __init__(
        self, flags: dict[str, Any], held_out: Clips, world: World, last_step: int
    ) -> None:
        self.flags, self.held_out, self.world = flags, held_out, world
        self.path = Path(flags["output_dir"], "learning.csv")
        self.rows = [row for row in read_rows(self.path) if row["step"] <= last_step]
        self.spent = self.rows[-1]["minutes"] if self.rows else 0.0
        self.started = time.monotonic()
        self.steps: set[int] = set()  # judged since then
        self.diffusion = create_diffusion(pick(DiffusionConfig, flags))
        way = "replacement" if flags["task_mix"] == "joint" else "clean"
        self.sampler = make_sampler(flags["sample_fn"], self.diffusion, conditioning=way)

    def minutes(self) -> float:
        """Minutes of this run so far, earlier calls included."""
        return self.spent + (time.monotonic() - self.started) / 60

    def preview(self, model: th.nn.Module, step: int) -> None:
        """Judge the model and add a row, on rank 0; the others wait."""
        is_done = step in self.steps
        self.steps.add(step)
        if is_done or self.world.rank:
            return
        device, size = self.world.device, self.flags["batch_size"]
        count = self.flags["generated_clips"]
        clips = generate(model, self.sampler, count, size, device)
        row: Row = {"step": step} | alignments(clips) | distances(clips, self.held_out)
        for name, short in (("video", "v2a"), ("audio", "a2v")):
            known = {name: self.held_out[name]}
            clips = generate(model, self.sampler, count, size, device, known)
            row[f"spatial_{short}"] = spatial_alignment(clips["video"], clips["audio"])
        row |= coupling(model, self.diffusion, self.held_out, size, device)
        row["minutes"] = self.minutes()
        self.rows = [*(r for r in self.rows if r["step"] != step), row]
        write_rows(self.path, self.rows)
        report(self.path.parent, ", ".join(f"{name} {row[name]:.4g}" for name in COLUMNS))


def report(run: Path, text: str) -> None:
    """Log a text, and add it to the log of all runs."""
    logger.log(f"{run.name}: {text}")
    with (run.parent / "learning.log").open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {run.name}: {text}\n")


def generate(
    model: th.nn.Module,
    sampler: Sampler,
    count: int,
    batch_size: int,
    device: th.device,
    conditioning: Clips | None = None,
) -> Clips:
    """Clips 0, 1, ... of seed 0, or as many as the clips of the known modality."""
    if conditioning:
        count = min([count, *map(len, conditioning.values())])
    parts = []
    for start in range(0, count, batch_size):
        batch = range(count)[start : start + batch_size]
        known = {name: x[batch.start : batch.stop] for name, x in (conditioning or {}).items()}
        parts.append(sample_joint(model, sampler, batch, 0, device, conditioning=known))
    return {name: th.cat([clips[name] for clips in parts]) for name in parts[0]}


def distances(clips: Clips, reference: Clips) -> dict[str, float]:
    """Frechet distances of `toy_features`; they depend on how many clips there are."""
    ours, theirs = (toy_features(x["video"], x["audio"]) for x in (clips, reference))
    return {f"fd_{name}": standard_frechet_distance(ours[name], theirs[name]) for name in ours}


def judge_data(data: Clips, held_out: Clips) -> dict[str, Row]:
    """What a perfect model would reach, and one that separates video and audio: rows by title."""
    titles = {"data": data, "data, mismatched": mismatched(data, 1)}
    return {title: alignments(x) | distances(x, held_out) for title, x in titles.items()}


def alignments(clips: Clips) -> Row:
    """How well video and audio fit, and how well those of different clips do."""
    videos, audios = clips["video"], clips["audio"]
    return {
        "spatial": spatial_alignment(videos, audios),
        "spatial_mismatched": mismatched_alignment(videos, audios),
        "temporal": temporal_alignment(videos, audios),
        "temporal_mismatched": temporal_alignment(videos, audios.roll(1, 0)),
    }


@th.no_grad()
def coupling(
    model: th.nn.Module,
    diffusion: SpacedDiffusion,
    clips: Clips,
    batch_size: int,
    device: th.device,
) -> Row:
    """error(mismatched) / error(matched) - 1 by modality: the mean, and at each noise level."""
    noise = rng.randn_like(clips, rng.per_sample(0, "coupling", indices=range(len(clips["video"]))))
    options: dict[str, Any] = {"levels": NOISE_LEVELS, "batch_size": batch_size, "device": device}
    run = functools.partial(denoising_errors, model, diffusion, **options)
    own, other = run(clips, noise), run(mismatched(clips, 1), mismatched(noise, 1))
    ratios: Row = {}
    for name in clips:
        ratios |= zip(_coupling_keys(name), (other[name] / own[name] - 1).tolist(), strict=True)
    row: Row = {}
    for name in clips:
        row[f"coupling_{name}"] = float(np.mean([ratios[key] for key in _coupling_keys(name)]))
    return row | {key: ratios[key] for name in clips for key in _coupling_keys(name)}


def _coupling_keys(modality: str) -> list[str]:
    return [f"coupling_{modality}_{level}" for level in NOISE_LEVELS]


# ---------------------------------------------------------------- rows and tables


def read_rows(path: Path) -> list[Row]:
    """The rows of a table, without empty cells; [] if there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows of equal keys as a table, atomically."""

    def write(temporary: str) -> None:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[-1]))
            writer.writeheader()
            writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)

    write_atomically(path, write)


def conclude(root: Path, flags: dict[str, Any], data: dict[str, Row], world: World) -> None:
    """Write tables, curves and samples of all runs in the folder."""
    found = {name: read_rows(root / name / "learning.csv") for name in VARIANTS}
    runs = {name: rows for name, rows in found.items() if rows}
    text = tables(flags, data, runs)
    write_text(root / "learning.md", text + "\n")
    logger.log(f"\n{text}\n\nin {root}: learning.md")
    if with_curves := {name: rows for name, rows in runs.items() if len(rows) > 1}:
        draw_curves(root, data["data"], list(with_curves))
        logger.log(f"in {root}: learning.png")
    if flags["samples_dir"]:
        write_samples(root / best_run(runs), Path(flags["samples_dir"]), flags, world)


def tables(flags: dict[str, Any], data: dict[str, Row], runs: dict[str, list[Row]]) -> str:
    """Markdown: what the data reach, then the course of every run that was judged."""
    parts = [
        "# Learning the toy clips",
        f"Frames {flags['video_size']}, audio {flags['audio_size']}, {flags['num_channels']}"
        f" channels. {flags['generated_clips']} clips are compared with"
        f" {flags['held_out_clips']} held-out ones. The head of `benchmarks/learn_toy.py` explains"
        " the columns.",
        "## data",
        table(COLUMNS.values(), [(title, row, COLUMNS) for title, row in data.items()]),
    ]
    for name, rows in runs.items():
        chosen = sorted({round(k) for k in np.linspace(0, len(rows) - 1, SHOWN_ROWS)})
        shown = [rows[k] for k in chosen]
        course = [("" if row["step"] else "untrained", row, COLUMNS) for row in shown]
        levels = [(part, rows[-1], _coupling_keys(part)) for part in ("video", "audio")]
        parts += [
            f"## {name}: {VARIANTS[name].text}",
            table(COLUMNS.values(), course),
            "Coupling at the end by noise level t / T:",
            table(map(str, NOISE_LEVELS), levels),
        ]
    return "\n\n".join(parts)


def table(header: Iterable[str], rows: Iterable[tuple[str, Row, Iterable[str]]]) -> str:
    """A Markdown table with cells of equal width; a row is a title, values by key, keys to show."""
    lines = [["", *header]]
    lines += [[title, *(_cell(row.get(key)) for key in keys)] for title, row, keys in rows]
    first = max(len(line[0]) for line in lines)
    rest = max(len(cell) for line in lines for cell in line[1:])
    texts = []
    for title, *cells in lines:
        padded = [f"{title:<{first}}", *(f"{cell:>{rest}}" for cell in cells)]
        texts.append(f"| {' | '.join(padded)} |")
    rules = ["-" * (first + 2), *["-" * (rest + 1) + ":"] * (len(lines[0]) - 1)]
    return "\n".join([texts[0], f"|{'|'.join(rules)}|", *texts[1:]])


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    if float(value).is_integer():
        return f"{value:.0f}"
    return f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no -0.000


def draw_curves(root: Path, data: Row, names: list[str]) -> None:
    """learning.png: a panel for each of CURVES, with what the data reach as a level line."""
    runs = [curves.Run(name, curves.read_columns(root / name / "learning.csv")) for name in names]
    last = max(run.columns["step"].max() for run in runs)
    level = {key: np.full(2, data[key]) for key in CURVES if key in data}
    level["step"] = np.array([0.0, last])
    panels = [curves.Panel(COLUMNS[key], [key], is_log=key.startswith("fd_")) for key in CURVES]
    curves.save(curves.draw([*runs, curves.Run("data", level)], panels), root / "learning.png")


def best_run(runs: dict[str, list[Row]]) -> str:
    """The run of least FD joint at its end; ValueError where none was judged."""
    last = {name: rows[-1]["fd_joint"] for name, rows in runs.items() if "fd_joint" in rows[-1]}
    if not last:
        raise ValueError("--samples_dir: no run was judged yet; give it more --minutes")
    return min(last, key=lambda name: last[name])


def write_samples(run: Path, folder: Path, flags: dict[str, Any], world: World) -> None:
    """The first clips of the run's EMA: sample_N.mp4 for any player, and samples.png."""
    path = checkpoint.find_checkpoints(str(run))[0]
    weights, trained = checkpoint.load_state(path)
    flags = flags | trained
    model, diffusion = create_from(flags)
    checkpoint.load_weights(model, weights, name=path)
    prepared = prepare(model.to(world.device))
    sampler = make_sampler(flags["sample_fn"], diffusion)
    clips = generate(prepared, sampler, NUM_SAMPLES, flags["batch_size"], world.device)
    for k, (video, audio) in enumerate(zip(clips["video"], clips["audio"], strict=True)):
        target = folder / f"sample_{k}.mp4"
        encode.write_watchable(target, video, flags["video_fps"], audio, flags["audio_fps"])
    strips = draw_audio_position(images.enlarge(clips["video"]), clips["audio"])
    images.save_contact_sheet(folder / "samples.png", strips)
    logger.log(f"{NUM_SAMPLES} clips of {path} in {folder}: sample_0.mp4 ... and samples.png")


if __name__ == "__main__":
    with friendly_errors():
        main()
