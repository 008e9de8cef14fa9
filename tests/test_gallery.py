"""The gallery: what it measures and draws, what the page shows in a browser, what it reports."""

import dataclasses
import html.parser
import json
import math
import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import tiny
import torch as th
from chromium import chromium, find_chromium
from media_files import MEDIA, make_clip, make_resized_video, noise, real_media

from mm_diffusion.config import DataConfig, TrainConfig
from mm_diffusion.data import encode, images
from mm_diffusion.dist_util import World
from mm_diffusion.evaluation import scores, stereo
from mm_diffusion.generation import previews
from mm_diffusion.generation.output import ClipFormat, GalleryDrawer, show_gallery, write_sample
from mm_diffusion.viewing import gallery, measures
from mm_diffusion.viewing import spectrogram as spectrograms

SCRIPT = Path(__file__).parents[1] / "py_scripts/gallery.py"
RATE, FRAMES, FPS = 8000, 8, 4
ODD_NAME = "a <b>&'\"#% é.mp4"
needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium here: apt-get install chromium"
)


def moving(places: list[float], side: int = 32) -> th.Tensor:
    """A bright bar at each position in 0..1 -> [F, 3, side, side] in [-1, 1]."""
    x = (th.arange(side) + 0.5) / side
    rows = th.stack([th.exp(-(((x - place) * 10) ** 2)) for place in places])
    return (1.8 * rows - 0.9)[:, None, None, :].expand(-1, 3, side, -1).contiguous()


def panned(places: list[float], seconds: float = FRAMES / FPS, rate: int = RATE) -> th.Tensor:
    """A tone that is panned to each position in turn -> [2, L]."""
    count = int(seconds * rate)
    place = th.tensor(places)[(th.arange(count) * len(places) // count)]
    tone = 0.5 * th.sin(2 * math.pi * 440 * th.arange(count) / rate)
    return th.stack([tone * (1 - place).sqrt(), tone * place.sqrt()])


RIGHT_AND_BACK = [0.1, 0.3, 0.5, 0.7, 0.9, 0.7, 0.5, 0.3]
MIRRORED = [1 - place for place in RIGHT_AND_BACK]


def write(path: Path, video=None, audio=None) -> Path:
    """Write a clip as sampling does."""
    video, audio = (
        moving(RIGHT_AND_BACK) if video is None else video,
        panned(RIGHT_AND_BACK) if audio is None else audio,
    )
    encode.write_clip(path, video, FPS, audio, RATE)
    return path


class Reader(html.parser.HTMLParser):
    """A page: its text, the files that it refers to, the rows of its tables, and its clips.

    A clip is the attributes of its element, with those of its player, images and paths by class
    or tag.
    """

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text, self.files, self.data, self.table = [], [], [], []
        self.cell = False
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        held = dict(attributes)
        self.files += [held[key] for key in ("src", "data-poster") if key in held]
        self.files += [held["href"]] if tag == "a" and not held["href"].startswith("#") else []
        self.data += [held] if held.get("class") == "clip" else []
        if self.data and tag in ("video", "img", "path"):
            self.data[-1].setdefault(held.get("class", tag), held)
        self.table += [[]] if tag == "tr" else []
        self.cell = tag in ("th", "td")

    def handle_data(self, data):
        self.text.append(data)
        if self.cell:
            self.table[-1].append(data)
            self.cell = False


# ---------------------------------------------------------------- measures


def test_audio_that_follows_the_object_is_aligned_and_its_mirror_image_is_opposed():
    same, mirrored = (
        measures.measure(moving(RIGHT_AND_BACK), panned(places))["alignment"]
        for places in (RIGHT_AND_BACK, MIRRORED)
    )
    assert same == pytest.approx(1, abs=0.02)
    assert mirrored == pytest.approx(-same, abs=1e-6)


def test_scores_have_their_closed_forms():
    count = 2 * RATE
    tone = th.sin(2 * math.pi * 440 * th.arange(count) / RATE)
    found = measures.measure(moving([0.5] * FRAMES), th.stack([tone / 2, -tone / 4]))
    assert found["level"] == pytest.approx(10 * math.log10((1 / 8 + 1 / 32) / 2), abs=1e-3)
    assert found["balance"] == pytest.approx((1 / 16 - 1 / 4) / (1 / 16 + 1 / 4), abs=1e-5)
    assert found["correlation"] == pytest.approx(-1, abs=1e-5)
    assert found["motion"] == 0
    blinking = th.tensor([-1.0, 1.0])[th.arange(FRAMES) % 2].view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    assert measures.measure(blinking, th.stack([tone, tone]))["motion"] == pytest.approx(100)


SILENCE = th.zeros(2, 2 * RATE)
NOTHING = {
    "silent": (moving(RIGHT_AND_BACK), SILENCE, {"alignment", "level", "correlation", "balance"}),
    "black": (-th.ones(FRAMES, 3, 32, 32), panned(RIGHT_AND_BACK), {"alignment"}),
    "grey": (th.zeros(FRAMES, 3, 32, 32), panned(RIGHT_AND_BACK), {"alignment"}),
    "still": (moving([0.3] * FRAMES), panned(RIGHT_AND_BACK), {"alignment"}),
    "mono": (moving(RIGHT_AND_BACK), panned([0.5] * FRAMES), {"alignment"}),
    "one side": (moving(RIGHT_AND_BACK), panned([0.0] * FRAMES), {"alignment", "correlation"}),
    "one frame": (moving([0.3]), panned([0.3]), {"alignment", "motion"}),
    "one sample": (
        moving([0.3]),
        panned([0.3])[:, 101:102],
        {"alignment", "motion", "correlation"},
    ),
}


@pytest.mark.parametrize("name", NOTHING)
def test_an_undefined_score_is_a_reason_and_the_others_are_finite(name):
    video, audio, without = NOTHING[name]
    found = measures.measure(video, audio)
    assert {key for key, value in found.items() if isinstance(value, str)} == without
    assert all(found[key] for key in without)
    assert all(math.isfinite(value) for key, value in found.items() if key not in without)
    assert set(found) == set(measures.SCORES)


def test_the_correlation_of_the_channels_is_pearsons():
    left, right = th.randn(2, 1000, generator=th.Generator().manual_seed(0)) / 9
    audio = th.stack([left, 0.6 * left + 0.8 * right + 0.1])
    expected = np.corrcoef(audio.double().numpy())[0, 1]
    assert measures.measure(moving(RIGHT_AND_BACK), audio)["correlation"] == pytest.approx(
        expected, abs=1e-9
    )


@pytest.mark.parametrize(("factor", "silent"), [(0.99, True), (1.01, False)])
def test_silence_is_that_of_the_metrics(factor, silent):
    audio = factor * stereo.SILENT * th.tensor([1.0, -1.0]).repeat(2, RATE)
    assert (measures.measure(moving(RIGHT_AND_BACK), audio)["level"] == "silent") == silent
    assert bool(stereo.is_audible(audio[None])) != silent
    localised = measures.positions(moving(RIGHT_AND_BACK), audio)[1]
    assert localised == [None if silent else pytest.approx(0, abs=1e-4)] * FRAMES


@pytest.mark.parametrize(("above", "reason"), [(-0.005, "black"), (0.005, "no object stands out")])
def test_black_is_that_of_the_metrics(above, reason):
    video = th.full((FRAMES, 3, 16, 16), scores.BLACK + above)
    assert measures.measure(video, panned(RIGHT_AND_BACK))["alignment"] == reason


def test_positions_run_from_left_to_right_with_gaps_where_nothing_is_detected():
    video, audio = moving(RIGHT_AND_BACK), panned(RIGHT_AND_BACK)
    video[2], audio[:, 3 * RATE // 4 : RATE] = -1, 0
    object_positions, audio_positions = measures.positions(video, audio)
    assert [k for k, position in enumerate(object_positions) if position is None] == [2]
    assert [k for k, position in enumerate(audio_positions) if position is None] == [3]
    for k, place in enumerate(RIGHT_AND_BACK):
        expected = 2 * place - 1
        assert k == 2 or object_positions[k] == pytest.approx(expected, abs=0.1)
        assert k == 3 or audio_positions[k] == pytest.approx(expected, abs=0.01)


# ---------------------------------------------------------------- images


def test_a_path_breaks_at_gaps_and_shows_single_points():
    assert gallery.svg_path([]) == gallery.svg_path([None, None]) == ""
    path = gallery.svg_path([-1, 1, None, 0, None])
    assert points(path) == [(100, 2), (300, 98), (700, 50)]
    assert re.sub(r"[\d. ]+", "", path) == "MhLMh"


@pytest.mark.parametrize("hz", [250, 1000, 3000])
def test_a_tone_is_in_its_channel_at_its_frequency(hz):
    tone = th.sin(2 * math.pi * hz * th.arange(2 * RATE) / RATE)
    image = spectrograms.spectrogram(th.stack([tone, tone * 0]), RATE).sum(0).double()
    rows = (len(image) - 1) // 2
    left, right = image[:rows], image[-rows:]
    assert left.mean(1).argmax().item() == pytest.approx(
        rows * (1 - spectrograms.mel_height(hz, RATE / 2)), abs=1.5
    )
    assert right.max() < left.max() / 4


def test_frequencies_are_at_equal_steps_of_the_mel_scale():
    mels = [2595 * math.log10(1 + hz / 700) for hz in (0, 250, 1000, 4000)]
    for hz, mel in zip((0, 250, 1000, 4000), mels, strict=True):
        assert spectrograms.mel_height(hz, 4000) == pytest.approx(mel / mels[-1])


def test_white_noise_is_equally_bright_at_all_frequencies():
    noise = th.randn(2, 60 * RATE, generator=th.Generator().manual_seed(0)) / 9
    brightness = spectrograms.spectrogram(noise, RATE).sum(0).double().mean(1)
    assert brightness[2:-2].std() < 0.05 * brightness.mean()


@pytest.mark.parametrize(
    ("count", "rate"), [(1, 8), (50, 512), (1024, 512), (16000, 16000), (3, 96000)]
)
def test_a_spectrogram_is_drawn_of_any_length_and_rate(count, rate):
    image = spectrograms.spectrogram(th.zeros(2, count), rate)
    assert image.dtype == th.uint8
    assert image.shape[0] == 3
    assert image.shape[1] <= 2 * spectrograms.MAX_ROWS + 1
    assert image.shape[2] <= spectrograms.MAX_COLUMNS


def test_a_strip_shows_frames_in_the_middle_of_equal_spans():
    frames = th.arange(40, dtype=th.uint8).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)
    shown = gallery.strip(frames)[0, 0, ::64].tolist()
    assert shown == [2, 6, 10, 14, 18, 22, 26, 30, 34, 38]
    assert gallery.strip(frames[:3])[0, 0, ::64].tolist() == [0, 1, 2]


# ---------------------------------------------------------------- a folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A folder with clips of every kind, corrupt ones too, and its page."""
    root = tmp_path_factory.mktemp("mixed")
    write(root / "sub/aligned.mp4")
    write(root / "sub/mirrored.mp4", audio=panned(MIRRORED))
    write(
        root / ODD_NAME,
        video=moving(RIGHT_AND_BACK[:5], side=48),
        audio=panned(RIGHT_AND_BACK[:5], 5 / FPS),
    )
    write(root / "silent.mp4", audio=SILENCE)
    write(root / "black.mp4", video=-th.ones(FRAMES, 3, 16, 16))
    write(root / "single.mp4", video=moving([0.5]), audio=panned([0.5], 1 / FPS))
    make_clip(root / "mono.mkv", np.full((20, 32, 48, 3), 90, np.uint8), 10, noise(32000, 1), 16000)
    (root / "broken.mp4").write_bytes(b"no video")
    (root / "empty.mp4").touch()
    (root / "scores.json").write_text(
        json.dumps(
            {
                "sub/aligned.mp4": {"good": 3},
                "mirrored": {"good": 5, "odd": None},
                "silent": {"level": 7},
            }
        )
    )
    gallery.write_gallery(root)
    return root


def test_every_file_that_the_page_refers_to_exists(mixed):
    files = Reader(mixed / "index.html").files
    assert len(files) == 7 * 4 + 1
    assert all((mixed / unquote(file)).is_file() for file in files)
    assert not any(":" in file or file.startswith("/") for file in files)


def test_the_page_shows_reasons_instead_of_undefined_scores(mixed):
    text = " ".join(Reader(mixed / "index.html").text)
    page = (mixed / "index.html").read_text()
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None)\b", page.split("<script>")[0])
    for words in (
        "none: silent",
        "black",
        "none: one frame",
        "mono",
        "browsers play no .mkv files",
        "none: undefined",
    ):
        assert words in text
    for reason in ("broken.mp4", "cannot be decoded", "empty.mp4", "is empty"):
        assert reason in text.split("2 files cannot be shown")[1]
    assert "<b>" not in page


def test_names_are_shown_as_they_are(mixed):
    names = [row["data-name"] for row in Reader(mixed / "index.html").data]
    assert os.path.splitext(ODD_NAME)[0] in names
    assert "sub/aligned" in names


def read_clips(page: Path) -> dict[str, dict[str, Any]]:
    return {row["data-name"]: row for row in Reader(page).data}


def points(path: str) -> list[tuple[float, float]]:
    return [tuple(map(float, point)) for point in re.findall(r"[ML](\S+) ([\d.]+)", path)]


def test_the_paths_of_a_clip_are_the_positions_of_its_object_and_its_audio(mixed):
    clip = read_clips(mixed / "index.html")["sub/mirrored"]
    for kind, places, tolerance in (("object", RIGHT_AND_BACK, 5), ("audio", MIRRORED, 2)):
        drawn = points(clip[kind]["d"])
        assert [x for x, _ in drawn] == pytest.approx(
            [1000 * (k + 0.5) / FRAMES for k in range(FRAMES)], abs=1
        )
        assert [y for _, y in drawn] == pytest.approx(
            [50 + 48 * (2 * place - 1) for place in places], abs=tolerance
        )


def test_the_images_of_a_clip_are_its_frames_its_poster_and_its_spectrograms(mixed):
    clip = read_clips(mixed / "index.html")["sub/aligned"]
    sources = clip["strip"]["src"], clip["video"]["data-poster"], clip["spectrogram"]["src"]
    strip, poster, spectrogram = (images.read_image(mixed / source) for source in sources)
    assert len(set(sources)) == 3
    assert strip.shape == (3, 64, FRAMES * 64)
    for image, place in zip(
        [*strip.chunk(FRAMES, dim=-1), poster],
        [*RIGHT_AND_BACK, RIGHT_AND_BACK[FRAMES // 2]],
        strict=True,
    ):
        assert image.double().mean((0, 1)).argmax().item() == pytest.approx(64 * place, abs=3)
    assert spectrogram.shape[1] == 2 * spectrograms.MAX_ROWS + 1


def test_players_and_images_are_loaded_lazily(mixed):
    for clip in read_clips(mixed / "index.html").values():
        assert clip["video"]["preload"] == "none"
        assert "poster" not in clip["video"]
        assert clip["strip"]["loading"] == clip["spectrogram"]["loading"] == "lazy"


def test_the_table_has_the_median_of_each_score_and_the_number_of_clips_without_it(mixed):
    page = Reader(mixed / "index.html")
    header, *rows = (row for row in page.table if len(row) == 3)
    found = {label: (median, int(missing)) for label, median, missing in rows}
    held = [json.loads(row["data-scores"]) for row in page.data]
    for key, score in measures.SCORES.items():
        values = sorted(row[key] for row in held if key in row)
        middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        assert found[score.label] == (score.form.format(middle), 7 - len(values))
    assert header == ["Score", "Median", "Clips without"]
    assert found["good"] == ("4", 5)
    assert found["level"] == ("7", 6)
    assert found["odd"] == ("no values", 7)


def test_a_second_table_has_the_medians_of_each_folder(mixed, tmp_path):
    page = Reader(mixed / "index.html")
    header, top, sub = (row for row in page.table if len(row) > 3)
    assert header == [
        "Median in",
        *(score.label for score in measures.SCORES.values()),
        "level",
        "good",
        "odd",
    ]
    aligned = [
        json.loads(row["data-scores"])["alignment"]
        for row in page.data
        if row["data-folder"] == "sub"
    ]
    assert sub[:2] == ["sub", measures.SCORES["alignment"].form.format(sum(aligned) / 2)]
    assert sub[-3:] == ["no values", "4", "no values"]
    assert top[0] == "(top)"
    assert top[-3:] == ["7", "no values", "no values"]
    write(tmp_path / "alone.mp4")
    assert not [row for row in Reader(gallery.write_gallery(tmp_path)).table if len(row) > 3]


def test_scores_from_a_file_find_their_clips_and_do_not_replace_measured_ones(mixed):
    rows = {
        row["data-name"]: json.loads(row["data-scores"])
        for row in Reader(mixed / "index.html").data
    }
    assert rows["sub/aligned"]["file: good"] == 3
    assert rows["sub/mirrored"]["file: good"] == 5
    assert rows["silent"] == {"file: level": 7, "motion": rows["silent"]["motion"]}
    assert rows["sub/aligned"]["alignment"] == pytest.approx(1, abs=0.05)
    assert rows["sub/mirrored"]["alignment"] == pytest.approx(
        -rows["sub/aligned"]["alignment"], abs=0.01
    )


def test_clips_of_one_name_are_neighbours_and_numbers_are_sorted_by_value(tmp_path):
    clip = write(tmp_path / "original/clip_2.mp4")
    names = [f"{kind}/clip_{k}" for k in (2, 10) for kind in ("ground_truth", "original", "sr_mp4")]
    for name in names:
        path = tmp_path / f"{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            os.link(clip, path)
    assert [row["data-name"] for row in Reader(gallery.write_gallery(tmp_path)).data] == names


def test_the_contact_sheet_has_a_row_for_every_clip(mixed):
    sheet = images.read_image(mixed / "gallery" / gallery.SHEET)
    assert sheet.shape == (
        3,
        7 * (gallery.SHEET_SIDE + 2) + 2,
        gallery.SHEET_FRAMES * (gallery.SHEET_SIDE + 2) + 2,
    )


def image_times(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in root.glob("gallery/*.jpg")}


def test_only_clips_that_are_new_or_have_changed_are_decoded_again(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4")
    write(tmp_path / "b.mp4")
    gallery.write_gallery(tmp_path)
    before = image_times(tmp_path)
    write(tmp_path / "b.mp4", video=moving(MIRRORED), audio=SILENCE)
    write(tmp_path / "c.mp4")
    decoded = []

    def examine(path: str, *args, **options) -> gallery.Clip:
        decoded.append(Path(path).name)
        return original(path, *args, **options)

    original = gallery.examine
    monkeypatch.setattr(gallery, "examine", examine)
    gallery.write_gallery(tmp_path)
    after = image_times(tmp_path)
    assert sorted(decoded) == ["b.mp4", "c.mp4"]
    assert len(before) == 6
    assert sum(after[name] == time for name, time in before.items()) == 3
    assert len(after) == 9
    assert "none: silent" in " ".join(Reader(tmp_path / "index.html").text)


def test_a_clip_replaced_by_an_older_file_is_decoded_again(tmp_path):
    write(tmp_path / "a.mp4")
    gallery.write_gallery(tmp_path)
    write(tmp_path / "a.mp4", audio=SILENCE)
    os.utime(tmp_path / "a.mp4", (0, 0))
    page = Reader(gallery.write_gallery(tmp_path))
    assert "none: silent" in " ".join(page.text)


@pytest.mark.parametrize("kind", gallery.KINDS)
def test_a_missing_image_is_drawn_again_and_no_other(kind, tmp_path):
    write(tmp_path / "a.mp4")
    write(tmp_path / "b.mp4", audio=panned(MIRRORED))
    gallery.write_gallery(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("gallery/*.jpg")}
    lost, kept = sorted(tmp_path.glob(f"gallery/*_{kind}.jpg"))
    lost.unlink()
    time = kept.stat().st_mtime_ns
    gallery.write_gallery(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("gallery/*.jpg")} == before
    assert kept.stat().st_mtime_ns == time


def show(monkeypatch, capsys, *args: str | Path) -> tuple[int, str]:
    """Run the script -> its exit status and its output."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
    status = 0
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        status = int(end.code or 0)
    output = capsys.readouterr()
    return status, output.err if status else output.out


def test_frames_that_change_their_size_are_shown_at_that_of_the_first(tmp_path):
    path = tmp_path / "resized.avi"
    make_resized_video(path, [(64, 64)] * 10 + [(64, 32)] * 10, 10, noise(32000, 2), 16000)
    page = Reader(gallery.write_gallery(tmp_path))
    assert [row["data-name"] for row in page.data] == ["resized"]
    first, *_, last = images.read_image(tmp_path / page.data[0]["strip"]["src"]).chunk(
        gallery.STRIP_FRAMES, dim=-1
    )
    assert first.shape == last.shape


def test_a_preview_that_is_not_finite_is_reported_and_training_continues(tmp_path, capsys):
    preview(tmp_path, 1, broken=True)
    assert "no preview at step 1" in capsys.readouterr().out
    assert not list(tmp_path.glob("samples/*/*.mp4"))


def test_the_script_prints_the_path_of_the_page(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a.mp4")
    status, output = show(monkeypatch, capsys, tmp_path)
    assert (status, output.strip()) == (0, f"gallery: {tmp_path / 'index.html'}")
    assert (tmp_path / "index.html").is_file()


def test_the_script_reads_scores_from_the_file_of_its_flag(tmp_path, monkeypatch, capsys):
    write(tmp_path / "clips/a.mp4")
    (tmp_path / "clips/scores.json").write_text('{"a": {"here": 1}}')
    (tmp_path / "mine.json").write_text('{"a": {"mine": 2}}')
    status, _ = show(monkeypatch, capsys, tmp_path / "clips", "--scores", tmp_path / "mine.json")
    found = json.loads(read_clips(tmp_path / "clips/index.html")["a"]["data-scores"])
    assert status == 0
    assert {key: value for key, value in found.items() if key.startswith("file: ")} == {
        "file: mine": 2
    }


@pytest.mark.parametrize("seconds", [60, 62])
def test_a_minute_of_a_long_clip_is_shown_with_a_note(seconds, tmp_path):
    video = moving([k / seconds for k in range(seconds)])
    encode.write_clip(tmp_path / "a.mp4", video, 1, panned([0.5], seconds), RATE)
    page = Reader(gallery.write_gallery(tmp_path))
    assert ("only the first 60 s are shown" in " ".join(page.text)) == (seconds > 60)
    assert float(page.data[0]["data-seconds"]) == pytest.approx(60, abs=0.1)
    assert len(points(page.data[0]["object"]["d"])) == 60


REFUSED = {
    "holds no clips": lambda root: (root / "a.mp4").unlink(),
    "none of its 1 files": lambda root: (root / "a.mp4").write_bytes(b"no video"),
    "cannot be read as JSON": lambda root: (root / "scores.json").write_text("{"),
    "need {": lambda root: (root / "scores.json").write_text('{"a": 1}'),
    "is 'high', need a number": lambda root: (root / "scores.json").write_text(
        '{"a": {"x": "high"}}'
    ),
    "names none of the 1 clips": lambda root: (root / "scores.json").write_text('{"b": {"x": 1}}'),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_folder_or_scores_file_that_cannot_be_used_is_an_error_in_one_line(
    words, tmp_path, monkeypatch, capsys
):
    write(tmp_path / "a.mp4")
    REFUSED[words](tmp_path)
    status, output = show(monkeypatch, capsys, tmp_path)
    assert status == 1
    line = output.strip().splitlines()[-1].split("\r")[-1]
    assert line.startswith("error: ")
    assert words in line
    assert str(tmp_path) in line


@real_media
def test_real_clips_are_shown_with_every_score(tmp_path):
    names = ["big_buck_bunny_0_30", "nasa_13013"]
    for path in filter(Path.is_file, MEDIA.iterdir()):
        (tmp_path / path.name).symlink_to(path)
    page = Reader(gallery.write_gallery(tmp_path))
    assert [row["data-name"] for row in page.data] == names
    assert "cannot be shown" not in " ".join(page.text)
    for row in page.data:
        found = json.loads(row["data-scores"])
        assert set(found) == set(measures.SCORES)
        assert -1 <= found["alignment"] <= 1
        assert -60 < found["level"] < 0
        assert found["motion"] > 0
        assert points(row["object"]["d"])
        assert points(row["audio"]["d"])
    assert all((tmp_path / unquote(file)).is_file() for file in page.files)


# ---------------------------------------------------------------- beside training


def preview(folder: Path, step: int, broken: bool = False) -> None:
    """Write the previews of a training step with a small model; if broken, its weights are NaN."""
    model, diffusion = tiny.build()
    if broken:
        th.nn.init.constant_(next(model.parameters()), math.nan)
    data = DataConfig(video_fps=FPS, audio_fps=RATE)
    config = TrainConfig(output_dir=str(folder))
    previews.make_preview(diffusion, config, data, World())(model, step)
    for child in multiprocessing.active_children():  # draws the gallery
        child.join()


def test_previews_of_all_steps_are_on_one_page(tmp_path):
    for step in (1, 20):
        preview(tmp_path, step)
    folders = [row["data-folder"] for row in Reader(tmp_path / "samples/index.html").data]
    assert folders == ["000001", "000020"]


def test_a_page_that_cannot_be_written_is_reported_and_the_run_continues(tmp_path, capsys):
    clip = tiny.clips(0, 1)
    write_sample(tmp_path, "a", clip["video"][0], clip["audio"][0], ClipFormat(FPS, RATE))
    (tmp_path / "index.html").mkdir()
    show_gallery(str(tmp_path))
    assert "no gallery (" in capsys.readouterr().out


def test_only_eight_ranks_make_previews_and_all_wait_for_them(tmp_path, monkeypatch):
    """Fault: of 64 GPUs each made a clip, and 63 waited while one drew them all."""
    model, diffusion = tiny.build()
    config = TrainConfig(output_dir=str(tmp_path), preview_clips=1)
    waited, made = [], []
    monkeypatch.setattr(previews, "barrier", lambda: waited.append(1))
    nothing = {"video": [], "audio": []}
    monkeypatch.setattr(previews, "sample_joint", lambda *args: made.append(1) or nothing)
    for rank in (7, 8, 63):
        world = World(rank=rank, size=64)
        previews.make_preview(diffusion, config, DataConfig(), world)(model, 1)
    assert (len(made), len(waited)) == (1, 3)


def test_the_gallery_is_drawn_by_another_process_while_clips_are_made(tmp_path):
    """Fault: the clips of a long run were drawn at its end, for half a minute."""
    clip = tiny.clips(0, 1)
    drawer = GalleryDrawer(str(tmp_path))
    write_sample(tmp_path, "a", clip["video"][0], clip["audio"][0], ClipFormat(FPS, RATE))
    drawer.draw_meanwhile()
    first = drawer.process
    drawer.draw_meanwhile()  # busy
    assert drawer.process is first
    assert first.pid != os.getpid()
    drawer.wait()
    assert [*read_clips(tmp_path / "index.html")] == ["original/a"]
    write_sample(tmp_path, "b", clip["video"][0], clip["audio"][0], ClipFormat(FPS, RATE))
    drawer.draw()
    drawer.wait()
    assert [*read_clips(tmp_path / "index.html")] == ["original/a", "original/b"]


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


VISIBLE = "[...document.querySelectorAll('.clip:not([hidden]) h2')].map(h => h.textContent)"


@needs_chromium
def test_a_clip_plays_from_a_local_file_with_audio_and_the_cursor_follows(mixed, browser):
    browser.open(mixed / "index.html")
    played = browser.run("""(async () => {
        const clip = document.querySelector('[data-name="sub/aligned"]');
        const video = clip.querySelector("video"), cursor = clip.querySelector(".now");
        const before = [video.readyState, getComputedStyle(cursor).visibility];
        await video.play();
        await new Promise(done => video.addEventListener("ended", done));
        return {before, time: video.currentTime, size: [video.videoWidth, video.videoHeight],
            audio: video.webkitAudioDecodedByteCount, now: clip.style.getPropertyValue("--now"),
            error: video.error};
    })()""")
    assert played["before"] == [0, "hidden"]
    assert played["error"] is None
    assert played["time"] == pytest.approx(FRAMES / FPS, abs=0.05)
    assert played["size"] == [32, 32]
    assert played["audio"] > 0
    assert float(played["now"]) == pytest.approx(1, abs=0.05)


@needs_chromium
def test_clips_are_sorted_and_filtered_by_keyboard(mixed, browser):
    browser.open(mixed / "index.html")
    shown = browser.run("""[...document.querySelectorAll(".clip")].map(clip => [clip.dataset.name,
        [...clip.querySelectorAll("dt")].map(
            dt => [dt.textContent, dt.nextElementSibling.textContent])])""")
    rows = {name: dict(pairs) for name, pairs in shown}
    assert float(rows["sub/aligned"]["Spatial alignment"]) == pytest.approx(1, abs=0.05)
    assert float(rows["sub/mirrored"]["Spatial alignment"]) == pytest.approx(-1, abs=0.05)
    assert rows["silent"]["Balance"] == "none: silent"
    by_name = [row["data-name"] for row in Reader(mixed / "index.html").data]
    assert browser.run(VISIBLE) == by_name
    browser.run("document.getElementById('sort').focus()")
    browser.key("S", 83, "S")  # types ahead to "Spatial alignment"
    assert browser.run("document.getElementById('sort').value") == "alignment"
    upwards = browser.run(VISIBLE)
    assert upwards[0] == "sub/mirrored"
    browser.key("Tab", 9)
    browser.key("Enter", 13, "\r")
    assert browser.run("document.activeElement.ariaPressed") == "true"
    measured, without = browser.run(VISIBLE)[:3], browser.run(VISIBLE)[3:]
    assert measured == upwards[:3][::-1]
    assert without == upwards[3:] == ["black", "mono", "silent", "single"]
    browser.key("Tab", 9)
    for letter in "mirr":
        browser.key(letter, ord(letter.upper()), letter)
    assert browser.run(VISIBLE) == ["sub/mirrored"]
    assert browser.run("document.getElementById('status').textContent") == "1 of 7 shown"


@needs_chromium
def test_every_control_and_image_has_an_accessible_name(mixed, browser):
    browser.open(mixed / "index.html")
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"combobox", "button", "searchbox", "link", "image", "Video", "img"}
    used = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(used) > 10
    assert all(node["name"]["value"] for node in used)


@needs_chromium
def test_the_files_of_a_thousand_clips_are_fetched_only_when_near(mixed, browser, tmp_path):
    path = mixed / "sub/aligned.mp4"
    folder = tmp_path / "gallery"
    clip = gallery.examine(str(path), folder, stem="clip")
    clips = {}
    for k in range(1000):
        files = {kind: f"{k}_{kind}.jpg" for kind in clip.images}
        for kind, name in files.items():
            os.link(folder / clip.images[kind], folder / name)
        clips[f"{k:04d}.mp4"] = dataclasses.replace(clip, images=files)
        os.link(path, tmp_path / f"{k:04d}.mp4")
    (tmp_path / "index.html").write_text(gallery.render("many", clips, extra={}, bad={}))
    browser.open(tmp_path / "index.html")
    counts = browser.run("""({clips: document.querySelectorAll(".clip").length,
        images: [...document.images].filter(image => image.complete && image.naturalWidth).length,
        posters: document.querySelectorAll("video[poster]").length,
        videos: [...document.querySelectorAll("video")].filter(v => v.readyState).length})""")
    assert counts["clips"] == 1000
    assert 2 <= counts["images"] < 100
    assert counts["posters"] < 50
    assert counts["videos"] == 0
