"""What must hold on a GPU. Here it runs on one if there is one, else on the CPU as far as that can.

`bash ssh_scripts/check_gpu.sh` runs it and ends in a verdict.
"""

import gc
import itertools
import os
import re
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import golden_data
import pytest
import test_kill
import tiny
import torch as th
from test_dist import with_mpiexec
from test_train import loop, weights
from test_unet import BASE, INDEX, recorded_inputs
from torch import multiprocessing as mp
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import convolutions
import measure
import models

from mm_diffusion import dist_util, nn, train_util
from mm_diffusion.cross_attention import (
    gather_windows,
    windows_by_index,
    windows_by_unfolding,
)
from mm_diffusion.devices import gpus
from mm_diffusion.devices.compiled import Compiled
from mm_diffusion.dist_util import World, setup_dist
from mm_diffusion.sampling import DTYPES, make_sampler, prepare, sample_joint, upsample_video
from mm_diffusion.script_util import create_model_and_diffusion
from mm_diffusion.tree import tree_map
from mm_diffusion.unet import window_shift

IS_GPU = th.cuda.is_available()
DEVICE = th.device("cuda" if IS_GPU else "cpu", 0 if IS_GPU else None)
NUM_GPUS = int(os.environ.get("NUM_GPUS", th.cuda.device_count()))
on_gpu = pytest.mark.skipif(not IS_GPU, reason="needs a GPU")
enough_ranks = pytest.mark.skipif(IS_GPU and NUM_GPUS < 2, reason="needs two GPUs")
HAS_BF16 = not IS_GPU or th.cuda.is_bf16_supported(including_emulation=False)
HALF = [*(["bf16"] if HAS_BF16 else []), *(["fp16"] if IS_GPU else [])]
LEAST_SHARE = 0.15  # of the measured matrix rate, of a published training step
LEAST_PEAK_SHARE = 0.4  # of the published rate, of large matrix products


@pytest.fixture(scope="module", autouse=True)
def tuned(tmp_path_factory):
    """The settings of training; no record of an earlier check makes --compile auto compile."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MM_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        if IS_GPU:
            th.cuda.set_device(DEVICE)
            gpus.tune_gpus()
        yield


def on_device(tree):
    return tree_map(lambda x: x.to(DEVICE), tree)


def decibels(found, wanted):
    """Signal to noise ratio."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float(10 * th.log10(wanted.square().sum() / (found - wanted).square().sum()))


def relative(found, wanted):
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm())


# ------------------------------------------------------------ 1, 2: the machine


@on_gpu
def test_this_build_has_kernels_for_this_gpu_and_workers_have_shared_memory():
    gpus.check_gpu(DEVICE)
    assert shutil.disk_usage("/dev/shm").total >= 2**30, "see docs/GPU.md, Docker"


def products_per_second(dtype, size):
    a, b = (th.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    assert (a @ b).isfinite().all()
    return 2 * size**3 / seconds_per_call(lambda: a @ b, times=20)


def seconds_per_call(call, times):
    """After a call to warm up."""
    call()
    measure.synchronise()
    start = time.perf_counter()
    for _ in range(times):
        call()
    measure.synchronise()
    return (time.perf_counter() - start) / times


def test_products_per_second_count_each_product_and_sum_as_two(monkeypatch):
    """With a clock that a product moves on by 10 ms."""
    clock, product = [0.0], th.Tensor.__matmul__

    def timed(a, b):
        clock[0] += 0.01
        return product(a, b)

    monkeypatch.setattr(th.Tensor, "__matmul__", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert products_per_second(th.float32, 16) == pytest.approx(2 * 16**3 / 0.01)


@on_gpu
@pytest.mark.parametrize("precision", HALF)
def test_half_precision_reaches_a_share_of_the_published_rate(precision):
    """Or, on a GPU without a published rate, more than float32 by far."""
    dtype, name = DTYPES[precision], th.cuda.get_device_name(DEVICE)
    full, half = products_per_second(th.float32, 4096), products_per_second(dtype, 8192)
    known = gpus.known_gpu(name)
    share = f"{half / known.flops:.0%} of the published rate" if known else "unknown peak"
    print(f"{name}, {precision}: {half / 1e12:.0f} TFLOP/s, {share}")  # noqa: T201
    assert half > (LEAST_PEAK_SHARE * known.flops if known else 2 * full)


# ------------------------------------------------------------ 3: attention


def attention_shapes(name, batch):
    """[N, heads, queries, keys, dim] of attention in a pass, which is not computed."""
    found = []

    def attend_heads(q, k, v):
        n, heads, queries, dim = q.shape
        found.append((n, heads, queries, k.shape[-2], dim))
        return q.movedim(1, 2).flatten(2)

    with pytest.MonkeyPatch.context() as patched, FakeTensorMode(), window_shift("max"):
        patched.setattr(nn, "attend_heads", attend_heads)
        models.forward_of(models.create(models.MODELS[name])[0], batch)()
    return list(dict.fromkeys(found))


# Odd ones; on a GPU those of the published networks as well
SHAPES = [(6, 2, 20, 20, 16), (4, 2, 64, 64, 32), (3, 1, 65, 130, 16)]
if IS_GPU:
    SHAPES += attention_shapes("base", 4) + attention_shapes("upsampler", 20)
NO_KERNEL = re.compile("No available kernel|No viable backend")  # torch on GPUs, on CPUs
# None: as training has it. cuDNN's is off in training.
BACKENDS = [None, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def test_the_shapes_of_attention_are_those_of_the_networks():
    """Frames of a pixel, pixels of a frame, windows of the other modality, all of its tokens."""
    shapes = attention_shapes("small_base", 2)  # 8 frames of 32 x 32, 8,192 samples
    assert (2 * 16 * 16, 4, 8, 8, 32) in shapes
    assert (2 * 8, 4, 16 * 16, 16 * 16, 32) in shapes
    assert all(n % 2 == 0 and dim % 8 == 0 for n, _, _, _, dim in shapes)
    upsampled = {(20, 4, 1024, 1024, 96), (20, 4, 256, 256, 192), (20, 4, 64, 64, 192)}
    assert set(attention_shapes("upsampler", 20)) == upsampled


def exact_attention(q, k, v):
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def attention_and_gradients(function, q, k, v):
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*given)
    return [out, *th.autograd.grad(out.float().square().sum(), given)]


def random_heads(shape):
    n, heads, queries, keys, dim = shape
    th.manual_seed(0)
    lengths = (queries, keys, keys)
    return [th.randn(n, heads, m, dim, device=DEVICE).bfloat16() for m in lengths]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_in_bfloat16_has_the_value_and_gradients_of_float32(shape, backend):
    half = random_heads(shape)
    with sdpa_kernel(backend) if backend else nullcontext():
        try:
            found = attention_and_gradients(nn.attend_heads, *half)
        except RuntimeError as error:
            if backend and NO_KERNEL.search(str(error)):
                pytest.skip(f"no {backend} here")
            raise
    wanted = attention_and_gradients(exact_attention, *(x.float() for x in half))
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) < 1e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_stays_finite_where_all_logits_are_far_below_zero(shape):
    q, k, v = random_heads(shape)
    q[..., 0], k[..., 0] = 4, -30 * q.shape[-1] ** 0.5  # logits of about -120
    assert all(x.isfinite().all() for x in attention_and_gradients(nn.attend_heads, q, k, v))


@pytest.mark.parametrize("count", [65535, 65536, 70000])
def test_attention_of_many_sequences_is_that_of_each(count, monkeypatch):
    """Fault: from 65,536 on the kernels of GPUs fail."""
    th.manual_seed(0)
    q, k, v = (th.randn(count, 1, 2, 8, device=DEVICE) for _ in range(3))
    most, called = nn.max_sequences(q, k), []
    real = nn._attend_heads
    monkeypatch.setattr(nn, "_attend_heads", lambda *args: called.append(1) or real(*args))
    found = attention_and_gradients(nn.attend_heads, q, k, v)
    assert len(called) == -(-count // most)
    last = slice(count - 3, count)
    wanted = attention_and_gradients(exact_attention, *(x[last] for x in (q, k, v)))
    for a, b in zip(found, wanted, strict=True):
        th.testing.assert_close(a[last], b, rtol=1e-4, atol=1e-4)


def test_sequences_at_a_time_keep_within_the_grid_and_within_32_bits():
    meta = {"device": "meta"}
    short, long = th.empty(1, 4, 20, 64, **meta), th.empty(1, 4, 4096, 192, **meta)
    assert nn.max_sequences(short, short) * 4 * 128 * 64 < 2**31
    assert nn.max_sequences(long, long) * 4 * 4096 * 192 < 2**31
    assert nn.max_sequences(th.empty(1, 1, 1, 8, **meta), short) < 65536


# ------------------------------------------------------------ 4: windows


@pytest.mark.parametrize("tokens", [24, 27, 29])
def test_windows_by_unfolding_are_those_by_index_in_value_and_gradient(tokens):
    """For all windows and shifts; 27 and 29 tokens leave a rest."""
    th.manual_seed(0)
    frames, per_frame = 6, tokens // 6
    x = th.randn(2, tokens, 3, dtype=th.float64, device=DEVICE, requires_grad=True)
    for window, shift in itertools.product(range(1, frames + 1), range(frames)):
        if shift + window > frames or window * per_frame == tokens:
            continue
        first = shift * per_frame
        sizes = {"count": frames, "size": window * per_frame, "stride": per_frame}
        wanted = windows_by_index(x, first, **sizes)
        grad = th.randn_like(wanted)
        (wanted_slope,) = th.autograd.grad(wanted, x, grad)
        for start in (first, th.tensor(first, device=DEVICE)):
            found = windows_by_unfolding(x, start, **sizes)
            assert th.equal(found, wanted)
            (slope,) = th.autograd.grad(found, x, grad)
            assert relative(slope, wanted_slope.cpu()) < 1e-15


def test_a_frames_window_is_the_one_of_the_definition():
    x = th.arange(27.0)[None, :, None]
    windows = gather_windows(x, 12, count=6, size=8, stride=4)
    assert windows.shape == (6, 8, 1)
    assert windows[3, :, 0].tolist() == [24, 25, 26, 0, 1, 2, 3, 4]


# ------------------------------------------------------------ 5, 6: networks and steps


def outputs(model, precision):
    with th.no_grad(), window_shift("max"):
        return prepare(model, precision)(*(x.to(DEVICE) for x in tiny.inputs()))


def test_the_network_is_that_of_the_cpu_in_float32_and_close_in_bfloat16():
    model, _ = tiny.build()
    with th.no_grad(), window_shift("max"):
        wanted = model(*tiny.inputs())
    model = model.to(DEVICE)
    for a, b in zip(outputs(model, "fp32"), wanted, strict=True):
        assert relative(a, b) < 1e-4
    for a, b in zip(outputs(model, "bf16"), wanted, strict=True):
        assert decibels(a, b) > 30


@pytest.mark.parametrize("case", BASE if IS_GPU else BASE[:1])
def test_networks_give_the_published_figures(case):
    facts, recorded = INDEX[case], golden_data.arrays(case)
    model = tiny.filled(create_model_and_diffusion(**facts["config"])[0]).eval().to(DEVICE)
    inputs = [x.to(DEVICE) for x in recorded_inputs(case).values()]
    with th.no_grad(), window_shift(facts["policy"]):
        found = model(*inputs, th.tensor(facts["timesteps"], device=DEVICE))
    for name, value in zip(("video_out", "audio_out"), found, strict=True):
        wanted = th.from_numpy(recorded[name])
        if name == "audio_out":  # with learned sigma the published audio lacks the variances
            value = value[:, : wanted.shape[1]]
        assert relative(value, wanted) < 1e-4


def gradient(folder, device=DEVICE, steps=1, **options):
    """The gradient of the last step, and losses, of a trainer on the device."""
    trainer = loop(folder, world=World(device=device), **options)
    grads, losses = [], []
    whole = trainer._optimize

    def keep():
        grads.append(th.cat([p.grad.flatten() for p in trainer.params]).double().cpu())
        return whole()

    trainer._optimize = keep
    for step in range(steps):
        trainer.run_step({k: x.to(device) for k, x in tiny.clips(2 * step, 2).items()}, {})
        losses.append(th.cat(trainer.averages.values["loss"]).mean().item())
    return grads[0], losses, trainer


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_gradients_and_losses_are_those_of_the_cpu(tmp_path):
    wanted, losses, _ = gradient(tmp_path / "a", th.device("cpu"), steps=3)
    found, on_device_losses, _ = gradient(tmp_path / "b", steps=3)
    assert cosine(found, wanted) > 0.999
    assert on_device_losses == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("precision", HALF)
def test_gradients_and_losses_in_half_precision_are_close_to_those_of_float32(tmp_path, precision):
    wanted, losses, _ = gradient(tmp_path / "a", th.device("cpu"), steps=3)
    half, half_losses, trainer = gradient(tmp_path / "b", precision=precision, steps=3)
    assert cosine(half, wanted) > 0.99
    assert half_losses == pytest.approx(losses, rel=2e-2)
    assert all(x.isfinite().all() for x in trainer.params)


@pytest.mark.parametrize("precision", HALF)
def test_a_gradient_of_inf_leaves_weights_and_the_optimizers_count(tmp_path, precision):
    _, _, trainer = gradient(tmp_path, precision=precision)
    before, count = weights(trainer), [s["step"].clone() for s in trainer.optimizer.state.values()]
    trainer.params[0].register_hook(lambda grad: grad * float("inf"))
    trainer.run_step(on_device(tiny.clips(2, 2)), {})
    assert all(th.equal(before[name], x) for name, x in weights(trainer).items())
    after = [s["step"] for s in trainer.optimizer.state.values()]
    assert all(th.equal(a, b) for a, b in zip(count, after, strict=True))
    assert trainer.skipped[0] == 1


# ------------------------------------------------------------ 7 to 10: the trainer


def test_a_saved_run_resumes_with_the_same_tensors(tmp_path):
    _, _, trainer = gradient(tmp_path)
    trainer.save(preview=False)
    resumed = loop(tmp_path, world=World(device=DEVICE))
    assert resumed.step == 1
    assert all(th.equal(x, weights(resumed)[name]) for name, x in weights(trainer).items())
    for a, b in zip(trainer.params, resumed.params, strict=True):
        assert a.stride() == b.stride()
        for key, moment in trainer.optimizer.state[a].items():
            assert th.equal(moment, resumed.optimizer.state[b][key])


@on_gpu
def test_a_step_makes_the_host_wait_for_nothing(tmp_path):
    _, _, trainer = gradient(tmp_path, precision="bf16", steps=2)
    batch = on_device(tiny.clips(4, 2))
    th.cuda.set_sync_debug_mode("error")
    try:
        trainer.run_step(batch, {})
    finally:
        th.cuda.set_sync_debug_mode("default")


def test_recomputing_has_the_same_gradients_in_less_memory(tmp_path):
    """The memory on GPUs only."""
    results, peaks = [], []
    for use_checkpoint in (False, True):
        flags = {"use_checkpoint": use_checkpoint}
        if IS_GPU:
            th.cuda.reset_peak_memory_stats()
        results.append(gradient(tmp_path / str(use_checkpoint), flags=flags)[0])
        if IS_GPU:
            peaks.append(th.cuda.max_memory_allocated())
    assert cosine(*results) > 0.9999
    assert not IS_GPU or peaks[1] < peaks[0]


@pytest.fixture
def compiler(monkeypatch):
    """Compiles for GPUs; on CPUs traces only, which is quick."""
    th._dynamo.reset()
    if not IS_GPU:
        monkeypatch.setattr(train_util, "Compiled", partial(Compiled, backend="eager"))
    yield {} if IS_GPU else {"backend": "eager"}
    th._dynamo.reset()


@pytest.mark.parametrize("mode", ["True", "blocks", "reduce-overhead"] if IS_GPU else ["blocks"])
def test_compiled_training_has_the_same_gradients_and_sees_averaged_weights(
    tmp_path, compiler, mode
):
    plain, _, _ = gradient(tmp_path / "plain", precision="bf16")
    found, _, trainer = gradient(tmp_path / mode, precision="bf16", compile=mode)
    assert isinstance(trainer.forward_model, Compiled)
    assert cosine(found, plain) > 0.999
    for ema in trainer.emas.values():
        th._foreach_mul_(ema, 1.1)
    with th.no_grad(), window_shift("max"):
        inputs = [x.to(DEVICE) for x in tiny.inputs()]
        trainer.forward_model.eval()
        before = trainer.forward_model(*inputs)[0]
        with trainer.ema_weights() as model:
            averaged, wanted = trainer.forward_model(*inputs)[0], model(*inputs)[0]
        after = trainer.forward_model(*inputs)[0]
    assert relative(averaged, before.cpu()) > 1e-2
    assert relative(averaged, wanted.cpu()) < 1e-4
    assert relative(after, before.cpu()) < 1e-6


@on_gpu
@pytest.mark.parametrize("mode", ["default", "blocks"])
def test_batches_of_4_to_1_compile_once(compiler, mode):
    """As test_compile.py has it for CPUs."""
    model, _ = tiny.build()
    network, graphs = prepare(model.to(DEVICE), "bf16", mode), []
    video, audio, t = (th.cat([x, x]).to(DEVICE) for x in tiny.inputs())
    with th.no_grad():
        for batch in (4, 3, 2, 1):
            network(video[:batch], audio[:batch], t[:batch])
            graphs.append(th._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


# ------------------------------------------------------------ 11: sampling


def test_a_clip_is_the_same_alone_and_in_a_batch_and_in_a_rerun():
    model, diffusion = tiny.build(timestep_respacing="3")
    network, sampler = prepare(model.to(DEVICE)), make_sampler("ddim", diffusion)
    alone, again, batch = (
        sample_joint(network, sampler, indices, 1, DEVICE) for indices in ([3], [3], [0, 1, 2, 3])
    )
    for name, clip in alone.items():
        assert th.equal(clip, again[name])
        assert decibels(batch[name][3:], clip) > 30


def test_a_frame_does_not_depend_on_how_many_are_upsampled_at_a_time():
    model, diffusion = tiny.build_upsampler(sr_timestep_respacing="2")
    network, sampler = prepare(model.to(DEVICE)), make_sampler("ddim", diffusion)
    video = th.rand(20, 3, 8, 8) * 2 - 1
    options = {"seed": 0, "index": 0, "device": DEVICE}
    whole, parts = (
        upsample_video(network, sampler, video, frames_at_once=n, **options) for n in (20, 7)
    )
    assert decibels(parts, whole) > 30


# ------------------------------------------------------------ 12: several GPUs


def rank_main(rank, size, port, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = setup_dist()
    trainer = loop(folder, world=world, batch_size=1)
    batch = {k: x.to(world.device) for k, x in tiny.clips(rank, 1).items()}
    trainer._optimize = lambda: th.zeros((), device=world.device)
    trainer.run_step(batch, {})
    if rank == 0:
        th.save(th.cat([p.grad.flatten() for p in trainer.params]).cpu(), f"{folder}/gradient.pt")
    th.distributed.destroy_process_group()


@enough_ranks
def test_two_ranks_have_the_gradient_of_one(tmp_path):
    """By NCCL on GPUs, by gloo on CPUs."""
    mp.spawn(rank_main, (2, dist_util._free_port(), str(tmp_path)), nprocs=2)
    wanted, _, _ = gradient(tmp_path / "one")
    assert cosine(th.load(tmp_path / "gradient.pt").double(), wanted) > 0.9999


@enough_ranks
@with_mpiexec
def test_a_rank_that_is_killed_ends_the_other_within_a_minute(tmp_path):
    process, ranks = test_kill.start(tmp_path / "run")
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(60) != 0


# ------------------------------------------------------------ 13, 14: memory and speed


def bytes_in_use():
    """Of tensors."""
    if IS_GPU:
        return th.cuda.memory_allocated()
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (th.Tensor, th.nn.Parameter)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def test_memory_is_flat_over_50_steps(tmp_path):
    """On CPUs over 6."""
    _, _, trainer = gradient(tmp_path, precision="bf16", steps=3)
    del trainer._optimize  # that of `gradient`, which keeps gradients
    batch, used = on_device(tiny.clips(6, 2)), []
    for _ in range(5 if IS_GPU else 2):
        for _ in range(10 if IS_GPU else 3):
            trainer.run_step(batch, {})
        trainer._log()
        used.append(bytes_in_use())
    assert used[-1] <= used[0] + (2**20 if IS_GPU else 2**10)


# Size -> FLOPs of a pass of one clip or frame; those of published sizes as counted by
# benchmarks/roofline.py
PUBLISHED = {"base": 2.11e12, "upsampler": 1.265e12}


def shown(what, seconds, share):
    """Also in the report of check_gpu.sh."""
    memory = th.cuda.max_memory_allocated() / 2**30 if IS_GPU else 0
    flagged = "  LOW" if share < LEAST_SHARE else ""
    text = f"{what}: {1e3 * seconds:.0f} ms, {share:.0%} of the matrix rate"
    print(f"{text}, {memory:.1f} GiB{flagged}")  # noqa: T201


def share_of_step(folder, name, batch_size, flop):
    """What share of the matrix rate a training step reaches; the backward pass is two passes."""
    loop = models.train_loop(models.MODELS[name], "bf16", str(folder))
    batch = models.sample_of(loop.model, batch_size)
    for _ in range(2):
        loop.run_step(*batch)
    seconds = seconds_per_call(lambda: loop.run_step(*batch), times=10 if IS_GPU else 1)
    loop.lock.close()
    share = 3 * batch_size * flop / seconds / products_per_second(th.bfloat16, MATRIX)
    shown(f"step of {batch_size} clips", seconds, share)
    return share


def share_of_pass(name, images, flop):
    """What share of the matrix rate a pass of the upsampler reaches."""
    network = prepare(models.build(models.MODELS[name])[0], "bf16")
    seconds = seconds_per_call(models.forward_of(network, images), times=5 if IS_GPU else 1)
    share = images * flop / seconds / products_per_second(th.bfloat16, MATRIX)
    shown(f"upsampler pass of {images} frames", seconds, share)
    return share


MATRIX = 8192 if IS_GPU else 256


@on_gpu
def test_a_published_training_step_reaches_a_share_of_the_matrix_rate(tmp_path):
    """At batch 4, or what fits."""
    share = share_of_step(tmp_path, "base", models.batch_that_fits(), PUBLISHED["base"])
    assert share > LEAST_SHARE


@on_gpu
def test_a_pass_of_the_published_upsampler_reaches_a_share_of_the_matrix_rate():
    assert share_of_pass("upsampler", 20, PUBLISHED["upsampler"]) > LEAST_SHARE


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(models.MODELS, "base", models.Size(tiny.FLAGS))
    monkeypatch.setitem(models.MODELS, "upsampler", models.Size(tiny.SR_FLAGS, upsampler=True))


def test_steps_and_passes_are_shown_with_their_share(small, tmp_path, capsys):
    """Of small models, on any machine; a millionth of the matrix rate is flagged."""
    assert share_of_step(tmp_path, "base", 2, models.forward_flop(models.MODELS["base"])) > 0
    assert share_of_pass("upsampler", 2, 1.0) > 0
    step, upsampled = capsys.readouterr().out.splitlines()[-2:]
    assert step.startswith("step of 2 clips: ")
    assert upsampled.startswith("upsampler pass of 2 frames: ")
    assert upsampled.endswith("  LOW")


@on_gpu
@pytest.mark.parametrize(("name", "batch"), [("base", 4), ("upsampler", 20)])
def test_every_convolution_of_a_published_pass_is_shown(name, batch):
    network = prepare(models.build(models.MODELS[name])[0], "bf16")
    batch = min(batch, models.batch_that_fits()) if name == "base" else batch
    rate = products_per_second(th.bfloat16, MATRIX)
    rows = convolutions.table(models.forward_of(network, batch), th.bfloat16, rate)
    print("\n".join([f"convolutions of {name}, forward, then both gradients:", *rows]))  # noqa: T201
    assert rows


def test_convolutions_are_counted_with_all_their_work_and_low_rates_flagged(small, monkeypatch):
    monkeypatch.setattr(convolutions, "BUDGET", 0.0)
    model = prepare(models.build(models.MODELS["upsampler"])[0], "fp32")
    call = models.forward_of(model, 2)
    found = convolutions.convolutions_of(call)
    work = {conv: convolutions.reached(conv, th.float32, 0.0).flop for conv in found}
    with measure.FlopCounterMode(display=False) as counter, th.no_grad():
        call()
    counted = counter.get_flop_counts()["Global"][th.ops.aten.convolution]
    assert sum(count * work[conv] for conv, count in found.items()) == counted
    conv, count = next(iter(found.items()))
    for rate, is_low in ((0.9e12, False), (0.1e12, True)):
        reached = convolutions.Reached(1, forward=0.9e12, backward=rate)
        assert convolutions.row(conv, count, reached, 1e12).endswith("LOW") is is_low
    assert len(convolutions.table(call, th.float32, 1e9)) == len(found)
