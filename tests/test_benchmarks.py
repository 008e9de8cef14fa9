"""The benchmark: its arithmetic, and runs over small models from end to end."""

import json
import os
import sys
from pathlib import Path

import pytest
import tiny
import torch as th
import torch.nn.functional as F

from mm_diffusion import train_util

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import breakdown
import changes
import clips
import compiling
import measure
import models
import network
import rates
import report
import roofline
import run

from mm_diffusion.unet import window_shift

MODELS = {
    "small_base": models.Size(tiny.FLAGS),
    "small_upsampler": models.Size(tiny.SR_FLAGS, upsampler=True),
}
TINY_RATES = {"matrix": 64, "map": (1, 32, 8, 8), "copy": 2**16}


@pytest.fixture
def small(monkeypatch):
    """The benchmark with its small models smaller still."""
    for name, size in MODELS.items():
        monkeypatch.setitem(models.MODELS, name, size)
    for name in rates.SIZES:
        monkeypatch.setitem(rates.SIZES, name, TINY_RATES)


def measured(path, *flags):
    run.main(["--quick", "--seconds", "0.01", "--json", str(path), *flags])
    return json.loads(path.read_text())


def figures(content, section):
    return [figure for figure in content["figures"] if figure["section"] == section]


# ---------------------------------------------------------------- arithmetic


def test_spread_is_the_middle_half_over_the_median_whatever_the_unit():
    assert measure.spread([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)
    assert measure.spread([1000, 2000, 3000, 4000, 5000]) == pytest.approx(2 / 3)
    assert measure.spread([7.0] * 4) == 0
    assert measure.spread([7.0]) is None


def test_one_slow_repeat_does_not_change_the_spread():
    assert measure.spread([1, 1, 1, 1, 50]) == 0


@pytest.mark.parametrize("call_seconds", [0.0, 0.02])
def test_repeats_fill_their_time_and_are_at_least_one(call_seconds):
    calls = []
    times = measure.repeat(lambda: (calls.append(1), measure.time.sleep(call_seconds)), 0.1)
    assert 1 <= len(times) < len(calls) <= measure.MAX_REPEATS + 2
    assert min(times) >= call_seconds
    assert sum(times) <= 0.1 or not call_seconds or len(times) == 1


def test_a_long_call_is_made_only_once(monkeypatch):
    monkeypatch.setattr(measure, "LONG_CALL", 0.01)
    calls = []
    assert (
        len(measure.repeat(lambda: (calls.append(1), measure.time.sleep(0.02)), 0.01))
        == len(calls)
        == 1
    )


def test_flop_of_a_convolution_and_of_attention_are_those_on_paper():
    batch, wide, out, side = 2, 8, 12, 10
    x, weight = th.randn(batch, wide, side, side), th.randn(out, wide, 3, 3)
    assert (
        measure.flop_of(lambda: F.conv2d(x, weight, padding=1))
        == 2 * batch * out * wide * 9 * side**2
    )
    q, k = th.randn(3, 4, 20, 16), th.randn(3, 4, 100, 16)
    attention = 2 * (2 * 3 * 4 * 20 * 100 * 16)  # scores, and the sum of values
    assert measure.flop_of(lambda: F.scaled_dot_product_attention(q, k, k)) == attention


@pytest.mark.parametrize("name", MODELS)
def test_flop_are_the_same_counted_with_and_without_computing(name):
    model, _ = models.build(MODELS[name])
    assert models.forward_flop(MODELS[name]) == measure.flop_of(models.forward_of(model)) > 0


def test_the_published_base_model_takes_the_published_work():
    assert models.forward_flop(models.MODELS["base"]) == pytest.approx(2.109e12, rel=1e-3)


def test_the_norm_kernel_saves_half_of_the_kernels_and_no_flops(small):
    """Counted without a GPU; a step is three passes, since backward is two."""
    passes = [roofline.count_pass("small_base", 2, ours) for ours in (False, True)]
    kernels = [sum(work.kernels.values()) for work in passes]
    assert kernels[1] < 0.5 * kernels[0]
    assert [work.flop for work in passes] == [2 * models.forward_flop(MODELS["small_base"])] * 2
    step = roofline.count_step("small_base", 2, norm_kernel=True)
    assert step.flop == pytest.approx(3 * passes[0].flop, rel=0.05)


def test_a_kernel_is_predicted_to_take_as_long_as_its_bytes_or_its_flops():
    work, gpu = roofline.Work(), roofline.Gpu(bandwidth=1e12, flops=1e14)
    work.add("copy", 1, int(0.82e9), 0)
    work.add("mm", 1, 0, int(0.7e11))
    work.add("tiny", 2, 1, 1)
    assert work.seconds(gpu) == pytest.approx(1e-3 + 1e-3 + 2 * roofline.LAUNCH)


def test_our_norm_counts_as_the_passes_over_the_map_that_it_makes():
    with roofline.paths_of_gpus(norm_kernel=True):
        x = th.randn(2, 64, 1000).movedim(1, -1).contiguous().movedim(-1, 1).bfloat16()
        x.requires_grad_()
        norm = roofline.layers.GroupNorm32(64)
        with roofline.Work() as work:
            norm(x, silu=True).sum().backward()
    held = 2 * x.numel()
    assert work.bytes["norm"] == pytest.approx(3 * held, rel=1e-2)
    assert work.bytes["norm_backward"] == pytest.approx(5 * held, rel=1e-2)


def test_on_a_gpu_the_batch_is_that_of_training_and_nothing_is_compiled(monkeypatch):
    """Fault: batch 1, and hours of compiling."""
    monkeypatch.setattr(run, "device", lambda: th.device("cuda"))
    monkeypatch.setattr(run, "choose_precision", lambda *args: "bf16")
    options = run.parse(["--json", ""])
    assert (options.batch_size, options.variants) == (4, ["plain"])


def test_compiling_is_what_the_first_step_takes_beyond_later_ones(monkeypatch):
    monkeypatch.setattr(compiling, "seconds_of", lambda call: call() or 100.0)
    monkeypatch.setattr(compiling, "repeat", lambda call, budget: [call() or 2.0, 3.0, 4.0])
    found = compiling.time_steps(MODELS["small_base"], "eager", batch_size=1)
    assert found == {"compile": 97.0, "step": 3.0}
    assert "first step 97 s longer, then 3.000 s each" in compiling.line("eager", found)


def test_compiling_that_takes_too_long_or_fails_has_no_time(tmp_path):
    flags = ["--model", "small_base", "--batch_size", "1"]
    assert compiling.time_in_own_process("eager", limit=0.5, flags=flags) is None
    assert compiling.time_in_own_process("eager", limit=60, flags=["--model", "none"]) is None
    assert compiling.line("whole", None) == "whole: failed, or took too long"


def test_signal_to_noise_of_a_tenth_is_20_dB():
    x = tiny.inputs()[0]
    assert clips.signal_to_noise(x, 1.1 * x) == pytest.approx(20, abs=1e-4)


def test_the_work_of_a_backward_pass_belongs_to_the_part_it_is_of():
    layers = [th.nn.Linear(800, 800) for _ in range(2)]
    first, second = (
        breakdown.marked(kind, layer) for kind, layer in zip("ab", layers, strict=True)
    )
    x = th.randn(800, 800)
    second(first(x)).sum().backward()  # the first call takes longer
    forwards = [breakdown.seconds_by_kind(lambda: second(first(x))) for _ in range(3)]
    forward = min(forwards, key=lambda seconds: seconds["b"])
    both = breakdown.seconds_by_kind(lambda: second(first(x)).sum().backward())
    assert both["a"] + both["b"] > 0.8 * both[breakdown.ALL]
    assert both["b"] > 1.5 * forward["b"]
    parts = sum(s for kind, s in both.items() if kind not in (breakdown.ALL, breakdown.COPYING))
    assert parts == pytest.approx(both[breakdown.ALL])


def test_a_sample_that_would_take_too_long_stops_with_an_estimate():
    progress = clips.watch(0.05)
    progress(0.001)
    measure.time.sleep(0.01)
    with pytest.raises(measure.LeftOut, match="would take about"):
        progress(0.01)
    clips.watch(0.0)(1.0)  # a sample that is complete is never too late


@pytest.mark.skipif(th.cuda.is_available(), reason="memory is measured in this process then")
def test_a_killed_process_leaves_its_figure_out_and_memory_is_that_of_the_call():
    with pytest.raises(measure.LeftOut, match="killed"):
        measure.in_own_process(os._exit, 9)
    before, peak = measure.in_own_process(
        network.memory_of_step, MODELS["small_base"], "fp32", 1, {}
    )
    weights = sum(
        p.numel() * p.element_size() for p in models.build(MODELS["small_base"])[0].parameters()
    )
    assert peak - before > 3 * weights  # the gradient and two moments


# ---------------------------------------------------------------- runs


def test_a_run_measures_every_section_and_writes_it_down(small, tmp_path, capsys):
    sections = [name for name in run.SECTIONS if name not in ("memory", "fidelity", "changes")]
    flags = [
        "--only",
        *sections,
        "--samplers",
        "dpm_solver",
        "--variants",
        "plain",
        "--precisions",
        "fp32",
    ]
    content = measured(tmp_path / "new.json", *flags)
    shown = capsys.readouterr().out
    for section in sections:
        assert figures(content, section), section
        assert f"\n{section} " in shown
    for figure in content["figures"]:
        assert figure["median"] > 0
        assert len(figure["repeats"]) >= 1
    for figure in figures(content, "forward") + figures(content, "training"):
        reached = figure["facts"]["flop"] / figure["median"]
        assert reached == pytest.approx(figure["facts"]["flop_per_second"])
        rate = next(
            f
            for f in figures(content, "rates")
            if f["what"].startswith("matrix") and f["precision"] == figure["precision"]
        )
        assert figure["facts"]["of_matrix_rate"] == pytest.approx(reached / rate["median"])
    assert content["machine"]["torch"] == th.__version__
    assert content["left_out"][0]["what"] == "compiled"
    assert_ratios_to_itself_are_one(content, tmp_path / "new.json", capsys)


@pytest.mark.parametrize("title", [title for title in changes.CHANGES if title != "moving average"])
def test_a_change_that_is_undone_changes_the_time_and_not_the_result(title):
    """Gradients too."""
    model, _ = tiny.build()
    clip, t = tiny.clips(0, 2), th.tensor([3, 60])

    def gradients():
        model.zero_grad()
        with window_shift("max"):
            sum(out.square().mean() for out in model(clip["video"], clip["audio"], t)).backward()
        return th.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    kept = gradients()
    with changes.CHANGES[title].undo():
        undone = gradients()
    after = gradients()
    assert after.equal(kept)
    assert (undone - kept).norm() < 1e-5 * kept.norm()


def test_the_moving_average_at_once_is_that_of_one_weight_after_the_other():
    at_once, slow, weights = (
        [th.full((3,), value + k) for k in range(2)] for value in (1.0, 1.0, 5.0)
    )
    train_util.update_ema(at_once, weights, 0.75)
    changes.slow_average(slow, weights, 0.75)
    for mine, other in zip(at_once, slow, strict=True):
        th.testing.assert_close(mine, other)


def test_changes_are_reported_as_time_without_over_time_with_them(small, tmp_path, monkeypatch):
    some = {title: changes.CHANGES[title] for title in ("norm, one kernel", "moving average")}
    monkeypatch.setattr(changes, "CHANGES", some)
    content = measured(
        tmp_path / "new.json", "--only", "changes", "--models", "small_base", "--precisions", "bf16"
    )
    for figure in figures(content, "changes"):
        assert figure["unit"] == "x"
        facts = figure["facts"]
        assert figure["repeats"][-1] == pytest.approx(
            facts["seconds_without"] / facts["seconds_with"]
        )
    titles = {figure["what"].split(": ")[1] for figure in figures(content, "changes")}
    assert titles >= {"half precision", *changes.CHANGES}
    assert "changes" not in run.parse([]).only


def test_half_precision_differs_from_float32_by_some_decibel(small, tmp_path):
    content = measured(tmp_path / "new.json", "--only", "fidelity", "--precisions", "fp32", "bf16")
    assert {figure["precision"] for figure in content["figures"]} == {"bf16"}
    for figure in content["figures"]:
        assert 0 < figure["median"] < 80


def assert_ratios_to_itself_are_one(content, path, capsys):
    found = report.ratios(content, content)
    assert len(found) == len(content["figures"])
    assert set(found.values()) == {1.0}
    run.main(["--compare", str(path), str(path)])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(found)
    assert all(line.split()[0] == "1.000=" for line in table[1:])


def test_twice_the_time_is_a_ratio_of_two_and_other_machines_and_figures_are_noted(small, tmp_path):
    old = measured(tmp_path / "old.json", "--only", "rates")
    new = json.loads(json.dumps(old))
    for figure in new["figures"]:
        figure["median"] *= 2
        figure["repeats"] = [100 * max(figure["repeats"])]
    new["machine"]["threads"] = 77
    new["figures"].append(new["figures"][0] | {"what": "something new"})
    assert set(report.ratios(old, new).values()) == {2.0}
    table = report.compare(old, new)
    assert "note: threads was 1 and is 77" in table
    assert "only now: rates something new" in table
    assert "=" not in table.splitlines()[2].split()[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seconds", "0"], "seconds"),
        (["--weights", "base"], "MODEL=FILE"),
        (["--json", __file__], "exists already"),
        (["--compare", __file__], "holds no figures"),
        (["--compare", "a", "b", "c"], "one or two"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(flags, words):
    with pytest.raises(ValueError, match=words):
        run.main(["--quick", "--only", "rates", *flags])


def test_weights_come_with_the_flags_they_were_trained_with(tmp_path):
    model, _ = tiny.build()
    models.checkpoint.save_weights(str(tmp_path / "model.pt"), model, tiny.FLAGS)
    size = run.with_weights(["base"], [f"base={tmp_path / 'model.pt'}"])["base"]
    built, diffusion = models.build(size)
    assert diffusion.num_timesteps == tiny.FLAGS["diffusion_steps"]
    for ours, theirs in zip(model.parameters(), built.parameters(), strict=True):
        assert ours.equal(theirs)
