"""The diagram of the coupled U-Net: it shows the modules, and the committed file is up to date."""

import re
import sys
from pathlib import Path

import matplotlib
import tiny

FOLDER = Path(__file__).parents[1] / "fig"
sys.path.insert(0, str(FOLDER))
import make_diagram as diagram  # noqa: E402


def drawn(model, path):
    with matplotlib.rc_context(diagram.STYLE):
        diagram.save(diagram.draw(diagram.read_plan(model)), path)
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_the_committed_svg_is_what_the_script_makes(tmp_path):
    drawn(diagram.published_model(), tmp_path / "new.svg")
    assert (tmp_path / "new.svg").read_text() == (FOLDER / "coupled_unet.svg").read_text()


def test_every_level_and_link_of_a_small_model_is_named(tmp_path):
    model, _ = tiny.build(
        as_built=True, audio_size="2,256", channel_mult="1,2,3", cross_attention_shift=True
    )
    texts = drawn(model, tmp_path / "small.svg")
    for side, samples, channels in (
        ("8 × 8", "256", "32"),
        ("4 × 4", "64", "64"),
        ("2 × 2", "16", "96"),
    ):
        assert {side, samples, f"{channels} channels"} <= set(texts)
    # one residual block a level on the way down and two up, coupled at the two finest levels
    assert texts.count("w 1   s ≤ 3") == texts.count("w 2   s ≤ 2") == 3
    assert texts.count("÷ 4   32 → 32") == texts.count("÷ 2   64 → 64") == 1
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in texts


def test_rows_are_read_in_the_order_in_which_maps_change():
    plan = diagram.read_plan(diagram.published_model())
    assert [row.grids["video"][1] for row in plan.down] == [
        64,
        64,
        64,
        32,
        32,
        32,
        16,
        16,
        16,
        8,
        8,
        8,
    ]
    assert [row.grids["audio"][0] for row in plan.up[::4]] == [1250, 5000, 20000, 80000]
    assert [row.link.window for row in plan.middle if row.link] == [20]
    skips = [row.out_channels["video"] for row in plan.down]
    widths = [
        plan.middle[-1].out_channels["video"],
        *(row.out_channels["video"] for row in plan.up),
    ]
    taken = [
        (row, before)
        for row, before in zip(plan.up, widths, strict=False)
        if row.kind == "residual"
    ]
    assert [row.in_channels["video"] for row, _ in taken] == [
        before + skip for (_, before), skip in zip(taken, reversed(skips), strict=True)
    ]
