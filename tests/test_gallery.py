"""The page of clips: what it measures, draws, shows in a browser, and says where there is nothing to show."""

import dataclasses
import html.parser
import json
import math
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import tiny
import torch as th
from chromium import chromium, find_chromium
from media_files import MEDIA, make_clip, make_resized_film, noise, real_media

from mm_diffusion.data import encode, images
from mm_diffusion.dist_util import World
from mm_diffusion.evaluation import scores, stereo
from mm_diffusion.generation import previews
from mm_diffusion.script_util import DataConfig
from mm_diffusion.viewing import gallery

SCRIPT = Path(__file__).parents[1] / "py_scripts/gallery.py"
RATE, FRAMES, FPS = 8000, 8, 4
ODD_NAME = "a <b>&'\"#% é.mp4"
needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium here: apt-get install chromium"
)


def moving(places: list[float], side: int = 32) -> th.Tensor:
    """A bright bar at each place in 0..1 -> [F, 3, side, side] in [-1, 1]."""
    x = (th.arange(side) + 0.5) / side
    rows = th.stack([th.exp(-(((x - place) * 10) ** 2)) for place in places])
    return (1.8 * rows - 0.9)[:, None, None, :].expand(-1, 3, side, -1).contiguous()


def panned(places: list[float], seconds: float = FRAMES / FPS, rate: int = RATE) -> th.Tensor:
    """A tone that is panned to each place in turn -> [2, L]."""
    count = int(seconds * rate)
    place = th.tensor(places)[(th.arange(count) * len(places) // count)]
    tone = 0.5 * th.sin(2 * math.pi * 440 * th.arange(count) / rate)
    return th.stack([tone * (1 - place).sqrt(), tone * place.sqrt()])


THERE = [0.1, 0.3, 0.5, 0.7, 0.9, 0.7, 0.5, 0.3]
BACK = [1 - place for place in THERE]


def write(path: Path, video=None, audio=None) -> Path:
    """A clip as sampling writes it."""
    video, audio = (
        moving(THERE) if video is None else video,
        panned(THERE) if audio is None else audio,
    )
    encode.write_clip(path, video, FPS, audio, RATE)
    return path


class Reader(html.parser.HTMLParser):
    """What is on a page: its text, the files that it asks for, the rows of its tables, and its clips.

    A clip is the attributes of its element, with those of its player and pictures under their class or else their tag.
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


# ---------------------------------------------------------------- numbers


def test_sound_that_follows_the_object_is_aligned_and_its_mirror_opposed():
    same, mirrored = (
        gallery.measure(moving(THERE), panned(places))["alignment"] for places in (THERE, BACK)
    )
    assert same == pytest.approx(1, abs=0.02)
    assert mirrored == pytest.approx(-same, abs=1e-6)


def test_scores_have_their_closed_forms():
    count = 2 * RATE
    tone = th.sin(2 * math.pi * 440 * th.arange(count) / RATE)
    found = gallery.measure(moving([0.5] * FRAMES), th.stack([tone / 2, -tone / 4]))
    assert found["level"] == pytest.approx(10 * math.log10((1 / 8 + 1 / 32) / 2), abs=1e-3)
    assert found["balance"] == pytest.approx((1 / 16 - 1 / 4) / (1 / 16 + 1 / 4), abs=1e-5)
    assert found["correlation"] == pytest.approx(-1, abs=1e-5)
    assert found["motion"] == 0
    blinking = th.tensor([-1.0, 1.0])[th.arange(FRAMES) % 2].view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    assert gallery.measure(blinking, th.stack([tone, tone]))["motion"] == pytest.approx(100)


SILENCE = th.zeros(2, 2 * RATE)
NOTHING = {
    "silent": (moving(THERE), SILENCE, {"alignment", "level", "correlation", "balance"}),
    "black": (-th.ones(FRAMES, 3, 32, 32), panned(THERE), {"alignment"}),
    "grey": (th.zeros(FRAMES, 3, 32, 32), panned(THERE), {"alignment"}),
    "still": (moving([0.3] * FRAMES), panned(THERE), {"alignment"}),
    "mono": (moving(THERE), panned([0.5] * FRAMES), {"alignment"}),
    "one side": (moving(THERE), panned([0.0] * FRAMES), {"alignment", "correlation"}),
    "one frame": (moving([0.3]), panned([0.3]), {"alignment", "motion"}),
    "one sample": (
        moving([0.3]),
        panned([0.3])[:, 101:102],
        {"alignment", "motion", "correlation"},
    ),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_score_that_does_not_exist_is_words_and_the_others_are_finite(name):
    video, audio, without = NOTHING[name]
    found = gallery.measure(video, audio)
    assert {key for key, value in found.items() if isinstance(value, str)} == without
    assert all(found[key] for key in without)
    assert all(math.isfinite(value) for key, value in found.items() if key not in without)
    assert set(found) == set(gallery.SCORES)


def test_the_correlation_of_the_channels_is_pearsons():
    left, right = th.randn(2, 1000, generator=th.Generator().manual_seed(0)) / 9
    audio = th.stack([left, 0.6 * left + 0.8 * right + 0.1])
    expected = np.corrcoef(audio.double().numpy())[0, 1]
    assert gallery.measure(moving(THERE), audio)["correlation"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("factor", "silent"), [(0.99, True), (1.01, False)])
def test_silence_is_what_the_metrics_call_silence(factor, silent):
    audio = factor * stereo.SILENT * th.tensor([1.0, -1.0]).repeat(2, RATE)
    assert (gallery.measure(moving(THERE), audio)["level"] == "silent") == silent
    assert bool(stereo.is_heard(audio[None])) != silent
    heard = gallery.places(moving(THERE), audio)[1]
    assert heard == [None if silent else pytest.approx(0, abs=1e-4)] * FRAMES


@pytest.mark.parametrize(
    ("above", "reason"), [(-0.005, "black"), (0.005, "nothing stands out in the picture")]
)
def test_black_is_what_the_metrics_call_black(above, reason):
    video = th.full((FRAMES, 3, 16, 16), scores.BLACK + above)
    assert gallery.measure(video, panned(THERE))["alignment"] == reason


def test_places_run_from_left_to_right_with_gaps_where_nothing_is_seen_or_heard():
    video, audio = moving(THERE), panned(THERE)
    video[2], audio[:, 3 * RATE // 4 : RATE] = -1, 0
    seen, heard = gallery.places(video, audio)
    assert [k for k, place in enumerate(seen) if place is None] == [2]
    assert [k for k, place in enumerate(heard) if place is None] == [3]
    for k, place in enumerate(THERE):
        assert seen[k] is None or seen[k] == pytest.approx(2 * place - 1, abs=0.1)
        assert heard[k] is None or heard[k] == pytest.approx(2 * place - 1, abs=0.01)


# ---------------------------------------------------------------- pictures


def test_a_curve_breaks_at_gaps_and_shows_single_points():
    assert gallery.curve([]) == gallery.curve([None, None]) == ""
    path = gallery.curve([-1, 1, None, 0, None])
    assert points(path) == [(100, 2), (300, 98), (700, 50)]
    assert re.sub(r"[\d. ]+", "", path) == "MLMh"


@pytest.mark.parametrize("hz", [250, 1000, 3000])
def test_a_tone_shows_in_its_channel_at_its_frequency(hz):
    tone = th.sin(2 * math.pi * hz * th.arange(2 * RATE) / RATE)
    picture = gallery.spectrogram(th.stack([tone, tone * 0]), RATE).sum(0).double()
    rows = (len(picture) - 1) // 2
    left, right = picture[:rows], picture[-rows:]
    assert left.mean(1).argmax().item() == pytest.approx(
        rows * (1 - gallery.mel_height(hz, RATE / 2)), abs=1.5
    )
    assert right.max() < left.max() / 4


def test_frequencies_are_at_equal_steps_of_the_mel_scale():
    mels = [2595 * math.log10(1 + hz / 700) for hz in (0, 250, 1000, 4000)]
    for hz, mel in zip((0, 250, 1000, 4000), mels, strict=True):
        assert gallery.mel_height(hz, 4000) == pytest.approx(mel / mels[-1])


def test_white_noise_is_equally_bright_at_all_frequencies():
    noise = th.randn(2, 60 * RATE, generator=th.Generator().manual_seed(0)) / 9
    brightness = gallery.spectrogram(noise, RATE).sum(0).double().mean(1)
    assert brightness[2:-2].std() < 0.05 * brightness.mean()


@pytest.mark.parametrize(
    ("count", "rate"), [(1, 8), (50, 512), (1024, 512), (16000, 16000), (3, 96000)]
)
def test_a_spectrogram_is_drawn_of_any_length_and_rate(count, rate):
    picture = gallery.spectrogram(th.zeros(2, count), rate)
    rows, columns = gallery.SPECTROGRAM
    assert picture.dtype == th.uint8
    assert picture.shape[0] == 3
    assert picture.shape[1] <= 2 * rows + 1
    assert picture.shape[2] <= columns


def test_a_strip_shows_frames_in_the_middle_of_equal_spans():
    frames = th.arange(40, dtype=th.uint8).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)
    shown = gallery.strip(frames)[0, 0, ::64].tolist()
    assert shown == [2, 6, 10, 14, 18, 22, 26, 30, 34, 38]
    assert gallery.strip(frames[:3])[0, 0, ::64].tolist() == [0, 1, 2]


# ---------------------------------------------------------------- a folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A folder with clips of every kind, damaged ones too, and its page."""
    root = tmp_path_factory.mktemp("mixed")
    write(root / "sub/aligned.mp4")
    write(root / "sub/mirrored.mp4", audio=panned(BACK))
    write(root / ODD_NAME, video=moving(THERE[:5], side=48), audio=panned(THERE[:5], 5 / FPS))
    write(root / "silent.mp4", audio=SILENCE)
    write(root / "black.mp4", video=-th.ones(FRAMES, 3, 16, 16))
    write(root / "single.mp4", video=moving([0.5]), audio=panned([0.5], 1 / FPS))
    make_clip(root / "mono.mkv", np.full((20, 32, 48, 3), 90, np.uint8), 10, noise(32000, 1), 16000)
    (root / "broken.mp4").write_bytes(b"no film")
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


def test_every_file_that_the_page_asks_for_is_there(mixed):
    files = Reader(mixed / "index.html").files
    assert len(files) == 7 * 4 + 1
    assert all((mixed / unquote(file)).is_file() for file in files)
    assert not any(":" in file or file.startswith("/") for file in files)


def test_the_page_shows_reasons_instead_of_numbers_that_do_not_exist(mixed):
    text = " ".join(Reader(mixed / "index.html").text)
    page = (mixed / "index.html").read_text()
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None)\b", page.split("<script>")[0])
    for words in (
        "none: silent",
        "black",
        "none: one frame",
        "mono",
        "browsers play no .mkv",
        "not a number",
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


def test_the_curves_of_a_clip_are_where_its_object_is_and_where_its_sound_comes_from(mixed):
    clip = read_clips(mixed / "index.html")["sub/mirrored"]
    for kind, places, tolerance in (("seen", THERE, 5), ("heard", BACK, 2)):
        drawn = points(clip[kind]["d"])
        assert [x for x, _ in drawn] == pytest.approx(
            [1000 * (k + 0.5) / FRAMES for k in range(FRAMES)], abs=1
        )
        assert [y for _, y in drawn] == pytest.approx(
            [50 + 48 * (2 * place - 1) for place in places], abs=tolerance
        )


def test_the_pictures_of_a_clip_are_its_frames_its_poster_and_its_spectrograms(mixed):
    clip = read_clips(mixed / "index.html")["sub/aligned"]
    sources = clip["strip"]["src"], clip["video"]["data-poster"], clip["sound"]["src"]
    strip, poster, sound = (images.read_image(mixed / source) for source in sources)
    assert len(set(sources)) == 3
    assert strip.shape == (3, 64, FRAMES * 64)
    for picture, place in zip(
        [*strip.chunk(FRAMES, dim=-1), poster], [*THERE, THERE[FRAMES // 2]], strict=True
    ):
        assert picture.double().mean((0, 1)).argmax().item() == pytest.approx(64 * place, abs=3)
    assert sound.shape[1] == 2 * gallery.SPECTROGRAM[0] + 1


def test_nothing_of_a_clip_is_fetched_before_it_is_near(mixed):
    for clip in read_clips(mixed / "index.html").values():
        assert clip["video"]["preload"] == "none"
        assert "poster" not in clip["video"]
        assert clip["strip"]["loading"] == clip["sound"]["loading"] == "lazy"


def test_the_table_tells_the_median_of_the_clips_that_have_a_score_and_how_many_have_not(mixed):
    page = Reader(mixed / "index.html")
    header, *rows = (row for row in page.table if len(row) == 3)
    told = {label: (median, int(missing)) for label, median, missing in rows}
    held = [json.loads(row["data-scores"]) for row in page.data]
    for key, score in gallery.SCORES.items():
        values = sorted(row[key] for row in held if key in row)
        middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        assert told[score.label] == (score.form.format(middle), 7 - len(values))
    assert header == ["Score", "Median", "Clips without"]
    assert told["good"] == ("4", 5)
    assert told["level"] == ("7", 6)
    assert told["odd"] == ("no clip has it", 7)


def test_a_second_table_tells_the_medians_of_each_folder(mixed, tmp_path):
    page = Reader(mixed / "index.html")
    header, top, sub = (row for row in page.table if len(row) > 3)
    assert header == [
        "Median in",
        *(score.label for score in gallery.SCORES.values()),
        "level",
        "good",
        "odd",
    ]
    aligned = [
        json.loads(row["data-scores"])["alignment"]
        for row in page.data
        if row["data-folder"] == "sub"
    ]
    assert sub[:2] == ["sub", gallery.SCORES["alignment"].form.format(sum(aligned) / 2)]
    assert sub[-3:] == ["no clip has it", "4", "no clip has it"]
    assert top[0] == "(top)"
    assert top[-3:] == ["7", "no clip has it", "no clip has it"]
    write(tmp_path / "alone.mp4")
    assert not [row for row in Reader(gallery.write_gallery(tmp_path)).table if len(row) > 3]


def test_given_scores_find_their_clips_and_leave_the_measured_ones(mixed):
    rows = {
        row["data-name"]: json.loads(row["data-scores"])
        for row in Reader(mixed / "index.html").data
    }
    assert rows["sub/aligned"]["given good"] == 3
    assert rows["sub/mirrored"]["given good"] == 5
    assert rows["silent"] == {"given level": 7, "motion": rows["silent"]["motion"]}
    assert rows["sub/aligned"]["alignment"] == pytest.approx(1, abs=0.05)
    assert rows["sub/mirrored"]["alignment"] == pytest.approx(
        -rows["sub/aligned"]["alignment"], abs=0.01
    )


def test_clips_of_one_name_stand_beside_each_other_and_numbers_count_by_value(tmp_path):
    whole = write(tmp_path / "original/clip_2.mp4")
    names = [f"{kind}/clip_{k}" for k in (2, 10) for kind in ("ground_truth", "original", "sr_mp4")]
    for name in names:
        path = tmp_path / f"{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            os.link(whole, path)
    assert [row["data-name"] for row in Reader(gallery.write_gallery(tmp_path)).data] == names


def test_the_contact_sheet_has_a_row_for_every_clip(mixed):
    sheet = images.read_image(mixed / "gallery" / gallery.SHEET)
    assert sheet.shape == (
        3,
        7 * (gallery.SHEET_SIDE + 2) + 2,
        gallery.SHEET_FRAMES * (gallery.SHEET_SIDE + 2) + 2,
    )


def test_what_has_not_changed_is_not_measured_again(tmp_path):
    write(tmp_path / "a.mp4")
    write(tmp_path / "b.mp4")
    gallery.write_gallery(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("gallery/*_strip.jpg")}
    write(tmp_path / "b.mp4", video=moving(BACK), audio=SILENCE)
    write(tmp_path / "c.mp4")
    gallery.write_gallery(tmp_path)
    assert len(before) == 2
    assert sum(path.stat().st_mtime_ns == time for path, time in before.items()) == 1
    assert len(list(tmp_path.glob("gallery/*_strip.jpg"))) == 3
    assert "none: silent" in " ".join(Reader(tmp_path / "index.html").text)


def pictures_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.glob("gallery/*.jpg")}


DAMAGES = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-200]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", gallery.KINDS)
def test_a_picture_that_is_lost_is_drawn_again(kind, damage, tmp_path):
    write(tmp_path / "a.mp4")
    write(tmp_path / "b.mp4", audio=panned(BACK))
    gallery.write_gallery(tmp_path)
    before = pictures_of(tmp_path)
    lost, kept = sorted(tmp_path.glob(f"gallery/*_{kind}.jpg"))
    DAMAGES[damage](lost)
    time = kept.stat().st_mtime_ns
    gallery.write_gallery(tmp_path)
    assert pictures_of(tmp_path) == before
    assert kept.stat().st_mtime_ns == time


def test_pictures_of_clips_that_are_gone_go_and_files_of_others_stay(tmp_path):
    write(tmp_path / "a.mp4")
    write(tmp_path / "b.mp4")
    gallery.write_gallery(tmp_path)
    before = pictures_of(tmp_path)
    stranger = "0123456789abcdef_mine.jpg"
    for name in ("notes.txt", "a_strip.jpg", stranger):
        (tmp_path / "gallery" / name).write_text("mine")
    (tmp_path / "gallery/measured_1.json").touch()
    (tmp_path / "a.mp4").unlink()
    page = gallery.write_gallery(tmp_path)
    shown = {Path(file).name for file in Reader(page).files}
    left = {path.name for path in tmp_path.glob("gallery/*")}
    assert len(before) == 2 * 3
    assert left == (set(before) & shown) | {
        gallery.SHEET,
        gallery.MEASURED,
        "notes.txt",
        "a_strip.jpg",
        stranger,
    }


@pytest.mark.parametrize("older", ["measured_1.json", ""])
def test_a_gallery_of_an_earlier_version_or_without_its_memory_is_still_ours(older, tmp_path):
    write(tmp_path / "a.mp4")
    gallery.write_gallery(tmp_path)
    before = pictures_of(tmp_path)
    memory = tmp_path / "gallery" / gallery.MEASURED
    if older:
        memory.rename(memory.with_name(older))
        (tmp_path / "gallery/mine.txt").touch()
    else:
        memory.unlink()
    gallery.write_gallery(tmp_path)
    assert pictures_of(tmp_path) == before
    assert memory.exists()


def show(monkeypatch, capsys, *args: str | Path) -> tuple[int, str]:
    """Run the script -> its exit status and what it says."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
    status = 0
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr()
    return status, said.err if status else said.out


def test_a_film_whose_pictures_change_their_size_is_shown_at_that_of_the_first(tmp_path):
    path = tmp_path / "resized.avi"
    make_resized_film(path, [(64, 64)] * 10 + [(64, 32)] * 10, 10, noise(32000, 2), 16000)
    page = Reader(gallery.write_gallery(tmp_path))
    assert [row["data-name"] for row in page.data] == ["resized"]
    first, *_, last = images.read_image(tmp_path / page.data[0]["strip"]["src"]).chunk(
        gallery.STRIP_FRAMES, dim=-1
    )
    assert first.shape == last.shape


def test_a_preview_that_is_not_finite_is_told_and_training_goes_on(tmp_path, capsys):
    preview(tmp_path, 1, broken=True)
    assert "no preview at step 1" in capsys.readouterr().out
    assert not list(tmp_path.glob("samples/*/*.mp4"))


def test_the_script_tells_where_the_page_is(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a.mp4")
    status, said = show(monkeypatch, capsys, tmp_path)
    assert (status, said.strip()) == (0, f"look at the clips: {tmp_path / 'index.html'}")
    assert (tmp_path / "index.html").is_file()


def test_the_script_takes_scores_from_the_file_that_it_is_given(tmp_path, monkeypatch, capsys):
    write(tmp_path / "clips/a.mp4")
    (tmp_path / "clips/scores.json").write_text('{"a": {"here": 1}}')
    (tmp_path / "mine.json").write_text('{"a": {"mine": 2}}')
    status, _ = show(monkeypatch, capsys, tmp_path / "clips", "--scores", tmp_path / "mine.json")
    found = json.loads(read_clips(tmp_path / "clips/index.html")["a"]["data-scores"])
    assert status == 0
    assert {key: value for key, value in found.items() if key.startswith("given")} == {
        "given mine": 2
    }


@pytest.mark.parametrize("seconds", [60, 62])
def test_of_a_long_clip_a_minute_is_shown_and_a_note_says_so(seconds, tmp_path):
    video = moving([k / seconds for k in range(seconds)])
    encode.write_clip(tmp_path / "a.mp4", video, 1, panned([0.5], seconds), RATE)
    page = Reader(gallery.write_gallery(tmp_path))
    assert ("only the first 60 s are shown" in " ".join(page.text)) == (seconds > 60)
    assert float(page.data[0]["data-seconds"]) == pytest.approx(60, abs=0.1)
    assert len(points(page.data[0]["seen"]["d"])) == 60


def foreign_page(root: Path) -> None:
    (root / "index.html").write_text("my page")


def foreign_pictures(name: str) -> Callable[[Path], None]:
    def put(root: Path) -> None:
        (root / "gallery").mkdir()
        (root / "gallery" / name).write_text("my picture")

    return put


REFUSED = {
    "holds no clips": lambda root: (root / "a.mp4").unlink(),
    "none of its 1 files": lambda root: (root / "a.mp4").write_bytes(b"no film"),
    "is no gallery of ours": foreign_page,
    "holds something else (mine.jpg)": foreign_pictures("mine.jpg"),
    "holds something else (contact_sheet.png)": foreign_pictures(gallery.SHEET),
    "cannot be read as JSON": lambda root: (root / "scores.json").write_text("{"),
    "need {": lambda root: (root / "scores.json").write_text('{"a": 1}'),
    "is 'high', need a number": lambda root: (root / "scores.json").write_text(
        '{"a": {"x": "high"}}'
    ),
    "names none of the 1 clips": lambda root: (root / "scores.json").write_text('{"b": {"x": 1}}'),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_shown_is_told_in_one_line_and_nothing_is_lost(
    words, tmp_path, monkeypatch, capsys
):
    write(tmp_path / "a.mp4")
    REFUSED[words](tmp_path)
    mine = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status, said = show(monkeypatch, capsys, tmp_path)
    assert status == 1
    line = said.strip().splitlines()[-1].split("\r")[-1]
    assert line.startswith("error: ")
    assert words in line
    assert str(tmp_path) in line
    assert all(path.read_bytes() == held for path, held in mine.items())


@real_media
def test_real_clips_are_shown_whole_and_with_every_score(tmp_path):
    names = ["big_buck_bunny_0_30", "nasa_13013"]
    for path in MEDIA.iterdir():
        (tmp_path / path.name).symlink_to(path)
    page = Reader(gallery.write_gallery(tmp_path))
    assert [row["data-name"] for row in page.data] == names
    assert "cannot be shown" not in " ".join(page.text)
    for row in page.data:
        found = json.loads(row["data-scores"])
        assert set(found) == set(gallery.SCORES)
        assert -1 <= found["alignment"] <= 1
        assert -60 < found["level"] < 0
        assert found["motion"] > 0
        assert points(row["seen"]["d"])
        assert points(row["heard"]["d"])
    assert all((tmp_path / unquote(file)).is_file() for file in page.files)


# ---------------------------------------------------------------- beside training


def preview(folder: Path, step: int, broken: bool = False) -> None:
    """Draw the previews of a step of training with a small model, whose weights are no numbers if it is broken."""
    model, diffusion = tiny.build()
    if broken:
        th.nn.init.constant_(next(model.parameters()), math.nan)
    data = DataConfig(video_fps=FPS, audio_fps=RATE)
    previews.make_preview(diffusion, "dpm_solver", "mp4", 1, str(folder), data, World())(
        model, step
    )


def test_previews_of_all_steps_are_on_one_page(tmp_path):
    for step in (1, 20):
        preview(tmp_path, step)
    folders = [row["data-folder"] for row in Reader(tmp_path / "samples/index.html").data]
    assert folders == ["000001", "000020"]


def test_a_page_that_cannot_be_written_is_told_and_training_goes_on(tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    foreign_page(tmp_path / "samples")
    preview(tmp_path, 1)
    assert "is no gallery of ours" in capsys.readouterr().out
    assert (tmp_path / "samples/index.html").read_text() == "my page"
    assert len(list(tmp_path.glob("samples/*/*.mp4"))) == 1


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


VISIBLE = "[...document.querySelectorAll('.clip:not([hidden]) h2')].map(h => h.textContent)"


@needs_chromium
def test_a_clip_plays_from_a_file_path_with_its_sound_and_the_cursor_follows(mixed, browser):
    browser.open(mixed / "index.html")
    played = browser.run("""(async () => {
        const clip = document.querySelector('[data-name="sub/aligned"]'), video = clip.querySelector("video");
        const before = [video.readyState, getComputedStyle(clip.querySelector(".now")).visibility];
        await video.play();
        await new Promise(done => video.addEventListener("ended", done));
        return {before, time: video.currentTime, size: [video.videoWidth, video.videoHeight],
            sound: video.webkitAudioDecodedByteCount, now: clip.style.getPropertyValue("--now"), error: video.error};
    })()""")
    assert played["before"] == [0, "hidden"]
    assert played["error"] is None
    assert played["time"] == pytest.approx(FRAMES / FPS, abs=0.05)
    assert played["size"] == [32, 32]
    assert played["sound"] > 0
    assert float(played["now"]) == pytest.approx(1, abs=0.05)


@needs_chromium
def test_scores_are_read_and_clips_sorted_and_filtered_by_keyboard(mixed, browser):
    browser.open(mixed / "index.html")
    shown = browser.run("""Object.fromEntries([...document.querySelectorAll(".clip")].map(clip => [clip.dataset.name,
        [...clip.querySelectorAll("dt")].map(dt => [dt.textContent, dt.nextElementSibling.textContent])]))""")
    rows = {name: dict(pairs) for name, pairs in shown.items()}
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
def test_everything_that_can_be_used_has_a_name(mixed, browser):
    browser.open(mixed / "index.html")
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"combobox", "button", "searchbox", "link", "image", "Video", "img"}
    used = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(used) > 10
    assert all(node["name"]["value"] for node in used)


@needs_chromium
def test_a_thousand_clips_wait_until_they_are_near(mixed, browser, tmp_path):
    path = mixed / "sub/aligned.mp4"
    clip, clips = gallery.examine(str(path), tmp_path), {}
    (tmp_path / "gallery").mkdir()
    for k in range(1000):
        pictures = {kind: f"{k}_{kind}.jpg" for kind in clip.pictures}
        for kind, name in pictures.items():
            os.link(tmp_path / clip.pictures[kind], tmp_path / "gallery" / name)
        clips[f"{k:04d}.mp4"] = dataclasses.replace(clip, pictures=pictures)
        os.link(path, tmp_path / f"{k:04d}.mp4")
    (tmp_path / "index.html").write_text(gallery.render("many", clips, {}, {}))
    browser.open(tmp_path / "index.html")
    counts = browser.run("""({clips: document.querySelectorAll(".clip").length,
        pictures: [...document.images].filter(image => image.complete && image.naturalWidth).length,
        posters: document.querySelectorAll("video[poster]").length,
        videos: [...document.querySelectorAll("video")].filter(video => video.readyState).length})""")
    assert counts["clips"] == 1000
    assert 2 <= counts["pictures"] < 100
    assert counts["posters"] < 50
    assert counts["videos"] == 0
