"""A page of a report, or of a comparison of runs: tables, intervals, histograms, clips, pairs.

It lies beside metrics.json or comparison.json, is made of that file only, and needs a browser only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import blobfile as bf

from ..evaluation.bootstrap import LEVEL
from ..evaluation.report import cell, interval_cell
from ..files import is_remote, write_text
from . import gallery, pages

TEMPLATE = "metrics.html"
NUM_EXTREME = 3  # clips listed at either end of a score
MARGIN = 0.05  # of the axis of intervals, beyond the outermost value
Row = dict[str, Any]


def write_metrics_page(report: str) -> str:
    """Path of metrics.json or comparison.json -> path of the page, which is written beside it."""
    with bf.BlobFile(report, "r") as file:
        content = json.load(file)
    path = f"{os.path.splitext(report)[0]}.html"
    write_text(path, render(content, os.path.dirname(report)))
    return path


def render(content: Mapping[str, Any], folder: str) -> str:
    """The page of what such a file holds, to be in `folder`."""
    runs = content.get("runs", {"samples": content})
    differences = {(row["run"], row["name"]): row for row in content.get("differences", [])}
    names = list(dict.fromkeys(score["name"] for run in runs.values() for score in run["scores"]))
    rows = [_row(name, runs, differences) for name in names]
    return pages.render(
        TEMPLATE,
        title="Comparison" if differences else "Metrics",
        level=f"{LEVEL:.0%}",
        rows=rows,
        runs={run: _run(report, folder) for run, report in runs.items()},
        is_comparison=bool(differences),
        baseline=next(iter(runs)),
    )


def _run(report: Mapping[str, Any], folder: str) -> Row:
    """What the template needs of one report."""
    return {
        "settings": report["settings"],
        "notes": report["notes"],
        "left_out": report["left_out"],
        "how": report["how"],
        "histograms": {name: _histogram(held) for name, held in report["histograms"].items()},
        "extremes": [_extremes(name, report, folder) for name in report["clip_values"]],
        "memorisation": _memorisation(report["memorisation"], folder),
    }


# ---------------------------------------------------------------- scores


def _row(name: str, runs: Mapping[str, Any], differences: Mapping[tuple[str, str], Row]) -> Row:
    """A score of all runs: figures as text, and their bars on a common axis."""
    found: dict[str, Row] = {}
    for run, report in runs.items():
        scores = {score["name"]: score for score in report["scores"]}
        if name in scores:
            found[run] = scores[name]
    bars = []
    for run, score in found.items():
        samples = {"label": "samples", "value": score["value"], "interval": score["interval"]}
        bars.append({"run": run, "kind": "object", **samples})
    first, score = next(iter(found.items()))  # all runs have the same reference
    reference = {"value": score["reference"], "interval": score["reference_interval"]}
    bars.insert(1, {"run": first, "kind": "audio", "label": "reference", **reference})
    placed = _placed(bars)
    figures = []
    for run, score in found.items():
        own = [bar for bar in placed if bar["run"] == run]
        figures.append(_figure(run, score, differences.get((run, name))) | {"bars": own})
    return {"name": name, "better": score["better"], "figures": figures}


def _figure(run: str, score: Mapping[str, Any], difference: Row | None) -> Row:
    count = f"{score['count']}"
    if score["reference_count"]:
        count += f" / {score['reference_count']}"
    found = {
        "run": run,
        "value": cell(score["value"]),
        "interval": interval_cell(score["interval"]),
        "reference": cell(score["reference"]),
        "reference_interval": interval_cell(score["reference_interval"]),
        "count": f"{count} {score['unit']}",
        "note": score["note"],
        "difference": "",
        "verdict": "",
    }
    if difference:
        spread = interval_cell(difference["interval"])
        found["difference"] = cell(difference["value"]) + (f" ({spread})" if spread else "")
        found["verdict"] = difference["verdict"]
    return found


def _placed(bars: Sequence[Row]) -> list[Row]:
    """Bars of one score with the places of value and ends on a common axis, in percent."""
    defined = [bar for bar in bars if bar["value"] is not None]
    ends = [end for bar in defined for end in (bar["value"], *(bar["interval"] or ()))]
    if not ends:
        return []
    least, most = min(ends), max(ends)
    width = (most - least) or 1.0
    low, scale = least - MARGIN * width, 100 / (width * (1 + 2 * MARGIN))
    placed = []
    for bar in defined:
        begin, end = bar["interval"] or (bar["value"], bar["value"])
        places = [round(scale * (place - low), 2) for place in (bar["value"], begin, end)]
        text = f"{bar['label']}: {cell(bar['value'])}"
        if bar["interval"]:
            text += f", {interval_cell(bar['interval'])}"
        placed.append({**bar, "places": places, "text": text})
    return placed


# ---------------------------------------------------------------- histograms


def _histogram(held: Mapping[str, Any]) -> Row:
    """Steps of both sets as SVG paths in 1000 x 100, the ends of the axis, the highest share."""
    sets = {kind: held[kind] or [] for kind in ("samples", "reference")}
    top = max((share for shares in sets.values() for share in shares), default=1.0)
    paths = {kind: _steps(shares, top) if shares else "" for kind, shares in sets.items()}
    return {"paths": paths, "edges": [held["edges"][0], held["edges"][-1]], "top": top}


def _steps(shares: Sequence[float], top: float) -> str:
    width = 1000 / len(shares)
    path = "M0 100"
    for k, share in enumerate(shares):
        path += f"V{100 - 100 * share / top:.2f}H{(k + 1) * width:.1f}"
    return path + "V100"


# ---------------------------------------------------------------- clips


def _extremes(name: str, report: Mapping[str, Any], folder: str) -> Row:
    """The clips of lowest and highest value of a score, each with a link."""
    values = report["clip_values"][name]
    defined = [number for number, value in enumerate(values) if value is not None]
    ordered = sorted(defined, key=values.__getitem__)
    better = next(score["better"] for score in report["scores"] if score["name"] == name)
    titles = {"higher": ("worst", "best"), "lower": ("best", "worst")}
    ends = ordered[:NUM_EXTREME], ordered[::-1][:NUM_EXTREME]
    lists = {}
    for title, numbers in zip(titles.get(better, ("lowest", "highest")), ends, strict=True):
        clips = [link(report["clips"][number], folder) for number in numbers]
        figures = [cell(values[number]) for number in numbers]
        lists[title] = list(zip(figures, clips, strict=True))
    return {"name": name, "lists": lists, "count": len(defined)}


def link(place: Mapping[str, Any], folder: str) -> Row:
    """{"name", "href", "src"} of a clip: its place in the gallery, if there is one, and its file.

    The gallery is looked for in the folders above the file. A remote file has its own address.
    """
    start = place["start"]
    name = f"{place['path']} at {start:g} s" if start else place["path"]
    time = f"#t={start:g}" if start else ""
    if is_remote(place["path"]):
        address = f"{place['path']}{time}"
        return {"name": name, "href": address, "src": address}
    path = Path(os.path.abspath(place["path"]))
    src = f"{_url(path, folder)}{time}"
    found = {"name": name, "href": src, "src": src}
    for parent in path.parents:
        page = parent / gallery.PAGE
        if page.is_file() and (parent / gallery.IMAGES).is_dir():
            identifier = gallery.anchor(os.path.relpath(path, parent))
            found["href"] = f"{_url(page, folder)}#{identifier}"
            break
    return found


def _url(path: Path, folder: str) -> str:
    """A local file as a link in a page in `folder`."""
    if is_remote(folder):
        return path.as_uri()
    return quote(os.fsencode(os.path.relpath(path, os.path.abspath(folder))))


def _memorisation(held: Mapping[str, Any], folder: str) -> Row:
    """The nearest pairs with links; empty without a reference."""
    if not held:
        return {}
    pairs = []
    for pair in held["pairs"]:
        is_memorised = held["threshold"] is not None and pair["distance"] <= held["threshold"]
        clips = {kind: link(pair[kind], folder) for kind in ("sample", "reference")}
        distance = cell(pair["distance"])
        pairs.append({**pair, **clips, "distance": distance, "memorised": is_memorised})
    return {**held, "threshold": cell(held["threshold"]), "pairs": pairs}
