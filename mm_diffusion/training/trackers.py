"""TensorBoard and Weights & Biases as trackers of the logger, each if it is installed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch as th

from ..data import encode, images
from ..files import is_remote
from ..logger import Clip, Tracker

PROJECT = "mm-diffusion-stereo"  # in Weights & Biases, unless WANDB_PROJECT names another
RUN_NOTE = "wandb_run.txt"  # in the output folder: the id of the run, to resume it
MODES_WITHOUT_KEY = ("offline", "dryrun", "disabled")  # of WANDB_MODE


def make_trackers(flags: Mapping[str, Any], rank: int) -> list[Tracker]:
    """The trackers that `use_tensorboard` and `use_db` ask for, on rank 0, for `output_dir`.

    ValueError where a package, a key or a local folder is missing.
    """
    made: list[Tracker] = []
    folder = flags["output_dir"]
    if rank == 0 and flags["use_tensorboard"]:
        made.append(TensorBoard(folder))
    if rank == 0 and flags["use_db"]:
        made.append(WeightsAndBiases(folder))
    return made


class TensorBoard:
    """Event files in OUTPUT_DIR/tensorboard. Steps that a resumed run repeats are hidden."""

    name = "TensorBoard"

    def __init__(self, output_dir: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("use_tensorboard True needs pip install tensorboard") from None
        if not output_dir or is_remote(output_dir):
            raise ValueError("use_tensorboard True needs a local --output_dir for its files")
        self.folder, self.make_writer = Path(output_dir, "tensorboard"), SummaryWriter
        self.writer: Any = None

    def start(self, step: int, flags: Mapping[str, Any]) -> None:
        self.writer = self.make_writer(str(self.folder), purge_step=step + 1)

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            group = "quartiles" if re.search(r"_q\d$", key) else "training"
            self.writer.add_scalar(f"{group}/{key}", value, step)
        self.writer.flush()  # raises errors of its thread

    def log_image(self, name: str, image: th.Tensor, step: int) -> None:
        self.writer.add_image(name, images.to_uint8(image.detach().cpu()), step)
        self.writer.flush()

    def log_clip(self, name: str, clip: Clip, step: int) -> None:
        """All frames as a grid, and each channel of the audio, as `add_audio` takes one."""
        self.writer.add_images(f"{name}/frames", images.to_uint8(clip.video.detach().cpu()), step)
        for number, channel in enumerate(clip.audio.detach().cpu()):
            self.writer.add_audio(f"{name}/audio/{number}", channel, step, clip.sample_rate)
        self.writer.flush()


class WeightsAndBiases:
    """A run of Weights & Biases. WANDB_API_KEY holds the key; WANDB_MODE=offline needs none.

    A resumed run continues the one noted in the output folder. Its rows cannot be taken back, so
    steps that it has already are not sent again.
    """

    name = "Weights & Biases"

    def __init__(self, output_dir: str) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError("use_db True needs pip install wandb") from None
        needs_key = os.environ.get("WANDB_MODE") not in MODES_WITHOUT_KEY
        if needs_key and not os.environ.get("WANDB_API_KEY"):
            raise ValueError("use_db True: set WANDB_API_KEY to your key, or WANDB_MODE=offline")
        self.wandb: Any = wandb
        self.output_dir = output_dir
        self.folder = None if is_remote(output_dir) else Path(output_dir)
        self.run: Any = None

    def start(self, step: int, flags: Mapping[str, Any]) -> None:
        note = self.folder / RUN_NOTE if self.folder else None
        resumed_id = note.read_text().strip() if note and step and note.exists() else None
        names = {
            "project": os.environ.get("WANDB_PROJECT") or PROJECT,
            "name": os.environ.get("WANDB_NAME") or Path(self.output_dir).resolve().name,
        }
        options = {"id": resumed_id, "resume": "allow", "dir": self.folder, "config": dict(flags)}
        try:
            self.run = self.wandb.init(**names, **options)
        except Exception as error:
            raise ValueError(
                f"use_db True: Weights & Biases cannot start ({error}); check WANDB_API_KEY, or set"
                " WANDB_MODE=offline"
            ) from error
        if note:
            note.write_text(self.run.id + "\n")

    def log_scalars(self, values: Mapping[str, Any], step: int) -> None:
        if step >= self.run.starting_step:
            self.run.log(dict(values), step=step)

    def log_image(self, name: str, image: th.Tensor, step: int) -> None:
        pixels = images.to_uint8(image.detach().cpu()).permute(1, 2, 0).numpy()
        self.log_scalars({name: self.wandb.Image(pixels)}, step)

    def log_clip(self, name: str, clip: Clip, step: int) -> None:
        """A video file with audio; mono is played on both sides."""
        with TemporaryDirectory() as folder:
            path = Path(folder, "clip.mp4")
            encode.write_clip(path, clip.video, clip.fps, clip.audio, clip.sample_rate)
            self.log_scalars({f"{name}/video": self.wandb.Video(str(path))}, step)
