"""What each kept change is worth: a pass, or a training step, with the change undone, over that with it.

Both are timed in turn in one process. A change is undone in the layer that holds it, for as long as it is timed; the
network around it stays the same.
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
from measure import LONG_CALL, MOST_REPEATS, device, seconds_of
from models import Size, build, forward_of, sample_of, train_loop
from report import Figure
from torch import nn

from mm_diffusion import nn as layers
from mm_diffusion import train_util
from mm_diffusion.modality import from_tokens, tokens
from mm_diffusion.sampling import DTYPES, prepare
from mm_diffusion.script_util import SR


@dataclass(frozen=True)
class Change:
    """`undo` makes a context within which the change is not there; it counts in `calls`, on `devices`."""

    text: str
    undo: Callable[[], AbstractContextManager]
    calls: tuple[str, ...] = CALLS
    devices: tuple[str, ...] = ("cpu", "cuda")
    halves_only: bool = False


def derived_norm(
    x: th.Tensor, weight: th.Tensor, bias: th.Tensor, dims: list[int], eps: float
) -> th.Tensor:
    """The norm, in float32, with the backward pass that autograd makes of it."""
    with th.autocast(x.device.type, enabled=False):
        return layers._exact_normalize(x, weight.float(), bias.float(), dims, eps)[0]


def library_norm(
    x: th.Tensor, weight: th.Tensor, bias: th.Tensor, dims: list[int], eps: float
) -> th.Tensor:
    """The norm as published code has it: torch's, of a float32 copy of the map; scale and shift are a further pass."""
    order = [d for d in range(x.ndim - 1) if d not in dims] + [x.ndim - 1, *dims]
    apart, back = order.index(x.ndim - 1), [order.index(d) for d in range(x.ndim)]
    moved = x.float().permute(order)
    with th.autocast(x.device.type, enabled=False):
        y = F.group_norm(moved.flatten(0, apart - 1).flatten(2), layers.NORM_GROUPS, eps=eps)
        return th.addcmul(bias.float(), y.view(moved.shape).permute(back), weight.float()).to(
            x.dtype
        )


def mean_of_axes(x: th.Tensor, kernel: tuple[int, int]) -> th.Tensor:
    """Average pooling as mean over axes of the map."""
    return from_tokens(
        reduce(tokens(x), "b (h s) (w t) c -> b h w c", "mean", s=kernel[0], t=kernel[1])
    )


def sequence_conv(self: Any, x: th.Tensor) -> th.Tensor:
    """As one-dimensional convolution."""
    kept = self.reach
    y = F.conv1d(x, self.weight, self.bias, padding=kept, dilation=self.dilation)
    return y.unsqueeze(2).contiguous(memory_format=th.channels_last).squeeze(2)


def factorized_conv(self: Any, x: th.Tensor) -> th.Tensor:
    """Along time as a one-dimensional convolution of every pixel."""
    b, h = x.shape[0], x.shape[3]
    y = rearrange(
        self.spatial(rearrange(x, "b c f h w -> (b f) c h w")), "(b f) c h w -> (b h w) c f", b=b
    )
    y = F.conv1d(y, self.temporal.weight, self.temporal.bias, padding=1)
    return rearrange(
        rearrange(y, "(b h w) c f -> b f h w c", b=b, h=h).contiguous(), "b f h w c -> b c f h w"
    )


def slow_average(ema: list[th.Tensor], params: list[th.Tensor], rate: float) -> None:
    for mean, value in zip(ema, params, strict=True):
        mean.mul_(rate).add_(value, alpha=1 - rate)


CHANGES = {
    "norm": Change(
        "against torch's group norm of float32 copies",
        lambda: patch.object(layers, "_normalize", library_norm),
    ),
    "norm, backward": Change(
        "written out, against autograd's",
        lambda: patch.object(layers, "_normalize", derived_norm),
        ("step",),
    ),
    "norm, one kernel": Change(
        "of half-precision maps, against two passes",
        lambda: patch.object(layers, "LONG_MAP", 2**62),
        devices=("cpu",),
        halves_only=True,
    ),
    "dropout": Change(
        "of 16 random bits, against torch's",
        lambda: patch.object(layers.Dropout, "forward", nn.Dropout.forward),
        ("step",),
        ("cpu",),
    ),
    "linear layers": Change(
        "as convolutions, against F.linear",
        lambda: patch.object(layers, "linear", F.linear),
        devices=("cpu",),
    ),
    "short attention": Change(
        "as two products, against torch's attention",
        lambda: patch.object(layers, "SHORT_SEQUENCE", 0),
        devices=("cpu",),
    ),
    "long attention": Change(
        "likewise in bfloat16 without gradient, where the CPU has no matrix units",
        lambda: patch.object(layers, "_slow_in_halves", lambda q, k: False),
        ("pass",),
        devices=("cpu",),
        halves_only=True,
    ),
    "pooling": Change(
        "as torch's pooling, against a mean over axes",
        lambda: patch.object(F, "avg_pool2d", mean_of_axes),
    ),
    "sound, convolutions": Change(
        "in two dimensions, against one",
        lambda: patch.object(layers.SequenceConv, "forward", sequence_conv),
    ),
    "temporal convolutions": Change(
        "on the layout of the map, against transposes",
        lambda: patch.object(layers.FactorizedConv, "forward", factorized_conv),
    ),
    "moving average": Change(
        "of all weights at once",
        lambda: patch.object(train_util, "update_ema", slow_average),
        ("step",),
    ),
}


def measure_changes(bench: Bench) -> None:
    """The section "changes"."""
    for name, size, precision in bench.each():
        if "pass" in bench.calls:
            model = prepare(build(size)[0], precision)
            compare_all(bench, name, "pass", precision, forward_of(model, bench.batch_size))
            under_autocast(bench, name, size, precision)
        if "step" in bench.calls:
            with tempfile.TemporaryDirectory() as folder:
                loop = train_loop(
                    size, precision, folder, **{f"{SR if size.upsampler else ''}dropout": 0.1}
                )
                batch = sample_of(loop.model, bench.batch_size)
                compare_all(bench, name, "step", precision, partial(loop.run_step, *batch))


def compare_all(
    bench: Bench, name: str, what: str, precision: str, call: Callable[[], object]
) -> None:
    for title, change in CHANGES.items():
        fits = what in change.calls and device().type in change.devices
        if fits and (precision != "fp32" or not change.halves_only):
            add_ratio(
                bench, name, f"{what}: {title}", precision, change.text, call, call, change.undo
            )


def under_autocast(bench: Bench, name: str, size: Size, precision: str) -> None:
    """Weights and maps in half precision from end to end, against autocast of float32 ones."""
    if precision == "fp32":
        return
    pure, exact = (
        forward_of(prepare(build(size)[0], p), bench.batch_size) for p in (precision, "fp32")
    )
    add_ratio(
        bench,
        name,
        "pass: half precision",
        precision,
        "from end to end, against autocast",
        pure,
        exact,
        lambda: th.autocast(device().type, DTYPES[precision]),
    )


def add_ratio(
    bench: Bench,
    name: str,
    what: str,
    precision: str,
    text: str,
    call: Callable[[], object],
    other: Callable[[], object],
    undo: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """The seconds of `other` within `undo` over those of `call`: what is above 1 has been gained."""
    ratios: list[float] = []
    spent = 0.0
    with bench.report.trying("changes", name, what, precision):
        while len(ratios) < MOST_REPEATS and (not ratios or spent < bench.seconds):
            with undo():
                without = seconds_of(other)
            kept = seconds_of(call)
            if spent or without + kept > LONG_CALL:  # else this has been to warm up
                ratios.append(without / kept)
            spent += without + kept
        facts = {"note": text, "seconds_without": without, "seconds_with": kept}
        bench.report.add(Figure("changes", name, what, ratios, "x", precision, "", facts))
