"""What the benchmarks share: seconds of a call, and the matrix rate of this process to compare with."""

import time
from collections.abc import Callable

import torch as th

from mm_diffusion.sampling import DTYPES

MATRIX_SIZE = 2048
REPEATS = 3


def device() -> th.device:
    return th.device("cuda" if th.cuda.is_available() else "cpu")


def seconds(function: Callable[[], object]) -> float:
    """The least time of a few calls after one to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        synchronise()
        start = time.perf_counter()
        function()
        synchronise()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def synchronise() -> None:
    if th.cuda.is_available():
        th.cuda.synchronize()


def matrix_rate(precision: str) -> float:
    """FLOP/s of a square matrix product."""
    a, b = (th.randn(MATRIX_SIZE, MATRIX_SIZE, device=device(), dtype=DTYPES[precision]) for _ in range(2))
    return 2 * MATRIX_SIZE**3 / seconds(lambda: a @ b)
