"""Files and what is known of each, in columns that a process and its data workers share."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import typing
import zlib
from collections.abc import Collection, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np

from .shared import SharedArray, SharedBytes

FORMAT = 7  # of encoded tables; raised whenever an entry changes its meaning
IDENTITY = {"file_size": "i8", "file_time": "f8"}  # changes with the file
NUMBER_TYPES = {float: "f8", int: "i8", bool: "?"}
Info = TypeVar("Info")


class Strings:
    """Texts by number, as the bytes of all, each with a zero after it, and where those are."""

    def __init__(self, ends: np.ndarray, data: np.ndarray) -> None:
        self.ends, self.data = ends, data

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        begin = self.ends[number - 1] + 1 if number else 0
        return _decode(self.data[begin : self.ends[number]])

    def all(self) -> list[str]:
        return _decode(self.data).split("\0")[:-1]

    @staticmethod
    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        joined = "\0".join([*texts, ""]).encode("utf-8", "surrogateescape")
        data = np.frombuffer(joined, "u1")
        return [np.flatnonzero(data == 0), data]


def _decode(data: np.ndarray) -> str:
    return str(data.data, "utf-8", "surrogateescape")


def number_fields(kind: type) -> dict[str, str]:
    """The fields of a dataclass that are numbers, each a column: name -> type of the array."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: NUMBER_TYPES[hints[name]] for name in names if hints[name] in NUMBER_TYPES}


def row_type(kind: type) -> np.dtype:
    """A file in a table: size and time, the fields that are numbers, the number of its text."""
    return np.dtype([*(IDENTITY | {"text": "i8"} | number_fields(kind)).items()])


def text_of(info: Any, numbers: Collection[str]) -> str:
    """The fields but `numbers` as JSON; most files have it in common with others."""
    return json.dumps({k: v for k, v in vars(info).items() if k not in numbers})


def encode(rows: np.ndarray, paths: Sequence[str], texts: Sequence[str]) -> bytes:
    """A table as bytes: a line of JSON, the rows, and the strings."""
    arrays = [rows, *Strings.encode(paths), *Strings.encode(texts)]
    parts = [array.view("u1").data for array in arrays]
    header = {
        "format": FORMAT,
        "fields": rows.dtype.descr,
        "lengths": [len(array) for array in arrays],
        "crc32": functools.reduce(lambda value, part: zlib.crc32(part, value), parts, 0),
    }
    return b"".join([json.dumps(header).encode(), b"\n", *parts])


def is_intact(content: SharedBytes, kind: type) -> bool:
    """Whether these bytes are an encoded table of such infos."""
    start = content.buffer.find(b"\n") + 1
    try:
        header = json.loads(content.buffer[:start])
        fields = [tuple(field) for field in header["fields"]]
        is_current = header["format"] == FORMAT and fields == row_type(kind).descr
        return is_current and header["crc32"] == zlib.crc32(memoryview(content.buffer)[start:])
    except (ValueError, KeyError, TypeError):
        return False


class Table(Sequence[tuple[str, Info]], Generic[Info]):
    """(path, info) of files, sorted by path, made when they are asked for.

    kind: the dataclass of the infos. chosen: the rows that belong to this part of the table.
    """

    def __init__(
        self, kind: type[Info], content: SharedBytes, chosen: SharedArray | None = None
    ) -> None:
        self.kind, self.content = kind, content
        self.fields = number_fields(kind)
        self._map()
        self.chosen = chosen or SharedArray.of(np.arange(len(self.rows), dtype="i4"))
        self.numbers = self.chosen.values

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
        return Table, (self.kind, self.content, self.chosen)

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

    def paths(self) -> list[str]:
        everything = self.all_paths.all()
        return [everything[number] for number in self.numbers.tolist()]

    def column(self, name: str) -> np.ndarray:
        """A field of the info of every file, or its `file_size`; a sequence is a list."""
        if name in IDENTITY or name in self.fields:
            return self.rows[name][self.numbers]
        used, places = np.unique(self.rows["text"][self.numbers], return_inverse=True)
        values = np.empty(len(used), object)
        for place, text in enumerate(used):
            values[place] = json.loads(self.texts[text])[name]
        return values[places]

    def select(self, chosen: slice | np.ndarray) -> Table[Info]:
        """The files of these numbers, or of this mask."""
        return self._part(self.numbers[chosen])

    def _part(self, numbers: np.ndarray) -> Table[Info]:
        return Table(self.kind, self.content, SharedArray.of(numbers))

    def without(self, paths: Collection[str]) -> Table[Info]:
        """All files but these."""
        found = [bisect.bisect_left(range(len(self)), path, key=self.path) for path in paths]
        places = zip(found, paths, strict=True)
        mine = [k for k, path in places if k < len(self) and self.path(k) == path]
        return self._part(np.delete(self.numbers, mine))
