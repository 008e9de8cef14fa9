"""Folders of generated clips."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch as th

from .. import logger
from ..data import encode
from ..files import remove_unfinished, write_text
from ..script_util import (
    SR,
)
from ..viewing import gallery

LARGE, TRUTH = "sr_mp4", "ground_truth"  # folders of clips beside original/


def clip_paths(folder: str | os.PathLike, name: str, *more: str) -> list[Path]:
    """The files of a clip below an output folder: wav, mp4 and the mp4 in folders `more` (LARGE, TRUTH)."""
    return [
        Path(folder, "audios", f"{name}.wav"),
        *(Path(folder, kind, f"{name}.mp4") for kind in ("original", *more)),
    ]


def write_sample(
    folder: str | os.PathLike,
    name: str,
    video: th.Tensor,
    audio: th.Tensor,
    video_fps: int,
    audio_fps: int,
    large: th.Tensor | None = None,
) -> None:
    """A clip [F, C, H, W], [C, L] -> audios/NAME.wav, original/NAME.mp4 and, if it is upsampled, sr_mp4/NAME.mp4.

    Both mp4 files have the sound.
    """
    wav, mp4, sr_mp4 = clip_paths(folder, name, LARGE)
    encode.write_wav(wav, audio, audio_fps)
    encode.write_clip(mp4, video, video_fps, audio, audio_fps)
    if large is not None:
        encode.write_clip(sr_mp4, large, video_fps, audio, audio_fps)


def write_truth(
    folder: str | os.PathLike,
    name: str,
    truth: Mapping[str, th.Tensor],
    video_fps: int,
    audio_fps: int,
) -> None:
    """The clip that a modality was taken from -> ground_truth/NAME.mp4."""
    *_, mp4 = clip_paths(folder, name, TRUTH)
    encode.write_clip(mp4, truth["video"], video_fps, truth["audio"], audio_fps)


def show_gallery(folder: str) -> None:
    """Write the gallery of a folder of clips and say where it is; what stands in its way is told, and no more."""
    if "://" in folder:
        return
    try:
        logger.log(f"look at the clips: {gallery.write_gallery(folder)}")
    except (ValueError, OSError) as error:
        logger.warn(f"{folder}: no gallery ({error})")


def claim_folder(folder: str | os.PathLike, description: dict[str, Any]) -> None:
    """Note in sampling.json what the clips of this folder are, or ValueError where it holds other ones.

    What says how large clips are made ("upsampler", "sr_...") must agree once there are large clips, the rest once
    there are any.
    """
    note = Path(folder, "sampling.json")
    try:
        known: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {}
    except ValueError:
        raise ValueError(f"{note} is damaged: choose another --output_dir") from None
    wanted: dict[str, Any] = json.loads(json.dumps(description))
    any_clips, any_large = (
        any(Path(folder, kind).glob("[!.]*.mp4")) for kind in ("original", LARGE)
    )
    if any_clips and not note.exists():
        raise ValueError(
            f"{folder} holds clips of unknown origin (no sampling.json): choose another --output_dir"
        )
    known = {
        key: v
        for key, v in known.items()
        if (any_large if key.startswith(("upsampler", SR)) else any_clips)
    }
    different = [key for key in wanted if known.get(key, wanted[key]) != wanted[key]]
    if different:
        raise ValueError(
            f"{folder} holds clips of another run ({', '.join(different)} differ): choose another --output_dir"
        )
    text = json.dumps(known | wanted, indent=1, sort_keys=True)
    write_text(note, text)


def missing_clips(
    folder: str | os.PathLike, names: Sequence[str], description: dict[str, Any]
) -> list[int]:
    """Claim the folder, and the numbers of the clips of these names that it does not hold whole."""
    claim_folder(folder, description)
    more = [LARGE] * ("upsampler" in description) + [TRUTH] * bool(description["given"])
    for path in clip_paths(folder, "", *more):
        remove_unfinished(path.parent)
    return [
        k
        for k, name in enumerate(names)
        if not all(p.exists() for p in clip_paths(folder, name, *more))
    ]
