"""Checkpoints on disk: published parameter names, strict loading, files that are complete or absent."""

from __future__ import annotations

import re

import torch as th
from torch import nn

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
    (r"\bemb\.", "emb_layers.1."),
    (r"\bnorm\.(weight|bias)$", r"norm.GroupNorm.\1"),
    (r"\bproj\.(weight|bias)$", r"proj_out.\1"),
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
