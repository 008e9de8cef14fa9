"""Intervals of figures, differences of runs, and the page that shows them."""

import json
import math
import shutil
from pathlib import Path
from statistics import NormalDist

import jsonschema
import pytest
import torch as th
from chromium import chromium
from test_gallery import needs_chromium
from test_metrics import (  # noqa: F401 (fixtures)
    AS_READ,
    SIZES,
    TOY,
    cache,
    clips,
    computed_without_onsets,
    flags_of,
    networks,
    noise,
    report_on,
    script,
    unweighted,
    written,
)
from test_metrics_published import i3d_path  # noqa: F401 (fixture)
from test_upsampler import flags_for, sample, saved

from mm_diffusion.config import EvalConfig
from mm_diffusion.data import toy
from mm_diffusion.evaluation import comparison, distances, scores
from mm_diffusion.evaluation.bootstrap import (
    LEAST_FILES,
    Draws,
    Resampling,
    distance_interval,
    interval,
    tail,
    weightings,
)
from mm_diffusion.evaluation.distances import Points, weighted_median
from mm_diffusion.viewing import gallery, metrics_page

# ---------------------------------------------------------------- intervals


def test_weightings_draw_as_many_files_as_there_are_and_start_with_each_once():
    weights = weightings(7, 500, "a")
    assert (weights[0] == 1).all()
    assert (weights.sum(dim=1) == 7).all()
    assert weights[1:].mean(dim=0).tolist() == pytest.approx([1] * 7, abs=0.2)
    assert weights[1:].var(dim=0).tolist() == pytest.approx([6 / 7] * 7, abs=0.25)
    assert weights.equal(weightings(7, 500, "a"))
    assert not weights.equal(weightings(7, 500, "b"))


def test_the_interval_of_a_mean_covers_the_true_mean_at_about_its_rate():
    """Of normal data it is the mean and 2.01 standard errors on either side: Student's t of 49."""
    weights = weightings(50, 1000, "a")
    hits = 0
    for trial in range(300):
        x = 3 + noise(50, seed=trial)
        low, high = interval(Draws(weights @ x / weights.sum(dim=1), 50))
        hits += low <= 3 <= high
        half = 2.01 * x.std().item() / math.sqrt(50)
        assert (high - low) / 2 == pytest.approx(half, rel=0.12)
    assert 0.92 <= hits / 300 <= 0.98


@pytest.mark.parametrize(("files", "t"), [(5, 2.776), (10, 2.262), (30, 2.045), (10**6, 1.960)])
def test_tails_are_those_of_students_t_and_of_sets_that_vary_more_than_draws(files, t):
    found = -NormalDist().inv_cdf(tail(files)) / math.sqrt(files / (files - 1))
    assert found == pytest.approx(t, rel=0.006)


@pytest.mark.parametrize("files", [LEAST_FILES, 8, 12])
def test_runs_that_are_alike_are_seldom_told_apart_however_few_their_files(files):
    """Without wider tails, 17 % of verdicts on five files, 11 % on eight, 9 % on twelve."""
    weights = weightings(files, 1000, "a")
    wrong = 0
    for trial in range(300):
        ours, base = (
            scores.make_score("FVD", Draws(weights @ x / files, files), better="lower")
            for x in noise(2, files, seed=trial)
        )
        wrong += comparison.difference("b", ours, base).verdict != comparison.UNDECIDED
    assert 0.02 < wrong / 300 < 0.11


def test_an_interval_of_figures_without_draws_is_none():
    def of(*values, centred=False):
        return interval(Draws(th.tensor(values), 9), centred)

    assert of(1.0, math.nan, math.nan) is None
    assert of(1.0) is None
    assert of(math.nan, 1.0, 2.0) is None
    assert of(1.0, math.nan, 3.0, centred=True) == (1, 1)


def weighted(x, files, draws=0, name="x"):
    return Points(x, files, weightings(int(files.max()) + 1, draws, name))


DISTANCES = ("frechet_distances", "kernel_distances", "gaussian_distances")


@pytest.mark.parametrize("name", DISTANCES)
def test_weights_of_one_give_the_distance_itself(name):
    distance = getattr(distances, name)
    x, y = noise(20, 4), noise(15, 4, seed=1) + 0.3
    files, true_files = th.arange(20) // 4, th.arange(15)
    found = distance(weighted(x, files), weighted(y, true_files))
    assert found.tolist() == pytest.approx([unweighted(distance)(x, y)], rel=1e-12)


def test_a_frechet_distance_under_weights_is_of_their_means_and_covariances():
    """Without the (biased) dependence on copies: covariances are those of distinct points."""
    x, y = noise(9, 3), noise(8, 3, seed=1)
    weights = th.tensor([[2.0, 0, 1, 3, 1, 0, 1, 1, 0]]).double()
    found = distances.frechet_distances(
        Points(x, th.arange(9), weights), Points(y, th.arange(8), th.ones(1, 8).double())
    )
    mean = weights[0] @ x / 9
    spread = ((weights[0, :, None] * (x - mean)).T @ (x - mean)) / 9
    spread /= 1 - (weights / 9).square().sum()
    b = y.T.cov()
    roots = th.linalg.eigvals(spread @ b).real.sqrt().sum()
    means = (mean - y.mean(dim=0)).square().sum()
    assert found.item() == pytest.approx(
        (means + spread.trace() + b.trace() - 2 * roots).item(), rel=1e-9
    )


@pytest.mark.parametrize("name", DISTANCES[1:])
def test_a_kernel_distance_under_weights_pairs_no_clip_with_its_copy(name):
    """So draws are unbiased: their mean is the distance, for windows of files as well."""
    distance = getattr(distances, name)
    x, y = noise(24, 3) + 0.5, noise(20, 3, seed=1)
    for files in (th.arange(24), th.arange(24) // 3):
        values = distance(weighted(x, files, 4000), weighted(y, th.arange(20), 4000, "y"))
        draws = values[1:]
        error = draws.std() / math.sqrt(len(draws))
        assert abs(draws.mean() - values[0]) < 4 * error + 0.02 * values[0]


def test_the_interval_of_a_frechet_distance_is_about_the_distance_of_such_sets():
    """Draws alone are all too large, since resampled sets are farther apart."""
    trials = [
        distances.frechet_distances(
            weighted(noise(30, 2, seed=k), th.arange(30), 150),
            weighted(noise(30, 2, seed=500 + k) + 1, th.arange(30), 150, "y"),
        )
        for k in range(40)
    ]
    mean = sum(values[0] for values in trials) / len(trials)
    intervals = [distance_interval(Draws(values, 30)) for values in trials]
    hits = sum(low <= mean <= high for low, high in intervals)
    assert hits >= 33
    shift = sum(values[1:].mean() - values[0] for values in trials) / len(trials)
    assert shift > 0.02
    same = noise(30, 2)
    values = distances.frechet_distances(
        weighted(same, th.arange(30), 50), weighted(same, th.arange(30), 50, "y")
    )
    assert values[0] < 1e-9 < values[1:].min()
    assert distance_interval(Draws(values, 30))[0] == 0


def test_a_weighted_median_is_the_median_of_the_repeated_values():
    x = noise(9)
    weights = weightings(9, 40, "a")
    expected = [x.repeat_interleave(row.long()).median() for row in weights]
    assert weighted_median(x, weights).equal(th.stack(expected))
    assert weighted_median(x[:8], th.ones(1, 8)).item() == x[:8].median()


def measured(count, seed=0):
    """What is computed of silent-free noise clips with noise frames."""
    audio = 0.1 * noise(count, 2, 1600, seed=seed).float()
    video = noise(count, 2, 3, 8, 8, seed=seed + 100).float().clamp(-1, 1)
    return computed_without_onsets(video, audio)


def test_every_figure_has_an_interval_around_it_and_the_same_value_as_without():
    generated, reference = measured(12), measured(10, seed=1)
    plain, _ = scores.compute_scores(generated, reference)
    resampling = Resampling(th.arange(12), th.arange(10), 200)
    found, _ = scores.compute_scores(generated, reference, resampling)
    assert len(found) == len(plain) > 8
    for score, before in zip(found, plain, strict=True):
        assert score.value == pytest.approx(before.value, rel=1e-12)
        assert before.interval is None
        low, high = score.interval
        assert low <= score.value + 1e-9
        assert high >= score.value - 1e-9
        assert (score.reference_interval is None) == (score.reference is None)


def test_windows_of_a_file_are_drawn_together():
    """So a second window that equals the first leaves ratios, histograms and medians alone."""
    once, reference = measured(12), measured(10, seed=1)
    twice = {
        name: {row: values.repeat_interleave(2, dim=0) for row, values in rows.items()}
        for name, rows in once.items()
    }
    found = []
    for rows, files in ((once, th.arange(12)), (twice, th.arange(24) // 2)):
        resampling = Resampling(files, th.arange(10), 200)
        scored, _ = scores.compute_scores(rows, reference, resampling)
        found.append({s.name: (s.value, *s.interval) for s in scored})
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        assert found[1][name] == pytest.approx(values, rel=1e-9), name


def test_the_figure_is_the_mean_of_what_clips_have_alone():
    generated = measured(6)
    found = {score.name: score.value for score in scores.compute_scores(generated, {})[0]}
    for name in (scores.CORRELATION, scores.SMR):
        alone = scores.clip_values(generated)[name]
        assert found[name] == pytest.approx(alone.double().mean().item(), rel=1e-9)


def test_a_set_of_too_few_files_has_no_interval_and_the_report_says_so(tmp_path):
    video, audio, _ = toy.make_clip(toy.ToyConfig(**{**vars(TOY), "seconds": 6}), 0)
    folder = written(tmp_path / "long", "a", video, audio)
    report = report_on({"samples_path": folder})
    assert report.settings["clips"]["samples"] == 3
    assert report.settings["files"]["samples"] == 1
    assert all(score.interval is None for score in report.scores)
    note = "no intervals: they need 5 files in each set"
    assert note in report.notes
    for count, is_enough in ((4, False), (5, True)):
        resampling = Resampling(th.arange(count), th.arange(9), 20)
        found, notes = scores.compute_scores(measured(count), measured(9, seed=1), resampling)
        assert all((score.interval is not None) == is_enough for score in found)
        assert (note not in notes) == is_enough


# ---------------------------------------------------------------- memorisation


def test_samples_nearer_than_reference_clips_are_to_each_other_are_memorised():
    reference = measured(40)
    generated = measured(10, seed=7)
    pixels = generated["thumbnail"]["pixels"]
    pixels[:3] = reference["thumbnail"]["pixels"][5:8].flip(-1) + 0.001
    found = {score.name: score for score in scores.compute_scores(generated, reference)[0]}
    assert found[scores.MEMORISED].value == pytest.approx(0.3)
    assert found[scores.MEMORISED].reference == pytest.approx(1 / 40, abs=1 / 40)


# ---------------------------------------------------------------- comparisons


SCHEMA = Path(scores.__file__).with_name("metrics.schema.json")


def check_schema(content):
    jsonschema.validate(content, json.loads(SCHEMA.read_text()))


def score_of(values, better="lower"):
    figure = Draws(th.tensor(values, dtype=th.float64), 50)
    return scores.make_score("FVD", figure, better=better)


def test_better_is_said_only_where_the_interval_excludes_zero():
    steady, noisy = [0.1] * 50, [-1.5, 1.5] * 25

    def verdict(shift, spread, better):
        base = score_of([5.0] * 51, better)
        values = [5.0 + shift, *(5 + shift + d - sum(spread) / 50 for d in spread)]
        return comparison.difference("b", score_of(values, better), base).verdict

    assert verdict(-1, steady, "lower") == "better"
    assert verdict(-1, noisy, "lower") == comparison.UNDECIDED
    assert verdict(+1, steady, "lower") == "worse"
    assert verdict(+1, steady, "higher") == "better"
    assert verdict(+1, steady, "") == "higher"
    assert verdict(0, steady, "lower") == comparison.UNDECIDED
    nothing = scores.make_score("FVD", None, better="lower")
    undefined = comparison.difference("b", nothing, score_of([1.0, 1.0]))
    assert (undefined.value, undefined.verdict) == (None, comparison.UNDECIDED)


def test_runs_share_the_draws_of_the_reference():
    """So a run that adds the same to every clip's figure differs by that, without any spread."""
    generated, reference = measured(8), measured(9, seed=1)
    louder = {**generated, "stereo": {**generated["stereo"]}}
    louder["stereo"]["smr"] = generated["stereo"]["smr"] + 2
    resampling = Resampling(th.arange(8), th.arange(9), 100)
    pair = [scores.compute_scores(x, reference, resampling)[0] for x in (louder, generated)]
    ours, base = ({s.name: s for s in found}[scores.SMR] for found in pair)
    found = comparison.difference("louder", ours, base)
    assert found.interval == pytest.approx((2, 2))
    assert found.verdict == "higher"


def test_folders_are_compared_with_one_reference_in_one_table(
    clips,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    true, other = str(clips / "true/video_dev"), str(clips / "generated/video_dev")
    line = ["--compare", f"{other},{true}", "--ref_path", true, *AS_READ]
    line += ["--bootstrap_draws", "50", "--output_dir", str(tmp_path)]
    script("eval", monkeypatch, *line)
    held = json.loads((tmp_path / "comparison.json").read_text())
    check_schema(held)
    names = ["generated/video_dev", "true/video_dev"]
    assert list(held["runs"]) == names
    values = [{s["name"]: s["value"] for s in run["scores"]} for run in held["runs"].values()]
    for row in held["differences"]:
        assert row["run"] == names[1]
        ours, base = values[1][row["name"]], values[0][row["name"]]
        expected = None if None in (ours, base) else pytest.approx(ours - base)
        assert row["value"] == expected
    shown = capsys.readouterr().out
    assert "less generated/video_dev" in shown
    assert "numbers of clips differ (generated/video_dev 3, true/video_dev 5)" in shown
    page = (tmp_path / "comparison.html").read_text()
    assert "Comparison" in page
    assert "undecided" in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"compare": "a"}, "--compare a: need two or more different folders"),
        ({"compare": "a,a"}, "need two or more different folders"),
        ({"compare": "a, ./a/"}, "need two or more different folders"),
        ({"samples_path": "x"}, "--compare and --samples_path x: of one run only"),
        ({"boxes_dir": "x"}, "--compare and --boxes_dir x: of one run only"),
        ({"output_dir": ""}, "--compare: give --output_dir"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        EvalConfig(**{"compare": "a,b", "output_dir": "out", **change})


# ---------------------------------------------------------------- I3D


def test_too_few_frames_for_the_published_i3d_are_refused_before_any_clip_is_read(
    clips,  # noqa: F811
    i3d_path,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setattr("mm_diffusion.evaluation.evaluate.compute_all", pytest.fail)
    flags = flags_of(clips, boxes_dir="", events_dir="", i3d_path=str(i3d_path))
    with pytest.raises(ValueError, match=r"I3D needs at least 9 frames \(got 8\)"):
        report_on(flags)
    with pytest.raises(ValueError, match=r"at least 9 frames \(got 6\)"):
        report_on({**flags, "i3d_fps": 3})


def test_sampling_refuses_too_few_frames_for_i3d_before_it_generates(
    clips,  # noqa: F811
    i3d_path,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    base, _ = saved(tmp_path)
    out = tmp_path / "out"
    more = ["--ref_path", str(clips / "true/video_dev"), "--i3d_path", str(i3d_path)]
    with pytest.raises(ValueError, match=r"I3D needs at least 9 frames \(got 4\)"):
        sample(out, monkeypatch, *flags_for(base, "", out, *more))
    assert not out.exists()


# ---------------------------------------------------------------- the report and its page


@pytest.fixture
def evaluated(clips, networks, tmp_path):  # noqa: F811
    """A folder with a gallery, and the report on clips below it that has its own folder."""
    folder = tmp_path / "run"
    for kind in ("video", "metadata"):
        shutil.copytree(clips / f"generated/{kind}_dev", folder / f"{kind}_dev")
    shutil.copy(clips / "true/video_dev/toy_00000.mp4", folder / "video_dev/a copy #1.mp4")
    gallery.write_gallery(folder)
    samples = str(folder / "video_dev")
    report = report_on(
        flags_of(clips, **networks, samples_path=samples, boxes_dir="", events_dir="")
    )
    path = report.save(str(tmp_path / "report"))
    return report, path, metrics_page.write_metrics_page(path)


def test_reports_follow_the_schema_and_others_do_not(evaluated, clips):  # noqa: F811
    held = json.loads(Path(evaluated[1]).read_text())
    check_schema(held)
    alone = report_on({"samples_path": str(clips / "generated/video_dev"), "bootstrap_draws": 0})
    check_schema(json.loads(json.dumps(alone.as_json())))
    held["scores"][0]["interval"] = [0]
    with pytest.raises(jsonschema.ValidationError):
        check_schema(held)


def test_values_of_clips_stand_beside_their_places(evaluated):
    report, _, _ = evaluated
    assert {len(values) for values in report.clip_values.values()} == {len(report.clips)}
    (number,) = [k for k, clip in enumerate(report.clips) if "copy" in clip["path"]]
    assert report.clip_values[scores.NEAREST][number] == 0
    (first, *_) = report.memorisation["pairs"]
    assert first["sample"] == report.clips[number]
    assert first["reference"]["path"].endswith("true/video_dev/toy_00000.mp4")
    assert first["distance"] == 0 <= report.memorisation["threshold"]
    values = report.clip_values[scores.CORRELATION]
    mean = sum(values) / len(values)
    assert mean == pytest.approx({s.name: s.value for s in report.scores}[scores.CORRELATION])


def test_a_page_without_a_reference_and_of_silence_has_no_empty_parts(tmp_path):
    video, audio = noise(8, 3, 32, 32).float().clamp(-1, 1), th.zeros(2, 8000)
    folder = written(tmp_path / "clips", "a", video, audio)
    report = report_on({"samples_path": folder, "bootstrap_draws": 0})
    page = metrics_page.render(json.loads(json.dumps(report.as_json())), folder)
    assert "Nearest pairs" not in page
    assert "<path" not in page
    assert "all clips are silent" in page


def test_bars_are_in_proportion_and_within_the_axis():
    bars = [
        {"label": "a", "value": 2.0, "interval": [1.0, 3.0]},
        {"label": "b", "value": None, "interval": None},
        {"label": "c", "value": 5.0, "interval": None},
    ]
    first, second = metrics_page._placed(bars)
    value, low, high = first["places"]
    assert 0 < low < value < high < second["places"][0] < 100
    assert value - low == pytest.approx(high - value, abs=0.02)
    assert second["places"][0] - low == pytest.approx(4 * (value - low), abs=0.05)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


LOADED = """new Promise(done => document.readyState === 'complete' ? done()
    : addEventListener('load', done))"""


@needs_chromium
def test_the_page_shows_every_score_and_its_links_lead_to_clips_in_the_gallery(evaluated, browser):
    report, _, page = evaluated
    browser.open(Path(page))
    heads = "document.querySelectorAll('#scores tbody th')"
    names = browser.run(f"[...{heads}].map(head => head.textContent)")
    assert names == [score.name for score in report.scores]
    text = browser.run("document.body.innerText")
    for score in report.scores:
        assert metrics_page.cell(score.value) in text
    paths = "document.querySelectorAll('figure path')"
    widths = browser.run(f"[...{paths}].map(path => path.getBBox().width)")
    assert widths == pytest.approx([1000] * 4, abs=1)
    duration = browser.run("""(async () => {
        const videos = [...document.querySelectorAll('.pair video')];
        for (const video of videos) if (!video.readyState)
            await new Promise(done => video.addEventListener('loadedmetadata', done));
        return videos.map(video => video.duration);
    })()""")
    assert duration == pytest.approx([2] * 6, abs=0.1)
    assert "memorised" in browser.run("document.querySelector('.pair header').innerText")
    link = browser.run("""[...document.querySelectorAll('.card td a')].find(
        link => link.textContent.endsWith('a copy #1.mp4')).href""")
    browser.call("Page.navigate", url=link)
    browser.run(LOADED)
    found = browser.run("[document.title, document.querySelector(':target h2').textContent]")
    assert found == ["run: 4 clips", "video_dev/a copy #1"]


@needs_chromium
def test_every_image_and_video_of_the_page_has_an_accessible_name(evaluated, browser):
    browser.open(Path(evaluated[2]))
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "image", "Video", "img"}
    used = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(used) > 10
    assert all(node["name"]["value"] for node in used)


def test_names_of_clips_are_text_on_the_page_and_escaped_in_its_links(tmp_path):
    place = {"path": str(tmp_path / "<b>&#'\" x.mp4"), "start": 2.0}
    link = metrics_page.link(place, str(tmp_path / "report"))
    assert link["href"] == "../%3Cb%3E%26%23%27%22%20x.mp4#t=2"
    assert link["name"] == f"{place['path']} at 2 s"
    remote = metrics_page.link(place, "gs://bucket/report")
    assert remote["href"].startswith("file:///")
    there = {"path": "gs://bucket/x.mp4", "start": 2.0}
    for folder in ("gs://bucket/report", str(tmp_path)):
        assert metrics_page.link(there, folder)["href"] == "gs://bucket/x.mp4#t=2"
