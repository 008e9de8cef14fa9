"""Random-shift multi-modal attention, RS-MMA (arXiv 2212.09478, section 4.3).

Each modality has n = tokens // frames tokens per frame. The tokens of frame i (of the last frame
also what remains) attend to the other modality's tokens `(i + shift) n' + [0 .. window n')`, modulo
all of its tokens. With rotary positions (arXiv 2104.09864) queries and keys are rotated by the
time of their own token in frames, whatever the shift.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch as th
from einops import rearrange
from torch import Tensor, nn

from .modality import AUDIO, VIDEO, from_tokens, tokens
from .nn import GroupNorm32, PointwiseConv, attend, require_heads, zero_init

Shift = str | th.Generator | None

_window_shift: Shift = None

# Rotary positions: radians per frame of the first and of the last pair of channels.
FASTEST, SLOWEST = 2.0, 2.0 / 64


@contextmanager
def window_shift(shift: Shift) -> Iterator[None]:
    """Fix the random shift of the cross-attention windows.

    "zero", "max" (clip length - window), a generator to draw from, or None: torch's global state.
    """
    global _window_shift
    if isinstance(shift, str) and shift not in ("zero", "max"):
        raise ValueError(f"window shift {shift!r}: use 'zero', 'max', a generator or None")
    before, _window_shift = _window_shift, shift
    try:
        yield
    finally:
        _window_shift = before


def draw_shift(largest: int) -> int:
    """Uniform in {0 .. largest} unless fixed, on the host, so that no device waits for it."""
    if isinstance(_window_shift, str):
        return largest if _window_shift == "max" else 0
    return int(th.randint(largest + 1, (), generator=_window_shift))


def token_times(x: Tensor, num_frames: int) -> Tensor:
    """[B, C, T, ...] -> [tokens] the middle of the time of each token, in frames.

    T is the frames of a video, whose pixels share the time of theirs, or the samples of audio.
    """
    length = x.shape[2]
    times = (th.arange(length, device=x.device) + 0.5) * (num_frames / length)
    return times.repeat_interleave(x[0, 0].numel() // length)


def rotate(x: Tensor, times: Tensor, heads: int) -> Tensor:
    """[B, T, C] rotated by `times` [T], so that products of two depend on differences of time.

    In each head the first half of the channels makes pairs, whose frequencies are geometric from
    FASTEST to SLOWEST; the other half stays as it is.
    """
    channels = rearrange(x, "b t (h d) -> b t h d", h=heads)
    pairs = channels.shape[-1] // 4
    step = (SLOWEST / FASTEST) ** (1 / max(1, pairs - 1))
    frequencies = FASTEST * step ** th.arange(pairs, device=x.device)
    angles = (times[:, None] * frequencies)[:, None]  # [T, 1, pairs]
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = channels.split([pairs, pairs, channels.shape[-1] - 2 * pairs], dim=-1)
    rotated = (first * cos - second * sin, first * sin + second * cos)
    return th.cat([*(part.to(x.dtype) for part in rotated), rest], dim=-1).flatten(-2)


def gather_windows(x: Tensor, first: int | Tensor, *, count: int, size: int, stride: int) -> Tensor:
    """[B, T, C] -> [(B count), size, C]: `size` tokens from `first` on, then `stride` further on.

    Modulo T; `first` + (`count` - 1) `stride` + `size` is at most 2 T. `first` is a tensor in
    compiled networks, which serve all shifts.
    """
    gather = windows_by_index if x.device.type == "cpu" else windows_by_unfolding
    return gather(x, first, count=count, size=size, stride=stride)  # by the faster gradient


def windows_by_index(
    x: Tensor, first: int | Tensor, *, count: int, size: int, stride: int
) -> Tensor:
    """As `gather_windows`; the gradient adds to indexed places, on a GPU atomically."""
    begin = first + th.arange(count, device=x.device) * stride
    index = (begin[:, None] + th.arange(size, device=x.device)) % x.shape[1]
    chosen = x.index_select(1, index.flatten())
    return rearrange(chosen, "b (f t) c -> (b f) t c", f=count)


def windows_by_unfolding(
    x: Tensor, first: int | Tensor, *, count: int, size: int, stride: int
) -> Tensor:
    """As `gather_windows`; the gradient is a sum in fixed order."""
    total, length = x.shape[1], (count - 1) * stride + size
    if isinstance(first, Tensor):
        y = x.index_select(1, (th.arange(length, device=x.device) + first) % total)
    elif first + length <= total:
        y = x[:, first : first + length]
    else:
        y = th.cat([x[:, first:], x[:, : first + length - total]], dim=1)
    return rearrange(y.unfold(1, size, stride), "b f c t -> (b f) t c")


class CrossStream(nn.Module):
    """One modality's norm, projection to query, key and value, and projection of the result."""

    def __init__(self, channels: int, grid_axes: int) -> None:
        super().__init__()
        self.norm = GroupNorm32(channels)
        self.qkv = PointwiseConv(channels, 3 * channels, 1)
        self.proj = zero_init(PointwiseConv(channels, channels, grid_axes))


class CrossAttention(nn.Module):
    """{"video": [B, C, F, H, W], "audio": [B, C, L]} -> the same, each attending to the other."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_frames: int,
        shifts: bool = True,
        rope: bool = False,
    ) -> None:
        super().__init__()
        require_heads(channels, num_heads)
        if rope and channels // num_heads < 4:
            raise ValueError(
                f"--cross_attention_rope True: {channels // num_heads} channels per head, need 4;"
                " raise num_head_channels"
            )
        self.rope = rope
        self.num_heads, self.window_frames, self.shifts = num_heads, window_frames, shifts
        self.video = CrossStream(channels, len(VIDEO.stride))
        self.audio = CrossStream(channels, len(AUDIO.stride))

    def draw_shift(self, num_frames: int) -> int:
        """The shift of one call, in frames."""
        return draw_shift(num_frames - self.window_frames) if self.shifts else 0

    def forward(
        self, x: dict[str, Tensor], emb: Tensor | None = None, shift: int = 0
    ) -> dict[str, Tensor]:
        num_frames = x["video"].shape[2]
        qkv = {}
        for name, h in x.items():
            stream = getattr(self, name)
            qkv[name] = stream.qkv.on_tokens(tokens(stream.norm(h)).flatten(1, -2)).chunk(3, dim=-1)
        if self.rope:
            for name, (query, key, value) in qkv.items():
                turn = partial(rotate, times=token_times(x[name], num_frames), heads=self.num_heads)
                qkv[name] = (turn(query), turn(key), value)
        out = {}
        for name, other in (("video", "audio"), ("audio", "video")):
            query, (_, key, value) = qkv[name][0], qkv[other]
            y = self._attend(query, key, value, num_frames, shift)
            y = from_tokens(y.view_as(tokens(x[name])))
            out[name] = x[name] + getattr(self, name).proj(y)
        return out

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, num_frames: int, shift: int
    ) -> Tensor:
        """[B, T, C] on [B, T', C] -> [B, T, C]"""
        total = key.shape[1]
        per_frame, other_per_frame = query.shape[1] // num_frames, total // num_frames
        window = self.window_frames * other_per_frame
        if window == total:  # every frame attends to every token, and their order does not matter
            return attend(query, key, value, self.num_heads)
        frames, rest = query.tensor_split([num_frames * per_frame], dim=1)
        frames = rearrange(frames, "b (f t) c -> (b f) t c", f=num_frames)
        windows = {"count": num_frames, "size": window, "stride": other_per_frame}
        first = shift * other_per_frame
        key, value = (gather_windows(x, first, **windows) for x in (key, value))
        out = attend(frames, key, value, self.num_heads)
        out = rearrange(out, "(b f) t c -> b (f t) c", f=num_frames)
        if not rest.shape[1]:
            return out
        key, value = (x[num_frames - 1 :: num_frames] for x in (key, value))
        return th.cat([out, attend(rest, key, value, self.num_heads)], dim=1)
