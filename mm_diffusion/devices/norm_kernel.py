"""Group normalisation with scale, shift and SiLU in one: Triton kernels for GPUs.

On tokens x [N, P, M, C], mean and variance are over the P positions and the C / G channels of a
group, for each row r = (n, m) on its own:

    xhat = (x - mean) rstd,  w' = w (1 + scale),  b' = b (1 + scale) + shift
    z = xhat w' + b',        y = z sigmoid(z), or z
    dz = dy sigmoid(z) (1 + z (1 - sigmoid(z))), or dy,  A = sum_P dz,  B = sum_P dz xhat
    dx = rstd (w' dz - <w' A> - xhat <w' B>),  <a> = sum of a over the group / (P C / G)
    dw = sum_r (1 + scale) B,  db = sum_r (1 + scale) A,  dscale = w B + b A,  dshift = A

All in float32, by three kernels each way: sums over parts of the positions, sums of these over the
group, and the map. Half-precision x moves 6 bytes per element forwards, 10 backwards. No atomics:
equal inputs give equal results. Moments are of deviations: a large mean costs no digits.
"""

# No `from __future__ import annotations`: the operators' schemas are read from the annotations.
from typing import Any

import torch as th
import triton
import triton.language as tl
from torch import Tensor

G, EPS = tl.constexpr(32), tl.constexpr(1e-5)
TILE, MOST_COLS = 4096, 128  # elements and channels of x that a program holds at a time
PROGRAMS, MOST_PARTS = 1024, 128  # wanted for the sums, and parts of the positions at most


@triton.jit
def _locate(P, M, C, COLS: tl.constexpr):
    """The row of this program, the offset of its first position, and its channels."""
    row = tl.program_id(0).to(tl.int64)
    return row, (row // M * P * M + row % M) * C, tl.program_id(2) * COLS + tl.arange(0, COLS)


@triton.jit
def _affine(w, b, scale_shift, row, channels, C, known, HAS_SCALE: tl.constexpr):
    """w, b, 1 + scale, shift"""
    weight = tl.load(w + channels, known, other=0).to(tl.float32)
    bias = tl.load(b + channels, known, other=0).to(tl.float32)
    scale, shift = weight * 0 + 1, weight * 0
    if HAS_SCALE:
        scale += tl.load(scale_shift + row * 2 * C + channels, known, other=0).to(tl.float32)
        shift += tl.load(scale_shift + row * 2 * C + C + channels, known, other=0).to(tl.float32)
    return weight, bias, scale, shift


@triton.jit
def _columns(stats, w, b, scale_shift, P, M, C, COLS: tl.constexpr, HAS_SCALE: tl.constexpr):
    """Row, places of groups, channels; as rows: the first position's places, mean, rstd, w', b'."""
    row, start, channels = _locate(P, M, C, COLS)
    group = (row * 2 * G + channels // (C // G))[None, :]
    weight, bias, scale, shift = _affine(w, b, scale_shift, row, channels, C, True, HAS_SCALE)
    weight, bias = (weight * scale)[None, :], (bias * scale + shift)[None, :]
    mean, rstd = tl.load(stats + group), tl.load(stats + G + group)
    return row, group, channels, start + channels[None, :], mean, rstd, weight, bias


@triton.jit
def _derivatives(x, dy, place, mask, mean, rstd, weight, bias, SILU: tl.constexpr):
    xhat = (tl.load(x + place, mask, other=0).to(tl.float32) - mean) * rstd
    dz = tl.load(dy + place, mask, other=0).to(tl.float32)
    if SILU:
        z = xhat * weight + bias
        sigmoid = 1 / (1 + tl.exp(-z))
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    return xhat, dz


@triton.jit
def _moments(x, parts, P, M, C, S, STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """parts [R, S, 2, C]: the mean of each part, and the sum of squared deviations from it."""
    row, start, channels = _locate(P, M, C, COLS)
    mean, squares = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    for step in range(STEPS):
        begin = (tl.program_id(1) * STEPS + step) * ROWS
        p = (begin + tl.arange(0, ROWS))[:, None]
        value = tl.load(x + start + p * M * C + channels[None, :], p < P, other=0).to(tl.float32)
        before, count = step * ROWS * 1.0, tl.maximum(tl.minimum(P - begin, ROWS), 0) * 1.0
        here = tl.sum(value, 0) / tl.maximum(count, 1)
        off = tl.where(p < P, value - here[None, :], 0)
        move = here - mean
        mean += move * (count / (before + count))
        squares += tl.sum(off * off, 0) + move * move * (before * count / (before + count))
    place = (row * S + tl.program_id(1)) * 2 * C + channels
    tl.store(parts + place, mean)
    tl.store(parts + C + place, squares)


@triton.jit
def _stats(parts, stats, P, C, S, part, SS: tl.constexpr, CS: tl.constexpr):
    """stats [R, 2, G]: mean and rstd."""
    row, group, size = tl.program_id(0).to(tl.int64), tl.program_id(1), C // G
    split, channel = tl.arange(0, SS)[:, None], tl.arange(0, CS)[None, :]
    place = parts + (row * S + split) * 2 * C + group * size + channel
    mask = (split < S) & (channel < size)
    mean, squares = tl.load(place, mask, other=0), tl.load(place + C, mask, other=0)
    count = tl.maximum(tl.minimum(P - split * part, part), 0) * 1.0
    common = tl.sum(tl.sum(mean * count, 1), 0) / (P * size)
    off = tl.where(mask, mean - common, 0)
    variance = tl.sum(tl.sum(squares + off * off * count, 1), 0) / (P * size)
    tl.store(stats + row * 2 * G + group, common)
    tl.store(stats + row * 2 * G + G + group, 1 / tl.sqrt(variance + EPS))


@triton.jit
def _normalize(x, w, b, scale_shift, stats, y, P, M, C, ROWS: tl.constexpr,
               COLS: tl.constexpr, HAS_SCALE: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    values = _columns(stats, w, b, scale_shift, P, M, C, COLS, HAS_SCALE)
    _, _, _, start, mean, rstd, weight, bias = values
    p = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    place = start + p * M * C
    z = (tl.load(x + place, p < P, other=0).to(tl.float32) - mean) * rstd * weight + bias
    if SILU:
        z = z / (1 + tl.exp(-z))
    tl.store(y + place, z, p < P)


@triton.jit
def _gradient_parts(x, dy, w, b, scale_shift, stats, parts, P, M, C, S, STEPS: tl.constexpr,
                    ROWS: tl.constexpr, COLS: tl.constexpr, HAS_SCALE: tl.constexpr,
                    SILU: tl.constexpr):  # fmt: skip
    """parts [R, S, 2, C]: A and B of each part."""
    values = _columns(stats, w, b, scale_shift, P, M, C, COLS, HAS_SCALE)
    row, _, channels, start, mean, rstd, weight, bias = values
    sum_a, sum_b = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    for step in range(STEPS):
        p = ((tl.program_id(1) * STEPS + step) * ROWS + tl.arange(0, ROWS))[:, None]
        place = start + p * M * C
        xhat, dz = _derivatives(x, dy, place, p < P, mean, rstd, weight, bias, SILU)
        sum_a += tl.sum(dz, 0)
        sum_b += tl.sum(dz * xhat, 0)
    place = (row * S + tl.program_id(1)) * 2 * C + channels
    tl.store(parts + place, sum_a)
    tl.store(parts + C + place, sum_b)


@triton.jit
def _gradient_sums(parts, w, b, scale_shift, means, dwb, dscale_shift, P, C, S,
                   SS: tl.constexpr, CS: tl.constexpr, HAS_SCALE: tl.constexpr):  # fmt: skip
    """means [R, 2, G]: <w' A>, <w' B>. dwb [R, 2C]: what a row adds to dw and db. dscale, dshift"""
    row, group, size = tl.program_id(0).to(tl.int64), tl.program_id(1), C // G
    split, channel = tl.arange(0, SS)[:, None], tl.arange(0, CS)
    channels, known = group * size + channel, channel < size
    place, mask = (row * S + split) * 2 * C + channels[None, :], (split < S) & known[None, :]
    sum_a = tl.sum(tl.load(parts + place, mask, other=0), 0)
    sum_b = tl.sum(tl.load(parts + C + place, mask, other=0), 0)
    weight, bias, scale, _ = _affine(w, b, scale_shift, row, channels, C, known, HAS_SCALE)
    tl.store(means + row * 2 * G + group, tl.sum(weight * scale * sum_a, 0) / (P * size))
    tl.store(means + row * 2 * G + G + group, tl.sum(weight * scale * sum_b, 0) / (P * size))
    place = row * 2 * C + channels
    tl.store(dwb + place, scale * sum_b, known)
    tl.store(dwb + place + C, scale * sum_a, known)
    if HAS_SCALE:
        tl.store(dscale_shift + place, weight * sum_b + bias * sum_a, known)
        tl.store(dscale_shift + place + C, sum_a, known)


@triton.jit
def _gradient(x, dy, w, b, scale_shift, stats, means, dx, P, M, C, ROWS: tl.constexpr,
              COLS: tl.constexpr, HAS_SCALE: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    values = _columns(stats, w, b, scale_shift, P, M, C, COLS, HAS_SCALE)
    _, group, _, start, mean, rstd, weight, bias = values
    mean_a, mean_b = tl.load(means + group), tl.load(means + G + group)
    p = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    place = start + p * M * C
    xhat, dz = _derivatives(x, dy, place, p < P, mean, rstd, weight, bias, SILU)
    tl.store(dx + place, (weight * dz - mean_a - xhat * mean_b) * rstd, p < P)


class _Grid:
    """Sizes of the kernels for tokens x [N, P, M, C], and the grids of their programs."""

    def __init__(self, x: Tensor) -> None:
        (n, P, M, C), power = x.shape, triton.next_power_of_2
        R, cols = n * M, min(C & -C, MOST_COLS)  # a power of two that divides C
        rows, columns = min(TILE // cols, power(P)), C // cols
        wanted = min(MOST_PARTS, triton.cdiv(PROGRAMS, R * columns))
        steps = power(triton.cdiv(P, wanted * rows))  # so that few variants are compiled
        self.part = steps * rows
        S = triton.cdiv(P, self.part)
        self.sizes, self.sums = (P, M, C), (P, C, S)
        self.over_parts, self.over_groups = (R, S, columns), (R, G.value)
        self.over_map = (R, triton.cdiv(P, rows), columns)
        self.tile, self.steps = {"ROWS": rows, "COLS": cols}, {"STEPS": steps}
        self.group = {"SS": power(S), "CS": power(C // G.value)}
        self.parts = x.new_empty(R, S, 2, C, dtype=th.float32)


@th.library.custom_op("mm_diffusion::norm", mutates_args=())
def norm(
    x: Tensor, weight: Tensor, bias: Tensor, scale_shift: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Contiguous x [N, P, M, C], [C], [C], [N, 2C] -> y as x, and mean and rstd [N M, 2, G]."""
    y, stats = _norm_fake(x, weight, bias, scale_shift, silu)
    grid, how = _Grid(x), {"HAS_SCALE": scale_shift is not None, "SILU": silu}
    _moments[grid.over_parts](x, grid.parts, *grid.sizes, grid.sums[-1], **grid.steps, **grid.tile)
    _stats[grid.over_groups](grid.parts, stats, *grid.sums, grid.part, **grid.group)
    affine = weight, bias, scale_shift
    _normalize[grid.over_map](x, *affine, stats, y, *grid.sizes, **how, **grid.tile)
    return y, stats


@norm.register_fake
def _norm_fake(x: Tensor, weight: Any, bias: Any, scale_shift: Any, silu: bool) -> tuple:
    return th.empty_like(x), x.new_empty(len(x) * x.shape[2], 2, G.value, dtype=th.float32)


@th.library.custom_op("mm_diffusion::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale_shift: Tensor | None,
    stats: Tensor, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dw and db [2, C] in float32, and dscale and dshift [N, 2C] (empty without)."""
    dx, _, dscale_shift = _norm_backward_fake(dy, x, weight, bias, scale_shift, stats, silu)
    grid, how = _Grid(x), {"HAS_SCALE": scale_shift is not None}
    means, dwb = th.empty_like(stats), stats.new_empty(len(stats), 2, len(weight))
    affine, on_map = (weight, bias, scale_shift), {"SILU": silu, **how}
    parts, outs = (grid.parts, *grid.sizes, grid.sums[-1]), (means, dwb, dscale_shift)
    _gradient_parts[grid.over_parts](
        x, dy, *affine, stats, *parts, **on_map, **grid.steps, **grid.tile
    )
    _gradient_sums[grid.over_groups](grid.parts, *affine, *outs, *grid.sums, **how | grid.group)
    _gradient[grid.over_map](x, dy, *affine, stats, means, dx, *grid.sizes, **on_map | grid.tile)
    return dx, dwb.sum(0), dscale_shift


@norm_backward.register_fake
def _norm_backward_fake(
    dy: Any, x: Tensor, weight: Tensor, bias: Any, scale_shift: Any, stats: Tensor, silu: bool
) -> tuple:
    dscale_shift = stats.new_empty(0) if scale_shift is None else th.empty_like(scale_shift)
    return th.empty_like(x), stats.new_empty(2, len(weight)), dscale_shift


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.silu = inputs[-1]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple:
    dx, dwb, dscale_shift = norm_backward(dy.contiguous(), *ctx.saved_tensors, ctx.silu)
    dw, db = dwb.to(ctx.saved_tensors[1].dtype)
    return dx, dw, db, None if ctx.saved_tensors[3] is None else dscale_shift, None


norm.register_autograd(_backward, setup_context=_setup)
