"""What the files of a data folder hold, probed once and remembered outside the folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
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
FORMAT = 3  # of the cached index; raised whenever an entry changes its meaning
FINGERPRINT_BYTES = 2**20  # at either end of a file
MAX_EXAMPLES = 3  # bad files named in an error
Info = TypeVar("Info")


@dataclasses.dataclass(frozen=True)
class ClipIndex(Generic[Info]):
    """Usable files with what is known of each, sorted by path, and why the others are bad."""

    clips: list[tuple[str, Info]]
    bad: dict[str, str]
    data_dir: str = ""  # the folders that hold them

    def report(self, count: str = "") -> str:
        """One line that counts (`count`, or the clips), and one for every file left out."""
        left_out = f", {len(self.bad)} files left out:" if self.bad else ""
        first = (count or f"{len(self.clips)} clips") + left_out
        return "\n  ".join([first, *self.bad.values()])


def build_index(data_dir: str, max_bad_share: float = 0.1, **options: Any) -> ClipIndex[ClipInfo]:
    """`probe_folders`, then `refuse_if_bad`; must be called on every rank."""
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
    """The index of all clips below `data_dir`: one folder or a comma list, local or remote.

    Rank 0 probes for all: must be called on every rank. Streams: see `decode.probe`. DataError,
    naming `flag`, where a folder is missing or there are no clips.
    """
    streams = (video_stream, audio_stream)

    def probe(path: str) -> dict[str, Any]:
        return dataclasses.asdict(decode.probe(path, *streams))

    def find() -> ClipIndex[ClipInfo]:
        paths = find_files(folders_in(data_dir), VIDEO_EXTENSIONS, "clips", f"check --{flag}")
        index = probe_files(paths, probe, cache_path(data_dir, *streams), num_workers)
        return ClipIndex([(p, ClipInfo(**info)) for p, info in index.clips], index.bad, data_dir)

    return from_rank_0(find)


def probe_files(
    paths: list[str], probe: Callable[[str], Any], cache: Path, num_workers: int
) -> ClipIndex[Any]:
    """The index of these files by `probe(path)`: JSON, or MediaError for a bad file.

    Good files of unchanged size and time are taken from `cache`; what failed may work this time.
    """
    known = _read_cache(cache)
    entries, bad = {}, {}

    def entry(path: str) -> dict[str, Any] | MediaError:
        try:
            current, old = identity(path), known.get(path, {})
            if "info" in old and old.items() >= current.items():
                return old
            if not current["size"]:
                raise MediaError(f"{path}: is empty (0 bytes)")
            return {**current, "info": probe(path)}
        except MediaError as error:
            return error

    with ThreadPoolExecutor(max(1, num_workers)) as pool:  # libav releases the interpreter
        found = tqdm(pool.map(entry, paths), "files", len(paths), unit="file", leave=False)
        for path, result in zip(paths, found, strict=True):
            if isinstance(result, MediaError):
                bad[path] = str(result)
            else:
                entries[path] = result
    write_text(cache, json.dumps({"format": FORMAT, "entries": entries}))
    return ClipIndex([(path, entries[path]["info"]) for path in entries], bad)


def folders_in(text: str) -> list[str]:
    """The folders of a comma list, "~" expanded."""
    return [os.path.expanduser(part.strip()) for part in text.split(",") if part.strip()]


def find_files(
    folders: Sequence[str], extensions: tuple[str, ...], kind: str, remedy: str
) -> list[str]:
    """All files below the folders with these extensions, sorted; DataError where there are none."""
    if not folders:
        raise DataError(f"no data folder of {kind} given; {remedy}")
    found: set[str] = set()
    for folder in folders:
        if not blobfile.isdir(folder):
            raise DataError(f"{folder}: no such data folder; {remedy}")
        for root, _, names in blobfile.walk(folder):
            visible = [name for name in names if not name.startswith(".")]
            wanted = [name for name in visible if name.lower().endswith(extensions)]
            found.update(blobfile.join(root, name) for name in wanted)
    if not found:
        raise DataError(f"{','.join(folders)}: holds no {kind} ({' '.join(extensions)}); {remedy}")
    return sorted(found)


def cache_folder() -> Path:
    """MM_DIFFUSION_CACHE, else a folder below the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MM_DIFFUSION_CACHE") or Path(user, "mm_diffusion"))


def cache_path(data_dir: str, *streams: int | None, kind: str = "clips") -> Path:
    """The file of this folder's cached index for these streams (video, audio; None: the best)."""
    folders = [absolute(folder) for folder in folders_in(data_dir)]
    key = json.dumps([folders, *(streams or (None, None))])
    return cache_folder() / f"{kind}_{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _read_cache(path: Path) -> dict[str, dict]:
    """Path -> entry of an earlier run; empty where the cache is missing or corrupt."""
    try:
        content = json.loads(path.read_text())
        return dict(content["entries"]) if content["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def identity(path: str) -> dict[str, float]:
    """Size and time, which change with the file; MediaError where it is missing."""
    with _missing_as_media_error(path):
        stat = blobfile.stat(path)
    return {"size": stat.size, "mtime": stat.mtime}


def fingerprint(path: str) -> str:
    """sha256 of a file's size and first and last MiB; MediaError as above."""
    with _missing_as_media_error(path), blobfile.BlobFile(path, "rb") as file:
        first, size = file.read(FINGERPRINT_BYTES), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - FINGERPRINT_BYTES))
        return hashlib.sha256(b"%d " % size + first + file.read()).hexdigest()


@contextmanager
def _missing_as_media_error(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, blobfile.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path}: cannot be found ({reason})") from error


def refuse_if_bad(
    data_dir: str, index: ClipIndex, max_bad_share: float, lister: str = "py_scripts/check_data.py"
) -> None:
    """DataError, with examples, where no file is good or more than `max_bad_share` are bad."""
    bad, total = len(index.bad), len(index.bad) + len(index.clips)
    examples = "; ".join(list(index.bad.values())[:MAX_EXAMPLES]) + f"; {lister} lists all"
    if not index.clips:
        raise DataError(f"{data_dir}: none of its {total} files can be used ({examples})")
    if bad > max_bad_share * total:
        raise DataError(
            f"{data_dir}: {bad} of {total} files cannot be used ({examples}); remove them,"
            f" or raise --max_bad_share {max_bad_share}"
        )
