"""What a modality is to the networks: its axes, and how a level of the U-Net resamples them.

Inside the networks every feature map is [B, C, *grid] in channels-last memory, so that `tokens(x)`,
[B, *grid, C], is a free view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch as th
import torch.nn.functional as F
from einops import rearrange, repeat


@dataclass(frozen=True)
class Modality:
    """`public`: the layout users see; `grid`: the axes in the networks; `stride`: their factors."""

    name: str
    public: str
    grid: str
    stride: tuple[int, ...]

    def enter(self, x: th.Tensor) -> th.Tensor:
        """Public layout -> [B, C, *grid] in channels-last memory, the one transpose on entry."""
        return from_tokens(rearrange(x, f"{self.public} -> b {self.grid} c").contiguous())

    def leave(self, x: th.Tensor) -> th.Tensor:
        """[B, C, *grid] -> the public layout, contiguous, the one transpose on exit."""
        return rearrange(x, f"b c {self.grid} -> {self.public}").contiguous()

    def downsample(self, x: th.Tensor) -> th.Tensor:
        """Average pooling by `stride`, of which only the last two axes may differ from 1."""
        y = tokens(x)
        grid, channels = y.shape[1:-1], y.shape[-1]
        plane = (1, *grid)[-2:]
        planes = from_tokens(y.reshape(-1, *plane, channels))
        pooled = tokens(F.avg_pool2d(planes, (1, *self.stride)[-2:]))
        smaller = (size // factor for size, factor in zip(grid, self.stride, strict=True))
        return from_tokens(pooled.reshape(len(y), *smaller, channels))

    def upsample(self, x: th.Tensor) -> th.Tensor:
        """Nearest neighbour by `stride`."""
        factors = zip(self.grid.split(), self.stride, strict=True)
        larger = " ".join(f"({axis} {factor})" for axis, factor in factors)
        return from_tokens(repeat(tokens(x), f"b {self.grid} c -> b {larger} c"))


def tokens(x: th.Tensor) -> th.Tensor:
    """[B, C, *grid] -> [B, *grid, C], a view."""
    return x.movedim(1, -1)


def from_tokens(x: th.Tensor) -> th.Tensor:
    """[B, *grid, C] -> [B, C, *grid], a view."""
    return x.movedim(-1, 1)


VIDEO = Modality("video", public="b f c h w", grid="f h w", stride=(1, 2, 2))
AUDIO = Modality("audio", public="b c l", grid="l", stride=(4,))
IMAGE = Modality("image", public="b c h w", grid="h w", stride=(2, 2))
