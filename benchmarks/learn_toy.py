"""How long until picture and sound fit? Small joint models learn the toy clips, and are judged on the way.

Nearer to the published setting than the demo: 16 pixels, noise prediction, 1000 steps, all four levels with their
windows and random shifts, two kinds of objects that move and pulse. Nearer still, on a GPU: --video_size 16,3,32,32
--audio_size 2,4096 --audio_fps 2048 --num_channels 64. At every save the moving average is judged:

coupling   how much worse a modality of held-out clips is denoised beside another clip's other modality, at one noise
           level t / T: error(mismatched) / error(matched) - 1, and 0 as long as the model does not look across
spatial    correlation of the object's place and the level difference of the sound, of clips that are drawn
temporal   correlation of the object's brightness and the loudness of the sound over time, likewise

--runs says which to train, one after the other; what each is stands there and in VARIANTS. Numbers go to
OUTPUT_DIR/RUN/learning.csv, beside checkpoints and progress.csv (plot_log.py draws both). The same command goes on
where it stopped, and --minutes counts what was spent before; once that is used up it only prints the tables.
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

from mm_diffusion import logger, rng, tree
from mm_diffusion.clip_index import build_index
from mm_diffusion.datasets import ClipDataset, load_data
from mm_diffusion.dist_util import World, friendly_errors, from_rank_0, setup_dist
from mm_diffusion.metrics.spatial import mismatched_alignment, spatial_alignment
from mm_diffusion.metrics.temporal import temporal_alignment
from mm_diffusion.respace import SpacedDiffusion
from mm_diffusion.sampling import bind, make_sampler, sample_joint
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
from mm_diffusion.toy import ToyConfig, write_toy_dataset
from mm_diffusion.train_util import TrainLoop, find_state, flags_to_start_with
from mm_diffusion.unet import window_shift

Clips = dict[str, th.Tensor]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A run: what it shows, the flags that make it so, and whether every picture, but no sound, is mirrored."""

    text: str
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    mirrors_pictures: bool = False


VARIANTS = {
    "shift": Variant("windows shifted at random; half of the clips mirrored, picture and channels together"),
    "no_shift": Variant("windows not shifted", {"cross_attention_shift": False}),
    "picture_flip": Variant("every picture mirrored and no sound, as published", {"random_flip": False}, True),
    "easy": Variant(
        "as the demo: not shifted, predicts the clip", {"cross_attention_shift": False, "predict_xstart": True}
    ),
}
DEFAULTS = {
    "video_size": "8,3,16,16",
    "audio_size": "2,1024",
    "video_fps": 8,  # the toy sounds pulse 4 to 5 times a second
    "audio_fps": 1024,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2,3,4",
    "num_head_channels": 32,
    "batch_size": 16,
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
}


@dataclasses.dataclass(frozen=True)
class LearnConfig:
    """The benchmark."""

    runs: str = flag(
        "shift,no_shift,picture_flip",
        "which to train, with commas between: " + "; ".join(f"{name}: {v.text}" for name, v in VARIANTS.items()),
    )
    minutes: float = flag(60.0, "of training and judging for each run, earlier calls included")
    num_clips: int = flag(1024, "toy clips to train on")
    held_out_clips: int = flag(128, "other toy clips, to measure the coupling on")
    drawn_clips: int = flag(64, "clips to draw from the model at every save")


CONFIGS = (ModelConfig, DiffusionConfig, DataConfig, TrainConfig, LearnConfig)


def main() -> None:
    flags, given = parse(__doc__, *CONFIGS, defaults=DEFAULTS)
    names = [name.strip() for name in flags["runs"].split(",")]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"runs {unknown[0]!r}: choose from {', '.join(VARIANTS)}")
    world, root = setup_dist(flags["devices"]), Path(flags["output_dir"])
    logger.configure(enabled=world.rank == 0)
    flags["data_dir"] = flags["data_dir"] or from_rank_0(lambda: write_clips(root / "data", flags["num_clips"], flags))
    held_out = read_clips(from_rank_0(lambda: write_clips(root / "held_out", flags["held_out_clips"], flags)), flags)
    for name in names:
        variant = VARIANTS[name]
        run_flags = flags | variant.flags | {"output_dir": str(root / name)}
        if not train(run_flags, given | set(variant.flags), variant, held_out, world):
            logger.log("stopped; the same command goes on")
            break
    rows = {name: read_rows(root / name / "learning.csv") for name in VARIANTS}
    logger.log(report(held_out, {name: r for name, r in rows.items() if r}))


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
    write_toy_dataset(folder, count, config)
    return str(folder)


def read_clips(folder: str, flags: dict[str, Any]) -> Clips:
    """All clips of a folder, as the model gets them: {"video" [N, F, C, H, W], "audio" [N, 2, L]}."""
    sizes = (flags[name] for name in ("video_size", "audio_size", "video_fps", "audio_fps"))
    clips = ClipDataset(build_index(folder), *sizes, random_flip=False)
    items = [clips[k] for k in range(len(clips))]
    return {name: th.stack([item[name] for item in items]) for name in items[0]}


def train(flags: dict[str, Any], given: set[str], variant: Variant, held_out: Clips, world: World) -> bool:
    """Train and judge one run until its minutes are used up; False where a signal has stopped it before."""
    logger.configure(flags["output_dir"], world.rank == 0, flags["use_db"], flags["use_tensorboard"])
    flags = flags_to_start_with(flags, given)
    state = find_state(pick(TrainConfig, flags), warn=lambda text: None)
    judge = Judge(flags, held_out, world, last_step=state[1] if state else -1)
    left = from_rank_0(lambda: flags["minutes"] - judge.minutes())
    if left <= 0:
        return True
    config, data_config = pick(TrainConfig, flags | {"max_hours": left / 60}), pick(DataConfig, flags)
    th.manual_seed(config.seed)
    model, diffusion = create_model_and_diffusion(**{name: flags[name] for name in model_and_diffusion_defaults()})

    def data(start_sample: int) -> Iterator[Any]:
        batches = load_data(
            **vars(data_config),
            batch_size=config.batch_size,
            video_size=flags["video_size"],
            audio_size=flags["audio_size"],
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            start_sample=start_sample,
        )
        return map(mirror_pictures, batches) if variant.mirrors_pictures else batches

    loop = TrainLoop(
        model, diffusion, data, config, world, use_fp16=flags["use_fp16"], flags=flags, preview=judge.preview
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

    def __init__(self, flags: dict[str, Any], held_out: Clips, world: World, last_step: int) -> None:
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
        self.steps.add(step)
        if self.world.rank:
            return
        row: dict[str, float] = {"step": step}
        device, size = self.world.device, self.flags["batch_size"]
        drawn = [
            sample_joint(model, self.sampler, range(self.flags["drawn_clips"])[i : i + size], 0, device)
            for i in range(0, self.flags["drawn_clips"], size)
        ]
        row |= alignments({name: th.cat([clips[name] for clips in drawn]) for name in self.held_out})
        row |= coupling(model, self.diffusion, self.held_out, size, device)
        row["minutes"] = self.minutes()
        self.rows = [*(r for r in self.rows if r["step"] != step), row]
        write_rows(self.path, self.rows)
        logger.log(", ".join(f"{name} {row[name]:.4g}" for name in COLUMNS))


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
    model: th.nn.Module, diffusion: SpacedDiffusion, clips: Clips, batch_size: int, device: th.device
) -> dict[str, float]:
    """error(mismatched) / error(matched) - 1 of each modality, by noise level and in the mean over the levels."""
    noise = tree.randn_like(clips, rng.per_sample(0, "coupling", indices=range(len(clips["video"]))))
    ratios: dict[str, list[float]] = {name: [] for name in clips}
    for level in NOISE_LEVELS:
        t = int(level * diffusion.num_timesteps)
        own, others = (
            errors(model, diffusion, *(parted(x, shift) for x in (clips, noise)), t, batch_size, device)
            for shift in (0, 1)
        )
        for name, values in ratios.items():
            values.append(others[name] / own[name] - 1)
    row = {f"coupling_{name}": float(np.mean(values)) for name, values in ratios.items()}
    for name, values in ratios.items():
        row |= {f"coupling_{name}_{level}": value for level, value in zip(NOISE_LEVELS, values, strict=True)}
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
        x, eps = (tree.tree_map(lambda v, i=first: v[i : i + batch_size].to(device), y) for y in (clips, noise))
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
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """Rows of equal keys -> a table that is there whole or as it was before."""
    partial = path.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[-1]))
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
    os.replace(partial, path)


def report(held_out: Clips, runs: dict[str, list[dict[str, float]]]) -> str:
    """What the held-out clips themselves reach, then the course of every run that has been judged."""
    lines = [
        table_line("", COLUMNS.values()),
        table_line("held-out clips", [alignments(held_out).get(c) for c in COLUMNS]),
    ]
    for name, rows in runs.items():
        lines += ["", f"{name}: {VARIANTS[name].text}"]
        shown = sorted({round(k) for k in np.linspace(0, len(rows) - 1, SHOWN_ROWS)})
        lines += [
            table_line("" if rows[k]["step"] else "untrained", [rows[k][column] for column in COLUMNS]) for k in shown
        ]
        lines += ["coupling by noise level t / T", table_line("", NOISE_LEVELS)]
        for modality in held_out:
            lines.append(table_line(modality, [rows[-1][f"coupling_{modality}_{level}"] for level in NOISE_LEVELS]))
    return "\n".join(lines)


def table_line(title: str, cells: Iterable[Any]) -> str:
    """A title and cells of equal width: texts, numbers, or None for nothing."""
    texts = [c if isinstance(c, str) else "" if c is None else f"{c:.0f}" if c == int(c) else f"{c:.3f}" for c in cells]
    return f"{title:<16}" + "".join(f"{text:>12}" for text in texts)


if __name__ == "__main__":
    with friendly_errors():
        main()
