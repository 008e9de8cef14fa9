"""Samplers by name; a clip is a function of the seed and its number alone."""

import pytest
import tiny
import torch as th

from mm_diffusion.config import SamplerConfig, SamplingConfig
from mm_diffusion.gaussian_diffusion import GaussianDiffusion
from mm_diffusion.generation.run import generate_clips
from mm_diffusion.sampling import SAMPLERS, bind, make_sampler, prepare, sample_joint
from mm_diffusion.tree import leaves, tree_map

QUICK = {"dpm_solver": {"steps": 6}, "dpm_solver++": {"steps": 5, "method": "multistep"}}
RESPACED = {"ddpm": "5", "ddim": "ddim5", "dpm_solver": "", "dpm_solver++": ""}


def setup(name, clip_denoised=True, settings=None, **flags):
    model, diffusion = tiny.build(timestep_respacing=RESPACED[name], **flags)
    settings = QUICK.get(name, {}) if settings is None else settings
    return prepare(model), make_sampler(name, diffusion, clip_denoised, **settings)


def rows(sample, index):
    return tree_map(lambda x: x[index], sample)


def assert_same(a, b, tolerance=1e-5):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        th.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def counted(model):
    """The model, and a list that grows with every evaluation."""
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    return model, calls


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_clip_is_the_same_in_any_batch_and_any_order(name):
    """Faults: seeds did nothing, and every rank sampled the same clips; adaptive steps coupled."""
    model, sampler = setup(name, settings={} if name == "dpm_solver++" else None)
    both = sample_joint(model, sampler, [0, 1], seed=5)
    turned = sample_joint(model, sampler, [1, 0], seed=5)
    alone = sample_joint(model, sampler, [1], seed=5)
    assert_same(rows(both, [1, 0]), turned, 1e-3)
    assert_same(rows(both, [1]), alone, 1e-3)
    other = sample_joint(model, sampler, [1], seed=6)
    for key in alone:
        assert (both[key][0] - both[key][1]).abs().max() > 0.05
        assert (other[key] - alone[key]).abs().max() > 0.05
        assert alone[key].dtype == th.float32
        assert alone[key].abs().max() <= 1
    assert both["video"].shape == (2, 4, 3, 8, 8)
    assert both["audio"].shape == (2, 2, 64)


@pytest.mark.parametrize("name", ["ddpm", "dpm_solver"])
def test_ranks_draw_different_clips_which_together_are_those_of_one_process(name):
    model, sampler = setup(name)
    found = {}
    for rank in range(2):
        generate_clips(
            model,
            sampler,
            range(5)[rank::2],
            lambda k, video, audio, large: found.update({k: (video, audio)}),
            batch_size=2,
            seed=7,
        )
    together = sample_joint(model, sampler, range(5), seed=7)
    assert sorted(found) == [0, 1, 2, 3, 4]
    for k, clip in found.items():
        assert_same(dict(zip(together, clip, strict=True)), rows(together, k), 1e-3)


def test_drawing_twice_gives_the_same_bits_whatever_the_global_state():
    model, sampler = setup("ddpm")
    first = sample_joint(model, sampler, [3], seed=1)
    th.rand(5)
    second = sample_joint(model, sampler, [3], seed=1)
    assert all(th.equal(a, b) for a, b in zip(leaves(first), leaves(second), strict=True))


def test_sampling_leaves_the_global_random_state_alone():
    model, sampler = setup("ddpm")
    th.manual_seed(3)
    wanted = th.rand(3)
    th.manual_seed(3)
    sample_joint(model, sampler, [0], seed=1)
    assert th.equal(th.rand(3), wanted)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "flags", [{"predict_xstart": True}, {"learn_sigma": True}, {"rescale_timesteps": True}], ids=str
)
def test_every_kind_of_model_samples(name, flags):
    model, sampler = setup(name, **flags)
    sample = sample_joint(model, sampler, [0], seed=2)
    assert sample["video"].shape == (1, 4, 3, 8, 8)
    assert sample["audio"].shape == (1, 2, 64)
    assert all(x.isfinite().all() for x in leaves(sample))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_always_predicts_one_clip_gives_that_clip(name):
    _, diffusion = tiny.build(predict_xstart=True, timestep_respacing=RESPACED[name])
    settings = {"steps": 6} if name == "dpm_solver" else {}
    sampler = make_sampler(name, diffusion, **settings)
    clip = tree_map(lambda x: 0.9 * x, tiny.clips(0, 1))
    x_T = tree_map(th.randn_like, clip)
    sample = sampler(lambda x, t: tree_map(lambda a, b: a.expand_as(b), clip, x), x_T, None)
    for key in clip:
        assert (
            sample[key] - clip[key]
        ).abs().max() < 0.15  # the solvers stop at time 1/N, 4 sigma of its noise


@pytest.mark.parametrize(("respacing", "evaluations"), [("ddim25", 25), ("10", 10), ("3,2,1", 6)])
def test_ddim_evaluates_the_model_once_per_kept_step(respacing, evaluations):
    model, diffusion = tiny.build(timestep_respacing=respacing)
    model, calls = counted(prepare(model))
    sample_joint(model, make_sampler("ddim", diffusion), [0], seed=1)
    assert len(calls) == evaluations


@pytest.mark.parametrize("steps", [5, 6])
def test_dpm_solver_evaluates_the_model_as_often_as_its_steps_say(steps):
    model, sampler = setup("dpm_solver", settings={"steps": steps})
    model, calls = counted(model)
    sample_joint(model, sampler, [0], seed=1)
    assert len(calls) == steps


def test_the_published_dpm_solver_takes_20_steps():
    model, diffusion = tiny.build()
    model, calls = counted(prepare(model))
    sample_joint(model, make_sampler("dpm_solver", diffusion), [0], seed=1)
    assert len(calls) == 20


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_leaves_the_trained_model_untouched(name):
    model, diffusion = tiny.build(timestep_respacing=RESPACED[name], dropout=0.5)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prepared = prepare(model, "bf16")
    sample_joint(prepared, make_sampler(name, diffusion, **QUICK.get(name, {})), [0], seed=1)
    assert not any(module.training for module in prepared.model.modules())
    assert model.training
    assert all(th.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_progress_rises_to_one_per_clip():
    seen = []
    model, sampler = setup("ddim")
    generate_clips(
        model, sampler, [4, 5, 6], lambda *_: None, batch_size=2, seed=1, progress=seen.append
    )
    assert seen == sorted(seen)
    assert seen[-1] == 3


def test_an_error_while_saving_a_clip_is_not_lost():
    def fail(*args):
        raise OSError("disk full")

    model, sampler = setup("ddim")
    with pytest.raises(OSError, match="disk full"):
        generate_clips(model, sampler, [0], fail, batch_size=1, seed=1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_clip_that_is_not_finite_is_an_error_instead_of_a_black_and_silent_film(name):
    model, sampler = setup(name)
    with th.no_grad():
        next(model.parameters()).fill_(th.nan)
    saved = []
    with pytest.raises(FloatingPointError, match="not finite"):
        generate_clips(model, sampler, [0], lambda *_: saved.append(1), batch_size=1, seed=1)
    assert not saved


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"output_dir": "gs://bucket/out"}, "local folders"), ({"seed": -1}, "seed -1")],
)
def test_what_cannot_be_sampled_is_said_in_words(wrong, words):
    with pytest.raises(ValueError, match=words):
        SamplingConfig(**{"output_dir": "x", **wrong})


def test_unknown_samplers_and_settings_are_named():
    diffusion = tiny.build(as_built=True)[1]
    with pytest.raises(ValueError, match=r"sample_fn 'plms'.*ddpm, ddim, dpm_solver"):
        make_sampler("plms", diffusion)
    with pytest.raises(ValueError, match="timestep_respacing"):
        make_sampler("ddim", diffusion, steps=5)
    with pytest.raises(ValueError, match="precision"):
        prepare(th.nn.Linear(1, 1), "fp8")


@pytest.mark.parametrize("name", ["dpm_solver", "dpm_solver++"])
def test_respacing_does_not_go_with_the_solvers(name):
    diffusion = tiny.build(as_built=True, timestep_respacing="ddim25")[1]
    with pytest.raises(ValueError, match="timestep_respacing"):
        make_sampler(name, diffusion)


def test_flags_of_the_solver_replace_its_own_settings():
    assert SamplerConfig().solver_settings() == {}
    chosen = {"steps": 7, "order": 2, "method": "multistep", "skip_type": "time_uniform"}
    flags = SamplerConfig(
        sample_steps=7, solver_order=2, solver_method="multistep", skip_type="time_uniform"
    )
    assert flags.solver_settings() == chosen
    model, sampler = setup("dpm_solver++", settings=chosen)
    model, calls = counted(model)
    sample_joint(model, sampler, [0], seed=1)
    assert len(calls) == 7


def test_conditions_are_bound_and_one_tensor_goes_in_bare():
    def model(x, t, scale=1):
        return scale * x

    assert bind(model, {"scale": 3})(th.ones(1), th.zeros(1)).item() == 3
    assert isinstance(tiny.build(as_built=True)[1], GaussianDiffusion)
