"""Output of the benchmarks: figures as a table and a JSON file, and two files compared."""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch as th
from measure import LeftOut, device, spread, tidy

from mm_diffusion.files import write_text

SCALES = {
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "us")),
    "FLOP/s": ((1e12, "TFLOP/s"), (1e9, "GFLOP/s")),
    "B/s": ((1e9, "GB/s"), (1e6, "MB/s")),
    "B": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")),
}
NAME_PARTS = ("section", "model", "what", "precision", "variant")
ROW = "{:<12}{:<17}{:<40}{:<6}{:<14}{:>14}{:>8}{:>4}  {}"
HEAD = ROW.format("section", "model", "what", "", "variant", "median", "spread", "n", "")
# Must agree for figures to be comparable.
SAME_MACHINE = ("device", "processor", "threads", "torch", "allocator", "float32")
ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


@dataclass
class Figure:
    """Something measured, `repeats` times, in `unit`; `facts` go with it or follow from it."""

    section: str
    model: str
    what: str
    repeats: list[float]
    unit: str = "s"
    precision: str = ""
    variant: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> str:
        """Its line in the table."""
        share = spread(self.repeats)
        spread_text = "-" if share is None else f"{share:.1%}"
        middle = pretty(median(self.repeats), self.unit)
        names = (self.section, self.model, self.what, self.precision, self.variant)
        facts = ", ".join(_fact(key, value) for key, value in self.facts.items() if key != "flop")
        return ROW.format(*names, middle, spread_text, len(self.repeats), facts).rstrip()

    def entry(self) -> dict[str, Any]:
        """As it is written to the JSON file."""
        summary = {"median": median(self.repeats), "spread": spread(self.repeats)}
        return dataclasses.asdict(self) | summary


@dataclass
class Report:
    """The figures of a run, printed at once and written to a file after every section."""

    settings: dict[str, Any]
    path: Path | None = None
    figures: list[Figure] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    def add(self, figure: Figure) -> None:
        """Add and print a figure."""
        self.figures.append(figure)
        print(figure.row(), flush=True)

    def leave_out(self, what: str, why: str) -> None:
        """Record and print that a figure is missing."""
        self.left_out.append({"what": what, "why": why})
        print(f"left out: {what}: {why}", flush=True)

    @contextlib.contextmanager
    def trying(self, *what: str) -> Iterator[None]:
        """A context in which a figure may take too much time or memory: it is left out then."""
        name = " ".join(filter(None, what))
        try:
            yield
        except LeftOut as reason:
            self.leave_out(name, str(reason))
        except th.OutOfMemoryError:
            self.leave_out(name, "the GPU has too little memory")
        tidy()

    def content(self) -> dict[str, Any]:
        """What the file holds."""
        figures = [figure.entry() for figure in self.figures]
        parts = {"machine": self.machine, "settings": self.settings, "figures": figures}
        return parts | {"left_out": self.left_out}

    def write(self) -> None:
        """Write the file, if there is one to write."""
        if self.path:
            write_text(self.path, json.dumps(self.content(), indent=1))


def pretty(value: float, unit: str) -> str:
    """A value with its unit, scaled."""
    scales = SCALES.get(unit, ((1.0, unit),))
    scale, name = next((s for s in scales if abs(value) >= s[0]), scales[-1])
    return f"{value / scale:.4g} {name}"


def _fact(key: str, value: Any) -> str:
    name = key.replace("_", " ")
    if key == "flop_per_second":
        return pretty(value, "FLOP/s")
    if key == "share":
        return f"{value:.0%}"
    if key.startswith("of_"):
        return f"{value:.0%} {name}"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def machine() -> dict[str, Any]:
    """Where and with what the figures are measured."""
    is_gpu = th.cuda.is_available()
    return {
        "device": th.cuda.get_device_name() if is_gpu else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": th.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu_memory_bytes": th.cuda.get_device_properties(device()).total_memory if is_gpu else 0,
        "torch": th.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "allocator": {name: os.environ.get(name, "") for name in ALLOCATOR},
        "float32": {
            "matrix_precision": th.get_float32_matmul_precision(),
            "convolution_tf32": th.backends.cudnn.allow_tf32 if is_gpu else False,
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """The commit of this checkout, with a plus where files differ from it; "" without git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
        return subprocess.run(["git", *words], cwd=here, **options).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


# ---------------------------------------------------------------- one file against another


def read(path: str) -> dict[str, Any]:
    """A file that `Report.write` wrote; ValueError, naming it, for anything else."""
    try:
        content = json.loads(Path(path).read_text())
        if {"machine", "settings", "figures"} <= content.keys():
            return content
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path}: holds no figures of benchmarks/run.py")


def ratios(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    """New median over old median, of the figures that both have."""
    before, after = _by_name(old), _by_name(new)
    common = [name for name in after if before.get(name, {}).get("median")]
    return {name: after[name]["median"] / before[name]["median"] for name in common}


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """A table of ratios, and what makes the two files less comparable."""
    before, after = _by_name(old), _by_name(new)
    lines = []
    for name in SAME_MACHINE:
        was, now = old["machine"].get(name), new["machine"].get(name)
        if was != now:
            lines.append(f"note: {name} was {was!r} and is {now!r}")
    head = f"{'new / old':>9}  {'old':>14}{'new':>14}"
    lines.append(f"{head}  (= where the ranges of the repeats overlap)")
    for name, ratio in ratios(old, new).items():
        a, b = before[name], after[name]
        least = max(min(a["repeats"]), min(b["repeats"]))
        mark = "=" if least <= min(max(a["repeats"]), max(b["repeats"])) else " "
        was, now = (pretty(entry["median"], entry["unit"]) for entry in (a, b))
        lines.append(f"{ratio:>8.3f}{mark}  {was:>14}{now:>14}  {_text(name)}")
    for content, others, when in ((before, after, "before"), (after, before, "now")):
        if only := [_text(name) for name in content if name not in others]:
            lines.append(f"only {when}: {'; '.join(only)}")
    return "\n".join(lines)


def _by_name(content: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    return {tuple(figure[part] for part in NAME_PARTS): figure for figure in content["figures"]}


def _text(name: tuple[str, ...]) -> str:
    return " ".join(filter(None, name))
