"""Folders as users have them: links, odd names, corrupt files, full disks, unknown users."""

import csv
import dataclasses
import io
import itertools
import os
import pwd
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch as th
from media_files import NOT_VIDEOS, damage_middle, make_clip, moving_frames, small_clip

from mm_diffusion import checkpoint, logger
from mm_diffusion.config import DataConfig, FilesConfig
from mm_diffusion.data import DataError
from mm_diffusion.data.clips import audio_shares, load_data, notes_on_audio, read_held_out
from mm_diffusion.data.decode import ClipInfo
from mm_diffusion.data.extract import ExtractSettings, extract_videos
from mm_diffusion.data.frames import FrameInfo
from mm_diffusion.data.held_out import split
from mm_diffusion.data.index import (
    VIDEO_EXTENSIONS,
    ClipIndex,
    build_index,
    cache_folder,
    find_files,
    folders_in,
)
from mm_diffusion.data.loader import _worker_failure, endless_batches
from mm_diffusion.data.probing import Found, Probe, probe_files
from mm_diffusion.dist_util import World, friendly_errors
from mm_diffusion.generation.conditioning import ConditioningClips

REPO = Path(__file__).resolve().parents[1]
SIZES = {"video_size": "4,3,8,8", "audio_size": "2,512", "audio_fps": 512}
NOT_UTF8 = os.fsdecode(b"caf\xe9.mp4")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MM_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """An intact file of 6 s."""
    path = tmp_path_factory.mktemp("clip") / "intact.mp4"
    return small_clip(path, frames=60, samples=96000)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"1")
    return str(path)


def search(folder):
    return find_files([str(folder)], VIDEO_EXTENSIONS, "clips", "check it")


# ---------------------------------------------------------------- searching


def test_folders_behind_links_are_searched_once_and_loops_end(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    own = touch(data / "own/a.mp4")
    touch(elsewhere / "below/b.mp4")
    (data / "linked").symlink_to(elsewhere)
    (data / "own/up").symlink_to(data)
    (elsewhere / "again").symlink_to(elsewhere / "below")
    found = search(data)
    assert found.paths == [str(data / "linked/again/b.mp4"), own]
    assert not found.unreadable


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A folder that cannot be read, even by root."""
    folder, scandir = tmp_path / "data/locked", os.scandir
    touch(folder / "c.mp4")

    def refuse(path):
        if path == str(folder):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return folder


def test_a_folder_that_cannot_be_read_is_reported_as_bad(tmp_path, locked, clip):
    shutil.copy(clip, tmp_path / "data")
    index = build_index(str(tmp_path / "data"), max_bad_share=0.5)
    assert index.bad == {str(locked): f"{locked}: cannot be searched (Permission denied)"}
    with pytest.raises(
        DataError, match=r"1 of 2 files cannot be used .*locked: cannot be searched"
    ):
        build_index(str(tmp_path / "data"), max_bad_share=0.4)


def test_a_folder_holds_no_clips_only_where_nothing_was_in_the_way(tmp_path, locked):
    with pytest.raises(DataError, match=r"no clips found where .*locked: cannot be searched"):
        search(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no clips"):
        search(tmp_path / "empty")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match=r"loop: cannot be opened \(Too many levels"):
        search(tmp_path / "loop")


def test_a_folder_whose_name_has_a_comma_wins_over_two_folders(tmp_path):
    for name in ("a", "b", "a,b"):
        (tmp_path / name).mkdir()
    a, b, both = (str(tmp_path / name) for name in ("a", "b", "a,b"))
    assert folders_in(f"{a},b") == [both]
    assert folders_in(f"{a},b, {b} ,{a}") == [both, b, a]
    assert folders_in(f" {b}, {a} ,") == [b, a]


# ---------------------------------------------------------------- files that end the process


corrupted_by: list[str] = []


def info_unless_deadly(path):
    name = Path(path).name
    if corrupted_by:
        os.abort()
    if name.startswith("corrupts"):
        corrupted_by.append(name)
    if name.startswith("abort"):
        os.abort()
    if name.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    return FrameInfo(is_video=True)


def test_a_file_that_kills_its_reader_is_listed_and_the_others_go_on(tmp_path):
    names = ["a.mp4", "abort.mp4", "b.mp4", "corrupts.mp4", "kill.mp4", "kill2.mp4", "z.mp4"]
    found = Found([touch(tmp_path / name) for name in names], {})
    probe = Probe(info_unless_deadly, FrameInfo, tmp_path / "cache.index", num_workers=2)
    index = probe_files(lambda: found, probe)
    good = [Path(path).name for path, _ in index.clips]
    assert good == ["a.mp4", "b.mp4", "corrupts.mp4", "z.mp4"]
    reasons = {Path(path).name: reason for path, reason in index.bad.items()}
    kills = "kills the process that reads it"
    assert reasons["abort.mp4"] == f"{tmp_path}/abort.mp4: {kills} (SIGABRT)"
    assert "SIGKILL, perhaps for lack of memory" in reasons["kill.mp4"]
    assert set(reasons) == {"abort.mp4", "kill.mp4", "kill2.mp4"}


# ---------------------------------------------------------------- machines


@pytest.mark.parametrize("cache", ["/dev/null/cache", "/proc/cache"])
def test_an_index_that_cannot_be_kept_is_used_all_the_same(
    tmp_path, clip, cache, monkeypatch, capsys
):
    monkeypatch.setenv("MM_DIFFUSION_CACHE", cache)
    shutil.copy(clip, tmp_path)
    assert len(build_index(str(tmp_path)).clips) == 1
    logged = capsys.readouterr().out
    assert logged.count("warning: ") == 1
    assert "set MM_DIFFUSION_CACHE" in logged


def test_a_user_without_a_home_has_a_cache_in_the_temporary_folder(monkeypatch):
    def unknown(*_):
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "MM_DIFFUSION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert cache_folder().name == f"mm_diffusion_{os.getuid()}"
    assert cache_folder().is_absolute()


def test_a_user_without_a_passwd_entry_can_import_the_package():
    script = """
import pwd

def unknown(*_):
    raise KeyError("uid not found")

pwd.getpwuid = unknown
import torch
import mm_diffusion.data.clips
"""
    names = ("LOGNAME", "USER", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", script]
    subprocess.run(command, env=environment, cwd=REPO, check=True, timeout=120)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_file_name_can_be_printed_under_any_locale(encoding, monkeypatch):
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding=encoding))
    with friendly_errors():
        logger.log(NOT_UTF8, "gr\u00fcn")
    assert held.getvalue().startswith(b"caf\\udce9.mp4 gr")


def info_of(seconds, **changes):
    info = ClipInfo(seconds, 25, 64, 64, 16000, 2, 0, 1, "h264", "aac")
    return dataclasses.replace(info, **changes)


def test_the_table_of_sources_has_any_file_name_as_its_bytes(tmp_path):
    path = touch(tmp_path / NOT_UTF8)
    index = ClipIndex([(path, info_of(1.0))], {}, str(tmp_path))
    clips = ConditioningClips("video", index, DataConfig(**SIZES))
    clips.write_sources(tmp_path, "stem")
    with open(tmp_path / "sources.csv", encoding="utf-8", errors="surrogateescape") as file:
        assert next(csv.DictReader(file))["file"] == path
    assert b"caf\xe9.mp4" in (tmp_path / "sources.csv").read_bytes()


def test_a_file_of_any_name_can_be_held_out():
    index = ClipIndex([(f"{k}{NOT_UTF8}", info_of(1.0)) for k in range(20)], {}, "data")
    training, held_out = split(index, 0.5)
    assert len(training.clips) + len(held_out.clips) == 20
    assert held_out.clips


def test_a_video_with_the_longest_name_is_extracted_once(tmp_path):
    for letter in "ab":
        path = tmp_path / ("x" * 239 + f"{letter}.mp4")
        small_clip(path, frames=3)
        assert len(path.name) == 244
    target = tmp_path / "frames"
    for _ in range(2):
        counts, bad = extract_videos([str(tmp_path)], str(target), ExtractSettings(fps=10))
        assert not bad
        assert sorted(counts.values()) == [3, 3]
        assert len(list(target.glob("image_*.png"))) == 6


# ---------------------------------------------------------------- durations and audio


def test_clips_whose_video_and_audio_differ_in_duration_are_refused_with_a_fitting_flag():
    words = r"lasts 4 s, but .* 5 s; set --audio_size 2,64000 or --audio_fps 20000"
    with pytest.raises(ValueError, match=words):
        load_data(DataConfig(video_fps=5, data_dir="nowhere"))
    DataConfig(video_fps=5, audio_size="2,64000").check_durations()
    DataConfig(video_fps=5, audio_fps=20000).check_durations()


def test_check_data_and_sampling_refuse_them_too(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check_data.py", str(clip.parent), "--video_fps", "5"])
    with pytest.raises(ValueError, match="--audio_fps 20000"):
        runpy.run_path(str(REPO / "py_scripts/check_data.py"))["main"]()
    path = str(tmp_path / "model000001.pt")
    checkpoint.save_weights(path, tiny.build()[0], tiny.FLAGS)
    line = ["--multimodal_model_path", path, "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["multimodal_sample_sr.py", *line])
    with pytest.raises(ValueError, match="--audio_fps 64, or"):
        runpy.run_path(str(REPO / "py_scripts/multimodal_sample_sr.py"))["main"]()
    assert not list(tmp_path.glob("out/**/*.mp4"))


def test_windows_without_audio_or_with_little_are_counted():
    info = info_of(10, audio_begin_seconds=1.5, audio_end_seconds=6.0)
    index = ClipIndex([("a.mp4", info), ("b.mp4", info_of(2))], {})
    files, shares = audio_shares(index, num_frames=4, fps=4, clip_stride=4)
    assert files.tolist() == 10 * [0] + 2 * [1]
    assert shares.tolist() == [0, 0.5, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    (note,) = notes_on_audio(index, DataConfig(**SIZES, clip_stride=4))
    assert "5 of 12 windows have no audio, 1 have it for less than 90%" in note
    assert "in 1 files, for example a.mp4" in note
    assert not notes_on_audio(ClipIndex(index.clips[1:], {}), DataConfig(**SIZES))


def test_several_mono_streams_are_reported_with_the_flag_that_reads_two():
    index = ClipIndex([("a.mp4", info_of(2)), ("b.mp4", info_of(2, mono_streams=(1, 3)))], {})
    (note,) = notes_on_audio(index, DataConfig(**SIZES))
    assert note.startswith("1 files have several mono streams (for example b.mp4: 1, 3);")
    assert "--audio_stream 1,3" in note


# ---------------------------------------------------------------- damage that training meets


@pytest.fixture
def damaged(tmp_path, clip):
    """A folder of 4 files, the second of which is corrupt in its middle."""
    for name in "abcd":
        shutil.copy(clip, tmp_path / f"{name}.mp4")
    damage_middle(tmp_path / "b.mp4")
    return tmp_path


def batches(folder, count, start_sample=0, world=None, **changes):
    options = {"batch_size": 4, "num_workers": 0, "max_bad_share": 0.25, "clip_stride": 4}
    config = DataConfig(data_dir=str(folder), **SIZES, **options | changes)
    stream = load_data(config, world, start_sample)
    return [batch for batch, _ in itertools.islice(stream, count)]


def equal(one, other):
    return all(a[key].equal(b[key]) for a, b in zip(one, other, strict=True) for key in a)


def test_a_window_that_cannot_be_decoded_is_replaced_by_the_same_one_always(damaged, capsys):
    straight = batches(damaged, 8)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert f"{damaged}/b.mp4: cannot be decoded" in warnings[0]
    assert equal(batches(damaged, 8, num_workers=1), straight)
    assert equal(batches(damaged, 3, start_sample=20), straight[5:])
    halves = [batches(damaged, 8, world=World(rank, 2), batch_size=2) for rank in range(2)]
    joined = [{key: th.cat([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)]
    assert equal(joined, straight)


def test_a_rank_other_than_0_reports_what_it_meets(damaged, capsys):
    batches(damaged, 8, world=World(1, 2))
    err = capsys.readouterr().err
    assert f"[rank 1] warning: {damaged}/b.mp4: cannot be decoded" in err


def test_files_that_turn_out_corrupt_count_against_the_bad_share(damaged):
    with pytest.raises(DataError, match=r"1 of 4 files cannot be used .*b\.mp4.*--full True"):
        batches(damaged, 8, max_bad_share=0.2)
    (damaged / "empty.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 5 files cannot be used"):
        batches(damaged, 8)


def test_held_out_windows_that_cannot_be_decoded_are_left_out_and_their_file_named(damaged, capsys):
    config = DataConfig(data_dir=str(damaged), **SIZES, clip_stride=4)
    found = read_held_out(config, str(damaged), 0.0, most=64)
    assert 18 <= len(found["video"]) == len(found["audio"]) < 24  # of 6 windows in 4 equal files
    for values in found.values():
        assert values[:6].equal(values[-6:])
        assert not values[:6].equal(values[1:7])
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert f"{damaged}/b.mp4: cannot be decoded" in warnings[0]
    assert read_held_out(config, str(damaged), 0.0, most=1)["video"].equal(found["video"][:1])


# ---------------------------------------------------------------- workers that die


class Deadly:
    """A dataset whose items end the process."""

    disk, index = None, ClipIndex([], {})

    def __len__(self):
        return 4

    def __getitem__(self, key):
        os.kill(os.getpid(), signal.SIGBUS)


def test_a_worker_without_shared_memory_ends_with_what_to_set():
    config = FilesConfig(batch_size=1, num_workers=1)
    with pytest.raises(DataError, match=r"/dev/shm has \d+ MB.*--shm-size .* --ipc=host, or .* 0"):
        next(endless_batches(Deadly(), config, World(), 0))


@pytest.mark.parametrize(
    ("text", "status", "advice"),
    [
        ("worker (pid(s) 7) exited unexpectedly", -signal.SIGKILL, "lack of memory; set fewer"),
        ("worker (pid(s) 7) exited unexpectedly", -signal.SIGSEGV, "--full True names it"),
        ("unable to write to file </torch_7_1>: No space left (28)", None, "--shm-size"),
        ("the model is wrong", None, ""),
    ],
)
def test_what_ends_a_worker_decides_the_advice(text, status, advice):
    reason = _worker_failure(text, [SimpleNamespace(exitcode=status)], workers=3)
    assert advice in reason
    assert bool(reason) == bool(advice)


# ---------------------------------------------------------------- all together


def test_check_data_names_every_bad_file_of_a_mixed_folder_and_counts_right(tmp_path, clip):
    bad = {NOT_UTF8: "is empty", "silent.mp4": "no audio stream", "gone.mp4": "cannot be found"}
    (tmp_path / NOT_UTF8).write_bytes(b"")
    make_clip(tmp_path / "silent.mp4", moving_frames(10, 0))
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    for name, data in NOT_VIDEOS.items():
        (tmp_path / name).write_bytes(data)
        bad[name] = name
    for name in ("middle.mp4", "good.mp4", os.fsdecode(b"good \xe9.mp4")):
        shutil.copy(clip, tmp_path / name)
    bad["middle.mp4"] = "cannot be decoded"
    damage_middle(tmp_path / "middle.mp4")
    script = str(REPO / "py_scripts/check_data.py")
    command = [sys.executable, script, str(tmp_path), "--full", "True", "--num_workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(REPO), "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    listed = [line for line in done.stdout.splitlines() if line.startswith("  /")]
    assert len(listed) == len(bad)
    assert f"{len(bad)} files" in done.stdout
    assert re.search(r"^clips +2 files, ", done.stdout, re.MULTILINE)
    for name, reason in bad.items():
        shown = name.encode("ascii", "backslashreplace").decode()
        (line,) = [line for line in listed if f"/{shown}: " in line]
        assert reason in line
