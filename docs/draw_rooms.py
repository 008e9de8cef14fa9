"""Draws the rooms of mm_diffusion and the imports between them to docs/rooms.svg.

A room is a folder, or a few modules with one subject. LEVELS and NEVER are the rules;
tests/test_layout.py checks them.
"""

from __future__ import annotations

import ast
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "mm_diffusion"
# From the top. A module imports from its own room and from the levels below.
LEVELS = (
    {"generation": ["generation"], "train_util": ["train_util"]},
    {"viewing": ["viewing"], "training": ["training"]},
    {"evaluation": ["evaluation"], "sampling": ["sampling"], "script_util": ["script_util"]},
    {"data": ["data"], "unet": ["unet"]},
    {"config": ["config"]},
    {
        "diffusion": ["gaussian_diffusion", "calls", "losses", "respace", "resample", "dpm_solver"],
        "networks": ["nn", "cross_attention"],
        "checkpoint": ["checkpoint"],
    },
    {"foundation": ["tree", "rng", "modality", "files", "logger", "dist_util", "devices"]},
)
# (room, room or module) that may not be imported from it, although it lies below.
NEVER = {("data", "networks"), ("evaluation", "data.toy")}
ROOMS = {name: room for level in LEVELS for room, names in level.items() for name in names}
DEPTH = {room: depth for depth, level in enumerate(LEVELS) for room in level}
Arrow = tuple[str, str]

# ------------------------------------------------------------ imports


def modules_of(package: Path) -> dict[str, Path]:
    """Dotted name below the package -> file; a folder's name stands for its __init__.py."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = path
    return found


def imports_of(package: Path) -> set[Arrow]:
    """(importing module, imported module) for every import within the package, at any depth."""
    modules = modules_of(package)
    arrows = set()
    for name, path in modules.items():
        folder = path.relative_to(package).parent.parts
        for target in _imported(path, package.name, folder):
            while target not in modules:  # the last part names a function or class
                target = target.rpartition(".")[0]
            if target not in ("", name):
                arrows.add((name, target))
    return arrows


def _imported(path: Path, package: str, folder: tuple[str, ...]) -> Iterator[str]:
    """Dotted names below the package that a file in `folder` imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            kept = folder[: len(folder) + 1 - node.level]
            above = [package, *kept] if node.level else []
            source = [*above, node.module] if node.module else above
            names = [".".join([*source, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith(f"{package}."):
                yield name.removeprefix(f"{package}.")


def room_of(module: str) -> str | None:
    """The room of a module; None where it has none."""
    return ROOMS.get(module.partition(".")[0])


def is_allowed(arrow: Arrow) -> bool:
    """Whether one module may import the other; modules without a room are not judged."""
    source, target = (room_of(module) for module in arrow)
    if source is None or target is None or source == target:
        return True
    if (source, target) in NEVER or (source, arrow[1]) in NEVER:
        return False
    return DEPTH[source] < DEPTH[target]


# ------------------------------------------------------------ arrows between rooms


def room_arrows(package: Path, scripts: Path) -> tuple[set[Arrow], set[Arrow]]:
    """The arrows between rooms, "scripts" being one: (allowed, forbidden).

    An allowed arrow that follows from two others is left out.
    """
    allowed, forbidden = set(), set()
    for arrow in imports_of(package):
        source, target = (room_of(module) for module in arrow)
        if source and target and source != target:
            (allowed if is_allowed(arrow) else forbidden).add((source, target))
    for script in scripts.glob("*.py"):
        rooms = {room_of(target) for target in _imported(script, package.name, ())}
        allowed |= {("scripts", room) for room in rooms if room}
    allowed -= forbidden
    return {arrow for arrow in allowed if not _follows(arrow, allowed)}, forbidden


def _follows(arrow: Arrow, arrows: set[Arrow]) -> bool:
    """Whether the target is reached from the source through another room."""
    source, target = arrow
    between = {b for a, b in arrows if a == source and b != target}
    return any((room, target) in arrows or _follows((room, target), arrows) for room in between)


# ------------------------------------------------------------ the drawing

FONT = "font-family='Helvetica, Arial, sans-serif'"
WIDTH, ROW_GAP, LINE_HEIGHT, CHARACTER_WIDTH, WRAP = 900, 50, 16, 6.4, 48
# of a level: its boxes, and the arrows from them
FILLS = ("#e8e8e8", "#fde2d0", "#fff1c9", "#e3f1d4", "#d3edea", "#d9e6f7", "#e5ddf3", "#f3dcea")
LINES = ("#666666", "#b8551b", "#a07c00", "#4f8a24", "#1f8a80", "#2f66ad", "#6a47a8", "#a0397a")
RED = "#e00000"  # a forbidden arrow


@dataclass
class Box:
    """A room: its top left corner, its size, the lines in it."""

    x: float
    y: float
    width: float
    height: float
    lines: list[str]
    fill: str
    line: str


def draw(package: Path, scripts: Path) -> str:
    """The rooms as an SVG: a level per row, arrows from importing to imported rooms."""
    boxes = _place_boxes(package, scripts)
    allowed, forbidden = room_arrows(package, scripts)
    height = max(box.y + box.height for box in boxes.values()) + 10
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height:.0f}' {FONT}>",
        "<rect width='100%' height='100%' fill='white'/>",
        *(_arrow_head(colour) for colour in (*LINES, RED)),
        *_draw_arrows(allowed, boxes),
        *_draw_arrows(forbidden, boxes, colour=RED),
        *(part for box in boxes.values() for part in _draw_box(box)),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _place_boxes(package: Path, scripts: Path) -> dict[str, Box]:
    """Room -> box; the rooms of a level share a row."""
    members = defaultdict(list, scripts=sorted(path.stem for path in scripts.glob("*.py")))
    for module in modules_of(package):
        room = room_of(module)
        if room and module != room:
            members[room].append(module.removeprefix(f"{room}."))
    boxes, y = {}, 10.0
    for fill, line, level in zip(FILLS, LINES, ({"scripts": []}, *LEVELS), strict=True):
        texts = {room: textwrap.wrap(", ".join(members[room]), WRAP) for room in level}
        widths = {room: _text_width([room, *lines]) for room, lines in texts.items()}
        gap = (WIDTH - sum(widths.values())) / (len(level) + 1)
        heights = {room: LINE_HEIGHT * (1 + len(lines)) + 14 for room, lines in texts.items()}
        x = gap
        for room, lines in texts.items():
            boxes[room] = Box(x, y, widths[room], heights[room], [room, *lines], fill, line)
            x += widths[room] + gap
        y += max(heights.values()) + ROW_GAP
    return boxes


def _text_width(lines: Iterable[str]) -> float:
    return max(110.0, CHARACTER_WIDTH * max(len(line) for line in lines) + 20)


def _draw_box(box: Box) -> Iterator[str]:
    yield (
        f"<rect x='{box.x:.0f}' y='{box.y:.0f}' width='{box.width:.0f}' height='{box.height:.0f}'"
        f" rx='6' fill='{box.fill}' fill-opacity='0.85' stroke='{box.line}'/>"
    )
    for number, line in enumerate(box.lines):
        style = "font-size='12'" if number else "font-size='14' font-weight='bold'"
        x, y = box.x + box.width / 2, box.y + 20 + number * LINE_HEIGHT
        yield f"<text x='{x:.0f}' y='{y:.0f}' text-anchor='middle' {style}>{line}</text>"


def _arrow_head(colour: str) -> str:
    return (
        f"<marker id='{colour[1:]}' viewBox='0 0 8 8' refX='8' refY='4' markerWidth='8'"
        f" markerHeight='8' orient='auto'><path d='M0,0 L8,4 L0,8 z' fill='{colour}'/></marker>"
    )


def _draw_arrows(arrows: set[Arrow], boxes: dict[str, Box], colour: str = "") -> Iterator[str]:
    """Curves from the lower edge of the source to the upper edge of the target.

    Without a colour, each has that of its source.
    """
    for source, target in sorted(arrows):
        targets = sorted((b for a, b in arrows if a == source), key=lambda room: boxes[room].x)
        sources = sorted((a for a, b in arrows if b == target), key=lambda room: boxes[room].x)
        x0, y0 = _anchor(boxes[source], targets.index(target), len(targets)), boxes[source].y
        x1, y1 = _anchor(boxes[target], sources.index(source), len(sources)), boxes[target].y
        y0 += boxes[source].height
        bend = max(abs(y1 - y0) / 2, 20)
        line = colour or boxes[source].line
        path = f"M{x0:.0f},{y0:.0f} C{x0:.0f},{y0 + bend:.0f} {x1:.0f},{y1 - bend:.0f}"
        path += f" {x1:.0f},{y1:.0f}"
        yield f"<path d='{path}' fill='none' stroke='{line}' marker-end='url(#{line[1:]})'/>"


def _anchor(box: Box, number: int, count: int) -> float:
    """Where the given one of `count` arrows meets the edge of a box."""
    return box.x + box.width * (number + 1) / (count + 1)


if __name__ == "__main__":
    (REPOSITORY / "docs/rooms.svg").write_text(draw(PACKAGE, REPOSITORY / "py_scripts"))
