"""torch.compile: the same values and gradients, compiled once, and when --compile auto compiles."""

import math
import shutil
from functools import partial

import pytest
import tiny
import torch as th

from mm_diffusion import checkpoint, rng, train_util
from mm_diffusion.config import DiffusionConfig, SamplingConfig, TrainConfig
from mm_diffusion.config.flags import compile_mode
from mm_diffusion.devices import compile_choice
from mm_diffusion.devices.compile_choice import MIN_PASSES, choose_compilation
from mm_diffusion.devices.compiled import Compiled, require_compiler
from mm_diffusion.generation import load
from mm_diffusion.sampling import make_sampler, prepare, sample_joint
from mm_diffusion.script_util import create_diffusion
from mm_diffusion.train_util import TrainLoop
from mm_diffusion.unet import window_shift

# Traces, guards and recompiles like any other, and calls the operators as they are
EAGER = {"backend": "eager"}


@pytest.fixture
def no_recompilation():
    """Within it every network is compiled once at most."""
    th._dynamo.reset()
    th._dynamo.utils.counters.clear()
    yield th._dynamo.utils.counters["stats"]
    th._dynamo.reset()


@pytest.mark.parametrize("way", ["default", "blocks"])
def test_compiled_once_it_serves_all_window_shifts_timesteps_and_smaller_batches(
    no_recompilation, way
):
    """With rotary positions, and a timestep per modality."""
    model, _ = tiny.build(cross_attention_rope=True)
    plain, compiled = prepare(model), prepare(model, "fp32", way, **EAGER)
    video, audio, t = tiny.inputs()
    graphs = []
    with th.no_grad():
        for shift, step, batch in (("zero", 0, 2), ("max", 50, 2), ("zero", 7, 1), (None, 99, 2)):
            steps = (t[:batch] + step) % 100
            given = video[:batch], audio[:batch], {"video": steps, "audio": steps // 2}
            outs = []
            for network in (plain, compiled):
                with window_shift(shift or rng.generator(3)):
                    outs.append(network(*given))
            for a, b in zip(*outs, strict=True):
                th.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            graphs.append(no_recompilation["unique_graphs"])
    assert set(graphs) == {graphs[0]}
    # Blocks of equal shapes share a graph.
    assert graphs[0] == 1 if way == "default" else 1 < graphs[0] < len(list(model.blocks()))


def test_the_upsampler_is_one_graph_too(no_recompilation):
    model, _ = tiny.build_upsampler()
    plain, compiled = prepare(model), prepare(model, "fp32", "default", **EAGER)
    x, low_res = th.randn(3, 3, 32, 32), th.randn(3, 3, 8, 8)
    with th.no_grad():
        for batch in (3, 2):
            given = x[:1].expand(batch, -1, -1, -1), th.full((batch,), 10 * batch)
            th.testing.assert_close(
                compiled(*given, low_res=low_res[:batch]),
                plain(*given, low_res=low_res[:batch]),
                rtol=1e-5,
                atol=1e-5,
            )
    assert no_recompilation["unique_graphs"] == 1


@pytest.mark.parametrize("way", ["True", "blocks"])
def test_compiled_training_has_the_same_gradients_and_published_names(
    tmp_path, monkeypatch, no_recompilation, way
):
    """With recomputed activations, whose window shifts must be those of the forward pass."""
    monkeypatch.setattr(train_util, "Compiled", partial(Compiled, **EAGER))
    trainers, gradients, graphs = {}, {}, []
    for mode in ("False", way):
        config = TrainConfig(output_dir=str(tmp_path / mode), batch_size=2, compile=mode)
        model, diffusion = tiny.build(use_checkpoint=True)
        trainers[mode] = trainer = TrainLoop(model, diffusion, lambda start: iter(()), config)
        trainer._optimize = lambda: th.zeros(())
        for step in range(2):
            trainer.run_step(tiny.clips(2 * step, 2), {})
            graphs.append(no_recompilation["unique_graphs"])
        gradients[mode] = th.cat([p.grad.flatten() for p in trainer.params])
    assert (gradients[way] - gradients["False"]).norm() < 1e-5 * gradients["False"].norm()
    assert isinstance(trainer.forward_model, Compiled)
    assert (
        trainer._published(trainer.params).keys() == checkpoint.published_state_dict(model).keys()
    )
    assert graphs[2] == graphs[3] > 0


def reusing(graph, example):
    """A backend that, like a CUDA graph, writes the results of every call to the same memory."""
    held = []

    def call(*args):
        outs = graph(*args)
        if not held:
            held.extend(out.clone() for out in outs)
        for mine, out in zip(held, outs, strict=True):
            mine.copy_(out)
        return tuple(held)

    return call


def test_results_of_a_graph_outlive_the_next_call(no_recompilation):
    """Order 3 needs those of three calls."""
    model, diffusion = tiny.build()
    sampler = make_sampler("dpm_solver", diffusion, steps=6)
    plain, graph = (
        sample_joint(network, sampler, [0, 1], 1)
        for network in (prepare(model), prepare(model, "fp32", "reduce-overhead", backend=reusing))
    )
    for name in plain:
        th.testing.assert_close(graph[name], plain[name], rtol=1e-4, atol=1e-4)


def test_graphs_and_microbatches_are_refused_together():
    options = {"output_dir": "x", "batch_size": 4, "microbatch": 2}
    with pytest.raises(ValueError, match="microbatch 2: a CUDA graph's gradients"):
        TrainConfig(compile="reduce-overhead", **options)
    assert TrainConfig(compile="True", **options).compile == "default"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_compiler_may_compute_again_rather_than_keep_float32_maps(monkeypatch, mode, capsys):
    """The log says what is compiled and how long it took, once."""
    asked = {}

    def compile_nothing(function, **options):
        asked.update(options)
        return function

    monkeypatch.setattr(th, "compile", compile_nothing)
    monkeypatch.setattr("mm_diffusion.devices.compiled.require_compiler", lambda: None)
    model, _ = tiny.build_upsampler()
    network = prepare(model, compile_mode=mode)
    assert asked["options"]["realize_reads_threshold"] > 4  # torch's own
    assert asked["options"]["realize_opcount_threshold"] > 30
    assert asked["options"].get("triton.cudagraphs", False) is (mode == "reduce-overhead")
    x, low_res = th.randn(1, 3, 32, 32), th.randn(1, 3, 8, 8)
    for _ in range(2):
        network(x, th.tensor([3]), low_res=low_res)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in lines[:1]] == ["compiling the network"]
    assert len(lines) == 2
    assert lines[1].startswith("compiled it in ")


def test_an_unknown_way_to_compile_is_refused():
    message = "compile 'fast': choose from auto, false, true, blocks, reduce-overhead, max-autotune"
    with pytest.raises(ValueError, match=message):
        TrainConfig(output_dir="x", compile="fast")
    with pytest.raises(ValueError, match=message):
        SamplingConfig(output_dir="x", compile="fast")


def test_no_compiler_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler found; install g\+\+"):
        require_compiler()
    assert compile_mode("compile", False) == ""


# ---------------------------------------------------------------- what auto does

H100 = "NVIDIA H100 80GB HBM3"
FAST = {
    "eager": {"compile": 0.0, "step": 0.13},
    "whole": {"compile": 80.0, "step": 0.10},
    "blocks": {"compile": 60.0, "step": 0.11},
}
SLOW_WHOLE = FAST | {"whole": {"compile": 120.5, "step": 0.10}}
NO_WHOLE = FAST | {"whole": None}
NO_GAIN = FAST | {way: {"compile": 50.0, "step": 0.14} for way in ("whole", "blocks")}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """An H100, as far as torch says what it is."""
    monkeypatch.setenv("MM_DIFFUSION_CACHE", str(tmp_path))
    monkeypatch.setattr(th.cuda, "get_device_name", lambda device: H100)
    monkeypatch.setattr(th.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compile_choice, "require_compiler", lambda: None)
    return th.device("cuda", 0)


@pytest.mark.parametrize(
    ("seconds", "passes", "way", "said"),
    [
        (FAST, math.inf, "default", "compiles as one graph, which took 80 s in the check"),
        (FAST, MIN_PASSES + 1, "default", "compiles as one graph"),
        (FAST, MIN_PASSES, "", "15,000 passes to do, a training step being 3; it pays beyond 15,0"),
        (FAST, 0, "", "not compiled: 0 passes to do"),
        (SLOW_WHOLE, math.inf, "blocks", "compiles block by block, which took 60 s in the check"),
        (NO_WHOLE, math.inf, "blocks", "compiles block by block"),
        (NO_GAIN, math.inf, "", "in the check no way took under 120 s and gained speed"),
        ({"eager": None}, math.inf, "", "in the check no way"),
        (
            None,
            math.inf,
            "",
            f"no passed check of {H100} with torch {th.__version__}; run ba",
        ),
    ],
)
def test_auto_compiles_long_runs_on_a_checked_gpu_in_one_line(
    gpu, capsys, seconds, passes, way, said
):
    if seconds:
        compile_choice.write_record(gpu, seconds)
    assert choose_compilation("auto", gpu, passes) == way
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--compile auto: ")
    assert said in line


def test_auto_compiles_nothing_on_a_cpu_and_says_nothing(gpu, capsys):
    compile_choice.write_record(gpu, FAST)
    assert choose_compilation("auto", th.device("cpu"), math.inf) == ""
    assert not capsys.readouterr().out


@pytest.mark.parametrize("flag", ["", "default", "blocks", "reduce-overhead"])
def test_whoever_asks_gets_what_was_asked_for_on_any_device(gpu, capsys, flag):
    for device in (gpu, th.device("cpu")):
        assert choose_compilation(flag, device, 0) == flag
    assert not capsys.readouterr().out


def test_a_machine_without_a_compiler_is_no_error_of_auto(gpu, monkeypatch, capsys):
    monkeypatch.setattr(compile_choice, "require_compiler", require_compiler)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    compile_choice.write_record(gpu, FAST)
    assert choose_compilation("auto", gpu, math.inf) == ""
    assert "not compiled: --compile: no C++ compiler found" in capsys.readouterr().out


def test_a_record_is_of_one_kind_of_gpu_and_one_version_of_torch(gpu, monkeypatch):
    path = compile_choice.write_record(gpu, FAST)
    record = compile_choice.read_record(H100)
    assert (record.device, record.capability, record.torch) == (H100, "9.0", th.__version__)
    assert record.seconds == FAST
    assert compile_choice.read_record("NVIDIA H100 PCIe") is None
    with monkeypatch.context() as patched:
        patched.setattr(th, "__version__", "2.99.0")
        assert compile_choice.read_record(H100) is None
    path.write_text('{"device": ')
    assert compile_choice.read_record(H100) is None


def test_training_counts_the_steps_that_are_left(tmp_path, monkeypatch):
    asked = []

    def choose(flag, device, passes):
        asked.append((flag, passes))
        return ""

    monkeypatch.setattr(train_util, "choose_compilation", choose)

    def start(name, **options):
        options = {"output_dir": str(tmp_path / name), "batch_size": 2, **options}
        model, diffusion = tiny.build(as_built=True)
        return TrainLoop(model, diffusion, lambda start: iter(()), TrainConfig(**options))

    start("endless")
    trainer = start("resumed", max_steps=100, lr_anneal_steps=80)
    trainer.step = 30
    trainer.lock.close()
    trainer.save(preview=False)
    start("resumed", max_steps=100, lr_anneal_steps=80, compile="False")
    assert asked == [("auto", math.inf), ("auto", 3 * 80), ("", 3 * 50)]


@pytest.mark.parametrize(
    ("name", "settings", "passes"),
    [
        ("ddim", {}, 25),
        ("dpm_solver", {"steps": 15}, 15),
        ("dpm_solver++", {}, 0),  # adaptive: not known before
        ("dpm_solver++", {"steps": 10, "method": "multistep"}, 10),
    ],
)
def test_sampling_counts_the_passes_of_the_clips_of_a_rank(monkeypatch, name, settings, passes):
    asked = []

    def choose(flag, device, passes):
        asked.append(passes)
        return "blocks"

    monkeypatch.setattr(load, "choose_compilation", choose)
    monkeypatch.setattr(load, "group_rank", lambda: (1, 2))
    respacing = {"timestep_respacing": "25"} if name == "ddim" else {}
    sampler = make_sampler(name, create_diffusion(DiffusionConfig(**respacing)), **settings)
    config = SamplingConfig(output_dir="x", all_save_num=17)  # 9 clips: 3 batches of 4
    found = load._with_compilation(config, th.device("cpu"), sampler, config.batch_size)
    assert (asked, found.compile) == ([3 * passes], "blocks")
