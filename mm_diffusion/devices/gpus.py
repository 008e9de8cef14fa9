"""GPUs: whether this build of torch can use them, what to install where not, and their settings."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch as th

GPU_FILES = Path("/dev"), "nvidia[0-9]*"  # of the driver, whether or not torch can use them
# Builds of our version of torch, newest first: CUDA, compute capabilities, driver. See docs/GPU.md.
BUILDS = (
    ("cu130", (7, 5), (12, 1), "R580"),
    ("cu128", (7, 5), (12, 0), "R525"),
    ("cu126", (5, 0), (9, 0), "R525"),
)


@dataclass(frozen=True)
class Gpu:
    """Published peak rates: bytes, and dense bfloat16 FLOPs (float16 before Ampere), per second.

    reached: FLOPs of large matrix products, where power is known to limit them; 0: as published.
    """

    bandwidth: float
    flops: float
    reached: float = 0.0


# What a device's name has in it, as a word; the first that fits counts.
KNOWN_GPUS = {
    "B200": Gpu(8.0e12, 2250e12),
    "H200": Gpu(4.8e12, 989e12, 790e12),
    "GH200": Gpu(4.0e12, 989e12, 790e12),
    "H100 PCIe": Gpu(2.0e12, 756e12),
    "H100 NVL": Gpu(3.9e12, 835e12),
    "H100": Gpu(3.35e12, 989e12, 790e12),
    "A100-SXM4-40GB": Gpu(1.555e12, 312e12),
    "A100-PCIE-40GB": Gpu(1.555e12, 312e12),
    "A100": Gpu(2.04e12, 312e12),
    "A30": Gpu(0.933e12, 165e12),
    "A40": Gpu(0.696e12, 150e12),
    "A10": Gpu(0.6e12, 125e12),
    "RTX A6000": Gpu(0.768e12, 155e12),
    "RTX 6000 Ada": Gpu(0.96e12, 364e12),
    "L40S": Gpu(0.864e12, 362e12),
    "L40": Gpu(0.864e12, 181e12),
    "L4": Gpu(0.3e12, 121e12),
    "RTX 3090": Gpu(0.936e12, 71e12),
    "RTX 4090": Gpu(1.008e12, 165e12),
    "RTX 5090": Gpu(1.792e12, 209e12),
    "V100-SXM2": Gpu(0.9e12, 125e12),
    "V100-PCIE": Gpu(0.9e12, 112e12),
    "T4": Gpu(0.32e12, 65e12),
}
INSTALL = "pip install torch=={} --index-url https://download.pytorch.org/whl/{} (docs/GPU.md)"


def tune_gpus(deterministic: bool = False) -> None:
    """Pick the fastest convolution for each size (sizes are fixed); float32 without TF32.

    `deterministic`: equal inputs give equal results, as far as torch can.
    """
    th.backends.cudnn.benchmark = not deterministic
    th.backends.cudnn.allow_tf32 = False
    # The one torch 2.11 prefers on H100s; with its cuDNN 9.19, NaN gradients in bfloat16 have been
    # reported, and its plans are made anew for each batch size.
    th.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        th.use_deterministic_algorithms(True, warn_only=True)


def known_gpu(name: str) -> Gpu | None:
    """The published rates of a device by its name; None for an unknown one, or a part of one."""
    if re.search(r"\b(MIG|Laptop|Max-Q|4090 D|5090 D)\b", name):
        return None
    for part, gpu in KNOWN_GPUS.items():
        if re.search(rf"\b{re.escape(part)}\b", name):
            return gpu
    return None


def check_gpu(device: th.device) -> None:
    """ValueError in one line, with the build of torch to install, where this one has no kernels."""
    try:
        major, minor = th.cuda.get_device_capability(device)
    except RuntimeError as error:  # of a driver that is too old, or broken
        reason = str(error).splitlines()[0]
        raise ValueError(f"GPU {device.index}: {reason}; {_builds_for(None)}") from None
    name, capability = th.cuda.get_device_name(device), f"{major}.{minor}"
    if not _has_kernels_for(major, minor, th.cuda.get_arch_list()):
        raise ValueError(
            f"GPU {device.index}: torch {th.__version__} has no kernels for {name} (compute"
            f" capability {capability}); {_builds_for((major, minor))}"
        )


def _has_kernels_for(major: int, minor: int, built_for: Sequence[str]) -> bool:
    """Binaries ("sm_80") run on later minors of their major, "compute_90" on all that is later."""
    for name in built_for:
        kind, digits = name.split("_")
        known = divmod(int(digits.rstrip("af")), 10)
        if known <= (major, minor) and (kind == "compute" or known[0] == major):
            return True
    return False


def _builds_for(capability: tuple[int, int] | None) -> str:
    """What to install on a GPU, or, of unknown capability, what each build needs."""
    version = th.__version__.partition("+")[0]
    if capability is None:
        needs = ", ".join(f"{name} {driver}" for name, _, _, driver in BUILDS)
        return f"update the driver, or install an older build (drivers: {needs}; docs/GPU.md)"
    fitting = [name for name, first, last, _ in BUILDS if first <= capability <= last]
    return INSTALL.format(version, fitting[0]) if fitting else "no build of this version has any"


def unused_gpus(num_ranks: int) -> str:
    """Why computing on the CPU may be a mistake; "" if nothing suggests it."""
    folder, pattern = GPU_FILES
    files = [path.name for path in folder.glob(pattern)]
    if files:
        where = f"/dev/{files[0]} exists, but torch {th.__version__} finds no GPU"
        return (
            f"{where}: computing on the CPU; check nvidia-smi, CUDA_VISIBLE_DEVICES and docs/GPU.md"
        )
    if num_ranks > 1:
        return f"no GPU found: {num_ranks} ranks compute on the CPU"
    return ""
