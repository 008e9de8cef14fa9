"""Inception I3D (Carreira and Zisserman, arXiv 1705.07750), whose logits are the features of FVD.

Parameter names are those of the published weights of Kinetics-400, `i3d_pretrained_400.pt`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn

CLASSES = 400
MIN_FRAMES = 9  # of fewer frames, a single one reaches the last pooling, which averages over two
# Channels of each inception block: b0, b1a, b1b, b2a, b2b, b3b.
INCEPTION = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Max pooling before a block: kernel and stride in time, height, width.
POOLING = {
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}
Triple = tuple[int, int, int]


def pad_same(x: th.Tensor, kernel: Triple, stride: Triple) -> th.Tensor:
    """[B, C, T, H, W], padded with zeros so that ceil(size / stride) positions come out.

    An odd number of zeros has the extra one at the end.
    """
    borders: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(0, (-(-size // s) - 1) * s + k - size)
        borders = [total // 2, total - total // 2, *borders]  # F.pad begins with the last axis
    return F.pad(x, borders)


def max_pool(x: th.Tensor, kernel: Triple, stride: Triple) -> th.Tensor:
    """[B, C, T, H, W] -> each size divided by its stride, rounded up."""
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


def check_frames(count: int) -> None:
    """ValueError for fewer frames than the network can take."""
    if count < MIN_FRAMES:
        need = f"I3D needs at least {MIN_FRAMES} frames (got {count})"
        raise ValueError(f"--i3d_path: {need}; set --video_size, --i3d_frames or --i3d_fps")


class Unit(nn.Module):
    """Convolution of a cubic kernel, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels)
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3

    def forward(self, x: th.Tensor) -> th.Tensor:
        return F.relu(self.bn(self.conv3d(pad_same(x, self.kernel, self.stride))))


class Inception(nn.Module):
    """Four branches side by side: 1; 1 and 3; 1 and 3; max pooling and 1."""

    def __init__(self, in_channels: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = channels
        self.b0 = Unit(in_channels, b0, 1)
        self.b1a, self.b1b = Unit(in_channels, b1a, 1), Unit(b1a, b1b, 3)
        self.b2a, self.b2b = Unit(in_channels, b2a, 1), Unit(b2a, b2b, 3)
        self.b3b = Unit(in_channels, b3b, 1)
        self.out_channels = b0 + b1b + b2b + b3b

    def forward(self, x: th.Tensor) -> th.Tensor:
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        branches = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)]
        return th.cat(branches, dim=1)


class Logits(nn.Module):
    """[B, C, T, h, w] -> [B, classes]: averaged over 2 x 7 x 7, classified, averaged over time."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, CLASSES, 1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        pooled = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.conv3d(pooled).mean(dim=(2, 3, 4))


class InceptionI3D(nn.Module):
    """[B, 3, F, 224, 224] in [-1, 1] -> logits [B, 400] of Kinetics-400."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        width = 192
        for name, channels in INCEPTION.items():
            block = Inception(width, channels)
            self.add_module(name, block)
            width = block.out_channels
        self.logits = Logits(width)

    def forward(self, x: th.Tensor) -> th.Tensor:
        check_frames(x.shape[2])
        for name, block in self.named_children():
            if name in POOLING:
                x = max_pool(x, *POOLING[name])
            x = block(x)
        return x


def load(path: str | Path) -> InceptionI3D:
    """The network with the weights of a file; ValueError where it does not hold exactly these."""
    try:
        state: Any = th.load(path, map_location="cpu", weights_only=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except Exception as error:  # unpickling raises whatever the bytes suggest
        reason = str(error).strip().partition("\n")[0][:120]
        raise ValueError(f"{path}: holds no weights ({reason})") from None
    network = InceptionI3D()
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if wrong := sorted(n for n in own.keys() | shapes.keys() if own.get(n) != shapes.get(n)):
        found = f"{len(wrong)} tensors differ, such as {wrong[0]}: {shapes.get(wrong[0])}"
        raise ValueError(f"{path}: not the weights of I3D ({found})")
    network.load_state_dict(state)
    return network.eval()
