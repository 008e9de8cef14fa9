"""What each optimisation is worth: seconds with the change undone over seconds with it.

The call, a pass or a training step, is timed with and without in turn in one process. A change is
undone in the layer that holds it. The network around it stays the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch as th
import torch.nn.functional as F
from bench import CALLS, Bench
from einops import rearrange, reduce
from measure import LONG_CALL, MAX_REPEATS, device, seconds_of
from models import Size, build, forward_of, sample_of, train_loop
from report import Figure

from mm_diffusion import nn as layers
from mm_diffusion import train_util
from mm_diffusion.config import SR
from mm_diffusion.modality import from_tokens, tokens
from mm_diffusion.sampling import DTYPES, prepare


@dataclass(frozen=True)
class Change:
    """`undo` makes a context without the change; it is timed in `calls`, on `devices`."""

    text: str
    undo: Callable[[], AbstractContextManager]
    calls: tuple[str, ...] = CALLS
    devices: tuple[str, ...] = ("cpu", "cuda")
    half_precision_only: bool = False

    def applies(self, call: str, precision: str) -> bool:
        """Whether to time it in this call on this device."""
        if precision == "fp32" and self.half_precision_only:
            return False
        return call in self.calls and device().type in self.devices


def derived_norm(x: th.Tensor, weight: th.Tensor, bias: th.Tensor, dims: list[int]) -> th.Tensor:
    """The norm in float32 with autograd's backward pass."""
    with th.autocast(x.device.type, enabled=False):
        return layers._exact_normalize(x, weight.float(), bias.float(), dims)[0]


def library_norm(x: th.Tensor, weight: th.Tensor, bias: th.Tensor, dims: list[int]) -> th.Tensor:
    """The norm as published: torch's, of a float32 copy; scale and shift are another pass."""
    batch_dims = [d for d in range(x.ndim - 1) if d not in dims]
    order = [*batch_dims, x.ndim - 1, *dims]
    back = [order.index(d) for d in range(x.ndim)]
    moved = x.float().permute(order)
    with th.autocast(x.device.type, enabled=False):
        flat = moved.flatten(0, len(batch_dims) - 1).flatten(2)
        y = F.group_norm(flat, layers.NORM_GROUPS, eps=layers.NORM_EPS)
        y = y.view(moved.shape).permute(back)
        return th.addcmul(bias.float(), y, weight.float()).to(x.dtype)


def mean_of_axes(x: th.Tensor, kernel: tuple[int, int]) -> th.Tensor:
    """Average pooling as a mean over axes of the feature map."""
    sizes = {"s": kernel[0], "t": kernel[1]}
    return from_tokens(reduce(tokens(x), "b (h s) (w t) c -> b h w c", "mean", **sizes))


def sequence_conv(self: Any, x: th.Tensor) -> th.Tensor:
    """A SequenceConv as a one-dimensional convolution."""
    padding = self.padding[0]
    y = F.conv1d(x, self.weight, self.bias, padding=padding, dilation=self.dilation)
    return y.unsqueeze(2).contiguous(memory_format=th.channels_last).squeeze(2)


def factorized_conv(self: Any, x: th.Tensor) -> th.Tensor:
    """A FactorizedConv with a one-dimensional convolution of every pixel along time."""
    b, h = x.shape[0], x.shape[3]
    y = self.spatial(rearrange(x, "b c f h w -> (b f) c h w"))
    y = rearrange(y, "(b f) c h w -> (b h w) c f", b=b)
    y = F.conv1d(y, self.temporal.weight, self.temporal.bias, padding=1)
    y = rearrange(y, "(b h w) c f -> b f h w c", b=b, h=h).contiguous()
    return rearrange(y, "b f h w c -> b c f h w")


def slow_average(ema: list[th.Tensor], params: list[th.Tensor], rate: float) -> None:
    """The moving average of one weight after the other."""
    for mean, value in zip(ema, params, strict=True):
        mean.mul_(rate).add_(value, alpha=1 - rate)


def replaced(owner: Any, name: str, other: Any) -> Callable[[], AbstractContextManager]:
    """A function that makes a context in which `owner.name` is `other`."""
    return partial(patch.object, owner, name, other)


CHANGES = {
    "norm": Change(
        "against torch's group norm of float32 copies",
        replaced(layers, "_normalize", library_norm),
        devices=("cpu",),
    ),
    "norm kernel": Change(
        "against torch's kernels",
        replaced(layers, "_has_kernel", lambda x: False),
        devices=("cuda",),
    ),
    "norm, backward": Change(
        "written out, against autograd's",
        replaced(layers, "_normalize", derived_norm),
        calls=("step",),
        devices=("cpu",),
    ),
    "norm, one kernel": Change(
        "of half-precision feature maps, against two passes",
        replaced(layers, "MIN_NATIVE_NORM_POSITIONS", 2**62),
        devices=("cpu",),
        half_precision_only=True,
    ),
    "linear layers": Change(
        "as convolutions, against F.linear",
        replaced(layers, "linear", F.linear),
        devices=("cpu",),
    ),
    "short attention": Change(
        "as two products, against torch's attention",
        replaced(layers, "SHORT_SEQUENCE", 0),
        devices=("cpu",),
    ),
    "long attention": Change(
        "likewise in bfloat16 without gradient, where the CPU has no matrix units",
        replaced(layers, "_is_slow_in_bfloat16", lambda q, k: False),
        calls=("pass",),
        devices=("cpu",),
        half_precision_only=True,
    ),
    "pooling": Change(
        "as torch's pooling, against a mean over axes",
        replaced(F, "avg_pool2d", mean_of_axes),
    ),
    "audio convolutions": Change(
        "in two dimensions, against one",
        replaced(layers.SequenceConv, "forward", sequence_conv),
    ),
    "temporal convolutions": Change(
        "on the layout of the feature map, against transposes",
        replaced(layers.FactorizedConv, "forward", factorized_conv),
    ),
    "moving average": Change(
        "of all weights at once",
        replaced(train_util, "update_ema", slow_average),
        calls=("step",),
    ),
}


def measure_changes(bench: Bench) -> None:
    """The section "changes"."""
    for name, size, precision in bench.each():
        if "pass" in bench.calls:
            model = prepare(build(size)[0], precision)
            compare_all(bench, name, "pass", precision, forward_of(model, bench.batch_size))
            if precision != "fp32":
                compare_autocast(bench, name, size, precision)
        if "step" in bench.calls:
            with tempfile.TemporaryDirectory() as folder:
                dropout = {f"{SR if size.upsampler else ''}dropout": 0.1}
                loop = train_loop(size, precision, folder, **dropout)
                step = partial(loop.run_step, *sample_of(loop.model, bench.batch_size))
                compare_all(bench, name, "step", precision, step)


def compare_all(
    bench: Bench, name: str, what: str, precision: str, call: Callable[[], object]
) -> None:
    """Add the ratios of all changes that apply to a call."""
    for title, change in CHANGES.items():
        if change.applies(what, precision):
            figure = Figure("changes", name, f"{what}: {title}", [], "x", precision)
            add_ratio(bench, figure, change.text, call, call, change.undo)


def compare_autocast(bench: Bench, name: str, size: Size, precision: str) -> None:
    """Add the ratio of autocast of float32 weights to half precision from end to end."""
    half, full = (
        forward_of(prepare(build(size)[0], p), bench.batch_size) for p in (precision, "fp32")
    )
    figure = Figure("changes", name, "pass: half precision", [], "x", precision)
    autocast = partial(th.autocast, device().type, DTYPES[precision])
    add_ratio(bench, figure, "from end to end, against autocast", half, full, autocast)


def add_ratio(
    bench: Bench,
    figure: Figure,
    text: str,
    call: Callable[[], object],
    other: Callable[[], object],
    undo: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Fill and add a figure: seconds of `other` within `undo` over those of `call`."""
    ratios = figure.repeats
    spent = 0.0
    with bench.report.trying("changes", figure.model, figure.what, figure.precision):
        while len(ratios) < MAX_REPEATS and (not ratios or spent < bench.seconds):
            with undo():
                without = seconds_of(other)
            kept = seconds_of(call)
            if spent or without + kept > LONG_CALL:  # else this was to warm up
                ratios.append(without / kept)
            spent += without + kept
        figure.facts = {"note": text, "seconds_without": without, "seconds_with": kept}
        bench.report.add(figure)
