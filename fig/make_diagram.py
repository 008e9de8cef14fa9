"""Draws fig/coupled_unet.svg and .png: every block of the published coupled U-Net, by its modules.

    python fig/make_diagram.py

The way down is on the left, the way up on the right, the middle below. A row is a residual block of
both streams. A link between them is the cross-attention that follows it. Rows of one height on both
sides share a skip connection.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import matplotlib
import torch as th
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mm_diffusion.cross_attention import CrossAttention
from mm_diffusion.modality import AUDIO, VIDEO
from mm_diffusion.script_util import create_model_and_diffusion
from mm_diffusion.unet import InputConv, MultimodalUNet, ResBlock

HERE = Path(__file__).parent

# ---------------------------------------------------------------- what there is


@dataclasses.dataclass(frozen=True)
class Link:
    """A cross-attention block: its window and its largest shift in frames."""

    window: int
    largest_shift: int
    heads: int


@dataclasses.dataclass
class Row:
    """A block of both streams: first or last convolution, residual block, or one that resamples."""

    kind: str  # "input", "residual", "downsample", "upsample" or "output"
    in_channels: dict[str, int]
    out_channels: dict[str, int]
    grids: dict[str, tuple[int, ...]]  # of its output: frames, height, width; samples
    attention: dict[str, list[str]]  # the axes it ends with self-attention among
    dilation: int = 1  # of its audio convolution
    link: Link | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """All rows in the order of computation."""

    down: list[Row]
    middle: list[Row]
    up: list[Row]  # and the last convolutions
    video_size: tuple[int, ...]
    audio_size: tuple[int, ...]
    embedding: int  # width of the timestep's
    num_parameters: int

    def levels(self) -> list[tuple[list[Row], list[Row]]]:
        """Rows of both ways by resolution, finest first; a resampling row goes with its output."""
        down: list[list[Row]] = []
        for row in self.down:
            down += [[]] if row.kind in ("input", "downsample") else []
            down[-1].append(row)
        up: list[list[Row]] = [[]]
        for row in self.up[:-1]:
            up += [[]] if row.kind == "upsample" else []
            up[-1].append(row)
        return list(zip(down, reversed(up), strict=True))


def published_model() -> MultimodalUNet:
    """The model of the default flags, without memory for its weights."""
    with th.device("meta"):
        return create_model_and_diffusion()[0]


def read_plan(model: MultimodalUNet) -> Plan:
    """The modules of a coupled U-Net, with the sizes of their feature maps at its clip size."""
    frames, _, height, width = model.video_size
    grids: dict[str, tuple[int, ...]] = {
        "video": (frames, height, width),
        "audio": (model.audio_size[1],),
    }
    parts: list[list[Row]] = []
    for stages in (model.input_blocks, [model.middle_blocks], model.output_blocks):
        rows: list[Row] = []
        for block in (block for stage in stages for block in stage):
            if isinstance(block, CrossAttention):
                largest = frames - block.window_frames if block.shifts else 0
                rows[-1].link = Link(block.window_frames, largest, block.num_heads)
            else:
                rows.append(read_row(block, grids))
                grids = rows[-1].grids
        parts.append(rows)
    parts[-1].append(read_output(model, grids))
    count = sum(parameter.numel() for parameter in model.parameters())
    return Plan(*parts, model.video_size, model.audio_size, model.emb_channels, count)


def read_row(block: InputConv | ResBlock, grids: dict[str, tuple[int, ...]]) -> Row:
    """A block that takes maps of these grids."""
    if isinstance(block, InputConv):
        convs = dict(block.conv.items())
        first = {name: next(conv.parameters()) for name, conv in convs.items()}
        channels = [{name: weight.shape[axis] for name, weight in first.items()} for axis in (1, 0)]
        return Row("input", *channels, grids, {name: [] for name in convs})
    streams = {"video": block.video, "audio": block.audio}
    resample = getattr(block.video.resample, "__name__", "residual")
    new = {m.name: resampled(grids[m.name], m.stride, resample) for m in (VIDEO, AUDIO)}
    return Row(
        resample,
        {name: len(stream.in_norm.weight) for name, stream in streams.items()},
        {name: len(stream.out_norm.weight) for name, stream in streams.items()},
        new,
        {name: list(stream.attention) for name, stream in streams.items()},
        block.audio.in_conv.dilation[0],
    )


def read_output(model: MultimodalUNet, grids: dict[str, tuple[int, ...]]) -> Row:
    """The last convolutions."""
    last = dict(model.out.items())
    ins, outs = (
        {n: len(out.norm.weight) for n, out in last.items()},
        {n: len(out.conv.weight) for n, out in last.items()},
    )
    return Row("output", ins, outs, grids, {name: [] for name in last})


def resampled(grid: tuple[int, ...], stride: tuple[int, ...], resample: str) -> tuple[int, ...]:
    """The grid after a resampling of that name, or after none."""
    if resample == "downsample":
        return tuple(n // s for n, s in zip(grid, stride, strict=True))
    if resample == "upsample":
        return tuple(n * s for n, s in zip(grid, stride, strict=True))
    return grid


# ------------------------------------------------------------ drawing, in pixels from the top left

WIDTH = 1240
MARGIN, LABEL_X, LEFT_X, RIGHT_X = (
    22,
    36,
    176,
    744,
)  # of everything, the names of levels, and the two ways
BAR, GAP = (172, 25), 116  # a block of one stream, and the room for links between the streams
PITCH, PANEL_PAD, PANEL_GAP = 36, 11, 14
TOP, LEGEND_HEIGHT = 178, 140
BLUE, ORANGE, PURPLE, GREEN, GREY, INK = (
    "#2f6fb3",
    "#c8702a",
    "#6a4c93",
    "#3a8f5c",
    "#9aa0a8",
    "#222222",
)
COLOURS = {
    "video": (BLUE, "#9dbfe2"),
    "audio": (ORANGE, "#ecbd97"),
}  # of blocks, and of those that resample
CHIPS = {"spatial": "S", "temporal": "T", "audio": "A"}
ATTENTION = {"video": ["spatial", "temporal"], "audio": ["audio"]}  # all there is, for the legend
SPAN = 2 * BAR[0] + GAP  # of a way
PILL = (GAP - 26, BAR[1] - 2)  # a link
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "coupled U-Net",  # so that the same diagram is the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
}


def stream_x(left: float, name: str) -> float:
    """The left edge of a stream's blocks in the way that starts at `left`."""
    return left if name == "video" else left + BAR[0] + GAP


def box(
    ax: Axes,
    x: float,
    y: float,
    size: tuple[float, float],
    face: str,
    edge: str = "none",
    radius: float = 5,
    zorder: int = 2,
) -> None:
    """A rounded rectangle with its top left corner at (x, y)."""
    shape = {"boxstyle": f"round,pad=0,rounding_size={radius}", "linewidth": 1.1, "clip_on": False}
    ax.add_patch(
        FancyBboxPatch((x, y), *size, facecolor=face, edgecolor=edge, zorder=zorder, **shape)
    )


def panel(ax: Axes, y: float, right: float, height: float) -> None:
    """The ground of a level, from the left margin to `right`, below all arrows."""
    box(ax, MARGIN, y, (right - MARGIN, height), "#f5f6f8", "#dcdfe4", radius=10, zorder=0)


def write(ax: Axes, x: float, y: float, text: str, size: float = 12, **options: object) -> None:
    """Text whose middle is at the height y; `size` in pixels."""
    known = {
        "color": INK,
        "ha": "left",
        "va": "center_baseline",
        "fontsize": 0.72 * size,
        "zorder": 4,
    }
    ax.text(x, y, text, **{**known, **options})


def arrow(
    ax: Axes, points: list[tuple[float, float]], colour: str, ends: str = "-|>", width: float = 1.5
) -> None:
    """A line through points, with its last piece (or both ends) an arrow."""
    if points[1:-1]:
        ax.plot(
            *zip(*points[:-1], strict=True),
            color=colour,
            linewidth=width,
            zorder=1,
            clip_on=False,
            solid_joinstyle="round",
        )
    style = {"arrowstyle": ends, "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(
        FancyArrowPatch(
            *points[-2:], color=colour, linewidth=width, zorder=1, clip_on=False, **style
        )
    )


def draw_row(ax: Axes, row: Row, left: float, y: float) -> None:
    """Both blocks of a row, with y the top of them, and the link between them."""
    for name, (dark, light) in COLOURS.items():
        draw_block(ax, row, name, stream_x(left, name), y, dark, light)
    if row.link:
        middle = left + BAR[0], left + BAR[0] + GAP
        arrow(ax, [(x, y + BAR[1] / 2) for x in middle], PURPLE, "<|-|>", 1.8)
        shift = f"   s ≤ {row.link.largest_shift}" if row.link.largest_shift else ""
        draw_pill(ax, middle[0] + 13, y, f"w {row.link.window}{shift}")


def draw_pill(ax: Axes, x: float, y: float, text: str) -> None:
    """A cross-attention block."""
    box(ax, x, y + 1, PILL, PURPLE, radius=11)
    write(ax, x + PILL[0] / 2, y + 13, text, 11.5, color="white", ha="center", weight="bold")


def draw_block(ax: Axes, row: Row, name: str, x: float, y: float, dark: str, light: str) -> None:
    """One stream of a row: channels, chips for its self-attention, dilation of its audio conv."""
    plain = row.kind in ("input", "output")
    changes = row.kind in ("downsample", "upsample")
    box(ax, x, y, BAR, "white" if plain else light if changes else dark, dark)
    colour, middle = (dark if plain else INK if changes else "white"), y + 13
    factor = {m.name: m.stride[-1] for m in (VIDEO, AUDIO)}[name]
    before = {"downsample": f"÷ {factor}   ", "upsample": f"× {factor}   "}.get(
        row.kind, "conv   " if plain else ""
    )
    write(
        ax,
        x + 10,
        middle,
        f"{before}{row.in_channels[name]} → {row.out_channels[name]}",
        color=colour,
        weight="bold",
    )
    for k, chip in enumerate(reversed(row.attention[name])):
        box(ax, x + BAR[0] - 25 - 21 * k, y + 4, (17, 17), "white", radius=4)
        write(
            ax,
            x + BAR[0] - 16.5 - 21 * k,
            middle,
            CHIPS[chip],
            11.5,
            color=dark,
            ha="center",
            weight="bold",
        )
    if name == "audio" and not plain:
        right = x + BAR[0] - 10 - 21 * len(row.attention[name])
        write(ax, right, middle, f"d {row.dilation}", 11.5, color=colour, ha="right")


def draw_level(ax: Axes, down: list[Row], up: list[Row], y: float, height: float) -> None:
    """A panel with the rows of one resolution. The way up runs from its last row to its first."""
    panel(ax, y, WIDTH - MARGIN, height)
    tops = [y + PANEL_PAD + PITCH * k for k in range(max(len(down), len(up)))]
    rising = [row for row in up if row.kind != "upsample"]
    placed = [(tops[len(rising) - 1 - k], row) for k, row in enumerate(rising)]
    placed += [(tops[len(rising)], row) for row in up if row.kind == "upsample"]
    for top, row in zip(tops, down, strict=False):
        draw_row(ax, row, LEFT_X, top)
    for top, row in placed:
        draw_row(ax, row, RIGHT_X, top)
    for top in tops[: len(down)]:
        arrow(ax, [(LEFT_X + SPAN + 4, top + BAR[1] / 2), (RIGHT_X - 4, top + BAR[1] / 2)], GREY)
    for name, (dark, _) in COLOURS.items():
        x = [stream_x(left, name) + BAR[0] / 2 for left in (LEFT_X, RIGHT_X)]
        for above, below in itertools.pairwise(tops[: len(down)]):
            arrow(ax, [(x[0], above + BAR[1]), (x[0], below)], dark)
        for above, below in itertools.pairwise(tops[: len(up)]):
            arrow(ax, [(x[1], below), (x[1], above + BAR[1])], dark)
    label_level(ax, down[-1], y + PANEL_PAD)


def label_level(ax: Axes, row: Row, y: float) -> None:
    """The sizes of the feature maps of a level, at its left."""
    frames, height, width = row.grids["video"]
    (length,) = row.grids["audio"]
    write(ax, LABEL_X, y + 13, f"{height} × {width}", 17, weight="bold", color=BLUE)
    write(ax, LABEL_X, y + 36, f"{length:,}", 17, weight="bold", color=ORANGE)
    facts = [f"{row.out_channels['video']} channels", f"{length // frames:,} samples", "a frame"]
    for k, fact in enumerate(facts):
        write(ax, LABEL_X, y + 58 + 16 * k, fact, 11.5, color="#555555")


def draw(plan: Plan) -> Figure:
    """The whole diagram."""
    levels = plan.levels()
    heights = [max(map(len, pair)) * PITCH - (PITCH - BAR[1]) + 2 * PANEL_PAD for pair in levels]
    middle_y = TOP + sum(heights) + PANEL_GAP * len(heights) + 8
    bottom = middle_y + len(plan.middle) * PITCH + PANEL_PAD
    figure = Figure(
        figsize=(WIDTH / 100, (bottom + LEGEND_HEIGHT) / 100), dpi=100, facecolor="white"
    )
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(bottom + LEGEND_HEIGHT, 0))
    ax.axis("off")
    draw_head(ax, plan)
    tops = [TOP + sum(heights[:k]) + PANEL_GAP * k for k in range(len(levels))]
    for y, height, (down, up) in zip(tops, heights, levels, strict=True):
        draw_level(ax, down, up, y, height)
    draw_ways(ax, tops, levels)
    ends = [tops[-1] + PANEL_PAD + PITCH * (len(rows) - 1) + BAR[1] for rows in levels[-1]]
    draw_middle(ax, plan, middle_y, *ends)
    draw_legend(ax, plan, bottom + 34)
    return figure


def draw_head(ax: Axes, plan: Plan) -> None:
    """Title, what goes in and what comes out, and the timestep."""
    frames, colours, height, width = plan.video_size
    channels, samples = plan.audio_size
    write(ax, MARGIN, 34, "The coupled U-Net", 25, weight="bold")
    write(ax, MARGIN, 62, f"{plan.num_parameters:,} parameters", 13, color="#555555")
    sizes = {
        "video": f"{frames} × {colours} × {height} × {width}",
        "audio": f"{channels} × {samples:,}",
    }
    titles = {"video": "video", "audio": "stereo audio"}
    y = TOP - 14 - BAR[1]
    for name, (dark, _) in COLOURS.items():
        centre = stream_x(LEFT_X, name) + BAR[0] / 2
        write(ax, centre, y - 28, titles[name], 16, color=dark, ha="center", weight="bold")
        write(ax, centre, y - 7, f"with noise, {sizes[name]}", 11.5, color="#555555", ha="center")
        arrow(ax, [(centre, y + 4), (centre, TOP + PANEL_PAD)], dark)
        centre = stream_x(RIGHT_X, name) + BAR[0] / 2
        arrow(ax, [(centre, TOP + PANEL_PAD), (centre, y + BAR[1])], dark)
        arrow(ax, [(centre, y), (centre, y - 16)], dark)
        write(ax, centre, y - 28, titles[name], 16, color=dark, ha="center", weight="bold")
    draw_row(ax, plan.up[-1], RIGHT_X, y)
    for left, text in ((LEFT_X, "down"), (RIGHT_X, "up")):
        write(ax, left + SPAN / 2, y - 28, text, 13, color=GREY, ha="center", weight="bold")
    middle = (LEFT_X + SPAN + RIGHT_X) / 2
    box(ax, middle - 70, 30, (140, 44), "#eaf5ee", GREEN, radius=8)
    write(ax, middle, 45, "timestep t", 12, color=GREEN, ha="center", weight="bold")
    write(ax, middle, 61, f"embedding of {plan.embedding}", 11.5, color=GREEN, ha="center")
    write(ax, middle, 88, "scales and shifts", 11.5, color=GREEN, ha="center")
    write(ax, middle, 103, "every block", 11.5, color=GREEN, ha="center")


def draw_ways(ax: Axes, tops: list[float], levels: list[tuple[list[Row], list[Row]]]) -> None:
    """The arrows from level to level."""
    for k, (finer, coarser) in enumerate(itertools.pairwise(levels)):
        start = tops[k] + PANEL_PAD + PITCH * (len(finer[0]) - 1) + BAR[1]
        end = tops[k + 1] + PANEL_PAD
        rise = tops[k] + PANEL_PAD + PITCH * (len(finer[1]) - 1) + BAR[1]
        assert coarser[0][0].kind == "downsample"
        for name, (dark, _) in COLOURS.items():
            x = stream_x(LEFT_X, name) + BAR[0] / 2
            arrow(ax, [(x, start), (x, end)], dark)
            x = stream_x(RIGHT_X, name) + BAR[0] / 2
            arrow(ax, [(x, end), (x, rise)], dark)


def draw_middle(ax: Axes, plan: Plan, y: float, coarsest: float, end: float) -> None:
    """The blocks between the ways, below the way down, and the arrows to and from them.

    y: top of the first row; coarsest: top of the panel above; end: bottom of the last row up.
    """
    bottom = y + PITCH * (len(plan.middle) - 1) + BAR[1]
    panel(ax, y - PANEL_PAD, LEFT_X + SPAN + 14, bottom - y + 2 * PANEL_PAD)
    write(ax, LABEL_X, y + 13, "middle", 17, weight="bold", color="#555555")
    for k, row in enumerate(plan.middle):
        draw_row(ax, row, LEFT_X, y + PITCH * k)
    for name, (dark, _) in COLOURS.items():
        x, target = (stream_x(left, name) + BAR[0] / 2 for left in (LEFT_X, RIGHT_X))
        arrow(ax, [(x, coarsest), (x, y)], dark)
        for k in range(len(plan.middle) - 1):
            arrow(ax, [(x, y + PITCH * k + BAR[1]), (x, y + PITCH * (k + 1))], dark)
        out = bottom - BAR[1] / 2 if name == "audio" else bottom + PANEL_PAD + 12
        start = (
            [(stream_x(LEFT_X, name) + BAR[0], out)] if name == "audio" else [(x, bottom), (x, out)]
        )
        arrow(ax, [*start, (target, out), (target, end)], dark)


def draw_legend(ax: Axes, plan: Plan, y: float) -> None:
    """What the signs mean, in two columns."""
    finest = plan.down[1]
    samples = {
        kind: dataclasses.replace(finest, kind=kind, attention=ATTENTION)
        for kind in ("residual", "downsample")
    }
    samples["downsample"] = dataclasses.replace(
        samples["downsample"], attention={"video": [], "audio": []}
    )
    for k, row in enumerate(samples.values()):
        draw_block(ax, row, "video", MARGIN, y + 48 * k, *COLOURS["video"])
    notes = {
        5: "residual block, channels in → out; d: dilation of its audio convolution;",
        22: "self-attention S over pixels of a frame, T over frames of a pixel, A over audio",
        61: "residual block that also resamples: height and width, or audio samples, ÷ or ×",
    }
    for below, note in notes.items():
        write(ax, MARGIN + BAR[0] + 14, y + below, note, 11.5)
    draw_pill(ax, RIGHT_X + 38, y, "w   s")
    arrow(ax, [(RIGHT_X + 38, y + 61), (RIGHT_X + 38 + PILL[0], y + 61)], GREY)
    notes = {
        5: "RS-MMA, cross-attention both ways: w frames of the other",
        22: "stream, shifted by s frames at random (no s: not shifted)",
        61: "skip connection, concatenated on channels",
    }
    for below, note in notes.items():
        write(ax, RIGHT_X + 38 + PILL[0] + 14, y + below, note, 11.5)


def main() -> None:
    with matplotlib.rc_context(STYLE):
        figure = draw(read_plan(published_model()))
        save(figure, HERE / "coupled_unet.svg")
        figure.savefig(HERE / "coupled_unet.png", dpi=160, metadata={"Software": None})


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same whenever it is made."""
    figure.savefig(
        path, format="svg", metadata={"Date": None, "Creator": None, "Title": "The coupled U-Net"}
    )


if __name__ == "__main__":
    main()
