"""What the files of a data folder hold, probed once and remembered outside the folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import blobfile
import numpy as np

from ..files import absolute, cache_folder, is_remote, unambiguous
from . import DataError, decode
from .decode import ClipInfo
from .probing import Found, Probe, identity, probe_files
from .streams import AudioChoice
from .table import Table

VIDEO_EXTENSIONS = (".mp4", ".avi", ".gif", ".mkv", ".webm", ".mov")
MAX_EXAMPLES = 3  # bad files named in an error
Info = TypeVar("Info")


@dataclasses.dataclass(frozen=True)
class ClipIndex(Generic[Info]):
    """Usable files with what is known of each, sorted by path, and why the others are bad."""

    clips: Sequence[tuple[str, Info]]
    bad: dict[str, str]
    data_dir: str = ""  # the folders that hold them

    def report(self, count: str = "") -> str:
        """A line that counts (`count`, or the clips), one for each file left out or with a note."""
        left_out = f", {len(self.bad)} files left out:" if self.bad else ""
        first = (count or f"{len(self.clips)} clips") + left_out
        return "\n  ".join([first, *self.bad.values(), *self.notes()])

    def notes(self) -> list[str]:
        """A line for each usable file that is not as it should be."""
        notes = self.column("note")
        return [f"{self.clips[k][0]}: {notes[k]}" for k in np.flatnonzero(notes != "").tolist()]

    def column(self, name: str) -> np.ndarray:
        """A field of the info of every clip."""
        if isinstance(self.clips, Table):
            return self.clips.column(name)
        return np.fromiter((getattr(info, name) for _, info in self.clips), object)

    def paths(self) -> list[str]:
        """The path of every clip."""
        if isinstance(self.clips, Table):
            return self.clips.paths()
        return [path for path, _ in self.clips]

    def leave_out(self, bad: dict[str, str]) -> ClipIndex[Info]:
        """The index in which these files are bad as well; path -> why."""
        if isinstance(self.clips, Table):
            clips: Sequence = self.clips.without(bad)
        else:
            clips = [(path, info) for path, info in self.clips if path not in bad]
        return ClipIndex(clips, self.bad | bad, self.data_dir)

    def choose(self, chosen: np.ndarray) -> Sequence[tuple[str, Info]]:
        """The clips of these numbers, or of this mask."""
        if isinstance(self.clips, Table):
            return self.clips.select(chosen)
        return [self.clips[number] for number in np.arange(len(self.clips))[chosen].tolist()]

    def file_sizes(self) -> np.ndarray:
        """Bytes of every clip's file, as it was when the files were searched."""
        if isinstance(self.clips, Table):
            return self.clips.column("file_size")
        return np.array([identity(path)["size"] for path, _ in self.clips], "i8")

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

    Rank 0 searches, all ranks probe: must be called on every rank. Streams: see `decode.probe`.
    DataError, naming `flag`, where a folder is missing or there are no clips.
    """
    streams = (video_stream, audio_stream)
    find = functools.partial(
        find_files, folders_in(data_dir), VIDEO_EXTENSIONS, "clips", f"check --{flag}"
    )
    cache = cache_path(data_dir, *streams)
    probe = Probe(decode.probe, ClipInfo, cache, num_workers, streams)
    return ClipIndex(*probe_files(find, probe), data_dir)


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
    paths: list[str] = []
    unreadable: dict[str, str] = {}
    searched: set[tuple[int, int]] = set()
    for folder in folders:
        _require_folder(folder, remedy)
        for root, names in _walk(folder, searched, unreadable):
            visible = [name for name in names if not name.startswith(".")]
            wanted = [name for name in visible if name.lower().endswith(extensions)]
            paths += _join(root, wanted)
    where = ",".join(folders)
    if not paths and unreadable:
        examples = "; ".join(list(unreadable.values())[:MAX_EXAMPLES])
        raise DataError(f"{where}: no {kind} found where it could be searched ({examples})")
    if not paths:
        raise DataError(f"{where}: holds no {kind} ({' '.join(extensions)}); {remedy}")
    once = dict.fromkeys(paths)  # in an order that is quickly sorted
    return Found(sorted(once), unreadable)


def _join(folder: str, names: list[str]) -> list[str]:
    if is_remote(folder):
        return [blobfile.join(folder, name) for name in names]
    prefix = os.path.join(folder, "")
    return [prefix + name for name in names]


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


def cache_path(data_dir: str, *streams: AudioChoice | None, kind: str = "clips") -> Path:
    """The file of this folder's cached index for these streams (video, audio; None: the best)."""
    folders = [absolute(folder) for folder in folders_in(data_dir)]
    key = json.dumps([folders, *(streams or (None, None))])
    return cache_folder() / f"{kind}_{hashlib.sha256(key.encode()).hexdigest()[:24]}.index"
