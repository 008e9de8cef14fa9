"""What the files of a data folder hold, probed once and remembered outside the folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import blobfile
from tqdm import tqdm

from .. import logger
from ..dist_util import from_rank_0
from ..files import absolute, is_remote, unambiguous, write_text
from . import DataError, MediaError, decode
from .decode import ClipInfo
from .streams import AudioChoice
from .workers import ReaderPool

VIDEO_EXTENSIONS = (".mp4", ".avi", ".gif", ".mkv", ".webm", ".mov")
FORMAT = 5  # of the cached index; raised whenever an entry changes its meaning
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
        """A line that counts (`count`, or the clips), one for each file left out or with a note."""
        left_out = f", {len(self.bad)} files left out:" if self.bad else ""
        first = (count or f"{len(self.clips)} clips") + left_out
        return "\n  ".join([first, *self.bad.values(), *self.notes()])

    def notes(self) -> list[str]:
        """A line for each usable file that is not as it should be."""
        noted = [(path, getattr(info, "note", "")) for path, info in self.clips]
        return [f"{path}: {note}" for path, note in noted if note]

    def leave_out(self, bad: dict[str, str]) -> ClipIndex[Info]:
        """The index in which these files are bad as well; path -> why."""
        clips = [(path, info) for path, info in self.clips if path not in bad]
        return ClipIndex(clips, self.bad | bad, self.data_dir)

    def refuse_if_bad(self, max_bad_share: float, lister: str = "py_scripts/check_data.py") -> None:
        """DataError, with examples, where no file is good or more than `max_bad_share` are bad."""
        bad, total = len(self.bad), len(self.bad) + len(self.clips)
        examples = "; ".join(list(self.bad.values())[:MAX_EXAMPLES]) + f"; {lister} lists all"
        if not self.clips:
            raise DataError(f"{self.data_dir}: none of its {total} files can be used ({examples})")
        if bad > max_bad_share * total:
            raise DataError(
                f"{self.data_dir}: {bad} of {total} files cannot be used ({examples}); remove them,"
                f" or raise --max_bad_share {max_bad_share}"
            )


def build_index(data_dir: str, max_bad_share: float = 0.1, **options: Any) -> ClipIndex[ClipInfo]:
    """`probe_folders`, then `ClipIndex.refuse_if_bad`; must be called on every rank."""
    index = probe_folders(data_dir, **options)
    index.refuse_if_bad(max_bad_share)
    return index


def probe_folders(
    data_dir: str,
    num_workers: int = 4,
    video_stream: int | None = None,
    audio_stream: AudioChoice | None = None,
    flag: str = "data_dir",
) -> ClipIndex[ClipInfo]:
    """The index of all clips below `data_dir`: one folder or a comma list, local or remote.

    Rank 0 probes for all: must be called on every rank. Streams: see `decode.probe`. DataError,
    naming `flag`, where a folder is missing or there are no clips.
    """
    streams = (video_stream, audio_stream)

    def find() -> ClipIndex[ClipInfo]:
        found = find_files(folders_in(data_dir), VIDEO_EXTENSIONS, "clips", f"check --{flag}")
        index = probe_files(found, _probe, cache_path(data_dir, *streams), num_workers, streams)
        return ClipIndex([(p, ClipInfo(**info)) for p, info in index.clips], index.bad, data_dir)

    return from_rank_0(find)


def _probe(path: str, *streams: Any) -> dict[str, Any]:
    return dataclasses.asdict(decode.probe(path, *streams))


class Found(NamedTuple):
    """Files, sorted, and folder -> why it could not be searched."""

    paths: list[str]
    unreadable: dict[str, str]


def probe_files(
    found: Found,
    probe: Callable[..., Any],
    cache: Path,
    num_workers: int,
    arguments: Sequence[Any] = (),
) -> ClipIndex[Any]:
    """The index of these files by `probe(path, *arguments)`: JSON, or MediaError for a bad file.

    It is called in other processes (see `ReaderPool`). Good files of unchanged size and time are
    taken from `cache`; what failed may work this time.
    """
    known, paths = _read_cache(cache), found.paths
    entries, bad = {}, dict(found.unreadable)
    size = max(1, num_workers)

    def entry(path: str) -> dict[str, Any] | MediaError:
        try:
            current, old = identity(path), known.get(path, {})
            if "info" in old and old.items() >= current.items():
                return old
            if not current["size"]:
                raise MediaError(f"{path}: is empty (0 bytes)")
            return {**current, "info": readers.call(probe, path, *arguments)}
        except MediaError as error:
            return error

    with ReaderPool(size) as readers, ThreadPoolExecutor(size) as threads:
        results = tqdm(threads.map(entry, paths), "files", len(paths), unit="file", leave=False)
        for path, result in zip(paths, results, strict=True):
            if isinstance(result, MediaError):
                bad[path] = str(result)
            else:
                entries[path] = result
    _write_cache(cache, entries)
    return ClipIndex([(path, entries[path]["info"]) for path in entries], bad)


def folders_in(text: str) -> list[str]:
    """The folders of a comma list, "~" expanded; a folder whose own name has the commas wins."""
    parts, folders = text.split(","), []
    while parts:
        ends = range(len(parts), 1, -1)
        joined = (end for end in ends if os.path.isdir(_folder(",".join(parts[:end]))))
        end = next(joined, 1)
        folders.append(_folder(",".join(parts[:end])))
        parts = parts[end:]
    return [folder for folder in folders if folder]


def _folder(text: str) -> str:
    return unambiguous(os.path.expanduser(text.strip()))


def find_files(
    folders: Sequence[str], extensions: tuple[str, ...], kind: str, remedy: str
) -> Found:
    """All files below the folders with these extensions; DataError where there are none.

    Symbolic links are followed; each folder is searched once, so loops end.
    """
    if not folders:
        raise DataError(f"no data folder of {kind} given; {remedy}")
    paths: set[str] = set()
    unreadable: dict[str, str] = {}
    searched: set[tuple[int, int]] = set()
    for folder in folders:
        _require_folder(folder, remedy)
        for root, names in _walk(folder, searched, unreadable):
            visible = [name for name in names if not name.startswith(".")]
            wanted = [name for name in visible if name.lower().endswith(extensions)]
            paths.update(blobfile.join(root, name) for name in wanted)
    where = ",".join(folders)
    if not paths and unreadable:
        examples = "; ".join(list(unreadable.values())[:MAX_EXAMPLES])
        raise DataError(f"{where}: no {kind} found where it could be searched ({examples})")
    if not paths:
        raise DataError(f"{where}: holds no {kind} ({' '.join(extensions)}); {remedy}")
    return Found(sorted(paths), unreadable)


def _require_folder(folder: str, remedy: str) -> None:
    if blobfile.isdir(folder):
        return
    reason = "no such data folder"
    if not is_remote(folder):
        try:
            os.stat(folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            reason = f"cannot be opened ({error.strerror})"
    raise DataError(f"{folder}: {reason}; {remedy}")


def _walk(
    folder: str, searched: set[tuple[int, int]], unreadable: dict[str, str]
) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) for it and all below it that are not `searched` yet."""
    if is_remote(folder):
        yield from ((root, list(names)) for root, _, names in blobfile.walk(folder))
        return

    def report(error: OSError) -> None:
        path = os.fspath(error.filename)
        unreadable[path] = f"{path}: cannot be searched ({error.strerror})"

    for root, below, names in os.walk(folder, onerror=report, followlinks=True):
        stat = os.stat(root)
        below.sort()
        if (stat.st_dev, stat.st_ino) in searched:
            below.clear()
            continue
        searched.add((stat.st_dev, stat.st_ino))
        yield root, names


def cache_folder() -> Path:
    """MM_DIFFUSION_CACHE, else a folder below the user's cache folder, else below the temporary."""
    chosen = os.environ.get("MM_DIFFUSION_CACHE")
    if chosen:
        return Path(chosen)
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if user.startswith("~"):  # a user without a home
        return Path(tempfile.gettempdir(), f"mm_diffusion_{os.getuid()}")
    return Path(user, "mm_diffusion")


def cache_path(data_dir: str, *streams: AudioChoice | None, kind: str = "clips") -> Path:
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


def _write_cache(path: Path, entries: dict[str, dict]) -> None:
    try:
        write_text(path, json.dumps({"format": FORMAT, "entries": entries}))
    except OSError as error:
        logger.warn(
            f"{path}: cannot be written ({error.strerror}), so the files are probed again next"
            " time; set MM_DIFFUSION_CACHE to a folder with space"
        )


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
