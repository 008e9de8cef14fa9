"""Weights and inputs that depend on a tensor's name alone, and the recorded figures of them.

The figures in `golden/` were taken from the published system with exactly these weights and inputs.
"""

import json
import math
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch as th

FOLDER = Path(__file__).parent / "golden"


@cache
def index() -> dict:
    """What each case holds: flags, timesteps, names of the inputs, meaning of each array."""
    return json.loads((FOLDER / "index.json").read_text())


@cache
def arrays(case: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{case}.npz") as file:
        return {name: file[name] for name in file.files}


@cache
def manifest(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def noise(name: str, shape) -> th.Tensor:
    """Standard normal float32 tensor that depends on its name and shape only."""
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    return th.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def weight(name: str, shape) -> th.Tensor:
    """The parameter `name` (published name): fan-in scaled, norms around one, small biases."""
    value = noise(name, shape)
    if len(shape) > 1:
        return value * np.float32(1.0 / math.sqrt(math.prod(shape[1:])))
    if name.endswith("weight"):
        return 1.0 + np.float32(0.1) * value
    return np.float32(0.1) * value


def weights(shapes: dict[str, tuple]) -> dict[str, th.Tensor]:
    return {name: weight(name, shape) for name, shape in shapes.items()}
