"""Predicting noise, clip or v: three forms of one process; and schedules that end in noise."""

import itertools

import golden_data
import numpy as np
import pytest
import tiny
import torch as th
from test_diffusion import SHAPES, make, named

from mm_diffusion.config import DiffusionConfig
from mm_diffusion.dpm_solver import METHODS, DPMSolver, NoiseSchedule
from mm_diffusion.gaussian_diffusion import (
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from mm_diffusion.sampling import SAMPLERS, make_sampler
from mm_diffusion.script_util import (
    SR_CARRIED_FLAGS,
    create_model_and_diffusion,
    merge_checkpoint_flags,
)
from mm_diffusion.tree import append_dims, tree_map

MEANS = {
    "noise": ModelMeanType.EPSILON,
    "x_start": ModelMeanType.START_X,
    "v": ModelMeanType.V,
}
AXES = {"video": 2, "audio": 1}
ZERO = ["linear_zero_snr", "cosine_zero_snr"]


def oracle(x, share):
    """Some clip that x at this share of the process may be of."""
    return tree_map(lambda leaf: (0.4 * leaf * append_dims(share.cos(), leaf)).tanh(), x)


def predicting(kind, alpha_bar_at, learned=False, scale=1e-3):
    """The model that takes x at t for `oracle(x, scale t)`, and says so as noise, clip or v."""

    def model(x, t):
        alpha_bar = alpha_bar_at(t)

        def leaf(x, x0):
            alpha, sigma = (append_dims(w, x) for w in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
            noise = (x - alpha * x0) / sigma
            return {"noise": noise, "x_start": x0, "v": alpha * noise - sigma * x0}[kind].float()

        out = tree_map(leaf, x, oracle(x, scale * t.float()))
        if not learned:
            return out
        return {key: th.cat([out[key], 0.3 * x[key]], dim=AXES[key]) for key in out}

    return model


def diffusion(kind, schedule="linear", **options):
    return make(mean=MEANS[kind], schedule=schedule, **options)


def alpha_bar_at(t):
    return th.from_numpy(diffusion("noise").alphas_cumprod)[t]


def close(found, wanted, tolerance=1e-4):
    for key in wanted:
        th.testing.assert_close(found[key], wanted[key], rtol=tolerance, atol=tolerance)


# Identities


@pytest.mark.parametrize("kind", ["x_start", "v"])
@pytest.mark.parametrize("learned", [False, True])
def test_what_a_model_says_as_clip_or_v_gives_the_moments_of_its_noise(kind, learned):
    var = ModelVarType.LEARNED_RANGE if learned else ModelVarType.FIXED_LARGE
    x, t = named("moments"), th.tensor([5, 371])
    found, wanted = (
        diffusion(k, var=var).p_mean_variance(
            predicting(k, alpha_bar_at, learned), x, t, clip_denoised=False
        )
        for k in (kind, "noise")
    )
    for name in wanted:
        close(found[name], wanted[name], 1e-3)


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [("noise", "linear"), *itertools.product(("x_start", "v"), ("linear", *ZERO))],
)
def test_only_the_true_prediction_has_no_loss(kind, schedule):
    process = diffusion(kind, schedule)
    x0, noise = tree_map(lambda x: x / 2, named("x0")), named("noise")
    t = th.tensor([0, 999])
    alphas = th.from_numpy(process.alphas_cumprod)[t]

    def truth(scale):
        def model(x, steps):
            def leaf(x0, noise):
                alpha, sigma = (append_dims(w, x0) for w in (alphas.sqrt(), (1 - alphas).sqrt()))
                v = alpha * noise - sigma * x0
                return (scale * {"noise": noise, "x_start": x0, "v": v}[kind]).float()

            return tree_map(leaf, x0, noise)

        return model

    assert process.training_losses(truth(1.0), x0, t, noise)["loss"].abs().max() < 1e-10
    assert process.training_losses(truth(1.1), x0, t, noise)["loss"].min() > 1e-4


@pytest.mark.parametrize("kind", ["x_start", "v"])
@pytest.mark.parametrize("loss", [LossType.MSE, LossType.RESCALED_MSE, LossType.RESCALED_KL])
def test_the_bound_does_not_depend_on_what_is_predicted(kind, loss):
    x0, noise, t = tree_map(lambda x: x / 2, named("x0")), named("noise"), th.tensor([0, 371])
    options = {"var": ModelVarType.LEARNED_RANGE, "loss": loss}
    terms = [
        diffusion(k, **options).training_losses(
            predicting(k, alpha_bar_at, learned=True), x0, t, noise
        )
        for k in (kind, "noise")
    ]
    for key in SHAPES:
        th.testing.assert_close(terms[0][f"vb_{key}"], terms[1][f"vb_{key}"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["x_start", "v"])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_loops_draw_the_same_clips_from_noise_clip_and_v(kind, loop):
    samples = []
    for k in (kind, "noise"):
        process = diffusion(k, respacing="12")
        model = predicting(k, alpha_bar_at)
        generators = [th.Generator().manual_seed(n) for n in range(2)]
        samples.append(getattr(process, loop)(model, named("x_T"), generators))
    close(*samples, 1e-3)


@pytest.mark.parametrize("kind", ["x_start", "v"])
@pytest.mark.parametrize("predict_x0", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_solvers_draw_the_same_clips_from_noise_clip_and_v(method, predict_x0, kind, monkeypatch):
    # The models get the solver's own time, not the integer step below it.
    monkeypatch.setattr(NoiseSchedule, "model_timesteps", lambda schedule, t: t)
    alphas = diffusion("noise").alphas_cumprod
    at = NoiseSchedule(alphas).alpha
    samples = [
        DPMSolver(
            predicting(k, lambda t: at(t).square(), scale=1.0), alphas, predict_x0, model_type=k
        ).sample(named("x_T"), steps=6, order=2, method=method, skip_type="logSNR")
        for k in (kind, "noise")
    ]
    close(*samples, 1e-3)


# Zero terminal SNR


@pytest.mark.parametrize("name", ZERO)
def test_a_schedule_with_zero_snr_begins_as_its_own_and_ends_in_noise_alone(name):
    plain = np.cumprod(1 - get_named_beta_schedule(name.removesuffix("_zero_snr"), 1000))
    zero = np.cumprod(1 - get_named_beta_schedule(name, 1000))
    assert zero[0] == pytest.approx(plain[0], abs=1e-12)
    assert zero[-1] == 0
    assert (np.diff(zero) < 0).all()
    assert (zero[1:] < plain[1:]).all()
    gaps = np.diff(np.sqrt(zero)) / np.diff(np.sqrt(plain))  # one stretch for all
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-6)
    x0, noise = named("x0"), named("noise")
    x_T = diffusion("v", name).q_sample(x0, th.tensor([999, 999]), noise)
    assert all(th.equal(x_T[key], noise[key]) for key in noise)


@pytest.mark.parametrize("name", ZERO)
@pytest.mark.parametrize("kind", ["x_start", "v"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_from_noise_alone_to_the_clip(sampler, kind, name):
    respacing = "20" if sampler in ("ddpm", "ddim") else ""
    process = diffusion(kind, name, respacing=respacing)
    clip = tree_map(lambda x: (x / 2).clamp(-1, 1), named("clip"))
    alphas = th.from_numpy(diffusion(kind, name).alphas_cumprod)

    def knows(x, t):
        """The clip is no secret: what is left of x is noise."""

        def leaf(x, x0):
            alpha, sigma = (append_dims(w, x) for w in (alphas[t].sqrt(), (1 - alphas[t]).sqrt()))
            v = (x * alpha - x0) / sigma
            return (x0 if kind == "x_start" else v).float()

        return tree_map(leaf, x, clip)

    sample = make_sampler(sampler, process)(knows, named("x_T"), th.Generator().manual_seed(0))
    for key in clip:
        # What noise the first step has, and the grid of the solvers, is left.
        assert (sample[key] - clip[key]).abs().max() < 0.1


@pytest.mark.parametrize("name", ZERO)
def test_noise_prediction_from_noise_alone_is_refused(name):
    with pytest.raises(ValueError, match="prediction"):
        create_model_and_diffusion(noise_schedule=name, **tiny.FLAGS)


# Flags


def test_predict_xstart_is_a_name_of_its_own_for_predicting_the_clip():
    assert DiffusionConfig().predicted == "noise"
    assert DiffusionConfig(predict_xstart=True).predicted == "x_start"
    assert DiffusionConfig(predict_xstart=True, prediction="x_start").predicted == "x_start"
    with pytest.raises(ValueError, match="--predict_xstart True contradicts --prediction v"):
        DiffusionConfig(predict_xstart=True, prediction="v")
    with pytest.raises(ValueError, match="--prediction 'w'"):
        DiffusionConfig(prediction="w")


DEFAULTS = {"prediction": "", "predict_xstart": False, "cross_attention_rope": False}


@pytest.mark.parametrize(
    ("trained", "given", "fits"),
    [
        ({"predict_xstart": True}, {"prediction": "x_start"}, True),
        ({"predict_xstart": True}, {"prediction": "v"}, False),
        ({"predict_xstart": False}, {"prediction": "v"}, False),
        ({"predict_xstart": False}, {"prediction": "noise"}, True),
        ({"prediction": "v"}, {"prediction": "v"}, True),
        ({"prediction": "v"}, {"prediction": "noise"}, False),
        ({"predict_xstart": False}, {"cross_attention_rope": True}, False),
        ({"cross_attention_rope": True}, {"cross_attention_rope": True}, True),
        ({}, {"prediction": "v", "cross_attention_rope": True}, True),  # carries no flags
    ],
    ids=str,
)
def test_checkpoints_older_than_a_flag_have_its_default(trained, given, fits):
    values = DEFAULTS | given
    if not fits:
        with pytest.raises(ValueError, match="contradicts x, trained with"):
            merge_checkpoint_flags(values, set(given), trained, "x")
        return
    merged = merge_checkpoint_flags(values, set(given), trained, "x")
    for name, value in given.items():
        assert merged[name] == value


def test_upsamplers_that_predict_v_carry_it():
    values = {"sr_prediction": "", "sr_predict_xstart": False}
    trained = {"sr_prediction": "v", "sr_predict_xstart": False}
    merged = merge_checkpoint_flags(values, set(), trained, "x", SR_CARRIED_FLAGS)
    assert merged["sr_prediction"] == "v"


def test_an_upsampler_learns_v():
    _, process = tiny.build_upsampler(sr_prediction="v", sr_learn_sigma=False)
    assert process.model_mean_type is ModelMeanType.V
    x = golden_data.noise("sr", (2, 3, 8, 8))
    terms = process.training_losses(lambda x, t: th.zeros_like(x), x, th.tensor([0, 99]), x)
    alpha = th.from_numpy(process.sqrt_alphas_cumprod).float()[[0, 99]]
    sigma = th.from_numpy(process.sqrt_one_minus_alphas_cumprod).float()[[0, 99]]
    expected = (alpha - sigma) ** 2 * x.square().mean(dim=(1, 2, 3))
    th.testing.assert_close(terms["mse"], expected)
