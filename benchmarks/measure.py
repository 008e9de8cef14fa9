"""How the benchmarks measure: times of a call within a budget, their spread, FLOPs, memory."""

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

MAX_REPEATS = 30
LONG_CALL = 20.0  # seconds, beside which the first call's extra work is little


def _attention_flop(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


# What torch does not count by itself: attention on a CPU.
MORE_FLOP = {th.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop}


class LeftOut(Exception):
    """Why a figure is missing."""


def device() -> th.device:
    """The GPU if there is one, else the CPU."""
    return th.device("cuda" if th.cuda.is_available() else "cpu")


def synchronise() -> None:
    """Wait until the GPU has done its work."""
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
    """Seconds of each call: at least one, and as many as fit in `budget` seconds.

    One or two calls to warm up come first, but a long call that exceeds the budget is made once.
    """
    start = time.perf_counter()
    first = seconds_of(function)
    if first >= max(budget, LONG_CALL):
        return [first]
    if first < budget / 8:
        seconds_of(function)
    times = [seconds_of(function)]
    while len(times) < MAX_REPEATS and time.perf_counter() - start + times[-1] < budget:
        times.append(seconds_of(function))
    return times


def spread(values: Sequence[float]) -> float | None:
    """The interquartile range as a share of the median; None for a single value."""
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, method="inclusive")
    return (high - low) / abs(statistics.median(values)) if low != high else 0.0


def flop_of(function: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention of a call; a multiply-add is two."""
    with th.no_grad(), FlopCounterMode(display=False, custom_mapping=MORE_FLOP) as counter:
        function()
    return counter.get_total_flops()


def tidy() -> None:
    """Drop compiled networks, of which torch keeps few, and free the memory of deleted models."""
    th.compiler.reset()
    gc.collect()
    if th.cuda.is_available():
        th.cuda.empty_cache()


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`; on a CPU in a new process, so that its memory is that of the call alone.

    LeftOut where that process is killed, as happens when memory runs out.
    """
    if th.cuda.is_available():
        tidy()
        th.cuda.reset_peak_memory_stats()
        return function(*args)
    threads = {"initializer": th.set_num_threads, "initargs": (th.get_num_threads(),)}
    with ProcessPoolExecutor(1, get_context("spawn"), **threads) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            reason = "its process was killed; most likely the machine has too little memory"
            raise LeftOut(reason) from None


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
    if status.exists():  # getrusage includes the peak of the parent process
        lines = status.read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "VmHWM" in line)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
