"""Files and what is known of each, in columns that a process and its data workers share."""

from __future__ import annotations

import bisect
import dataclasses
import json
import mmap
import os
import tempfile
import typing
import zlib
from collections.abc import Collection, Iterator, Sequence
from multiprocessing import context, reduction
from typing import Any, BinaryIO, Generic, TypeVar, overload

import numpy as np

from .. import logger

FORMAT = 6  # of encoded tables; raised whenever an entry changes its meaning
NUMBER_TYPES = {float: "f8", int: "i8", bool: "?"}
Info = TypeVar("Info")


class SharedBytes:
    """Bytes that processes started by this one share instead of copying them.

    They lie in a nameless temporary file: what happens to the file that they come from, on this
    or another host, does not reach those who read them.
    """

    def __init__(self, file: BinaryIO | None, buffer: Any) -> None:
        self.file, self.buffer = file, buffer

    @classmethod
    def of(cls, content: bytes) -> SharedBytes:
        """Copy the bytes into a file; where there is no space for it, keep them in memory."""
        try:
            file: Any = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as it is mapped)
            file.write(content)
            file.flush()
        except OSError as error:
            logger.warn(
                f"{tempfile.gettempdir()}: cannot hold the index ({error.strerror}), so each data"
                " worker keeps a copy; set TMPDIR to a folder with space"
            )
            return cls(None, content)
        return cls.map(file)

    @classmethod
    def map(cls, file: Any) -> SharedBytes:
        return cls(file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def __reduce__(self) -> tuple:
        if self.file is None or context.get_spawning_popen() is None:
            return SharedBytes, (None, bytes(self.buffer))
        return _inherit, (reduction.DupFd(self.file.fileno()),)


def _inherit(descriptor: Any) -> SharedBytes:
    return SharedBytes.map(os.fdopen(descriptor.detach(), "rb"))


class Strings:
    """Texts by number, as the bytes of all and where each ends."""

    def __init__(self, ends: np.ndarray, data: np.ndarray) -> None:
        self.ends, self.data = ends, data

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        begin = self.ends[number - 1] if number else 0
        return bytes(self.data[begin : self.ends[number]]).decode("utf-8", "surrogateescape")

    @staticmethod
    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        parts = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([len(part) for part in parts], dtype="i8")
        return [ends, np.frombuffer(b"".join(parts), "u1")]


def number_fields(kind: type) -> dict[str, str]:
    """The fields of a dataclass that are numbers, each a column: name -> type of the array."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: NUMBER_TYPES[hints[name]] for name in names if hints[name] in NUMBER_TYPES}


def row_type(kind: type) -> np.dtype:
    """A file in a table: size and time, the fields that are numbers, the number of its text."""
    own = {"file_size": "i8", "file_time": "f8", "text": "i8"}
    return np.dtype([*own.items(), *number_fields(kind).items()])


def text_of(info: Any, numbers: Collection[str]) -> str:
    """The fields but `numbers` as JSON; most files have it in common with others."""
    return json.dumps({k: v for k, v in vars(info).items() if k not in numbers})


def encode(rows: np.ndarray, paths: Sequence[str], texts: Sequence[str]) -> bytes:
    """A table as bytes: a line of JSON, the rows, and the strings."""
    arrays = [rows, *Strings.encode(paths), *Strings.encode(texts)]
    body = b"".join(array.tobytes() for array in arrays)
    header = {
        "format": FORMAT,
        "fields": rows.dtype.descr,
        "lengths": [len(array) for array in arrays],
        "crc32": zlib.crc32(body),
    }
    return json.dumps(header).encode() + b"\n" + body


def is_intact(content: bytes, kind: type) -> bool:
    """Whether these bytes are an encoded table of such infos."""
    try:
        line, _, body = content.partition(b"\n")
        header = json.loads(line)
        fields = [tuple(field) for field in header["fields"]]
        is_current = header["format"] == FORMAT and fields == row_type(kind).descr
        return is_current and header["crc32"] == zlib.crc32(body)
    except (ValueError, KeyError, TypeError):
        return False


class Table(Sequence[tuple[str, Info]], Generic[Info]):
    """(path, info) of files, sorted by path, made when they are asked for.

    kind: the dataclass of the infos. numbers: of the rows that belong to this part of the table.
    """

    def __init__(
        self, kind: type[Info], content: SharedBytes, numbers: np.ndarray | None = None
    ) -> None:
        self.kind, self.content = kind, content
        self.fields = number_fields(kind)
        self._map()
        self.numbers = np.arange(len(self.rows)) if numbers is None else numbers

    def _map(self) -> None:
        buffer = self.content.buffer
        start = buffer.find(b"\n") + 1
        lengths = json.loads(buffer[:start])["lengths"]
        arrays: list[np.ndarray] = []
        kinds = [row_type(self.kind), *map(np.dtype, ("i8", "u1", "i8", "u1"))]
        for length, kind in zip(lengths, kinds, strict=True):
            arrays.append(np.frombuffer(buffer, kind, length, start))
            start += arrays[-1].nbytes
        self.rows = arrays[0]
        self.all_paths, self.texts = Strings(*arrays[1:3]), Strings(*arrays[3:])

    def __reduce__(self) -> tuple:
        return Table, (self.kind, self.content, self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, number: int) -> tuple[str, Info]: ...
    @overload
    def __getitem__(self, number: slice) -> Table[Info]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return self.select(number)
        row = self.rows[self.numbers[number]]
        _, _, text, *numbers = row.item()
        fields = dict(zip(self.fields, numbers, strict=True))
        return self.path(number), self.kind(**fields, **json.loads(self.texts[text]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def path(self, number: int) -> str:
        return self.all_paths[self.numbers[number]]

    def paths(self) -> Iterator[str]:
        return map(self.path, range(len(self)))

    def column(self, name: str) -> np.ndarray:
        """A field of the info of every file; a sequence is a list."""
        if name in self.fields:
            return self.rows[name][self.numbers]
        used, places = np.unique(self.rows["text"][self.numbers], return_inverse=True)
        values = np.empty(len(used), object)
        for place, text in enumerate(used):
            values[place] = json.loads(self.texts[text])[name]
        return values[places]

    def select(self, chosen: slice | np.ndarray) -> Table[Info]:
        """The files of these numbers, or of this mask."""
        return Table(self.kind, self.content, self.numbers[chosen])

    def without(self, paths: Collection[str]) -> Table[Info]:
        """All files but these."""
        found = [bisect.bisect_left(range(len(self)), path, key=self.path) for path in paths]
        places = zip(found, paths, strict=True)
        mine = [k for k, path in places if k < len(self) and self.path(k) == path]
        return Table(self.kind, self.content, np.delete(self.numbers, mine))
