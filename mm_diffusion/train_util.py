"""The trainer: one loop for every model and every kind of sample."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import blobfile as bf
import torch as th
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import checkpoint, logger, rng
from .checkpoint import CheckpointError
from .compiling import GRAPH_MODES, Compiled, compile_mode
from .data.loader import prefetch_to_device
from .dist_util import ALONE, World, all_sum, barrier, from_rank_0, max_of_ranks
from .gaussian_diffusion import GaussianDiffusion
from .resample import create_named_schedule_sampler
from .sampling import DTYPES, bind, choose_precision
from .script_util import TrainConfig
from .training import states
from .training.resume import find_state, model_path, origin_of, start_from
from .training.signals import stop_signals
from .tree import Tree, leaves, randn_like, tree_map
from .unet import window_shift

INITIAL_LOG_LOSS_SCALE = 20.0
QUARTILES = 4
LATE, SIGNALLED = 1, 2  # reasons to stop, the stronger one last
NOT_NEGATIVE = [
    "lr",
    "weight_decay",
    "lr_anneal_steps",
    "lr_warmup_steps",
    "grad_clip",
    "preview_clips",
    "max_steps",
]
NOT_NEGATIVE += ["max_hours", "seed", "max_skipped_steps", "keep_last", "keep_every"]


def update_ema(ema: list[th.Tensor], params: list[th.Tensor], rate: float) -> None:
    """ema <- rate * ema + (1 - rate) * params, in place."""
    th._foreach_lerp_(ema, params, 1 - rate)


def warm_rate(rate: float, updates: int) -> float:
    """The rate after `updates` updates: early averages forget their start (Adam-style warm-up)."""
    return min(rate, (1 + updates) / (10 + updates))


def parse_rates(text: str) -> list[str]:
    """ "0.9999,0.99" -> ["0.9999", "0.99"], as they are written in file names."""
    found = [part.strip() for part in str(text).split(",")]
    if not all(re.fullmatch(r"0|0?\.\d+", part) for part in found):
        raise ValueError(f"ema_rate {text!r}: need decimals in [0, 1), with commas between")
    return found


class TrainLoop:
    """Trains `model` on an iterator of `(x_start, cond)` and leaves checkpoints in `config.output_dir`.

    Everything random is a function of (seed, step, place in the global batch), so that the same global batch gives the
    same gradients on any number of ranks and for any microbatch; dropout masks alone also depend on the rank.

    data: `start_sample -> iterator`, so that a resumed run continues where the data stopped; `start_sample` counts the
    samples that all ranks together have used.
    flags: what the checkpoints carry. preview: called after every save, with the EMA weights in the model, as
    `preview(model, step)`; all ranks call it.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        data: Callable[[int], Iterator[tuple[Tree, dict[str, Any]]]],
        config: TrainConfig,
        world: World = ALONE,
        *,
        use_fp16: bool = False,
        flags: dict[str, Any] | None = None,
        preview: Callable[[nn.Module, int], None] | None = None,
    ) -> None:
        check_train_config(config)
        self.model, self.diffusion, self.config, self.world = (
            model.to(world.device),
            diffusion,
            config,
            world,
        )
        self.flags, self.preview = flags or {}, preview
        state = from_rank_0(lambda: find_state(config))
        self.origin = origin_of(config)
        if config.init_checkpoint and not state:
            start_from(config.init_checkpoint, self.model)
        elif config.init_checkpoint:
            logger.log(
                f"note: --init_checkpoint {config.init_checkpoint} is not read: the run goes on from its own state"
            )
        mode = compile_mode(config.compile)
        self.forward_model: nn.Module = Compiled(self.model, mode) if mode else self.model
        if world.size > 1:  # first of all: every rank gets the weights of rank 0
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.forward_model = DistributedDataParallel(
                self.forward_model,
                device_ids=ids,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        self.sampler = create_named_schedule_sampler(
            config.schedule_sampler, diffusion.num_timesteps
        )
        self.names, self.params = map(list, zip(*self.model.named_parameters(), strict=True))
        self.optimizer = th.optim.AdamW(
            self.params,
            lr=config.lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.emas = {
            rate: [p.detach().clone() for p in self.params] for rate in parse_rates(config.ema_rate)
        }
        self.precision = choose_precision(config.precision, use_fp16, world.device)
        scale = INITIAL_LOG_LOSS_SCALE if self.precision == "fp16" else 0.0
        self.log_loss_scale = th.tensor(scale, dtype=th.float64, device=world.device)
        # Steps whose gradient was not finite: in all, in a row, and most in a row since the last row of the log.
        self.skipped = th.zeros(3, device=world.device)
        self.step = 0  # optimizer steps done
        self.samples = 0  # used by all ranks together
        self.saved_step, self.started = -1, time.monotonic()
        if state:
            self._resume(*state)
        if world.rank == 0:
            states.remove_leftovers(config.output_dir)
            if aside := states.set_aside(config.output_dir, after=self.step):
                logger.warn(f"later states of another run were moved to {aside}")
        logger.drop_rows_from(self.step)
        logger.start_trackers(self.step, self.flags)
        self.data: Iterator[Any] = prefetch_to_device(data(self.samples), world.device)
        self.writer = states.StateWriter(config.output_dir, config.keep_last, config.keep_every)
        self.host_copy = states.HostCopy()
        self.seen: dict[str, list[th.Tensor]] = {}  # what the next row of the log averages
        self.waited = 0.0  # for data, in seconds, since the last row
        self.row = self.samples, time.monotonic()  # at the last row
        self.samples_per_second, self.longest_streak = 0.0, 0

    def run_loop(self) -> None:
        """Train until there is a reason to stop, saving on the way and at the end."""
        total = self.last_step
        bar = tqdm(
            total=total,
            initial=self.step,
            unit="step",
            disable=self.world.rank > 0,
            dynamic_ncols=True,
        )
        with bar, self.writer, stop_signals() as received:
            while total is None or self.step < total:
                batch = self._next_batch(received)
                if reason := self._reason_to_stop(received):
                    logger.log(f"stopping after {self.step} steps: {reason}")
                    break
                self.run_step(*batch)
                bar.update()
                if self.step % self.config.log_interval == 0 or self.step == total:
                    self._log()
                    self.abort_if_diverged()
                    bar.set_postfix_str(f"{self.samples_per_second:.2f} samples/s", refresh=False)
                if self.step % self.config.save_interval == 0:
                    self.save()
            if self.saved_step != self.step:
                self.save(preview=not received)  # whoever sends a signal may not wait for pictures

    @property
    def last_step(self) -> int | None:
        """Where training ends by itself."""
        return min(
            (n for n in (self.config.lr_anneal_steps, self.config.max_steps) if n), default=None
        )

    def _next_batch(self, received: list[str]) -> tuple[Tree, dict[str, Any]]:
        """The next of the data; nothing where the signal that stops us has stopped the loader as well."""
        start = time.monotonic()
        try:
            return next(self.data)
        except (RuntimeError, OSError, EOFError):
            time.sleep(0.1)  # the loader may have noticed before us
            if received:
                return {}, {}
            raise
        finally:
            self.waited += time.monotonic() - start

    def _reason_to_stop(self, received: list[str]) -> str:
        """Why all ranks stop before the next step; the same on all of them, "" to go on."""
        hours, limit = (time.monotonic() - self.started) / 3600, self.config.max_hours
        asked = SIGNALLED if received else LATE if limit and hours >= limit else 0
        agreed = max_of_ranks(asked)
        if agreed == SIGNALLED:
            return " ".join(received) or "another rank got a signal"
        return f"--max_hours {limit}" if agreed == LATE else ""

    def run_step(self, x_start: Tree, cond: dict[str, Any]) -> None:
        """One optimizer step on this rank's share of the global batch."""
        self.writer.check()
        lr = self._anneal()
        self._forward_backward(x_start, cond)
        norm = self._optimize()
        self.step += 1
        self.samples += len(leaves(x_start)[0]) * self.world.size
        self._note("grad_norm", norm)
        logger.logkv("lr", lr)

    def _forward_backward(self, x_start: Tree, cond: dict[str, Any]) -> None:
        """Accumulate gradients over the microbatches; ranks exchange them with the last one."""
        device, batch = self.world.device, len(leaves(x_start)[0])
        x_start, cond = (
            tree_map(lambda x: x.to(device, non_blocking=True), tree) for tree in (x_start, cond)
        )
        first = self.world.rank * batch
        generators = rng.per_sample(
            self.config.seed, self.step, indices=range(first, first + batch), device=device
        )
        t, weights = self.sampler.sample(batch, device, generators)
        noise = randn_like(x_start, generators)
        th.manual_seed(rng.derive_seed(self.config.seed, self.step, "dropout", self.world.rank))
        size = self.config.microbatch if self.config.microbatch > 0 else batch
        losses = []
        for start in range(0, batch, size):
            parts: list[Any] = [
                tree_map(lambda x, s=start: x[s : s + size], tree)
                for tree in (x_start, cond, t, noise, weights)
            ]
            last = start + size >= batch
            with contextlib.nullcontext() if last else self._unsynchronised():
                losses.append(self._microbatch(parts, 1 / batch))
        self.sampler.update_with_local_losses(t, th.cat(losses))

    def _unsynchronised(self) -> contextlib.AbstractContextManager:
        """Within it a backward pass does not exchange gradients."""
        ranks = self.forward_model
        return (
            ranks.no_sync()
            if isinstance(ranks, DistributedDataParallel)
            else contextlib.nullcontext()
        )

    def _microbatch(self, part: list[Any], share: float) -> th.Tensor:
        """Add the gradient of `share` times the summed weighted losses; returns the losses [B] without weights."""
        x_start, cond, t, noise, weights = part
        shifts = rng.generator(
            self.config.seed, self.step, "window shift"
        )  # the same for every microbatch and rank
        with window_shift(shifts):
            with th.autocast(
                self.world.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"
            ):
                terms = self.diffusion.training_losses(
                    bind(self.forward_model, cond), x_start, t, noise
                )
            loss = (terms["loss"] * weights).sum() * share
            (loss * 2**self.log_loss_scale if self.precision == "fp16" else loss).backward()
        self._note("quartile", QUARTILES * t // self.diffusion.num_timesteps)
        for name, term in terms.items():
            self._note(f"term {name}", term.detach() * weights)
        return terms["loss"].detach()

    def _optimize(self) -> th.Tensor:
        """Clip, step, average; returns the norm of the gradient before clipping.

        Where that is not finite the weights stay as they are. All of it is decided on the device, without a wait.
        """
        self.writer.wait_for_copy()  # of a save, which may take as long as forward and backward
        grads = [p.grad for p in self.params if p.grad is not None]
        if self.precision == "fp16":
            th._foreach_mul_(grads, (2.0**-self.log_loss_scale).float())
        norm = nn.utils.clip_grad_norm_(self.params, self.config.grad_clip or float("inf"))
        bad = (~norm.isfinite()).float()
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        for rate, ema in self.emas.items():
            update_ema(ema, [p.detach() for p in self.params], warm_rate(float(rate), self.step))
        in_a_row = (self.skipped[1] + bad) * bad
        self.skipped = th.stack(
            [self.skipped[0] + bad, in_a_row, th.maximum(self.skipped[2], in_a_row)]
        )
        if self.precision == "fp16":
            self.log_loss_scale += th.where(bad > 0, -1.0, self.config.fp16_scale_growth)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _anneal(self) -> float:
        lr, done = self.config.lr, self.step
        if self.config.lr_warmup_steps:
            lr *= min(1.0, (done + 1) / self.config.lr_warmup_steps)
        if self.config.lr_anneal_steps:
            lr *= 1 - done / self.config.lr_anneal_steps
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    # ------------------------------------------------------------ log

    def _note(self, name: str, value: th.Tensor) -> None:
        self.seen.setdefault(name, []).append(value.detach())

    def _log(self) -> None:
        """Average over ranks what was noted since the last row, and write one: the only wait for the device."""
        quartile = th.cat(self.seen.pop("quartile"))
        bins = th.nn.functional.one_hot(quartile, QUARTILES).double()
        norm = th.stack(self.seen.pop("grad_norm"))
        for key in [key for key in self.seen if key.startswith("term ")]:
            values = th.cat(self.seen.pop(key)).double()
            sums = all_sum(th.stack([values @ bins, bins.sum(0)])).cpu()
            name = key.removeprefix("term ")
            logger.logkv(name, float(sums[0].sum() / sums[1].sum()))
            for q in range(QUARTILES):
                if sums[1, q]:
                    logger.logkv(f"{name}_q{q}", float(sums[0, q] / sums[1, q]))
        logger.logkv("grad_norm", float(norm.mean()))
        logger.logkv(
            "param_norm",
            float(th.stack(th._foreach_norm([p.detach() for p in self.params])).norm()),
        )
        logger.logkv("step", self.step)
        logger.logkv("samples", self.samples)
        self._log_pace()
        if self.precision == "fp16":
            logger.logkv("log2_loss_scale", float(self.log_loss_scale))
        in_all, _, self.longest_streak = (int(count) for count in self.skipped)
        self.skipped[2] = self.skipped[1]
        logger.logkv("skipped_steps", in_all)
        logger.dumpkvs()

    def abort_if_diverged(self) -> None:
        """ValueError, once the weights are saved, after too many gradients in a row that were not finite."""
        if self.longest_streak > self.config.max_skipped_steps:
            self.save(preview=False)
            self.writer.wait()
            barrier()  # a rank that raised first would end rank 0 while it writes
            raise ValueError(
                f"the gradient was not finite {self.longest_streak} steps in a row (--max_skipped_steps); the weights"
                " of before are saved: resume with a lower --lr, --grad_clip 1, or --precision bf16 or fp32"
            )

    def _log_pace(self) -> None:
        """Speed, share of the time spent waiting for data, and memory, since the last row."""
        now = time.monotonic()
        samples, moment = self.row
        self.samples_per_second = (self.samples - samples) / (now - moment)
        logger.logkv("samples_per_second", self.samples_per_second)
        logger.logkv("data_wait", self.waited / (now - moment))
        logger.logkv("memory_gib", logger.peak_memory() / 2**30)
        self.row, self.waited = (self.samples, now), 0.0

    # ------------------------------------------------------------ checkpoints

    @contextlib.contextmanager
    def ema_weights(self, rate: str | None = None) -> Iterator[nn.Module]:
        """The model with the weights of an EMA (the first by default) and in evaluation mode; put back afterwards."""
        ema = self.emas[rate or next(iter(self.emas))]
        kept, training = [p.detach().clone() for p in self.params], self.model.training
        try:
            _fill(self.params, ema)
            yield self.model.eval()
        finally:
            _fill(self.params, kept)
            self.model.train(training)

    def save(self, preview: bool = True) -> None:
        """Copy the state and write it beside the training; then preview.

        modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt, and the manifest stateNNNNNN.json when they are complete;
        NNNNNN is the number of optimizer steps done.
        """
        if self.world.rank == 0:
            folder, step = self.config.output_dir, self.step
            facts = {
                "origin": self.origin,
                "samples": self.samples,
                "ranks": self._share[0],
                "batch_size": self._share[1],
            }
            self.writer.write(
                step,
                self._copy(),
                facts,
                lambda: logger.log(f"saved {folder}/model{step:06d}.pt and its state"),
            )
        self.saved_step = self.step
        if self.preview and preview:
            self.writer.wait_for_copy()
            barrier()
            with self.ema_weights() as model:
                self.preview(model, self.step)
            barrier()

    def _copy(self) -> Callable[[], dict[str, states.Save]]:
        """A function that copies the state as it is now to the host -> names of its files and how to save them."""
        train: dict[str, Any] = {
            "schedule_sampler": self.sampler.state_dict(),
            "log_loss_scale": self.log_loss_scale,
        }
        train |= {"skipped": self.skipped, "samples": self.samples, "share": self._share}
        train |= {"precision": self.precision, "seed": self.config.seed}
        contents: dict[str, Any] = {
            f"ema_{rate}_": self._published(ema) for rate, ema in self.emas.items()
        }
        contents["opt"] = {**self.optimizer.state_dict(), "train": train}
        contents["model"] = self._published(self.params)
        number, ready = f"{self.step:06d}", device_event(self.world.device)

        def copy() -> dict[str, states.Save]:
            with after_event(ready, self.world.device):
                copies = self.host_copy.take("", contents)
            return {
                f"{kind}{number}.pt": partial(self._save_file, kind, copies[kind])
                for kind in copies
            }

        return copy

    @property
    def _share(self) -> tuple[int, int]:
        """Ranks, and samples that each takes in a step."""
        return self.world.size, self.config.batch_size

    def _save_file(self, kind: str, content: Any, file: Any) -> None:
        th.save(content if kind == "opt" else checkpoint.with_flags(content, self.flags), file)

    def _published(self, tensors: Sequence[th.Tensor]) -> dict[str, th.Tensor]:
        """Parameters, or averages of them, by published name."""
        return {checkpoint.published_name(n): t for n, t in zip(self.names, tensors, strict=True)}

    def _resume(self, folder: str, step: int) -> None:
        """Go on from the files of this step, which must lie together."""
        number = f"{step:06d}"
        checkpoint.load_weights(self.model, model_path(folder, step))
        for rate, ema in self.emas.items():
            averages, _ = checkpoint.load_state(bf.join(folder, f"ema_{rate}_{number}.pt"))
            _fill(ema, [averages[checkpoint.published_name(name)] for name in self.names])
        path = bf.join(folder, f"opt{number}.pt")
        held = checkpoint.load(path)
        if not isinstance(held, dict) or "param_groups" not in held:
            raise CheckpointError(f"{path}: holds no optimizer state")
        rest: Any = held.pop("train", {})
        for group in held[
            "param_groups"
        ]:  # before it is loaded: a fused optimizer counts its steps on the device
            group |= {"weight_decay": self.config.weight_decay, "fused": True}
        self.optimizer.load_state_dict(held)
        self.sampler.load_state_dict(rest.get("schedule_sampler", {}))
        if self.precision == rest.get("precision") == "fp16":
            self.log_loss_scale.copy_(rest["log_loss_scale"])
        if "skipped" in rest:
            self.skipped[0] = rest["skipped"][
                0
            ]  # streaks begin anew: a run that gave up gets another chance
        if rest.get("seed", self.config.seed) != self.config.seed:
            logger.log(f"note: --seed was {rest['seed']} before and is {self.config.seed} now")
        self.step = self.saved_step = step
        ranks, size = self._share
        self.samples = rest.get("samples", step * ranks * size)
        logger.log(f"resumed from {model_path(folder, step)} after {self.step} steps")
        before = tuple(rest.get("share", self._share))
        if before != self._share:
            logger.log(
                f"note: {before[0]} ranks of {before[1]} samples before, now {ranks} of {size}; data goes on in order"
            )


def device_event(device: th.device) -> th.cuda.Event | None:
    """When what the device has been given so far is done; None on a CPU, where it is done already."""
    return th.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextlib.contextmanager
def after_event(event: th.cuda.Event | None, device: th.device) -> Iterator[None]:
    """Run copies after the event, beside what the device does, and wait for them."""
    if event is None:
        yield
        return
    side = th.cuda.Stream(device)
    with th.cuda.stream(side):
        side.wait_event(event)
        yield
    side.synchronize()


@th.no_grad()
def _fill(targets: list[Any], sources: list[Any]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def check_train_config(config: TrainConfig) -> None:
    """ValueError, naming the flag, for numbers that make no sense."""
    for name in ("batch_size", "log_interval", "save_interval"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)}: need at least 1")
    for name in NOT_NEGATIVE:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} {getattr(config, name)}: must be finite and not negative")
    cut = 0 < config.microbatch < config.batch_size
    if compile_mode(config.compile) in GRAPH_MODES and cut:
        raise ValueError(
            f"microbatch {config.microbatch}: a CUDA graph's gradients do not outlive the next microbatch; compile True"
        )
    if not config.output_dir:
        raise ValueError("output_dir is empty: say where the checkpoints go with --output_dir")
