"""What the clip files of a folder hold, probed once and remembered outside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blobfile
from tqdm import tqdm

from . import dist_util, media
from .media import ClipInfo, MediaError

EXTENSIONS = (".mp4", ".avi", ".gif", ".mkv", ".webm", ".mov")
FORMAT = 1  # of the cached index; raised whenever `probe` learns to tell more
MAX_EXAMPLES = 3  # bad files named in an error


class DataError(ValueError):
    """A data folder that cannot be used; one line, with the remedy."""


@dataclasses.dataclass(frozen=True)
class ClipIndex:
    """The clips that can be used, in order of their paths, and why the others cannot."""

    clips: list[tuple[str, ClipInfo]]
    bad: dict[str, str]

    def report(self) -> str:
        """One line that counts, and one for every file left out."""
        count = f"{len(self.clips)} clips" + (f", {len(self.bad)} files left out:" if self.bad else "")
        return "\n".join([count, *(f"  {reason}" for reason in self.bad.values())])


def build_index(data_dir: str, max_bad_share: float = 0.1, **options) -> ClipIndex:
    """`probe_folders`, but a DataError where no file, or too few, can be used: more than `max_bad_share` are bad."""
    index = probe_folders(data_dir, **options)
    refuse_if_bad(data_dir, index, max_bad_share)
    return index


def probe_folders(
    data_dir: str,
    num_workers: int = 4,
    video_stream: int | None = None,
    audio_stream: int | None = None,
    rank: int = 0,
    barrier: Callable[[], None] = dist_util.barrier,
) -> ClipIndex:
    """The index of all clips below `data_dir` (one folder or a comma list, local or remote), streams best or by index.

    Rank 0 probes what is new or changed and writes the cache; the others wait for it at `barrier` and read it (a rank
    that cannot see that cache probes for itself). DataError where a folder is missing or there are no clips.
    """
    paths = find_clips(data_dir)
    cache = cache_path(data_dir, video_stream, audio_stream)
    if rank > 0:
        barrier()
    entries = _probe_changed(paths, _read_cache(cache), num_workers, (video_stream, audio_stream), quiet=rank > 0)
    if rank == 0:
        _write_cache(cache, entries)
        barrier()
    return ClipIndex(
        clips=[(path, ClipInfo(**entry["info"])) for path, entry in entries.items() if "info" in entry],
        bad={path: entry["reason"] for path, entry in entries.items() if "reason" in entry},
    )


def find_clips(data_dir: str) -> list[str]:
    """All clip files below the folder(s), sorted; DataError for a missing folder or none with clips."""
    folders = [os.path.expanduser(folder.strip()) for folder in data_dir.split(",") if folder.strip()]
    if not folders:
        raise DataError("no data folder given: pass --data_dir with a folder of clips")
    for folder in folders:
        if not blobfile.isdir(folder):
            raise DataError(f"{folder}: no such data folder; check --data_dir")
    found = {path for folder in folders for path in _walk(folder)}
    if not found:
        raise DataError(f"{data_dir}: holds no clips ({' '.join(EXTENSIONS)}); check --data_dir")
    return sorted(found)


def _walk(folder: str) -> Iterable[str]:
    for root, _, names in blobfile.walk(folder):
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield blobfile.join(root, name)


def cache_path(data_dir: str, video_stream: int | None = None, audio_stream: int | None = None) -> Path:
    """Where the index of this folder is kept: below MM_DIFFUSION_CACHE, else in the user's cache folder."""
    home = os.environ.get("MM_DIFFUSION_CACHE")
    xdg = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) if home else Path(xdg) / "mm_diffusion"
    places = [part if "://" in part else os.path.abspath(part) for part in data_dir.split(",")]
    name = hashlib.sha256(json.dumps([places, video_stream, audio_stream]).encode()).hexdigest()[:24]
    return folder / f"clips_{name}.json"


def _read_cache(path: Path) -> dict[str, dict]:
    """Path -> entry of an earlier run; empty where there is none that we understand."""
    try:
        held = json.loads(path.read_text())
        return held["entries"] if held["format"] == FORMAT else {}
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return {}


def _write_cache(path: Path, entries: dict[str, dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.json")
    temporary.write_text(json.dumps({"format": FORMAT, "entries": entries}))
    os.replace(temporary, path)


def _probe_changed(
    paths: list[str],
    known: dict[str, dict],
    num_workers: int,
    streams: tuple[int | None, int | None],
    quiet: bool,
) -> dict[str, dict]:
    """Path -> {"size", "mtime", and "info" or "reason"}; files of unchanged size and mtime are taken from `known`."""

    def entry(path: str) -> dict:
        stat = blobfile.stat(path)
        identity = {"size": stat.size, "mtime": stat.mtime}
        held = known.get(path, {})
        if all(held.get(key) == value for key, value in identity.items()):
            return held
        try:
            if not stat.size:
                raise MediaError(f"{path}: is empty (0 bytes)")
            return identity | {"info": dataclasses.asdict(media.probe(path, *streams))}
        except MediaError as error:
            return identity | {"reason": str(error)}

    with ThreadPoolExecutor(max(1, num_workers)) as pool:  # libav lets go of the interpreter; forks and MPI do not mix
        looked_up = tqdm(pool.map(entry, paths), "clips", len(paths), unit="file", disable=quiet, leave=False)
        return dict(zip(paths, looked_up, strict=True))


def refuse_if_bad(data_dir: str, index: ClipIndex, max_bad_share: float) -> None:
    """DataError, with examples and the remedy, where nothing is left or more than that share is bad."""
    bad, total = len(index.bad), len(index.bad) + len(index.clips)
    examples = "; ".join(list(index.bad.values())[:MAX_EXAMPLES])
    if not index.clips:
        raise DataError(
            f"{data_dir}: none of its {total} files can be used ({examples}); py_scripts/check_data.py tells"
        )
    if bad > max_bad_share * total:
        raise DataError(
            f"{data_dir}: {bad} of {total} files cannot be used ({examples}): more than --max_bad_share"
            f" {max_bad_share}; remove them (py_scripts/check_data.py lists them) or raise that flag"
        )
