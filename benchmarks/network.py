"""A pass through a model, a training step, and the memory that they take."""

import tempfile
from typing import Any

from bench import Bench
from measure import in_own_process, memory, peak_memory, repeat, seconds_of, synchronise
from models import Size, build, forward_of, sample_of, train_loop
from report import Figure

from mm_diffusion.sampling import prepare

STEP_PASSES = 3  # the backward pass of a matrix product or convolution is two of them
# Flags of each way to train; the finest resolution holds most of the activations.
RECOMPUTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"use_checkpoint": True},
    "finest": {"use_checkpoint": True, "checkpoint_resolutions": "1"},
}
VARIANTS = (*RECOMPUTED, "compiled")
INFERENCE_VARIANTS = ("plain", "compiled")  # checkpointing makes no difference


def measure_forward(bench: Bench) -> None:
    """The section "forward": passes of models as the samplers run them."""
    for name, size, precision in bench.each():
        for variant in filter(INFERENCE_VARIANTS.__contains__, bench.variants):
            with bench.report.trying("forward", name, precision, variant):
                forward(bench, name, size, precision, variant)


def forward(bench: Bench, name: str, size: Size, precision: str, variant: str) -> None:
    """Add the figure of a pass."""
    is_compiled = variant == "compiled"
    model = prepare(build(size)[0], precision, "default" if is_compiled else "")
    call = forward_of(model, bench.batch_size)
    facts = {"seconds_to_compile": seconds_of(call)} if is_compiled else {}
    seconds = repeat(call, bench.seconds)
    bench.add_passes(Figure("forward", name, "pass", seconds, "s", precision, variant, facts), 1)


def measure_training(bench: Bench) -> None:
    """The section "training": whole steps of the trainer, optimizer and moving average included."""
    for name, size, precision in bench.each():
        for variant in bench.variants:
            with bench.report.trying("training", name, precision, variant):
                training(bench, name, size, precision, variant)


def training(bench: Bench, name: str, size: Size, precision: str, variant: str) -> None:
    """Add the figure of a training step."""
    is_compiled = variant == "compiled"
    with tempfile.TemporaryDirectory() as folder:
        recomputed = RECOMPUTED.get(variant, {})
        loop = train_loop(size, precision, folder, str(is_compiled), **recomputed)
        batch = sample_of(loop.model, bench.batch_size)

        def step() -> None:
            loop.run_step(*batch)

        facts = {"seconds_to_compile": seconds_of(step)} if is_compiled else {}
        seconds = repeat(step, bench.seconds)
    figure = Figure("training", name, "step", seconds, "s", precision, variant, facts)
    bench.add_passes(figure, STEP_PASSES)


def measure_memory(bench: Bench) -> None:
    """The section "memory": the peak of a pass, and of a training step."""
    steps = [("step", variant, memory_of_step) for variant in RECOMPUTED]
    for name, size, precision in bench.each():
        for what, variant, function in [("pass", "plain", memory_of_pass), *steps]:
            if variant not in bench.variants:
                continue
            with bench.report.trying("memory", name, what, precision, variant):
                arguments = (size, precision, bench.batch_size, RECOMPUTED[variant])
                before, peak = in_own_process(function, *arguments)
                facts = {"above_model_gib": (peak - before) / 2**30}
                label = (name, what, [peak], "B", precision, variant, facts)
                bench.report.add(Figure("memory", *label))


def memory_of_pass(
    size: Size, precision: str, batch_size: int, flags: dict[str, Any]
) -> tuple[int, int]:
    """Bytes (with the model as the samplers run it, at the peak of a pass)."""
    model = prepare(build(size, **flags)[0], precision)
    call, before = forward_of(model, batch_size), memory()
    call()
    synchronise()
    return before, peak_memory()


def memory_of_step(
    size: Size, precision: str, batch_size: int, flags: dict[str, Any]
) -> tuple[int, int]:
    """Bytes (with the weights and their average, at the peak of two training steps).

    The first makes the moments of the optimizer, which the second has beside its activations.
    """
    with tempfile.TemporaryDirectory() as folder:
        loop = train_loop(size, precision, folder, **flags)
        batch, before = sample_of(loop.model, batch_size), memory()
        for _ in range(2):
            loop.run_step(*batch)
        synchronise()
        return before, peak_memory()
