"""Folders of clips: what is listed, what is refused, and in what order which samples come."""

import dataclasses
import functools
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from media_files import MEDIA, grey_frames, make_clip, noise, real_media

from mm_diffusion.config import DataConfig
from mm_diffusion.data import DataError, MediaError, decode
from mm_diffusion.data.cache import DiskCache
from mm_diffusion.data.clips import ClipDataset, load_data, mirror
from mm_diffusion.data.decode import ClipInfo
from mm_diffusion.data.index import (
    VIDEO_EXTENSIONS,
    ClipIndex,
    build_index,
    cache_path,
    find_files,
    folders_in,
)
from mm_diffusion.data.loader import GlobalOrder, _one_ahead, prefetch_to_device
from mm_diffusion.data.probing import Probe, probe_files
from mm_diffusion.data.toy import ToyConfig, write_toy_dataset
from mm_diffusion.dist_util import World
from mm_diffusion.evaluation.bright_object import mismatched_alignment, spatial_alignment

SMALL = {"video_size": "4,3,8,8", "audio_size": "2,512", "audio_fps": 512, "num_workers": 0}


def small(data_dir="", **changes):
    """A config of small clips."""
    return DataConfig(data_dir=str(data_dir), **SMALL | changes)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MM_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_toy_dataset(folder, 24, ToyConfig(height=32, width=32, seconds=2, sample_rate=16000))
    return folder


def clips_of(seconds):
    """An index of files that do not exist, of these durations."""
    return ClipIndex(
        [(f"{s}.mp4", ClipInfo(s, 25, 64, 64, 16000, 2, 0, 1, "h264", "aac")) for s in seconds], {}
    )


def good(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    return make_clip(path, grey_frames(range(100, 140)), audio=noise(64000), **options)


def bad_files(folder):
    """One of each kind of bad file -> what its reason must say."""
    intact = good(folder / "sub/intact.mp4", codec="flac")
    data = intact.read_bytes()
    make_clip(folder / "silent.mp4", grey_frames(range(20)))
    (folder / "empty.mkv").write_bytes(b"")
    (folder / "text.webm").write_text("this is no video\n" * 100)
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])  # its index, written last, is missing
    media_start = data.index(b"mdat") + 4
    zeroed = (
        data[:media_start]
        + bytes(data.index(b"moov") - 4 - media_start)
        + data[data.index(b"moov") - 4 :]
    )
    (folder / "zeroed.mp4").write_bytes(zeroed)
    video = good(folder / "video.mkv").read_bytes()
    (folder / "video.mkv").unlink()
    (folder / "cut.mkv").write_bytes(video[: len(video) // 2])  # a good header, half of the data
    reasons = {
        "silent.mp4": "no audio stream",
        "empty.mkv": "0 bytes",
        "text.webm": "cannot be decoded",
    }
    return reasons | {
        "cut.mp4": "cannot be decoded",
        "zeroed.mp4": "decoded",
        "cut.mkv": "truncated",
    }


def test_bad_files_are_listed_with_their_reason_and_left_out(tmp_path):
    reasons = bad_files(tmp_path)
    (tmp_path / "notes.csv").write_text("not a clip")
    index = build_index(str(tmp_path), max_bad_share=1)
    assert [os.path.basename(path) for path, _ in index.clips] == ["intact.mp4"]
    assert {os.path.basename(path) for path in index.bad} == set(reasons)
    for name, expected in reasons.items():
        (reason,) = [text for path, text in index.bad.items() if path.endswith(name)]
        assert expected in reason
        assert name in reason
        assert "\n" not in reason
    assert "1 clips, 6 files left out" in index.report()


def test_a_gif_counts_as_a_clip_without_audio(tmp_path):
    from PIL import Image

    frames = [Image.fromarray(frame) for frame in grey_frames([10, 200])]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=250)
    with pytest.raises(
        DataError, match=r"none of its 1 files can be used .*a\.gif: has no audio stream"
    ):
        build_index(str(tmp_path))


def test_a_link_to_nowhere_is_a_bad_file(tmp_path):
    good(tmp_path / "good.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "gone.mp4")
    (reason,) = build_index(str(tmp_path), max_bad_share=1).bad.values()
    assert reason == f"{tmp_path}/link.mp4: cannot be found (No such file or directory)"


def test_training_refuses_a_folder_with_too_many_bad_files(tmp_path):
    for k in range(3):
        good(tmp_path / f"good{k}.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"1 of 4 files cannot be used .*empty\.mp4.*--max_bad_share 0\.2"
    ):
        build_index(str(tmp_path), max_bad_share=0.2)
    assert len(build_index(str(tmp_path), max_bad_share=0.25).clips) == 3


@pytest.mark.parametrize(
    ("folder", "message"), [("", "no data folder"), ("nowhere", "no such data folder")]
)
def test_a_missing_folder_is_named(tmp_path, folder, message):
    with pytest.raises(DataError, match=message):
        build_index(str(tmp_path / folder) if folder else "")
    with pytest.raises(DataError, match="holds no clips"):
        build_index(str(tmp_path))


@dataclasses.dataclass(frozen=True)
class Size:
    """What the probes of these tests find in a file."""

    value: int
    note: str = ""


def logged_size(path, log):
    """A probe that notes what it is called for."""
    with open(log, "a") as file:
        file.write(f"{Path(path).name}\n")
    return Size(Path(path).stat().st_size)


def probed(folders, probe, *arguments):
    """The files of these folders by this probe, in one process."""
    find = functools.partial(find_files, folders_in(folders), VIDEO_EXTENSIONS, "clips", "")
    return probe_files(find, Probe(probe, Size, cache_path(folders), 1, arguments))


def test_the_index_is_outside_the_folder_and_unchanged_files_are_not_probed_again(
    tmp_path, tmp_path_factory
):
    log = tmp_path_factory.mktemp("log") / "probed"
    for name in ("a/one.mp4", "b/two.MKV", "a/bad.mov"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if "bad" in name else b"12345")
    folders = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    before = sorted(tmp_path.rglob("*"))

    def index():
        return probed(folders, logged_size, str(log))

    first = index()
    assert [size.value for _, size in first.clips] == [5, 5]
    assert index() == first
    assert log.read_text().split() == ["one.mp4", "two.MKV"]
    os.utime(tmp_path / "a/one.mp4", (1, 1))
    assert index() == first
    assert log.read_text().split() == ["one.mp4", "two.MKV", "one.mp4"]
    assert sorted(tmp_path.rglob("*")) == before
    assert cache_path(folders).exists()


def fails_once(path, mark):
    if not os.path.exists(mark):
        Path(mark).touch()
        raise MediaError(f"{path}: cannot be decoded (Input/output error)")
    return Size(1)


def test_a_file_that_could_not_be_read_once_is_probed_again(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"1")
    mark = str(tmp_path / "mark")
    for reasons in (["cannot be decoded (Input/output error)"], []):
        index = probed(str(tmp_path), fails_once, mark)
        assert [reason.partition(": ")[2] for reason in index.bad.values()] == reasons


def test_a_folder_has_one_index_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    paths = {
        cache_path(text)
        for text in ("~/clips,b", " clips , ~/b", f"{tmp_path}/clips,{tmp_path}/b,")
    }
    assert len(paths) == 1


@pytest.mark.parametrize(
    "held", [b'{"format": 1, "entr', b"\xff\xfe", b'{"format": 4, "entries": [1]}', b"[]"]
)
def test_a_corrupt_index_is_rebuilt(toy, held):
    path = cache_path(str(toy))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(held)
    assert len(build_index(str(toy)).clips) == 24


def test_windows_are_all_of_f_frames_one_where_just_long_enough_or_short():
    dataset = ClipDataset(clips_of([5.0, 4.96, 6.0, 0.5, 15.0]), DataConfig(clip_stride=2))
    assert [dataset.source(k)[::2] for k in range(6)] == [
        ("5.0.mp4", 0),
        ("4.96.mp4", 0),
        *[("6.0.mp4", start) for start in (0, 0.5, 1)],
        ("0.5.mp4", 0),
    ]
    assert len(dataset) == 6 + 21
    assert dataset.source(26)[2] == 10


def test_two_ranks_share_the_global_batch_of_one(toy):
    single = GlobalOrder(10, 4, seed=1)
    shares = [GlobalOrder(10, 2, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for together, first, second, _ in zip(single, *shares, range(12), strict=False):
        assert together == first + second
    single = load_data(small(toy, batch_size=4))
    ranks = [load_data(small(toy, batch_size=2), World(rank, 2)) for rank in range(2)]
    for _ in range(3):
        parts = [next(rank)[0] for rank in ranks]
        for key, value in next(single)[0].items():
            assert value.equal(th.cat([part[key] for part in parts]))


def test_every_epoch_has_every_window_once_in_another_order():
    flat = [
        item
        for batch, _ in zip(GlobalOrder(10, 4, seed=1), range(5), strict=False)
        for item in batch
    ]
    epochs = [[window for epoch, window in flat if epoch == e] for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert next(iter(GlobalOrder(10, 4, seed=2))) != flat[:4]


@pytest.mark.parametrize(
    ("num_windows", "batch_size", "world_size"), [(10, 4, 1), (23, 3, 2), (7, 5, 3), (1, 2, 2)]
)
def test_the_ranks_of_an_epoch_have_every_window_exactly_once(num_windows, batch_size, world_size):
    orders = [
        GlobalOrder(num_windows, batch_size, 1, rank, world_size, start_sample=5)
        for rank in range(world_size)
    ]
    walks = [itertools.islice(order, 20) for order in orders]
    items = list(
        itertools.chain.from_iterable(
            itertools.chain(*together) for together in zip(*walks, strict=True)
        )
    )
    assert items == [orders[0].at(position) for position in range(5, 5 + len(items))]
    for epoch in range(-(-5 // num_windows), (5 + len(items)) // num_windows):
        assert sorted(window for e, window in items if e == epoch) == list(range(num_windows))


def test_a_restart_with_other_ranks_and_batches_continues_where_all_ranks_stopped():
    def walk(batch_size, world_size, batches, start_sample=0):
        orders = [
            GlobalOrder(23, batch_size, 1, rank, world_size, start_sample)
            for rank in range(world_size)
        ]
        return [
            item
            for together in itertools.islice(zip(*orders, strict=True), batches)
            for part in together
            for item in part
        ]

    assert walk(3, 2, 5) + walk(7, 1, 2, start_sample=30) + walk(1, 3, 9, start_sample=44) == walk(
        1, 1, 71
    )


def test_a_restart_after_n_samples_continues_the_stream(toy):
    stream = load_data(small(toy, batch_size=5))
    batches = [next(stream)[0] for _ in range(8)]  # into the second epoch
    resumed = load_data(small(toy, batch_size=5), start_sample=6 * 5)
    for expected in batches[6:]:
        batch = next(resumed)[0]
        assert all(batch[key].equal(value) for key, value in expected.items())


def test_mirrored_twice_is_the_identity():
    sample = {"video": th.randn(4, 3, 8, 8), "audio": th.randn(2, 64)}
    once = mirror(sample)
    assert all(not once[key].equal(sample[key]) for key in sample)
    assert all(mirror(once)[key].equal(sample[key]) for key in sample)


def test_frames_and_channels_are_mirrored_together_in_half_of_the_cases(toy):
    index = build_index(str(toy))
    plain = ClipDataset(index, small(random_flip=False))
    flipped = ClipDataset(index, small(random_flip=True))
    count = 0
    for key in [(epoch, window) for epoch in range(10) for window in range(24)]:
        sample, straight = flipped[key], plain[key]
        is_mirrored = not sample["video"].equal(straight["video"])
        expected = mirror(straight) if is_mirrored else straight
        assert all(sample[name].equal(expected[name]) for name in sample)
        count += is_mirrored
    assert 80 < count < 160


@pytest.mark.parametrize("num_workers", [0, 1])
def test_toy_clips_stay_aligned_through_the_loader_at_8_px_and_512_hz(toy, num_workers):
    sizes = {"video_size": "8,3,8,8", "audio_size": "2,1024", "num_workers": num_workers}
    batch, cond = next(load_data(small(toy, batch_size=24, **sizes)))
    assert cond == {}
    assert (batch["video"].shape, batch["audio"].shape) == ((24, 8, 3, 8, 8), (24, 2, 1024))
    assert {value.dtype for value in batch.values()} == {th.float32}
    assert all(value.abs().max() <= 1 for value in batch.values())
    assert spatial_alignment(batch["video"], batch["audio"]) > 0.95
    assert abs(mismatched_alignment(batch["video"], batch["audio"])) < 0.15


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_folder_whose_only_clip_breaks_during_training_is_refused(tmp_path, num_workers):
    path = good(tmp_path / "a.mp4")
    stream = load_data(small(tmp_path, batch_size=1, num_workers=num_workers))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError) as caught:
        next(stream)
    assert "a.mp4: cannot be decoded" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the disk cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """(folder of the cache, paths decoded since), where disks may be nearly full."""
    monkeypatch.setattr("mm_diffusion.data.cache.SPARE_BYTES", 0)
    decoded, read = [], decode.read_window
    monkeypatch.setattr(
        "mm_diffusion.data.decode.read_window",
        lambda path, *rest, **options: decoded.append(path) or read(path, *rest, **options),
    )
    return tmp_path / "cache", decoded


def from_disk(index, folder, **options):
    """All samples of an index through a disk cache."""
    config = small(**{"video_size": "8,3,8,8"} | options)
    dataset = ClipDataset(index, config, folder and DiskCache(str(folder), "elsewhere"))
    return [dataset[k] for k in range(len(dataset))]


def equal(one, other):
    return len(one) == len(other) and all(
        a[key].equal(b[key]) for a, b in zip(one, other, strict=True) for key in a
    )


def test_cached_clips_give_the_same_bits_and_is_decoded_once(toy, cached):
    folder, decoded = cached
    index = build_index(str(toy))
    plain = from_disk(index, None)
    decoded.clear()
    assert equal(from_disk(index, folder), plain)
    assert len(decoded) == len(set(decoded)) == 24
    assert equal(from_disk(index, folder), plain)
    assert len(decoded) == 24
    size = 8 * 8 * 8 * 3 + 2 * 512 * 4
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 24
    assert all(size < path.stat().st_size < size + 1000 for path in files)


def test_another_file_or_another_way_to_decode_it_is_another_item(tmp_path, cached):
    folder, decoded = cached
    path = good(tmp_path / "clips/a.mp4")
    index = ClipIndex([(str(path), decode.probe(path))], {})
    for changes in [
        {},
        {"video_size": "5,3,8,8"},
        {"video_size": "4,3,8,9"},
        {"audio_size": "2,513"},
        {"audio_fps": 600},
    ] + [{"video_fps": 3}, {"clip_stride": 2, "video_fps": 2}, {"antialias": True}]:
        decoded.clear()
        first = from_disk(index, folder, **changes)
        assert len(decoded) == len(first)
        assert equal(from_disk(index, folder, **changes), first)
        assert len(decoded) == len(first)
    decoded.clear()
    os.utime(path, (1, 1))
    assert len(from_disk(index, folder)) == len(decoded)
    path.unlink()
    with pytest.raises(MediaError, match=r"a\.mp4: cannot be found"):
        from_disk(index, folder)


CORRUPTIONS = {
    "cut": lambda held: held[:-9],
    "empty": lambda held: b"",
    "one bit": lambda held: held[:-5] + bytes([held[-5] ^ 4]) + held[-4:],
    "foreign": lambda held: b"no such file\n" * 99,
    "other key": lambda held: held.replace(b"mp4", b"mp5", 1),
    "binary": lambda held: bytes(range(256)) * 20,
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupt_or_foreign_file_is_ignored_and_rewritten(toy, cached, corruption):
    folder, decoded = cached
    index = ClipIndex(build_index(str(toy)).clips[:1], {})
    first = from_disk(index, folder)
    (place,) = [path for path in folder.rglob("*") if path.is_file()]
    held = place.read_bytes()
    place.write_bytes(CORRUPTIONS[corruption](held))
    decoded.clear()
    assert equal(from_disk(index, folder), first)
    assert len(decoded) == 1
    assert place.read_bytes() == held


def test_a_full_disk_is_reported_once_and_loading_continues(toy, cached, monkeypatch, capsys):
    folder, _ = cached
    index = build_index(str(toy))
    plain = from_disk(index, None)

    def full(*_):
        raise OSError(28, "No space left on device")

    replace = os.replace
    monkeypatch.setattr(os, "replace", full)
    assert equal(from_disk(index, folder), plain)
    monkeypatch.setattr(os, "replace", replace)
    logged = capsys.readouterr().out
    assert logged.count("warning") == 1
    assert logged.count("not written any more (No space left on device)") == 1
    monkeypatch.setattr("mm_diffusion.data.cache.SPARE_BYTES", 2**80)
    assert equal(from_disk(index, folder), plain)
    assert capsys.readouterr().out.count("not written any more (less than") == 1
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_processes_that_fill_one_folder_at_once_agree(toy, cached):
    folder, decoded = cached
    config = small(toy, batch_size=8)
    plain = load_data(config)
    batches = [next(plain)[0] for _ in range(3)]
    cached = dataclasses.replace(config, cache_dir=str(folder))
    streams = [load_data(dataclasses.replace(cached, num_workers=1)) for _ in range(2)]
    for batch in batches:
        assert all(equal([next(stream)[0]], [batch]) for stream in streams)
    decoded.clear()
    stream = load_data(cached)
    assert equal([next(stream)[0] for _ in range(3)], batches)
    assert not decoded
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".raw"}


def test_rank_0_logs_the_space_that_the_cache_needs(toy, cached, capsys):
    folder, _ = cached
    load_data(small(toy, batch_size=1, cache_dir=str(folder), audio_size="2,1024", video_fps=2))
    assert f"{folder}: caches decoded data, up to 24 x 0.01 MB = 0.00 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("clips/cache", "lies in the data folder"),
        ("file/cache", "cannot be made"),
        ("gs://a/b", "must be a local folder"),
    ],
)
def test_an_unusable_cache_folder_is_refused_before_anything_is_read(tmp_path, folder, message):
    (tmp_path / "file").write_text("")
    where = folder if "://" in folder else str(tmp_path / folder)
    with pytest.raises(ValueError, match=f"--cache_dir .*{message}"):
        load_data(small(tmp_path / "clips", batch_size=1, cache_dir=where))


# ---------------------------------------------------------------- on the way to the device


def batches_until(error, made):
    for k in range(3):
        made.append(k)
        yield {"video": th.full((2, 3), k)}, {"low_res": th.full((2,), -k)}
    raise error


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_reach_the_device_unchanged_and_errors_in_their_own_place(device):
    if device == "cuda" and not th.cuda.is_available():
        pytest.skip("needs a CUDA device")
    error = MediaError("a.mp4: broke")
    arrived = []
    with pytest.raises(MediaError) as caught:
        arrived.extend(prefetch_to_device(batches_until(error, []), th.device(device)))
    assert caught.value is error
    stream = prefetch_to_device(batches_until(error, []), th.device(device))
    for k in range(3):
        x, cond = next(stream)
        assert (x["video"] == k).all()
        assert (cond["low_res"] == -k).all()
        assert {x["video"].device.type, cond["low_res"].device.type} == {device}


def test_one_ahead_makes_each_item_before_the_previous_one_is_passed_on():
    made = []
    ahead = _one_ahead(batches_until(MediaError("broke"), made))
    for k in range(3):
        assert next(ahead)[0]["video"][0, 0] == k
        assert made == list(range(min(k + 2, 3)))
    with pytest.raises(MediaError, match="broke"):
        next(ahead)
    assert list(_one_ahead(iter("abc"))) == ["a", "b", "c"]
    assert list(_one_ahead(iter(""))) == []


def test_loading_leaves_the_random_state_alone(toy):
    th.manual_seed(3)
    before = th.get_rng_state()
    next(load_data(small(toy, batch_size=2)))
    assert th.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_size": "20,3,64"}, "--video_size"),
        ({"video_size": "20,1,64,64"}, "RGB"),
        ({"audio_size": "3,80000"}, "stereo or mono"),
        ({"audio_size": "2,none"}, "--audio_size"),
        ({"video_size": "0,3,64,64"}, "--video_size"),
        ({"video_fps": 0}, "--video_fps"),
        ({"clip_stride": 0}, "--clip_stride"),
        ({"batch_size": 0}, "--batch_size"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_read(change, message):
    with pytest.raises(ValueError, match=message):
        load_data(small("nowhere", **change))


def run_check_data(*arguments):
    script = Path(__file__).resolve().parents[1] / "py_scripts" / "check_data.py"
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_check_data_prints_what_a_folder_holds(tmp_path):
    good(tmp_path / "good.mp4")
    (tmp_path / "broken.mkv").write_bytes(b"")
    result = run_check_data(tmp_path, "--video_size", "4,3,8,8", "--audio_size", "2,16000")
    assert result.returncode == 0
    for fact in (
        "1 files, 13 windows",
        "48x32",
        "16000",
        "dBFS",
        "right minus left",
        "broken.mkv: is empty",
    ):
        assert fact in result.stdout
    (tmp_path / "good.mp4").unlink()
    result = run_check_data(tmp_path)
    assert result.returncode == 1
    assert "broken.mkv: is empty" in result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


@real_media
def test_the_two_real_clips_load_as_training_clips(tmp_path):
    for path in MEDIA.glob("*.[mw][pe][4b]*"):
        shutil.copy(path, tmp_path)
    index = build_index(str(tmp_path))
    assert [(info.width, info.height, info.sample_rate) for _, info in index.clips] == [
        (1280, 720, 44100),
        (480, 270, 16000),
    ]
    batch, _ = next(load_data(DataConfig(data_dir=str(tmp_path), batch_size=2, num_workers=0)))
    assert batch["video"].shape == (2, 20, 3, 64, 64)
    assert (batch["video"][:, :, :, :14] == -1).all()  # letter-boxed
    assert np.isfinite(batch["audio"].numpy()).all()
    assert (batch["audio"].square().mean(dim=(1, 2)) > 1e-6).all()
