"""Gaussian diffusion on trees: schedules, the forward process, losses, ancestral, DDIM and cross-modal sampling.

A sample is a tree (tree.py). A model is a function `model_fn(x, t)` from a tree and timesteps [B] to a tree of the same
structure, conditions already bound; with learned sigma each leaf comes back with twice the channels.
All arithmetic on samples is float32; the tables are float64.

Ho et al. 2020 (arXiv 2006.11239), Nichol and Dhariwal 2021 (arXiv 2102.09672), Song et al. 2020 (arXiv 2010.02502).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch as th

from .losses import discretized_gaussian_log_likelihood, normal_kl
from .tree import (
    Generators,
    Tree,
    append_dims,
    checked_given,
    leaves,
    mean_flat,
    randn_like,
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
    """arXiv 2102.09672, Eq. 17: alpha_bar(u) = cos^2(pi/2 (u + 0.008) / 1.008), betas at most 0.999."""
    angles = (np.arange(steps + 1, dtype=np.float64) / steps + 0.008) / 1.008 * math.pi / 2
    alpha_bar = np.cos(angles) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


BETA_SCHEDULES = {"linear": _linear_betas, "cosine": _cosine_betas}


def get_named_beta_schedule(name: str, steps: int) -> np.ndarray:
    """[steps] float64 betas of the schedule `name`."""
    if name not in BETA_SCHEDULES:
        raise ValueError(
            f"noise_schedule {name!r} is unknown: choose one of {', '.join(BETA_SCHEDULES)}"
        )
    return BETA_SCHEDULES[name](steps)


class GaussianDiffusion:
    """The tables of one noise schedule and everything that follows from them.

    `t` is always a long tensor [B] of indices into `betas`. What the model receives is `model_timesteps(t)`.
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
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"betas {list(betas.shape)} must be one row of numbers in (0, 1): check diffusion_steps"
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
        """[B] entries of a table, float32 or whole numbers; tables are copied to a device once."""
        key = (table, t.device)
        if key not in self._on_device:
            values = th.as_tensor(getattr(self, table))
            self._on_device[key] = to_device(
                values.float() if values.is_floating_point() else values, t.device
            )
        return self._on_device[key][t]

    def _fill(self, table: str, t: th.Tensor, like: Tree) -> Tree:
        values = self._at(table, t)
        return tree_map(lambda x: append_dims(values, x).expand_as(x), like)

    def model_timesteps(self, t: th.Tensor) -> th.Tensor:
        """[B] indices -> [B] what the model receives: original step numbers, or floats 0..1000 if rescaled."""
        steps = self._at("timestep_map", t)
        return (
            steps.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else steps
        )

    # Forward process

    def q_mean_variance(self, x_start: Tree, t: th.Tensor) -> tuple[Tree, Tree, Tree]:
        """Mean, variance and log variance of q(x_t | x_0), trees like `x_start`."""
        mean = weighted_sum((self._at("sqrt_alphas_cumprod", t), x_start))
        variance = self._fill("one_minus_alphas_cumprod", t, x_start)
        return mean, variance, self._fill("log_one_minus_alphas_cumprod", t, x_start)

    def q_sample(self, x_start: Tree, t: th.Tensor, noise: Tree | None = None) -> Tree:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (arXiv 2006.11239, Eq. 4)."""
        noise = randn_like(x_start) if noise is None else noise
        alpha, sigma = (
            self._at("sqrt_alphas_cumprod", t),
            self._at("sqrt_one_minus_alphas_cumprod", t),
        )
        return weighted_sum((alpha, x_start), (sigma, noise))

    def q_posterior_mean_variance(
        self, x_start: Tree, x_t: Tree, t: th.Tensor
    ) -> tuple[Tree, Tree, Tree]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0) (arXiv 2006.11239, Eq. 7)."""
        coef1, coef2 = self._at("posterior_mean_coef1", t), self._at("posterior_mean_coef2", t)
        mean = weighted_sum((coef1, x_start), (coef2, x_t))
        variance = self._fill("posterior_variance", t, x_t)
        return mean, variance, self._fill("posterior_log_variance_clipped", t, x_t)

    # Reverse process

    def _evaluate(self, model_fn: ModelFn, x: Tree, t: th.Tensor) -> tuple[Tree, Tree | None]:
        """One model call in float32: the prediction, and the variance values if sigma is learned."""
        output = tree_map(lambda out, _: out.float(), model_fn(x, self.model_timesteps(t)), x)
        if self.model_var_type is ModelVarType.LEARNED_RANGE:
            return tuple(
                tree_map(lambda out, x, i=i: split_doubled(out, x)[i], output, x) for i in (0, 1)
            )
        return output, None

    def _xstart(self, prediction: Tree, x: Tree, t: th.Tensor) -> Tree:
        """The x_0 that a prediction at x_t implies."""
        if self.model_mean_type is ModelMeanType.START_X:
            return prediction
        scale, noise = (
            self._at("sqrt_recip_alphas_cumprod", t),
            self._at("sqrt_recipm1_alphas_cumprod", t),
        )
        return weighted_sum((scale, x), (-noise, prediction))

    def _epsilon(self, x_start: Tree, x: Tree, t: th.Tensor) -> Tree:
        """The noise that leads from x_0 to x_t."""
        scale, noise = (
            self._at("sqrt_recip_alphas_cumprod", t),
            self._at("sqrt_recipm1_alphas_cumprod", t),
        )
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
        return {
            "mean": mean,
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
        }

    def p_mean_variance(
        self, model_fn: ModelFn, x: Tree, t: th.Tensor, clip_denoised: bool = True
    ) -> dict[str, Tree]:
        """p(x_{t-1} | x_t): trees `mean`, `variance`, `log_variance` and `pred_xstart`, each like `x`."""
        return self._reverse(*self._evaluate(model_fn, x, t), x, t, clip_denoised)

    def p_sample(
        self, model_fn: ModelFn, x: Tree, t: th.Tensor, generator: Generators = None, **options: Any
    ) -> dict[str, Tree]:
        """One ancestral step: `sample` ~ p(x_{t-1} | x_t) and `pred_xstart`. `options` go to `p_mean_variance`."""
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
        terms = [
            (previous.sqrt(), pred_xstart),
            ((1 - previous - sigma**2).clamp(min=0).sqrt(), epsilon),
        ]
        if eta:
            terms.append(((t > 0) * sigma, randn_like(epsilon, generator)))
        sample = weighted_sum(*terms)
        return {"sample": sample, "pred_xstart": pred_xstart}

    # Loops

    def p_sample_loop_progressive(
        self,
        model_fn: ModelFn,
        x_T: Tree,
        generator: Generators = None,
        *,
        given: dict | None = None,
        **options: Any,
    ) -> Iterator[dict[str, Tree]]:
        """Ancestral sampling from noise `x_T`; yields `sample` and `pred_xstart` after every step.

        given: {key: clip} of leaves that are known; the rest is generated to fit, and `sample` holds them exactly.
            `x_T[key]` is the one noise that re-noises a given leaf at every step.
        classifier_scale: 0 (default): given leaves are replaced by their noisy selves; above 0: also guided by the
            gradient of the error on them (`_guided_step`).
        progress: called with the fraction done, 0..1, after each step.
        Other `options` go to the step: clip_denoised (and eta for DDIM).
        """
        return self._loop(self.p_sample, model_fn, x_T, generator, given, **options)

    def ddim_sample_loop_progressive(
        self,
        model_fn: ModelFn,
        x_T: Tree,
        generator: Generators = None,
        *,
        given: dict | None = None,
        **options: Any,
    ) -> Iterator[dict[str, Tree]]:
        """DDIM sampling from noise `x_T`; options and results as for `p_sample_loop_progressive`."""
        return self._loop(self.ddim_sample, model_fn, x_T, generator, given, **options)

    def p_sample_loop(
        self, model_fn: ModelFn, x_T: Tree, generator: Generators = None, **options: Any
    ) -> Tree:
        """The sample at the end of `p_sample_loop_progressive`."""
        return _last(self.p_sample_loop_progressive(model_fn, x_T, generator, **options))

    def ddim_sample_loop(
        self, model_fn: ModelFn, x_T: Tree, generator: Generators = None, **options: Any
    ) -> Tree:
        """The sample at the end of `ddim_sample_loop_progressive`."""
        return _last(self.ddim_sample_loop_progressive(model_fn, x_T, generator, **options))

    def _loop(
        self,
        step_fn: Callable[..., dict[str, Tree]],
        model_fn: ModelFn,
        x_T: Tree,
        generator: Generators,
        given: dict[str, th.Tensor] | None,
        *,
        classifier_scale: float = 0.0,
        progress: Callable[[float], None] | None = None,
        **options: Any,
    ) -> Iterator[dict[str, Tree]]:
        step: Step = partial(step_fn, model_fn, generator=generator, **options)
        x: Any = tree_map(lambda leaf: leaf.float(), x_T)
        given = checked_given(given, x)
        noise = {key: x[key] for key in given}
        batch, device = leaves(x)[0].shape[0], leaves(x)[0].device
        for i in reversed(range(self.num_timesteps)):
            t = th.full((batch,), i, dtype=th.long, device=device)
            if given:
                noisy: Any = self.q_sample(given, t, noise)
                x = {**x, **noisy}
            out: dict[str, Any]
            if given and classifier_scale > 0 and i > 0:
                out = self._guided_step(step, x, t, given, noise, classifier_scale)
            else:
                with th.no_grad():
                    out = step(x, t)
            x = {**out["sample"], **given} if given else out["sample"]
            if progress is not None:
                progress(1 - i / self.num_timesteps)
            yield {"sample": x, "pred_xstart": out["pred_xstart"]}

    def _guided_step(
        self, step: Step, x: dict, t: th.Tensor, given: dict, noise: dict, classifier_scale: float
    ) -> dict[str, Any]:
        """One step from x to y with y_h - scale * sqrt(alpha_bar_t) * dL/dx_h for the leaves h that are not given.

        L is the mean squared error per clip of the given leaves of y against their noisy selves at t - 1, summed over
        clips: the published mean over the batch weakens guidance by the batch size and ties a clip to its neighbours.
        """
        with th.enable_grad():
            free = {
                key: leaf.detach().requires_grad_() for key, leaf in x.items() if key not in given
            }
            out: dict[str, Any] = step({**x, **free}, t)
            target: Any = self.q_sample(given, t - 1, noise)
            errors = [mean_flat((out["sample"][key] - target[key]).square()) for key in given]
            # The gradient of a mean over 1e5 numbers would vanish in a model that runs in float16.
            size = max(leaf[0].numel() for leaf in given.values())
            gradients = th.autograd.grad(size * th.stack(errors).sum(), list(free.values()))
        out = {name: tree_map(th.Tensor.detach, tree) for name, tree in out.items()}
        generated = {key: out["sample"][key] for key in free}
        scale = -classifier_scale / size * self._at("sqrt_alphas_cumprod", t)
        guided: Any = weighted_sum(
            (th.ones_like(t), generated), (scale, dict(zip(free, gradients, strict=True)))
        )
        return {**out, "sample": {**out["sample"], **guided}}

    # Training

    def training_losses(
        self, model_fn: ModelFn, x_start: Tree, t: th.Tensor, noise: Tree | None = None
    ) -> dict[str, th.Tensor]:
        """{"loss": [B]} and the terms it is the sum of, each [B], leaves of equal weight.

        Terms are "mse" and, with learned sigma or a KL loss, "vb" (bits per dimension times the loss type's factor);
        the leaves of a dict give "mse_<key>" and "vb_<key>".
        """
        x_start = tree_map(lambda leaf: leaf.float(), x_start)
        noise = randn_like(x_start) if noise is None else tree_map(lambda leaf: leaf.float(), noise)
        x_t = self.q_sample(x_start, t, noise)
        prediction, values = self._evaluate(model_fn, x_t, t)
        terms: dict[str, th.Tensor] = {}
        if self.loss_type in (LossType.MSE, LossType.RESCALED_MSE):
            target = x_start if self.model_mean_type is ModelMeanType.START_X else noise
            mse = tree_map(lambda a, b: mean_flat((a - b).square()), target, prediction)
            terms |= _named("mse", mse)
            prediction = tree_map(
                th.Tensor.detach, prediction
            )  # the bound trains the variance alone
        if values is not None or self.loss_type is LossType.RESCALED_KL:
            bound = self._bound(prediction, values, x_start, x_t, t)
            rescale = {
                LossType.RESCALED_MSE: self.num_timesteps / 1000,
                LossType.RESCALED_KL: self.num_timesteps,
            }
            terms |= _named("vb", tree_map(lambda vb: vb * rescale.get(self.loss_type, 1), bound))
        return {"loss": th.stack(list(terms.values())).sum(dim=0), **terms}

    def _bound(
        self, prediction: Tree, values: Tree | None, x_start: Tree, x_t: Tree, t: th.Tensor
    ) -> Tree:
        """[B] per leaf: the term of the variational bound at t, in bits per dimension, without clipping.

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the discretised -log p(x_0 | x_1).
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self._reverse(prediction, values, x_t, t, clip=False)

        def leaf_bound(x0, true_mean, true_logvar, mean, logvar):
            kl = mean_flat(normal_kl(true_mean, true_logvar, mean, logvar))
            nll = -mean_flat(
                discretized_gaussian_log_likelihood(x0, means=mean, log_scales=0.5 * logvar)
            )
            return th.where(t == 0, nll, kl) / math.log(2.0)

        return tree_map(
            leaf_bound, x_start, true_mean, true_log_variance, out["mean"], out["log_variance"]
        )


def _named(name: str, tree: Any) -> dict[str, th.Tensor]:
    return (
        {f"{name}_{key}": leaf for key, leaf in tree.items()}
        if isinstance(tree, dict)
        else {name: tree}
    )


def _last(steps: Iterable[dict[str, Tree]]) -> Tree:
    sample: Tree = {}
    for out in steps:
        sample = out["sample"]
    return sample
