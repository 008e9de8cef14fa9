"""Checkpoints on disk: published parameter names, strict loading, files that are complete or absent."""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from typing import Any

import blobfile as bf
import torch as th
from torch import nn

from .training.states import CheckpointError, refuse_damaged, write_file

# Ours -> published, applied in order to any name or end of a name, so that they serve one block as well as a network.
NAME_TABLE = [
    (r"\bconv\.video\.(spatial|temporal)\.", r"video_conv.video_conv_\1."),
    (r"\bconv\.(video|audio)\.", r"\1_conv.\1_conv."),
    (r"\b(video|audio)\.in_norm\.", r"\1_in_layers.0.GroupNorm."),
    (r"\bvideo\.in_conv\.(spatial|temporal)\.", r"video_in_layers.2.video_conv_\1."),
    (r"\b(video|audio)\.in_conv\.", r"\1_in_layers.2.\1_conv."),
    (r"\b(video|audio)\.out_norm\.", r"\1_out_layers.0.GroupNorm."),
    (r"\b(video|audio)\.out_conv\.", r"\1_out_layers.3.\1_conv."),
    (r"\b(video|audio)\.skip\.", r"\1_skip_connection.\1_conv."),
    (r"\b(?:video|audio)\.attention\.(\w+)\.", r"\1_attention_block."),
    (r"\bout\.(video|audio)\.norm\.", r"\1_out.0.GroupNorm."),
    (r"\bout\.(video|audio)\.conv\.", r"\1_out.2.\1_conv."),
    (r"\b(v|a)(?:ideo|udio)\.norm\.", r"\1_norm.GroupNorm."),
    (r"\b(v|a)(?:ideo|udio)\.qkv\.", r"\1_qkv."),
    (r"\b(video|audio)\.proj\.", r"\1_proj_out.\1_conv."),
    (r"\bconv\.image\.", ""),
    (r"\bimage\.in_norm\.", "in_layers.0."),
    (r"\bimage\.in_conv\.", "in_layers.2."),
    (r"\bimage\.out_norm\.", "out_layers.0."),
    (r"\bimage\.out_conv\.", "out_layers.3."),
    (r"\bimage\.skip\.", "skip_connection."),
    (r"\bout\.image\.norm\.", "out.0."),
    (r"\bout\.image\.conv\.", "out.2."),
    (r"\bemb\.", "emb_layers.1."),
    (r"(?<!image\.)\bnorm\.(weight|bias)$", r"norm.GroupNorm.\1"),
    (r"\bproj\.(weight|bias)$", r"proj_out.\1"),
    (r"\bimage\.", ""),
]


def published_name(name: str) -> str:
    """Our name of a parameter -> the published one."""
    for ours, published in NAME_TABLE:
        name = re.sub(ours, published, name)
    return name


def published_names(model: nn.Module) -> dict[str, str]:
    """Published name -> our name, for every entry of the model's state."""
    names = {published_name(name): name for name in model.state_dict()}
    assert len(names) == len(model.state_dict()), "the name table is not one to one"
    return names


def published_state_dict(model: nn.Module) -> dict[str, th.Tensor]:
    """The weights under their published names; tensors share memory with the model's."""
    state = model.state_dict()
    return {published: state[name] for published, name in published_names(model).items()}


def save_weights(
    path: str, model_or_state: nn.Module | dict[str, th.Tensor], flags: dict[str, Any]
) -> None:
    """Write a state dict under published names that carries its flags; complete or absent, whatever happens.

    It is an ordinary state dict for every other tool: the flags are an attribute of it.
    """
    state = (
        published_state_dict(model_or_state)
        if isinstance(model_or_state, nn.Module)
        else model_or_state
    )
    save(path, with_flags(state, flags))


def with_flags(state: dict[str, th.Tensor], flags: dict[str, Any]) -> OrderedDict:
    """The state dict as it is saved, with its flags."""
    carrier = OrderedDict(
        (name, tensor.detach().cpu().contiguous()) for name, tensor in state.items()
    )
    carrier.flags = dict(flags)  # type: ignore[attr-defined]
    return carrier


def save(path: str, state: Any) -> None:
    """torch.save to a file that appears when it is complete."""
    write_file(path, lambda file: th.save(state, file))


def load(path: str) -> Any:
    """What `save` wrote, from a local, gs://, az:// or https:// path, onto the CPU. Never runs code from the file."""
    try:
        refuse_damaged(path)
        with bf.BlobFile(path, "rb") if "://" in path else open(path, "rb") as opened:
            file: Any = io.BytesIO(opened.read()) if "://" in path else opened
            if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()):
                raise ValueError(f"its part {damaged} is damaged")
            file.seek(0)
            with warnings.catch_warnings(action="ignore"):
                return th.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; check the path") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder, need a checkpoint file") from None
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged file drives its readers to
        reason = (
            str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        )
        raise CheckpointError(
            f"{path}: not a complete checkpoint ({reason}); copy or save it again"
        ) from None


def load_state(path: str) -> tuple[dict[str, th.Tensor], dict[str, Any]]:
    """The weights under published names, and the flags they carry ({} for a published file)."""
    state = load(path)
    held = state.items() if isinstance(state, dict) else ()
    if not held or not all(
        isinstance(name, str) and isinstance(value, th.Tensor) for name, value in held
    ):
        raise CheckpointError(
            f"{path}: holds no weights; give a modelNNNNNN.pt or ema_RATE_NNNNNN.pt"
        )
    return dict(state), dict(getattr(state, "flags", {}))


def fingerprint(state: dict[str, th.Tensor]) -> str:
    """A short name of these very weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(
            state[name].detach().cpu().contiguous().flatten().view(th.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def find_checkpoints(path: str) -> list[str]:
    """A file, a list with commas, or a folder (its newest EMA, of several the slowest, else its newest model) -> files.

    Raises CheckpointError where the path is empty, or the folder holds no checkpoint.
    """
    if not path:
        raise CheckpointError("no checkpoint given: name a file, a list of files or a folder")
    found = []
    for part in path.split(","):
        if not _is_folder(part):
            found.append(part)
            continue
        names = list(bf.listdir(part))
        candidates = [name for name in names if re.fullmatch(r"ema_\d*\.?\d+_\d+\.pt", name)]
        candidates = candidates or [name for name in names if re.fullmatch(r"model\d+\.pt", name)]
        if not candidates:
            raise CheckpointError(f"{part}: holds neither ema_RATE_NNNNNN.pt nor modelNNNNNN.pt")
        found.append(bf.join(part, max(candidates, key=_steps_and_rate)))
    return found


def _is_folder(path: str) -> bool:
    if "://" in path and path.endswith(
        ".pt"
    ):  # asking takes long, and retries where the place cannot be reached
        return False
    try:
        return bf.isdir(path)
    except bf.Error:  # of a kind that is not for us; loading it will say so
        return False


def _steps_and_rate(name: str) -> tuple[int, float]:
    """By which the newest comes last, and of several averages the slowest."""
    return steps_done(name), float(name.split("_")[1]) if name.startswith("ema_") else 0.0


def steps_done(path: str) -> int:
    """The optimizer steps that a checkpoint's name tells; 0 where it tells none."""
    match = re.search(r"(\d+)\.pt$", path)
    return int(match[1]) if match else 0


def load_weights(
    model: nn.Module,
    path_or_state_dict: str | os.PathLike | dict[str, th.Tensor],
    strict: bool = True,
    name: str = "state dict",
) -> list[str]:
    """Fill `model` from published names; nothing is changed unless everything fits.

    A mismatch raises CheckpointError with the missing, extra and misshapen names and the flag that is probably wrong.
    With strict=False what fits is taken, and the names that were left out are returned. `name` is for the message.
    """
    path = name if isinstance(path_or_state_dict, dict) else str(path_or_state_dict)
    given = path_or_state_dict if isinstance(path_or_state_dict, dict) else load_state(path)[0]
    state, names = model.state_dict(), published_names(model)
    missing = [name for name in names if name not in given]
    extra = [name for name in given if name not in names]
    misshapen = [
        name for name in names if name in given and given[name].shape != state[names[name]].shape
    ]
    if strict and (missing or extra or misshapen):
        raise CheckpointError(_misfit(path, missing, extra, misshapen, given, state, names))
    if len(missing) + len(misshapen) == len(names):
        raise CheckpointError(
            f"{path}: not one of its tensors fits this model; it is of another architecture"
        )
    for name, value in given.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(
                f"{path}: {name} holds numbers that are not finite; use an earlier checkpoint"
            )
    with th.no_grad():
        for published, name in names.items():
            if published not in missing and published not in misshapen:
                state[name].copy_(given[published])
    return missing + extra + misshapen


# What to look for among the names that are there on one side only ("name ...") or differ in shape ("shape ...") -> the
# flag to look at, first match wins.
SUSPECTS = [
    (r"name middle_block\.", "the path (one is the joint model, the other an upsampler)"),
    ("shape time_embed", "num_channels (of the upsampler: sr_num_channels)"),
    ("shape video_out.2.video_conv.bias", "learn_sigma or video_size"),
    ("shape audio_out.2.audio_conv.bias", "learn_sigma or audio_size"),
    ("name middle_blocks.2", "cross_attention_windows"),
    (r"shape out\.2\.bias", "sr_learn_sigma"),
    (r"name .*\.op\.", "sr_resblock_updown"),
    (
        r"name input_blocks\..*\.0\.emb_layers",
        "num_res_blocks or channel_mult (of the upsampler: with sr_)",
    ),
    (r"name input_blocks\..*\.1\.qkv", "sr_attention_resolutions"),
    (r"shape .*_out_layers\.0", "channel_mult"),
    (r"shape .*\.emb_layers", "use_scale_shift_norm"),
    ("name .*video_conv_spatial", "video_type"),
    ("name .*audio_attention_block", "audio_attention_resolutions"),
    ("name .*spatial_attention_block", "video_attention_resolutions"),
    ("name .*_qkv", "cross_attention_resolutions"),
]


def _misfit(
    path: str, missing: list, extra: list, misshapen: list, given: dict, state: dict, names: dict
) -> str:
    parts = []
    for title, found in (("missing", missing), ("extra", extra)):
        if found:
            parts.append(
                f"{len(found)} {title} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
            )
    if misshapen:
        shapes = [
            f"{n} {list(given[n].shape)} for {list(state[names[n]].shape)}" for n in misshapen[:3]
        ]
        parts.append(
            f"{len(misshapen)} misshapen ({', '.join(shapes)}{', ...' if len(misshapen) > 3 else ''})"
        )
    odd = [f"name {name}" for name in missing + extra] + [f"shape {name}" for name in misshapen]
    blame = next(
        (flags for part, flags in SUSPECTS if any(re.match(part, name) for name in odd)),
        "the model's flags",
    )
    return f"{path} does not fit the model: {'; '.join(parts)}; probably wrong: {blame}"
