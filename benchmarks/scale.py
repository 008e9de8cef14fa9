"""Time and memory of the index of a folder of 100,000 clips, in this process and in data workers.

    python benchmarks/scale.py [--files 100000] [--num_workers 4]

The files hold a few bytes and are not decoded: what probing finds in each is made up. Memory is
what importing the package does not take: private to a process, and its share of what is mapped.
"""

import argparse
import gc
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from mm_diffusion.config import DataConfig
from mm_diffusion.data import decode
from mm_diffusion.data.clips import ClipDataset, index_clips, notes_on_audio
from mm_diffusion.data.decode import ClipInfo
from mm_diffusion.data.workers import ReaderPool, clean_context

FILES_PER_FOLDER = 1000


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
        (below / f"a_clip_of_a_data_set_{k:07d}.mp4").write_bytes(b"clip")


def made_up_info(path: str, *_: object) -> ClipInfo:
    seconds = 5 + int(re.findall(r"\d+", path)[-1]) % 997 / 100
    return ClipInfo(seconds, 25.0, 256, 256, 16000, 2, 0, 1, "h264", "aac", 0.0, seconds)


def call_directly(pool: ReaderPool, function, path: str, *rest: object):
    return function(path, *rest)


def start_training(folder: str, num_workers: int) -> None:
    """Print what the start of training does with the index."""
    config, before = DataConfig(data_dir=folder, num_workers=num_workers), memory()
    with (
        patch.object(ReaderPool, "call", call_directly),
        patch.object(decode, "probe", made_up_info),
    ):
        begin = time.perf_counter()
        index = index_clips(config)
        indexed = time.perf_counter()
    index.report()
    notes_on_audio(index, config)
    dataset = ClipDataset(index, config)
    done = time.perf_counter()
    print(f"  index {indexed - begin:6.2f} s, data set of {len(dataset)} windows", end=" ")
    print(f"{done - indexed:.2f} s")
    gc.collect()
    report("this process", before, memory())
    compare_workers(dataset, num_workers)


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
    """Look at every clip, as an epoch does; send the memory that this process then has."""
    for k in range(len(dataset) if dataset else 0):
        dataset.source(k)
    connection.send("ready")
    connection.recv()
    connection.send(memory())


def memory() -> tuple[float, float]:
    """MB that are private to this process, and its share of all that it maps."""
    text = Path("/proc/self/smaps_rollup").read_text()
    found = {name: int(size) / 1024 for name, size in re.findall(r"(\w+): +(\d+) kB", text)}
    return found["Private_Clean"] + found["Private_Dirty"], found["Pss"]


def report(who: str, before: tuple[float, float], after: tuple[float, float]) -> None:
    private, share = (new - old for new, old in zip(after, before, strict=True))
    print(f"  {who}: {private:.1f} MB private, {share:.1f} MB with its share of mapped memory")


if __name__ == "__main__":
    main()
