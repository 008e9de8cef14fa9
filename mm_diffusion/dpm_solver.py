"""DPM-Solver and DPM-Solver++ on trees (Lu et al. 2022, arXiv 2206.00927 and 2211.01095).

Both solve the diffusion ODE exactly in its linear part and expand the model's prediction m in
lambda, half the log of the signal-to-noise ratio. With (a, b) = (alpha, sigma) and eta = h for
noise prediction, (sigma, alpha) and -h for data prediction, a step from s to t of length
h = lambda_t - lambda_s is in both cases

    x_t = a_t / a_s x_s - b_t (phi_1(eta) m + phi_2(eta) D_1 + phi_3(eta) D_2),

D_k the k-th derivative of m at s times h^k, taken from predictions at nodes: points ahead within
the step (singlestep) or behind it (multistep). Every method here is a choice of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch as th
from torch import Tensor

from .tree import (
    Tree,
    append_dims,
    check_conditioning,
    leaves,
    split_doubled,
    to_device,
    tree_map,
    weighted_sum,
)

METHODS = ("singlestep", "singlestep_fixed", "multistep", "adaptive")
SKIP_TYPES = ("time_uniform", "time_quadratic", "logSNR")
SOLVER_TYPES = ("dpm_solver", "taylor")
STEP_CONTROLS = ("batch", "sample")
MODEL_TYPES = ("noise", "x_start", "v")
# Order -> where the further nodes of a step lie, in fractions of h.
SINGLESTEP_NODES: dict[int, tuple[float, ...]] = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}
# steps % 3 -> orders of the last steps of singlestep 3.
THIRD_ORDER_ENDS = {0: [2, 1], 1: [1], 2: [2]}
# Stands for alpha_bar 0, whose logarithm is infinite: a signal of 2.4e-4 beside the noise.
LEAST_ALPHA_BAR = 2.0**-24
FIRST_H, SAFETY, END_TOLERANCE, SMALLEST_H = 0.05, 0.9, 1e-5, 1e-6  # of the adaptive steps


class NoiseSchedule:
    """log alpha over continuous time: linear between the N discrete steps at i / N, i = 1 .. N.

    Always float32 on the CPU: in half precision the first alphas round to one. A last one of 0
    (zero terminal SNR) becomes LEAST_ALPHA_BAR.
    """

    def __init__(self, alphas_cumprod: np.ndarray | Tensor):
        alphas = th.as_tensor(alphas_cumprod).detach().cpu()
        inside = (alphas > 0) & (alphas < 1)
        if alphas.ndim != 1 or not inside[:-1].all() or not 0 <= alphas[-1] < 1:
            raise ValueError("alphas_cumprod: need one row of values in (0, 1), not half precision")
        self.num_steps = len(alphas)
        if alphas[-1] == 0:
            alphas = th.cat([alphas[:-1], alphas.new_tensor([LEAST_ALPHA_BAR])])
        self.log_alphas = 0.5 * alphas.float().log()
        self.times = th.linspace(0.0, 1.0, self.num_steps + 1)[1:]

    def log_alpha(self, t: Tensor) -> Tensor:
        return _interpolate(t, self.times, self.log_alphas)

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (1.0 - (2.0 * self.log_alpha(t)).exp()).sqrt()

    def lambda_(self, t: Tensor) -> Tensor:
        """log(alpha_t / sigma_t)"""
        return self.log_alpha(t) - self.sigma(t).log()

    def time(self, lambda_: Tensor) -> Tensor:
        """The inverse of `lambda_`."""
        log_alpha = -0.5 * th.nn.functional.softplus(-2.0 * lambda_)
        return _interpolate(log_alpha, self.log_alphas.flip(0), self.times.flip(0))

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Continuous time -> the integer timestep of the model, rounded down as published."""
        return ((t - 1.0 / self.num_steps) * self.num_steps).long()

    def grid(self, skip_type: str, intervals: int) -> Tensor:
        """[intervals + 1] times from 1 to 1/N."""
        end, points = 1.0 / self.num_steps, intervals + 1
        if skip_type == "time_uniform":
            return th.linspace(1.0, end, points)
        if skip_type == "time_quadratic":
            return th.linspace(1.0, end**0.5, points).square()
        first, last = (float(self.lambda_(self.times[i])) for i in (-1, 0))
        return self.time(th.linspace(first, last, points))


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), knots ascending; the outer pieces extend beyond."""
    right = th.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    run = knots[right] - knots[left]
    return values[left] + (x - knots[left]) * (values[right] - values[left]) / run


@dataclass(frozen=True)
class SolverSettings:
    """How to solve; ValueError with the choices for what is unknown or impossible.

    atol, rtol, step_control: of method adaptive. "batch" takes one step size for all samples
        (published); "sample" one each, so that a sample does not depend on its neighbours and
        leaves the batch when it is done.
    """

    steps: int = 20  # model evaluations; `adaptive` ignores it
    order: int = 3
    skip_type: str = "time_uniform"  # how times are spaced
    method: str = "singlestep"
    solver_type: str = "dpm_solver"
    denoise: bool = False  # ends with one more data prediction
    atol: float = 0.0078
    rtol: float = 0.05
    step_control: str = "batch"

    def __post_init__(self) -> None:
        _check("method", self.method, METHODS)
        _check("order", self.order, SINGLESTEP_NODES)
        _check("skip_type", self.skip_type, SKIP_TYPES)
        _check("solver_type", self.solver_type, SOLVER_TYPES)
        _check("step_control", self.step_control, STEP_CONTROLS)
        if self.method == "adaptive":
            if self.order == 1:
                raise ValueError("method adaptive compares two orders, not order 1: choose 2 or 3")
            return
        least = self.order if self.method == "singlestep_fixed" else 1
        if self.steps < least:
            raise ValueError(f"steps {self.steps}: {self.method} needs at least {least}")


def _check(what: str, value: Any, choices: Iterable) -> None:
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise ValueError(f"{what} {value!r} is unknown: choose one of {known}")


class DPMSolver:
    """Solves the diffusion ODE of one model and schedule.

    model_fn: `(x, t) -> tree`, t [B] long; predicts what `model_type` names, "noise", "x_start" or
        "v". Leaves with twice the channels (learned sigma) lose the second half.
    alphas_cumprod: [N] of the discrete diffusion process that the model was trained on.
    predict_x0: expand the data prediction (DPM-Solver++) instead of the noise prediction.
    thresholding: clamp the predicted data to its 0.995 quantile per sample and leaf and rescale
        (needs predict_x0).
    `evaluations` counts the calls of model_fn in the last `sample`.
    """

    def __init__(
        self,
        model_fn: Callable[..., Tree],
        alphas_cumprod: np.ndarray | Tensor,
        predict_x0: bool = False,
        thresholding: bool = False,
        model_type: str = "noise",
    ):
        _check("model_type", model_type, MODEL_TYPES)
        if thresholding and not predict_x0:
            raise ValueError("thresholding=True needs predict_x0=True: it clamps predicted data")
        self.model_fn = model_fn
        self.schedule = NoiseSchedule(alphas_cumprod)
        self.predict_x0 = predict_x0
        self.thresholding = thresholding
        self.model_type = model_type
        self.evaluations = 0

    @th.no_grad()
    def sample(
        self,
        x_T: Tree,
        steps: int = 20,
        *,
        cond: dict[str, Tensor] | None = None,
        conditioning: dict[str, Tensor] | None = None,
        progress: Callable[[float], None] | None = None,
        **settings: Any,
    ) -> Tree:
        """Noise `x_T` at time 1 -> a sample at time 1/N, float32.

        steps, settings: the fields of SolverSettings.
        cond: keywords of model_fn, tensors [B, ...], of which each call gets the samples in it.
            Only adaptive steps by sample need it; else conditions may be bound in model_fn.
        conditioning: {key: clip} of leaves that are known and returned as they are. Only the others
            are solved for; the model gets a known leaf with the noise `x_T[key]` at the level of
            each evaluation's time.
        progress: called with the fraction done, 0..1, after each step.
        """
        chosen = SolverSettings(steps, **settings)
        self.evaluations = 0
        x: Any = tree_map(Tensor.float, x_T)
        known = check_conditioning(conditioning, x)
        noise = {key: x[key] for key in known}
        keys = list(x) if known else []
        report = progress or (lambda fraction: None)
        run = _Run(self, chosen, report, keys, known, noise, cond or {})
        if known:
            x = {key: leaf for key, leaf in x.items() if key not in known}
        x = getattr(run, chosen.method)(x)
        if chosen.denoise:
            x = run.predict(x, run.end, data=True)
        return run.insert(known, x)


class Node(NamedTuple):
    """A prediction `m` (tree) at time `t` ([1] or [B])."""

    t: Tensor
    m: Tree


class _Adaptive(NamedTuple):
    """The samples `rows` [R] of an adaptive run that are not done.

    `lower`: the last accepted estimate of lower order; `s` [R]: times; `h` [R]: next step sizes.
    """

    rows: Tensor
    x: Tree
    lower: Tree
    s: Tensor
    h: Tensor

    def where(self, kept: Tensor) -> _Adaptive:
        """The samples number `kept` of these."""
        return _Adaptive(*(_rows(part, kept) for part in self))


@dataclass(frozen=True)
class _Run:
    """One call of `DPMSolver.sample`; its methods of the names METHODS map noise to a sample.

    The last three fields are of the samples not yet done.
    """

    solver: DPMSolver
    settings: SolverSettings
    progress: Callable[[float], None]
    keys: list[str]  # of all leaves, known or solved for
    known: dict[str, Tensor]
    noise: dict[str, Tensor]  # of the known leaves
    cond: dict[str, Tensor]

    @property
    def schedule(self) -> NoiseSchedule:
        return self.solver.schedule

    @property
    def end(self) -> Tensor:
        """[1]: time 1/N."""
        return self.schedule.times[:1]

    def where(self, kept: Tensor) -> _Run:
        """The run with the samples number `kept` only."""
        known, noise, cond = (_rows(part, kept) for part in (self.known, self.noise, self.cond))
        return replace(self, known=known, noise=noise, cond=cond)

    def insert(self, known: Any, x: Any) -> Any:
        """`x` with the leaves `known`, in the order of x_T."""
        if not known:
            return x
        return {key: known[key] if key in known else x[key] for key in self.keys}

    def predict(self, x: Tree, t: Tensor, data: bool | None = None) -> Tree:
        """The noise (or data) at `x` and time t ([1] or [B]) according to the model."""
        solver, alpha, sigma = self.solver, self.schedule.alpha(t), self.schedule.sigma(t)
        solver.evaluations += 1
        data = solver.predict_x0 if data is None else data
        first = leaves(x)[0]
        timesteps = to_device(self.schedule.model_timesteps(t), first.device).expand(len(first))
        noisy = weighted_sum((alpha, self.known), (sigma, self.noise)) if self.known else {}
        output: Any = solver.model_fn(self.insert(noisy, x), timesteps, **self.cond)
        if isinstance(x, dict):
            output = {key: output[key] for key in x}
        output = tree_map(_without_variance, output, x)
        if solver.model_type == "v":  # alpha noise - sigma x_0
            weights = (alpha, -sigma) if data else (sigma, alpha)
            output = weighted_sum((weights[0], x), (weights[1], output))
        elif data != (solver.model_type == "x_start"):
            # x = alpha x_0 + sigma noise, solved for the one that the model does not predict
            predicted, wanted = (sigma, alpha) if data else (alpha, sigma)
            rest = weighted_sum((th.ones_like(predicted), x), (-predicted, output))
            divisor = to_device(wanted, first.device)
            output = tree_map(lambda leaf: leaf / append_dims(divisor, leaf), rest)
        return tree_map(_threshold, output) if data and solver.thresholding else output

    def advance(
        self, x: Tree, t: Tensor, nodes: list[Node], solver_type: str, behind: bool = False
    ) -> Tree:
        """x at the time of the first node -> x at t, of order `len(nodes)` (see the module)."""
        schedule, s = self.schedule, nodes[0].t
        lambda_s = schedule.lambda_(s)
        h = schedule.lambda_(t) - lambda_s
        if self.solver.predict_x0:
            ratio, scale, eta = schedule.sigma(t) / schedule.sigma(s), schedule.alpha(t), -h
        else:
            ratio = (schedule.log_alpha(t) - schedule.log_alpha(s)).exp()
            scale, eta = schedule.sigma(t), h
        first, *others = nodes
        offsets = [(schedule.lambda_(node.t) - lambda_s) / h for node in others]
        weights = node_weights(eta, offsets, solver_type, behind)
        terms = [first.m, *(tree_map(th.sub, node.m, first.m) for node in others)]
        scaled = [-scale * weight for weight in weights]
        return weighted_sum((ratio, x), *zip(scaled, terms, strict=True))

    def nodes_within(self, x: Tree, s: Tensor, h: Tensor, fractions: Iterable) -> list[Node]:
        """Nodes at s and at each of the `fractions` of h, each reached from those before it."""
        nodes = [Node(s, self.predict(x, s))]
        start = self.schedule.lambda_(s)
        for fraction in fractions:
            t = self.schedule.time(start + fraction * h)
            ahead = self.advance(x, t, nodes, "taylor")
            nodes.append(Node(t, self.predict(ahead, t)))
        return nodes

    def singlestep(self, x: Tree) -> Tree:
        """Orders that use up `steps` evaluations exactly; only the last ones may be lower."""
        steps, order = self.settings.steps, self.settings.order
        ends = THIRD_ORDER_ENDS[steps % 3] if order == 3 else [1] * (steps % order)
        full_steps = (steps - sum(ends)) // order
        return self.steps_of_orders(x, [order] * full_steps + ends)

    def singlestep_fixed(self, x: Tree) -> Tree:
        """`steps // order` steps of one order."""
        steps, order = self.settings.steps, self.settings.order
        return self.steps_of_orders(x, [order] * (steps // order))

    def steps_of_orders(self, x: Tree, orders: list[int]) -> Tree:
        """One step per order; order k covers k intervals of the grid, whose points are nodes."""
        times = self.schedule.grid(self.settings.skip_type, sum(orders))
        first = 0
        for order in orders:
            inner = times[first : first + order + 1]
            lambdas = self.schedule.lambda_(inner)
            h = lambdas[-1:] - lambdas[:1]
            nodes = self.nodes_within(x, inner[:1], h, (lambdas[1:-1] - lambdas[0]) / h)
            x = self.advance(x, inner[-1:], nodes, self.settings.solver_type)
            first += order
            self.progress(first / sum(orders))
        return x

    def multistep(self, x: Tree) -> Tree:
        """One evaluation a step; the nodes are the last `order` predictions, or all there are."""
        steps = self.settings.steps
        times = self.schedule.grid(self.settings.skip_type, steps)
        nodes: list[Node] = []
        for i in range(steps):
            s, t = times[i : i + 1], times[i + 1 : i + 2]
            nodes = [Node(s, self.predict(x, s)), *nodes][: self.settings.order]
            x = self.advance(x, t, nodes, self.settings.solver_type, behind=True)
            self.progress((i + 1) / steps)
        return x

    def adaptive(self, x: Tree) -> Tree:
        """Step sizes from the difference of two orders (arXiv 2206.00927, App. C)."""
        start = self.schedule.times[-1:]
        first, last = self.schedule.lambda_(start), self.schedule.lambda_(self.end)
        result = tree_map(th.clone, x)
        batch = len(leaves(x)[0])
        state = _Adaptive(th.arange(batch), x, x, start.expand(batch), th.full((batch,), FIRST_H))
        run = self
        while len(state.rows):
            state = run.attempt(state, last)
            is_done = (state.s - self.end).abs() <= END_TOLERANCE
            if is_done.any():
                # Indices on the host: a mask on the device would make the host wait.
                done, kept = (mask.nonzero().squeeze(1) for mask in (is_done, ~is_done))
                rows = to_device(state.rows[done], leaves(x)[0].device)
                for leaf, sample in zip(leaves(result), leaves(_rows(state.x, done)), strict=True):
                    leaf.index_copy_(0, rows, sample)
                state, run = state.where(kept), run.where(kept)
            furthest_back = self.schedule.lambda_(state.s).min() if len(state.rows) else last
            self.progress(float((furthest_back - first) / (last - first)))
        return result

    def attempt(self, state: _Adaptive, last: Tensor) -> _Adaptive:
        """One trial step, accepted where the two orders agree; the error sets the next step size.

        The host waits for the device once, for the error.
        """
        x, s, h, order = state.x, state.s, state.h, self.settings.order
        t = self.schedule.time(self.schedule.lambda_(s) + h)
        nodes = self.nodes_within(x, s, h, SINGLESTEP_NODES[order])
        lower = self.advance(x, t, nodes[:-1], self.settings.solver_type)
        higher = self.advance(x, t, nodes, self.settings.solver_type)
        error = self.error(lower, higher, state.lower)
        if self.settings.step_control == "batch":
            error = error.max().expand_as(error)
        where = f"adaptive step at time {float(s.max()):.4f}"
        if not error.isfinite().all():
            raise FloatingPointError(f"{where}: the model's output is not finite")
        accept = error <= 1
        s = th.where(accept, t, s)
        h = th.minimum(SAFETY * h * error.pow(-1.0 / order), last - self.schedule.lambda_(s))
        if ((h < SMALLEST_H) & (s - self.end > END_TOLERANCE)).any():
            raise FloatingPointError(f"{where}: no step is small enough")
        x, lower = _choose(accept, higher, x), _choose(accept, lower, state.lower)
        return _Adaptive(state.rows, x, lower, s, h)

    def error(self, lower: Tree, higher: Tree, previous: Tree) -> Tensor:
        """[B] on the CPU: the RMS of (higher - lower) / delta, the largest over leaves."""
        atol, rtol = self.settings.atol, self.settings.rtol

        def leaf_error(low: Tensor, high: Tensor, before: Tensor) -> Tensor:
            delta = th.maximum(low.abs(), before.abs()).mul(rtol).clamp(min=atol)
            return ((high - low) / delta).flatten(1).square().mean(dim=1).sqrt()

        return th.stack(leaves(tree_map(leaf_error, lower, higher, previous))).amax(dim=0).cpu()


def node_weights(
    eta: Tensor, offsets: list[Tensor], solver_type: str, behind: bool = False
) -> list[Tensor]:
    """phi_1 m_0 + phi_2 D_1 + phi_3 D_2 as weights of m_0 and of m_i - m_0 at the other nodes.

    offsets: r_i = (lambda_i - lambda_0) / h of the other nodes, negative if `behind` the step.
    "dpm_solver" puts phi_1 / 2 for phi_2 at order 2 and uses the last node alone at order 3 within
    the step.
    """
    phi_1 = th.expm1(eta)
    phi_2 = phi_1 / eta - 1.0
    if not offsets:
        return [phi_1]
    if len(offsets) == 1:
        slope = phi_2 if solver_type == "taylor" else 0.5 * phi_1
        return [phi_1, slope / offsets[0]]
    r1, r2 = offsets
    if solver_type == "dpm_solver" and not behind:
        return [phi_1, th.zeros_like(phi_2), phi_2 / r2]
    # With d_i = (m_i - m_0) / r_i the parabola through the nodes has
    # D_1 = (r2 d_1 - r1 d_2) / (r2 - r1) and D_2 = 2 (d_2 - d_1) / (r2 - r1). Published multistep
    # takes half that D_2; its first steps bound its order anyway.
    phi_3 = (phi_2 / eta - 0.5) * (1.0 if behind else 2.0)
    gap = r2 - r1
    return [phi_1, (phi_2 * r2 - phi_3) / (gap * r1), (phi_3 - phi_2 * r1) / (gap * r2)]


def _without_variance(output: Tensor, x: Tensor) -> Tensor:
    if output.shape == x.shape:
        return output.float()
    prediction: Any = split_doubled(output, x)[0]
    return prediction.float()


def _threshold(x0: Tensor) -> Tensor:
    """Clamped to the 0.995 quantile of |x0| per sample, at least 1, over it (arXiv 2205.11487)."""
    # One sample at a time: quantile() refuses more than 2^24 values.
    limits = th.stack([sample.abs().flatten().quantile(0.995) for sample in x0])
    limit = append_dims(limits.clamp(min=1.0), x0)
    return x0.clamp(-limit, limit) / limit


def _rows(tree: Any, rows: Tensor) -> Any:
    """The samples `rows` [R], ascending indices on the host, of a tree."""

    def pick(leaf: Tensor) -> Tensor:
        return leaf if len(rows) == len(leaf) else leaf[to_device(rows, leaf.device)]

    return tree_map(pick, tree)


def _choose(mask: Tensor, yes: Tree, no: Tree) -> Tree:
    """Sample by sample: `yes` where `mask` [B] holds, else `no`."""
    mask = to_device(mask, leaves(yes)[0].device)
    return tree_map(lambda a, b: th.where(append_dims(mask, a), a, b), yes, no)
