"""Values of flags, the base of all configs, and how a field becomes a flag."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from ..devices import AUTO, BLOCKS, CUDA_GRAPH_MODES
from ..files import unambiguous

SR = "sr_"  # how flags of the upsampler begin, but for the SHARED ones
SHARED = ("large_size", "small_size", "use_checkpoint", "checkpoint_resolutions", "use_fp16")
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# --compile -> how the network is compiled; "": not at all
COMPILE_MODES = {"auto": AUTO, "false": "", "true": "default", "blocks": BLOCKS}
COMPILE_MODES |= {mode: mode for mode in CUDA_GRAPH_MODES}
CHANNEL_MULT = {64: "1,2,3,4", 128: "1,1,2,3,4", 256: "1,1,2,2,4,4", 512: "0.5,1,1,2,2,4,4"}
SR_CHANNEL_MULT = CHANNEL_MULT | {512: CHANNEL_MULT[256]}

Parse = Callable[[str, Any], Any]  # (flag, what was given) -> value; ValueError naming the flag
Ints = tuple[int, ...]
Floats = tuple[float, ...]
Texts = tuple[str, ...]


class FlagError(argparse.ArgumentTypeError, ValueError):
    """A value that a flag cannot take; argparse shows its text as it is."""


def numbers(name: str, text: str | Sequence[int], count: int = 0) -> tuple[int, ...]:
    """ "20,3,64,64" -> (20, 3, 64, 64): positive integers, `count` of them if given."""
    parts = text if isinstance(text, tuple | list) else str(text).split(",")
    with suppress(ValueError):
        values = tuple(int(part) for part in parts)
        if min(values) > 0 and len(values) == (count or len(values)):
            return values
    wanted = f"{count} positive integers" if count else "positive integers"
    raise ValueError(f"--{name} {text!r}: need {wanted} with commas between")


def as_text(values: Sequence[Any]) -> str:
    """(2, 4, 8) -> "2,4,8", as a list is written on the command line."""
    return ",".join(map(str, values))


def sizes(count: int) -> Parse:
    """`count` positive integers."""
    return partial(numbers, count=count)


def stream_indices(name: str, value: int | str | Sequence[int]) -> int | Ints:
    """ "1" -> 1, one stream; "1,2" -> (1, 2), a mono stream for left and one for right."""
    parts = value if isinstance(value, tuple | list) else str(value).split(",")
    with suppress(ValueError):
        indices = tuple(int(part) for part in parts)
        if min(indices) >= 0 and len(indices) <= 2:
            return indices if len(indices) == 2 else indices[0]
    raise ValueError(f"--{name} {value!r}: need an index of a stream, or two (left,right)")


def factors(name: str, text: str | Sequence[int]) -> tuple[int, ...]:
    """ "2,4,8" -> (2, 4, 8); "-1" or empty -> none."""
    return () if text in ("", "-1", -1, ()) else numbers(name, text)


def channel_multipliers(text: str | Sequence[float], width: int, prefix: str = "") -> Floats:
    """A list as given, or what images of this width call for."""
    defaults = SR_CHANNEL_MULT if prefix else CHANNEL_MULT
    given = text or defaults.get(width, "")
    with suppress(ValueError):
        values = tuple(map(float, given.split(",") if isinstance(given, str) else given))
        if min(values) > 0:
            return values
    raise ValueError(
        f"--{prefix}channel_mult {text!r}: for images {width} wide give a list such as 1,2,3,4"
    )


def decimals(name: str, text: str | Sequence[str]) -> tuple[str, ...]:
    """ "0.9999,0.99" -> ("0.9999", "0.99"), as they are written in file names."""
    parts = text.split(",") if isinstance(text, str) else text
    found = tuple(part.strip() for part in parts)
    if not all(re.fullmatch(r"0|0?\.\d+", part) for part in found):
        raise ValueError(f"--{name} {text!r}: need decimals in [0, 1), with commas between")
    return found


def one_of(choices: Collection[str]) -> Parse:
    """One of the `choices`."""

    def parse(name: str, value: Any) -> str:
        if str(value) not in choices:
            raise ValueError(f"--{name} {value!r}: choose from {', '.join(filter(None, choices))}")
        return str(value)

    return parse


def shares_of(choices: Collection[str]) -> Callable[[str, Any], dict[str, float]]:
    """ "joint:0.5,video2audio:0.5" -> {"joint": 0.5, "video2audio": 0.5}: sums to 1."""

    def parse(name: str, text: Any) -> dict[str, float]:
        problem = f"--{name} {text!r}: need NAME:SHARE with commas between, of {', '.join(choices)}"
        pairs = [part.strip().partition(":") for part in str(text).split(",")]
        if len(pairs) == 1 and not pairs[0][1]:
            pairs = [(pairs[0][0], ":", "1")]
        found: dict[str, float] = {}
        for choice, _, share in pairs:
            try:
                found[choice] = float(share)
            except ValueError:
                raise ValueError(problem) from None
        total = sum(found.values())
        if len(found) < len(pairs) or not found.keys() <= set(choices) or min(found.values()) <= 0:
            raise ValueError(problem)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"--{name} {text!r}: shares sum to {total:g}; make them sum to 1")
        return found

    return parse


def path(name: str, value: str) -> str:
    """A file or folder, local or remote."""
    return unambiguous(value)


def paths(name: str, value: str) -> str:
    """Several of them with commas between."""
    return ",".join(unambiguous(part.strip()) for part in value.split(","))


def at_least(least: float, other: float | None = None) -> Parse:
    """A finite number of at least this size, or one `other`."""

    def parse(name: str, value: Any) -> float:
        if not least <= value < math.inf and value != other:
            also = "" if other is None else f", or {other}"
            need = f"at least {least}{also}" if least else "a finite number that is not negative"
            raise ValueError(f"--{name} {value}: need {need}")
        return value

    return parse


def positive(name: str, value: float) -> float:
    """A finite number above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"--{name} {value}: must be positive and finite")
    return value


def require_positive(**flags: float) -> None:
    """ValueError that names the first flag that is not `positive`."""
    for name, value in flags.items():
        positive(name, value)


def compile_mode(name: str, value: str | bool) -> str:
    """What --compile means: auto, blocks, a mode of torch.compile, "" for none."""
    known = COMPILE_MODES | {mode: mode for mode in COMPILE_MODES.values()}
    if str(value).lower() not in known:
        raise ValueError(f"--{name} {value!r}: choose from {', '.join(COMPILE_MODES)}")
    return known[str(value).lower()]


def flag(default: Any, text: str, parse: Parse | None = None, kind: Any = None) -> Any:
    """A field of a config: its default, its help text, and how its value is checked or converted.

    kind: the type on the command line, by default that of `default`.
    """
    metadata = {"help": text, "parse": parse, "kind": kind or type(default)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """The base of all configs: parses and checks its fields; ValueError names the flag."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = flag_name(type(self), field), getattr(self, field.name)
            kind, parse = field.metadata["kind"], field.metadata["parse"]
            if value is None and field.default is None:
                continue
            if kind is not str:
                value = convert(kind, name, value)
            object.__setattr__(self, field.name, parse(name, value) if parse else value)
        self.check()

    def check(self) -> None:
        """ValueError where fields do not fit each other."""


def flag_name(config: type[Config], field: dataclasses.Field) -> str:
    """The flag of a field."""
    unprefixed = field.name in SHARED or field.name.startswith(config.prefix)
    return field.name if unprefixed else config.prefix + field.name


def convert(kind: type, name: str, value: Any) -> Any:
    """The value as `kind`; FlagError naming the flag where it is none."""
    try:
        return BOOLEANS[str(value).lower()] if kind is bool else kind(value)
    except (KeyError, TypeError, ValueError):
        raise FlagError(f"--{name} {value!r}: need a value of type {kind.__name__}") from None
