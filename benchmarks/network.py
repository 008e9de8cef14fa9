"""A pass through a model, a training step, and the memory that they take."""

import tempfile
from typing import Any

from bench import Bench
from measure import apart, memory, peak_memory, repeat, seconds_of, synchronise
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


def measure_forward(bench: Bench) -> None:
    """The section "forward": models as the samplers run them. Checkpointing makes no difference to them."""
    for name, size, precision in bench.each():
        for variant in bench.variants:
            if variant in ("plain", "compiled"):
                with bench.report.trying("forward", name, precision, variant):
                    forward(bench, name, size, precision, variant)


def forward(bench: Bench, name: str, size: Size, precision: str, variant: str) -> None:
    model = prepare(build(size)[0], precision, "default" if variant == "compiled" else "")
    call = forward_of(model, bench.batch_size)
    facts = {"seconds_to_compile": seconds_of(call)} if variant == "compiled" else {}
    bench.add_passes(
        "forward", name, "pass", repeat(call, bench.seconds), precision, variant, 1, **facts
    )


def measure_training(bench: Bench) -> None:
    """The section "training": whole steps of the trainer, optimizer and moving average included."""
    for name, size, precision in bench.each():
        for variant in bench.variants:
            with (
                bench.report.trying("training", name, precision, variant),
                tempfile.TemporaryDirectory() as folder,
            ):
                training(bench, name, size, precision, variant, folder)


def training(
    bench: Bench, name: str, size: Size, precision: str, variant: str, folder: str
) -> None:
    compiled = variant == "compiled"
    loop = train_loop(size, precision, folder, compiled, **RECOMPUTED.get(variant, {}))
    batch = sample_of(loop.model, bench.batch_size)
    facts = {"seconds_to_compile": seconds_of(lambda: loop.run_step(*batch))} if compiled else {}
    seconds = repeat(lambda: loop.run_step(*batch), bench.seconds)
    bench.add_passes("training", name, "step", seconds, precision, variant, STEP_PASSES, **facts)


def measure_memory(bench: Bench) -> None:
    """The section "memory": the most that a pass, and a training step, take with all they need."""
    for name, size, precision in bench.each():
        for what, variant in (("pass", "plain"), *(("step", variant) for variant in RECOMPUTED)):
            if variant in bench.variants:
                with bench.report.trying("memory", name, what, precision, variant):
                    taken = {"pass": memory_of_pass, "step": memory_of_step}[what]
                    before, peak = apart(
                        taken, size, precision, bench.batch_size, RECOMPUTED[variant]
                    )
                    facts = {"above_model_gib": (peak - before) / 2**30}
                    bench.report.add(
                        Figure("memory", name, what, [peak], "B", precision, variant, facts)
                    )


def memory_of_pass(
    size: Size, precision: str, batch_size: int, flags: dict[str, Any]
) -> tuple[int, int]:
    """Bytes (with the model as the samplers run it, at the peak of a pass)."""
    model = prepare(build(size)[0], precision)
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
