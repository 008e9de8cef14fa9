"""Where the time of a pass and of a training step goes, by kind of block.

The parts of a model are marked for the profiler. The time of a kernel belongs to the innermost mark
around its call, in a backward pass to that of the operation whose gradient it computes. Profiling
takes time itself: read the shares, not the seconds.
"""

import tempfile
from collections.abc import Callable, Iterable
from functools import wraps
from statistics import median
from typing import Any

from bench import Bench
from measure import device, seconds_of, synchronise
from models import Size, build, forward_of, sample_of, train_loop
from report import Figure
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mm_diffusion.cross_attention import CrossAttention
from mm_diffusion.nn import GroupNorm32, SelfAttention
from mm_diffusion.sampling import prepare
from mm_diffusion.unet import Downsample, InputConv, OutputConv, ResBlock, ResStream, Upsample

MARK = "part: "
KINDS: dict[type, str] = {
    ResBlock: "residual convolutions",
    GroupNorm32: "norm and SiLU",
    CrossAttention: "cross-attention",
    InputConv: "in and out",
    OutputConv: "in and out",
    Downsample: "resampling",
    Upsample: "resampling",
}
# Operations beside the norms.
OPERATIONS = {"aten::silu": "norm and SiLU", "aten::silu_": "norm and SiLU"}
REST = "skips, embedding, loss"
UPDATE = "optimizer and average"
COPY = "aten::copy_"  # which clone and contiguous call
COPYING, ALL = "copies, in all of these", "sum"
REPEATS = 3
BACKWARD = "autograd::engine::evaluate_function: "


def measure_breakdown(bench: Bench) -> None:
    """The section "breakdown"."""
    for name, size, precision in bench.each():
        with bench.report.trying("breakdown", name, "pass", precision):
            model = prepare(build(size)[0], precision)
            mark(model)
            add_parts(bench, name, "pass", precision, forward_of(model, bench.batch_size))
        trying = bench.report.trying("breakdown", name, "step", precision)
        with trying, tempfile.TemporaryDirectory() as folder:
            step = marked_step(size, precision, folder, bench.batch_size)
            add_parts(bench, name, "step", precision, step)


def marked_step(size: Size, precision: str, folder: str, batch_size: int) -> Callable[[], None]:
    """A training step of a marked model."""
    loop: Any = train_loop(size, precision, folder)
    mark(loop.model)
    loop._optimize = marked(UPDATE, loop._optimize)
    batch = sample_of(loop.model, batch_size)
    return lambda: loop.run_step(*batch)


def mark(model: nn.Module) -> None:
    """Mark every part of the model with its kind."""
    for name, module in model.named_modules():
        kind = KINDS.get(type(module))
        if isinstance(module, SelfAttention):
            kind = f"self-attention, {name.rpartition('.')[2]}"
        for method in ("forward", "over"):  # the latter of norms
            if kind and hasattr(module, method):
                setattr(module, method, marked(kind, getattr(module, method)))
        if isinstance(module, ResStream) and not isinstance(module.resample, nn.Module):
            module.resample = marked("resampling", module.resample)


def marked(kind: str, function: Callable) -> Callable:
    """The same function, marked for the profiler."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + kind):
            return function(*args, **kwargs)

    return call


def add_parts(
    bench: Bench, name: str, what: str, precision: str, function: Callable[[], object]
) -> None:
    """Add a figure for each kind of part, the largest first, one for copies, and the sum."""
    count = REPEATS if seconds_of(function) < bench.seconds / REPEATS else 1
    runs = [seconds_by_kind(function) for _ in range(count)]
    taken = {kind: [run.get(kind, 0.0) for run in runs] for kind in runs[0]}
    medians = {kind: median(seconds) for kind, seconds in taken.items()}
    parts = sorted(medians.keys() - {COPYING, ALL}, key=lambda kind: -medians[kind])
    for kind in [*parts, COPYING, ALL]:
        facts = {"share": medians[kind] / medians[ALL]}
        label = (f"{what}: {kind}", taken[kind], "s", precision, "plain", facts)
        bench.report.add(Figure("breakdown", name, *label))


def seconds_by_kind(function: Callable[[], object]) -> dict[str, float]:
    """Seconds of each kind of part, of all of them, and of the copies in them, in one call."""
    is_gpu = device().type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_gpu
    with profile(activities=activities, acc_events=True) as profiler:
        function()
        synchronise()
    events: list[Any] = [e for e in profiler.events() if e.device_type == DeviceType.CPU]
    owners = owners_of_sequences(events)
    taken = dict.fromkeys((COPYING, ALL), 0.0)
    for event in events:
        microseconds = event.self_device_time_total if is_gpu else event.self_cpu_time_total
        kind = kind_of(event, owners)
        taken[kind] = taken.get(kind, 0.0) + microseconds / 1e6
        taken[ALL] += microseconds / 1e6
        if event.name == COPY:
            taken[COPYING] += microseconds / 1e6
    return taken


def owners_of_sequences(events: Iterable[Any]) -> dict[int, str]:
    """Number of an operation of the forward pass -> its kind, which its gradient shares."""
    forward = [event for event in events if event.sequence_nr >= 0 and not _in_backward(event)]
    forward.sort(key=lambda event: event.time_range.start)
    return {event.sequence_nr: kind_of(event, {}) for event in forward}


def kind_of(event: Any, owners: dict[int, str]) -> str:
    """The kind of the innermost part around an operation or, of a gradient, around its forward."""
    if event.name in OPERATIONS:
        return OPERATIONS[event.name]
    while event is not None:
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK)
        if event.name.startswith(BACKWARD):
            return owners.get(event.sequence_nr, REST)
        event = event.cpu_parent
    return REST


def _in_backward(event: Any) -> bool:
    while event is not None:
        if event.name.startswith(BACKWARD):
            return True
        event = event.cpu_parent
    return False
