"""What the clip files of a folder hold, probed once and remembered outside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import blobfile
from tqdm import tqdm

from ..dist_util import from_rank_0
from ..files import absolute, write_text
from . import DataError, MediaError, decode
from .decode import ClipInfo

VIDEO_EXTENSIONS = (".mp4", ".avi", ".gif", ".mkv", ".webm", ".mov")
FORMAT = 3  # of the cached index; raised whenever what is told of a file changes
FINGERPRINT_BYTES = 2**20  # at either end of a file
MAX_EXAMPLES = 3  # bad files named in an error
Info = TypeVar("Info")


@dataclasses.dataclass(frozen=True)
class ClipIndex(Generic[Info]):
    """The clips that can be used, in order of their paths, with what is known of each, and why the others cannot."""

    clips: list[tuple[str, Info]]
    bad: dict[str, str]
    data_dir: str = ""  # below which they were found

    def report(self, count: str = "") -> str:
        """One line that counts (`count`, or the clips), and one for every file left out."""
        count = count or f"{len(self.clips)} clips"
        count += f", {len(self.bad)} files left out:" if self.bad else ""
        return "\n".join([count, *(f"  {reason}" for reason in self.bad.values())])


def build_index(data_dir: str, max_bad_share: float = 0.1, **options) -> ClipIndex[ClipInfo]:
    """`probe_folders`, but a DataError where no file, or too few, can be used: more than `max_bad_share` are bad.

    Must be called on every rank, too.
    """
    index = probe_folders(data_dir, **options)
    refuse_if_bad(data_dir, index, max_bad_share)
    return index


def probe_folders(
    data_dir: str,
    num_workers: int = 4,
    video_stream: int | None = None,
    audio_stream: int | None = None,
    flag: str = "data_dir",
) -> ClipIndex[ClipInfo]:
    """The index of all clips below `data_dir` (one folder or a comma list, local or remote), streams best or by index.

    Rank 0 looks and tells the others: must be called on every rank. DataError, naming `flag`, where a folder is
    missing or there are no clips.
    """

    def look(path: str) -> dict:
        return dataclasses.asdict(decode.probe(path, video_stream, audio_stream))

    def find() -> ClipIndex[ClipInfo]:
        paths = find_files(folders_in(data_dir), VIDEO_EXTENSIONS, "clips", f"check --{flag}")
        index = look_up(paths, look, cache_path(data_dir, video_stream, audio_stream), num_workers)
        return ClipIndex(
            [(path, ClipInfo(**info)) for path, info in index.clips], index.bad, data_dir
        )

    return from_rank_0(find)


def look_up(
    paths: list[str], look: Callable[[str], Any], cache: Path, num_workers: int
) -> ClipIndex[Any]:
    """The index of these files by what `look(path)` tells (as JSON would hold it), unless that raises MediaError.

    Files that have not changed since they were found good are taken from `cache`.
    """
    entries = _look_up_changed(paths, look, _read_cache(cache), num_workers)
    _write_cache(cache, entries)
    return ClipIndex(
        clips=[(path, entry["info"]) for path, entry in entries.items() if "info" in entry],
        bad={path: entry["reason"] for path, entry in entries.items() if "reason" in entry},
    )


def folders_in(text: str) -> list[str]:
    """The folders of a comma list, "~" expanded."""
    return [os.path.expanduser(part.strip()) for part in text.split(",") if part.strip()]


def find_files(
    folders: Sequence[str], extensions: tuple[str, ...], kind: str, remedy: str
) -> list[str]:
    """All files below the folders with these extensions, sorted; DataError for a missing folder or none with any."""
    if not folders:
        raise DataError(f"no data folder of {kind} given; {remedy}")
    for folder in folders:
        if not blobfile.isdir(folder):
            raise DataError(f"{folder}: no such data folder; {remedy}")
    found = {path for folder in folders for path in _walk(folder, extensions)}
    if not found:
        raise DataError(f"{','.join(folders)}: holds no {kind} ({' '.join(extensions)}); {remedy}")
    return sorted(found)


def _walk(folder: str, extensions: tuple[str, ...]) -> Iterable[str]:
    for root, _, names in blobfile.walk(folder):
        for name in names:
            if name.lower().endswith(extensions) and not name.startswith("."):
                yield blobfile.join(root, name)


def cache_folder() -> Path:
    """Where we keep what can be found out again: MM_DIFFUSION_CACHE, else below the user's cache folder."""
    home = os.environ.get("MM_DIFFUSION_CACHE")
    xdg = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) if home else Path(xdg) / "mm_diffusion"


def cache_path(
    data_dir: str,
    video_stream: int | None = None,
    audio_stream: int | None = None,
    kind: str = "clips",
) -> Path:
    """Where the index of this folder is kept."""
    places = [absolute(folder) for folder in folders_in(data_dir)]
    name = hashlib.sha256(json.dumps([places, video_stream, audio_stream]).encode()).hexdigest()[
        :24
    ]
    return cache_folder() / f"{kind}_{name}.json"


def _read_cache(path: Path) -> dict[str, dict]:
    """Path -> entry of an earlier run; empty where there is none that we understand."""
    try:
        held = json.loads(path.read_text())
        return dict(held["entries"]) if held["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_cache(path: Path, entries: dict[str, dict]) -> None:
    text = json.dumps({"format": FORMAT, "entries": entries})
    write_text(path, text)


def identity(path: str) -> dict[str, float]:
    """What tells a changed file from an unchanged one; MediaError where it is gone."""
    with _found(path):
        stat = blobfile.stat(path)
    return {"size": stat.size, "mtime": stat.mtime}


def fingerprint(path: str) -> str:
    """What tells films of one size apart, wherever they are: sha256 of the first and last MiB; MediaError as above."""
    with _found(path), blobfile.BlobFile(path, "rb") as file:
        first = file.read(FINGERPRINT_BYTES)
        file.seek(max(0, file.seek(0, os.SEEK_END) - FINGERPRINT_BYTES))
        return hashlib.sha256(first + file.read()).hexdigest()


@contextmanager
def _found(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, blobfile.Error) as error:
        raise MediaError(
            f"{path}: cannot be found ({getattr(error, 'strerror', None) or error})"
        ) from error


def _look_up_changed(
    paths: list[str], look: Callable[[str], Any], known: dict[str, dict], num_workers: int
) -> dict[str, dict]:
    """Path -> {"size", "mtime", and "info" or "reason"}; good files of unchanged size and mtime are as `known`.

    Bad ones are looked at again: it may have been the disk, the network or the decoder that failed.
    """

    def entry(path: str) -> dict:
        current: dict[str, Any] = {}
        try:
            current, held = identity(path), known.get(path, {})
            if "info" in held and held.items() >= current.items():
                return held
            if not current["size"]:
                raise MediaError(f"{path}: is empty (0 bytes)")
            return current | {"info": look(path)}
        except MediaError as error:
            return current | {"reason": str(error)}

    with ThreadPoolExecutor(
        max(1, num_workers)
    ) as pool:  # libav lets go of the interpreter; forks and MPI do not mix
        looked_up = tqdm(pool.map(entry, paths), "files", len(paths), unit="file", leave=False)
        return dict(zip(paths, looked_up, strict=True))


def refuse_if_bad(
    data_dir: str, index: ClipIndex, max_bad_share: float, told_by: str = "py_scripts/check_data.py"
) -> None:
    """DataError, with examples and the remedy, where nothing is left or more than that share is bad."""
    bad, total = len(index.bad), len(index.bad) + len(index.clips)
    examples = "; ".join(list(index.bad.values())[:MAX_EXAMPLES])
    if not index.clips:
        raise DataError(
            f"{data_dir}: none of its {total} files can be used ({examples}); {told_by} lists them"
        )
    if bad > max_bad_share * total:
        raise DataError(
            f"{data_dir}: {bad} of {total} files cannot be used ({examples}): more than --max_bad_share"
            f" {max_bad_share}; remove them ({told_by} lists them) or raise that flag"
        )
