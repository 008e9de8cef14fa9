"""A clip from noise to files by every sampler, and what half precision changes in it."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch as th
from bench import Bench
from measure import LeftOut, device, seconds_of, synchronise
from models import SEED, UPSAMPLED_BY, Size, build, create, forward_of, sample_of
from report import Figure
from torch._subclasses.fake_tensor import FakeTensorMode

from mm_diffusion.generation.load import SR_DDIM_STEPS
from mm_diffusion.generation.output import write_sample
from mm_diffusion.sampling import InferenceModel, make_sampler, prepare, sample_joint, upscale_video
from mm_diffusion.script_util import SR, DataConfig, SampleConfig
from mm_diffusion.tree import Tree, tree_map

RESPACING = {"ddim": "ddim50"}  # ddpm takes all steps
SR_SAMPLER = "ddim"
FIXED_STEPS = "dpm_solver"  # the sampler of the comparison of precisions: it takes the same steps in all of them
LAUNCHED = SampleConfig.all_save_num
SURE = 0.02  # the share of the time allowed after which it can be told how long all will take


@dataclass(frozen=True)
class Drawn:
    """A sample, and how long it took."""

    sample: Tree
    seconds: float
    evaluations: int


def watch(longest: float) -> Callable[[float], None]:
    """A progress function that raises LeftOut once it is clear that all will take much more than `longest` seconds."""
    start = time.perf_counter()

    def report(fraction: float) -> None:
        elapsed = time.perf_counter() - start
        whole = elapsed / fraction if fraction else math.inf
        if fraction < 1 and (
            elapsed > longest or (elapsed > SURE * longest and whole > 2 * longest)
        ):
            raise LeftOut(f"would take about {whole:.0f} s; --longest is {longest:g}")

    return report


def timed(bench: Bench, model: InferenceModel, draw: Callable[..., Tree]) -> Drawn:
    """`draw(progress)`, watched."""
    count = 0

    def one_more(*_: Any) -> None:
        nonlocal count
        count += 1

    hook = model.register_forward_hook(one_more)
    synchronise()
    start = time.perf_counter()
    try:
        sample = draw(watch(bench.longest))
        synchronise()
        return Drawn(sample, time.perf_counter() - start, count)
    finally:
        hook.remove()


def draw_clip(bench: Bench, name: str, precision: str, sampler: str) -> Drawn:
    """A batch of clips of the joint model of this name; drawn once."""
    key = ("clip", name, precision, sampler)
    if key not in bench.drawn:
        model, diffusion = build(bench.sizes[name], timestep_respacing=RESPACING.get(sampler, ""))
        prepared, draw = prepare(model, precision), make_sampler(sampler, diffusion)
        forward_of(prepared, bench.batch_size)()  # what is chosen or loaded at the first pass
        clips = range(bench.batch_size)
        bench.drawn[key] = timed(
            bench,
            prepared,
            lambda progress: sample_joint(prepared, draw, clips, SEED, device(), progress),
        )
    return bench.drawn[key]


def upscaled(bench: Bench, name: str, precision: str, num_frames: int) -> Drawn:
    """Frames, of noise, through the upsampler of this name; drawn once."""
    key = ("frames", name, precision, str(num_frames))
    if key not in bench.drawn:
        model, diffusion = build(
            bench.sizes[name], **{f"{SR}timestep_respacing": str(SR_DDIM_STEPS)}
        )
        prepared, draw = prepare(model, precision), make_sampler(SR_SAMPLER, diffusion)
        frames = sample_of(model, num_frames)[1]["low_res"].cpu()

        forward_of(prepared, 1)()

        def run(progress: Callable) -> th.Tensor:
            return upscale_video(
                prepared, draw, frames, SEED, 0, device=device(), progress=progress
            )

        bench.drawn[key] = timed(bench, prepared, run)
    return bench.drawn[key]


# ---------------------------------------------------------------- sections


def measure_sampling(bench: Bench) -> None:
    """The section "sampling": one clip by each sampler, upsampled and written; the sum is what a user waits for."""
    if not set(UPSAMPLED_BY) & set(bench.sizes):
        bench.report.leave_out(
            "sampling", f"it begins with a clip: add to --models {' or '.join(UPSAMPLED_BY)}"
        )
    for name, size, precision in bench.each():
        if size.upsampler:
            continue
        large = upsample(bench, name, precision)
        for sampler in bench.samplers:
            with bench.report.trying("sampling", name, precision, sampler):
                sample_by(bench, name, precision, sampler, large)


def upsample(bench: Bench, name: str, precision: str) -> Drawn | None:
    """The frames of a clip through the upsampler; where they take too long one is measured, and None comes back."""
    other = UPSAMPLED_BY[name]
    if other not in bench.sizes:
        bench.report.leave_out(
            f"sampling {name} {precision} upsampling", f"{other} is not among --models"
        )
        return None
    num_frames = frames_of(bench, name)
    for count in (num_frames, 1):
        with bench.report.trying("sampling", other, precision, f"{count} of {num_frames} frames"):
            done = upscaled(bench, other, precision, count)
            add(
                bench,
                other,
                f"{count} of {num_frames} frames, {SR_SAMPLER} {SR_DDIM_STEPS}",
                precision,
                done,
            )
            return done if count == num_frames else None
    return None


def frames_of(bench: Bench, name: str) -> int:
    with FakeTensorMode():
        return create(bench.sizes[name])[0].video_size[0]


def sample_by(bench: Bench, name: str, precision: str, sampler: str, large: Drawn | None) -> None:
    """Figures of drawing a batch, of writing a clip, and of all of it for a clip, one after the other."""
    drawn = draw_clip(bench, name, precision, sampler)
    add(bench, name, f"draw, {sampler}", precision, drawn)
    assert isinstance(drawn.sample, dict)
    arguments = (
        drawn.sample["video"][0],
        drawn.sample["audio"][0],
        DataConfig.video_fps,
        DataConfig.audio_fps,
    )
    with tempfile.TemporaryDirectory() as folder:
        writing = seconds_of(
            lambda: write_sample(folder, "clip", *arguments, large.sample if large else None)
        )
    bench.report.add(Figure("sampling", name, f"write, {sampler}", [writing], "s", precision))
    whole = drawn.seconds / bench.batch_size + writing + (large.seconds if large else 0)
    parts = "draw, upsample, write" if large else "draw, write"
    facts = {f"minutes_for_{LAUNCHED}": LAUNCHED * whole / 60}
    bench.report.add(
        Figure("sampling", name, f"{parts}, {sampler}", [whole], "s", precision, "", facts)
    )


def add(bench: Bench, name: str, what: str, precision: str, done: Drawn) -> None:
    facts = {"evaluations": done.evaluations}
    bench.report.add(Figure("sampling", name, what, [done.seconds], "s", precision, "", facts))


def measure_fidelity(bench: Bench) -> None:
    """The section "fidelity": passes and samples in half precision against float32, from the same noise."""
    halves = [precision for precision in bench.precisions if precision != "fp32"]
    for name, size in bench.sizes.items():
        for precision in halves:
            with bench.report.trying("fidelity", name, precision):
                exact, rough = (
                    forward_of(prepare(build(size)[0], p))() for p in ("fp32", precision)
                )
                add_fidelity(bench, name, "one pass", precision, exact, rough)
            with bench.report.trying("fidelity", name, precision):
                exact, rough = (finished(bench, name, size, p).sample for p in ("fp32", precision))
                add_fidelity(
                    bench,
                    name,
                    SR_SAMPLER if size.upsampler else FIXED_STEPS,
                    precision,
                    exact,
                    rough,
                )


def add_fidelity(
    bench: Bench, name: str, how: str, precision: str, exact: Tree, rough: Tree
) -> None:
    for part, decibel in tree_items(tree_map(signal_to_noise, exact, rough)):
        facts = {"weights": bench.sizes[name].weights or "random"}
        bench.report.add(
            Figure("fidelity", name, f"{part} by {how}", [decibel], "dB", precision, "", facts)
        )


def finished(bench: Bench, name: str, size: Size, precision: str) -> Drawn:
    """A clip, or a frame of the upsampler, by steps that do not depend on the precision."""
    if size.upsampler:
        return upscaled(bench, name, precision, 1)
    return draw_clip(bench, name, precision, FIXED_STEPS)


def signal_to_noise(exact: th.Tensor, rough: th.Tensor) -> float:
    """The power of `exact` over that of the difference, in dB."""
    noise = (rough.double() - exact.double()).square().sum()
    return float(10 * th.log10(exact.double().square().sum() / noise))


def tree_items(tree: Any) -> list[tuple[str, Any]]:
    return list(tree.items()) if isinstance(tree, dict) else [("picture", tree)]
