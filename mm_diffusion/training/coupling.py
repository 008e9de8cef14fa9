"""How much each modality of held-out clips is denoised by means of the other one, while training.

coupling   error(mismatched) / error(matched) - 1 of a modality: how much worse it is denoised
           beside another clip's other modality; 0 while the model ignores that. Both have the same
           noise level, or with mixed tasks the other one is clean (coupling_video2audio, ...)
validation loss   the error of matched clips, at the same noise levels every time

It needs no labels, no weights and no samples: of all that a run says it is what to look at first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch as th
from torch import nn

from .. import logger, rng
from ..config import TASKS, DataConfig, JointTrainConfig
from ..data.clips import read_held_out
from ..data.decode import ClipInfo
from ..data.index import ClipIndex
from ..dist_util import SINGLE_PROCESS, World, all_sum
from ..gaussian_diffusion import GaussianDiffusion
from ..sampling import bind
from ..tree import tree_map
from ..unet import window_shift
from .averages import QUARTILES
from .tasks import bind_known

Clips = dict[str, th.Tensor]
Errors = dict[str, th.Tensor]  # modality -> [levels]

LEVELS = tuple((k + 0.5) / 8 for k in range(8))  # t / T, two in each quartile
THRESHOLD = 0.05  # from which a model counts as coupled
MAX_CLIPS, MIN_CLIPS = 64, 4
TIME_SHARE = 0.02  # of the time between two saves
PASSES_PER_STEP = 2.5  # a training step takes as long as 3 passes without gradients: some to spare


def steps_per_clip(task_mix: Iterable[str]) -> float:
    """Training steps of one clip, of whose time TIME_SHARE is enough to measure one clip."""
    ways = len({"joint", *task_mix})
    passes = 2 * len(LEVELS) * ways  # matched and mismatched
    return passes / (PASSES_PER_STEP * TIME_SHARE)


def make_meter(
    diffusion: GaussianDiffusion,
    config: JointTrainConfig,
    data: DataConfig,
    world: World,
    index: ClipIndex[ClipInfo] | None = None,
) -> CouplingMeter | None:
    """The meter of a training run, on as many held-out clips as take TIME_SHARE of its time.

    None, and the reason in the log, where they are too few. index: of the training data, if it is
    there already. Must be called on every rank.
    """
    clips_per_step = config.batch_size * world.size
    cost = steps_per_clip(config.task_mix)
    limits = (config.save_interval, config.lr_anneal_steps, config.max_steps)
    interval = min(filter(None, limits))
    most = min(MAX_CLIPS, int(interval * clips_per_step / cost))
    if most < MIN_CLIPS:
        needed = math.ceil(MIN_CLIPS * cost / clips_per_step)
        logger.log(
            f"coupling is not measured: it would slow training by more than {TIME_SHARE:.0%} with"
            f" {interval} steps to a save; {needed} are enough (--save_interval)"
        )
        return None
    clips = read_held_out(data, config.val_dir, config.val_share, most, index)
    count = len(clips["video"]) if clips else 0
    if clips is None or count < 2:
        where, remedy = f"--val_dir {config.val_dir}", "add clips"
        if not config.val_dir:
            where, remedy = f"--val_share {config.val_share} of {data.data_dir}", "give --val_dir"
        logger.log(f"coupling is not measured: {count} held-out clips in {where}; {remedy}")
        return None
    logger.log(f"coupling is measured at every save, on {count} held-out clips")
    return CouplingMeter(clips, diffusion, config.batch_size, world, config.task_mix)


def mismatched(clips: Clips, shift: int) -> Clips:
    """The first modality of each clip with the others of the clip `shift` before it, cyclically."""
    first, *others = clips
    return {first: clips[first]} | {key: clips[key].roll(shift, 0) for key in others}


@th.no_grad()
def denoising_errors(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    clips: Clips,
    noise: Clips,
    *,
    known: str = "",
    levels: tuple[float, ...] = LEVELS,
    batch_size: int,
    device: th.device | str = "cpu",
) -> Errors:
    """[levels] float64: the loss by modality at each t / T, summed over clips; equal in every call.

    The mean squared error of what the model predicts, or the bound where that is what is trained. A
    modality that is `known` goes in clean, and is left out.
    """
    first, *_ = clips.values()
    learned = [key for key in clips if key != known]
    errors = {key: th.zeros(len(levels), dtype=th.float64, device=device) for key in learned}
    for place, level in enumerate(levels):
        t = int(level * diffusion.num_timesteps)
        for start in range(0, len(first), batch_size):
            part = slice(start, start + batch_size)
            x, eps = (tree_map(lambda v, p=part: v[p].to(device), tree) for tree in (clips, noise))
            steps = th.full((len(first[part]),), t, device=device)
            masks = {known: th.ones_like(steps, dtype=th.bool)} if known else {}
            model_fn = bind_known(bind(model), x, masks)
            with window_shift(rng.generator("coupling", t, start)):
                terms = diffusion.training_losses(model_fn, x, steps, eps)
            for key in errors:
                name = f"mse_{key}" if f"mse_{key}" in terms else f"vb_{key}"
                errors[key][place] += terms[name].double().sum()
    return errors


class CouplingMeter:
    """`meter(model)` -> {"coupling_KEY": ..., "val_loss_KEY": ...} by modality, for the log.

    Also "coupling_TASK" of the tasks of `task_mix` that have a known modality.
    Means over LEVELS; _q0 to _q3 are quartiles of the timestep, _q0 with the least noise. The clips
    [N, ...] are shared out among the ranks, which must all call it.
    """

    def __init__(
        self,
        clips: Clips,
        diffusion: GaussianDiffusion,
        batch_size: int,
        world: World = SINGLE_PROCESS,
        task_mix: Iterable[str] = (),
    ) -> None:
        self.known = {task: TASKS[task] for task in task_mix if TASKS[task]}
        count = len(next(iter(clips.values())))
        generators = rng.per_sample(0, "coupling", indices=range(count))
        noise: Any = rng.randn_like(clips, generators)
        share: Any = partial(tree_map, lambda x: x[world.rank :: world.size])
        # Neighbours may be of one scene.
        shift = count // 2
        self.matched = share(clips), share(noise)
        self.mismatched = share(mismatched(clips, shift)), share(mismatched(noise, shift))
        self.diffusion, self.batch_size, self.device = diffusion, batch_size, world.device
        self.count = count

    def __call__(self, model: nn.Module) -> dict[str, float]:
        errors = self._errors(model)
        couplings = {key: other / own - 1 for key, (own, other) in errors.items()}
        for task, known in self.known.items():
            ((own, other),) = self._errors(model, known).values()
            couplings[task] = other / own - 1
        logger.log(describe(couplings))
        values: dict[str, float] = {}
        for key, by_level in couplings.items():
            values |= _by_quartile(f"coupling_{key}", by_level)
        for key, (own, _) in errors.items():
            values |= _by_quartile(f"val_loss_{key}", own)
        return values

    def _errors(self, model: nn.Module, known: str = "") -> Errors:
        """Modality -> [2, levels]: the mean error of matched and of mismatched clips."""
        options: dict[str, Any] = {"batch_size": self.batch_size, "device": self.device}
        run: Any = partial(denoising_errors, model, self.diffusion, known=known, **options)
        own, other = run(*self.matched), run(*self.mismatched)
        return {key: all_sum(th.stack([own[key], other[key]])).cpu() / self.count for key in own}


def _by_quartile(name: str, values: th.Tensor) -> dict[str, float]:
    quartiles = values.view(QUARTILES, -1).mean(dim=1).tolist()
    return {name: float(values.mean())} | {f"{name}_q{q}": x for q, x in enumerate(quartiles)}


def describe(couplings: Mapping[str, th.Tensor]) -> str:
    """One line: the mean of each coupling, and whether the model is coupled by the largest one.

    Samples agree as soon as one modality follows the other.
    """
    means = {key: float(by_level.mean()) for key, by_level in couplings.items()}
    parts = ", ".join(f"{key} {value:.3f}" for key, value in means.items())
    is_coupled = max(means.values()) >= THRESHOLD
    verdict = "coupled" if is_coupled else f"not coupled yet, as all are below {THRESHOLD}"
    return f"coupling on held-out clips: {parts}: {verdict}"
