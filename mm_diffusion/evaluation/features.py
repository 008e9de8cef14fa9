"""Clips as feature vectors: I3D and audio embeddings (TorchScript files), and thumbnails."""

from __future__ import annotations

import hashlib
import math
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th
import torch.nn.functional as F
import torchaudio.functional as AF

from . import i3d

I3D_PIXELS = 224
I3D_SOURCE = (
    "the published weights i3d_pretrained_400.pt, or a TorchScript I3D, such as i3d_torchscript.pt"
    " of github.com/universome/fvd-comparison"
)
EMBEDDING_SOURCE = (
    "any TorchScript module of log-mel patches [B, 1, 96, 64], such as a traced"
    " github.com/harritaylor/torchvggish; or of [B, L] with --audio_embedding_input waveform"
)
EMBEDDING_INPUTS = ("logmel", "waveform")
EMBEDDING_HZ = 16000
# The log-mel front end of VGGish (arXiv 1609.09430): log(|mel| + 0.01) in patches of 0.96 s.
MEL_WINDOW, MEL_HOP, MEL_FFT, MEL_BANDS, MEL_PATCH = 400, 160, 512, 64, 96
MEL_LOW_HZ, MEL_HIGH_HZ, MEL_OFFSET = 125.0, 7500.0, 0.01
VIEWS = ("left", "right", "mid", "side")
THUMBNAIL_PIXELS = 8
_network_lock = threading.Lock()  # clips are evaluated in parallel, a network runs one at a time


def load_script(flag: str, path: str, source: str, device: th.device) -> Any:
    """The TorchScript module of a file on `device`; ValueError that says where to get one."""
    if not Path(path).is_file():
        raise ValueError(f"--{flag} {path}: no such file; needs {source}")
    try:
        return th.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        message = f"--{flag} {path}: not a TorchScript file ({reason}); needs {source}"
        raise ValueError(message) from None


def file_key(path: str) -> str:
    """Identifies weights: sha256 of the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@th.no_grad()
def _run(flag: str, model: Callable, x: th.Tensor, **options: Any) -> th.Tensor:
    """model(x) -> [B, D] on the CPU; ValueError, naming the flag, for a wrong shape, NaN or Inf."""
    try:
        with _network_lock:
            out = model(x, **options)
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().rpartition("\n")[2]
        message = f"--{flag}: the module does not accept {list(x.shape)} ({reason})"
        raise ValueError(message) from error
    if not isinstance(out, th.Tensor) or out.ndim < 2 or len(out) != len(x):
        raise ValueError(f"--{flag}: the module does not return a vector for each input ({len(x)})")
    out = out.flatten(1).float().cpu()
    if not out.isfinite().all():
        raise ValueError(f"--{flag}: the module's output contains NaN or Inf")
    return out


def is_script(path: str) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def load_i3d(path: str, device: th.device) -> Callable[[th.Tensor], th.Tensor]:
    """-> a function [F, 3, H, W] in [-1, 1] -> I3D features [D], computed at 224 x 224.

    `path` is a TorchScript file or the published weights, whose features are the logits.
    """
    options: dict[str, Any] = {}
    if is_script(path) or not Path(path).is_file():
        model = load_script("i3d_path", path, I3D_SOURCE, device)
        # The usual file can resize and rescale by itself, others cannot: all get the same input.
        usual = {"rescale": False, "resize": False, "return_features": True}
        known = {argument.name for argument in model.forward.schema.arguments}
        options = {name: value for name, value in usual.items() if name in known}
    else:
        try:
            model = i3d.load(path).to(device)
        except ValueError as error:
            raise ValueError(f"--i3d_path {error}; needs {I3D_SOURCE}") from None

    def features(frames: th.Tensor) -> th.Tensor:
        square = centre_square(frames.to(device), I3D_PIXELS)
        return _run("i3d_path", model, square.transpose(0, 1)[None], **options)[0]

    return features


def centre_square(frames: th.Tensor, side: int) -> th.Tensor:
    """[F, C, H, W] -> [F, C, side, side]: shorter side resized to it, bilinearly, centre crop."""
    sizes = frames.shape[-2:]
    height, width = (math.ceil(size * side / min(sizes)) for size in sizes)
    large = F.interpolate(frames, (height, width), mode="bilinear", align_corners=False)
    top, left = (height - side) // 2, (width - side) // 2
    return large[..., top : top + side, left : left + side]


def views(audio: th.Tensor) -> th.Tensor:
    """[2, L] -> [4, L]: left, right, mid (L + R) / 2 and side (L - R) / 2."""
    left, right = audio
    return th.stack([left, right, (left + right) / 2, (left - right) / 2])


def log_mel_patches(audio: th.Tensor) -> th.Tensor:
    """[B, L] at 16 kHz -> [B, P, 96, 64].

    The remainder at the end is dropped; audio shorter than one patch is padded with zeros.
    """
    shortest = MEL_WINDOW + (MEL_PATCH - 1) * MEL_HOP
    padded = F.pad(audio, (0, max(0, shortest - audio.shape[-1])))
    frames = padded.unfold(-1, MEL_WINDOW, MEL_HOP) * th.hann_window(MEL_WINDOW)
    spectrum = th.fft.rfft(frames, MEL_FFT).abs()
    bands = MEL_LOW_HZ, MEL_HIGH_HZ, MEL_BANDS
    bank = AF.melscale_fbanks(MEL_FFT // 2 + 1, *bands, EMBEDDING_HZ)
    log_mel = (spectrum @ bank + MEL_OFFSET).log()
    count = log_mel.shape[1] // MEL_PATCH
    return log_mel[:, : count * MEL_PATCH].unflatten(1, (count, MEL_PATCH))


def load_audio_embedding(
    path: str, input_kind: str, device: th.device, embedding_hz: int = EMBEDDING_HZ
) -> Callable[[th.Tensor, int], dict[str, th.Tensor]]:
    """-> a function of audio [2, L] and its rate to {view: embeddings [P, D]}, P patches.

    The network gets log-mel patches of audio at 16 kHz, or a waveform at `embedding_hz`, which is
    one patch.
    """
    if input_kind not in EMBEDDING_INPUTS:
        choices = " or ".join(EMBEDDING_INPUTS)
        raise ValueError(f"--audio_embedding_input {input_kind}: choose {choices}")
    if input_kind == "logmel" and embedding_hz != EMBEDDING_HZ:
        need = f"logmel takes {EMBEDDING_HZ} Hz; set --audio_embedding_input waveform"
        raise ValueError(f"--audio_embedding_fps {embedding_hz}: {need}")
    model = load_script("audio_embedding_path", path, EMBEDDING_SOURCE, device)

    def embed(audio: th.Tensor, sample_rate: int) -> dict[str, th.Tensor]:
        waveforms = AF.resample(views(audio), sample_rate, embedding_hz)
        batch = waveforms
        if input_kind == "logmel":
            batch = log_mel_patches(waveforms).flatten(0, 1)[:, None]
        out = _run("audio_embedding_path", model, batch.to(device))
        return dict(zip(VIEWS, out.unflatten(0, (len(VIEWS), -1)), strict=True))

    return embed


def thumbnail(frames: th.Tensor) -> th.Tensor:
    """[F, 3, H, W] -> [F, 3, 8, 8]."""
    return F.interpolate(frames, (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), mode="area")
