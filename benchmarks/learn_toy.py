"""How long until picture and sound fit? Small joint models learn the toy clips, and are judged on the way.

Nearer to the published setting than the demo: 16 pixels, 1000 steps, all four levels with their windows, two kinds of
objects that move and pulse; runs add the random shift and the prediction of the noise. Nearer still, on a GPU:
--video_size 16,3,32,32 --audio_size 2,16384 --audio_fps 8192 --num_channels 64. At every save the moving average is
judged:

coupling   how much worse a modality of held-out clips is denoised beside another clip's other modality, at one noise
           level t / T: error(mismatched) / error(matched) - 1, and 0 as long as the model does not look across
spatial    correlation of the object's place and the level difference of the sound, of clips that are drawn
temporal   correlation of the object's brightness and the loudness of the sound over time, likewise
FD         Frechet distance of drawn and held-out clips: of pictures, of sounds, and of both together, which grows
           where they do not fit; of a few numbers that need no weights (metrics/features.brief)

--runs says which to train, one after the other; what each is stands there and in VARIANTS. OUTPUT_DIR gets learning.log
(a line at every save), and at the end learning.md (tables) and learning.png (curves); all numbers are in
RUN/learning.csv, beside checkpoints and progress.csv (plot_log.py draws both). The same command goes on where it
stopped, and --minutes counts what was spent before; once that is used up it only makes tables and curves, and with
--samples_dir the clips that the README shows.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from tqdm import tqdm

from mm_diffusion import checkpoint, logger, rng, tree
from mm_diffusion.data import encode, images
from mm_diffusion.data.clips import joint_data, read_clips
from mm_diffusion.data.toy import ToyConfig, write_toy_dataset
from mm_diffusion.dist_util import World, friendly_errors, from_rank_0, setup_dist
from mm_diffusion.evaluation.distances import standard_frechet_distance
from mm_diffusion.evaluation.features import brief
from mm_diffusion.evaluation.spatial import (
    mismatched_alignment,
    show_heard_place,
    spatial_alignment,
    temporal_alignment,
)
from mm_diffusion.files import write_atomically
from mm_diffusion.respace import SpacedDiffusion
from mm_diffusion.sampling import Sampler, bind, make_sampler, prepare, sample_joint
from mm_diffusion.script_util import (
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    TrainConfig,
    create_diffusion,
    create_model_and_diffusion,
    flag,
    model_and_diffusion_defaults,
    parse,
    pick,
)
from mm_diffusion.train_util import TrainLoop
from mm_diffusion.training.resume import find_state, flags_to_start_with
from mm_diffusion.unet import window_shift
from mm_diffusion.viewing import curves

Clips = dict[str, th.Tensor]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A run: what it shows, the flags that make it so, and whether every picture, but no sound, is mirrored."""

    text: str
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    mirrors_pictures: bool = False


# The thresholding of dpm_solver++ bounds what the first evaluations make of errors in the noise.
PREDICTS_NOISE = {"predict_xstart": False, "sample_fn": "dpm_solver++"}
VARIANTS = {
    "no_shift": Variant("windows not shifted; predicts the clip", {"cross_attention_shift": False}),
    "picture_flip": Variant(
        "the same, but every picture mirrored and no sound, as published",
        {"cross_attention_shift": False, "random_flip": False},
        mirrors_pictures=True,
    ),
    "shift": Variant("windows shifted at random, as published; predicts the clip"),
    "noise": Variant(
        "windows not shifted; predicts the noise, as published",
        {"cross_attention_shift": False} | PREDICTS_NOISE,
    ),
    "published": Variant(
        "windows shifted at random; predicts the noise: both as published",
        PREDICTS_NOISE,
    ),
}
DEFAULTS = {
    "video_size": "8,3,16,16",
    "audio_size": "2,4096",  # so many samples that the sound stands out in as much noise as the picture does
    "video_fps": 8,  # the toy sounds pulse 4 to 5 times a second
    "audio_fps": 4096,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1,2,2",
    "predict_xstart": True,
    "num_head_channels": 32,
    "batch_size": 8,
    "lr": 1e-3,
    "lr_warmup_steps": 200,
    "grad_clip": 1.0,
    "ema_rate": "0.999",
    "num_workers": 1,
    "save_interval": 500,
    "keep_last": 1,
    "output_dir": "output/learn_toy",
}
NOISE_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # t / T
FILE_PIXELS = 64  # the least side of the toy files; what is read is smaller
HELD_OUT_SEED = 1  # of the toy clips that no run trains on
SHOWN_ROWS = 12  # of each run, evenly chosen, the last one among them
COLUMNS = {
    "step": "step",
    "minutes": "minutes",
    "spatial": "spatial",
    "spatial_mismatched": "mismatched",
    "temporal": "temporal",
    "temporal_mismatched": "mismatched",
    "coupling_video": "coupling v",
    "coupling_audio": "coupling a",
    "fd_video": "FD video",
    "fd_audio": "FD audio",
    "fd_joint": "FD joint",
}
CURVES = (
    "spatial",
    "temporal",
    "coupling_video",
    "coupling_audio",
    "fd_video",
    "fd_audio",
    "fd_joint",
)
NUM_SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class LearnConfig:
    """The benchmark."""

    runs: str = flag(
        "no_shift,picture_flip,shift",
        "which to train, with commas between: "
        + "; ".join(f"{name}: {v.text}" for name, v in VARIANTS.items()),
    )
    minutes: float = flag(60.0, "of training and judging for each run, earlier calls included")
    num_clips: int = flag(1024, "toy clips to train on")
    held_out_clips: int = flag(64, "other toy clips, to measure the coupling on")
    drawn_clips: int = flag(48, "clips to draw from the model at every save")
    samples_dir: str = flag(
        "",
        "write the first 4 clips of the run of least FD joint, and a picture of them; empty: none",
    )


CONFIGS = (ModelConfig, DiffusionConfig, DataConfig, TrainConfig, LearnConfig)


def main() -> None:
    flags, given = parse(__doc__, *CONFIGS, defaults=DEFAULTS)
    names = [name.strip() for name in flags["runs"].split(",")]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"runs {unknown[0]!r}: choose from {', '.join(VARIANTS)}")
    world, root = setup_dist(flags["devices"]), Path(flags["output_dir"])
    logger.configure(enabled=world.rank == 0)
    flags["data_dir"] = flags["data_dir"] or from_rank_0(
        lambda: write_clips(root / "data", flags["num_clips"], flags)
    )
    sizes = [flags[name] for name in ("video_size", "audio_size", "video_fps", "audio_fps")]
    held_out = read_clips(
        from_rank_0(lambda: write_clips(root / "held_out", flags["held_out_clips"], flags)), *sizes
    )
    data = read_clips(flags["data_dir"], *sizes, most=flags["drawn_clips"])
    flags["cache_dir"] = flags["cache_dir"] or str(root / "cache")
    for name in names:
        variant = VARIANTS[name]
        run_flags = flags | variant.flags | {"output_dir": str(root / name)}
        if not train(run_flags, given | set(variant.flags), variant, held_out, world):
            logger.log("stopped; the same command goes on")
            break
    if world.rank == 0:
        conclude(root, flags, judged_data(data, held_out), world)


def write_clips(folder: Path, count: int, flags: dict[str, Any]) -> str:
    """A folder of toy clips as long and as dense as the model's; ValueError where it holds others."""
    num_frames, _, height, width = (int(n) for n in flags["video_size"].split(","))
    scale = max(1, -(-FILE_PIXELS // min(height, width)))
    config = ToyConfig(
        height=scale * height,
        width=scale * width,
        fps=flags["video_fps"],
        seconds=num_frames / flags["video_fps"],
        seed=HELD_OUT_SEED if folder.name == "held_out" else 0,
    )
    write_toy_dataset(
        folder, count, config, progress=lambda clips: tqdm(clips, desc=str(folder), unit="clip")
    )
    return str(folder)


def train(
    flags: dict[str, Any], given: set[str], variant: Variant, held_out: Clips, world: World
) -> bool:
    """Train and judge one run until its minutes are used up; False where a signal has stopped it before."""
    logger.configure(
        flags["output_dir"], world.rank == 0, flags["use_db"], flags["use_tensorboard"]
    )
    flags = flags_to_start_with(flags, given)
    state = find_state(pick(TrainConfig, flags), warn=lambda text: None)
    judge = Judge(flags, held_out, world, last_step=state[1] if state else -1)
    left = from_rank_0(lambda: flags["minutes"] - judge.minutes())
    if left <= 0:
        return True
    config = pick(TrainConfig, flags | {"max_hours": left / 60})
    th.manual_seed(config.seed)
    model, diffusion = create_model_and_diffusion(
        **{name: flags[name] for name in model_and_diffusion_defaults()}
    )
    batches = joint_data(flags, world)

    def data(start_sample: int) -> Iterator[Any]:
        found = batches(start_sample)
        return map(mirror_pictures, found) if variant.mirrors_pictures else found

    loop = TrainLoop(
        model,
        diffusion,
        data,
        config,
        world,
        use_fp16=flags["use_fp16"],
        flags=flags,
        preview=judge.preview,
    )
    if loop.step == 0:
        with loop.ema_weights() as untrained:
            judge.preview(untrained, 0)
    loop.run_loop()
    return loop.step in judge.steps


def mirror_pictures(batch: tuple[Clips, dict]) -> tuple[Clips, dict]:
    """The published fault: pictures change sides, sounds do not."""
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
        self.sampler = make_sampler(flags["sample_fn"], self.diffusion)

    def minutes(self) -> float:
        return self.spent + (time.monotonic() - self.started) / 60

    def preview(self, model: th.nn.Module, step: int) -> None:
        """Judge the model and add a row; rank 0 does it, the others wait."""
        done = step in self.steps
        self.steps.add(step)
        if done or self.world.rank:
            return
        row: dict[str, float] = {"step": step}
        device, size = self.world.device, self.flags["batch_size"]
        drawn = draw(model, self.sampler, self.flags["drawn_clips"], size, device)
        row |= alignments(drawn) | distances(drawn, self.held_out)
        row |= coupling(model, self.diffusion, self.held_out, size, device)
        row["minutes"] = self.minutes()
        self.rows = [*(r for r in self.rows if r["step"] != step), row]
        write_rows(self.path, self.rows)
        tell(self.path.parent, ", ".join(f"{name} {row[name]:.4g}" for name in COLUMNS))


def tell(run: Path, text: str) -> None:
    """Say it, and add it to the log of all runs."""
    logger.log(f"{run.name}: {text}")
    with (run.parent / "learning.log").open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {run.name}: {text}\n")


def draw(
    model: th.nn.Module, sampler: Sampler, count: int, batch_size: int, device: th.device
) -> Clips:
    """Clips 0, 1, ... of seed 0."""
    batches = [range(count)[i : i + batch_size] for i in range(0, count, batch_size)]
    drawn = [sample_joint(model, sampler, batch, 0, device) for batch in batches]
    return {name: th.cat([clips[name] for clips in drawn]) for name in drawn[0]}


def distances(clips: Clips, true: Clips) -> dict[str, float]:
    """Frechet distances of `brief` points; they depend on how many clips there are."""
    points, true_points = (brief(x["video"], x["audio"]) for x in (clips, true))
    return {
        f"fd_{name}": standard_frechet_distance(points[name], true_points[name]) for name in points
    }


def judged_data(data: Clips, held_out: Clips) -> dict[str, dict[str, float]]:
    """What a perfect model would reach, and one that draws picture and sound apart: rows by title."""
    made = {"data": data, "data, mismatched": parted(data, 1)}
    return {title: alignments(clips) | distances(clips, held_out) for title, clips in made.items()}


def alignments(clips: Clips) -> dict[str, float]:
    """How well pictures and sounds fit, and how well those of different clips do."""
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
) -> dict[str, float]:
    """error(mismatched) / error(matched) - 1 of each modality, by noise level and in the mean over the levels."""
    noise = tree.randn_like(
        clips, rng.per_sample(0, "coupling", indices=range(len(clips["video"])))
    )
    ratios: dict[str, list[float]] = {name: [] for name in clips}
    for level in NOISE_LEVELS:
        t = int(level * diffusion.num_timesteps)
        own, others = (
            errors(
                model, diffusion, *(parted(x, shift) for x in (clips, noise)), t, batch_size, device
            )
            for shift in (0, 1)
        )
        for name, values in ratios.items():
            values.append(others[name] / own[name] - 1)
    row = {f"coupling_{name}": float(np.mean(values)) for name, values in ratios.items()}
    for name, values in ratios.items():
        row |= {
            f"coupling_{name}_{level}": value
            for level, value in zip(NOISE_LEVELS, values, strict=True)
        }
    return row


def parted(clips: Clips, shift: int) -> Clips:
    """Pictures with the sounds of the clips `shift` places on."""
    return clips | {"audio": clips["audio"].roll(shift, 0)}


def errors(
    model: th.nn.Module,
    diffusion: SpacedDiffusion,
    clips: Clips,
    noise: Clips,
    step: int,
    batch_size: int,
    device: th.device,
) -> dict[str, float]:
    """Mean squared error of what the model predicts at a timestep, by modality; the same draws at every call."""
    total = dict.fromkeys(clips, 0.0)
    count = len(clips["video"])
    for first in range(0, count, batch_size):
        x, eps = (
            tree.tree_map(lambda v, i=first: v[i : i + batch_size].to(device), y)
            for y in (clips, noise)
        )
        t = th.full((len(x["video"]),), step, device=device)
        with window_shift(rng.generator("coupling", step, first)):
            terms = diffusion.training_losses(bind(model), x, t, eps)
        for name in total:
            total[name] += float(terms[f"mse_{name}"].sum()) / count
    return total


# ---------------------------------------------------------------- rows and tables


def read_rows(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {key: float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """Rows of equal keys -> a table that is there whole or as it was before."""
    partial = path.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[-1]))
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
    os.replace(partial, path)


def conclude(
    root: Path, flags: dict[str, Any], data: dict[str, dict[str, float]], world: World
) -> None:
    """Tables, curves and samples of all runs in the folder."""
    found = {name: read_rows(root / name / "learning.csv") for name in VARIANTS}
    runs = {name: rows for name, rows in found.items() if rows}
    text = report(flags, data, runs)
    write_atomically(
        root / "learning.md", lambda temporary: Path(temporary).write_text(text + "\n")
    )
    logger.log(f"\n{text}\n\nin {root}: learning.md")
    if drawn := {name: rows for name, rows in runs.items() if len(rows) > 1}:
        draw_curves(root, data["data"], drawn)
        logger.log(f"in {root}: learning.png")
    if flags["samples_dir"]:
        write_samples(root / best_run(runs), Path(flags["samples_dir"]), flags, world)


def report(
    flags: dict[str, Any],
    data: dict[str, dict[str, float]],
    runs: dict[str, list[dict[str, float]]],
) -> str:
    """As Markdown: what data reach, then the course of every run that has been judged."""
    parts = [
        "# Learning the toy clips",
        f"Frames {flags['video_size']}, sound {flags['audio_size']}, {flags['num_channels']} channels;"
        f" {flags['drawn_clips']} clips compared with {flags['held_out_clips']} held-out ones. The head of"
        " `benchmarks/learn_toy.py` says what the columns are.",
        "## data",
        table(COLUMNS.values(), [(title, row, COLUMNS) for title, row in data.items()]),
    ]
    for name, rows in runs.items():
        shown = sorted({round(k) for k in np.linspace(0, len(rows) - 1, SHOWN_ROWS)})
        levels = [
            (modality, rows[-1], [f"coupling_{modality}_{level}" for level in NOISE_LEVELS])
            for modality in ("video", "audio")
        ]
        parts += [
            f"## {name}: {VARIANTS[name].text}",
            table(
                COLUMNS.values(),
                [("" if rows[k]["step"] else "untrained", rows[k], COLUMNS) for k in shown],
            ),
            "Coupling at the end by noise level t / T:",
            table(map(str, NOISE_LEVELS), levels),
        ]
    return "\n\n".join(parts)


def table(
    header: Iterable[str], rows: Iterable[tuple[str, dict[str, float], Iterable[str]]]
) -> str:
    """A Markdown table whose cells are of equal width; rows are a title, numbers by key, and the keys to show."""
    lines = [
        ["", *header],
        *([title, *(_cell(row.get(key)) for key in keys)] for title, row, keys in rows),
    ]
    first = max(len(line[0]) for line in lines)
    rest = max(len(cell) for line in lines for cell in line[1:])
    texts = [
        "| " + " | ".join([f"{line[0]:<{first}}", *(f"{c:>{rest}}" for c in line[1:])]) + " |"
        for line in lines
    ]
    rule = (
        "|" + "|".join(["-" * (first + 2), *["-" * (rest + 1) + ":"] * (len(lines[0]) - 1)]) + "|"
    )
    return "\n".join([texts[0], rule, *texts[1:]])


def _cell(number: float | None) -> str:
    if number is None:
        return ""
    return (
        f"{number:.0f}" if float(number).is_integer() else f"{round(number, 3) + 0.0:.3f}"
    )  # + 0.0: no -0.000


def draw_curves(
    root: Path, data: dict[str, float], runs: dict[str, list[dict[str, float]]]
) -> None:
    """learning.png: a panel for each of CURVES, with what data reach as a level line."""
    drawn = [curves.Run(name, curves.read_columns(root / name / "learning.csv")) for name in runs]
    last = max(run.columns["step"].max() for run in drawn)
    level = {"step": np.array([0.0, last])} | {
        key: np.full(2, data[key]) for key in CURVES if key in data
    }
    panels = [curves.Panel(COLUMNS[key], [key], is_log=key.startswith("fd_")) for key in CURVES]
    curves.save(curves.draw([*drawn, curves.Run("data", level)], panels), root / "learning.png")


def best_run(runs: dict[str, list[dict[str, float]]]) -> str:
    """The run whose last clips are nearest to true ones, picture and sound together; ValueError without any."""
    judged = {name: rows[-1]["fd_joint"] for name, rows in runs.items() if "fd_joint" in rows[-1]}
    if not judged:
        raise ValueError("samples_dir: no run has been judged yet; give it more --minutes")
    return min(judged, key=lambda name: judged[name])


def write_samples(run: Path, folder: Path, flags: dict[str, Any], world: World) -> None:
    """The first clips of the run's moving average: sample_N.mp4 for any player, and samples.png."""
    path = checkpoint.find_checkpoints(str(run))[0]
    weights, trained = checkpoint.load_state(path)
    flags = flags | trained
    model, diffusion = create_model_and_diffusion(
        **{name: flags[name] for name in model_and_diffusion_defaults()}
    )
    checkpoint.load_weights(model, weights, name=path)
    sampler = make_sampler(flags["sample_fn"], diffusion)
    clips = draw(
        prepare(model.to(world.device)), sampler, NUM_SAMPLES, flags["batch_size"], world.device
    )
    for k, (video, audio) in enumerate(zip(clips["video"], clips["audio"], strict=True)):
        encode.write_watchable(
            folder / f"sample_{k}.mp4", video, flags["video_fps"], audio, flags["audio_fps"]
        )
    strips = show_heard_place(images.enlarge(clips["video"]), clips["audio"])
    images.save_contact_sheet(folder / "samples.png", strips)
    logger.log(f"{NUM_SAMPLES} clips of {path} in {folder}: sample_0.mp4 ... and samples.png")


if __name__ == "__main__":
    with friendly_errors():
        main()
