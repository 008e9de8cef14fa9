"""Which device a process computes on, what it says where that fails, and what ranks agree on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch as th
from test_train import loop, rows, trained, weights
from torch import multiprocessing as mp

from mm_diffusion import checkpoint, dist_util
from mm_diffusion.devices import gpus
from mm_diffusion.dist_util import MaxOfRanks, setup_dist
from mm_diffusion.training.states import states_in

REPOSITORY = Path(__file__).parents[1]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.fixture
def gpu(monkeypatch):
    """Makes a GPU of this compute capability, in a build for CUDA 13."""

    def make(capability=None, error=None):
        def get(device):
            if error:
                raise error
            return capability

        monkeypatch.setattr(th.cuda, "get_device_capability", get)
        monkeypatch.setattr(th.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(th.cuda, "get_arch_list", lambda: CU130)
        return th.device("cuda", 0)

    return make


def test_an_old_driver_is_one_line_with_the_builds_that_older_drivers_run(gpu):
    """Fault: a traceback of torch's."""
    old = RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nSee")
    with pytest.raises(ValueError, match=r"GPU 0: The NVIDIA .* 12040.*; .*cu126 R525") as caught:
        gpus.check_gpu(gpu(error=old))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("capability", "remedy"),
    [((7, 0), r"torch==\S+ .*/whl/cu126"), ((6, 1), "whl/cu126"), ((3, 5), "no build")],
)
def test_a_gpu_without_kernels_is_one_line_with_the_build_to_install(gpu, capability, remedy):
    """Fault: a V100 failed at its first operation, with "no kernel image"."""
    name = f"{capability[0]}.{capability[1]}"
    with pytest.raises(ValueError, match=rf"no kernels for Some GPU .*{name}\); .*{remedy}"):
        gpus.check_gpu(gpu(capability))


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (12, 0)])
def test_a_gpu_with_kernels_of_its_own_or_of_an_earlier_minor_is_taken(gpu, capability):
    gpus.check_gpu(gpu(capability))


def test_ptx_is_compiled_for_what_is_later_and_binaries_are_not():
    assert gpus._has_kernels_for(10, 0, ["sm_80", "compute_90"])
    assert not gpus._has_kernels_for(10, 0, ["sm_80", "sm_90a"])
    assert not gpus._has_kernels_for(8, 0, ["sm_86", "compute_90"])


def test_a_driver_without_a_usable_gpu_is_a_warning(tmp_path, monkeypatch, capsys):
    """Fault: training began on the CPU without a word."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(th.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(gpus, "GPU_FILES", (tmp_path, "nvidia[0-9]*"))
    (tmp_path / "nvidiactl").touch()
    assert setup_dist().device.type == "cpu"
    assert capsys.readouterr().out == ""
    (tmp_path / "nvidia0").touch()
    setup_dist()
    assert "warning: /dev/nvidia0 exists" in capsys.readouterr().out
    assert gpus.unused_gpus(8).startswith("/dev/nvidia0")


def test_several_ranks_without_a_gpu_are_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "GPU_FILES", (tmp_path, "nvidia[0-9]*"))
    assert gpus.unused_gpus(8) == "no GPU found: 8 ranks compute on the CPU"
    assert gpus.unused_gpus(1) == ""


@pytest.fixture
def backends():
    """Puts torch's settings back."""
    cudnn, attention = th.backends.cudnn, th.backends.cuda
    before = cudnn.benchmark, cudnn.allow_tf32, attention.cudnn_sdp_enabled()
    yield
    cudnn.benchmark, cudnn.allow_tf32 = before[:2]
    attention.enable_cudnn_sdp(before[2])
    th.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gpus_do_without_cudnns_attention_and_are_deterministic_on_request(
    backends, monkeypatch, deterministic
):
    monkeypatch.setattr(os, "environ", {})
    gpus.tune_gpus(deterministic)
    assert not th.backends.cuda.cudnn_sdp_enabled()
    assert th.backends.cuda.flash_sdp_enabled()
    assert th.backends.cudnn.benchmark is not deterministic
    assert th.are_deterministic_algorithms_enabled() is deterministic
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, ""),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
    ],
)
def test_launchers_leave_the_users_settings_of_the_allocator_alone(variables, wanted):
    """Fault: ours won over PYTORCH_CUDA_ALLOC_CONF, the name that most users know."""
    script = f"source {REPOSITORY}/ssh_scripts/env.sh; echo ${{PYTORCH_ALLOC_CONF:-}}"
    env = {"PATH": "/usr/bin:/bin", "HOME": "/", **variables}
    done = subprocess.run(
        ["bash", "-c", script], env=env, capture_output=True, text=True, check=True, timeout=20
    )
    assert done.stdout.strip() == wanted


def test_without_a_limit_gradients_are_not_multiplied(tmp_path, monkeypatch):
    """Fault: an infinite limit multiplied all gradients by one."""
    monkeypatch.setattr(th.nn.utils, "clip_grad_norm_", lambda *args: pytest.fail("clipped"))
    trainer = trained(tmp_path / "free", 1)
    trainer._log()
    assert float(rows(tmp_path / "free")[-1]["grad_norm"]) > 0


# ------------------------------------------------------------ ranks


def rank_main(rank, port, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    th.set_num_threads(1)
    world = setup_dist()
    result = {"votes": votes(rank)}
    if rank == 1:  # which has nothing to read
        checkpoint.load = None
    trainer = loop(f"{folder}/run", world=world, flags={"as_built": True}, max_steps=2)
    result |= {"step": trainer.step, "samples": trainer.samples}
    state = trainer.optimizer.state_dict()["state"]
    result["restored"] = weights(trainer) | {f"ema {n}": x for n, x in enumerate(averages(trainer))}
    result["moments"] = [x for values in state.values() for x in values.values()]
    result |= {"stopped": stopped_by_rank_1(f"{folder}/stopped", world)}
    th.save(result, f"{folder}/result{rank}.pt")
    th.distributed.destroy_process_group()


def averages(trainer):
    return [x for ema in trainer.emas.values() for x in ema]


def votes(rank):
    """What each call gives, and whether rank 0 waited for rank 1, which is late."""
    agree, given = MaxOfRanks(), []
    start = time.monotonic()
    if rank == 1:
        time.sleep(1)
    given.append(agree(0))
    waited = time.monotonic() - start
    given += [agree(2 * rank), agree(0), agree(0), agree.wait()]
    return given, waited


def stopped_by_rank_1(folder, world):
    """Steps done when the loader of rank 1 ends with a signal; previews made; steps of others."""
    previews = []
    trainer = loop(folder, world=world, preview=lambda model, step: previews.append(step))
    batches, received = trainer.data, []

    def data():
        for step, batch in enumerate(batches):
            if world.rank == 1 and step == 3:
                received.append("SIGTERM")
                raise RuntimeError("the loader was stopped")
            yield batch

    trainer.data = data()
    signals = pytest.MonkeyPatch()
    signals.setattr("mm_diffusion.train_util.stop_signals", lambda: Received(received))
    trainer.run_loop()
    signals.undo()
    return trainer.step, previews


class Received(list):
    """A context like that of signals, with what is received by hand."""

    def __init__(self, received):
        self.received = received

    def __enter__(self):
        return self.received

    def __exit__(self, *error):
        pass


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    first = loop(folder / "run", batch_size=4, max_steps=2)
    first.run_loop()
    mp.spawn(rank_main, (dist_util._free_port(), str(folder)), nprocs=2)
    found = [th.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(2)]
    return first, found, folder


def test_a_vote_is_known_one_call_later_on_all_ranks_and_nobody_waits(ranks):
    """Fault: every step waited for the slowest rank, for 0.7 to 6 ms."""
    _, (first, second), _ = ranks
    assert first["votes"][0] == second["votes"][0] == [0, 0, 2, 0, 0]
    assert first["votes"][1] < 0.8
    assert second["votes"][1] >= 1


def test_a_signal_to_one_rank_stops_all_after_the_same_step_though_its_loader_is_gone(ranks):
    _, found, folder = ranks
    assert [one["stopped"] for one in found] == [(3, []), (3, [])]
    assert [state.step for state in states_in(str(folder / "stopped"))] == [3]


def test_a_state_is_read_by_rank_0_alone_and_all_ranks_have_it_to_the_last_bit(ranks):
    """Fault: every rank read 2.1 GB."""
    first, found, _ = ranks
    state = first.optimizer.state_dict()["state"]
    wanted = weights(first) | {f"ema {n}": x for n, x in enumerate(averages(first))}
    moments = [x for values in state.values() for x in values.values()]
    for one in found:
        assert (one["step"], one["samples"]) == (2, 8)
        assert one["restored"].keys() == wanted.keys()
        assert all(th.equal(one["restored"][name], x) for name, x in wanted.items())
        assert all(th.equal(a, b) for a, b in zip(one["moments"], moments, strict=True))


def test_a_single_process_has_its_own_vote_at_once():
    agree = MaxOfRanks()
    assert [agree(0), agree(2), agree.wait()] == [0, 2, 2]


def test_weights_of_convolutions_are_stored_as_their_kernels_read_them_with_equal_values():
    from mm_diffusion.nn import store_channels_last

    model, _ = tiny.build()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    store_channels_last(model)
    assert all(th.equal(x, before[name]) for name, x in model.state_dict().items())
    for name, weight in model.named_parameters():
        if weight.ndim == 4:
            assert weight.is_contiguous(memory_format=th.channels_last), name
        if weight.ndim == 3:
            for row in (weight.unsqueeze(2), weight.unsqueeze(-1)):
                assert row.is_contiguous(memory_format=th.channels_last), name


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla V100-SXM2-16GB", 125),
    ],
)
def test_the_published_rate_of_a_gpu_is_found_by_its_name(name, tflops):
    assert gpus.known_gpu(name).flops == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    ["NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A1000"],
)
def test_a_part_of_a_gpu_or_an_unknown_one_has_no_published_rate(name):
    assert gpus.known_gpu(name) is None


def test_no_gpu_reaches_more_than_is_published():
    for gpu in gpus.KNOWN_GPUS.values():
        assert 0 <= gpu.reached <= gpu.flops
        assert 50 < gpu.flops / gpu.bandwidth < 600  # FLOPs a byte, of all cards of these years


def check_gpu(report, *args):
    """Run the check of a machine."""
    env = os.environ | {
        "REPORT": str(report),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    command = ["bash", str(REPOSITORY / "ssh_scripts/check_gpu.sh"), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(th.cuda.is_available(), reason="has a GPU")
def test_the_check_of_a_machine_without_a_gpu_ends_in_a_verdict_and_a_report(tmp_path):
    done = check_gpu(tmp_path / "report.txt")
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last == f"check_gpu: FAILED: no usable GPU; report: {tmp_path / 'report.txt'}"
    assert "error: 0 GPUs found, 1 asked for" in (tmp_path / "report.txt").read_text()


def test_the_check_refuses_an_impossible_number_of_gpus(tmp_path):
    done = check_gpu(tmp_path / "report.txt", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: NUM_GPUS=0")
