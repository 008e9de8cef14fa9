"""torch.compile of the networks: one graph each, whatever the window shifts and the timesteps."""

from __future__ import annotations

import inspect
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch as th
from torch import nn

from .tree import to_device

# What --compile says -> the mode of torch.compile; "" leaves the network as it is.
MODES = {
    "false": "",
    "true": "default",
    "reduce-overhead": "reduce-overhead",
    "max-autotune": "max-autotune",
}
GRAPH_MODES = (
    "reduce-overhead",
    "max-autotune",
)  # with CUDA graphs, whose outputs the next call overwrites
COMPILERS = ("g++", "clang++", "c++")


def compile_mode(text: str | bool) -> str:
    """What `--compile` means; ValueError for an unknown mode, or where there is nothing to compile with."""
    mode = MODES.get(str(text).lower())
    if mode is None:
        raise ValueError(f"compile {text!r}: choose from False, True, {', '.join(list(MODES)[2:])}")
    if mode:
        _check_compilers()
    return mode


def _check_compilers() -> None:
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), *COMPILERS)))):
        raise ValueError("compile: there is no C++ compiler; install g++, or leave --compile out")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise ValueError(
            f"compile: {header} is missing; install Python's headers (python3-dev), or leave --compile out"
        )


class Compiled(nn.Module):
    """The network, same call, compiled as one graph; its weights stay its own, under their names.

    Window shifts are drawn outside of the graph and go in as data. In evaluation mode smaller batches are filled up to
    the largest so far, so that a batch which shrinks, as in adaptive sampling, is not compiled anew for every size.
    """

    def __init__(self, network: nn.Module, mode: str, **options: Any) -> None:
        super().__init__()
        self.network: Any = network
        self.signature = inspect.signature(network.forward)
        self.largest, self.has_graphs = 0, mode in GRAPH_MODES
        if "backend" not in options:
            options["mode"] = mode
        self.compiled = th.compile(network.forward, fullgraph=True, dynamic=False, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs: dict[str, th.Tensor] = self.signature.bind(*args, **kwargs).arguments
        batch = len(inputs["timesteps"])
        self.largest = batch if self.training else max(batch, self.largest)
        full = {name: _filled(x, self.largest).contiguous() for name, x in inputs.items()}
        if "video" in full:
            shifts = th.tensor(self.network.draw_shifts(full["video"].shape[1]))
            full["shifts"] = to_device(shifts, full["video"].device)
        if self.has_graphs:
            th.compiler.cudagraph_mark_step_begin()
        out = self.compiled(**full)
        return (
            tuple(self._kept(x, batch) for x in out)
            if isinstance(out, tuple)
            else self._kept(out, batch)
        )

    def _kept(self, out: th.Tensor, batch: int) -> th.Tensor:
        """What was asked for, in memory of its own."""
        return out[:batch].clone() if self.has_graphs else out[:batch]


def _filled(x: th.Tensor, batch: int) -> th.Tensor:
    """[B, ...] -> [batch, ...], the last sample again and again."""
    return x if len(x) == batch else th.cat([x, x[-1:].expand(batch - len(x), *x.shape[1:])])
