"""What must hold on a GPU. Here it runs on one if there is one, else on the CPU as far as that can.

`bash ssh_scripts/check_gpu.sh` runs it and ends in a verdict.
"""

import itertools
import os
import shutil
import time

import pytest
import tiny
import torch as th
from test_train import loop, weights
from torch import multiprocessing as mp

from mm_diffusion import dist_util, nn
from mm_diffusion.config import TrainConfig
from mm_diffusion.cross_attention import (
    gather_windows,
    windows_by_index,
    windows_by_unfolding,
)
from mm_diffusion.devices import gpus
from mm_diffusion.dist_util import World, setup_dist
from mm_diffusion.sampling import Compiled, make_sampler, prepare, sample_joint, upsample_video
from mm_diffusion.script_util import create_model_and_diffusion
from mm_diffusion.train_util import TrainLoop
from mm_diffusion.tree import tree_map
from mm_diffusion.unet import window_shift

IS_GPU = th.cuda.is_available()
DEVICE = th.device("cuda" if IS_GPU else "cpu", 0 if IS_GPU else None)
NUM_GPUS = int(os.environ.get("NUM_GPUS", th.cuda.device_count()))
on_gpu = pytest.mark.skipif(not IS_GPU, reason="needs a GPU")
LEAST_SHARE = 0.15  # of the measured matrix rate, of a published training step


@pytest.fixture(scope="module", autouse=True)
def tuned():
    """The settings of training."""
    if IS_GPU:
        th.cuda.set_device(DEVICE)
        gpus.tune_gpus()


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
    times = 20
    th.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        a @ b
    th.cuda.synchronize()
    return 2 * size**3 * times / (time.perf_counter() - start)


@on_gpu
@pytest.mark.parametrize("dtype", [th.bfloat16, th.float16])
def test_half_precision_has_matrix_units(dtype):
    full, half = products_per_second(th.float32, 4096), products_per_second(dtype, 8192)
    print(f"{dtype}: {half / 1e12:.0f} TFLOP/s")  # noqa: T201
    assert half > 2 * full


# ------------------------------------------------------------ 3: attention

# [N, heads, queries, keys, dim]; on a GPU those of the published networks
SHAPES = [(6, 2, 20, 20, 16), (4, 2, 64, 64, 32), (3, 1, 65, 130, 16)]
if IS_GPU:
    SHAPES += [(4096, 4, 20, 20, 64), (1024, 4, 20, 20, 96), (80, 4, 1024, 1024, 64)]
    SHAPES += [(80, 4, 1024, 250, 64), (80, 8, 64, 500, 64), (20, 4, 1024, 1024, 192)]


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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_in_bfloat16_has_the_value_and_gradients_of_float32(shape):
    half = random_heads(shape)
    found = attention_and_gradients(nn.attend_heads, *half)
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
    wanted, losses, _ = gradient(tmp_path / "a", th.device("cpu"), steps=2)
    found, on_device_losses, _ = gradient(tmp_path / "b", steps=2)
    assert cosine(found, wanted) > 0.999
    assert on_device_losses == pytest.approx(losses, rel=1e-3)
    half, half_losses, _ = gradient(tmp_path / "c", precision="bf16")
    assert cosine(half, wanted) > 0.99
    assert half_losses == pytest.approx(losses[:1], rel=2e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"] if IS_GPU else ["bf16"])
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


@on_gpu
def test_recomputing_has_the_same_gradients_in_less_memory(tmp_path):
    results, peaks = [], []
    for use_checkpoint in (False, True):
        th.cuda.reset_peak_memory_stats()
        flags = {"use_checkpoint": use_checkpoint}
        results.append(gradient(tmp_path / str(use_checkpoint), flags=flags)[0])
        peaks.append(th.cuda.max_memory_allocated())
    assert cosine(*results) > 0.9999
    assert peaks[1] < peaks[0]


@on_gpu
@pytest.mark.parametrize("mode", ["True", "reduce-overhead"])
def test_compiled_training_has_the_same_gradients_and_sees_averaged_weights(tmp_path, mode):
    plain, _, _ = gradient(tmp_path / "plain", precision="bf16")
    found, _, trainer = gradient(tmp_path / mode, precision="bf16", compile=mode)
    assert isinstance(trainer.forward_model, Compiled)
    assert cosine(found, plain) > 0.999
    with th.no_grad(), window_shift("max"):
        inputs = [x.to(DEVICE) for x in tiny.inputs()]
        before = trainer.forward_model(*inputs)[0]
        for parameter in trainer.params:
            parameter.mul_(1.1)
        assert relative(trainer.forward_model(*inputs)[0], before.cpu()) > 1e-2


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
    video = th.rand(5, 3, 8, 8) * 2 - 1
    options = {"seed": 0, "index": 0, "device": DEVICE}
    whole, parts = (
        upsample_video(network, sampler, video, frames_at_once=n, **options) for n in (5, 2)
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


@on_gpu
@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
def test_two_gpus_have_the_gradient_of_one(tmp_path):
    mp.spawn(rank_main, (2, dist_util._free_port(), str(tmp_path)), nprocs=2)
    wanted, _, _ = gradient(tmp_path / "one")
    assert cosine(th.load(tmp_path / "gradient.pt").double(), wanted) > 0.9999


# ------------------------------------------------------------ 13, 14: memory and speed


@on_gpu
def test_memory_is_flat_over_50_steps(tmp_path):
    _, _, trainer = gradient(tmp_path, precision="bf16", steps=3)
    batch, used = on_device(tiny.clips(6, 2)), []
    for step in range(50):
        trainer.run_step(batch, {})
        if step % 10 == 9:
            trainer._log()
            used.append(th.cuda.memory_allocated())
    assert used[-1] <= used[0] + 2**20


@on_gpu
def test_a_published_training_step_reaches_a_share_of_the_matrix_rate(tmp_path):
    """At batch 4, or what fits."""
    batch_size = 4 if th.cuda.mem_get_info()[0] > 36 * 2**30 else 1
    model, diffusion = create_model_and_diffusion()
    config = TrainConfig(output_dir=str(tmp_path), batch_size=batch_size, precision="bf16")
    trainer = TrainLoop(model, diffusion, lambda start: iter(()), config, World(device=DEVICE))
    shapes = {"video": (20, 3, 64, 64), "audio": (2, 80000)}
    batch = {k: th.randn(batch_size, *s, device=DEVICE).clamp(-1, 1) for k, s in shapes.items()}
    for _ in range(3):
        trainer.run_step(batch, {})
    th.cuda.synchronize()
    start, steps = time.perf_counter(), 10
    for _ in range(steps):
        trainer.run_step(batch, {})
    th.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    rate = batch_size * 6.55e12 / seconds  # counted by benchmarks/roofline.py
    share = rate / products_per_second(th.bfloat16, 8192)
    memory = th.cuda.max_memory_allocated() / 2**30
    print(f"step of {batch_size} clips: {1e3 * seconds:.0f} ms, {share:.0%}, {memory:.1f} GiB")  # noqa: T201
    assert share > LEAST_SHARE
