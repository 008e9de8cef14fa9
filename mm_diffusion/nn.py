"""Layers of the networks. Feature maps are [B, C, *grid] and stay in channels-last memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import torch as th
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import logger
from .modality import from_tokens, tokens

NORM_GROUPS, NORM_EPS = 32, 1e-5
HALF_DTYPES = (th.bfloat16, th.float16)
# Attention on a CPU: over fewer keys than this two matrix products are faster than torch's kernel,
SHORT_SEQUENCE = 64
# and at most so many scores of a head are kept at once (the published model has up to 2^21).
MAX_ATTENTION_SCORES = 2**22
# Norms on a CPU: elements that stay in the cache, and the positions from which torch's native
# kernel is fast on half-precision feature maps.
CACHED_ELEMENTS = 2**17
MIN_NATIVE_NORM_POSITIONS = 1024
KERNEL_DEVICES = ("cuda",)
MAX_KERNEL_ERROR = 1e-5  # of the norm kernel on its first use, relative
MAX_KERNEL_ELEMENTS = 2**28  # of a sample, whose places and grid the norm kernel counts in 32 bits
# Attention on a GPU: sequences that a kernel takes at most, and elements, each sequence padded to
# a multiple of SEQUENCE_TILE.
MAX_SEQUENCES, MAX_ELEMENTS, SEQUENCE_TILE = 2**16 - 1, 2**31 - 1, 128

Module = TypeVar("Module", bound=nn.Module)
Normalized = tuple[Tensor, Tensor, Tensor]  # with mean and 1 / deviation per channel


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """[B] timesteps -> [B, dim] sinusoids of periods up to 10,000, cosines first."""
    half = dim // 2
    order = th.arange(half, dtype=th.float32, device=timesteps.device)
    frequencies = th.exp(-math.log(10000.0) / half * order)
    angles = timesteps[:, None].float() * frequencies
    return F.pad(th.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def zero_init(module: Module) -> Module:
    """Start a residual branch at the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def store_channels_last(model: nn.Module) -> None:
    """Store weights of convolutions as their kernels read them, who would rearrange them each time.

    [O, I, 3] are used as [O, I, 1, 3] or [O, I, 3, 1].
    """
    for weight in model.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=th.channels_last)
        if weight.ndim == 3:
            weight.data = weight.data.mT.contiguous().mT


def concat_channels(a: Tensor, b: Tensor) -> Tensor:
    """Two feature maps [B, C, *grid] concatenated on the channels, in channels-last memory."""
    return from_tokens(th.cat([tokens(a), tokens(b)], dim=-1))


class GroupNorm32(nn.Module):
    """Group normalisation with 32 groups in float32, whatever the dtype of the feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % NORM_GROUPS:
            remedy = "change num_channels or channel_mult"
            raise ValueError(f"{channels} channels: need a multiple of {NORM_GROUPS}; {remedy}")
        self.weight: Tensor = nn.Parameter(th.ones(channels))
        self.bias: Tensor = nn.Parameter(th.zeros(channels))

    def forward(self, x: Tensor, scale_shift: Tensor | None = None, silu: bool = False) -> Tensor:
        """Over the grid of [B, C, *grid], * (1 + scale) + shift (`scale_shift` [B, 2C]), SiLU."""
        dims = list(range(1, x.ndim - 1))
        return from_tokens(self._on_tokens(tokens(x), dims, scale_shift, silu))

    def over(self, x: Tensor, dims: list[int]) -> Tensor:
        """Tokens [..., C] normalised over the adjacent axes `dims` only."""
        return self._on_tokens(x, dims)

    def _on_tokens(
        self, x: Tensor, dims: list[int], scale_shift: Tensor | None = None, silu: bool = False
    ) -> Tensor:
        if _has_kernel(x):
            return _kernel_normalize(x, (self.weight, self.bias, scale_shift), dims, silu)
        weight, bias = self.weight, self.bias
        if scale_shift is not None:
            one_per_sample = (len(x), *[1] * (x.ndim - 2), -1)
            scale, shift = scale_shift.float().reshape(one_per_sample).chunk(2, dim=-1)
            weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
        y = _normalize(x, weight, bias, dims)
        return F.silu(y) if silu else y


# ------------------------------------------------------------ the norm in one kernel

_norm_kernel = "auto"


def use_norm_kernel(choice: str) -> None:
    """Norms on GPUs: our Triton kernel if it works ("auto"), in any case ("triton"), or "torch"."""
    global _norm_kernel
    _norm_kernel = choice


def _has_kernel(x: Tensor) -> bool:
    """Whether the kernel normalises these tokens; ValueError if it must and cannot."""
    device = x.device
    if device.type not in KERNEL_DEVICES or _norm_kernel == "torch" or x.dtype is th.float64:
        return False
    if math.prod(x.shape[1:]) > MAX_KERNEL_ELEMENTS:
        return False
    return _kernel_works(device.type, device.index or 0, _norm_kernel == "triton")


@th.compiler.assume_constant_result
def _kernel_works(kind: str, index: int, is_wanted: bool) -> bool:
    fault = _kernel_fault(kind, index)
    if fault and is_wanted:
        raise ValueError(f"--norm_kernel triton: {fault}; use --norm_kernel auto")
    return not fault


@functools.cache
def _kernel_fault(kind: str, index: int) -> str:
    """Why the kernel cannot be used on a device, with a warning; "" if it works on a small map."""
    try:
        error = _kernel_error(th.device(kind, index))
        fault = "" if error <= MAX_KERNEL_ERROR else f"its result is wrong (error {error:.1e})"
    except ImportError:
        fault = "this build of torch comes without Triton"
    except Exception as failure:  # of its compiler, or of the driver
        fault = f"it does not run here ({(str(failure).strip() or repr(failure)).splitlines()[0]})"
    if fault:
        logger.warn(f"{th.device(kind, index)}: norms take torch's slower kernels: {fault}")
    return fault


def _kernel_error(device: th.device) -> float:
    """The largest relative error of result and gradients on a small map, against float64."""
    channels, generator = 2 * NORM_GROUPS, th.Generator().manual_seed(0)
    shapes = ((1, 7, channels), (channels,), (channels,), (1, 2 * channels))
    inputs = [th.randn(shape, generator=generator, dtype=th.float64) for shape in shapes]
    results = []
    for normalize, dtype in ((_reference_norm, th.float64), (_kernel_norm, th.float32)):
        with th.enable_grad():
            given = [x.to(device, dtype).requires_grad_() for x in inputs]
            y = normalize(*given)
            results.append([y, *th.autograd.grad(y.square().sum(), given)])
    errors = [(ours - exact).norm() / exact.norm() for exact, ours in zip(*results, strict=True)]
    return float(th.stack(errors).max())


def _kernel_norm(x: Tensor, weight: Tensor, bias: Tensor, scale_shift: Tensor) -> Tensor:
    return _kernel_normalize(x, (weight, bias, scale_shift), [1], True)


def _reference_norm(x: Tensor, weight: Tensor, bias: Tensor, scale_shift: Tensor) -> Tensor:
    """Tokens [B, P, C] normalised, scaled and shifted, and SiLU, by torch."""
    scale, shift = scale_shift[:, None].chunk(2, dim=-1)
    y = from_tokens(x)
    y = tokens(F.group_norm(y, NORM_GROUPS, weight, bias, NORM_EPS))
    return F.silu(y * (1 + scale) + shift)


def _kernel_normalize(
    x: Tensor, affine: Sequence[Tensor | None], dims: list[int], silu: bool
) -> Tensor:
    """Tokens [..., C] by the kernel; affine: weight [C], bias [C], scale_shift [B, 2C] or None."""
    from .devices import norm_kernel  # where there is Triton

    sizes = x.shape[: dims[0]], [x.shape[d] for d in dims], x.shape[dims[-1] + 1 : -1]
    rows = x.contiguous().view(*map(math.prod, sizes), x.shape[-1])
    weight, bias, scale_shift = affine
    if scale_shift is not None:
        scale_shift = scale_shift.contiguous()
    return norm_kernel.norm(rows, weight, bias, scale_shift, silu)[0].view(x.shape)


# ------------------------------------------------------------ the norm by torch


def _normalize(x: Tensor, weight: Tensor, bias: Tensor, dims: list[int]) -> Tensor:
    with th.autocast(x.device.type, enabled=False):
        weight, bias = weight.float(), bias.float()
        if not th.compiler.is_compiling():
            return _Normalize.apply(x, weight, bias, dims)
        # The compiler derives and fuses the backward itself; torch 2.11 makes zeros of ours.
        formula = _fused_normalize if x.dtype in HALF_DTYPES else _exact_normalize
        return formula(x, weight, bias, dims)[0]


class _Normalize(th.autograd.Function):
    """Group normalisation of tokens [..., C] over `dims`, statistics and affine map in float32.

    Written out because the native channels-last kernel has a slow backward. `weight` and `bias`
    broadcast against the statistics: a scale and shift per sample costs no further pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, dims: list[int]) -> Tensor:
        y, mean, rstd = _choose_normalize(x, dims)(x, weight, bias, dims)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.dims, ctx.bias_shape = dims, bias.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dx = rstd (weight grad - offset - slope (x - mean)), and the sums over `dims`."""
        x, mean, rstd, weight = ctx.saved_tensors
        grad, dims = grads[0], ctx.dims
        grad_x = th.empty_like(x)
        length = x.shape[dims[0]]
        if x.device.type == "cpu":  # part by part, as much as its cache holds
            length = max(1, CACHED_ELEMENTS * length // x.numel())
        x_parts, grad_parts, grad_x_parts = (y.split(length, dims[0]) for y in (x, grad, grad_x))

        grad_bias = grad.sum(dims, keepdim=True, dtype=th.float32)
        grad_weight = th.zeros_like(grad_bias)
        for x_part, grad_part in zip(x_parts, grad_parts, strict=True):
            grad_weight += (x_part - mean).mul_(grad_part).sum(dims, keepdim=True)
        grad_weight *= rstd

        count = math.prod(x.shape[d] for d in dims)
        slope = _group_mean(grad_weight * weight) / count * rstd
        offset = _group_mean(grad_bias * weight) / count
        of_grad, of_x, constant = rstd * weight, -rstd * slope, rstd * (slope * mean - offset)
        for x_part, grad_part, out in zip(x_parts, grad_parts, grad_x_parts, strict=True):
            part = th.addcmul(constant, x_part.float(), of_x)
            out.copy_(part.addcmul_(grad_part.float(), of_grad))

        grad_weight = grad_weight.sum_to_size(weight.shape).to(weight.dtype)
        grad_bias = grad_bias.sum_to_size(ctx.bias_shape).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


def _choose_normalize(x: Tensor, dims: list[int]) -> Any:
    """The fastest of the functions below that is exact enough for this dtype."""
    if x.dtype not in HALF_DTYPES:
        return _exact_normalize
    if x.device.type != "cpu":
        return _moments_normalize
    positions = math.prod(x.shape[d] for d in dims)
    is_native = positions >= MIN_NATIVE_NORM_POSITIONS and dims[-1] == x.ndim - 2
    return _native_normalize if is_native else _exact_normalize


def _exact_normalize(x: Tensor, weight: Tensor, bias: Tensor, dims: list[int]) -> Normalized:
    mean = _group_mean(x.mean(dims, keepdim=True, dtype=th.float32))
    centred = x - mean
    rstd = (_group_mean(centred.square().mean(dims, keepdim=True)) + NORM_EPS).rsqrt()
    return th.addcmul(bias, centred, rstd * weight).to(x.dtype), mean, rstd


def _moments_normalize(x: Tensor, weight: Tensor, bias: Tensor, dims: list[int]) -> Normalized:
    """From E[x] and E[x^2], summed in float32: three passes and no float32 copy."""
    count = math.prod([x.shape[d] for d in dims])
    mean = _group_mean(x.mean(dims, keepdim=True, dtype=th.float32))
    square = th.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=th.float32).square() / count
    rstd = ((_group_mean(square) - mean.square()).clamp(min=0) + NORM_EPS).rsqrt()
    scale = rstd * weight
    return th.addcmul(bias - mean * scale, x, scale, out=th.empty_like(x)), mean, rstd


def _fused_normalize(x: Tensor, weight: Tensor, bias: Tensor, dims: list[int]) -> Normalized:
    """From E[x] and E[x^2], for the compiler: the two-pass formula keeps a float32 copy of x."""
    mean = _group_mean(x.mean(dims, keepdim=True, dtype=th.float32))
    square = _group_mean(x.float().square().mean(dims, keepdim=True))
    rstd = ((square - mean.square()).clamp(min=0) + NORM_EPS).rsqrt()
    scale = rstd * weight
    return (x * scale + (bias - mean * scale)).to(x.dtype), mean, rstd


def _native_normalize(x: Tensor, weight: Tensor, bias: Tensor, dims: list[int]) -> Normalized:
    """By torch's kernel, sample by sample where each has a scale and shift of its own.

    Its variance is E[x^2] - E[x]^2, whose error is below the rounding of a half-precision x. In
    float32 it would be the largest error of the network (1e-2 for a mean of 30 deviations).
    """
    if len(x) == 1 or weight.numel() == x.shape[-1]:
        return _native_kernel(x, weight, bias, dims)
    samples = zip(x.split(1), weight.split(1), bias.split(1), strict=True)
    results = [_native_kernel(*sample, dims) for sample in samples]
    y, mean, rstd = zip(*results, strict=True)
    return th.cat(y), th.cat(mean), th.cat(rstd)


def _native_kernel(x: Tensor, weight: Tensor, bias: Tensor, dims: list[int]) -> Normalized:
    """With one weight and bias [C] for all of x."""
    batch_shape = [1 if d in dims else size for d, size in enumerate(x.shape[:-1])]
    channels = x.shape[-1]
    planes = x.reshape(math.prod(batch_shape), -1, 1, channels).contiguous().permute(0, 3, 1, 2)
    sizes = (len(planes), channels, planes.shape[2], NORM_GROUPS)
    y, *groups = th.native_group_norm(planes, weight.flatten(), bias.flatten(), *sizes, NORM_EPS)
    mean, rstd = (per_group.repeat_interleave(channels // NORM_GROUPS, -1) for per_group in groups)
    shape = (*batch_shape, channels)
    return y.permute(0, 2, 3, 1).view(x.shape), mean.view(shape), rstd.view(shape)


def _group_mean(per_channel: Tensor) -> Tensor:
    """[..., C] -> [..., C]: every channel gets the mean of its group."""
    grouped = per_channel.unflatten(-1, (NORM_GROUPS, -1))
    return grouped.mean(-1, keepdim=True).expand_as(grouped).flatten(-2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., I], [O, I], [O] -> [..., O]; on a CPU a convolution, which adds the bias at once."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    return F.conv2d(rows, weight[..., None, None], bias).permute(0, 2, 3, 1).view(*x.shape[:-1], -1)


class PointwiseConv(nn.Module):
    """A convolution of kernel one as a linear layer on tokens; the weight is [O, I, 1, ...]."""

    def __init__(self, in_channels: int, out_channels: int, grid_axes: int) -> None:
        super().__init__()
        linear = nn.Linear(in_channels, out_channels)
        kernel = linear.weight.detach().view(out_channels, in_channels, *[1] * grid_axes)
        self.weight, self.bias = nn.Parameter(kernel), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return from_tokens(self.on_tokens(tokens(x)))

    def on_tokens(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        return linear(x, self.weight.flatten(1), self.bias)


class SequenceConv(nn.Conv1d):
    """A dilated convolution of kernel 3 along [B, C, L], run in two dimensions, channels last."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        dilation = self.dilation[0]
        if dilation >= x.shape[-1]:  # the outer taps meet padding only
            return from_tokens(linear(tokens(x), self.weight[..., 1], self.bias))
        row, kernel = x.unsqueeze(2), self.weight.unsqueeze(2)
        y = F.conv2d(row, kernel, self.bias, padding=(0, dilation), dilation=(1, dilation))
        return y.squeeze(2)


class FactorizedConv(nn.Module):
    """[B, I, F, H, W] -> [B, O, F, H, W]: a 3x3 convolution in every frame, then 3 along time."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temporal = nn.Conv1d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, *grid = tokens(x).shape[:-1]
        y = self.spatial(rearrange(x, "b c f h w -> (b f) c h w"))
        # Through tokens: the strides of a single clip would otherwise not count as channels-last.
        y = from_tokens(rearrange(tokens(y), "(b f) h w c -> b f (h w) c", b=batch))
        y = F.conv2d(y, self.temporal.weight.unsqueeze(-1), self.temporal.bias, padding=(1, 0))
        return from_tokens(tokens(y).reshape(batch, *grid, -1))


VolumeConv = partial(nn.Conv3d, kernel_size=3, padding=1)  # [B, I, F, H, W] -> [B, O, F, H, W]


def require_heads(channels: int, num_heads: int) -> None:
    """ValueError where the channels do not split into so many heads."""
    if num_heads < 1 or channels % num_heads:
        remedy = "change num_heads or num_head_channels"
        raise ValueError(f"{channels} channels do not split into {num_heads} heads: {remedy}")


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Softmax attention of [N, Q, C] on [N, K, C] -> [N, Q, C], the channels split into heads."""
    q, k, v = (rearrange(x, "n t (h d) -> n h t d", h=num_heads) for x in (query, key, value))
    return attend_heads(q, k, v)


def attend_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of heads [N, H, Q, D] on [N, H, K, D] -> [N, Q, H D], scale 1 / sqrt(D)."""
    most = max_sequences(q, k)
    if len(q) <= most:
        out = _attend_heads(q, k, v)
    else:
        parts = zip(*(x.split(most) for x in (q, k, v)), strict=True)
        out = th.cat([_attend_heads(*part) for part in parts])
    return rearrange(out, "n h t d -> n t (h d)")


def _attend_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not _prefers_products(q, k):
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1) @ v  # which computes in float32 inside


def max_sequences(q: Tensor, k: Tensor) -> int:
    """How many sequences of heads [N, H, Q, D], [N, H, K, D] torch's GPU kernels take at a time.

    Their grids end at 65,535, and the backward pass counts padded elements in 32 bits.
    """
    padded = SEQUENCE_TILE * math.ceil(max(q.shape[-2], k.shape[-2]) / SEQUENCE_TILE)
    return max(1, min(MAX_SEQUENCES, MAX_ELEMENTS // (q.shape[1] * padded * q.shape[-1])))


def _prefers_products(q: Tensor, k: Tensor) -> bool:
    """Whether two matrix products are faster than torch's kernel: on a CPU, over few keys."""
    if q.device.type != "cpu":
        return False
    return k.shape[-2] < SHORT_SEQUENCE or _is_slow_in_bfloat16(q, k)


def _is_slow_in_bfloat16(q: Tensor, k: Tensor) -> bool:
    """Whether torch's kernel is the slower one: in bfloat16 on CPUs without matrix units for it.

    Not where the scores would take much memory: for a gradient, or if there are very many.
    """
    if q.dtype is not th.bfloat16 or q.requires_grad or th.cpu._is_amx_tile_supported():
        return False
    return q.shape[-2] * k.shape[-2] <= MAX_ATTENTION_SCORES


class SelfAttention(nn.Module):
    """`x + proj(attention(norm(x)))` along some axes of the grid, the others counting as batch.

    On the grid "f h w", attention `among` "h w" is among the pixels of a frame, "f" among the
    frames of a pixel. `layout` is that of the channels of qkv: query, key and value first, or heads
    first ("heads qkv dim").
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
        batch = " ".join(["b", *(axis for axis in axes if axis not in among.split())])
        self.split = f"b {grid} ({layout}) -> qkv ({batch}) heads ({among}) dim"
        self.grid, self.sequences = grid, f"({batch}) ({among}) c"
        self.dims = [1 + axes.index(axis) for axis in among.split()]
        self.norm = GroupNorm32(channels)
        self.qkv = PointwiseConv(channels, 3 * channels, 1)
        self.proj = zero_init(PointwiseConv(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        sizes = dict(zip(self.grid.split(), x.shape[2:], strict=True))
        y = tokens(x)
        qkv = self.qkv.on_tokens(self.norm.over(y, self.dims))
        q, k, v = rearrange(qkv, self.split, qkv=3, heads=self.num_heads)
        out = rearrange(attend_heads(q, k, v), f"{self.sequences} -> b {self.grid} c", **sizes)
        return from_tokens(y + self.proj.on_tokens(out))
