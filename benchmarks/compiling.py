"""How long torch.compile takes for a training step, and what a step takes with and without it.

Each way runs in a process of its own, with an empty cache of the compiler.

    python benchmarks/compiling.py --model small_base --backend aot_eager
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

from measure import device, repeat, seconds_of
from models import MODELS, Size, batch_that_fits, sample_of, train_loop

from mm_diffusion import train_util
from mm_diffusion.devices.compile_choice import MAX_SECONDS
from mm_diffusion.devices.compiled import Compiled
from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.sampling import choose_precision

WAYS = {"eager": "False", "whole": "True", "blocks": "blocks"}  # -> --compile
START_SECONDS = 60.0  # for imports, weights and the first steps
BUDGET = 5.0  # seconds for the repeats of a step

Seconds = dict[str, float]


def time_steps(size: Size, way: str, batch_size: int, backend: str = "") -> Seconds:
    """{"compile": s by which the first training step is longer, "step": s of a later one}."""
    options = {"backend": backend} if backend else {}
    precision = choose_precision("", device().type == "cuda", device())
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(train_util, "Compiled", partial(Compiled, **options)),
    ):
        loop = train_loop(size, precision, folder, WAYS[way])
        batch = sample_of(loop.model, batch_size)

        def step() -> None:
            loop.run_step(*batch)

        first, later = seconds_of(step), median(repeat(step, BUDGET))
        loop.lock.close()
    return {"compile": first - later, "step": later}


def time_in_own_process(way: str, limit: float, flags: list[str]) -> Seconds | None:
    """`time_steps` by this script with these flags; None where it fails or takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "seconds.json")
        command = [sys.executable, __file__, *flags, "--ways", way, "--here", str(result)]
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        process = subprocess.Popen(command, env=env, stdout=sys.stderr, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that compile
            process.wait()
            return None
        return json.loads(result.read_text()) if status == 0 else None


def line(way: str, seconds: Seconds | None) -> str:
    """What was measured, in words."""
    if seconds is None:
        return f"{way}: failed, or took too long"
    return f"{way}: first step {seconds['compile']:.0f} s longer, then {seconds['step']:.3f} s each"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batch_size", type=int, default=0, help="0: 4, or 1 where 4 do not fit")
    parser.add_argument("--backend", default="", help="of torch.compile; empty: inductor")
    parser.add_argument("--limit", type=float, default=MAX_SECONDS + START_SECONDS, help="seconds")
    parser.add_argument("--json", default="", help="file for the result")
    parser.add_argument("--here", default="", help="measure in this process, into this file")
    options = parser.parse_args()
    if options.here:
        batch_size = options.batch_size or batch_that_fits()
        (way,), size = options.ways, MODELS[options.model]
        seconds = time_steps(size, way, batch_size, options.backend)
        Path(options.here).write_text(json.dumps(seconds))
        return
    flags = ["--model", options.model, "--batch_size", str(options.batch_size)]
    flags += ["--backend", options.backend]
    found = {}
    for way in options.ways:
        found[way] = time_in_own_process(way, options.limit, flags)
        print(line(way, found[way]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(found))


if __name__ == "__main__":
    with friendly_errors():
        main()
