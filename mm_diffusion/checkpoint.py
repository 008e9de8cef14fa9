"""Checkpoints: published parameter names, strict loading, complete or absent files, manifests."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import blobfile as bf
import torch as th
from torch import nn

from .files import checksum, is_remote, write_atomically

EMA_FILE, MODEL_FILE = re.compile(r"ema_(\d*\.?\d+)_(\d+)\.pt"), re.compile(r"model(\d+)\.pt")

# What DistributedDataParallel and torch.compile put before every name
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model."""


# ------------------------------------------------------------ names

# Ours -> published, applied in order to a name, of a block as well as of a network.
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


# Parts of a block in the published order, in which published optimizers number their tensors.
# The parts of a cross-attention and of the ends of the network follow those of a residual block.
PUBLISHED_PARTS = [
    "video_in_layers",
    "audio_in_layers",
    "in_layers",
    "emb_layers",
    "video_out_layers",
    "audio_out_layers",
    "out_layers",
    "video_skip_connection",
    "audio_skip_connection",
    "skip_connection",
    "spatial_attention_block",
    "temporal_attention_block",
    "audio_attention_block",
    "v_norm",
    "a_norm",
    "v_qkv",
    "a_qkv",
    "video_proj_out",
    "audio_proj_out",
    "audio_out",
    "video_out",
]


def published_order(names: Iterable[str]) -> list[str]:
    """Published names as our models have them -> the same names in the published order.

    Blocks have the published order already, and so do the tensors within a part.
    """
    first_seen: dict[str, int] = {}

    def place(name: str) -> tuple[int, int]:
        part = next((word for word in name.split(".") if word in PUBLISHED_PARTS), "")
        block = name.partition(f"{part}.")[0] if part else name
        rank = PUBLISHED_PARTS.index(part) if part else 0
        return first_seen.setdefault(block, len(first_seen)), rank

    return sorted(names, key=place)


def published_state_dict(model: nn.Module) -> dict[str, th.Tensor]:
    """The weights under their published names; tensors share memory with the model's."""
    return dict(zip(published_names(model), model.state_dict().values(), strict=True))


def rename_published(
    model: nn.Module, state: dict[str, th.Tensor], prefix: str, *others: Any
) -> None:
    """A hook of `load_state_dict`: the names of the state become ours, in place."""
    ours = {prefix + published: prefix + name for published, name in published_names(model).items()}
    for name, value in list(state.items()):
        bare = prefix + WRAPPERS.sub("", name.removeprefix(prefix))
        del state[name]
        state[ours.get(bare, bare)] = value


# ------------------------------------------------------------ files


def save_weights(path: str, model: nn.Module, flags: dict[str, Any]) -> None:
    """Write the weights under published names, with their flags, as `save` does."""
    save(path, with_flags(published_state_dict(model), flags))


def with_flags(state: dict[str, th.Tensor], flags: dict[str, Any]) -> OrderedDict:
    """The state dict on the CPU, with its flags: an attribute, which other tools do not notice."""
    carrier = OrderedDict((name, t.detach().cpu().contiguous()) for name, t in state.items())
    carrier.flags = dict(flags)  # type: ignore[attr-defined]
    return carrier


def save(path: str, content: Any) -> dict[str, Any]:
    """torch.save to a file that is complete and on the disk, or absent -> its `checksum`.

    OSError where it cannot be written.
    """
    written: dict[str, Any] = {}

    def write(temporary: str) -> None:
        try:
            with open(temporary, "wb") as file:
                th.save(content, file)
        except RuntimeError as error:  # what torch.save makes of an error of the file
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(_first_line(error)) from None
        written.update(checksum(temporary))

    write_atomically(path, write, durable=True)
    return written


def load(path: str) -> Any:
    """What `save` wrote, from a local or remote path, on the CPU. Runs no code from the file.

    CheckpointError where the file is missing or corrupt, or differs from the manifest beside it.
    """
    try:
        _refuse_corrupt(path)
        with bf.BlobFile(path, "rb", streaming=False) as file:
            if kind := _kind(file.read(HEAD_BYTES)):
                return _load_other(path, kind, file)
            if zipfile.is_zipfile(file) and (part := zipfile.ZipFile(file).testzip()):
                raise ValueError(f"{part} in it is corrupt")
            file.seek(0)
            with warnings.catch_warnings(action="ignore"):
                return th.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; check the path") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder, need a checkpoint file") from None
    except CheckpointError:
        raise
    except Exception as error:  # whatever a corrupt file raises in its readers
        why = _first_line(error)[:120]
        raise CheckpointError(f"{path}: not a complete checkpoint ({why}); copy it again") from None


HEAD_BYTES = 512
# Beginning of a file that is no checkpoint -> what it is, and what to do
NO_CHECKPOINTS = {
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself; run git lfs pull",
    rb"\s*<(!doctype|html|head|\?xml)": "a web page, not a checkpoint; download the file itself",
}
SAFETENSORS, MOST_HEADER_BYTES = "safetensors", 10**8  # of its JSON header, by its specification


def _kind(head: bytes) -> str:
    """What a file that begins so is, if not what torch.save writes."""
    header_bytes, header = int.from_bytes(head[:8], "little"), head[8:9]
    if header == b"{" and header_bytes < MOST_HEADER_BYTES:
        return SAFETENSORS
    starts = (what for start, what in NO_CHECKPOINTS.items() if re.match(start, head, re.I))
    return next(starts, "")


def _load_other(path: str, kind: str, file: Any) -> dict[str, th.Tensor]:
    """The tensors of a safetensors file; CheckpointError for what holds none."""
    if kind != SAFETENSORS:
        raise CheckpointError(f"{path}: {kind}")
    try:
        from safetensors.torch import load as load_safetensors
    except ImportError:
        raise CheckpointError(
            f"{path}: a safetensors file, and its library is missing; pip install safetensors"
        ) from None
    file.seek(0)
    return load_safetensors(file.read())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_state(path: str) -> tuple[dict[str, th.Tensor], dict[str, Any]]:
    """The weights under published names, and the flags they carry ({} for a published file).

    Prefixes of modules that wrapped the model are left out.
    """
    state = load(path)
    entries = state.items() if isinstance(state, dict) else ()
    are_weights = [isinstance(k, str) and isinstance(v, th.Tensor) for k, v in entries]
    if not are_weights or not all(are_weights):
        raise CheckpointError(f"{path}: holds no weights; give an ema_RATE_NNNNNN.pt")
    return without_wrappers(state), dict(getattr(state, "flags", {}))


def without_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the model itself, without the prefixes of modules that wrapped it."""
    return {WRAPPERS.sub("", name): value for name, value in state.items()}


def fingerprint(state: dict[str, th.Tensor]) -> str:
    """16 hexadecimal digits that depend on names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(name.encode())
        digest.update(values.view(th.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------ manifests


def read_manifest(path: str) -> dict[str, Any] | None:
    """A stateNNNNNN.json: {"files": {name: checksum}, ...}; {} if absent, None if corrupt."""
    if not bf.exists(path):
        return {}
    try:
        with bf.BlobFile(path, "rb") as file:
            manifest = json.loads(file.read())
        sums = {str(name): dict(found) for name, found in manifest["files"].items()}
        return manifest | {"files": sums}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def corruption(path: str, recorded: Mapping[str, Any]) -> str:
    """What is wrong with a file of which a manifest records this checksum; "" if it is intact."""
    if not bf.exists(path):
        return f"{path} is missing"
    stat = bf.stat(path)
    intact = _checksum(path, stat.size, stat.mtime) == recorded
    return "" if intact else f"{path} is corrupt (its checksum differs from the manifest's)"


@functools.lru_cache(maxsize=64)
def _checksum(path: str, size: int, mtime: float) -> dict[str, Any]:
    """The checksum of the file of this size and time, which is read once."""
    return checksum(path)


def _refuse_corrupt(path: str) -> None:
    """CheckpointError if the manifest beside this file records another checksum."""
    folder, name = os.path.split(path)
    manifest = read_manifest(bf.join(folder, f"state{steps_done(name):06d}.json")) or {}
    recorded = manifest.get("files", {}).get(name)
    if recorded and (reason := corruption(path, recorded)):
        raise CheckpointError(f"{reason}; use another checkpoint")


# ------------------------------------------------------------ finding and loading


def find_checkpoints(path: str) -> list[str]:
    """A file, a list with commas, or a folder -> files.

    A folder stands for its newest EMA, of several the slowest, else its newest model.
    CheckpointError where the path is empty, or the folder holds no checkpoint.
    """
    if not path:
        raise CheckpointError("no checkpoint given: name a file, a list of files or a folder")
    return [_newest(part) if _is_folder(part) else part for part in path.split(",")]


def _newest(folder: str) -> str:
    names = list(bf.listdir(folder))
    for pattern in (EMA_FILE, MODEL_FILE):
        if found := list(filter(pattern.fullmatch, names)):
            return bf.join(folder, max(found, key=_step_and_rate))
    raise CheckpointError(f"{folder}: holds neither ema_RATE_NNNNNN.pt nor modelNNNNNN.pt")


def _is_folder(path: str) -> bool:
    if is_remote(path) and path.endswith(".pt"):  # asking is slow, and retries where unreachable
        return False
    try:
        return bf.isdir(path)
    except bf.Error:  # of a kind that is not for us; loading it will report that
        return False


def _step_and_rate(name: str) -> tuple[int, float]:
    """What orders checkpoints: the newest is the largest, and of several averages the slowest."""
    match = EMA_FILE.fullmatch(name)
    return steps_done(name), float(match[1]) if match else 0.0


def steps_done(path: str) -> int:
    """The optimizer steps in a checkpoint's name; 0 where it has none."""
    match = re.search(r"(\d+)\.pt$", path)
    return int(match[1]) if match else 0


def load_weights(
    model: nn.Module,
    path_or_state_dict: str | os.PathLike | dict[str, th.Tensor],
    strict: bool = True,
    name: str = "state dict",
) -> list[str]:
    """Fill `model` from published names; changes nothing unless all tensors fit.

    Mismatched tensors raise a CheckpointError with their names and the flag that is probably wrong.
    strict=False: takes what fits, and returns the names left out. `name` of a dict: for messages.
    """
    if isinstance(path_or_state_dict, dict):
        path, weights = name, without_wrappers(path_or_state_dict)
    else:
        path, weights = str(path_or_state_dict), load_state(str(path_or_state_dict))[0]
    own = published_state_dict(model)
    missing = [name for name in own if name not in weights]
    extra = [name for name in weights if name not in own]
    common = [name for name in own if name in weights]
    misshapen = [name for name in common if weights[name].shape != own[name].shape]
    if strict and (missing or extra or misshapen):
        shapes = {n: f"{n} {[*weights[n].shape]} for {[*own[n].shape]}" for n in misshapen}
        raise CheckpointError(f"{path} does not fit the model: {_mismatch(missing, extra, shapes)}")
    if len(common) == len(misshapen):
        raise CheckpointError(f"{path}: not one of its tensors fits the model; check the path")
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite; use an earlier checkpoint")
    for name in set(common) - set(misshapen):
        own[name].copy_(weights[name])
    return missing + extra + misshapen


# Names on one side only ("name ...") or of other shape -> the wrong flag; the first match counts
SUSPECTS = [
    (r"name middle_block\.", "the path (one is the joint model, the other an upsampler)"),
    ("shape time_embed", "num_channels (of the upsampler: sr_num_channels)"),
    ("shape video_out.2.video_conv.bias", "learn_sigma or video_size"),
    ("shape audio_out.2.audio_conv.bias", "learn_sigma or audio_size"),
    ("name middle_blocks.2", "cross_attention_windows"),
    (r"shape out\.2\.bias", "sr_learn_sigma"),
    (r"name .*\.op\.", "sr_resblock_updown"),
    (r"name input_.*\.0\.emb_layers", "num_res_blocks or channel_mult (of the upsampler: sr_...)"),
    (r"name input_blocks\..*\.1\.qkv", "sr_attention_resolutions"),
    (r"shape .*_out_layers\.0", "channel_mult"),
    (r"shape .*\.emb_layers", "use_scale_shift_norm"),
    ("name .*video_conv_spatial", "video_type"),
    ("name .*audio_attention_block", "audio_attention_resolutions"),
    ("name .*spatial_attention_block", "video_attention_resolutions"),
    ("name .*_qkv", "cross_attention_resolutions"),
]


def _mismatch(missing: list[str], extra: list[str], shapes: dict[str, str]) -> str:
    """Numbers and names of mismatched tensors, and the flag that is probably wrong."""
    groups = {"missing": missing, "extra": extra, "misshapen": list(shapes.values())}
    parts = []
    for title, found in groups.items():
        more = ", ..." if len(found) > 3 else ""
        if found:
            parts.append(f"{len(found)} {title} ({', '.join(found[:3])}{more})")
    names = [f"name {name}" for name in missing + extra] + [f"shape {name}" for name in shapes]
    found = [flags for pattern, flags in SUSPECTS if any(re.match(pattern, n) for n in names)]
    blame = found[0] if found else "the model's flags"
    return f"{'; '.join(parts)}; probably wrong: {blame}"
