"""Where the time of a pass and of a training step goes, by kind of block.

The parts of a model are marked for the profiler; what a kernel takes goes to the innermost mark around its call, in a
backward pass to that of the operation that it belongs to. Profiling costs time, so that shares are what counts.
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

from mm_diffusion.nn import GroupNorm32, SelfAttention
from mm_diffusion.sampling import prepare
from mm_diffusion.unet import (
    CrossAttention,
    InputConv,
    OutputConv,
    PictureResample,
    ResBlock,
    ResStream,
)

MARK = "part: "
KINDS: dict[type, str] = {
    ResBlock: "residual convolutions",
    GroupNorm32: "norm and SiLU",
    CrossAttention: "cross-attention",
    InputConv: "in and out",
    OutputConv: "in and out",
    PictureResample: "resampling",
}
OPERATIONS = {
    "aten::silu": "norm and SiLU",
    "aten::silu_": "norm and SiLU",
}  # which stand beside the norms
REST = "skips, embedding, loss"
UPDATE = "optimizer and average"
COPIES = ("aten::copy_",)  # to which clone and contiguous lead
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
        with (
            bench.report.trying("breakdown", name, "step", precision),
            tempfile.TemporaryDirectory() as folder,
        ):
            add_parts(
                bench,
                name,
                "step",
                precision,
                marked_step(size, precision, folder, bench.batch_size),
            )


def marked_step(size: Size, precision: str, folder: str, batch_size: int) -> Callable[[], None]:
    loop: Any = train_loop(size, precision, folder)
    mark(loop.model)
    loop._optimize = marked(UPDATE, loop._optimize)
    batch = sample_of(loop.model, batch_size)
    return lambda: loop.run_step(*batch)


def mark(model: nn.Module) -> None:
    """Have every part of the model tell the profiler its kind."""
    for name, module in model.named_modules():
        kind = KINDS.get(type(module))
        if isinstance(module, SelfAttention):
            kind = f"self-attention, {name.rpartition('.')[2]}"
        if kind:
            for method in ("forward", "over"):  # the latter of norms
                if hasattr(module, method):
                    setattr(module, method, marked(kind, getattr(module, method)))
        if isinstance(module, ResStream) and not isinstance(module.resample, nn.Module):
            module.resample = marked("resampling", module.resample)


def marked(kind: str, function: Callable) -> Callable:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + kind):
            return function(*args, **kwargs)

    return call


def add_parts(
    bench: Bench, name: str, what: str, precision: str, function: Callable[[], object]
) -> None:
    """A figure for each kind of part, the largest first, and one for copies, which are among them too."""
    count = REPEATS if seconds_of(function) < bench.seconds / REPEATS else 1
    runs = [seconds_by_kind(function) for _ in range(count)]
    taken = {kind: [run.get(kind, 0.0) for run in runs] for kind in runs[0]}
    copies, total = taken.pop(COPYING), taken.pop(ALL)
    parts = sorted(taken.items(), key=lambda part: -median(part[1]))
    for kind, seconds in [*parts, (COPYING, copies), (ALL, total)]:
        facts = {"share": median(seconds) / median(total)}
        bench.report.add(
            Figure("breakdown", name, f"{what}: {kind}", seconds, "s", precision, "plain", facts)
        )


def seconds_by_kind(function: Callable[[], object]) -> dict[str, float]:
    """Seconds of each kind of part, of all of them, and of the copies in them, in one call."""
    on_gpu = device().type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, acc_events=True) as profiler:
        function()
        synchronise()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    owners = owners_of_sequences(events)
    taken = dict.fromkeys((COPYING, ALL), 0.0)
    for event in events:
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        kind = kind_of(event, owners)
        for part in (kind, ALL, *[COPYING] * (event.name in COPIES)):
            taken[part] = taken.get(part, 0.0) + seconds
    return taken


def owners_of_sequences(events: Iterable[Any]) -> dict[int, str]:
    """Number of an operation in the forward pass -> its kind, for the operations of the backward pass."""
    forward = [event for event in events if event.sequence_nr >= 0 and not _in_backward(event)]
    return {
        e.sequence_nr: kind_of(e, {}) for e in sorted(forward, key=lambda e: e.time_range.start)
    }


def kind_of(event: Any, owners: dict[int, str]) -> str:
    """The kind of the innermost part around an operation, or around the one whose gradient it computes."""
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
