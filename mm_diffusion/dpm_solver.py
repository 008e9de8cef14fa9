"""DPM-Solver and DPM-Solver++ on trees (Lu et al. 2022, arXiv 2206.00927 and 2211.01095).

Both solve the diffusion ODE exactly in its linear part and expand the model's prediction m in lambda, half the log of
the signal-to-noise ratio. With (a, b) = (alpha, sigma) and eta = h for noise prediction, (sigma, alpha) and -h for
data prediction, a step from s to t of length h = lambda_t - lambda_s is in both cases

    x_t = a_t / a_s x_s - b_t (phi_1(eta) m + phi_2(eta) D_1 + phi_3(eta) D_2),

D_k the k-th derivative of m at s times h^k, taken from predictions at nodes: points ahead within the step (singlestep)
or behind it (multistep). Every method here is a choice of nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th

from .tree import (
    Tree,
    append_dims,
    checked_given,
    leaves,
    split_doubled,
    to_device,
    tree_map,
    weighted_sum,
)

SOLVER_TYPES = ("dpm_solver", "taylor")
STEP_CONTROLS = ("batch", "sample")
MODEL_TYPES = ("noise", "x_start")
SINGLESTEP_NODES: dict[int, tuple[float, ...]] = {
    1: (),
    2: (1 / 2,),
    3: (1 / 3, 2 / 3),
}  # fractions of h
FIRST_H, SAFETY, END_TOLERANCE, SMALLEST_H = 0.05, 0.9, 1e-5, 1e-6  # of the adaptive steps


class NoiseSchedule:
    """log alpha over continuous time: linear between the N discrete steps, which sit at i / N for i = 1 .. N.

    Always float32 on the CPU, whatever the model runs in: in half precision the first alphas round to one.
    """

    def __init__(self, alphas_cumprod: np.ndarray | th.Tensor):
        alphas = th.as_tensor(alphas_cumprod).detach().cpu()
        if alphas.ndim != 1 or not ((alphas > 0) & (alphas < 1)).all():
            raise ValueError(
                "alphas_cumprod must be one row of numbers inside (0, 1): pass the float64 table, not half"
            )
        self.num_steps = len(alphas)
        self.log_alphas = 0.5 * alphas.float().log()
        self.times = th.linspace(0.0, 1.0, self.num_steps + 1)[1:]

    def log_alpha(self, t: th.Tensor) -> th.Tensor:
        return _interpolate(t, self.times, self.log_alphas)

    def alpha(self, t: th.Tensor) -> th.Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: th.Tensor) -> th.Tensor:
        return (1.0 - (2.0 * self.log_alpha(t)).exp()).sqrt()

    def lambda_(self, t: th.Tensor) -> th.Tensor:
        """log(alpha_t / sigma_t)"""
        return self.log_alpha(t) - self.sigma(t).log()

    def time(self, lambda_: th.Tensor) -> th.Tensor:
        """The inverse of `lambda_`."""
        log_alpha = -0.5 * th.nn.functional.softplus(-2.0 * lambda_)
        return _interpolate(log_alpha, self.log_alphas.flip(0), self.times.flip(0))

    def model_timesteps(self, t: th.Tensor) -> th.Tensor:
        """Continuous time -> the integer that the model was trained with, rounded down as published."""
        return ((t - 1.0 / self.num_steps) * self.num_steps).long()


def _interpolate(x: th.Tensor, knots: th.Tensor, values: th.Tensor) -> th.Tensor:
    """The piecewise linear function through (knots, values), knots ascending; the outer pieces extend beyond them."""
    right = th.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    return values[left] + (x - knots[left]) * (values[right] - values[left]) / (
        knots[right] - knots[left]
    )


@dataclass
class Node:
    """A prediction `m` (tree) at time `t` ([1] or [B])."""

    t: th.Tensor
    m: Tree


@dataclass
class _Adaptive:
    """The samples `rows` [R] of an adaptive run that are not done, their times `s` [R] and next step sizes `h` [R]."""

    rows: th.Tensor
    x: Tree
    lower: Tree
    s: th.Tensor
    h: th.Tensor

    def where(self, mask: th.Tensor) -> _Adaptive:
        """The samples for which `mask` [R] holds."""
        if mask.all():
            return self
        places = mask.nonzero().squeeze(
            1
        )  # on the host, which a mask on the device would make wait
        parts = (_rows(tree, places) for tree in (self.rows, self.x, self.lower, self.s, self.h))
        return _Adaptive(*parts)


class DPMSolver:
    """Solves the diffusion ODE of one model and schedule.

    model_fn: `(x, t) -> tree`, t [B] long; predicts what `model_type` says, "noise" or "x_start". Leaves with twice the
        channels (learned sigma) lose the second half.
    alphas_cumprod: [N] of the discrete process that the model was trained on.
    predict_x0: expand the data prediction (DPM-Solver++) instead of the noise prediction.
    thresholding: clamp the predicted data to its 0.995 quantile per sample and leaf and rescale (needs predict_x0).
    `evaluations` counts the calls of model_fn in the last `sample`.
    """

    def __init__(
        self,
        model_fn: Callable[..., Tree],
        alphas_cumprod: np.ndarray | th.Tensor,
        predict_x0: bool = False,
        thresholding: bool = False,
        model_type: str = "noise",
    ):
        _check("model_type", model_type, MODEL_TYPES)
        if thresholding and not predict_x0:
            raise ValueError(
                "thresholding=True needs predict_x0=True: there is no data to clamp in a noise prediction"
            )
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
        order: int = 3,
        skip_type: str = "time_uniform",
        method: str = "singlestep",
        solver_type: str = "dpm_solver",
        denoise: bool = False,
        atol: float = 0.0078,
        rtol: float = 0.05,
        step_control: str = "batch",
        progress: Callable[[float], None] | None = None,
        cond: dict[str, th.Tensor] | None = None,
        given: dict[str, th.Tensor] | None = None,
    ) -> Tree:
        """Noise `x_T` at time 1 -> a sample at time 1/N, float32.

        steps: model evaluations (`adaptive` ignores it).
        skip_type: how times are spaced: time_uniform, time_quadratic, logSNR.
        method: singlestep, singlestep_fixed, multistep, adaptive; solver_type: dpm_solver, taylor.
        denoise: end with one more data prediction.
        atol, rtol, step_control: of `adaptive`; "batch" takes one step size for all (published), "sample" one each, so
            that a sample does not depend on its neighbours and leaves the batch when it is done.
        progress: called with the fraction done, 0..1, after each step.
        cond: keywords of model_fn, tensors [B, ...], of which each call gets the samples in it. Only adaptive steps by
            sample need it; otherwise conditions may as well be bound in model_fn.
        given: {key: clip} of leaves that are known and come back as they are. Only the others are solved for; the model
            sees a given leaf with the noise `x_T[key]` at the level of each evaluation's time.
        """
        _check("method", method, METHODS)
        _check("order", order, SINGLESTEP_NODES)
        _check("skip_type", skip_type, SKIP_TYPES)
        _check("solver_type", solver_type, SOLVER_TYPES)
        _check("step_control", step_control, STEP_CONTROLS)
        if method == "adaptive" and order == 1:
            raise ValueError(
                "order 1 has no lower order to compare with in method adaptive: choose 2 or 3"
            )
        least = order if method == "singlestep_fixed" else 1
        if method != "adaptive" and steps < least:
            raise ValueError(
                f"steps {steps} is too few for method {method} of order {order}: choose at least {least}"
            )
        self.evaluations = 0
        x = tree_map(lambda leaf: leaf.float(), x_T)
        known = _Known(checked_given(given, x), x)
        run = _Run(
            self,
            cond or {},
            known,
            order,
            skip_type,
            solver_type,
            step_control,
            atol,
            rtol,
            progress,
        )
        x = METHODS[method](run, known.taken_from(x), steps)
        x = run.predict(x, run.end, data=True) if denoise else x
        return known.put_back(x, known.clips)


class _Known:
    """Leaves `clips` of samples that need not be solved for, each with its one noise, the leaf of `x_T`."""

    def __init__(self, clips: dict[str, th.Tensor], x_T: Tree) -> None:
        self.clips = clips
        self.keys = list(x_T) if isinstance(x_T, dict) else []
        self.noise = (
            {key: leaf for key, leaf in x_T.items() if key in clips}
            if isinstance(x_T, dict)
            else {}
        )

    def taken_from(self, x: Tree) -> Tree:
        """The other leaves of `x`."""
        return (
            {key: leaf for key, leaf in x.items() if key not in self.clips}
            if isinstance(x, dict)
            else x
        )

    def put_back(self, x: Any, known: dict[str, th.Tensor]) -> Tree:
        """`x` with the leaves `known`, in the order of `x_T`."""
        return {key: known[key] if key in known else x[key] for key in self.keys} if known else x

    def at(self, alpha: th.Tensor, sigma: th.Tensor, rows: Any) -> dict[str, th.Tensor]:
        """The leaves of the samples `rows` at the noise level of alpha and sigma, [1] or [B]."""
        noisy: Any = weighted_sum(
            (alpha, _rows(self.clips, rows)), (sigma, _rows(self.noise, rows))
        )
        return noisy


class _Run:
    """One call of `DPMSolver.sample`: its settings, and the methods that use them."""

    def __init__(
        self, solver, cond, known, order, skip_type, solver_type, step_control, atol, rtol, progress
    ):
        self.solver, self.schedule = solver, solver.schedule
        self.cond, self.known, self.order, self.solver_type = cond, known, order, solver_type
        self.skip_type, self.step_control, self.atol, self.rtol = (
            skip_type,
            step_control,
            atol,
            rtol,
        )
        self.progress = progress or (lambda fraction: None)
        self.end = self.schedule.times[:1]

    def predict(
        self, x: Tree, t: th.Tensor, rows: Any = slice(None), data: bool | None = None
    ) -> Tree:
        """The model's noise (or data) prediction at `x`, beside the known leaves, and time t [1] or [B]."""
        solver, alpha, sigma = self.solver, self.schedule.alpha(t), self.schedule.sigma(t)
        solver.evaluations += 1
        data = solver.predict_x0 if data is None else data
        batch, device = leaves(x)[0].shape[0], leaves(x)[0].device
        steps = to_device(self.schedule.model_timesteps(t), device).expand(batch)
        seen = self.known.put_back(x, self.known.at(alpha, sigma, rows)) if self.known.clips else x
        output: Any = solver.model_fn(
            seen, steps, **{name: _rows(value, rows) for name, value in self.cond.items()}
        )
        if isinstance(x, dict):
            output = {key: output[key] for key in x}
        output = tree_map(_without_variance, output, x)
        if data != (
            solver.model_type == "x_start"
        ):  # x = alpha x_0 + sigma noise, solved for the one that is wanted
            known, wanted = (sigma, alpha) if data else (alpha, sigma)
            rest = weighted_sum((th.ones_like(known), x), (-known, output))
            divisor = to_device(wanted, device)
            output = tree_map(lambda leaf: leaf / append_dims(divisor, leaf), rest)
        return tree_map(_threshold, output) if data and solver.thresholding else output

    def grid(self, intervals: int) -> th.Tensor:
        """[intervals + 1] times from 1 to 1/N."""
        return SKIP_TYPES[self.skip_type](self.schedule, intervals + 1)

    def advance(
        self, x: Tree, t: th.Tensor, nodes: list[Node], solver_type: str, behind: bool = False
    ) -> Tree:
        """x at the time of the first node -> x at t, of order `len(nodes)` (Eq. in the module's head)."""
        s = nodes[0].t
        alpha, sigma, log = self.schedule.alpha, self.schedule.sigma, self.schedule.lambda_
        h = log(t) - log(s)
        ratio, scale, eta = sigma(t) / sigma(s), alpha(t), -h
        if not self.solver.predict_x0:
            ratio, scale, eta = (
                (self.schedule.log_alpha(t) - self.schedule.log_alpha(s)).exp(),
                sigma(t),
                h,
            )
        offsets = [(log(node.t) - log(s)) / h for node in nodes[1:]]
        weights = node_weights(eta, offsets, solver_type, behind)
        differences = [tree_map(th.sub, node.m, nodes[0].m) for node in nodes[1:]]
        terms = zip(weights, [nodes[0].m, *differences], strict=True)
        return weighted_sum((ratio, x), *((-scale * weight, term) for weight, term in terms))

    def within(
        self, nodes: list[Node], x: Tree, h: th.Tensor, fractions: tuple, rows: Any = slice(None)
    ) -> list[Node]:
        """`nodes` and one more at each of the `fractions` of the step h in lambda, each reached from those before."""
        start = self.schedule.lambda_(nodes[0].t)
        for fraction in fractions:
            t = self.schedule.time(start + fraction * h)
            nodes = [*nodes, Node(t, self.predict(self.advance(x, t, nodes, "taylor"), t, rows))]
        return nodes

    def singlestep(self, x: Tree, steps: int) -> Tree:
        """Orders that use up exactly `steps` evaluations; only the last steps may be of lower order."""
        ends = (
            {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
            if self.order == 3
            else [1] * (steps % self.order)
        )
        return self.steps_of_orders(x, [self.order] * ((steps - sum(ends)) // self.order) + ends)

    def singlestep_fixed(self, x: Tree, steps: int) -> Tree:
        """`steps // order` steps of one order."""
        return self.steps_of_orders(x, [self.order] * (steps // self.order))

    def steps_of_orders(self, x: Tree, orders: list[int]) -> Tree:
        """One step per order; a step of order k covers k intervals of the grid, whose inner points are its nodes."""
        times = self.grid(sum(orders))
        first = 0
        for order in orders:
            inner = times[first : first + order + 1]
            lambdas = self.schedule.lambda_(inner)
            h = lambdas[-1:] - lambdas[:1]
            fractions = tuple((lambdas[1:-1] - lambdas[0]) / h)
            nodes = self.within([Node(inner[:1], self.predict(x, inner[:1]))], x, h, fractions)
            x = self.advance(x, inner[-1:], nodes, self.solver_type)
            first += order
            self.progress(first / sum(orders))
        return x

    def multistep(self, x: Tree, steps: int) -> Tree:
        """One evaluation a step; the last `order` predictions are the nodes, fewer while there are fewer."""
        times = self.grid(steps)
        nodes: list[Node] = []
        for i in range(steps):
            s, t = times[i : i + 1], times[i + 1 : i + 2]
            nodes = [Node(s, self.predict(x, s)), *nodes][: self.order]
            x = self.advance(x, t, nodes, self.solver_type, behind=True)
            self.progress((i + 1) / steps)
        return x

    def adaptive(self, x: Tree, steps: int) -> Tree:
        """Step sizes from the gap between two orders (arXiv 2206.00927, App. C); `steps` plays no part."""
        first, last = (
            self.schedule.lambda_(self.schedule.times[-1:]),
            self.schedule.lambda_(self.end),
        )
        result = tree_map(th.clone, x)
        rows = th.arange(leaves(x)[0].shape[0])
        state = _Adaptive(
            rows, x, x, self.schedule.times[-1:].expand(len(rows)), th.full((len(rows),), FIRST_H)
        )
        while len(state.rows):
            state = self.attempt(
                state, last
            )  # in which the host waits once for the device, for the error
            done = (state.s - self.end).abs() <= END_TOLERANCE
            if done.any():
                finished, state = state.where(done), state.where(~done)
                _put(result, finished.rows, finished.x)
            furthest_back = self.schedule.lambda_(state.s).min() if len(state.rows) else last
            self.progress(float((furthest_back - first) / (last - first)))
        return result

    def attempt(self, state: _Adaptive, last: th.Tensor) -> _Adaptive:
        """One trial step, taken where the two orders agree; the next step size follows from the error."""
        x, s, h = state.x, state.s, state.h
        t = self.schedule.time(self.schedule.lambda_(s) + h)
        start = Node(s, self.predict(x, s, state.rows))
        nodes = self.within([start], x, h, SINGLESTEP_NODES[self.order], state.rows)
        lower = self.advance(x, t, nodes[:-1], self.solver_type)
        higher = self.advance(x, t, nodes, self.solver_type)
        error = self.error(lower, higher, state.lower)
        if self.step_control == "batch":
            error = error.max().expand_as(error)
        if not error.isfinite().all():
            raise FloatingPointError(
                f"adaptive step at time {float(s.max()):.4f}: the model's output is not finite"
            )
        accept = error <= 1
        s = th.where(accept, t, s)
        h = th.minimum(SAFETY * h * error.pow(-1.0 / self.order), last - self.schedule.lambda_(s))
        if ((h < SMALLEST_H) & (s - self.end > END_TOLERANCE)).any():
            raise FloatingPointError(
                f"adaptive step at time {float(s.max()):.4f}: no step is small enough"
            )
        return _Adaptive(
            state.rows, _choose(accept, higher, x), _choose(accept, lower, state.lower), s, h
        )

    def error(self, lower: Tree, higher: Tree, previous: Tree) -> th.Tensor:
        """[B] on the CPU: the RMS of (higher - lower) / delta, the largest over leaves."""

        def leaf_error(low: th.Tensor, high: th.Tensor, prev: th.Tensor) -> th.Tensor:
            delta = th.maximum(low.abs(), prev.abs()).mul(self.rtol).clamp(min=self.atol)
            return ((high - low) / delta).flatten(1).square().mean(dim=1).sqrt()

        return th.stack(leaves(tree_map(leaf_error, lower, higher, previous))).amax(dim=0).cpu()


def node_weights(
    eta: th.Tensor, offsets: list, solver_type: str, behind: bool = False
) -> list[th.Tensor]:
    """phi_1 m_0 + phi_2 D_1 + phi_3 D_2 as weights of m_0 and of m_i - m_0 at the other nodes.

    offsets: r_i = (lambda_i - lambda_0) / h of the other nodes, negative where they lie `behind` the step.
    "dpm_solver" puts phi_1 / 2 for phi_2 at order 2 and uses the last node alone at order 3 within the step.
    """
    phi_1 = th.expm1(eta)
    phi_2 = phi_1 / eta - 1.0
    if not offsets:
        return [phi_1]
    if len(offsets) == 1:
        return [phi_1, (phi_2 if solver_type == "taylor" else 0.5 * phi_1) / offsets[0]]
    r1, r2 = offsets
    if solver_type == "dpm_solver" and not behind:
        return [phi_1, th.zeros_like(phi_2), phi_2 / r2]
    # With d_i = (m_i - m_0) / r_i the parabola through the nodes has D_1 = (r2 d_1 - r1 d_2) / (r2 - r1) and
    # D_2 = 2 (d_2 - d_1) / (r2 - r1). Published multistep takes half that D_2; its first steps bound its order anyway.
    phi_3 = (phi_2 / eta - 0.5) * (1.0 if behind else 2.0)
    return [phi_1, (phi_2 * r2 - phi_3) / ((r2 - r1) * r1), (phi_3 - phi_2 * r1) / ((r2 - r1) * r2)]


METHODS: dict[str, Callable[[_Run, Tree, int], Tree]] = {
    name: getattr(_Run, name)
    for name in ("singlestep", "singlestep_fixed", "multistep", "adaptive")
}
SKIP_TYPES: dict[str, Callable[[NoiseSchedule, int], th.Tensor]] = {
    "time_uniform": lambda schedule, n: th.linspace(1.0, 1.0 / schedule.num_steps, n),
    "time_quadratic": lambda schedule, n: th.linspace(
        1.0, (1.0 / schedule.num_steps) ** 0.5, n
    ).square(),
    "logSNR": lambda schedule, n: schedule.time(
        th.linspace(
            float(schedule.lambda_(schedule.times[-1:])),
            float(schedule.lambda_(schedule.times[:1])),
            n,
        )
    ),
}


def _check(what: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise ValueError(
            f"{what} {value!r} is unknown: choose one of {', '.join(map(str, choices))}"
        )


def _without_variance(output: th.Tensor, x: th.Tensor) -> th.Tensor:
    return (output if output.shape == x.shape else split_doubled(output, x)[0]).float()


def _threshold(x0: th.Tensor) -> th.Tensor:
    """Clamp to the 0.995 quantile of |x0| per sample, at least 1, and rescale to [-1, 1] (arXiv 2205.11487)."""
    # One sample at a time: quantile() refuses more than 2^24 numbers.
    limits = th.stack([sample.abs().flatten().quantile(0.995) for sample in x0])
    limit = append_dims(limits.clamp(min=1.0), x0)
    return x0.clamp(-limit, limit) / limit


def _rows(tree: Any, rows: Any) -> Any:
    """The samples `rows`, a slice or ascending numbers on the host."""
    first = leaves(tree)[0]
    if isinstance(rows, th.Tensor):
        if len(rows) == len(first):  # all of them
            return tree
        rows = to_device(rows, first.device)
    return tree_map(lambda leaf: leaf[rows], tree)


def _put(tree: Tree, rows: th.Tensor, values: Tree) -> None:
    places = to_device(rows, leaves(tree)[0].device)
    tree_map(lambda leaf, value: leaf.index_copy_(0, places, value), tree, values)


def _choose(mask: th.Tensor, yes: Tree, no: Tree) -> Tree:
    mask = to_device(mask, leaves(yes)[0].device)
    return tree_map(lambda a, b: th.where(append_dims(mask, a), a, b), yes, no)
