"""What comes out of the benchmarks: figures in a table as they come, in a JSON file, and against an earlier file."""

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

from mm_diffusion.training.states import write_file

SCALES = {
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "us")),
    "FLOP/s": ((1e12, "TFLOP/s"), (1e9, "GFLOP/s")),
    "B/s": ((1e9, "GB/s"), (1e6, "MB/s")),
    "B": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")),
}
ROW = "{:<12}{:<17}{:<40}{:<6}{:<14}{:>14}{:>8}{:>4}  {}"
HEAD = ROW.format("section", "model", "what", "", "variant", "median", "spread", "n", "")
SAME_MACHINE = (
    "device",
    "processor",
    "threads",
    "torch",
    "allocator",
    "float32",
)  # for figures to be comparable


@dataclass(frozen=True)
class Figure:
    """Something measured, `repeats` times, in `unit`; `facts` are what follows from it or goes with it."""

    section: str
    model: str
    what: str
    repeats: list[float]
    unit: str = "s"
    precision: str = ""
    variant: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> str:
        share = spread(self.repeats)
        cells = (
            self.section,
            self.model,
            self.what,
            self.precision,
            self.variant,
            pretty(median(self.repeats), self.unit),
        )
        facts = ", ".join(_fact(key, value) for key, value in self.facts.items() if key != "flop")
        return ROW.format(
            *cells, "-" if share is None else f"{share:.1%}", len(self.repeats), facts
        ).rstrip()

    def entry(self) -> dict[str, Any]:
        """As it is written to the JSON file."""
        return dataclasses.asdict(self) | {
            "median": median(self.repeats),
            "spread": spread(self.repeats),
        }


@dataclass
class Report:
    """The figures of a run, which are printed as they come and kept in a file after every section."""

    settings: dict[str, Any]
    path: Path | None = None
    figures: list[Figure] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)
        print(figure.row(), flush=True)

    def leave_out(self, what: str, why: str) -> None:
        self.left_out.append((what, why))
        print(f"left out: {what}: {why}", flush=True)

    @contextlib.contextmanager
    def trying(self, *what: str) -> Iterator[None]:
        """Within it a figure may turn out to take too long or too much memory, which is told; others go on."""
        try:
            yield
        except LeftOut as reason:
            self.leave_out(" ".join(filter(None, what)), str(reason))
        except th.OutOfMemoryError:
            self.leave_out(" ".join(filter(None, what)), "the GPU has too little memory")
        tidy()

    def content(self) -> dict[str, Any]:
        left_out = [{"what": what, "why": why} for what, why in self.left_out]
        figures = [figure.entry() for figure in self.figures]
        return {
            "machine": self.machine,
            "settings": self.settings,
            "figures": figures,
            "left_out": left_out,
        }

    def write(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.content(), indent=1)
            write_file(str(self.path), lambda file: file.write(text.encode()))


def pretty(value: float, unit: str) -> str:
    """A number with its unit, in the size of unit that suits it."""
    scales = SCALES.get(unit, ((1.0, unit),))
    scale, name = next((s for s in scales if abs(value) >= s[0]), scales[-1])
    return f"{value / scale:.4g} {name}"


def _fact(key: str, value: Any) -> str:
    if key == "flop_per_second":
        return pretty(value, "FLOP/s")
    if key.startswith("of_") or key == "share":
        return f"{value:.0%} {key.replace('_', ' ')}".removesuffix(" share")
    return (
        f"{key.replace('_', ' ')} {value:.4g}"
        if isinstance(value, float)
        else f"{key.replace('_', ' ')} {value}"
    )


def machine() -> dict[str, Any]:
    """Where and with what the figures were measured."""
    on_gpu = th.cuda.is_available()
    return {
        "device": th.cuda.get_device_name() if on_gpu else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": th.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu_memory_bytes": th.cuda.get_device_properties(device()).total_memory if on_gpu else 0,
        "torch": th.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "allocator": {
            name: os.environ.get(name, "")
            for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
        },
        "float32": {
            "matrix_precision": th.get_float32_matmul_precision(),
            "convolution_tf32": th.backends.cudnn.allow_tf32 if on_gpu else False,
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def commit() -> str:
    """The commit of this checkout, with a plus where files differ from it; "" where there is none."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

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
    """Median of now over median of before, of the figures that both have."""
    before, after = (_by_name(content) for content in (old, new))
    return {
        name: after[name]["median"] / before[name]["median"]
        for name in after
        if before.get(name, {}).get("median")
    }


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """A table of ratios, and what makes the two files less comparable."""
    before, after = (_by_name(content) for content in (old, new))
    lines = [
        f"note: {name} was {old['machine'].get(name)!r} and is {new['machine'].get(name)!r}"
        for name in SAME_MACHINE
        if old["machine"].get(name) != new["machine"].get(name)
    ]
    lines.append(
        f"{'new / old':>9}  {'old':>14}{'new':>14}  (= where the two ranges of repeats overlap)"
    )
    for name, ratio in ratios(old, new).items():
        a, b = before[name], after[name]
        overlap = max(min(a["repeats"]), min(b["repeats"])) <= min(
            max(a["repeats"]), max(b["repeats"])
        )
        cells = (pretty(entry["median"], entry["unit"]) for entry in (a, b))
        lines.append(
            "{:>8.3f}{}  {:>14}{:>14}  {}".format(
                ratio, "=" if overlap else " ", *cells, " ".join(filter(None, name))
            )
        )
    for content, others, when in ((before, after, "before"), (after, before, "now")):
        if only := [" ".join(filter(None, name)) for name in content if name not in others]:
            lines.append(f"only {when}: {'; '.join(only)}")
    return "\n".join(lines)


def _by_name(content: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    parts = ("section", "model", "what", "precision", "variant")
    return {tuple(figure[part] for part in parts): figure for figure in content["figures"]}
