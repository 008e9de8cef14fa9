"""Layers of the networks. Maps are [B, C, *grid] in channels-last memory, and every layer keeps them so."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch as th
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.autograd.function import once_differentiable

from .modality import from_tokens, tokens

NORM_GROUPS = 32
HALVES = (th.bfloat16, th.float16)
SHORT_SEQUENCE = 64  # on a CPU attention over fewer keys than this is faster as two matrix products
MOST_SCORES = 2**22  # of a head that are kept at once; the published model has 2^21 at most
CHUNK = 2**17  # elements of a map that stay in the cache of a CPU
LONG_MAP = (
    1024  # on a CPU the native norm of half-precision maps is slow for fewer places than this
)

Module = TypeVar("Module", bound=nn.Module)


def timestep_embedding(timesteps: th.Tensor, dim: int, max_period: float = 10000.0) -> th.Tensor:
    """[B] timesteps -> [B, dim] sinusoids, cosines first."""
    half = dim // 2
    frequencies = th.exp(
        -math.log(max_period) / half * th.arange(half, dtype=th.float32, device=timesteps.device)
    )
    angles = timesteps[:, None].float() * frequencies
    return F.pad(th.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def zero_init(module: Module) -> Module:
    """Start a residual branch at the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def concat_channels(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    """Two maps [B, C, *grid] one after the other on the channels, in channels-last memory."""
    return from_tokens(th.cat([tokens(a), tokens(b)], dim=-1))


class _Normalize(th.autograd.Function):
    """Group normalisation of tokens [..., C] over `dims`, with statistics and affine map in float32.

    Written out because the native channels-last kernel has a slow backward; `weight` and `bias` broadcast against the
    statistics, so that a scale and shift per sample costs no further pass over the map.
    """

    @staticmethod
    def forward(
        ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor, dims: list[int], eps: float
    ) -> th.Tensor:
        normalize = _normalize_for(x, dims)
        y, mean, rstd = normalize(x, weight, bias, dims, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.dims, ctx.bias_shape = dims, bias.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        grad, dims = grads[0], ctx.dims
        step = (
            max(1, CHUNK * x.shape[dims[0]] // x.numel())
            if x.device.type == "cpu"
            else x.shape[dims[0]]
        )
        grad_x = th.empty_like(x)
        parts = list(zip(*(each.split(step, dims[0]) for each in (x, grad, grad_x)), strict=True))
        grad_bias = grad.sum(dims, keepdim=True, dtype=th.float32)
        grad_weight = (
            sum((part - mean).mul_(g).sum(dims, keepdim=True) for part, g, _ in parts) * rstd
        )
        count = math.prod(x.shape[d] for d in dims)
        slope = _group_mean(grad_weight * weight) / count * rstd
        offset = _group_mean(grad_bias * weight) / count
        # d/dx = rstd (weight grad - offset - slope (x - mean)), in one pass over a part of the map
        of_grad, of_x, constant = rstd * weight, -rstd * slope, rstd * (slope * mean - offset)
        for part, g, out in parts:
            out.copy_(th.addcmul(constant, part.float(), of_x).addcmul_(g.float(), of_grad))
        grad_weight = grad_weight.sum_to_size(weight.shape).to(weight.dtype)
        grad_bias = grad_bias.sum_to_size(ctx.bias_shape).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None


Normalized = tuple[
    th.Tensor, th.Tensor, th.Tensor
]  # and mean and 1 / standard deviation, [..., C] over the same axes


def _normalize_for(x: th.Tensor, dims: list[int]) -> Callable[..., Normalized]:
    """The fastest way that is exact enough for this dtype."""
    if x.dtype not in HALVES:
        return _exact_normalize
    if x.device.type != "cpu":
        return _moments_normalize
    long = math.prod([x.shape[d] for d in dims]) >= LONG_MAP
    return _native_normalize if long and dims[-1] == x.ndim - 2 else _exact_normalize


def _moments_normalize(
    x: th.Tensor, weight: th.Tensor, bias: th.Tensor, dims: list[int], eps: float
) -> Normalized:
    """Of E[x] and E[x^2], summed in float32: three passes over a half-precision map, no float32 copy of it."""
    count = math.prod([x.shape[d] for d in dims])
    mean = _group_mean(x.mean(dims, keepdim=True, dtype=th.float32))
    square = th.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=th.float32).square() / count
    rstd = ((_group_mean(square) - mean.square()).clamp(min=0) + eps).rsqrt()
    scale = rstd * weight
    return th.addcmul(bias - mean * scale, x, scale, out=th.empty_like(x)), mean, rstd


def _exact_normalize(
    x: th.Tensor, weight: th.Tensor, bias: th.Tensor, dims: list[int], eps: float
) -> Normalized:
    mean = _group_mean(x.mean(dims, keepdim=True, dtype=th.float32))
    centred = x - mean
    rstd = (_group_mean(centred.square().mean(dims, keepdim=True)) + eps).rsqrt()
    return th.addcmul(bias, centred, rstd * weight).to(x.dtype), mean, rstd


def _native_normalize(
    x: th.Tensor, weight: th.Tensor, bias: th.Tensor, dims: list[int], eps: float
) -> Normalized:
    """In one kernel, whose variance is E[x^2] - E[x]^2: off by less than the rounding of a half-precision x.

    In float32 it would be the largest error of the network (1e-2 where the mean is 30 standard deviations).
    """
    if weight.numel() > x.shape[-1]:  # a scale and shift per sample
        each = [
            _native_normalize(x[i : i + 1], weight[i : i + 1], bias[i : i + 1], dims, eps)
            for i in range(len(x))
        ]
        y, mean, rstd = (
            th.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*each, strict=True)
        )
        return y, mean, rstd
    apart, channels = [1 if d in dims else n for d, n in enumerate(x.shape[:-1])], x.shape[-1]
    maps = x.reshape(math.prod(apart), -1, 1, channels).contiguous().permute(0, 3, 1, 2)
    sizes = (len(maps), channels, maps.shape[2], NORM_GROUPS)
    y, *statistics = th.native_group_norm(maps, weight.flatten(), bias.flatten(), *sizes, eps)
    mean, rstd = (
        s.repeat_interleave(channels // NORM_GROUPS, -1).view(*apart, channels) for s in statistics
    )
    return y.permute(0, 2, 3, 1).view(x.shape), mean, rstd


def _group_mean(per_channel: th.Tensor) -> th.Tensor:
    """[..., C] -> [..., C]: every channel gets the mean of its group."""
    grouped = per_channel.unflatten(-1, (NORM_GROUPS, -1))
    return grouped.mean(-1, keepdim=True).expand_as(grouped).flatten(-2)


class GroupNorm32(nn.Module):
    """Group normalisation with 32 groups in float32, whatever the dtype of the map."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        if channels % NORM_GROUPS:
            raise ValueError(
                f"{channels} channels are not a multiple of {NORM_GROUPS}: change num_channels or channel_mult"
            )
        self.eps = eps
        self.weight = nn.Parameter(th.ones(channels))
        self.bias = nn.Parameter(th.zeros(channels))

    def forward(self, x: th.Tensor, scale_shift: th.Tensor | None = None) -> th.Tensor:
        """[B, C, *grid] normalised over the whole grid; `scale_shift` [B, 2C]: norm(x) * (1 + scale) + shift."""
        sequence = tokens(x)
        weight: th.Tensor = self.weight
        bias: th.Tensor = self.bias
        if scale_shift is not None:
            scale, shift = (
                scale_shift.float().view(x.shape[0], *(1,) * (x.ndim - 2), -1).chunk(2, dim=-1)
            )
            weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
        return from_tokens(_normalize(sequence, weight, bias, list(range(1, x.ndim - 1)), self.eps))

    def over(self, x: th.Tensor, dims: list[int]) -> th.Tensor:
        """Tokens [..., C] normalised over the axes `dims` only."""
        return _normalize(x, self.weight, self.bias, dims, self.eps)


def _normalize(
    x: th.Tensor, weight: th.Tensor, bias: th.Tensor, dims: list[int], eps: float
) -> th.Tensor:
    with th.autocast(x.device.type, enabled=False):
        if (
            th.compiler.is_compiling()
        ):  # which derives and fuses the backward itself; torch 2.11 makes zeros of ours
            return _exact_normalize(x, weight.float(), bias.float(), dims, eps)[0]
        return _Normalize.apply(x, weight.float(), bias.float(), dims, eps)


class Dropout(nn.Dropout):
    """Dropout whose mask on a CPU comes of 16 random bits per element, three times faster than torch's own.

    The share dropped is `p` rounded to 2^-16; what is kept is divided by the share kept.
    """

    def forward(self, x: th.Tensor) -> th.Tensor:
        dropped = round(self.p * 2**16)
        own = (
            x.device.type == "cpu" and not th.compiler.is_compiling()
        )  # compiled, the mask is fused with what follows
        if not own or not self.training or dropped in (0, 2**16):
            return super().forward(x)
        bits = (
            th.empty(-(-x.numel() // 4), dtype=th.int64)
            .random_(-(2**63), None)
            .view(th.int16)[: x.numel()]
        )
        mask = (bits >= dropped - 2**15).to(x.dtype).mul_(2**16 / (2**16 - dropped))
        return x * mask.view(tokens(x).shape).movedim(-1, 1)


class PointwiseConv(nn.Module):
    """A convolution of kernel one as a linear layer on tokens; the weight is [O, I, 1, ...] as published."""

    def __init__(self, in_channels: int, out_channels: int, grid_axes: int) -> None:
        super().__init__()
        linear = nn.Linear(in_channels, out_channels)
        self.weight = nn.Parameter(linear.weight.detach()[(...,) + (None,) * grid_axes].clone())
        self.bias = nn.Parameter(linear.bias.detach())

    def forward(self, x: th.Tensor) -> th.Tensor:
        return from_tokens(self.on_tokens(tokens(x)))

    def on_tokens(self, x: th.Tensor) -> th.Tensor:
        """[..., I] -> [..., O]"""
        return linear(x, self.weight.flatten(1), self.bias)


def linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
    """[..., I], [O, I], [O] -> [..., O]; on a CPU as a convolution, which adds the bias in the same pass."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    return F.conv2d(rows, weight[..., None, None], bias).permute(0, 2, 3, 1).view(*x.shape[:-1], -1)


class SequenceConv(nn.Conv1d):
    """A dilated convolution along [B, C, L] of odd kernel, run as a two-dimensional one in channels-last memory."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, dilation: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, dilation=dilation)
        self.reach = dilation * (kernel_size // 2)

    def forward(self, x: th.Tensor) -> th.Tensor:
        if self.dilation[0] >= x.shape[-1]:  # the outer taps see padding only
            return from_tokens(
                linear(tokens(x), self.weight[..., self.kernel_size[0] // 2], self.bias)
            )
        weight = self.weight.unsqueeze(2)
        y = F.conv2d(
            x.unsqueeze(2),
            weight,
            self.bias,
            padding=(0, self.reach),
            dilation=(1, self.dilation[0]),
        )
        return y.squeeze(2)


class FactorizedConv(nn.Module):
    """[B, I, F, H, W] -> [B, O, F, H, W]: a 3x3 convolution in every frame, then one of kernel 3 along time."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temporal = nn.Conv1d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        sizes = dict(zip("bfhw", tokens(x).shape[:-1], strict=True))
        y = self.spatial(rearrange(x, "b c f h w -> (b f) c h w"))
        # By way of tokens: the strides of a single clip would otherwise not be read as channels-last.
        y = from_tokens(rearrange(tokens(y), "(b f) h w c -> b f (h w) c", b=sizes["b"]))
        y = F.conv2d(y, self.temporal.weight.unsqueeze(-1), self.temporal.bias, padding=(1, 0))
        return from_tokens(tokens(y).reshape(*sizes.values(), -1))


VolumeConv = partial(nn.Conv3d, kernel_size=3, padding=1)  # [B, I, F, H, W] -> [B, O, F, H, W]


def require_heads(channels: int, num_heads: int) -> None:
    """ValueError where channels do not split into so many heads."""
    if num_heads < 1 or channels % num_heads:
        raise ValueError(
            f"{channels} channels do not split into {num_heads} heads: change num_heads or num_head_channels"
        )


def attend(query: th.Tensor, key: th.Tensor, value: th.Tensor, num_heads: int) -> th.Tensor:
    """Softmax attention of [N, Q, C] on [N, K, C] -> [N, Q, C]; heads split the channels, scale 1 / sqrt(head dim)."""
    q, k, v = (rearrange(x, "n t (h d) -> n h t d", h=num_heads) for x in (query, key, value))
    return attend_heads(q, k, v)


def attend_heads(q: th.Tensor, k: th.Tensor, v: th.Tensor) -> th.Tensor:
    """Softmax attention of heads [N, H, Q, D] on [N, H, K, D] -> [N, Q, H D]."""
    if q.device.type == "cpu" and (k.shape[-2] < SHORT_SEQUENCE or _slow_in_halves(q, k)):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        out = scores.softmax(dim=-1) @ v  # which computes in float32 inside
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "n h t d -> n t (h d)")


def _slow_in_halves(q: th.Tensor, k: th.Tensor) -> bool:
    """Whether torch's attention is slower than two products: in bfloat16 on CPUs that have no matrix units for it.

    Where a gradient is wanted, or there are very many scores, it is used all the same, since it does not keep them.
    """
    few = q.shape[-2] * k.shape[-2] <= MOST_SCORES
    return (
        few
        and q.dtype is th.bfloat16
        and not q.requires_grad
        and not th.cpu._is_amx_tile_supported()
    )


class SelfAttention(nn.Module):
    """`x + proj(attention(norm(x)))` among some axes of the grid; each place on the others is a sequence of its own.

    On the grid "f h w", attention `among` "h w" is among the pixels of a frame, "f" among the frames of a pixel.
    `layout` is that of the channels of qkv: query, key and value first, or heads first ("heads qkv dim").
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        grid: str = "l",
        among: str = "l",
        layout: str = "qkv heads dim",
    ) -> None:
        super().__init__()
        require_heads(channels, num_heads)
        self.num_heads = num_heads
        axes = grid.split()
        apart = " ".join(axis for axis in axes if axis not in among.split())
        self.split = f"b {grid} ({layout}) -> qkv (b {apart}) heads ({among}) dim"
        self.grid, self.sequences = grid, f"(b {apart}) ({among}) c"
        self.dims = [1 + axes.index(axis) for axis in among.split()]
        self.norm = GroupNorm32(channels)
        self.qkv = PointwiseConv(channels, 3 * channels, 1)
        self.proj = zero_init(PointwiseConv(channels, channels, 1))

    def forward(self, x: th.Tensor) -> th.Tensor:
        sizes = dict(zip(self.grid.split(), x.shape[2:], strict=True))
        y = tokens(x)
        qkv = rearrange(
            self.qkv.on_tokens(self.norm.over(y, self.dims)),
            self.split,
            qkv=3,
            heads=self.num_heads,
        )
        out = rearrange(attend_heads(*qkv), f"{self.sequences} -> b {self.grid} c", **sizes)
        return from_tokens(y + self.proj.on_tokens(out))
