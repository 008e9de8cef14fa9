"""Gaussian diffusion on trees: schedules, forward process, losses, ancestral and DDIM sampling.

A sample is a tree (tree.py). A model is a function `model_fn(x, t)` from a tree and timesteps [B]
to a tree of the same structure, conditions already bound; with learned sigma each leaf comes back
with twice the channels. All arithmetic on samples is float32; the tables are float64.

Ho et al. 2020 (arXiv 2006.11239), Nichol and Dhariwal 2021 (arXiv 2102.09672), Song et al. 2020
(arXiv 2010.02502).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch as th
from tqdm import tqdm

from .calls import Progress, loop_arguments, with_conditions
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .rng import Generators, randn_like
from .tree import (
    Tree,
    append_dims,
    check_conditioning,
    leaves,
    mean_flat,
    split_doubled,
    to_device,
    tree_map,
    weighted_sum,
)

ModelFn = Callable[[Tree, th.Tensor], Tree]
Step = Callable[[Tree, th.Tensor], dict[str, Any]]


class ModelMeanType(enum.Enum):
    """What the model predicts."""

    START_X = enum.auto()
    EPSILON = enum.auto()
    V = enum.auto()  # sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (arXiv 2202.00512, App. D)


class ModelVarType(enum.Enum):
    """Where the variance of a reverse step comes from."""

    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """What training minimises."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    RESCALED_KL = enum.auto()


def _linear_betas(steps: int) -> np.ndarray:
    """1e-4 .. 0.02 for 1000 steps; other numbers of steps keep the total noise."""
    scale = 1000 / steps
    return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)


def _cosine_betas(steps: int) -> np.ndarray:
    """2102.09672, Eq. 17: alpha_bar(u) = cos^2(pi/2 (u + 0.008) / 1.008), betas at most 0.999."""
    angles = (np.arange(steps + 1, dtype=np.float64) / steps + 0.008) / 1.008 * math.pi / 2
    alpha_bar = np.cos(angles) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


BETA_SCHEDULES = {"linear": _linear_betas, "cosine": _cosine_betas}
ZERO_SNR = "_zero_snr"  # what follows the name of a schedule that ends in noise alone
NOISE_SCHEDULES = [name + end for end in ("", ZERO_SNR) for name in BETA_SCHEDULES]


def get_named_beta_schedule(name: str, steps: int) -> np.ndarray:
    """[steps] float64 betas of the schedule `name`."""
    if name not in NOISE_SCHEDULES:
        known = ", ".join(NOISE_SCHEDULES)
        raise ValueError(f"noise_schedule {name!r} is unknown: choose one of {known}")
    betas = BETA_SCHEDULES[name.removesuffix(ZERO_SNR)](steps)
    return _with_zero_snr(betas) if name.endswith(ZERO_SNR) else betas


def _with_zero_snr(betas: np.ndarray) -> np.ndarray:
    """sqrt(alpha_bar) shifted to end at 0 and scaled to keep its start (2305.08891, Alg. 1)."""
    if len(betas) < 2:
        raise ValueError("diffusion_steps 1: a schedule that ends in noise alone needs 2 or more")
    alpha = np.sqrt(np.cumprod(1 - betas))
    alpha_bar = np.square((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1]))
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


class GaussianDiffusion:
    """The tables of one noise schedule and everything that follows from them.

    `t` is always a long tensor [B] of indices into `betas`; the model gets `model_timesteps(t)`.
    """

    def __init__(
        self,
        *,
        betas: np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ):
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.betas = betas = np.asarray(betas, dtype=np.float64)
        is_row = betas.ndim == 1 and len(betas) > 0
        if not is_row or not ((betas > 0) & (betas < 1))[:-1].all() or not 0 < betas[-1] <= 1:
            shape = list(betas.shape)
            raise ValueError(
                f"betas {shape}: need a row of values in (0, 1), the last at most 1;"
                " check diffusion_steps"
            )
        self.has_zero_snr = bool(betas[-1] == 1)
        if self.has_zero_snr and model_mean_type is ModelMeanType.EPSILON:
            raise ValueError(
                "the last beta is 1, noise alone, from which predicted noise leads nowhere: set"
                " prediction v or x_start, or other diffusion_steps or noise_schedule"
            )
        self.num_timesteps = self.original_num_steps = len(betas)
        self.timestep_map = list(range(len(betas)))
        self._on_device: dict[tuple[str, th.device], th.Tensor] = {}
        self._build_tables()

    def _build_tables(self) -> None:
        betas = self.betas
        self.alphas_cumprod = alpha_bar = np.cumprod(1.0 - betas)
        self.alphas_cumprod_prev = previous = np.append(1.0, alpha_bar[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(alpha_bar)
        self.one_minus_alphas_cumprod = 1.0 - alpha_bar
        self.log_one_minus_alphas_cumprod = np.log(1.0 - alpha_bar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - alpha_bar)
        with np.errstate(divide="ignore"):  # at zero SNR, where nothing reads them
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / alpha_bar)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / alpha_bar - 1.0)
        # arXiv 2006.11239, Eq. 6 and 7
        self.posterior_variance = betas * (1.0 - previous) / (1.0 - alpha_bar)
        self.posterior_mean_coef1 = betas * np.sqrt(previous) / (1.0 - alpha_bar)
        self.posterior_mean_coef2 = (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alpha_bar)
        # The posterior variance at t = 0 is zero, which has no logarithm; its neighbour stands in.
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.log_betas = np.log(betas)
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            self.fixed_variance = np.append(first, betas[1:])
            self.fixed_log_variance = np.log(self.fixed_variance)
        else:
            self.fixed_variance = self.posterior_variance
            self.fixed_log_variance = self.posterior_log_variance_clipped

    def _at(self, table: str, t: th.Tensor) -> th.Tensor:
        """[B] entries of a table, float32 or integer; tables are copied to a device once."""
        key = (table, t.device)
        if key not in self._on_device:
            values = th.as_tensor(getattr(self, table))
            values = values.float() if values.is_floating_point() else values
            self._on_device[key] = to_device(values, t.device)
        return self._on_device[key][t]

    def _fill(self, table: str, t: th.Tensor, like: Tree) -> Tree:
        values = self._at(table, t)
        return tree_map(lambda x: append_dims(values, x).expand_as(x), like)

    def _alpha_sigma(self, t: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """[B] each: x_t = alpha x_0 + sigma noise."""
        return self._at("sqrt_alphas_cumprod", t), self._at("sqrt_one_minus_alphas_cumprod", t)

    def model_timesteps(self, t: th.Tensor) -> th.Tensor:
        """[B] indices -> [B] what the model gets: original steps, or floats 0..1000 if rescaled."""
        steps = self._at("timestep_map", t)
        if self.rescale_timesteps:
            return steps.float() * (1000.0 / self.original_num_steps)
        return steps

    # Forward process

    def q_mean_variance(self, x_start: Tree, t: th.Tensor) -> tuple[Tree, Tree, Tree]:
        """Mean, variance and log variance of q(x_t | x_0), trees like `x_start`."""
        mean = weighted_sum((self._at("sqrt_alphas_cumprod", t), x_start))
        variance = self._fill("one_minus_alphas_cumprod", t, x_start)
        return mean, variance, self._fill("log_one_minus_alphas_cumprod", t, x_start)

    def q_sample(self, x_start: Tree, t: th.Tensor, noise: Tree | None = None) -> Tree:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (arXiv 2006.11239, Eq. 4)."""
        noise = randn_like(x_start) if noise is None else noise
        alpha, sigma = self._alpha_sigma(t)
        return weighted_sum((alpha, x_start), (sigma, noise))

    def q_posterior_mean_variance(
        self, x_start: Tree, x_t: Tree, t: th.Tensor
    ) -> tuple[Tree, Tree, Tree]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0) (2006.11239, Eq. 7)."""
        coef1, coef2 = self._at("posterior_mean_coef1", t), self._at("posterior_mean_coef2", t)
        mean = weighted_sum((coef1, x_start), (coef2, x_t))
        variance = self._fill("posterior_variance", t, x_t)
        return mean, variance, self._fill("posterior_log_variance_clipped", t, x_t)

    # Reverse process

    def _evaluate(self, model_fn: ModelFn, x: Tree, t: th.Tensor) -> tuple[Tree, Tree | None]:
        """The model's prediction in float32, and the variance values if sigma is learned."""
        output = tree_map(th.Tensor.float, model_fn(x, self.model_timesteps(t)))
        if self.model_var_type is ModelVarType.LEARNED_RANGE:
            return split_doubled(output, x)
        return output, None

    def _xstart(self, prediction: Tree, x: Tree, t: th.Tensor) -> Tree:
        """The x_0 that a prediction at x_t implies."""
        if self.model_mean_type is ModelMeanType.START_X:
            return prediction
        if self.model_mean_type is ModelMeanType.V:
            alpha, sigma = self._alpha_sigma(t)
            return weighted_sum((alpha, x), (-sigma, prediction))
        scale = self._at("sqrt_recip_alphas_cumprod", t)
        noise = self._at("sqrt_recipm1_alphas_cumprod", t)
        return weighted_sum((scale, x), (-noise, prediction))

    def _epsilon(self, x_start: Tree, x: Tree, t: th.Tensor) -> Tree:
        """The noise that leads from x_0 to x_t."""
        if self.has_zero_snr:
            alpha, sigma = self._alpha_sigma(t)
            return weighted_sum((1 / sigma, x), (-alpha / sigma, x_start))
        scale = self._at("sqrt_recip_alphas_cumprod", t)
        noise = self._at("sqrt_recipm1_alphas_cumprod", t)
        return weighted_sum((scale / noise, x), (-1 / noise, x_start))

    def _variances(self, values: Tree | None, x: Tree, t: th.Tensor) -> tuple[Tree, Tree]:
        """Variance and log variance of p(x_{t-1} | x_t)."""
        if values is None:
            return self._fill("fixed_variance", t, x), self._fill("fixed_log_variance", t, x)
        share = tree_map(lambda v: (v + 1) / 2, values)  # arXiv 2102.09672, Eq. 15
        high, low = self._at("log_betas", t), self._at("posterior_log_variance_clipped", t)
        log_variance = weighted_sum((high, share), (low, tree_map(lambda v: 1 - v, share)))
        return tree_map(th.exp, log_variance), log_variance

    def _reverse(
        self, prediction: Tree, values: Tree | None, x: Tree, t: th.Tensor, clip: bool
    ) -> dict[str, Tree]:
        pred_xstart = self._xstart(prediction, x, t)
        if clip:
            pred_xstart = tree_map(lambda x_start: x_start.clamp(-1, 1), pred_xstart)
        mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        variance, log_variance = self._variances(values, x, t)
        moments = {"mean": mean, "variance": variance, "log_variance": log_variance}
        return {**moments, "pred_xstart": pred_xstart}

    def p_mean_variance(
        self, model_fn: ModelFn, x: Tree, t: th.Tensor, clip_denoised: bool = True
    ) -> dict[str, Tree]:
        """p(x_{t-1} | x_t): `mean`, `variance`, `log_variance`, `pred_xstart`, each like `x`."""
        return self._reverse(*self._evaluate(model_fn, x, t), x, t, clip_denoised)

    def p_sample(
        self, model_fn: ModelFn, x: Tree, t: th.Tensor, generator: Generators = None, **options: Any
    ) -> dict[str, Tree]:
        """One ancestral step: `sample` ~ p(x_{t-1} | x_t) and `pred_xstart`.

        `options` go to `p_mean_variance`.
        """
        out = self.p_mean_variance(model_fn, x, t, **options)
        deviation = tree_map(lambda log_variance: (0.5 * log_variance).exp(), out["log_variance"])
        step_noise = tree_map(th.mul, deviation, randn_like(out["mean"], generator))
        sample = weighted_sum((th.ones_like(t), out["mean"]), ((t > 0).float(), step_noise))
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model_fn: ModelFn,
        x: Tree,
        t: th.Tensor,
        generator: Generators = None,
        eta: float = 0.0,
        **options: Any,
    ) -> dict[str, Tree]:
        """One DDIM step (arXiv 2010.02502, Eq. 12 and 16): `sample` and `pred_xstart`."""
        pred_xstart = self.p_mean_variance(model_fn, x, t, **options)["pred_xstart"]
        epsilon = self._epsilon(pred_xstart, x, t)
        alpha_bar, previous = self._at("alphas_cumprod", t), self._at("alphas_cumprod_prev", t)
        sigma = eta * ((1 - previous) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / previous).sqrt()
        direction = (1 - previous - sigma**2).clamp(min=0).sqrt()
        terms = [(previous.sqrt(), pred_xstart), (direction, epsilon)]
        if eta:
            terms.append(((t > 0) * sigma, randn_like(epsilon, generator)))
        return {"sample": weighted_sum(*terms), "pred_xstart": pred_xstart}

    # Loops

    def p_sample_loop_progressive(
        self, model_fn: ModelFn, x_T: Any = None, generator: Generators = None, **options: Any
    ) -> Iterator[dict[str, Tree]]:
        """Ancestral sampling from noise `x_T`; yields `sample` and `pred_xstart` after every step.

        A network and a shape do as well, as in guided-diffusion: see `calls.loop_arguments`.
        conditioning: {key: clip} of leaves that are known; the others are generated to fit, and
            `sample` holds the known ones exactly. `x_T[key]` is the one noise that such a leaf gets
            at every step.
        classifier_scale: 0 (default): conditioning leaves are replaced by their noisy selves;
            above 0: guidance by the gradient of the error on them, too (`_guided_step`).
        progress: called with the fraction done, 0..1, after each step; True: shows a bar.
        Other `options` go to the step: clip_denoised (and eta for DDIM).
        """
        return self._loop(self.p_sample, model_fn, x_T, generator, **options)

    def ddim_sample_loop_progressive(
        self, model_fn: ModelFn, x_T: Any = None, generator: Generators = None, **options: Any
    ) -> Iterator[dict[str, Tree]]:
        """DDIM sampling from noise `x_T`; all else as for `p_sample_loop_progressive`."""
        return self._loop(self.ddim_sample, model_fn, x_T, generator, **options)

    def p_sample_loop(
        self, model_fn: ModelFn, x_T: Any = None, generator: Generators = None, **options: Any
    ) -> Tree:
        """The sample at the end of `p_sample_loop_progressive`."""
        return _last(self.p_sample_loop_progressive(model_fn, x_T, generator, **options))

    def ddim_sample_loop(
        self, model_fn: ModelFn, x_T: Any = None, generator: Generators = None, **options: Any
    ) -> Tree:
        """The sample at the end of `ddim_sample_loop_progressive`."""
        return _last(self.ddim_sample_loop_progressive(model_fn, x_T, generator, **options))

    def _loop(
        self,
        step_fn: Callable[..., dict[str, Tree]],
        model_fn: ModelFn,
        x_T: Any,
        generator: Generators,
        *,
        conditioning: dict[str, th.Tensor] | None = None,
        classifier_scale: float = 0.0,
        progress: Progress | bool | None = None,
        **options: Any,
    ) -> Iterator[dict[str, Tree]]:
        model_fn, x_T, options = loop_arguments(model_fn, x_T, generator, options)
        step: Step = partial(step_fn, model_fn, generator=generator, **options)
        x: Any = tree_map(th.Tensor.float, x_T)
        known = check_conditioning(conditioning, x)
        noise = {key: x[key] for key in known}
        batch, device = leaves(x)[0].shape[0], leaves(x)[0].device
        timesteps = range(self.num_timesteps)[::-1]
        for i in tqdm(timesteps, disable=progress is not True):
            t = th.full((batch,), i, dtype=th.long, device=device)
            if known:
                noisy: Any = self.q_sample(known, t, noise)
                x = {**x, **noisy}
            out: dict[str, Any]
            if known and classifier_scale > 0 and i > 0:
                out = self._guided_step(step, x, t, known, noise, classifier_scale)
            else:
                with th.no_grad():
                    out = step(x, t)
            x = {**out["sample"], **known} if known else out["sample"]
            if callable(progress):
                progress(1 - i / self.num_timesteps)
            yield {"sample": x, "pred_xstart": out["pred_xstart"]}

    def _guided_step(
        self, step: Step, x: dict, t: th.Tensor, known: dict, noise: dict, classifier_scale: float
    ) -> dict[str, Any]:
        """One step from x to y with y_h - scale * sqrt(alpha_bar_t) * dL/dx_h for unknown leaves h.

        L is the mean squared error per clip of the known leaves of y against their noisy selves at
        t - 1, summed over clips. (Published: the mean over the batch, which weakens guidance by the
        batch size and makes a clip depend on its neighbours.)
        """
        with th.enable_grad():
            unknown = {key: leaf.detach() for key, leaf in x.items() if key not in known}
            for leaf in unknown.values():
                leaf.requires_grad_()
            out: dict[str, Any] = step({**x, **unknown}, t)
            target: Any = self.q_sample(known, t - 1, noise)
            errors = [mean_flat((out["sample"][key] - target[key]).square()) for key in known]
            # The gradient of a mean over 1e5 values would vanish in a model that runs in float16.
            size = max(leaf[0].numel() for leaf in known.values())
            gradients = th.autograd.grad(size * th.stack(errors).sum(), list(unknown.values()))
        out = {name: tree_map(th.Tensor.detach, tree) for name, tree in out.items()}
        generated = {key: out["sample"][key] for key in unknown}
        scale = -classifier_scale / size * self._at("sqrt_alphas_cumprod", t)
        gradient = dict(zip(unknown, gradients, strict=True))
        guided: Any = weighted_sum((th.ones_like(t), generated), (scale, gradient))
        return {**out, "sample": {**out["sample"], **guided}}

    # Training

    def training_losses(
        self,
        model_fn: ModelFn,
        x_start: Tree,
        t: th.Tensor,
        noise: Tree | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, th.Tensor]:
        """{"loss": [B]} and the terms it is the sum of, each [B], leaves of equal weight.

        A network and its `model_kwargs` do as well as a function.
        Terms are "mse" and, with learned sigma or a KL loss, "vb" (bits per dimension times the
        loss type's factor); the leaves of a dict give "mse_<key>" and "vb_<key>".
        """
        model_fn = with_conditions(model_fn, model_kwargs)
        x_start = tree_map(th.Tensor.float, x_start)
        noise = randn_like(x_start) if noise is None else tree_map(th.Tensor.float, noise)
        x_t = self.q_sample(x_start, t, noise)
        prediction, values = self._evaluate(model_fn, x_t, t)
        terms: dict[str, th.Tensor] = {}
        if self.loss_type is not LossType.RESCALED_KL:
            target = self._target(x_start, noise, t)
            mse = tree_map(lambda a, b: mean_flat((a - b).square()), target, prediction)
            terms |= _named("mse", mse)
            # The bound trains the variance only.
            prediction = tree_map(th.Tensor.detach, prediction)
        if values is not None or self.loss_type is LossType.RESCALED_KL:
            bound = self._bound(prediction, values, x_start, x_t, t)
            rescaled_mse, kl = self.num_timesteps / 1000, self.num_timesteps
            factors = {LossType.RESCALED_MSE: rescaled_mse, LossType.RESCALED_KL: kl}
            factor = factors.get(self.loss_type, 1)
            terms |= _named("vb", tree_map(lambda vb: vb * factor, bound))
        return {"loss": th.stack(list(terms.values())).sum(dim=0), **terms}

    def _target(self, x_start: Tree, noise: Tree, t: th.Tensor) -> Tree:
        """What the model is to predict."""
        if self.model_mean_type is ModelMeanType.V:
            alpha, sigma = self._alpha_sigma(t)
            return weighted_sum((alpha, noise), (-sigma, x_start))
        return x_start if self.model_mean_type is ModelMeanType.START_X else noise

    def _bound(
        self, prediction: Tree, values: Tree | None, x_start: Tree, x_t: Tree, t: th.Tensor
    ) -> Tree:
        """[B] per leaf: the variational bound's term at t in bits per dimension, without clipping.

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the discretised -log p(x_0 | x_1).
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self._reverse(prediction, values, x_t, t, clip=False)

        mean, log_variance = out["mean"], out["log_variance"]
        log_scales = tree_map(lambda leaf: 0.5 * leaf, log_variance)
        log_likelihood = tree_map(discretized_gaussian_log_likelihood, x_start, mean, log_scales)
        kl = tree_map(normal_kl, true_mean, true_log_variance, mean, log_variance)

        def leaf_bound(kl: th.Tensor, log_likelihood: th.Tensor) -> th.Tensor:
            nats = th.where(t == 0, -mean_flat(log_likelihood), mean_flat(kl))
            return nats / math.log(2.0)

        return tree_map(leaf_bound, kl, log_likelihood)


def _named(name: str, tree: Any) -> dict[str, th.Tensor]:
    if isinstance(tree, dict):
        return {f"{name}_{key}": leaf for key, leaf in tree.items()}
    return {name: tree}


def _last(steps: Iterable[dict[str, Tree]]) -> Tree:
    sample: Tree = {}
    for out in steps:
        sample = out["sample"]
    return sample
