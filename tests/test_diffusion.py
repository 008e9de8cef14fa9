"""Schedules, forward process, losses and sampling loops: recorded figures and identities."""

import golden_data
import numpy as np
import pytest
import torch as th

from mm_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from mm_diffusion.respace import SpacedDiffusion, space_timesteps
from mm_diffusion.tree import append_dims, leaves, split_doubled, tree_map

SHAPES = {"video": (2, 3, 3, 4, 4), "audio": (2, 2, 10)}
CHANNEL_AXIS = {"video": 2, "audio": 1}
T = th.tensor([0, 371])
INDEX = golden_data.index()


def toy(x, t):
    """The model of the recorded figures (index.json, "toy")."""
    video_t, audio_t = (append_dims(t.float() / 1000, x[key]) for key in ("video", "audio"))
    return {
        "video": 0.3 * x["video"] * video_t.cos() + 0.1,
        "audio": 0.5 * x["audio"] + 0.05 * audio_t.sin(),
    }


def toy_variance(x, t):
    video_t, audio_t = (append_dims(t.float() / 1000, x[key]) for key in ("video", "audio"))
    return {
        "video": 0.4 * x["video"] * video_t.sin() - 0.2,
        "audio": 0.3 * x["audio"] - 0.1 * audio_t.cos(),
    }


def toy_learned(x, t):
    out, var = toy(x, t), toy_variance(x, t)
    return {key: th.cat([out[key], var[key]], dim=CHANNEL_AXIS[key]) for key in x}


def toy_image(x, t):
    return 0.3 * x * append_dims(t.float() / 1000, x).cos() + 0.1


def toy_image_learned(x, t):
    return th.cat([toy_image(x, t), 0.4 * x * append_dims(t.float() / 1000, x).sin() - 0.2], dim=1)


def coupled(x, t):
    out = toy(x, t)
    mean = {key: append_dims(x[key].flatten(1).mean(dim=1), x["video"]) for key in x}
    return {
        "video": out["video"] + 0.2 * mean["audio"],
        "audio": out["audio"] + 0.1 * append_dims(mean["video"].flatten(), x["audio"]),
    }


def make(
    steps=1000,
    respacing="",
    mean=ModelMeanType.EPSILON,
    var=ModelVarType.FIXED_LARGE,
    loss=LossType.MSE,
    rescale=False,
    schedule="linear",
):
    return SpacedDiffusion(
        space_timesteps(steps, respacing),
        betas=get_named_beta_schedule(schedule, steps),
        model_mean_type=mean,
        model_var_type=var,
        loss_type=loss,
        rescale_timesteps=rescale,
    )


def named(prefix):
    return {key: golden_data.noise(f"{prefix}.{key}", shape) for key, shape in SHAPES.items()}


def pair():
    """x_0, noise and x_t of the recorded figures."""
    x0 = {key: 0.5 * golden_data.noise(f"diff.{key}0", shape) for key, shape in SHAPES.items()}
    noise = {key: golden_data.noise(f"diff.{key}_noise", shape) for key, shape in SHAPES.items()}
    return x0, noise, make().q_sample(x0, T, noise)


def image():
    x0, noise = (
        0.5 * golden_data.noise("img.x0", (2, 3, 8, 8)),
        golden_data.noise("img.noise", (2, 3, 8, 8)),
    )
    return x0, noise, make().q_sample(x0, T, noise)


def assert_golden(case, name, tree):
    for key, leaf in tree.items() if isinstance(tree, dict) else [("", tree)]:
        wanted = th.from_numpy(golden_data.arrays(case)[f"{name}_{key}" if key else name])
        th.testing.assert_close(
            leaf, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, key=key: f"{name} {key}: {m}"
        )


@pytest.fixture
def recorded_noise(monkeypatch):
    """Makes randn_like return the recorded noise of a tag, in order of calls."""

    def start(tag):
        calls = iter(range(10**6))
        monkeypatch.setattr(
            th, "randn_like", lambda x: golden_data.noise(f"{tag}.like{next(calls)}", x.shape)
        )
        return calls

    return start


def start_noise(tag, batch=2):
    shapes = {key: (batch, *shape[1:]) for key, shape in SHAPES.items()}
    return {
        key: golden_data.noise(f"{tag}.init{i}", shape)
        for i, (key, shape) in enumerate(shapes.items())
    }


class Listening:
    """A model that records its timesteps."""

    def __init__(self, model):
        self.model, self.timesteps = model, []

    def __call__(self, x, t):
        self.timesteps.append(t[0].item())
        return self.model(x, t)


# Schedules


@pytest.mark.parametrize(("name", "steps"), [("linear", 1000), ("linear", 1100), ("cosine", 1000)])
def test_schedules_are_the_published_ones(name, steps):
    arrays = golden_data.arrays("schedules")
    betas = get_named_beta_schedule(name, steps)
    np.testing.assert_allclose(betas, arrays[f"betas_{name}_{steps}"], rtol=1e-12)
    np.testing.assert_allclose(
        make(steps, schedule=name).alphas_cumprod,
        arrays[f"alphas_cumprod_{name}_{steps}"],
        rtol=1e-9,
    )


@pytest.mark.parametrize("case", [case for case in INDEX["schedules"]["respaced"] if "|" in case])
def test_respacing_keeps_the_published_steps(case):
    steps, sections = case.split("|")
    sections = [int(sections[1:-1])] if sections.startswith("[") else sections
    assert space_timesteps(int(steps), sections) == sorted(INDEX["schedules"]["respaced"][case])


def test_a_respaced_diffusion_has_the_same_alpha_bar_at_the_steps_it_keeps():
    spaced, full = make(1100, "ddim25"), make(1100)
    np.testing.assert_allclose(
        spaced.alphas_cumprod, full.alphas_cumprod[spaced.timestep_map], rtol=1e-12
    )
    np.testing.assert_allclose(
        spaced.betas, golden_data.arrays("schedules")["respaced_betas_1100_ddim25"], rtol=1e-9
    )
    assert spaced.timestep_map == INDEX["schedules"]["respaced"]["timestep_map_1100_ddim25"]


@pytest.mark.parametrize("bad", ["ddim300", "ddim", "10,2000", "a,b", "0", "-5", "ddimx"])
def test_impossible_respacing_says_so_in_one_line(bad):
    with pytest.raises(ValueError, match="timestep_respacing") as caught:
        space_timesteps(1000, bad)
    assert "\n" not in str(caught.value)


def test_unknown_schedule_lists_the_known():
    with pytest.raises(ValueError, match="linear, cosine"):
        get_named_beta_schedule("sigmoid", 10)


@pytest.mark.parametrize("steps", [10, 20])
def test_a_schedule_that_leaves_nothing_of_the_clip_is_refused(steps):
    """Linear schedules end at 20 / steps: with 1 the last alpha_bar is 0, which divides."""
    with pytest.raises(ValueError, match="diffusion_steps"):
        make(steps)
    assert make(21).alphas_cumprod[-1] > 0


@pytest.mark.parametrize("var", list(ModelVarType))
def test_a_diffusion_of_one_step_has_finite_tables(var):
    diffusion = make(1000, "1", var=var)
    assert np.isfinite(diffusion.fixed_log_variance).all()
    assert np.isfinite(diffusion.posterior_log_variance_clipped).all()


# Forward and reverse distributions


def test_forward_process_and_posterior_are_the_published_ones():
    x0, _, x_t = pair()
    diffusion = make()
    assert_golden("multimodal_diffusion", "q_sample", x_t)
    for name, tree in zip(("mean", "var", "logvar"), diffusion.q_mean_variance(x0, T), strict=True):
        assert_golden("multimodal_diffusion", f"qmv_{name}", tree)
    for name, tree in zip(
        ("mean", "var", "logvar"), diffusion.q_posterior_mean_variance(x0, x_t, T), strict=True
    ):
        assert_golden("multimodal_diffusion", f"post_{name}", tree)
    assert_golden("image_diffusion", "q_sample", image()[2])


REVERSE = {
    "eps_fixedlarge": ({}, toy, True),
    "eps_fixedlarge_noclip": ({}, toy, False),
    "eps_fixedsmall": ({"var": ModelVarType.FIXED_SMALL}, toy, True),
    "eps_learnedrange": ({"var": ModelVarType.LEARNED_RANGE}, toy_learned, True),
    "rescaled_ts_1100": ({"steps": 1100, "rescale": True}, toy, True),
    "startx_fixedlarge": ({"mean": ModelMeanType.START_X}, toy, True),
}


@pytest.mark.parametrize("case", REVERSE)
def test_reverse_distribution_is_the_published_one(case):
    settings, model, clip = REVERSE[case]
    out = make(**settings).p_mean_variance(model, pair()[2], T, clip_denoised=clip)
    for name, tree in out.items():
        assert_golden("multimodal_diffusion", f"pmv_{case}_{name}", tree)


def test_reverse_distribution_of_images_is_the_published_one():
    out = make(var=ModelVarType.LEARNED_RANGE).p_mean_variance(toy_image_learned, image()[2], T)
    for name, leaf in out.items():
        assert_golden("image_diffusion", f"pmv_learned_{name}", leaf)


def test_a_model_of_the_truth_gives_the_posterior_whatever_it_predicts():
    x0, noise, x_t = pair()
    t = th.tensor([371, 600])
    x_t = make().q_sample(x0, t, noise)
    posterior = make().q_posterior_mean_variance(x0, x_t, t)[0]
    truths = {ModelMeanType.EPSILON: noise, ModelMeanType.START_X: x0}
    for mean, truth in truths.items():
        out = make(mean=mean).p_mean_variance(
            lambda x, t, truth=truth: truth, x_t, t, clip_denoised=False
        )
        for key in x0:
            th.testing.assert_close(out["mean"][key], posterior[key], rtol=1e-4, atol=1e-5)
            th.testing.assert_close(out["pred_xstart"][key], x0[key], rtol=1e-3, atol=1e-3)


def test_the_posterior_and_the_forward_step_compose_to_the_marginal():
    """E over x_t of q(x_{t-1} | x_t, x_0) is q(x_{t-1} | x_0): mean and variance, in float64."""
    d, t = make(), np.arange(1, 1000)
    alpha, previous = d.sqrt_alphas_cumprod, np.sqrt(d.alphas_cumprod_prev)
    np.testing.assert_allclose(
        (d.posterior_mean_coef1 + d.posterior_mean_coef2 * alpha)[t], previous[t]
    )
    variance = d.posterior_variance + d.posterior_mean_coef2**2 * (1 - d.alphas_cumprod)
    np.testing.assert_allclose(variance[t], (1 - d.alphas_cumprod_prev)[t], rtol=1e-9)


def test_learned_sigma_is_split_on_the_axis_that_doubled():
    x = th.zeros(2, 3, 3, 4, 4)
    first, second = split_doubled(th.cat([x, x + 1], dim=2), x)
    assert first.eq(0).all()
    assert second.eq(1).all()
    for wrong in (x, th.zeros(2, 6, 6, 4, 4), th.zeros(2, 9, 3, 4, 4), th.zeros(2, 6, 3, 4)):
        with pytest.raises(ValueError, match="twice the channels"):
            split_doubled(wrong, x)


# Losses

PAIR_LOSSES = {
    "mse": ({}, toy),
    "mse_learned": ({"var": ModelVarType.LEARNED_RANGE}, toy_learned),
    "rescaled_mse_learned": (
        {"var": ModelVarType.LEARNED_RANGE, "loss": LossType.RESCALED_MSE},
        toy_learned,
    ),
    "startx": ({"mean": ModelMeanType.START_X}, toy),
}
IMAGE_LOSSES = {
    "mse": ({}, toy_image),
    "default_learned": ({"var": ModelVarType.LEARNED_RANGE}, toy_image_learned),
    "rescaled_mse_learned": (
        {"var": ModelVarType.LEARNED_RANGE, "loss": LossType.RESCALED_MSE},
        toy_image_learned,
    ),
    "kl": ({"loss": LossType.RESCALED_KL}, toy_image),
    "learned_1100": ({"steps": 1100, "var": ModelVarType.LEARNED_RANGE}, toy_image_learned),
}


@pytest.mark.parametrize("case", PAIR_LOSSES)
def test_losses_of_pairs_are_the_published_ones(case):
    settings, model = PAIR_LOSSES[case]
    x0, noise, _ = pair()
    terms = make(**settings).training_losses(model, x0, T, noise)
    assert terms.keys() == INDEX["multimodal_diffusion"]["losses"][case].keys()
    assert_golden("multimodal_diffusion", f"loss_{case}", terms)


@pytest.mark.parametrize("case", IMAGE_LOSSES)
def test_losses_of_images_are_the_published_ones(case):
    settings, model = IMAGE_LOSSES[case]
    x0, noise, _ = image()
    terms = make(**settings).training_losses(model, x0, T, noise)
    recorded = INDEX["image_diffusion"]["losses"][case].keys() - {"loss_type", "var"}
    assert_golden("image_diffusion", f"loss_{case}", {key: terms[key] for key in recorded})


@pytest.mark.parametrize("loss", list(LossType))
@pytest.mark.parametrize("var", list(ModelVarType))
def test_a_loss_is_the_sum_of_its_terms_and_trains_the_model(loss, var):
    x0, noise, _ = pair()
    gain = th.tensor(0.5, requires_grad=True)
    learned = var is ModelVarType.LEARNED_RANGE
    model = toy_learned if learned else toy
    terms = make(loss=loss, var=var).training_losses(
        lambda x, t: tree_map(lambda leaf: gain * leaf, model(x, t)), x0, T, noise
    )
    total = terms.pop("loss")
    th.testing.assert_close(total, th.stack(list(terms.values())).sum(dim=0))
    total.mean().backward()
    assert gain.grad.isfinite()
    assert gain.grad != 0


def test_kl_of_a_pair_is_the_sum_over_its_modalities():
    """Fault: use_kl trained nothing in the published pair."""
    x0, noise, _ = pair()
    diffusion = make(loss=LossType.RESCALED_KL)
    both = diffusion.training_losses(toy, x0, T, noise)["loss"]
    apart = []
    for key in x0:

        def one(x, t, key=key):
            return toy({k: x if k == key else th.zeros(2, *SHAPES[k][1:]) for k in SHAPES}, t)[key]

        apart.append(diffusion.training_losses(one, x0[key], T, noise[key])["loss"])
    th.testing.assert_close(both, sum(apart))


def test_the_bound_trains_the_variance_alone_next_to_the_mse():
    x0, noise, _ = pair()
    gain = th.ones((), requires_grad=True)

    def model(x, t):
        mean, variance = tree_map(lambda leaf: gain * leaf, toy(x, t)), toy_variance(x, t)
        return {key: th.cat([mean[key], variance[key]], dim=CHANNEL_AXIS[key]) for key in x}

    terms = make(var=ModelVarType.LEARNED_RANGE).training_losses(model, x0, T, noise)
    of_mse, of_vb = (
        th.autograd.grad(terms[f"{name}_video"].sum(), gain, retain_graph=True)[0]
        for name in ("mse", "vb")
    )
    assert of_mse != 0
    assert of_vb == 0


def test_the_loss_is_float32_whatever_comes_in():
    """Fault: float64 audio dragged the loss to float64."""
    x0, _, _ = pair()
    x0 = {**x0, "audio": x0["audio"].double()}
    terms = make(var=ModelVarType.LEARNED_RANGE).training_losses(toy_learned, x0, T)
    assert {value.dtype for value in terms.values()} == {th.float32}
    half = make().training_losses(lambda x, t: tree_map(th.Tensor.half, toy(x, t)), x0, T)
    assert {value.dtype for value in half.values()} == {th.float32}


def test_a_dict_of_one_leaf_is_the_bare_tensor_and_equal_streams_stay_equal():
    x0, noise, _ = image()
    bare = make().training_losses(toy_image, x0, T, noise)
    assert bare.keys() == {"loss", "mse"}
    one = make().training_losses(
        lambda x, t: {"a": toy_image(x["a"], t)}, {"a": x0}, T, {"a": noise}
    )
    assert th.equal(one["loss"], bare["loss"])
    assert th.equal(one["mse_a"], bare["mse"])
    spaced = make(1000, "ddim5")
    sample = spaced.ddim_sample_loop(toy_image, noise)
    twin = spaced.ddim_sample_loop(
        lambda x, t: {key: toy_image(leaf, t) for key, leaf in x.items()}, {"a": noise, "b": noise}
    )
    assert th.equal(twin["a"], sample)
    assert th.equal(twin["b"], sample)


def test_the_model_gets_original_timesteps_as_integers_or_rescaled_to_1000():
    t = th.tensor([0, 24])
    plain, rescaled = make(1100, "ddim25"), make(1100, "ddim25", rescale=True)
    assert plain.model_timesteps(t).tolist() == [0, 1056]
    assert plain.model_timesteps(t).dtype == th.long
    th.testing.assert_close(rescaled.model_timesteps(t), th.tensor([0.0, 960.0]))


# Sampling

LOOPS = {
    "ddim_loop5": ("ddim", "5", {}, toy, {}),
    "ddim_loop5_eta1": ("ddim", "5", {"eta": 1.0}, toy, {}),
    "p_loop4": ("p", "4", {}, toy, {}),
    "p_loop4_learned": ("p", "4", {}, toy_learned, {"var": ModelVarType.LEARNED_RANGE}),
}
IMAGE_LOOPS = {
    "img_ddim25_1100": ("ddim", "ddim25", {}, {"steps": 1100, "var": ModelVarType.LEARNED_RANGE}),
    "img_p4_fresh": ("p", "4", {}, {}),
    "img_p4_fresh_learned": ("p", "4", {}, {"var": ModelVarType.LEARNED_RANGE}),
}


def run_loop(diffusion, kind, model, x_T, **options):
    return getattr(diffusion, f"{kind}_sample_loop")(model, x_T, **options)


@pytest.mark.parametrize("case", LOOPS)
def test_loops_of_pairs_are_the_published_ones(case, recorded_noise):
    kind, respacing, options, model, settings = LOOPS[case]
    facts = INDEX["multimodal_diffusion"]["loops"][case]
    calls, listening = recorded_noise(case), Listening(model)
    diffusion = make(respacing=respacing, **settings)
    assert_golden(
        "multimodal_diffusion",
        case,
        run_loop(diffusion, kind, listening, start_noise(case), **options),
    )
    assert listening.timesteps == facts["model_timesteps"]
    assert next(calls) == (
        facts["like_draws"] if kind == "p" or "eta" in options else 0
    )  # as published, or none
    assert diffusion.timestep_map == facts["timestep_map"]


@pytest.mark.parametrize("case", IMAGE_LOOPS)
def test_loops_of_images_are_the_published_ones(case, recorded_noise):
    """Every ancestral step draws fresh noise; the published loop could add x_T itself (img_p4)."""
    kind, respacing, options, settings = IMAGE_LOOPS[case]
    facts = INDEX["image_diffusion"]["loops"][case]
    learned = "var" in settings
    calls, listening = recorded_noise(case), Listening(toy_image_learned if learned else toy_image)
    x_T = golden_data.noise(f"{case}.init0" if kind == "p" else "img.xT", (2, 3, 8, 8))
    assert_golden(
        "image_diffusion",
        case,
        run_loop(make(respacing=respacing, **settings), kind, listening, x_T, **options),
    )
    assert listening.timesteps == facts["model_timesteps"]
    assert next(calls) == (
        facts["like_draws"] if kind == "p" or "eta" in options else 0
    )  # as published, or none


@pytest.mark.parametrize(
    ("case", "t", "eta"), [("ddim_step", [3, 3], 0.0), ("ddim_step_eta", [3, 0], 0.5)]
)
def test_one_ddim_step_is_the_published_one(case, t, eta, recorded_noise):
    recorded_noise(case)
    out = make(respacing="5").ddim_sample(toy, pair()[2], th.tensor(t), eta=eta)
    assert_golden("multimodal_diffusion", case, out["sample"])


def test_ddim_inverts_the_forward_process_when_the_model_knows_the_data():
    """With the noise of one data point as model, every intermediate is q_sample of one noise."""
    x0, noise = (
        golden_data.noise("a", (2, 3, 8, 8)).clamp(-1, 1),
        golden_data.noise("b", (2, 3, 8, 8)),
    )
    diffusion = make(respacing="20")
    last = th.full((2,), diffusion.num_timesteps - 1)

    def model(x, t):
        return diffusion._epsilon(
            x0, x, th.tensor([diffusion.timestep_map.index(int(i)) for i in t])
        )

    steps = diffusion.ddim_sample_loop_progressive(model, diffusion.q_sample(x0, last, noise))
    for i, out in zip(reversed(range(diffusion.num_timesteps)), steps, strict=True):
        expected = diffusion.q_sample(x0, last * 0 + i - 1, noise) if i else x0
        th.testing.assert_close(out["sample"], expected, rtol=1e-4, atol=1e-4)


def test_ddim_with_eta_1_has_the_variance_of_the_ancestral_step(monkeypatch):
    diffusion, x, t = make(respacing="10"), golden_data.noise("c", (1, 5)), th.tensor([4])
    samples = []
    for value in (0.0, 1.0):
        monkeypatch.setattr(th, "randn_like", lambda x, value=value: th.full_like(x, value))
        samples.append(diffusion.ddim_sample(lambda x, t: 0 * x, x, t, eta=1.0)["sample"])
    posterior = diffusion.q_posterior_mean_variance(x, x, t)[1]
    th.testing.assert_close((samples[1] - samples[0]).square(), posterior, rtol=1e-4, atol=1e-6)


def test_ancestral_steps_use_fresh_noise():
    """Fault: the published image loop added x_T as the noise of every step."""
    diffusion, x_T = make(respacing="4"), golden_data.noise("d", (1, 3, 8, 8))
    generators = [th.Generator().manual_seed(1)]
    steps = list(
        diffusion.p_sample_loop_progressive(
            lambda x, t: 0 * x, x_T, generators, clip_denoised=False
        )
    )
    x, step_noises = x_T, []
    for i, out in zip(reversed(range(4)), steps, strict=True):
        mean = diffusion.p_mean_variance(
            lambda x, t: 0 * x, x, th.tensor([i]), clip_denoised=False
        )["mean"]
        step_noises.append((out["sample"] - mean).flatten())
        x = out["sample"]
    assert step_noises[-1].abs().max() == 0
    correlations = th.corrcoef(th.stack([x_T.flatten(), *step_noises[:-1]])) - th.eye(4)
    assert correlations.abs().max() < 0.3


@pytest.mark.parametrize(
    "options", [{}, {"conditioning": True}, {"conditioning": True, "classifier_scale": 2.0}]
)
def test_a_sample_does_not_depend_on_its_neighbours(options):
    diffusion, x_T = make(respacing="4"), named("own")
    truth = golden_data.noise("truth", SHAPES["audio"]) * 0.3

    def draw(rows):
        generators = [th.Generator().manual_seed(10 + i) for i in rows]
        extra = {**options, "conditioning": {"audio": truth[rows]}} if options else {}
        return diffusion.p_sample_loop(
            coupled, tree_map(lambda leaf: leaf[rows], x_T), generators, **extra
        )

    both, alone = draw([0, 1]), draw([1])
    for key in x_T:
        th.testing.assert_close(both[key][1:], alone[key], rtol=1e-6, atol=1e-6)


def test_progress_rises_to_one_and_steps_can_be_iterated():
    fractions = []
    steps = list(
        make(respacing="5").p_sample_loop_progressive(toy, named("p"), progress=fractions.append)
    )
    assert len(steps) == 5
    np.testing.assert_allclose(fractions, [0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(
        leaf.dtype == th.float32 and not leaf.requires_grad for leaf in leaves(steps[-1]["sample"])
    )


# Cross-modal generation


def conditional(case, recorded_noise, classifier_scale):
    target = INDEX["conditional"]["cases"][case]["target"]
    known = "video" if target == "audio" else "audio"
    truth = {known: 0.5 * golden_data.noise(f"cond.{known}0", (1, *SHAPES[known][1:]))}
    recorded_noise(case)
    listening = Listening(coupled)
    steps = make(respacing="4").p_sample_loop_progressive(
        listening, start_noise(case, batch=1), conditioning=truth, classifier_scale=classifier_scale
    )
    return target, truth, [out["sample"] for out in steps], listening.timesteps


@pytest.mark.parametrize("case", INDEX["conditional"]["cases"])
def test_generation_from_one_modality_is_the_published_one(case, recorded_noise):
    """The conditioning modality is returned exactly; the published code re-synthesised it."""
    target, truth, samples, timesteps = conditional(
        case, recorded_noise, 3.0 if "guide" in case else 0.0
    )
    arrays = golden_data.arrays("conditional")
    for name, sample in ((f"{case}_{target}_step0", samples[0]), (f"{case}_{target}", samples[-1])):
        th.testing.assert_close(sample[target], th.from_numpy(arrays[name]), rtol=1e-5, atol=1e-5)
    assert timesteps == INDEX["conditional"]["cases"][case]["model_timesteps"]
    for key, value in truth.items():
        assert th.equal(samples[-1][key], value)


def test_guidance_is_not_weakened_by_the_batch_size():
    """Fault: the gradient of a mean over the batch. Four copies are guided like one."""
    diffusion, x_T = make(respacing="4"), tree_map(lambda leaf: leaf[:1], named("own"))
    truth = 0.3 * golden_data.noise("truth", (1, 2, 10))

    def draw(copies):
        x, known = (
            tree_map(lambda leaf: th.cat([leaf] * copies), x_T),
            {"audio": th.cat([truth] * copies)},
        )
        generators = [th.Generator().manual_seed(3) for _ in range(copies)]
        return diffusion.p_sample_loop(
            coupled, x, generators, conditioning=known, classifier_scale=50.0
        )["video"]

    th.testing.assert_close(draw(4)[2:3], draw(1), rtol=1e-5, atol=1e-5)


def test_guidance_leaves_no_gradient_on_the_weights():
    weight = th.ones((), requires_grad=True)
    truth = {"audio": th.zeros(2, 2, 10)}
    make(respacing="4").p_sample_loop(
        lambda x, t: tree_map(lambda leaf: weight * leaf, coupled(x, t)),
        named("g"),
        conditioning=truth,
        classifier_scale=1.0,
    )
    assert weight.grad is None


@pytest.mark.parametrize(
    "conditioning", [{"smell": th.zeros(1)}, named("own"), {"audio": th.zeros(2, 2, 11)}]
)
def test_the_conditioning_must_be_some_of_what_is_sampled(conditioning):
    with pytest.raises(ValueError, match="conditioning"):
        make(respacing="4").p_sample_loop(toy, named("own"), conditioning=conditioning)


def test_a_gaussian_diffusion_of_all_steps_equals_the_spaced_one():
    betas = get_named_beta_schedule("linear", 50)
    settings = {
        "model_mean_type": ModelMeanType.EPSILON,
        "model_var_type": ModelVarType.FIXED_SMALL,
        "loss_type": LossType.MSE,
    }
    x_T = golden_data.noise("e", (1, 3, 4, 4))
    plain = GaussianDiffusion(betas=betas, **settings).ddim_sample_loop(toy_image, x_T)
    th.testing.assert_close(
        plain, SpacedDiffusion(range(50), betas=betas, **settings).ddim_sample_loop(toy_image, x_T)
    )
