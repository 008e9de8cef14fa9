"""Networks compiled by torch.compile: as one graph, or block by block."""

from __future__ import annotations

import inspect
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch as th
from torch import nn

from .. import logger
from ..tree import leaves, to_device, tree_map
from . import BLOCKS, CUDA_GRAPH_MODES

# Of the compiler: so many reads and operations may be done again rather than written to memory,
# or it keeps feature maps in float32.
FUSION = {"realize_reads_threshold": 16, "realize_opcount_threshold": 200}
COMPILERS = ("g++", "clang++", "c++")


def require_compiler() -> None:
    """ValueError where torch.compile has nothing to compile with."""
    compilers = [os.environ.get("CXX"), *COMPILERS]
    if not any(shutil.which(name) for name in compilers if name):
        raise ValueError("--compile: no C++ compiler found; install g++, or set --compile False")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise ValueError(f"--compile: no {header}; install python3-dev, or set --compile False")


class Compiled(nn.Module):
    """The network compiled; the same call, and its weights under their names.

    mode: one of torch.compile, for the network as one graph; or "blocks", each block of the network
        by itself. Blocks of equal shapes share their code; what lies between blocks stays eager.
    options: more of torch.compile's.

    Window shifts are drawn outside the graph. In evaluation mode batches are filled up to the
    largest so far: adaptive sampling shrinks the batch, and each size would be compiled anew.
    """

    def __init__(self, network: nn.Module, mode: str, **options: Any) -> None:
        super().__init__()
        self.network: Any = network
        self.signature = inspect.signature(network.forward)
        self.largest = 0
        self.mode, self.has_graphs, self.is_ready = mode, mode in CUDA_GRAPH_MODES, False
        if "backend" not in options:
            require_compiler()
            from torch._inductor import list_mode_options  # takes a second

            options["options"] = list_mode_options(_mode_of_graphs(mode)) | FUSION
        compile_one = partial(th.compile, fullgraph=True, dynamic=False, **options)
        self.blocks: dict[nn.Module, Callable] = {}  # what runs in their place
        self.compiled: Callable = self._call_by_blocks
        if mode == BLOCKS:
            self.blocks = self._compile_blocks(compile_one)
        else:
            self.compiled = compile_one(network.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs: dict[str, Any] = self.signature.bind(*args, **kwargs).arguments
        batch = len(leaves(inputs["timesteps"])[0])
        self.largest = batch if self.training else max(batch, self.largest)
        fill_up = partial(_fill_up, batch=self.largest)
        full = {name: tree_map(fill_up, x) for name, x in inputs.items()}
        if "video" in full:
            shifts = th.tensor(self.network.draw_shifts(full["video"].shape[1]))
            full["shifts"] = to_device(shifts, full["video"].device)
        if self.has_graphs:
            th.compiler.cudagraph_mark_step_begin()
        with nullcontext() if self.is_ready else self._logged():
            out = self.compiled(**full)
        # The next call of a CUDA graph overwrites its results.
        return map_output(lambda x: x[:batch].clone() if self.has_graphs else x[:batch], out)

    def _compile_blocks(self, compile_one: Callable) -> dict[nn.Module, Callable]:
        blocks = {block: compile_one(block.forward) for block in self.network.blocks()}
        _allow_variants(len(blocks))
        return blocks

    def _call_by_blocks(self, **inputs: Any) -> Any:
        with self.network.running(self.blocks):
            return self.network(**inputs)

    @contextmanager
    def _logged(self) -> Iterator[None]:
        """Around the first call, which compiles, also what it needs for the gradient."""
        what = f"{len(self.blocks)} blocks" if self.blocks else f"the network ({self.mode})"
        logger.log(f"compiling {what}, which takes minutes")
        start = time.monotonic()
        dynamo: Any = th._dynamo.config
        # Else torch cuts each block once more, so that ranks exchange its gradients sooner.
        cuts = dynamo.optimize_ddp and not self.blocks
        with_gradient: Any = th._functorch.config.patch(force_non_lazy_backward_lowering=True)
        try:
            with with_gradient, dynamo.patch(optimize_ddp=cuts):
                yield
        except th._dynamo.exc.TorchDynamoException:
            logger.warn("compiling failed; --compile False runs without")
            raise
        self.is_ready = True
        logger.log(f"compiled it in {time.monotonic() - start:.0f} s")


def _mode_of_graphs(mode: str) -> str:
    return "default" if mode == BLOCKS else mode


def _allow_variants(count: int) -> None:
    """Let torch compile a function so many times for each batch size: blocks share few functions.

    By default it refuses the ninth.
    """
    config: Any = th._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * count)


def map_output(fn: Callable[[th.Tensor], th.Tensor], out: Any) -> Any:
    """`fn` of the tensor, or of each of the tuple, that a network returns."""
    return tuple(map(fn, out)) if isinstance(out, tuple) else fn(out)


def _fill_up(x: th.Tensor, batch: int) -> th.Tensor:
    """[B, ...] -> [batch, ...], contiguous: the last sample repeated."""
    missing = batch - len(x)
    full = th.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x
    return full.contiguous()
