"""Measures this machine and what the models reach on it: speed, memory, fidelity of half precision.

Figures are printed as a table and written to a JSON file. A share of the rate of a matrix product
means the same on any machine; seconds do not. `--compare OLD.json` prints ratios to an earlier run,
`--compare OLD.json NEW.json` those of two files.
"""

import argparse
import dataclasses
import datetime
import sys
from pathlib import Path

import network
from bench import CALLS, Bench, measure_rates
from breakdown import measure_breakdown
from changes import measure_changes
from checkpoint import measure_checkpoint
from clips import measure_fidelity, measure_sampling
from loader import measure_loader
from measure import device
from models import MODELS, Size
from report import HEAD, Report, compare, read

from mm_diffusion import logger
from mm_diffusion.config import Parser
from mm_diffusion.devices.gpus import tune_gpus
from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.sampling import DTYPES, SAMPLERS, choose_precision

SECTIONS = {
    "rates": measure_rates,
    "forward": network.measure_forward,
    "training": network.measure_training,
    "memory": network.measure_memory,
    "breakdown": measure_breakdown,
    "sampling": measure_sampling,
    "loader": measure_loader,
    "checkpoint": measure_checkpoint,
    "fidelity": measure_fidelity,
    "changes": measure_changes,
}
ON_REQUEST = ("changes",)
SMALL_MODELS = [name for name in MODELS if "small" in name]
# Flag -> its default, and that with --quick.
DEFAULTS = {
    "seconds": (30.0, 2.0),
    "longest": (300.0, 60.0),
    "models": (list(MODELS), SMALL_MODELS),
}
SHARED = [field.name for field in dataclasses.fields(Bench) if field.init]
COMPILING = "compiling takes minutes for a model; ask for it with --variants"


def main(arguments: list[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    contents = [read(path) for path in options.compare]
    if len(contents) == 2:
        print(compare(*contents))
        return
    tune_gpus()
    bench = make_bench(options)
    measure(bench, options.only)
    if contents:
        print(compare(contents[0], bench.report.content()))


def make_parser() -> Parser:
    """The flags; None stands for a default that depends on --quick."""
    is_gpu = device().type == "cuda"
    variants = ["plain"] if is_gpu else list(network.RECOMPUTED)
    precisions = ["fp32", choose_precision("", True, device())]
    usual = [name for name in SECTIONS if name not in ON_REQUEST]
    parser = Parser(description=__doc__)

    def add_list(name: str, choices: object, default: list[str] | None, text: str) -> None:
        parser.add_argument(name, nargs="+", choices=choices, default=default, help=text)

    add_list("--only", SECTIONS, usual, "sections to measure")
    add_list("--models", MODELS, None, "to measure; None: all, with --quick the small ones")
    add_list("--precisions", DTYPES, precisions, "to measure in")
    recomputed = "activations kept (plain) or recomputed (checkpointed; finest: at full size only)"
    add_list("--variants", network.VARIANTS, variants, f"{recomputed}, or torch.compile")
    add_list("--calls", CALLS, list(CALLS), "of the section changes")
    add_list("--samplers", SAMPLERS, list(SAMPLERS), "to generate a clip with")
    add = parser.add_argument
    batch = "clips or images of a pass and a training step"
    add("--batch_size", type=int, default=4 if is_gpu else 1, help=batch)
    add("--seconds", type=float, help="to repeat a figure for; None: 30, with --quick 2")
    add("--longest", type=float, help="seconds for a clip at most; None: 300, with --quick 60")
    weights = "checkpoints, for weights that are not random"
    add("--weights", nargs="+", default=[], metavar="MODEL=FILE", help=weights)
    add("--quick", action="store_true", help="small models, few repeats")
    add("--json", help="output file; None: output/benchmarks/DATE_TIME.json; empty: no file")
    add("--compare", nargs="+", default=[], metavar="FILE", help="an earlier file, or two files")
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags, with all defaults filled in; ValueError, naming the flag, for a bad value."""
    options = make_parser().parse_args(arguments)
    for name, values in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, values[options.quick])
    if len(options.compare) > 2:
        raise ValueError(f"--compare: {len(options.compare)} files, need one or two")
    for name in ("seconds", "longest", "batch_size"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name} {getattr(options, name)}: need a positive number")
    if options.json is None:
        options.json = f"output/benchmarks/{datetime.datetime.now():%Y%m%d_%H%M%S}.json"
    if options.json and Path(options.json).exists():
        raise ValueError(f"--json {options.json}: exists already; choose another name")
    return options


def make_bench(options: argparse.Namespace) -> Bench:
    """What to measure, by the flags."""
    settings = {k: value for k, value in vars(options).items() if k not in ("json", "compare")}
    report = Report(settings, Path(options.json) if options.json else None)
    shared = {name: settings[name] for name in SHARED if name in settings}
    return Bench(report, with_weights(options.models, options.weights), **shared)


def with_weights(names: list[str], weights: list[str]) -> dict[str, Size]:
    """Models by name, those of `weights` (MODEL=FILE) with them."""
    files = {}
    for text in weights:
        name, _, path = text.partition("=")
        if name not in names or not path:
            known = ", ".join(names)
            raise ValueError(f"--weights {text}: need MODEL=FILE, the model one of {known}")
        files[name] = path
    return {name: dataclasses.replace(MODELS[name], weights=files.get(name, "")) for name in names}


def measure(bench: Bench, sections: list[str]) -> None:
    """Measure and print the sections."""
    report = bench.report
    for name, value in report.machine.items():
        print(f"{name:<18}{value}")
    print(HEAD)
    logger.configure(enabled=False)
    if "compiled" not in bench.variants:
        report.leave_out("compiled", COMPILING)
    for name in sections:
        SECTIONS[name](bench)
        report.write()
    if report.path:
        print(f"written to {report.path}")


if __name__ == "__main__":
    with friendly_errors():
        main()
