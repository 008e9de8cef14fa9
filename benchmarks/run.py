"""Measures this machine and what the models reach on it: speed, memory, and what half precision costs.

Figures come as a table and go into a JSON file. A share of the rate of a matrix product means the same on any machine;
seconds do not. `--compare OLD.json` prints ratios to an earlier run, `--compare OLD.json NEW.json` those of two files.
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
from mm_diffusion.dist_util import friendly_errors, tune_gpus
from mm_diffusion.sampling import DTYPES, SAMPLERS, half_precision
from mm_diffusion.script_util import Parser

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
ASKED_FOR = ("changes",)
COMPILING = "a compiler takes minutes for a model; ask for it with --variants"


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


def parse(arguments: list[str]) -> argparse.Namespace:
    """Flags; those that depend on the device or on --quick are filled in."""
    on_gpu = device().type == "cuda"
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=[name for name in SECTIONS if name not in ASKED_FOR],
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)}; the usual are all but {', '.join(ASKED_FOR)}",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        help="which to measure; None: all, with --quick the small ones",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=DTYPES,
        default=["fp32", half_precision(device())],
        help="to measure in",
    )
    parser.add_argument(
        "--variants", nargs="+", choices=network.VARIANTS, default=[*network.RECOMPUTED, *["compiled"] * on_gpu],
        help="activations kept (plain) or recomputed for the gradient (all, or of the finest maps), torch.compile",
    )  # fmt: skip
    parser.add_argument(
        "--calls",
        nargs="+",
        choices=CALLS,
        default=list(CALLS),
        help="of the section changes: passes, training steps",
    )
    parser.add_argument(
        "--samplers",
        nargs="+",
        choices=SAMPLERS,
        default=list(SAMPLERS),
        help="to draw a clip with",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=1,
        help="clips, or pictures, of a pass and of a training step",
    )
    parser.add_argument(
        "--seconds", type=float, help="to repeat a figure for; None: 30, with --quick 2"
    )
    parser.add_argument(
        "--longest",
        type=float,
        help="a clip that would take more seconds is left out; None: 300, with --quick 60",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="MODEL=FILE",
        help="checkpoints, for weights that are not random",
    )
    parser.add_argument("--quick", action="store_true", help="small models, few repeats")
    parser.add_argument(
        "--json", help="file to write; None: output/benchmarks/DATE_TIME.json; empty: no file"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="FILE",
        help="an earlier file to compare with, or two files",
    )
    options = parser.parse_args(arguments)
    usual = {
        "seconds": (30.0, 2.0),
        "longest": (300.0, 60.0),
        "models": (list(MODELS), [n for n in MODELS if "small" in n]),
    }
    for name, values in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, values[options.quick])
    check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """ValueError, naming the flag, for what cannot be measured."""
    if len(options.compare) > 2:
        raise ValueError(f"compare: {len(options.compare)} files, need one or two")
    for name in ("seconds", "longest", "batch_size"):
        if getattr(options, name) <= 0:
            raise ValueError(f"{name} {getattr(options, name)}: need a positive number")
    if options.json is None:
        options.json = f"output/benchmarks/{datetime.datetime.now():%Y%m%d_%H%M%S}.json"
    if options.json and Path(options.json).exists():
        raise ValueError(f"json {options.json}: exists already; choose another name")


def make_bench(options: argparse.Namespace) -> Bench:
    settings = {
        name: value for name, value in vars(options).items() if name not in ("json", "compare")
    }
    shared = {
        name: settings[name]
        for name in (
            "precisions",
            "variants",
            "samplers",
            "seconds",
            "longest",
            "batch_size",
            "calls",
            "quick",
        )
    }
    report = Report(settings, Path(options.json) if options.json else None)
    return Bench(report, with_weights(options.models, options.weights), **shared)


def with_weights(names: list[str], weights: list[str]) -> dict[str, Size]:
    """Models by name, those of `weights` (MODEL=FILE) with them."""
    files = dict(text.split("=", 1) if "=" in text else (text, "") for text in weights)
    for name, path in files.items():
        if name not in names or not path:
            raise ValueError(
                f"weights {name}={path}: need MODEL=FILE, the model one of {', '.join(names)}"
            )
    return {name: dataclasses.replace(MODELS[name], weights=files.get(name, "")) for name in names}


def measure(bench: Bench, sections: list[str]) -> None:
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
