"""What each convolution of a model reaches on this device, forwards and for its gradients.

python benchmarks/convolutions.py --model base --batch_size 4
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch as th
from measure import device, repeat
from models import MODELS, batch_that_fits, build, forward_of
from rates import rate
from torch.utils._python_dispatch import TorchDispatchMode

from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.sampling import DTYPES, choose_precision, prepare

LOW_SHARE = 0.15  # of the rate of matrix products, below which a row is flagged
BUDGET = 0.1  # seconds for the repeats of a call
aten = th.ops.aten


@dataclass(frozen=True)
class Convolution:
    """A convolution by shapes and strides of feature map and weight, and its settings."""

    x: tuple[int, ...]
    x_stride: tuple[int, ...]
    weight: tuple[int, ...]
    weight_stride: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def label(self) -> str:
        """Such as "80x128x64x64 -> 256, kernel 3x3"."""
        sizes, kernel = ("x".join(map(str, s)) for s in (self.x, self.weight[2:]))
        dilated = f", dilation {max(self.dilation)}" if max(self.dilation) > 1 else ""
        strided = f", stride {max(self.stride)}" if max(self.stride) > 1 else ""
        return f"{sizes} -> {self.weight[0]}, kernel {kernel}{dilated}{strided}"


class Recorder(TorchDispatchMode):
    """A mode that counts the convolutions within it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Convolution] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.convolution.default:
            x, weight, _, *settings = args
            tensors = x.shape, x.stride(), weight.shape, weight.stride()
            self.found[Convolution(*map(tuple, tensors), *map(tuple, settings[:3]))] += 1
        return func(*args, **(kwargs or {}))


def convolutions_of(call: Callable[[], object]) -> Counter[Convolution]:
    """The convolutions of a call, and how often each occurs."""
    with Recorder() as recorder:
        call()
    return recorder.found


def random_like(shape: tuple[int, ...], stride: tuple[int, ...], dtype: th.dtype) -> th.Tensor:
    """Noise with these strides, on the device."""
    return th.empty_strided(shape, stride, dtype=dtype, device=device()).normal_()


@dataclass(frozen=True)
class Reached:
    """FLOPs of a convolution, and its FLOP/s forwards and for both gradients."""

    flop: int
    forward: float
    backward: float


@th.no_grad()
def reached(conv: Convolution, dtype: th.dtype, budget: float = BUDGET) -> Reached:
    """Measured alone, without a bias, which the networks add in the same kernel or another."""
    x = random_like(conv.x, conv.x_stride, dtype)
    weight = random_like(conv.weight, conv.weight_stride, dtype)
    settings = (conv.stride, conv.padding, conv.dilation, False, (0,) * len(conv.stride), 1)
    y = aten.convolution(x, weight, None, *settings)
    flop = 2 * y.numel() * math.prod(conv.weight[1:])
    dy, wanted = th.randn_like(y), (True, True, False)
    forward = repeat(lambda: aten.convolution(x, weight, None, *settings), budget)
    backward = repeat(
        lambda: aten.convolution_backward(dy, x, weight, None, *settings, wanted), budget
    )
    return Reached(flop, flop / median(forward), 2 * flop / median(backward))


def row(conv: Convolution, count: int, found: Reached, matrix_rate: float) -> str:
    """A line: how often, what, TFLOP/s and share of the matrix rate; LOW below LOW_SHARE."""
    shares = [value / matrix_rate for value in (found.forward, found.backward)]
    flagged = "  LOW" if min(shares) < LOW_SHARE else ""
    each = (
        f"{value / 1e12:7.1f} TFLOP/s ({share:4.0%})"
        for value, share in zip((found.forward, found.backward), shares, strict=True)
    )
    return f"{count:3} x {conv.label():<58}{'  '.join(each)}{flagged}"


def table(call: Callable[[], object], dtype: th.dtype, matrix_rate: float) -> list[str]:
    """A row for each convolution of a call, those with most work first."""
    rows = []
    for conv, count in convolutions_of(call).items():
        found = reached(conv, dtype)
        rows.append((count * found.flop, row(conv, count, found, matrix_rate)))
    return [text for _, text in sorted(rows, reverse=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--batch_size", type=int, default=0, help="0: 4, or 1 where 4 do not fit")
    options = parser.parse_args()
    precision = choose_precision("", True, device())
    matrix_rate = median(rate("matrix", precision, budget=1.0).repeats)
    model = prepare(build(MODELS[options.model])[0], precision)
    call = forward_of(model, options.batch_size or batch_that_fits())
    print(f"matrix products: {matrix_rate / 1e12:.1f} TFLOP/s; forward, then both gradients:")
    for text in table(call, DTYPES[precision], matrix_rate):
        print(text)


if __name__ == "__main__":
    with friendly_errors():
        main()
