"""DPM-Solver: recorded figures, orders of accuracy, trees and independence of neighbours."""

import golden_data
import numpy as np
import pytest
import torch as th

from mm_diffusion.dpm_solver import DPMSolver
from mm_diffusion.gaussian_diffusion import get_named_beta_schedule
from mm_diffusion.tree import append_dims, leaves, tree_map

CASES = golden_data.index()["solvers"]["cases"]
FIRST_FAULTS = ("fp16alphas", "1100fp16", "truncation", "float64")  # see the tests of alphas below
IMAGE_CASES = [name for name in CASES if name.startswith("img") and not name.endswith(FIRST_FAULTS)]
PAIR_CASES = [
    name for name in CASES if not name.startswith("img") and not name.endswith(FIRST_FAULTS)
]


def alphas_cumprod(steps=1000):
    return np.cumprod(1 - get_named_beta_schedule("linear", steps))


def toy(x, t):
    video_t, audio_t = (append_dims(t.float() / 1000, x[key]) for key in ("video", "audio"))
    return {
        "video": 0.3 * x["video"] * video_t.cos() + 0.1,
        "audio": 0.5 * x["audio"] + 0.05 * audio_t.sin(),
    }


def toy_image(x, t):
    return 0.3 * x * append_dims(t.float() / 1000, x).cos() + 0.1


def toy_image_learned(x, t):
    return th.cat([toy_image(x, t), 0.4 * x * append_dims(t.float() / 1000, x).sin() - 0.2], dim=1)


def pair_noise():
    return {
        "video": golden_data.noise("solver.video_T", (2, 3, 3, 4, 4)),
        "audio": golden_data.noise("solver.audio_T", (2, 2, 10)),
    }


def image_noise():
    return golden_data.noise("solver.img_T", (2, 3, 8, 8))


def solve(model, x_T, settings, steps=1000):
    """The sample, the timesteps that the model received, and the number of evaluations."""
    timesteps = []

    def listening(x, t):
        timesteps.append(int(t[0]))
        return model(x, t)

    solver = DPMSolver(listening, alphas_cumprod(steps), **settings["init"])
    return solver.sample(x_T, **settings["sample"]), timesteps, solver.evaluations


def assert_figure(leaf, wanted):
    th.testing.assert_close(
        leaf, th.from_numpy(wanted), rtol=0, atol=2e-6 * max(1.0, np.abs(wanted).max())
    )


@pytest.mark.parametrize("case", PAIR_CASES)
def test_samples_of_pairs_are_the_corrected_published_ones(case):
    """Faults: first-order noise steps of leaf 2, multistep 3, singlestep-3 taylor, adaptive."""
    sample, timesteps, evaluations = solve(toy, pair_noise(), CASES[case])
    for key, leaf in sample.items():
        assert_figure(leaf, golden_data.arrays("solvers")[f"{case}_corrected_{key}"])
    assert timesteps == CASES[case]["corrected"]["model_timesteps"]
    assert evaluations == CASES[case]["corrected"]["nfe"]


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_samples_of_images_are_the_published_ones(case):
    """With learned sigma, whose extra channels are dropped."""
    steps = 1100 if "1100" in case else 1000
    sample, timesteps, evaluations = solve(toy_image_learned, image_noise(), CASES[case], steps)
    assert_figure(sample, golden_data.arrays("solvers")[case])
    assert timesteps == CASES[case]["model_timesteps"]
    assert evaluations == CASES[case]["nfe"]


def test_every_published_case_is_used():
    assert len(PAIR_CASES) == 17
    assert len(IMAGE_CASES) == 5


# Order of accuracy: Gaussian data of deviation 0.5, whose denoiser and ODE solution are known.


class Exact:
    """Noise prediction for data N(0, deviation^2), in float64 and in continuous time."""

    def __init__(self, deviation=0.5, **settings):
        self.variance = deviation**2
        self.solver = DPMSolver(self, alphas_cumprod(), **settings)
        self.schedule = self.solver.schedule
        self.schedule.log_alphas, self.schedule.times = (
            self.schedule.log_alphas.double(),
            self.schedule.times.double(),
        )
        self.schedule.model_timesteps = lambda t: t

    def spread(self, t):
        return self.schedule.alpha(t) ** 2 * self.variance + self.schedule.sigma(t) ** 2

    def __call__(self, x, t):
        alpha, sigma = (
            append_dims(self.schedule.alpha(t), x),
            append_dims(self.schedule.sigma(t), x),
        )
        if self.solver.model_type == "x_start":
            return alpha * self.variance * x / append_dims(self.spread(t), x)
        return sigma * x / append_dims(self.spread(t), x)

    def solution(self, x_T):
        ends = self.spread(self.schedule.times[[0, -1]])
        return x_T * (ends[0] / ends[1]).sqrt()


@pytest.fixture
def float64(monkeypatch):
    """Samples keep double precision, so that third-order errors stand out from rounding."""
    monkeypatch.setattr(th.Tensor, "float", th.Tensor.double)
    default = th.get_default_dtype()
    th.set_default_dtype(th.float64)
    yield
    th.set_default_dtype(default)


@pytest.mark.parametrize("solver_type", ["dpm_solver", "taylor"])
@pytest.mark.parametrize("predict_x0", [False, True])
@pytest.mark.parametrize("model_type", ["noise", "x_start"])
@pytest.mark.parametrize(
    ("method", "order", "observed"),
    [
        ("singlestep", 1, 1),
        ("singlestep", 2, 2),
        ("singlestep_fixed", 1, 1),
        ("singlestep_fixed", 2, 2),
        ("singlestep_fixed", 3, 3),
        ("multistep", 1, 1),
        ("multistep", 2, 2),
        ("multistep", 3, 2),  # its first step is of order 1, which bounds the whole
    ],
)
def test_halving_the_step_divides_the_error_by_2_to_the_order(
    method, order, observed, model_type, predict_x0, solver_type, float64
):
    exact = Exact(predict_x0=predict_x0, model_type=model_type)
    x_T = th.ones(1, 1)

    def error(steps):
        settings = {
            "method": method,
            "order": order,
            "solver_type": solver_type,
            "skip_type": "logSNR",
        }
        return float(
            (exact.solver.sample(x_T, steps=steps, **settings) - exact.solution(x_T)).abs()
        )

    assert np.log2(error(120) / error(240)) > observed - 0.3


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("predict_x0", [False, True])
def test_adaptive_steps_get_as_near_as_the_tolerance_asks(order, predict_x0, float64):
    exact, x_T = Exact(predict_x0=predict_x0), th.ones(1, 1)
    errors = []
    for tolerance in (1e-2, 1e-4):
        sample = exact.solver.sample(
            x_T, method="adaptive", order=order, atol=tolerance, rtol=tolerance
        )
        errors.append(float((sample - exact.solution(x_T)).abs()))
    assert errors[0] < 0.05
    assert errors[1] < errors[0] / 10


# Trees


@pytest.mark.parametrize("method", ["singlestep", "singlestep_fixed", "multistep", "adaptive"])
@pytest.mark.parametrize("predict_x0", [False, True])
@pytest.mark.parametrize("solver_type", ["dpm_solver", "taylor"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_equal_streams_stay_equal_and_a_dict_of_one_is_the_bare_tensor(
    method, predict_x0, solver_type, order
):
    if method == "adaptive" and order == 1:
        pytest.skip("order 1 has no lower order")
    options = {"method": method, "order": order, "solver_type": solver_type, "steps": 9}

    def draw(x):
        model = lambda x, t: tree_map(lambda leaf: toy_image(leaf, t), x)  # noqa: E731
        return DPMSolver(model, alphas_cumprod(), predict_x0, thresholding=predict_x0).sample(
            x, **options
        )

    x_T = golden_data.noise("stream", (1, 3, 4, 4))
    bare, one, two = draw(x_T), draw({"a": x_T}), draw({"a": x_T, "b": x_T})
    assert bare.shape == x_T.shape
    for leaf in (one["a"], two["a"], two["b"]):
        assert th.equal(leaf, bare)


@pytest.mark.parametrize("init", [{}, {"predict_x0": True, "thresholding": True}])
@pytest.mark.parametrize("order", [2, 3])
def test_with_step_control_by_sample_a_sample_does_not_depend_on_its_neighbours(init, order):
    x_T = {
        "video": golden_data.noise("v", (3, 3, 3, 4, 4)),
        "audio": golden_data.noise("a", (3, 2, 10)),
    }
    x_T = tree_map(lambda leaf: leaf * append_dims(th.tensor([0.2, 1.0, 3.0]), leaf), x_T)
    solver = DPMSolver(toy, alphas_cumprod(), **init)
    options = {"method": "adaptive", "order": order}
    together = solver.sample(x_T, step_control="sample", **options)
    needed = []
    for i in range(3):
        one = tree_map(lambda leaf, i=i: leaf[i : i + 1], x_T)
        alone = solver.sample(one, step_control="sample", **options)
        needed.append(solver.evaluations)
        for key in x_T:
            assert th.equal(alone[key], together[key][i : i + 1])
        batch = solver.sample(one, step_control="batch", **options)
        assert all(th.equal(a, b) for a, b in zip(leaves(alone), leaves(batch), strict=True))
    solver.sample(x_T, step_control="sample", **options)
    assert solver.evaluations == max(needed)


def test_conditions_follow_the_samples_that_remain():
    """Samples of different scales finish at different times; each keeps its condition."""
    x_T = golden_data.noise("v", (3, 3, 4, 4)) * th.tensor([1e-3, 1.0, 30.0]).reshape(3, 1, 1, 1)
    low_res = th.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1, 1)
    sizes = []

    def model(x, t, low_res):
        sizes.append(len(x))
        return toy_image(x, t) + low_res

    options = {"method": "adaptive", "order": 2, "step_control": "sample"}
    solver = DPMSolver(model, alphas_cumprod())
    together = solver.sample(x_T, cond={"low_res": low_res}, **options)
    assert min(sizes) < 3
    for i in range(3):
        alone = solver.sample(x_T[i : i + 1], cond={"low_res": low_res[i : i + 1]}, **options)
        assert th.equal(alone, together[i : i + 1])


def test_thresholding_is_per_sample_and_bounds_the_data():
    x_T = image_noise() * th.tensor([1.0, 5.0]).reshape(2, 1, 1, 1)
    options = {"steps": 5, "order": 2, "method": "multistep", "denoise": True}
    draw = lambda x: DPMSolver(toy_image, alphas_cumprod(), True, True).sample(x, **options)  # noqa: E731
    assert draw(x_T).abs().max() <= 1
    th.testing.assert_close(draw(x_T)[:1], draw(x_T[:1]))


# Precision


def test_alphas_are_float32_whatever_precision_the_table_and_the_model_have():
    """Fault: alphas in float16, whose first two are one, gave NaN."""
    settings = CASES["img_ms2_50_uniform_fp16alphas"]["sample"]
    half_model = lambda x, t: toy_image_learned(x, t).half()  # noqa: E731
    table = alphas_cumprod()
    sample = DPMSolver(half_model, table).sample(image_noise().half(), **settings)
    assert sample.dtype == th.float32
    assert sample.isfinite().all()
    single = DPMSolver(toy_image, th.from_numpy(table).float()).sample(image_noise(), **settings)
    assert th.equal(single, DPMSolver(toy_image, table).sample(image_noise(), **settings))
    with pytest.raises(ValueError, match="not half"):
        DPMSolver(toy_image, th.from_numpy(table).half())


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "euler"}, "singlestep, singlestep_fixed, multistep, adaptive"),
        ({"order": 4}, "1, 2, 3"),
        ({"skip_type": "log"}, "time_uniform, time_quadratic, logSNR"),
        ({"solver_type": "heun"}, "dpm_solver, taylor"),
        ({"step_control": "clip"}, "batch, sample"),
        ({"method": "adaptive", "order": 1}, "choose 2 or 3"),
        ({"method": "singlestep_fixed", "order": 3, "steps": 2}, "at least 3"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_impossible_settings_name_the_choices_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        DPMSolver(toy_image, alphas_cumprod()).sample(image_noise(), **options)
    assert "\n" not in str(caught.value)


def test_impossible_solvers_are_refused():
    with pytest.raises(ValueError, match="noise, x_start"):
        DPMSolver(toy_image, alphas_cumprod(), model_type="velocity")
    with pytest.raises(ValueError, match="predict_x0"):
        DPMSolver(toy_image, alphas_cumprod(), thresholding=True)


@pytest.mark.parametrize("steps", range(1, 8))
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("method", ["singlestep", "multistep"])
def test_every_number_of_steps_uses_exactly_that_many_evaluations(method, order, steps):
    solver = DPMSolver(toy_image, alphas_cumprod())
    assert solver.sample(image_noise(), steps=steps, order=order, method=method).isfinite().all()
    assert solver.evaluations == steps


def test_a_model_that_is_not_finite_stops_the_adaptive_solver():
    with pytest.raises(FloatingPointError, match="not finite"):
        DPMSolver(lambda x, t: x * th.nan, alphas_cumprod()).sample(
            image_noise(), method="adaptive", order=2
        )


@pytest.mark.parametrize("method", ["singlestep", "singlestep_fixed", "multistep", "adaptive"])
@pytest.mark.parametrize("step_control", ["batch", "sample"])
def test_progress_rises_to_one(method, step_control):
    fractions = []
    DPMSolver(toy, alphas_cumprod()).sample(
        pair_noise(), method=method, steps=12, progress=fractions.append, step_control=step_control
    )
    assert fractions == sorted(fractions)
    assert fractions[0] >= 0
    assert fractions[-1] == pytest.approx(1.0)
