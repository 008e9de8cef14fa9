"""The trainer: one loop for every model and every kind of sample."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch as th
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import checkpoint, logger, rng
from .checkpoint import CheckpointError
from .dist_util import ALONE, World, all_sum, barrier
from .gaussian_diffusion import GaussianDiffusion
from .resample import create_named_schedule_sampler
from .sampling import DTYPES, bind, half_precision
from .script_util import CARRIED_FLAGS, TrainConfig, merge_checkpoint_flags
from .tree import Tree, leaves, randn_like, tree_map
from .unet import window_shift

INITIAL_LOG_LOSS_SCALE = 20.0
QUARTILES = 4


def update_ema(ema: list[th.Tensor], params: list[th.Tensor], rate: float) -> None:
    """ema <- rate * ema + (1 - rate) * params, in place."""
    th._foreach_lerp_(ema, params, 1 - rate)


def warm_rate(rate: float, updates: int) -> float:
    """The rate after `updates` updates: early averages forget their start (Adam-style warm-up)."""
    return min(rate, (1 + updates) / (10 + updates))


def parse_rates(text: str) -> list[str]:
    """ "0.9999,0.99" -> ["0.9999", "0.99"], as they are written in file names."""
    found = [part.strip() for part in str(text).split(",")]
    for part in found:
        try:
            good = 0 <= float(part) < 1
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"ema_rate {text!r}: need numbers in [0, 1), with commas between")
    return found


class TrainLoop:
    """Trains `model` on an iterator of `(x_start, cond)` and leaves checkpoints in `config.output_dir`.

    Everything random is a function of (seed, step, place in the global batch), so that the same global batch gives the
    same gradients on any number of ranks and for any microbatch; dropout masks alone also depend on the rank.

    data: `start_batch -> iterator`, so that a resumed run continues where the data stopped.
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
        _check(config)
        self.model, self.diffusion, self.config, self.world = model.to(world.device), diffusion, config, world
        self.flags, self.preview = flags or {}, preview
        if config.init_checkpoint and not config.resume_checkpoint:
            start_from(config.init_checkpoint, self.model)
        self.forward_model: nn.Module = self.model
        if world.size > 1:  # first of all: every rank gets the weights of rank 0
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.forward_model = DistributedDataParallel(
                self.model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.sampler = create_named_schedule_sampler(config.schedule_sampler, diffusion.num_timesteps)
        self.params = list(self.model.parameters())
        self.optimizer = th.optim.AdamW(
            self.params, lr=config.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay, fused=True
        )
        self.emas = {rate: [p.detach().clone() for p in self.params] for rate in parse_rates(config.ema_rate)}
        self.precision = half_precision(world.device) if use_fp16 else "fp32"
        self.log_loss_scale = INITIAL_LOG_LOSS_SCALE
        self.step = 0  # optimizer steps done
        if config.resume_checkpoint:
            self._resume(config.resume_checkpoint)
        self.data = data(self.step)
        self.seen: dict[str, list[th.Tensor]] = {}  # what the next row of the log averages

    def run_loop(self) -> None:
        """Train to the end of `lr_anneal_steps` (without it: until stopped), saving on the way and at the end."""
        total = self.config.lr_anneal_steps or None
        bar = tqdm(total=total, initial=self.step, unit="step", disable=self.world.rank > 0, dynamic_ncols=True)
        start_time, start_step = time.monotonic(), self.step
        with bar:
            while total is None or self.step < total:
                self.run_step(*next(self.data))
                clips = self.config.batch_size * self.world.size
                bar.set_postfix(
                    {"samples/s": f"{clips * (self.step - start_step) / (time.monotonic() - start_time):.2f}"},
                    refresh=False,
                )
                bar.update()
                if self.step % self.config.log_interval == 0 or self.step == total:
                    self._log(clips * (self.step - start_step) / (time.monotonic() - start_time))
                if self.step % self.config.save_interval == 0 or self.step == total:
                    self.save()

    def run_step(self, x_start: Tree, cond: dict[str, Any]) -> None:
        """One optimizer step on this rank's share of the global batch."""
        lr = self._anneal()
        self._forward_backward(x_start, cond)
        norm = self._optimize()
        self.step += 1
        self._note("grad_norm", norm)
        logger.logkv("lr", lr)

    def _forward_backward(self, x_start: Tree, cond: dict[str, Any]) -> None:
        """Accumulate gradients over the microbatches; ranks exchange them with the last one."""
        device, batch = self.world.device, len(leaves(x_start)[0])
        x_start, cond = (tree_map(lambda x: x.to(device, non_blocking=True), tree) for tree in (x_start, cond))
        first = self.world.rank * batch
        generators = rng.per_sample(self.config.seed, self.step, indices=range(first, first + batch), device=device)
        t, weights = self.sampler.sample(batch, device, generators)
        noise = randn_like(x_start, generators)
        th.manual_seed(rng.derive_seed(self.config.seed, self.step, "dropout", self.world.rank))
        size = self.config.microbatch if self.config.microbatch > 0 else batch
        losses = []
        for start in range(0, batch, size):
            parts: list[Any] = [
                tree_map(lambda x, s=start: x[s : s + size], tree) for tree in (x_start, cond, t, noise, weights)
            ]
            last = start + size >= batch
            with contextlib.nullcontext() if last else self._unsynchronised():
                losses.append(self._microbatch(parts, 1 / batch))
        self.sampler.update_with_local_losses(t, th.cat(losses))

    def _unsynchronised(self) -> contextlib.AbstractContextManager:
        """Within it a backward pass does not exchange gradients."""
        ranks = self.forward_model
        return ranks.no_sync() if isinstance(ranks, DistributedDataParallel) else contextlib.nullcontext()

    def _microbatch(self, part: list[Any], share: float) -> th.Tensor:
        """Add the gradient of `share` times the summed weighted losses; returns the losses [B] without weights."""
        x_start, cond, t, noise, weights = part
        shifts = rng.generator(self.config.seed, self.step, "window shift")  # the same for every microbatch and rank
        with window_shift(shifts):
            with th.autocast(self.world.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
                terms = self.diffusion.training_losses(bind(self.forward_model, cond), x_start, t, noise)
            loss = (terms["loss"] * weights).sum() * share
            (loss * 2**self.log_loss_scale if self.precision == "fp16" else loss).backward()
        self._note("quartile", QUARTILES * t // self.diffusion.num_timesteps)
        for name, term in terms.items():
            self._note(f"term {name}", term.detach() * weights)
        return terms["loss"].detach()

    def _optimize(self) -> th.Tensor:
        """Clip, step, average; returns the norm of the gradient before clipping."""
        if self.precision == "fp16":
            th._foreach_mul_([p.grad for p in self.params if p.grad is not None], 2.0**-self.log_loss_scale)
        norm = nn.utils.clip_grad_norm_(self.params, self.config.grad_clip or float("inf"))
        if self.precision == "fp16" and not norm.isfinite():
            self.log_loss_scale -= 1
            logger.log(f"step {self.step}: gradient overflow, loss scale lowered to 2^{self.log_loss_scale:.1f}")
        else:
            self.optimizer.step()
            for rate, ema in self.emas.items():
                update_ema(ema, [p.detach() for p in self.params], warm_rate(float(rate), self.step))
            self.log_loss_scale += self.config.fp16_scale_growth if self.precision == "fp16" else 0
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

    def _log(self, samples_per_second: float) -> None:
        """Average over ranks what was noted since the last row, and write one: the only wait for the device."""
        quartile = th.cat(self.seen.pop("quartile"))
        bins = th.nn.functional.one_hot(quartile, QUARTILES).double()
        norm = th.stack(self.seen.pop("grad_norm")).mean()
        for key in [key for key in self.seen if key.startswith("term ")]:
            values = th.cat(self.seen.pop(key)).double()
            sums = all_sum(th.stack([values @ bins, bins.sum(0)])).cpu()
            name = key.removeprefix("term ")
            logger.logkv(name, float(sums[0].sum() / sums[1].sum()))
            for q in range(QUARTILES):
                if sums[1, q]:
                    logger.logkv(f"{name}_q{q}", float(sums[0, q] / sums[1, q]))
        logger.logkv("grad_norm", float(norm))
        logger.logkv("param_norm", float(th.stack(th._foreach_norm([p.detach() for p in self.params])).norm()))
        logger.logkv("step", self.step)
        logger.logkv("samples", self.step * self.config.batch_size * self.world.size)
        logger.logkv("samples_per_second", samples_per_second)
        if self.precision == "fp16":
            logger.logkv("log2_loss_scale", self.log_loss_scale)
        logger.dumpkvs()

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

    def save(self) -> None:
        """Write modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt, NNNNNN optimizer steps done; then preview."""
        if self.world.rank == 0:
            folder, number = self.config.output_dir, f"{self.step:06d}"
            os.makedirs(folder, exist_ok=True)
            for rate in self.emas:
                with self.ema_weights(rate) as model:
                    checkpoint.save_weights(f"{folder}/ema_{rate}_{number}.pt", model, self.flags)
            checkpoint.save(f"{folder}/opt{number}.pt", self._train_state())
            checkpoint.save_weights(f"{folder}/model{number}.pt", self.model, self.flags)  # last: its presence says all
            logger.log(f"saved {folder}/model{number}.pt, its EMA and its optimizer state")
        barrier()
        if self.preview:
            with self.ema_weights() as model:
                self.preview(model, self.step)
            barrier()

    def _train_state(self) -> dict[str, Any]:
        """The optimizer's state dict with the rest of the trainer's state beside its entries."""
        rest = {"schedule_sampler": self.sampler.state_dict(), "log_loss_scale": self.log_loss_scale}
        return {**self.optimizer.state_dict(), "train": rest}

    def _resume(self, path: str) -> None:
        """Go on from modelNNNNNN.pt; its EMA and optimizer files must lie beside it."""
        folder, name = os.path.split(path)
        match = re.fullmatch(r"model(\d+)\.pt", name)
        if not match:
            raise ValueError(
                f"resume_checkpoint {path}: need a file named modelNNNNNN.pt; to start a new run from other weights,"
                " give them as --init_checkpoint"
            )
        checkpoint.load_weights(self.model, path)
        own = dict(self.model.named_parameters())
        for rate, ema in self.emas.items():
            state, _ = checkpoint.load_state(os.path.join(folder, f"ema_{rate}_{match[1]}.pt"))
            names = {ours: published for published, ours in checkpoint.published_names(self.model).items()}
            _fill(ema, [state[names[name]] for name in own])
        state = checkpoint.load(os.path.join(folder, f"opt{match[1]}.pt"))
        if not isinstance(state, dict) or "param_groups" not in state:
            raise CheckpointError(f"{folder}/opt{match[1]}.pt: holds no optimizer state")
        rest: Any = state.pop("train", {})
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.weight_decay
        self.sampler.load_state_dict(rest.get("schedule_sampler", {}))
        self.log_loss_scale = rest.get("log_loss_scale", INITIAL_LOG_LOSS_SCALE)
        self.step = int(match[1])
        logger.drop_rows_from(self.step)
        logger.log(f"resumed from {path} after {self.step} steps")


def flags_to_start_with(values: dict, given: set[str], carried: Collection[str] = CARRIED_FLAGS) -> dict:
    """Flags with those of the checkpoint that a run resumes, or starts from, in the place of defaults.

    ValueError where an explicit flag contradicts the run that is resumed.
    """
    path = values["resume_checkpoint"] or values["init_checkpoint"]
    if not path:
        return values
    trained = checkpoint.load_state(path)[1]
    if not values["resume_checkpoint"]:
        trained = {name: value for name, value in trained.items() if name not in given}
    return merge_checkpoint_flags(values, given, trained, path, carried)


def start_from(path: str, model: nn.Module) -> None:
    """Fill the model with those tensors of a checkpoint that fit, and tell which; CheckpointError if none does."""
    left = checkpoint.load_weights(model, path, strict=False)
    own = checkpoint.published_names(model)
    new, unknown = [name for name in left if name in own], [name for name in left if name not in own]
    logger.log(f"{path}: {len(own) - len(new)} of the model's {len(own)} tensors taken")
    for names, what in ((new, "start anew"), (unknown, "of the checkpoint have no place in the model")):
        if names:
            logger.log(f"  {len(names)} {what}: {', '.join(names)}")


@th.no_grad()
def _fill(targets: list[Any], sources: list[Any]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _check(config: TrainConfig) -> None:
    """ValueError, naming the flag, for numbers that make no sense."""
    for name in ("batch_size", "log_interval", "save_interval"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)}: need at least 1")
    for name in ("lr", "weight_decay", "lr_anneal_steps", "lr_warmup_steps", "grad_clip", "preview_clips"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} {getattr(config, name)}: must not be negative")
    if not config.output_dir:
        raise ValueError("output_dir is empty: say where the checkpoints go with --output_dir")
