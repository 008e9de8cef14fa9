"""What this device reaches: matrix products, 3x3 channels-last convolutions, and copies."""

from collections.abc import Callable

import torch as th
import torch.nn.functional as F
from measure import device, flop_of, repeat
from report import Figure

from mm_diffusion.sampling import DTYPES

# Side of the matrices, [N, C, H, W] of the feature maps and bytes to copy: enough to keep the
# device busy.
SIZES = {
    "cpu": {"matrix": 2048, "map": (4, 256, 32, 32), "copy": 2**28},
    "cuda": {"matrix": 8192, "map": (16, 512, 64, 64), "copy": 2**30},
}


def matrix_product(precision: str) -> tuple[str, Callable[[], th.Tensor]]:
    """(label, call) of a product of square matrices."""
    side = SIZES[device().type]["matrix"]
    a, b = (th.randn(side, side, device=device(), dtype=DTYPES[precision]) for _ in range(2))
    return f"matrix product {side}", lambda: a @ b


def convolution(precision: str) -> tuple[str, Callable[[], th.Tensor]]:
    """(label, call) of a 3x3 convolution, channels last, with as many channels out as in."""
    shape = SIZES[device().type]["map"]
    options = {"device": device(), "dtype": DTYPES[precision]}
    x, weight = (th.randn(size, **options) for size in (shape, (shape[1], shape[1], 3, 3)))
    x, weight = (y.contiguous(memory_format=th.channels_last) for y in (x, weight))
    label = f"convolution 3x3 {'x'.join(map(str, shape))}"
    return label, lambda: F.conv2d(x, weight, padding=1)


KINDS = {"matrix": matrix_product, "convolution": convolution}


@th.no_grad()
def rate(kind: str, precision: str, budget: float) -> Figure:
    """FLOP/s of "matrix" or "convolution"."""
    label, call = KINDS[kind](precision)
    flop = flop_of(call)
    values = [flop / seconds for seconds in repeat(call, budget)]
    return Figure("rates", "", label, values, "FLOP/s", precision)


def copy_rate(budget: float) -> Figure:
    """Bytes per second, read and written ones counted."""
    size = SIZES[device().type]["copy"]
    source, target = (th.zeros(size, dtype=th.uint8, device=device()) for _ in range(2))
    values = [2 * size / seconds for seconds in repeat(lambda: target.copy_(source), budget)]
    return Figure("rates", "", f"copy of {size // 2**20} MiB", values, "B/s")
