"""What a row of the log says about the steps since the row before."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch as th

from .. import logger
from ..dist_util import all_sum

QUARTILES = 4


class Averages:
    """Means over samples and ranks, in all and per quartile of the timesteps.

    Adding does not wait for the device; logging does.
    """

    def __init__(self) -> None:
        self.bins: dict[str, list[th.Tensor]] = {}
        self.values: dict[str, list[th.Tensor]] = {}
        self.norms: list[th.Tensor] = []

    def add(
        self,
        quartiles: th.Tensor,
        values: Mapping[str, th.Tensor],
        counted: Mapping[str, th.Tensor] | None = None,
    ) -> None:
        """Add values [B] by name, of timesteps in these quartiles [B] (0 to 3).

        counted: name -> [B] bool, which of the values count; all where it lacks the name.
        """
        for name, value in values.items():
            bins = quartiles
            if counted and name in counted:
                bins = th.where(counted[name], quartiles, QUARTILES)  # one beyond the last
            self.bins.setdefault(name, []).append(bins)
            self.values.setdefault(name, []).append(value.detach())

    def add_norm(self, norm: th.Tensor) -> None:
        """Add the norm of a step's gradient, the same on all ranks."""
        self.norms.append(norm.detach())

    def log(self) -> None:
        """Log the means: NAME and NAME_q0 to NAME_q3, and grad_norm; forget what was added."""
        for name, values in self.values.items():
            bins = th.nn.functional.one_hot(th.cat(self.bins[name]), QUARTILES + 1)
            bins = bins[:, :QUARTILES].double()
            in_bins = th.cat(values).double() @ bins
            sums, counts = all_sum(th.stack([in_bins, bins.sum(0)])).cpu()
            if counts.sum():
                logger.logkv(name, float(sums.sum() / counts.sum()))
            for quartile in counts.nonzero().flatten().tolist():
                logger.logkv(f"{name}_q{quartile}", float(sums[quartile] / counts[quartile]))
        logger.logkv("grad_norm", float(th.stack(self.norms).mean()))
        self.bins, self.values, self.norms = {}, {}, []


class Pace:
    """Samples per second, and the share of time that training waits for data."""

    def __init__(self, samples: int) -> None:
        self.samples, self.moment, self.waited = samples, time.monotonic(), 0.0
        self.samples_per_second = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waiting for data."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - start

    def log(self, samples: int) -> None:
        """Log the pace since the last call, and peak memory; `samples`: used so far."""
        now = time.monotonic()
        seconds = now - self.moment
        self.samples_per_second = (samples - self.samples) / seconds
        logger.logkv("samples_per_second", self.samples_per_second)
        logger.logkv("data_wait", self.waited / seconds)
        logger.logkv("memory_gib", logger.peak_memory() / 2**30)
        self.samples, self.moment, self.waited = samples, now, 0.0
