"""Curves of training runs: reading, choice of panels, smoothing, plots and error messages."""

import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from mm_diffusion import logger
from mm_diffusion.files import short_names
from mm_diffusion.viewing import curves

SCRIPT = Path(__file__).parents[1] / "py_scripts/plot_log.py"
LOSS = {"loss": 0.5, **{f"loss_q{q}": 0.1 * (q + 1) for q in range(4)}}


def write_run(folder: Path, steps=(10, 20, 30), **values: float) -> Path:
    """A progress.csv as training writes it."""
    logger.configure(folder)
    for step in steps:
        row = {
            **LOSS,
            "grad_norm": 1.0,
            "lr": 1e-4,
            "step": step,
            "samples": 4 * step,
            "samples_per_second": 2.0,
        }
        for key, value in (row | values).items():
            logger.logkv(key, value)
        logger.dumpkvs()
    logger.configure()
    return folder


def plot(monkeypatch, *args: str | Path) -> int:
    """Run the script; its exit status."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def lines_of(figure) -> dict[str, list]:
    """Title of a panel -> its lines."""
    return {axes.get_title(): axes.get_lines() for axes in figure.axes}


# ---------------------------------------------------------------- the script


@pytest.mark.parametrize(
    ("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_the_format_of_the_image_is_that_of_its_suffix(tmp_path, monkeypatch, suffix, magic):
    out = tmp_path / f"new folder/curves.{suffix}"
    runs = [write_run(tmp_path / name) for name in "ab"]
    assert plot(monkeypatch, *runs, "--out", out, "--x", "hours") == 0
    assert out.read_bytes().startswith(magic)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no progress.csv"),
        ("", "is empty"),
        ("step,loss\n", "need at least two rows, found 0"),
        ("step,loss\n10,0.5\n", "need at least two rows, found 1"),
        ("loss\n0.5\n0.4\n", "no column 'step'"),
        ("step,loss\n10,0.5\n20,high\n", "line 3: loss is 'high'"),
    ],
)
def test_an_unreadable_run_is_named_in_one_line(tmp_path, monkeypatch, capsys, text, words):
    (tmp_path / "mine").mkdir()
    if text is not None:
        (tmp_path / "mine/progress.csv").write_text(text)
    assert plot(monkeypatch, tmp_path / "mine", "--out", tmp_path / "curves.png") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "mine" in line
    assert words in line
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keys", "loss,accuracy"], ["'accuracy'", "grad_norm", "loss_q"]),
        (["--out", "curves.xyz"], ["'xyz'", "png", "svg"]),
        (["--smooth", "1"], ["smooth 1.0", "[0, 1)"]),
    ],
)
def test_an_invalid_flag_is_named_with_the_valid_choices(
    tmp_path, monkeypatch, capsys, flags, words
):
    out = ["--out", str(tmp_path / "curves.png")]
    assert plot(monkeypatch, write_run(tmp_path / "mine"), *out, *flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words)


# ---------------------------------------------------------------- reading


def test_rows_of_a_resumed_run_replace_those_of_the_same_steps(tmp_path):
    table = tmp_path / "progress.csv"
    table.write_text("step,loss\n10,1\n20,2\n30,3\n20,4\n25,\n40,6\n,7\n")
    columns = curves.read_columns(table)
    assert columns["step"].tolist() == [10, 20, 25, 40]
    assert columns["loss"].tolist()[:2] == [1, 4]
    assert math.isnan(columns["loss"][2])


def test_an_unfinished_last_row_is_read_as_far_as_it_goes(tmp_path):
    table = tmp_path / "progress.csv"
    table.write_text("step,loss,lr\n10,1,1\n20,2,1\n30,3")
    assert curves.read_columns(table)["loss"].tolist() == [1, 2, 3]


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path):
    (run,) = curves.read_runs([write_run(tmp_path, loss=math.inf)])
    assert "loss" not in run.columns
    assert "loss_q0" in run.columns


def test_hours_are_samples_over_their_rate(tmp_path):
    (run,) = curves.read_runs([write_run(tmp_path, steps=(1800, 3600))])
    assert run.columns["hours"].tolist() == [1.0, 2.0]


def test_runs_have_the_shortest_names_that_differ(tmp_path):
    names = [["a/first", "a/second"], ["a/same", "b/same"]]
    for paths in names:
        folders = [write_run(tmp_path / path) for path in paths]
        found = [run.name for run in curves.read_runs(folders)]
        assert found == (
            paths if paths[0].endswith("same") else [Path(path).name for path in paths]
        )
    copy = tmp_path / "copy.csv"
    copy.write_bytes((tmp_path / "a/same/progress.csv").read_bytes())
    assert [run.name for run in curves.read_runs([copy])] == ["copy"]


# ---------------------------------------------------------------- smoothing


def test_smoothing_keeps_constants_and_rate_0_keeps_everything():
    values = np.random.default_rng(0).normal(size=50)
    assert np.array_equal(curves.smoothed(values, 0.0), values)
    assert np.allclose(curves.smoothed(np.full(50, 3.0), 0.9), 3.0)


def test_smoothing_is_the_weighted_mean_of_earlier_values():
    values = np.random.default_rng(0).normal(size=20)
    weights = 0.9 ** np.arange(19, -1, -1)
    assert curves.smoothed(values, 0.9)[-1] == pytest.approx(np.average(values, weights=weights))


# ---------------------------------------------------------------- choosing and drawing


def test_without_keys_there_are_losses_quartiles_norm_rate_and_speed(tmp_path):
    runs = curves.read_runs([write_run(tmp_path, mse_video=0.2, mse_video_q1=0.2, memory_gib=1.0)])
    assert [panel.title for panel in curves.choose_panels(runs)] == [
        "loss",
        "loss by quartile of the timestep",
        "mse_video",
        "grad_norm",
        "lr",
        "samples_per_second",
    ]


def test_a_key_that_one_run_lacks_is_plotted_for_the_others(tmp_path):
    runs = curves.read_runs([write_run(tmp_path / "a", vb=0.1), write_run(tmp_path / "b")])
    lines = lines_of(curves.draw(runs, curves.choose_panels(runs, ["vb", "loss"])))
    assert (len(lines["vb"]), len(lines["loss"])) == (1, 2)


def test_raw_values_lie_under_their_average_but_the_learning_rate_is_not_smoothed(tmp_path):
    runs = curves.read_runs([write_run(tmp_path)])
    panels = curves.choose_panels(runs, ["loss", "lr", "loss_q"])
    lines = lines_of(curves.draw(runs, panels, smooth=0.9))
    assert [len(found) for found in lines.values()] == [2, 1, 8]
    assert lines["loss"][0].get_alpha() < 1
    assert [len(found) for found in lines_of(curves.draw(runs, panels)).values()] == [1, 1, 4]


def test_losses_are_on_a_logarithmic_scale_where_all_of_them_are_positive(tmp_path):
    for loss, scale in ((0.5, "log"), (-0.5, "linear")):
        runs = curves.read_runs(
            [write_run(tmp_path / scale, loss=loss), write_run(tmp_path / "other")]
        )
        axes, other = curves.draw(runs, curves.choose_panels(runs, ["loss", "lr"])).axes
        assert (axes.get_yscale(), other.get_yscale()) == (scale, "linear")


def test_a_spike_moves_a_logarithmic_average_little(tmp_path):
    rows = [f"{step},{1000 if step == 50 else 1}" for step in range(99)]
    (tmp_path / "progress.csv").write_text("\n".join(["step,grad_norm", *rows]))
    runs = curves.read_runs([tmp_path])
    (lines,) = lines_of(
        curves.draw(runs, curves.choose_panels(runs, ["grad_norm"]), smooth=0.9)
    ).values()
    assert max(lines[1].get_ydata()) < 10


def test_a_run_of_few_rows_is_not_smoothed(tmp_path):
    (tmp_path / "progress.csv").write_text("step,lr,loss\n1,1,8\n2,1,4\n3,1,2\n")
    runs = curves.read_runs([tmp_path])
    (lines,) = lines_of(
        curves.draw(runs, curves.choose_panels(runs, ["loss"]), smooth=0.9)
    ).values()
    assert lines[1].get_ydata() == pytest.approx([8, 4, 2])


def test_many_runs_have_colours_of_their_own_and_all_are_in_the_legend(tmp_path):
    runs = curves.read_runs([write_run(tmp_path / f"run{k}") for k in range(12)])
    figure = curves.draw(runs, curves.choose_panels(runs, ["loss"]))
    assert len({tuple(line.get_color()) for line in lines_of(figure)["loss"]}) == 12
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"run{k}" for k in range(12)
    ]


def test_a_curve_of_one_value_is_a_dot(tmp_path):
    (tmp_path / "progress.csv").write_text("step,loss,vb\n1,1,\n2,1,0.5\n3,1,\n")
    runs = curves.read_runs([tmp_path])
    (lines,) = lines_of(curves.draw(runs, curves.choose_panels(runs, ["vb"]))).values()
    assert lines[-1].get_marker() == "o"


def test_short_names_are_relative():
    names = short_names([Path("/ema"), Path("/data/ema")])
    assert names == ["ema", "data/ema"]
