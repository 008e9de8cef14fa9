"""Counts what a GPU would do, without one: kernels, FLOPs and bytes, and the time they predict.

The networks run on fake tensors, which have shapes and no values, along the paths that GPUs take.
Each operator counts as a kernel that reads its inputs and writes its outputs once; our norm kernel
counts as what it is. A kernel is predicted to take as long as its bytes or its FLOPs, and at least
LAUNCH. Two rows per call: norms by torch's kernels, and by ours.

    python benchmarks/roofline.py --calls step
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch as th
import torch.nn.functional as F
from measure import MORE_FLOP
from models import MODELS, create, forward_of, sample_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mm_diffusion import cross_attention, train_util
from mm_diffusion import nn as layers
from mm_diffusion.config import TrainConfig
from mm_diffusion.devices.gpus import KNOWN_GPUS, Gpu
from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.train_util import TrainLoop
from mm_diffusion.unet import window_shift

GPUS = {name: KNOWN_GPUS[name] for name in ("A100", "H100", "H200")}
BANDWIDTH_SHARE, FLOPS_SHARE = 0.82, 0.7  # that kernels reach
LAUNCH = 2e-6  # seconds, of the shortest kernel
# Operators that only make views or memory.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach"}
FREE |= {"_unsafe_view", "set_", "is_pinned", "lift_fresh", "device"}
FREE |= {"_record_function_enter_new", "_record_function_exit"}  # of the profiler
# Our operators: kernels, and how often they read or write a map (x and y, or dy, x and dx).
OURS = {"norm": (3, 3), "norm_backward": (4, 5)}


@dataclass
class Work(TorchDispatchMode):
    """A mode that counts the operators called within it."""

    kernels: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    flop: int = 0
    calls: list[tuple[int, int, int]] = field(default_factory=list)  # kernels, bytes, FLOPs

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        if not func.is_view and space != "prim" and name not in FREE:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, th.Tensor)]
            kernels, moved = 1, sum(map(size_of, tensors))
            if space == "mm_diffusion":
                kernels, passes = OURS[name]
                moved += (passes - name.count("backward") - 2) * size_of(args[0])
            self.add(name, kernels, moved, self.flop_of(func, args, kwargs, out))
        return out

    def add(self, name: str, kernels: int, moved: int, flop: int) -> None:
        """Count an operator."""
        self.kernels[name] += kernels
        self.bytes[name] += moved
        self.flop += flop
        self.calls.append((kernels, moved, flop))

    def flop_of(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        """FLOPs of matrix products, convolutions and attention."""
        formulas = flop_registry | MORE_FLOP
        operator = func._overloadpacket
        if operator is th.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            _, q, k, v, *_ = args  # five products where the forward pass has two
            return (
                5
                * MORE_FLOP[th.ops.aten._scaled_dot_product_flash_attention_for_cpu](
                    q.shape, k.shape, v.shape
                )
                // 2
            )
        if operator not in formulas:
            return 0
        if operator in MORE_FLOP:
            return MORE_FLOP[operator](*(x.shape for x in args[:3]))
        return formulas[operator](*args, **(kwargs or {}), out_val=out)

    def seconds(self, gpu: Gpu) -> float:
        """The predicted time."""
        bandwidth, rate = BANDWIDTH_SHARE * gpu.bandwidth, FLOPS_SHARE * matrix_rate(gpu)
        times = (max(n * LAUNCH, moved / bandwidth, f / rate) for n, moved, f in self.calls)
        return sum(times)


def matrix_rate(gpu: Gpu) -> float:
    """FLOPs per second of large matrix products."""
    return gpu.reached or gpu.flops


def size_of(x: th.Tensor) -> int:
    """Bytes; what is broadcast counts once."""
    held = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return x.element_size() * th.Size(held).numel()


@contextmanager
def paths_of_gpus(norm_kernel: bool) -> Iterator[None]:
    """Fake tensors that take the paths of GPUs, though they are on the CPU.

    On "cuda", autocast and the backward pass would ask for a driver.
    """

    def choose_normalize(x: th.Tensor, dims: list[int]) -> Any:
        is_half = x.dtype in layers.HALF_DTYPES
        return layers._moments_normalize if is_half else layers._exact_normalize

    replaced = [
        (layers, "linear", F.linear),
        (layers, "_prefers_products", lambda q, k: False),
        (layers, "CACHED_ELEMENTS", 2**62),
        (layers, "_choose_normalize", choose_normalize),
        (layers, "KERNEL_DEVICES", ("cpu",) if norm_kernel else ()),
        (layers, "_kernel_works", lambda *args: True),
        (cross_attention, "gather_windows", cross_attention.windows_by_unfolding),
        (clip_grad, "_has_foreach_support", lambda *args: True),
        # A random shift would have to be computed.
        (train_util, "window_shift", lambda generator: window_shift("max")),
        (th.nn.Module, "to", lambda module, device: module),  # fake weights cannot be swapped
    ]
    with ExitStack() as stack:
        for owner, name, other in replaced:
            stack.enter_context(patch.object(owner, name, other))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(window_shift("max"))
        yield


def count(call: Callable[[], object]) -> Work:
    """The work of the second call; the first makes the state of the optimizer."""
    call()
    with Work() as work:
        call()
    return work


def count_step(model: str, batch_size: int, norm_kernel: bool) -> Work:
    """A training step of the joint model or the upsampler."""
    with tempfile.TemporaryDirectory() as folder, paths_of_gpus(norm_kernel):
        network, diffusion = create(MODELS[model])
        config = TrainConfig(output_dir=folder, preview_clips=0, precision="bf16")
        loop = TrainLoop(network, diffusion, lambda start: iter(()), config)
        batch = sample_of(network, batch_size)
        return count(lambda: loop.run_step(*batch))


def count_pass(model: str, batch_size: int, norm_kernel: bool) -> Work:
    """A pass through a model in bfloat16 from end to end."""
    th.set_default_dtype(th.bfloat16)
    try:
        with paths_of_gpus(norm_kernel):
            return count(forward_of(create(MODELS[model])[0], batch_size))
    finally:
        th.set_default_dtype(th.float32)


# What is counted: (function, model, clips or images)
CALLS = {
    "step": (count_step, "base", 4),
    "forward": (count_pass, "base", 4),
    "forward, batch 1": (count_pass, "base", 1),
    "upsampler pass, 20 frames": (count_pass, "upsampler", 20),
}
ROW = "{:<28}{:<9}{:>9}{:>9}{:>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--details", action="store_true", help="the operators that move most")
    options = parser.parse_args()
    title = ROW.format("bf16", "norms", "kernels", "TFLOP", "GB")
    print(title + "".join(f"{name + ' ms (share)':>18}" for name in GPUS))
    for name in options.calls:
        function, model, batch_size = CALLS[name]
        for norms in ("torch", "triton"):
            work = function(model, batch_size, norms == "triton")
            print(row(name, norms, work))
            for operator, moved in work.bytes.most_common(12 if options.details else 0):
                print(f"    {operator:<50}{work.kernels[operator]:>7,}{moved / 1e9:>9.1f} GB")


def row(name: str, norms: str, work: Work) -> str:
    """Counts, and for each GPU the predicted time and the share of its matrix rate."""
    kernels, moved = sum(work.kernels.values()), sum(work.bytes.values())
    counts = f"{kernels:,}", f"{work.flop / 1e12:.2f}", f"{moved / 1e9:.1f}"
    text = ROW.format(name, norms, *counts)
    for gpu in GPUS.values():
        seconds = work.seconds(gpu)
        text += f"{f'{1e3 * seconds:.0f} ({work.flop / seconds / matrix_rate(gpu):.0%})':>18}"
    return text


if __name__ == "__main__":
    with friendly_errors():
        main()
