"""How the benchmarks measure: times of a call within a budget, their middle and spread, FLOPs, memory."""

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch as th
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

MOST_REPEATS = 30
LONG_CALL = 20.0  # seconds, of which what warming up adds is little
# What torch does not count by itself: attention on a CPU.
MORE_FLOP = {
    th.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: (
        sdpa_flop_count(q, k, v)
    )
}


class LeftOut(Exception):
    """Why a figure is not there."""


def device() -> th.device:
    return th.device("cuda" if th.cuda.is_available() else "cpu")


def synchronise() -> None:
    if th.cuda.is_available():
        th.cuda.synchronize()


def seconds_of(function: Callable[[], object]) -> float:
    """The time of one call, the work of the GPU included."""
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


def repeat(function: Callable[[], object], budget: float) -> list[float]:
    """Seconds of each call: as many as fit in `budget` seconds after one or two to warm up, and at least one.

    A long call that outlasts the budget is made only once.
    """
    start = time.perf_counter()
    first = seconds_of(function)
    if first >= max(budget, LONG_CALL):
        return [first]
    if first < budget / 8:
        seconds_of(function)
    times = [seconds_of(function)]
    while len(times) < MOST_REPEATS and time.perf_counter() - start + times[-1] < budget:
        times.append(seconds_of(function))
    return times


def spread(values: Sequence[float]) -> float | None:
    """The range of the middle half of the values, as a share of their median; None for a single value."""
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, method="inclusive")
    return (high - low) / abs(statistics.median(values)) if low != high else 0.0


def flop_of(function: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention of a call, a multiply-add being two."""
    with th.no_grad(), FlopCounterMode(display=False, custom_mapping=MORE_FLOP) as counter:
        function()
    return counter.get_total_flops()


def tidy() -> None:
    """Forget compiled networks, of which torch keeps few, and give the memory of models that are gone to the GPU."""
    th.compiler.reset()
    gc.collect()
    if th.cuda.is_available():
        th.cuda.empty_cache()


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, on a CPU in a process of its own, whose memory is that of the call alone.

    LeftOut where that process is killed, as happens when memory runs out.
    """
    if th.cuda.is_available():
        tidy()
        th.cuda.reset_peak_memory_stats()
        return function(*args)
    with ProcessPoolExecutor(
        1, get_context("spawn"), initializer=th.set_num_threads, initargs=(th.get_num_threads(),)
    ) as alone:
        try:
            return alone.submit(function, *args).result()
        except BrokenProcessPool:
            raise LeftOut(
                "its process was killed; mostly the machine has too little memory"
            ) from None


def memory() -> int:
    """Bytes in use now: by tensors on a GPU, else by this process."""
    if th.cuda.is_available():
        return th.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory() -> int:
    """The most bytes in use so far, as `memory` counts them."""
    if th.cuda.is_available():
        return th.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also knows what the process that started this one had taken
        return next(
            1024 * int(line.split()[1])
            for line in status.read_text().splitlines()
            if "VmHWM" in line
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
