"""Files, local or remote (gs://, az://, https://): paths, atomic writing, checksums."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import blobfile

UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.\w+")  # names of files that are being written
LIKE_URL = re.compile(r"[\w+.-]+:")  # to blobfile, which refuses them
ABANDONED_SECONDS = 3600  # after which nobody can still be writing one


def is_remote(path: str | os.PathLike) -> bool:
    """Whether the path is a URL."""
    return "://" in os.fspath(path)


def unambiguous(path: str) -> str:
    """The path, from the root if it is a local one that begins like a URL ("run:1/a.mp4")."""
    return absolute(path) if LIKE_URL.match(path) else path


def absolute(path: str) -> str:
    """The path from the root; a remote one as it is."""
    return path if is_remote(path) else os.path.abspath(path)


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many folders above it as tell all apart."""
    parts = [path.parts[1:] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def cache_folder() -> Path:
    """MM_DIFFUSION_CACHE, else a folder below the user's cache folder, else below the temporary."""
    chosen = os.environ.get("MM_DIFFUSION_CACHE")
    if chosen:
        return Path(chosen)
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if user.startswith("~"):  # a user without a home
        return Path(tempfile.gettempdir(), f"mm_diffusion_{os.getuid()}")
    return Path(user, "mm_diffusion")


def checksum(path: str | os.PathLike) -> dict[str, Any]:
    """{"bytes": length, "sha256": hexadecimal digest} of a file."""
    with blobfile.BlobFile(os.fspath(path), "rb", streaming=is_remote(path)) as file:
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def write_atomically(
    path: str | os.PathLike, write: Callable[[str], object], durable: bool = False
) -> None:
    """Run `write(temporary path)` and rename the result: a file at `path` is always complete.

    To a remote path it is copied. `durable`: return only once file and name are on the disk.
    """
    folder = Path(tempfile.gettempdir()) if is_remote(path) else Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{uuid.uuid4().hex}{Path(path).suffix}"
    try:
        write(str(temporary))
        if is_remote(path):
            blobfile.copy(str(temporary), os.fspath(path), overwrite=True)
            return
        if durable:
            _flush(temporary)
        os.replace(temporary, path)
        if durable:
            _flush(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str, durable: bool = False) -> None:
    """Write a UTF-8 text file atomically; file names in it that are not UTF-8 stay as they are."""

    def write(temporary: str) -> None:
        Path(temporary).write_text(text, "utf-8", errors="surrogateescape")

    write_atomically(path, write, durable)


def _flush(path: Path) -> None:
    """Wait until what was written to this file, or renamed in this folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: str | os.PathLike, least_age: float = ABANDONED_SECONDS) -> None:
    """Remove what a killed `write_atomically` left in a local folder at least `least_age` s ago."""
    for path in Path(folder).glob(".*"):
        if not UNFINISHED.fullmatch(path.name):
            continue
        if time.time() - path.stat().st_mtime >= least_age:
            path.unlink(missing_ok=True)
