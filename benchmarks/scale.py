"""Time and memory of the index of a folder of many clips, in this process and in data workers.

    python benchmarks/scale.py [--files 100000] [--num_workers 4]

The files are empty but for their length, and are not decoded: what probing finds in each is made
up. They and the index lie in the temporary folder; TMPDIR names another. Time is that of the
processor, and what passed meanwhile. Memory is what importing the package does not take: private to
a process, its share of what is mapped, and the most that was there at any time.
"""

import argparse
import gc
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from mm_diffusion.config import DataConfig, JointTrainConfig
from mm_diffusion.data import decode
from mm_diffusion.data.clips import ClipDataset, index_clips, notes_on_audio
from mm_diffusion.data.decode import ClipInfo
from mm_diffusion.data.held_out import split
from mm_diffusion.data.workers import ReaderPool, clean_context

FILES_PER_FOLDER, FILE_BYTES = 1000, 2**20
VAL_SHARE = JointTrainConfig(output_dir="none").val_share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--num_workers", type=int, default=4)
    parser.add_argument("--folder", default="", help="of an earlier step; for internal use")
    args = parser.parse_args()
    if args.folder:
        start_training(args.folder, args.num_workers)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder, "clips"), args.files)
        env = os.environ | {"MM_DIFFUSION_CACHE": f"{folder}/cache"}
        for what in ("first start, without decoding", "start with nothing changed"):
            print(f"{what}, {args.files} files", flush=True)
            command = [sys.executable, __file__, "--folder", f"{folder}/clips"]
            options = ["--num_workers", str(args.num_workers)]
            subprocess.run([*command, *options], env=env, check=True)


def make_files(folder: Path, count: int) -> None:
    for k in range(count):
        if k % FILES_PER_FOLDER == 0:
            below = folder / f"part_{k // FILES_PER_FOLDER:04d}"
            below.mkdir(parents=True)
        handle = os.open(below / f"a_clip_of_a_data_set_{k:07d}.mp4", os.O_CREAT | os.O_WRONLY)
        os.truncate(handle, FILE_BYTES)  # takes no space
        os.close(handle)


def made_up_info(path: str, *_: object) -> ClipInfo:
    seconds = 5 + int(re.findall(r"\d+", path)[-2]) % 997 / 100
    return ClipInfo(seconds, 25.0, 256, 256, 16000, 2, 0, 1, "h264", "aac", 0.0, seconds)


def call_directly(pool: ReaderPool, function, path: str, *rest: object):
    return function(path, *rest)


@contextmanager
def timed(what: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"  {what:44} {cpu:6.2f} s of the processor, {wall:6.2f} s in all", flush=True)


def start_training(folder: str, num_workers: int) -> None:
    """Print what the start of training does with the index."""
    with timed("bare os.walk and os.stat, for comparison"):
        walk(folder)
    config, before = DataConfig(data_dir=folder, num_workers=num_workers), memory()
    with (
        patch.object(ReaderPool, "call", call_directly),
        patch.object(decode, "probe", made_up_info),
        timed("index"),
    ):
        index = index_clips(config)
    with timed("share held out"):
        training, _ = split(index, VAL_SHARE)
    with timed("report, notes on audio, windows"):
        training.report()
        notes_on_audio(training, config)
        dataset = ClipDataset(training, config)
    gc.collect()
    print(f"  {len(index.clips)} files, {len(dataset)} windows")
    report("this process", before, memory())
    compare_workers(dataset, num_workers)


def walk(folder: str) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            os.stat(f"{root}/{name}")


def compare_workers(dataset: ClipDataset, num_workers: int) -> None:
    """Print what workers with this data set take that a worker without one does not."""
    context = clean_context()
    pipes = [context.Pipe() for _ in range(num_workers + 1)]
    for place, (_, theirs) in enumerate(pipes):
        process = context.Process(target=work, args=(dataset if place else None, theirs))
        process.start()
    for ours, _ in pipes:
        ours.recv()
    for ours, _ in pipes:
        ours.send("all are here")
    before, after, *_ = [ours.recv() for ours, _ in pipes]
    report("each data worker", before, after)


def work(dataset: ClipDataset | None, connection) -> None:
    """Look at a clip in ten, some on every page; send the memory that this process then has."""
    for k in range(0, len(dataset) if dataset else 0, 10):
        dataset.source(k)
    connection.send("ready")
    connection.recv()
    connection.send(memory())


def memory() -> tuple[float, float, float]:
    """MB that are private to this process, its share of all that it maps, its highest so far."""
    text = "".join(Path("/proc/self", name).read_text() for name in ("smaps_rollup", "status"))
    found = {name: int(size) / 1024 for name, size in re.findall(r"(\w+):\s+(\d+) kB", text)}
    return found["Private_Clean"] + found["Private_Dirty"], found["Pss"], found["VmHWM"]


def report(who: str, before: tuple[float, ...], after: tuple[float, ...]) -> None:
    private, share, most = (new - old for new, old in zip(after, before, strict=True))
    mapped = f"{share:.1f} MB with its share of mapped memory"
    print(f"  {who}: {private:.1f} MB private, {mapped}, {most:.1f} MB at most", flush=True)


if __name__ == "__main__":
    main()
