"""Where numbers, pictures and clips of a run can go beside the console and progress.csv, each if it is installed.

A tracker has `name`, `start(step, flags)`, where the run goes on after `step` steps, and then `numbers(values, step)`,
`image(name, image, step)` and `clip(name, video, fps, audio, sample_rate, step)`, in the units of `logger`. Making one
and starting it fail with a ValueError, in one line, where it cannot work.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch as th
from torchvision.utils import make_grid

from ..data import encode, images

PROJECT = "mm-diffusion-stereo"  # in Weights & Biases, unless WANDB_PROJECT names another
RUN_NOTE = "wandb_run.txt"  # in the output folder: the id by which a resumed run is found again
WITHOUT_KEY = ("offline", "dryrun", "disabled")  # modes that talk to nobody


@contextmanager
def _clip_files(
    video: th.Tensor | None, fps: float | Fraction, audio: th.Tensor, sample_rate: int
) -> Iterator[tuple[Path, Path]]:
    """Paths of an mp4 with sound (written if there is a video) and of a wav, gone afterwards."""
    with TemporaryDirectory() as folder:
        mp4, wav = Path(folder, "clip.mp4"), Path(folder, "clip.wav")
        encode.write_wav(wav, audio, sample_rate)
        if video is not None:
            stereo = audio.expand(2, -1) if len(audio) == 1 else audio
            encode.write_clip(mp4, video, fps, stereo, sample_rate)
        yield mp4, wav


class TensorBoard:
    """Event files in FOLDER/tensorboard. What was written there about steps that are made anew is hidden."""

    name = "TensorBoard"

    def __init__(self, folder: Path | None) -> None:
        try:
            from tensorboard.compat.proto import summary_pb2
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "use_tensorboard True needs TensorBoard: pip install tensorboard, or leave the flag out"
            ) from None
        if folder is None:
            raise ValueError("use_tensorboard True needs a place for its files: give --output_dir")
        self.folder, self.protocol, self.make = folder / "tensorboard", summary_pb2, SummaryWriter
        self.writer: Any = None

    def start(self, step: int, flags: Mapping[str, Any]) -> None:
        self.writer = self.make(str(self.folder), purge_step=step + 1)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            group = "quartiles" if re.search(r"_q\d$", key) else "training"
            self.writer.add_scalar(f"{group}/{key}", value, step)
        self.writer.flush()  # raises what has failed in its thread since

    def image(self, name: str, image: th.Tensor, step: int) -> None:
        self.writer.add_image(name, images.to_uint8(image.detach().cpu()), step)
        self.writer.flush()

    def clip(
        self,
        name: str,
        video: th.Tensor,
        fps: float | Fraction,
        audio: th.Tensor,
        sample_rate: int,
        step: int,
    ) -> None:
        """All frames in one picture, and the sound with all its channels, which `add_audio` would refuse."""
        frames = images.to_uint8(video.detach().cpu())
        self.writer.add_image(
            f"{name}/frames",
            make_grid(frames, math.isqrt(len(frames) - 1) + 1, pad_value=255),
            step,
        )
        with _clip_files(None, fps, audio, sample_rate) as (_, wav):
            sound = self.protocol.Summary.Audio(
                sample_rate=sample_rate,
                num_channels=audio.shape[0],
                length_frames=audio.shape[1],
                encoded_audio_string=wav.read_bytes(),
                content_type="audio/wav",
            )
        value = self.protocol.Summary.Value(tag=f"{name}/sound", audio=sound)
        self.writer.file_writer.add_summary(self.protocol.Summary(value=[value]), step)
        self.writer.flush()


class WeightsAndBiases:
    """A run of Weights & Biases; its key comes from WANDB_API_KEY alone, and WANDB_MODE=offline needs none.

    A resumed run goes on in the one that was noted in the folder. Weights & Biases cannot take rows back: it keeps
    those that it has, and the ones of the same steps are not sent again.
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path | None) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "use_db True needs Weights & Biases: pip install wandb, or leave the flag out"
            ) from None
        if os.environ.get("WANDB_MODE") not in WITHOUT_KEY and not os.environ.get("WANDB_API_KEY"):
            raise ValueError(
                "use_db True: set WANDB_API_KEY to your key for Weights & Biases, or WANDB_MODE=offline to keep the run"
                " in the output folder"
            )
        self.wandb: Any = wandb
        self.folder = folder
        self.run: Any = None

    def start(self, step: int, flags: Mapping[str, Any]) -> None:
        note = self.folder / RUN_NOTE if self.folder else None
        known = note.read_text().strip() if note and step and note.exists() else None
        label = os.environ.get("WANDB_NAME") or (
            self.folder.resolve().name if self.folder else None
        )
        project = os.environ.get("WANDB_PROJECT") or PROJECT
        try:
            self.run = self.wandb.init(
                project=project,
                name=label,
                id=known,
                resume="allow",
                dir=self.folder,
                config=dict(flags),
            )
        except Exception as error:
            raise ValueError(
                f"use_db True: Weights & Biases cannot start ({error}); check WANDB_API_KEY and the network, or set"
                " WANDB_MODE=offline"
            ) from error
        if note:
            note.write_text(self.run.id + "\n")

    def numbers(self, values: Mapping[str, Any], step: int) -> None:
        if step >= self.run.starting_step:
            self.run.log(dict(values), step=step)

    def image(self, name: str, image: th.Tensor, step: int) -> None:
        pixels = images.to_uint8(image.detach().cpu()).permute(1, 2, 0).numpy()
        self.numbers({name: self.wandb.Image(pixels)}, step)

    def clip(
        self,
        name: str,
        video: th.Tensor,
        fps: float | Fraction,
        audio: th.Tensor,
        sample_rate: int,
        step: int,
    ) -> None:
        with _clip_files(video, fps, audio, sample_rate) as (mp4, wav):
            clip = {
                f"{name}/video": self.wandb.Video(str(mp4)),
                f"{name}/sound": self.wandb.Audio(str(wav)),
            }
            self.numbers(clip, step)
