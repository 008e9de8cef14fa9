"""Files, local or remote: atomic writes, paths."""

from __future__ import annotations

import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import blobfile


def absolute(path: str) -> str:
    """The path from the root; a remote one as it is."""
    return path if "://" in path else os.path.abspath(path)


LEFTOVER, LEFTOVER_SECONDS = (
    re.compile(r"\.[0-9a-f]{32}\.\w+"),
    3600,
)  # names of unfinished files, and their least age


def atomically(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Run `write` on a temporary file and rename it (or, to a remote path, copy it): a file that exists is complete."""
    remote = "://" in os.fspath(path)
    folder = Path(tempfile.gettempdir()) if remote else Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{uuid.uuid4().hex}{Path(path).suffix}"
    try:
        write(str(temporary))
        if remote:
            blobfile.copy(str(temporary), os.fspath(path), overwrite=True)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove what `atomically` left in a local folder when it was killed, once nobody can be writing it any more."""
    for path in Path(folder).glob(".*"):
        if LEFTOVER.fullmatch(path.name) and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
            path.unlink(missing_ok=True)


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many folders above it as tell all apart."""
    parts = [path.parts[1:] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names
