"""What one kind of signal is to the networks: its axes, and how a level of the U-Net halves or doubles them.

Inside the networks every map is [B, C, *grid] in channels-last memory, so `tokens(x)`, [B, *grid, C], is a free view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch as th
import torch.nn.functional as F
from einops import rearrange, repeat


@dataclass(frozen=True)
class Modality:
    """`public` is the layout users see, `grid` the axes inside the networks, `stride` the resampling of each."""

    name: str
    public: str
    grid: str
    stride: tuple[int, ...]

    def _pooled(self) -> str:
        axes = (
            axis if s == 1 else f"({axis} {s})"
            for axis, s in zip(self.grid.split(), self.stride, strict=True)
        )
        return f"b {' '.join(axes)} c"

    def enter(self, x: th.Tensor) -> th.Tensor:
        """Public layout -> [B, C, *grid] in channels-last memory: the only transpose on the way in."""
        return from_tokens(rearrange(x, f"{self.public} -> b {self.grid} c").contiguous())

    def leave(self, x: th.Tensor) -> th.Tensor:
        """[B, C, *grid] -> the public layout, contiguous: the only transpose on the way out."""
        return rearrange(x, f"b c {self.grid} -> {self.public}").contiguous()

    def downsample(self, x: th.Tensor) -> th.Tensor:
        """Average pooling by `stride`, which leaves all axes but the last two alone."""
        y = tokens(x)
        plane = (1, *y.shape[1:-1])[-2:]
        pooled = F.avg_pool2d(
            from_tokens(y.reshape(-1, *plane, y.shape[-1])), (1, *self.stride)[-2:]
        )
        grid = (n // s for n, s in zip(y.shape[1:-1], self.stride, strict=True))
        return from_tokens(tokens(pooled).reshape(len(y), *grid, y.shape[-1]))

    def upsample(self, x: th.Tensor) -> th.Tensor:
        """Nearest neighbour by `stride`."""
        return from_tokens(repeat(tokens(x), f"b {self.grid} c -> {self._pooled()}"))


def tokens(x: th.Tensor) -> th.Tensor:
    """[B, C, *grid] -> [B, *grid, C], a view."""
    return x.movedim(1, -1)


def from_tokens(x: th.Tensor) -> th.Tensor:
    """[B, *grid, C] -> [B, C, *grid], a view."""
    return x.movedim(-1, 1)


VIDEO = Modality("video", public="b f c h w", grid="f h w", stride=(1, 2, 2))
AUDIO = Modality("audio", public="b c l", grid="l", stride=(4,))
IMAGE = Modality("image", public="b c h w", grid="h w", stride=(2, 2))
