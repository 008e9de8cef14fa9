"""Clips as points: networks given by path, and what needs no network."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th
import torch.nn.functional as F
import torchaudio.functional as AF

from .spatial import horizontal_place, level_difference

I3D_PIXELS = 224
I3D_SOURCE = "a TorchScript I3D of Kinetics-400, such as i3d_torchscript.pt (github.com/universome/fvd-comparison)"
EMBEDDING_SOURCE = (
    "any TorchScript module, such as VGGish (github.com/harritaylor/torchvggish) saved by torch.jit.trace; it gets"
    " patches [B, 1, 96, 64] of log-mel, or with --audio_embedding_input waveform sound [B, L] at 16 kHz"
)
# The log-mel front end of VGGish (arXiv 1609.09430): log(|mel| + 0.01) in patches of 0.96 s.
EMBEDDING_HZ = 16000
MEL = {
    "window": 400,
    "hop": 160,
    "size": 512,
    "bands": 64,
    "low": 125.0,
    "high": 7500.0,
    "offset": 0.01,
    "patch": 96,
}
VIEWS = ("left", "right", "mid", "side")
THUMBNAIL_PIXELS = 8
BRIEF_FRAMES = 8  # of a clip, evenly chosen
BRIEF_GRID = (2, 2, 2)  # times, rows, columns
_network_lock = (
    threading.Lock()
)  # clips are looked at beside each other, a network does one at a time


def load_script(flag: str, path: str, source: str, device: th.device) -> Any:
    """The TorchScript module of a file, ready on `device`; ValueError that says where to get one."""
    if not Path(path).is_file():
        raise ValueError(f"--{flag} {path}: no such file; it takes {source}")
    try:
        return th.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--{flag} {path}: is no TorchScript file ({reason}); it takes {source}"
        ) from None


def file_key(path: str) -> str:
    """What tells weights apart: sha256 of the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@th.no_grad()
def _run(flag: str, model: Callable, x: th.Tensor, **options: Any) -> th.Tensor:
    """model(x) -> [B, D] on the CPU; ValueError, naming the flag, where it does not take x or gives no numbers."""
    try:
        with _network_lock:
            out = model(x, **options)
    except (RuntimeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [""])[-1]
        raise ValueError(
            f"--{flag}: this module does not take {list(x.shape)} ({reason})"
        ) from error
    if not isinstance(out, th.Tensor) or out.ndim < 2 or len(out) != len(x):
        raise ValueError(
            f"--{flag}: this module does not give a vector for each of {len(x)} inputs"
        )
    out = out.flatten(1).float().cpu()
    if not out.isfinite().all():
        raise ValueError(f"--{flag}: this module gives numbers that are not finite")
    return out


def load_i3d(path: str, device: th.device) -> Callable[[th.Tensor], th.Tensor]:
    """-> a function of frames [F, 3, H, W] in [-1, 1], which are resized to 224 x 224, to their features [D]."""
    model = load_script("i3d_path", path, I3D_SOURCE, device)
    # The usual file would resize and rescale by itself, unlike others; told not to, all of them get the same.
    usual = {"rescale": False, "resize": False, "return_features": True}
    known = {argument.name for argument in model.forward.schema.arguments}
    options = {name: value for name, value in usual.items() if name in known}

    def features(frames: th.Tensor) -> th.Tensor:
        large = F.interpolate(
            frames.to(device), (I3D_PIXELS, I3D_PIXELS), mode="bilinear", align_corners=False
        )
        return _run("i3d_path", model, large.transpose(0, 1)[None], **options)[0]

    return features


def views(audio: th.Tensor) -> th.Tensor:
    """[2, L] -> [4, L]: left, right, mid (L + R) / 2 and side (L - R) / 2."""
    left, right = audio
    return th.stack([left, right, (left + right) / 2, (left - right) / 2])


def log_mel_patches(sound: th.Tensor) -> th.Tensor:
    """[B, L] at 16 kHz -> [B, P, 96, 64]; what is left at the end is dropped, less than one patch padded by silence."""
    shortest = MEL["window"] + (MEL["patch"] - 1) * MEL["hop"]
    padded = F.pad(sound, (0, max(0, int(shortest) - sound.shape[-1])))
    frames = padded.unfold(-1, int(MEL["window"]), int(MEL["hop"])) * th.hann_window(
        int(MEL["window"])
    )
    spectrum = th.fft.rfft(frames, int(MEL["size"])).abs()
    bank = AF.melscale_fbanks(
        int(MEL["size"]) // 2 + 1, MEL["low"], MEL["high"], int(MEL["bands"]), EMBEDDING_HZ
    )
    log_mel = (spectrum @ bank + MEL["offset"]).log()
    count = log_mel.shape[1] // int(MEL["patch"])
    return log_mel[:, : count * int(MEL["patch"])].unflatten(1, (count, int(MEL["patch"])))


def load_audio_embedding(
    path: str, takes: str, device: th.device
) -> Callable[[th.Tensor, int], dict[str, th.Tensor]]:
    """-> a function of sound [2, L] and its rate to {view: embeddings [P, D]}, P patches (1 for waveforms)."""
    if takes not in ("logmel", "waveform"):
        raise ValueError(f"--audio_embedding_input {takes}: choose logmel or waveform")
    model = load_script("audio_embedding_path", path, EMBEDDING_SOURCE, device)

    def embed(audio: th.Tensor, sample_rate: int) -> dict[str, th.Tensor]:
        sound = AF.resample(views(audio), sample_rate, EMBEDDING_HZ)
        patches = log_mel_patches(sound) if takes == "logmel" else sound[:, None]
        batch = patches.flatten(0, 1)[:, None] if takes == "logmel" else sound
        out = _run("audio_embedding_path", model, batch.to(device)).unflatten(0, patches.shape[:2])
        return dict(zip(VIEWS, out, strict=True))

    return embed


def thumbnail(frames: th.Tensor) -> th.Tensor:
    """[F, 3, H, W] -> [F, 3, 8, 8]."""
    return F.interpolate(frames, (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), mode="area")


def brief(videos: th.Tensor, audios: th.Tensor) -> dict[str, th.Tensor]:
    """[N, F, C, H, W], [N, 2, L] -> a few numbers of each clip that has one bright object, {"video", "audio", "joint"}.

    video [N, 8 C]: colours on a coarse grid. audio [N, 2 f + 2]: level difference and loudness at f <= 8 frames, and
    how rough either channel is. joint [N, 4 f]: where the object is and how bright, beside level difference and
    loudness, so that its covariance tells whether picture and sound fit. Few, so that few clips tell their covariance.
    """
    num_frames = videos.shape[1]
    chosen = th.linspace(0, num_frames - 1, min(num_frames, BRIEF_FRAMES)).round().long()
    place, shown = horizontal_place(videos)
    level, heard = level_difference(audios, num_frames)
    seen = [x[:, chosen] for x in (place, shown.sqrt())]
    sounding = [x[:, chosen] for x in (level, heard.sqrt())]
    colours = F.adaptive_avg_pool3d(videos.double().transpose(1, 2), BRIEF_GRID).flatten(1)
    roughness = audios.double().diff(dim=-1).square().mean(dim=-1).sqrt()
    return {
        "video": colours,
        "audio": th.cat([*sounding, roughness], 1),
        "joint": th.cat([*seen, *sounding], 1),
    }
