"""The trainer: one loop for every model and every kind of sample."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any

import torch as th
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from . import checkpoint, logger, rng
from .checkpoint import published_name
from .config import TrainConfig
from .data.loader import prefetch_to_device
from .devices.compile_choice import PASSES_PER_STEP, choose_compilation
from .devices.compiled import Compiled
from .dist_util import SINGLE_PROCESS, MaxOfRanks, World, barrier, broadcast, from_rank_0
from .files import is_remote, remove_unfinished
from .gaussian_diffusion import GaussianDiffusion
from .nn import store_channels_last, use_norm_kernel
from .resample import create_named_schedule_sampler
from .rng import randn_like
from .sampling import DTYPES, bind, choose_precision
from .training.averages import QUARTILES, Averages, Pace
from .training.lock import locked
from .training.optimizer_state import from_published, to_published
from .training.resume import find_state, initial_weights, start_from
from .training.signals import stop_signals
from .training.states import State, thin_out, write_state
from .training.tasks import TaskMix, bind_known, without_known
from .tree import Tree, leaves, tree_map
from .unet import window_shift

INITIAL_LOG_LOSS_SCALE = 20.0
NO_BATCH: tuple[Tree, dict[str, Any]] = {}, {}
# What a rank asks for; the largest counts.
CONTINUE, OUT_OF_TIME, DATA_FAILED, SIGNALLED = range(4)


def update_ema(ema: list[th.Tensor], params: list[th.Tensor], rate: float) -> None:
    """ema <- rate * ema + (1 - rate) * params, in place."""
    th._foreach_lerp_(ema, params, 1 - rate)


def warm_rate(rate: float, updates: int) -> float:
    """The rate after `updates` updates: low at first, so that averages forget their start."""
    return min(rate, (1 + updates) / (10 + updates))


class TrainLoop:
    """Trains `model` on an iterator of `(x_start, cond)`; checkpoints go to `config.output_dir`.

    All randomness is a function of (seed, step, place in the global batch): the same global batch
    gives the same gradients on any number of ranks, for any microbatch. Only dropout masks also
    depend on the rank.

    data: start_sample -> iterator, where `start_sample` is how many samples all ranks together have
        used; a resumed run continues there.
    flags: what the checkpoints carry.
    preview: called as preview(model, step) after every save on all ranks, with the first EMA in the
        model.
    task_mix: share of each task; joint generation alone by default.
    meter: called as meter(model) before every save on all ranks, with the first EMA in the model;
        what it returns goes into the log.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        data: Callable[[int], Iterator[tuple[Tree, dict[str, Any]]]],
        config: TrainConfig,
        world: World = SINGLE_PROCESS,
        *,
        use_fp16: bool = False,
        flags: dict[str, Any] | None = None,
        preview: Callable[[nn.Module, int], None] | None = None,
        task_mix: Mapping[str, float] | None = None,
        meter: Callable[[nn.Module], Mapping[str, float]] | None = None,
    ) -> None:
        self.model, self.diffusion = model.to(world.device), diffusion
        if world.device.type == "cuda":
            store_channels_last(self.model)
        use_norm_kernel(config.norm_kernel)
        self.config, self.world = config, world
        self.flags, self.preview = flags or {}, preview
        self.tasks, self.meter = TaskMix(task_mix), meter
        self.step = 0  # optimizer steps done
        self.samples = 0  # used by all ranks together
        self.saved_step = -1
        self.started = time.monotonic()
        self.data_error: Exception | None = None
        self.lock = contextlib.ExitStack()  # of the output folder, until `run_loop` ends
        if world.rank == 0:
            self.lock.enter_context(locked(config.output_dir))
        state = from_rank_0(lambda: find_state(config))
        initial = initial_weights(config)
        if initial and state:
            ignored = f"{initial.flag} {initial.path} ignored"
            logger.log(f"{ignored}: resuming the existing run in {state.folder}")
        elif initial and world.rank == 0:
            start_from(initial.path, self.model)
        self.forward_model = self._wrap_model(state)  # gives all ranks the weights of rank 0
        self.names, self.params = map(list, zip(*self.model.named_parameters(), strict=True))
        self.emas = {rate: [p.detach().clone() for p in self.params] for rate in config.ema_rate}
        optimizer = partial(th.optim.AdamW, betas=(0.9, 0.999), eps=1e-8, fused=True)
        self.optimizer = optimizer(self.params, lr=config.lr, weight_decay=config.weight_decay)
        timesteps = diffusion.num_timesteps
        self.sampler = create_named_schedule_sampler(config.schedule_sampler, timesteps)
        self.precision = choose_precision(config.precision, use_fp16, world.device)
        scale = INITIAL_LOG_LOSS_SCALE if self.precision == "fp16" else 0.0
        self.log_loss_scale = th.tensor(scale, dtype=th.float64, device=world.device)
        # Steps with a gradient that was not finite: in all, in a row, and the most in a row since
        # the last row of the log.
        self.skipped = th.zeros(3, device=world.device)
        self.longest_streak = 0
        self.resumed_from = state.resumed_from if state else ""
        if state:
            self._resume(state)
        if world.rank == 0 and not is_remote(config.output_dir):
            remove_unfinished(config.output_dir, least_age=0)
        logger.drop_rows_from(self.step)
        logger.start_trackers(self.step, self.flags)
        self.data: Iterator[Any] = prefetch_to_device(data(self.samples), world.device)
        self.averages, self.pace = Averages(), Pace(self.samples)

    def _wrap_model(self, state: State | None) -> nn.Module:
        """The model as training calls it: compiled, and with gradients averaged over the ranks."""
        model, device = self.model, self.world.device
        left = (self.total_steps or math.inf) - (state.step if state else 0)
        passes = PASSES_PER_STEP * left
        way = from_rank_0(lambda: choose_compilation(self.config.compile, device, passes))
        if way:
            model = Compiled(model, way)
        if self.world.size == 1:
            return model
        gpus = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=gpus, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    @property
    def total_steps(self) -> int | None:
        """The steps after which the run ends; None for no limit of steps."""
        limits = (self.config.lr_anneal_steps, self.config.max_steps)
        return min(filter(None, limits), default=None)

    # ------------------------------------------------------------ the loop

    def run_loop(self) -> None:
        """Train until there is a reason to stop; save on the way and at the end.

        The error of the data, after saving, where that is the reason.
        """
        total, is_silent = self.total_steps, self.world.rank > 0
        bar = partial(tqdm, unit="step", disable=is_silent, dynamic_ncols=True)
        agree, verdict = MaxOfRanks(), CONTINUE
        with (
            self.lock,
            stop_signals() as received,
            bar(total=total, initial=self.step) as progress,
        ):
            upcoming = self._next_batch(received) if agree.is_late else NO_BATCH
            agree(self._wish(received))
            while total is None or self.step < total:
                batch = upcoming if agree.is_late else self._next_batch(received)
                if agree.is_late and self.step + 1 != total:
                    # What a rank hands in must say whether it can do the next step.
                    upcoming = self._next_batch(received)
                if verdict := agree(self._wish(received)):
                    reason = self._reason_to_stop(verdict, received)
                    logger.log(f"stopping after {self.step} steps: {reason}")
                    break
                self.run_step(*batch)
                progress.update()
                if self.step % self.config.save_interval == 0 or self.step == total:
                    self._measure()
                if self.step % self.config.log_interval == 0 or self.step == total:
                    self._log()
                    self.abort_if_diverged()
                    pace = f"{self.pace.samples_per_second:.2f} samples/s"
                    progress.set_postfix_str(pace, refresh=False)
                if self.step % self.config.save_interval == 0:
                    self.save()
            agree(self._wish(received))
            is_signalled, has_failed = agree.wait() == SIGNALLED, verdict == DATA_FAILED
            if self.saved_step != self.step and (self.step or not has_failed):
                # After a signal there may be no time for previews.
                self.save(preview=not is_signalled and not has_failed)
            if has_failed:
                self._raise_data_error()

    def _next_batch(self, received: list[str]) -> tuple[Tree, dict[str, Any]]:
        """The next batch; nothing, and `data_error` is set, where the data fails.

        Unless a signal that stops us has stopped the loader as well. Nothing after either.
        """
        if received or self.data_error:
            return NO_BATCH
        with self.pace.waiting():
            try:
                return next(self.data)
            except Exception as error:
                time.sleep(0.1)  # the loader may receive the signal before us
                self.data_error = None if received else error
                return NO_BATCH

    def _wish(self, received: list[str]) -> int:
        """What this rank asks for."""
        hours, limit = (time.monotonic() - self.started) / 3600, self.config.max_hours
        wish = OUT_OF_TIME if limit and hours >= limit else CONTINUE
        wish = DATA_FAILED if self.data_error else wish
        return SIGNALLED if received else wish

    def _reason_to_stop(self, verdict: int, received: list[str]) -> str:
        if verdict == SIGNALLED:
            return " ".join(received) or "another rank received a signal"
        return "no more data" if verdict == DATA_FAILED else f"--max_hours {self.config.max_hours}"

    def _raise_data_error(self) -> None:
        """Raise it where it came up; that ends the other ranks."""
        barrier()  # rank 0 has saved
        if self.data_error:
            raise self.data_error
        barrier()

    def run_step(self, x_start: Tree, cond: dict[str, Any]) -> None:
        """One optimizer step on this rank's share of the global batch."""
        logger.logkv("lr", self._anneal())
        self._forward_backward(x_start, cond)
        self.averages.add_norm(self._optimize())
        self.step += 1
        self.samples += len(leaves(x_start)[0]) * self.world.size

    def _forward_backward(self, x_start: Tree, cond: dict[str, Any]) -> None:
        """Accumulate gradients over the microbatches; ranks exchange them with the last one."""
        seed, step, rank = self.config.seed, self.step, self.world.rank
        device, batch = self.world.device, len(leaves(x_start)[0])
        indices = range(rank * batch, (rank + 1) * batch)
        generators = rng.per_sample(seed, step, indices=indices, device=device)
        t, weights = self.sampler.sample(batch, device, generators)
        tasks = self.tasks.draw(seed, step, indices, device)
        noise = randn_like(x_start, generators)
        th.manual_seed(rng.derive_seed(seed, step, "dropout", rank))
        size = self.config.microbatch if self.config.microbatch > 0 else batch
        no_sync = getattr(self.forward_model, "no_sync", contextlib.nullcontext)  # of several ranks
        losses = []
        for start in range(0, batch, size):
            part = itemgetter(slice(start, start + size))
            parts = [tree_map(part, tree) for tree in (x_start, cond, t, noise, weights, tasks)]
            is_last = start + size >= batch
            with contextlib.nullcontext() if is_last else no_sync():
                losses.append(self._microbatch(parts, share=1 / batch))
        self.sampler.update_with_local_losses(t, th.cat(losses))

    def _microbatch(self, parts: Sequence[Any], share: float) -> th.Tensor:
        """Add the gradient of `share` times the sum of weighted losses -> unweighted losses [B].

        parts: x_start, cond, t [B], noise, weights [B], tasks [B].
        """
        x_start, cond, t, noise, weights, tasks = parts
        # Window shifts are the same for every microbatch and rank.
        shifts = rng.generator(self.config.seed, self.step, "window shift")
        known = self.tasks.known(tasks)
        model_fn = bind_known(bind(self.forward_model, cond), x_start, known)
        with window_shift(shifts):
            with self._autocast():
                terms = self.diffusion.training_losses(model_fn, x_start, t, noise)
            terms = without_known(terms, known)
            loss = (terms["loss"] * weights).sum() * share
            if self.precision == "fp16":
                loss = loss * 2**self.log_loss_scale
            loss.backward()
        weighted = {name: term.detach() * weights for name, term in terms.items()}
        weighted, counted = self.tasks.counted(weighted, tasks)
        self.averages.add(QUARTILES * t // self.diffusion.num_timesteps, weighted, counted)
        return terms["loss"].detach()

    def _autocast(self) -> th.autocast:
        device, dtype = self.world.device.type, DTYPES[self.precision]
        return th.autocast(device, dtype, enabled=self.precision != "fp32")

    def _optimize(self) -> th.Tensor:
        """Clip, step, average -> the norm of the gradient before clipping.

        Where the norm is not finite the weights stay as they are. The host does not wait.
        """
        if self.precision == "fp16":
            grads = [p.grad for p in self.params if p.grad is not None]
            th._foreach_mul_(grads, (2.0**-self.log_loss_scale).float())
        if self.config.grad_clip:
            norm = nn.utils.clip_grad_norm_(self.params, self.config.grad_clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        bad = (~norm.isfinite()).float()
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        params = [p.detach() for p in self.params]
        for rate, ema in self.emas.items():
            update_ema(ema, params, warm_rate(float(rate), self.step))
        total, in_a_row, most = self.skipped
        in_a_row = (in_a_row + bad) * bad
        self.skipped = th.stack([total + bad, in_a_row, th.maximum(most, in_a_row)])
        if self.precision == "fp16":
            self.log_loss_scale += th.where(bad > 0, -1.0, self.config.fp16_scale_growth)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _anneal(self) -> float:
        """Set and return the learning rate of this step."""
        lr, done = self.config.lr, self.step
        if self.config.lr_warmup_steps:
            lr *= min(1.0, (done + 1) / self.config.lr_warmup_steps)
        if self.config.lr_anneal_steps:
            lr *= 1 - done / self.config.lr_anneal_steps
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    # ------------------------------------------------------------ log

    def _measure(self) -> None:
        """Add what the meter says about the averaged weights to the next row of the log."""
        if self.meter:
            with self.ema_weights() as model, self._autocast():
                values = self.meter(model)
            for name, value in values.items():
                logger.logkv(name, value)

    def _log(self) -> None:
        """Log a row about the steps since the last one: the only wait for the device."""
        self.averages.log()
        norms = th._foreach_norm([p.detach() for p in self.params])
        logger.logkv("param_norm", float(th.stack(norms).norm()))
        logger.logkv("step", self.step)
        logger.logkv("samples", self.samples)
        self.pace.log(self.samples)
        if self.precision == "fp16":
            logger.logkv("log2_loss_scale", float(self.log_loss_scale))
        total, in_a_row, most = map(int, self.skipped.tolist())
        self.longest_streak = most
        self.skipped[2] = in_a_row
        logger.logkv("skipped_steps", total)
        logger.dumpkvs()

    def abort_if_diverged(self) -> None:
        """Save and raise ValueError after too many steps in a row with a gradient not finite.

        --max_skipped_steps is the limit; the weights saved are those before these steps. All ranks
        call it after `_log`.
        """
        if self.longest_streak <= self.config.max_skipped_steps:
            return
        self.save(preview=False)
        barrier()  # a rank that raises ends the others, rank 0 while it saves
        raise ValueError(
            f"the gradient was not finite {self.longest_streak} steps in a row"
            " (--max_skipped_steps); the weights before them are saved: resume with a lower --lr,"
            " --grad_clip 1, or --precision bf16 or fp32"
        )

    # ------------------------------------------------------------ checkpoints

    @contextlib.contextmanager
    def ema_weights(self, rate: str | None = None) -> Iterator[nn.Module]:
        """Within it the model has the weights of an EMA, the first by default, in eval mode."""
        ema = self.emas[rate or next(iter(self.emas))]
        weights, training = [p.detach().clone() for p in self.params], self.model.training
        try:
            _fill(self.params, ema)
            yield self.model.eval()
        finally:
            _fill(self.params, weights)
            self.model.train(training)

    def save(self, preview: bool = True) -> None:
        """Write the state of this step (see `training.states`), remove old ones, and preview.

        StateError where it cannot be written.
        """
        config, folder = self.config, self.config.output_dir
        if self.world.rank == 0:
            state = State(folder, self.step, {}, self.resumed_from)
            write_state(state, self._contents(), self._progress())
            thin_out(folder, self.step, config.keep_last, config.keep_every)
        self.saved_step = self.step
        if self.preview and preview:
            barrier()
            with self.ema_weights() as model:
                self.preview(model, self.step)
            barrier()

    def _contents(self) -> Iterator[tuple[str, Any]]:
        """(kind, content) of the files of a state, one after the other."""
        for rate, ema in self.emas.items():
            yield f"ema_{rate}_", checkpoint.with_flags(self._published(ema), self.flags)
        train = self._progress() | {
            "schedule_sampler": self.sampler.state_dict(),
            "log_loss_scale": self.log_loss_scale,
            "skipped": self.skipped,
            "precision": self.precision,
            "seed": self.config.seed,
        }
        state = to_published(self.optimizer.state_dict(), list(map(published_name, self.names)))
        yield "opt", state | {"train": train}
        yield "model", checkpoint.with_flags(self._published(self.params), self.flags)

    def _progress(self) -> dict[str, int]:
        ranks, batch_size = self.world.size, self.config.batch_size
        return {"samples": self.samples, "ranks": ranks, "batch_size": batch_size}

    def _published(self, tensors: Sequence[th.Tensor]) -> dict[str, th.Tensor]:
        """Parameters, or averages of them, by published name."""
        return {published_name(n): t for n, t in zip(self.names, tensors, strict=True)}

    def _resume(self, state: State) -> None:
        """Continue from the files of a state, which rank 0 reads for all ranks.

        CheckpointError naming one that is missing.
        """
        if self.world.rank == 0:
            checkpoint.load_weights(self.model, state.path("model"))
        broadcast(self.params)
        is_weights_only = from_rank_0(state.is_weights_only)
        train = self._resume_weights(state) if is_weights_only else self._resume_all(state)
        self.sampler.load_state_dict(train.get("schedule_sampler", {}))
        if self.precision == train.get("precision") == "fp16":
            self.log_loss_scale.copy_(train["log_loss_scale"])
        if "skipped" in train:  # in all; a streak starts anew, so that an aborted run can resume
            self.skipped[0] = train["skipped"][0]
        self.step = self.saved_step = state.step
        logger.log(f"resumed from {state.path('model')} after {self.step} steps")
        now = {"seed": self.config.seed, **self._progress()}
        self.samples = train.get("samples", self.step * now["ranks"] * now["batch_size"])
        for name in ("seed", "ranks", "batch_size"):
            if train.get(name, now[name]) != now[name]:
                logger.log(f"note: {name} was {train[name]} and is {now[name]} now")

    def _resume_weights(self, state: State) -> dict[str, Any]:
        """Averages begin as the weights, the optimizer anew; {}: nothing else is known of a run."""
        logger.warn(
            f"{state.path('model')}: neither averages nor optimizer beside it; the averages start"
            f" from its weights, the optimizer anew, at step {state.step} (to count from step 0,"
            " give --init_checkpoint instead)"
        )
        for ema in self.emas.values():
            _fill(ema, [p.detach() for p in self.params])
        return {}

    def _resume_all(self, state: State) -> dict[str, Any]:
        """Averages and optimizer -> what else the optimizer's file holds of the run."""
        if self.world.rank == 0:
            for rate, ema in self.emas.items():
                averages, _ = checkpoint.load_state(state.path(f"ema_{rate}_"))
                _fill(ema, [averages[published_name(name)] for name in self.names])
        broadcast(chain(*self.emas.values()))
        return self._load_optimizer(state.path("opt"))

    def _load_optimizer(self, path: str) -> dict[str, Any]:
        """Load the optimizer's state, on rank 0 -> what else its file holds of the run."""
        content, train = self._read_optimizer(path) if self.world.rank == 0 else ({}, {})
        train, outline = from_rank_0(lambda: (train, _outline(content)))
        if self.world.rank > 0:
            content = tree_map_only(th.Tensor, partial(th.empty_like, device="cpu"), outline)
        for group in content["param_groups"]:  # before loading: fused ones count on the device
            group |= {"weight_decay": self.config.weight_decay, "fused": True}
        self.optimizer.load_state_dict(content)
        broadcast(chain(*(values.values() for values in self.optimizer.state.values())))
        return train

    def _read_optimizer(self, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The optimizer's state, and what else its file holds of the run."""
        content = checkpoint.load(path)
        shapes = {published_name(n): p.shape for n, p in zip(self.names, self.params, strict=True)}
        return from_published(content, shapes, path), content.get("train", {})


def _outline(content: dict[str, Any]) -> dict[str, Any]:
    """The same with tensors that have a shape and dtype only."""
    return tree_map_only(th.Tensor, partial(th.empty_like, device="meta"), content)


@th.no_grad()
def _fill(targets: list[Any], sources: list[Any]) -> None:
    th._foreach_copy_(targets, sources)
