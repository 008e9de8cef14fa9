"""A clip from noise to files by every sampler, and what half precision changes in it."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch as th
from bench import Bench
from measure import LeftOut, device, seconds_of, synchronise
from models import SEED, UPSAMPLED_BY, Size, build, create, forward_of, sample_of
from report import Figure
from torch._subclasses.fake_tensor import FakeTensorMode

from mm_diffusion.config import SR, DataConfig, SamplingConfig
from mm_diffusion.generation.load import SR_DDIM_STEPS
from mm_diffusion.generation.output import ClipFormat, write_sample
from mm_diffusion.sampling import (
    InferenceModel,
    Progress,
    make_sampler,
    prepare,
    sample_joint,
    upsample_video,
)
from mm_diffusion.tree import Tree

RESPACING = {"ddim": "ddim50"}  # ddpm takes all steps
SR_SAMPLER = "ddim"
FIXED_STEPS = "dpm_solver"  # to compare precisions: it takes the same steps in all of them
CLIPS_OF_A_RUN = SamplingConfig.all_save_num
SURE = 0.02  # the share of the allowed time after which the total can be estimated


@dataclass(frozen=True)
class Sampled:
    """A sample, and how long it took."""

    sample: Any
    seconds: float
    evaluations: int


def watch(longest: float) -> Progress:
    """A progress function that raises LeftOut once all will clearly take over `longest` seconds."""
    start = time.perf_counter()

    def report(fraction: float) -> None:
        elapsed = time.perf_counter() - start
        total = elapsed / fraction if fraction else math.inf
        is_too_slow = elapsed > SURE * longest and total > 2 * longest
        if fraction < 1 and (elapsed > longest or is_too_slow):
            raise LeftOut(f"would take about {total:.0f} s; --longest is {longest:g}")

    return report


def timed(bench: Bench, model: InferenceModel, sample: Callable[[Progress], Tree]) -> Sampled:
    """`sample(progress)`, watched, with the evaluations of the model counted."""
    count = 0

    def add_one(*_: Any) -> None:
        nonlocal count
        count += 1

    hook = model.register_forward_hook(add_one)
    synchronise()
    start = time.perf_counter()
    try:
        result = sample(watch(bench.longest))
        synchronise()
        return Sampled(result, time.perf_counter() - start, count)
    finally:
        hook.remove()


def sample_clip(bench: Bench, name: str, precision: str, sampler: str) -> Sampled:
    """A batch of clips of the joint model of this name, sampled once."""
    key = ("clip", name, precision, sampler)
    if key not in bench.samples:
        model, diffusion = build(bench.sizes[name], timestep_respacing=RESPACING.get(sampler, ""))
        prepared = prepare(model, precision)
        forward_of(prepared, bench.batch_size)()  # what is chosen or loaded at the first pass
        how = make_sampler(sampler, diffusion)
        run = partial(sample_joint, prepared, how, range(bench.batch_size), SEED, device())
        bench.samples[key] = timed(bench, prepared, run)
    return bench.samples[key]


def upsampled(bench: Bench, name: str, precision: str, num_frames: int) -> Sampled:
    """Frames of noise through the upsampler of this name, once."""
    key = ("frames", name, precision, str(num_frames))
    if key not in bench.samples:
        respacing = {f"{SR}timestep_respacing": str(SR_DDIM_STEPS)}
        model, diffusion = build(bench.sizes[name], **respacing)
        prepared, how = prepare(model, precision), make_sampler(SR_SAMPLER, diffusion)
        frames = sample_of(model, num_frames)[1]["low_res"].cpu()
        forward_of(prepared, 1)()

        def run(progress: Progress) -> th.Tensor:
            options = {"device": device(), "progress": progress}
            return upsample_video(prepared, how, frames, SEED, 0, **options)

        bench.samples[key] = timed(bench, prepared, run)
    return bench.samples[key]


# ---------------------------------------------------------------- sections


def measure_sampling(bench: Bench) -> None:
    """The section "sampling": a clip by each sampler, upsampled and written, and the sum of all."""
    if not set(UPSAMPLED_BY) & set(bench.sizes):
        needed = " or ".join(UPSAMPLED_BY)
        bench.report.leave_out("sampling", f"it begins with a clip: add {needed} to --models")
    for name, size, precision in bench.each():
        if size.upsampler:
            continue
        large = measure_upsampling(bench, name, precision)
        for sampler in bench.samplers:
            with bench.report.trying("sampling", name, precision, sampler):
                measure_clip(bench, name, precision, sampler, large)


def measure_upsampling(bench: Bench, name: str, precision: str) -> Sampled | None:
    """The frames of a clip through the upsampler; None, and one is measured, if too slow."""
    other = UPSAMPLED_BY[name]
    if other not in bench.sizes:
        what = f"sampling {name} {precision} upsampling"
        bench.report.leave_out(what, f"{other} is not among --models")
        return None
    with FakeTensorMode():
        num_frames = create(bench.sizes[name])[0].video_size[0]
    for count in (num_frames, 1):
        what = f"{count} of {num_frames} frames"
        with bench.report.trying("sampling", other, precision, what):
            done = upsampled(bench, other, precision, count)
            add(bench, other, f"{what}, {SR_SAMPLER} {SR_DDIM_STEPS}", precision, done)
            return done if count == num_frames else None
    return None


def measure_clip(
    bench: Bench, name: str, precision: str, sampler: str, large: Sampled | None
) -> None:
    """Add figures of sampling a batch, of writing a clip, and of all steps for a clip together."""
    done = sample_clip(bench, name, precision, sampler)
    add(bench, name, f"sample, {sampler}", precision, done)
    clip = (done.sample["video"][0], done.sample["audio"][0])
    how = ClipFormat(DataConfig.video_fps, DataConfig.audio_fps)
    frames = large.sample if large else None
    with tempfile.TemporaryDirectory() as folder:
        writing = seconds_of(partial(write_sample, folder, "clip", *clip, how, frames))
    bench.report.add(Figure("sampling", name, f"write, {sampler}", [writing], "s", precision))
    total = done.seconds / bench.batch_size + writing + (large.seconds if large else 0)
    parts = "sample, upsample, write" if large else "sample, write"
    facts = {f"minutes_for_{CLIPS_OF_A_RUN}": CLIPS_OF_A_RUN * total / 60}
    label = (name, f"{parts}, {sampler}", [total], "s", precision, "", facts)
    bench.report.add(Figure("sampling", *label))


def add(bench: Bench, name: str, what: str, precision: str, done: Sampled) -> None:
    """Add the time of a sample, with the number of evaluations."""
    facts = {"evaluations": done.evaluations}
    bench.report.add(Figure("sampling", name, what, [done.seconds], "s", precision, "", facts))


def measure_fidelity(bench: Bench) -> None:
    """The section "fidelity": half precision against float32, from the same noise."""
    for name, size, precision in bench.each():
        if precision == "fp32":
            continue
        for compare in (compare_passes, compare_samples):
            with bench.report.trying("fidelity", name, precision):
                compare(bench, name, size, precision)


def compare_passes(bench: Bench, name: str, size: Size, precision: str) -> None:
    """Add the fidelity of a single pass."""
    exact, rough = (forward_of(prepare(build(size)[0], p))() for p in ("fp32", precision))
    add_fidelity(bench, name, "one pass", precision, exact, rough)


def compare_samples(bench: Bench, name: str, size: Size, precision: str) -> None:
    """Add the fidelity of a clip, or of an upsampled frame, by steps that do not adapt."""

    def sample(p: str) -> Tree:
        if size.upsampler:
            return upsampled(bench, name, p, 1).sample
        return sample_clip(bench, name, p, FIXED_STEPS).sample

    how = SR_SAMPLER if size.upsampler else FIXED_STEPS
    add_fidelity(bench, name, how, precision, sample("fp32"), sample(precision))


def add_fidelity(bench: Bench, name: str, how: str, precision: str, exact: Any, rough: Any) -> None:
    """Add the signal-to-noise ratio of every modality."""
    if not isinstance(exact, dict):
        exact, rough = {"image": exact}, {"image": rough}
    facts = {"weights": bench.sizes[name].weights or "random"}
    for part in exact:
        decibel = [signal_to_noise(exact[part], rough[part])]
        label = (name, f"{part} by {how}", decibel, "dB", precision, "", facts)
        bench.report.add(Figure("fidelity", *label))


def signal_to_noise(exact: th.Tensor, rough: th.Tensor) -> float:
    """The power of `exact` over that of the difference, in dB."""
    noise = (rough.double() - exact.double()).square().sum()
    return float(10 * th.log10(exact.double().square().sum() / noise))
