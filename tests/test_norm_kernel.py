"""The norm kernel: its arithmetic in Triton's interpreter, its compiler's result for GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch as th
import torch.nn.functional as F

from mm_diffusion import nn as layers
from mm_diffusion.modality import from_tokens, tokens
from mm_diffusion.nn import GroupNorm32

pytest.importorskip("triton")
from mm_diffusion.devices import norm_kernel

DEVICE = "cuda" if th.cuda.is_available() else "cpu"
ROUNDING = {th.float32: 1e-5, th.bfloat16: 2**-8, th.float16: 2**-11}


@pytest.fixture
def kernel_everywhere(monkeypatch):
    """The layers use the kernel on this device, too."""
    monkeypatch.setattr(layers, "KERNEL_DEVICES", (DEVICE,))
    monkeypatch.setattr(norm_kernel, "TILE", 256)
    monkeypatch.setattr(norm_kernel, "PROGRAMS", 4)
    layers._kernel_fault.cache_clear()
    yield
    layers._kernel_fault.cache_clear()


def exact(x, weight, bias, scale_shift, silu):
    """Tokens [N, P, M, C] normalised over P and groups of channels, in float64."""
    grouped = x.double().unflatten(-1, (layers.NORM_GROUPS, -1))
    variance, mean = th.var_mean(grouped, (1, 4), correction=0, keepdim=True)
    y = ((grouped - mean) / (variance + 1e-5).sqrt()).view(x.shape) * weight + bias
    if scale_shift is not None:
        scale, shift = scale_shift.double()[:, None, None].chunk(2, dim=-1)
        y = y * (1 + scale) + shift
    return F.silu(y) if silu else y


def relative_errors(found, wanted):
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, wanted, strict=True)]
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


def value_and_gradients(normalize, given, dy, silu):
    y = normalize(*given, silu)
    return [y, *th.autograd.grad(y, [x for x in given if x is not None], dy.to(y.dtype))]


# [N, P, M, C]: parts with a rest, sequences side by side, groups of 3, one position; mean 30 or 1
CASES = [
    ((2, 37, 1, 64), th.float32, True, True),
    ((1, 5, 3, 32), th.float32, False, False),
    ((1, 90, 1, 96), th.bfloat16, True, False),
    ((1, 1, 1, 192), th.float16, False, True),
]


@pytest.mark.parametrize(("shape", "dtype", "has_scale", "silu"), CASES, ids=str)
def test_value_and_gradients_are_those_of_float64_to_the_rounding_of_the_map(
    kernel_everywhere, shape, dtype, has_scale, silu
):
    th.manual_seed(0)
    n, c = shape[0], shape[-1]
    offset = 30 if dtype is th.float32 else 1
    x = (2 * th.randn(shape) + offset).to(DEVICE, dtype).requires_grad_()
    affine = [th.randn(c, device=DEVICE, requires_grad=True) for _ in range(2)]
    scale_shift = None
    if has_scale:
        scale_shift = th.randn(n, 2 * c).to(DEVICE, dtype).requires_grad_()
    given, dy = [x, *affine, scale_shift], th.randn(shape).to(DEVICE, dtype)
    found = value_and_gradients(lambda *args: norm_kernel.norm(*args)[0], given, dy, silu)
    wanted = value_and_gradients(exact, given, dy, silu)
    inputs = [y for y in given if y is not None]
    assert [y.dtype for y in found[1:]] == [y.dtype for y in inputs]
    assert max(relative_errors(found, wanted)) < 1.5 * ROUNDING[dtype]


def test_equal_inputs_give_equal_bits(kernel_everywhere):
    x, weight = th.randn(1, 70, 1, 32, device=DEVICE), th.ones(32, device=DEVICE)
    first, second = (norm_kernel.norm(x, weight, weight, None, True) for _ in range(2))
    assert all(th.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("among", ["grid", "frames"])
def test_the_layer_gives_the_same_with_and_without_the_kernel(kernel_everywhere, among):
    """Over the whole grid with scale, shift and SiLU, and along frames only."""
    th.manual_seed(1)
    norm, x = GroupNorm32(32).to(DEVICE), th.randn(1, 3, 2, 1, 32, device=DEVICE)
    th.nn.init.normal_(norm.weight)
    scale_shift = th.randn(1, 64, device=DEVICE)
    results = []
    for choice in ("triton", "torch"):
        layers.use_norm_kernel(choice)
        if among == "grid":
            y = tokens(norm(from_tokens(x), scale_shift, silu=True))
        else:
            y = norm.over(x, [1])
        results.append(y)
    layers.use_norm_kernel("auto")
    th.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert results[0].stride() == results[1].stride()


def test_a_kernel_that_is_wrong_is_not_used_and_the_reason_is_logged(
    kernel_everywhere, monkeypatch, capsys
):
    x, right = th.randn(1, 32, 4, device=DEVICE), norm_kernel.norm
    norm = GroupNorm32(32).to(DEVICE)
    monkeypatch.setattr(norm_kernel, "norm", lambda x, *args: (1.001 * right(x, *args)[0], None))
    wanted = layers._normalize(tokens(x), norm.weight, norm.bias, [1])
    assert th.equal(tokens(norm(x)), wanted)
    assert (
        "norms take torch's slower kernels: its result is wrong (error" in capsys.readouterr().out
    )
    layers.use_norm_kernel("triton")
    with pytest.raises(ValueError, match=r"--norm_kernel triton: its result is wrong.*auto"):
        norm(x)
    layers.use_norm_kernel("auto")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ImportError("triton"), "without Triton"), (RuntimeError("no\nptxas"), r"run here \(no\)")],
)
def test_a_kernel_that_cannot_run_is_not_used_and_the_reason_is_logged(
    kernel_everywhere, monkeypatch, capsys, error, reason
):
    def fail(*args):
        raise error

    monkeypatch.setattr(norm_kernel, "norm", fail)
    assert GroupNorm32(32).to(DEVICE)(th.randn(1, 32, 4, device=DEVICE)).isfinite().all()
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(ValueError, match=reason):
        layers._kernel_works(DEVICE, 0, True)


def test_the_compiler_keeps_one_graph_around_it(kernel_everywhere):
    th._dynamo.reset()
    norm, x = GroupNorm32(32).to(DEVICE), th.randn(1, 32, 4, device=DEVICE)
    x.requires_grad_()
    compiled = th.compile(norm, backend="aot_eager", fullgraph=True)
    results = [
        value_and_gradients(f, [x], th.ones_like(x), True)
        for f in (lambda x, silu: compiled(x, None, silu), lambda x, silu: norm(x, None, silu))
    ]
    for found, wanted in zip(*results, strict=True):
        th.testing.assert_close(found, wanted)
    th._dynamo.reset()


def test_the_norm_of_moments_is_that_of_deviations_to_the_rounding_of_bfloat16():
    """In compiled networks."""
    th.manual_seed(0)
    x = (th.randn(2, 50, 64) + 1).bfloat16().requires_grad_()
    weight, bias = th.randn(64), th.randn(64)
    results = []
    for formula in (layers._fused_normalize, layers._exact_normalize):
        y = formula(x, weight, bias, [1])[0]
        results.append([y, *th.autograd.grad(y.float().square().sum(), x)])
    assert max(relative_errors(*results)) < 2**-7


# Compiles all kernels for a GPU that need not be there -> {kernel: instructions that touch memory}
COMPILE = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mm_diffusion.devices import norm_kernel

def compiled(kernel, dtype, capability, values):
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = values.get(name, "i32")
        if name.isupper() and len(name) > 1 or name in ("STEPS",):
            signature[name], constants[name] = "constexpr", values[name]
        elif name in ("x", "y", "dx", "dy", "scale_shift", "dscale_shift"):
            signature[name] = f"*{dtype}"
        elif name in ("w", "b", "parts", "stats", "means", "dwb"):
            signature[name] = "*fp32"
        elif name in values:  # a number that is 1 is a constant, too
            signature[name], constants[name] = "constexpr", values[name]
        if signature[name].startswith("*") or name == "C":
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]

large = {"STEPS": 16, "ROWS": 32, "COLS": 128, "SS": 128, "CS": 4, "M": 1}
small = {"STEPS": 1, "ROWS": 1, "COLS": 64, "SS": 1, "CS": 8, "P": 1, "S": 1}
found = {}
for capability, dtype, sizes in ((90, "bf16", large), (75, "fp16", small)):
    for name in "moments stats normalize gradient_parts gradient_sums gradient".split():
        values = {"HAS_SCALE": True, "SILU": True, **sizes}
        ptx = compiled(getattr(norm_kernel, f"_{name}"), dtype, capability, values)
        found[f"{name} {capability}"] = re.findall(r"(?:ld|st|atom|red)\\.global[.\\w]*", ptx)
print(json.dumps(found))
"""


def test_the_kernels_compile_for_gpus_old_and_new_without_atomics_and_with_wide_loads(tmp_path):
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=env,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 12
    assert not any("atom" in one or "red." in one for all_ in found.values() for one in all_)
    for name in ("moments 90", "normalize 90", "gradient_parts 90", "gradient 90"):
        assert "ld.global.v4.b32" in found[name]
