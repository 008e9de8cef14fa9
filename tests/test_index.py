"""The index of a folder at scale: columns, interrupted probing, several ranks and workers."""

import csv
import dataclasses
import hashlib
import json
import math
import os
import pickle
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from mm_diffusion import dist_util, rng
from mm_diffusion.config import DataConfig
from mm_diffusion.data import loader, probing, shared
from mm_diffusion.data.clips import LEAST_AUDIO_SHARE, ClipDataset, audio_shares, notes_on_audio
from mm_diffusion.data.decode import ClipInfo
from mm_diffusion.data.index import ClipIndex
from mm_diffusion.data.probing import Found, Probe, Probed, probe_files
from mm_diffusion.data.shared import SharedBytes
from mm_diffusion.data.table import Table, encode, number_fields, row_type, text_of
from mm_diffusion.data.workers import ReaderPool, clean_context
from mm_diffusion.generation.conditioning import ConditioningClips, long_enough

SIZES = {"video_size": "4,3,8,8", "audio_size": "2,512", "audio_fps": 512}
NAMES = [f"{k}.mp4" for k in range(7)]


@dataclasses.dataclass(frozen=True)
class Size:
    """What the probes of these tests find in a file."""

    value: int
    note: str = ""


def info_of(seconds, **changes):
    plain = ClipInfo(seconds, 25.0, 64, 48, 16000, 2, 0, 1, "h264", "aac")
    return dataclasses.replace(plain, **changes)


CLIPS = [
    ("a.mp4", info_of(2.5, audio_begin_seconds=0.25, audio_end_seconds=2.0)),
    ("b\udcff.mp4", info_of(1.0, audio_stream=(1, 2), mono_streams=(1, 2, 4))),
    ("c ü\n.mp4", info_of(math.nextafter(3, 4), note="c ü\n.mp4: audio ends early")),
    ("d.mp4", info_of(2.5)),
]


def table_of(clips):
    rows, numbers = np.zeros(len(clips), row_type(ClipInfo)), number_fields(ClipInfo)
    for number, (_, info) in enumerate(clips):
        for name in numbers:
            rows[name][number] = getattr(info, name)
        rows["text"][number] = number
    paths, texts = [path for path, _ in clips], [text_of(info, numbers) for _, info in clips]
    return Table(ClipInfo, SharedBytes.of(encode(rows, paths, texts)))


def test_a_table_is_the_list_that_it_was_made_of():
    table = table_of(CLIPS)
    assert list(table) == CLIPS
    assert table[-1] == CLIPS[-1]
    assert table[1:3] == CLIPS[1:3]
    assert table[1:].select(np.array([True, False, True])) == [CLIPS[1], CLIPS[3]]
    assert list(pickle.loads(pickle.dumps(table[2:]))) == CLIPS[2:]
    assert table[1:].paths() == [path for path, _ in CLIPS[1:]]
    assert table_of([]) == []
    with pytest.raises(IndexError):
        table[4]


@pytest.mark.parametrize("name", ["duration_seconds", "width", "note", "audio_end_seconds"])
def test_columns_are_the_fields_of_all_clips(name):
    expected = [getattr(info, name) for _, info in CLIPS]
    for clips in (table_of(CLIPS), CLIPS):
        assert ClipIndex(clips, {}).column(name).tolist() == expected
    assert table_of(CLIPS)[2:].column(name).tolist() == expected[2:]


def test_an_index_of_columns_leaves_out_and_reports_as_one_of_a_list():
    bad = {"a.mp4": "a.mp4: is bad", "not there.mp4": "not there.mp4: is missing", "d.mp4": "d"}
    columns, plain = (ClipIndex(c, {}, "data").leave_out(bad) for c in (table_of(CLIPS), CLIPS))
    assert isinstance(columns.clips, Table)
    assert columns == plain
    assert columns.report() == plain.report()
    assert "audio ends early" in columns.report()


def test_windows_with_little_audio_are_counted_as_if_every_file_were_looked_at():
    draw = random.Random(1)
    infos = [
        info_of(
            draw.choice([0.3, 1.0, 4.04, 9.77]),
            audio_begin_seconds=draw.choice([-0.1, 0.0, 0.02, 0.05, 0.3, 2.0]),
            audio_end_seconds=draw.choice([0.1, 0.9, 3.98, 4.04, 9.5, math.inf]),
        )
        for _ in range(200)
    ]
    config = DataConfig(**SIZES, clip_stride=3, video_fps=10)
    clips = [(f"{k}.mp4", info) for k, info in enumerate(infos)]
    parts = [audio_shares(ClipIndex([clip], {}), 4, 10, 3) for clip in clips]
    shares = np.concatenate([of_one for _, of_one in parts])
    index = ClipIndex(clips, {})
    (note,) = notes_on_audio(index, config)
    without, little = (shares <= 0).sum(), ((shares > 0) & (shares < LEAST_AUDIO_SHARE)).sum()
    assert note.startswith(f"{without} of {len(shares)} windows have no audio, {little} have it")


# ---------------------------------------------------------------- what is made of columns


def probed_clips(folder):
    """A table of CLIPS as files of the folder, of different sizes."""
    clips = [(str(folder / path), info) for path, info in CLIPS]
    for number, (path, _) in enumerate(clips):
        Path(path).write_bytes(bytes(1 + number))
    table = table_of(clips)
    rows = table.rows.copy()
    rows["file_size"] = [os.stat(path).st_size for path, _ in clips]
    content = encode(rows, table.paths(), table.texts.all())
    return clips, Table(ClipInfo, SharedBytes.of(content))


def test_conditioning_clips_and_their_fingerprint_are_those_of_a_loop_over_all(tmp_path):
    """The definitions, for one file at a time: folders that were begun go on."""
    clips, table = probed_clips(tmp_path)
    config = DataConfig(**SIZES, video_fps=4, clip_stride=1, data_dir=str(tmp_path))
    windows = [(k, file) for file, (_, info) in enumerate(clips) for k in range(windows_of(info))]
    order = sorted(range(len(windows)), key=lambda window: windows[window][0])
    streams = [(info.video_stream, info.audio_stream) for _, info in clips]
    files = [[os.path.basename(p), os.stat(p).st_size] for p, _ in clips]
    files = [[*file, *which] for file, which in zip(files, streams, strict=True)]
    facts = [files, order, config.clip_stride, config.random_flip, config.antialias]
    expected = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    for index in (ClipIndex(table, {}), ClipIndex(clips, {})):
        made = ConditioningClips("video", index, config)
        assert made.order.tolist() == order
        assert made.fingerprint() == expected
    made.write_sources(tmp_path, "a")
    with open(tmp_path / "sources.csv", errors="surrogateescape", newline="") as file:
        rows = [(row["file"], float(row["start_seconds"])) for row in csv.DictReader(file)]
    assert rows == [(clips[windows[w][1]][0], windows[w][0] / 4) for w in order]


def windows_of(info):
    return int(info.duration_seconds * 4 + 0.05) - 4 + 1


def test_files_that_are_too_short_to_condition_on_are_left_out_of_columns_and_lists():
    config = DataConfig(**SIZES, video_fps=4, max_bad_share=0.5)
    clips = [*CLIPS, ("e.mp4", info_of(0.9))]
    kept = [long_enough(ClipIndex(c, {}, "data"), config) for c in (clips, table_of(clips))]
    assert [index.clips for index in kept] == 2 * [CLIPS]
    assert kept[0].bad == kept[1].bad
    assert kept[0].bad["e.mp4"].startswith("e.mp4: lasts 0.90 s, need 1.00 s (4 frames")


@pytest.mark.parametrize("count", [1, 200, 300, 70_000])
def test_the_order_of_windows_does_not_depend_on_how_small_their_numbers_are(count):
    expected = np.random.default_rng(rng.derive_seed(1, "order", 2)).permutation(count)
    order = loader._permutation(1, 2, count)
    assert order.tolist() == expected.tolist()
    assert order.nbytes < expected.nbytes


def test_bytes_are_shared_where_the_system_cannot_reserve_space(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    content = SharedBytes.of(b"abc")
    assert content.file
    assert bytes(content.buffer) == b"abc"


@pytest.mark.parametrize("values", [[], [1, 2, 2**40]])
def test_shared_numbers_are_those_that_were_given(values):
    array = shared.SharedArray.of(np.array(values, "i8"))
    assert array.values.tolist() == pickle.loads(pickle.dumps(array)).values.tolist() == values


# ---------------------------------------------------------------- probing


def write_files(folder, names=NAMES):
    for name in names:
        (folder / name).write_bytes(b"12345")
    return Found([str(folder / name) for name in names], {})


def logged_size(path, log, forbidden=""):
    """A probe that notes in a folder who has called it for what."""
    if Path(path).name == forbidden:
        raise RuntimeError("the machine goes down")
    Path(log, f"{Path(path).name} {os.getpid()} {len(os.listdir(log))}").touch()
    return Size(Path(path).stat().st_size)


def names_in(log):
    return sorted(name.split()[0] for name in os.listdir(log))


@pytest.fixture
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log")


def probe_of(tmp_path, *arguments):
    return Probe(logged_size, Size, tmp_path / "cache/clips.index", 1, [*map(str, arguments)])


def test_a_start_with_nothing_changed_writes_nothing(tmp_path, log):
    found, probe = write_files(tmp_path), probe_of(tmp_path, log)
    first = probe_files(lambda: found, probe)
    written = os.stat(probe.cache)
    assert probe_files(lambda: found, probe) == first
    assert os.stat(probe.cache) == written
    (tmp_path / NAMES[0]).unlink()
    second = probe_files(lambda: found, probe)
    assert second == Probed(first.clips[1:], second.bad)
    assert [*second.bad] == [str(tmp_path / NAMES[0])]
    assert os.stat(probe.cache) != written
    assert names_in(log) == NAMES


def test_an_interrupted_first_probing_resumes(tmp_path, log, monkeypatch):
    """Fault: the index was written at the end only: hours of probing were lost."""
    monkeypatch.setattr(probing, "PIECE_FILES", 2)
    monkeypatch.setattr(probing, "SAVE_SECONDS", 0.0)
    found = write_files(tmp_path)
    with pytest.raises(RuntimeError, match="goes down"):
        probe_files(lambda: found, probe_of(tmp_path, log, NAMES[5]))
    assert names_in(log) == NAMES[:5]
    clips, bad = probe_files(lambda: found, probe_of(tmp_path, log))
    assert [os.path.basename(path) for path in clips.paths()] == NAMES
    assert not bad
    assert names_in(log) == sorted([*NAMES, NAMES[4]])  # that piece was not complete


@pytest.mark.parametrize("place", [5, 0.5, -1])
def test_an_index_with_a_wrong_byte_is_rebuilt(tmp_path, log, place):
    found, probe = write_files(tmp_path, NAMES[:1]), probe_of(tmp_path, log)
    first = probe_files(lambda: found, probe)
    content = bytearray(probe.cache.read_bytes())
    content[int(place * len(content)) if place == 0.5 else place] ^= 1
    probe.cache.write_bytes(content)
    assert probe_files(lambda: found, probe) == first
    assert len(names_in(log)) == 2


def test_without_temporary_space_the_index_is_kept_in_memory(tmp_path, log, monkeypatch, capsys):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    clips, _ = probe_files(lambda: write_files(tmp_path), probe_of(tmp_path, log))
    assert [info for _, info in pickle.loads(pickle.dumps(clips))] == 7 * [Size(5)]
    assert "set TMPDIR to a folder with space" in capsys.readouterr().out


# ---------------------------------------------------------------- processes


def report_inode(dataset, connection):
    table = dataset.clips
    inode = os.fstat(table.content.file.fileno()).st_ino
    connection.send((inode, list(table), dataset.source(0)))


def test_workers_map_the_index_of_their_parent():
    """Fault: each of them had a copy, 51 MB for 100,000 files."""
    dataset = ClipDataset(ClipIndex(table_of(CLIPS), {}), DataConfig(**SIZES))
    context = clean_context()
    ours, theirs = context.Pipe()
    process = context.Process(target=report_inode, args=(dataset, theirs))
    process.start()
    theirs.close()
    inode, clips, source = ours.recv()
    process.join()
    assert inode == os.fstat(dataset.clips.content.file.fileno()).st_ino
    assert clips == CLIPS
    assert source == dataset.source(0)


class InProcess(ReaderPool):
    """A pool without processes, which take seconds to start."""

    def call(self, function, path, *rest):
        return function(path, *rest)


def probe_as_rank(rank, port, tmp_path, log):
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    probing.PIECE_FILES, probing.ReaderPool = 2, InProcess
    found = write_files(tmp_path) if rank == 0 else None

    def find():
        assert rank == 0
        return found

    shared.PIECE_BYTES = 100
    for k, host in enumerate(("of all", f"of rank {rank}")):
        shared._host = lambda host=host: host
        result = probe_files(find, probe_of(tmp_path, log))
        inode = os.fstat(result.clips.content.file.fileno()).st_ino
        content = list(result.clips), result.bad, inode
        Path(tmp_path, f"{k} {rank}.pickle").write_bytes(pickle.dumps(content))
    dist.destroy_process_group()


def test_ranks_share_the_probing_and_agree(tmp_path, log):
    """Fault: rank 0 probed for hours, while the others ran into the time limit."""
    arguments = dist_util._free_port(), tmp_path, log
    mp.start_processes(probe_as_rank, arguments, nprocs=2, start_method="forkserver")
    written = sorted(tmp_path.glob("*.pickle"))
    results = [pickle.loads(path.read_bytes()) for path in written]
    expected = [(str(tmp_path / name), Size(5)) for name in NAMES], {}
    assert [(clips, bad) for clips, bad, _ in results] == 4 * [expected]
    of_host, of_rank_1_there, own, own_of_rank_1 = [inode for _, _, inode in results]
    assert of_host == of_rank_1_there  # they map one file
    assert own != own_of_rank_1
    assert names_in(log) == NAMES
    probed = [name.split()[:2] for name in os.listdir(log)]
    by_rank = {who: sorted(n for n, w in probed if w == who) for _, who in probed}
    assert sorted(by_rank.values()) == [
        ["0.mp4", "1.mp4", "4.mp4", "5.mp4"],
        ["2.mp4", "3.mp4", "6.mp4"],
    ]
