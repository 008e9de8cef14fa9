"""What --compile auto does: on a GPU that ssh_scripts/check_gpu.sh has passed, compile long runs.

The check leaves a record of each kind of GPU and version of torch in the user's cache folder.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch as th

from .. import logger
from ..files import cache_folder, write_text
from . import AUTO, BLOCKS
from .compiled import require_compiler

MAX_SECONDS = 120.0  # that compiling may take
# Training steps that must be left. Compiling saves a predicted 33 ms of a published step on an
# H100 and 51 ms on an A100: 120 s are paid back after 3,600 and 2,400 steps.
MIN_STEPS = 5000
PASSES_PER_STEP = 3  # of the network: the backward pass is two
MIN_PASSES = PASSES_PER_STEP * MIN_STEPS
CHECK = "bash ssh_scripts/check_gpu.sh"
# In the order of preference: --compile, its name in records, its name in the log
WAYS = (("default", "whole", "as one graph"), (BLOCKS, BLOCKS, "block by block"))


@dataclass(frozen=True)
class CheckRecord:
    """What a passed check says of a kind of GPU.

    seconds: {"eager", "whole", "blocks"} -> {"compile": s, "step": s} of a published training step;
        None where compiling failed or took longer than the check waits.
    """

    device: str
    capability: str
    torch: str
    time: str
    seconds: Mapping[str, Mapping[str, float] | None]


def record_path(device: str) -> Path:
    """The file of the record for a GPU of this name and this version of torch."""
    name = re.sub(r"[^0-9A-Za-z.]+", "_", f"{device}_torch_{th.__version__}")
    return cache_folder() / "gpus" / f"{name}.json"


def write_record(device: th.device, seconds: Mapping[str, Mapping[str, float] | None]) -> Path:
    """Keep that the check passed on this GPU -> the file. OSError where it cannot be written."""
    name, capability = th.cuda.get_device_name(device), th.cuda.get_device_capability(device)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    version = ".".join(map(str, capability))
    record = CheckRecord(name, version, th.__version__, now, seconds)
    path = record_path(name)
    write_text(path, json.dumps(asdict(record), indent=1) + "\n", durable=True)
    return path


def read_record(device: str) -> CheckRecord | None:
    """The record of a GPU of this name with this version of torch; None without a valid one."""
    try:
        record = CheckRecord(**json.loads(record_path(device).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return record if (record.device, record.torch) == (device, th.__version__) else None


def choose_compilation(flag: str, device: th.device, passes: float) -> str:
    """--compile `flag` for so many passes of the network -> how to compile, "" for not at all.

    Only auto chooses, and on a GPU logs one line about it. passes: infinite for no limit; a
    training step is PASSES_PER_STEP.
    """
    if flag != AUTO:
        return flag
    if device.type != "cuda":
        return ""
    name = th.cuda.get_device_name(device)
    chosen, reason = _decide(name, read_record(name), passes)
    logger.log(f"--compile auto: {reason}")
    return chosen


def _decide(name: str, record: CheckRecord | None, passes: float) -> tuple[str, str]:
    """(how to compile, what the log says)"""
    if passes <= MIN_PASSES:
        work = f"{passes:,} passes to do, a training step being {PASSES_PER_STEP}"
        return "", f"not compiled: {work}; it pays beyond {MIN_PASSES:,}"
    if not record:
        missing = f"no passed check of {name} with torch {th.__version__}"
        return "", f"not compiled: {missing}; run {CHECK}"
    try:
        require_compiler()
    except ValueError as error:
        return "", f"not compiled: {error}"
    for mode, key, words in WAYS:
        if _pays(record.seconds.get(key), record.seconds.get("eager")):
            times: Any = record.seconds[key]
            return mode, f"compiles {words}, which took {times['compile']:.0f} s in the check"
    return "", f"not compiled: in the check no way took under {MAX_SECONDS:.0f} s and gained speed"


def _pays(compiled: Any, eager: Any) -> bool:
    """Whether compiling was quick enough, and steps became faster by it."""
    if not compiled or not eager:
        return False
    return compiled["compile"] < MAX_SECONDS and compiled["step"] < eager["step"]
