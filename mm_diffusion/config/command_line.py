"""Configs -> a command line -> configs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn, TypeVar

from ..dist_util import end_job
from .diffusion import SRDiffusionConfig
from .flags import SR, Config, convert, flag_name
from .subjects import UpsamplerConfig

ConfigType = TypeVar("ConfigType", bound=Config)
Reader = Callable[[str], Any]  # text on the command line -> value


def flag_defaults(*configs: type[Config]) -> dict[str, Any]:
    """The flags of these configs with their defaults, each flag once."""
    return {flag_name(c, f): f.default for c in configs for f in dataclasses.fields(c)}


# Published flags that are accepted where nothing reads them, and why nothing does.
WITHOUT_EFFECT = {
    "t_lr": "nor had it in the published code",
    "frame_gap": "nor had it in the published code",
    "ref_path": "this script computes no metrics",
    "save_type": "this script writes clips as mp4 and their audio as wav",
    "classifier_scale": "this script generates no modality from the other",
    **dict.fromkeys(
        flag_defaults(UpsamplerConfig, SRDiffusionConfig), "this script has no upsampler"
    ),
    "sr_model_path": "this script upsamples no clips",
    "sr_sample_fn": "this script upsamples no clips",
    "load_noise": "this script upsamples no clips",
}
# Published names -> the flags they mean, in scripts that have these and no flag of that name.
PUBLISHED_NAMES = {
    "model_path": "multimodal_model_path",
    **{
        name.removeprefix(SR): name
        for name in flag_defaults(UpsamplerConfig, SRDiffusionConfig)
        if name.startswith(SR)
    },
}


class Parser(argparse.ArgumentParser):
    """argparse that reports what is wrong in one line and exits with status 2."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        end_job(f"error: {message} (--help lists the flags)", status=2)


def parse(
    description: str,
    *configs: type[Config],
    defaults: Mapping[str, Any] | None = None,
    positional: str = "",
) -> tuple[dict[str, Any], set[str]]:
    """The command line -> values of all flags of `configs`, and the names of the explicit ones.

    `defaults` replace those of the fields. `positional` is a field given without its name. --help
    groups the flags by config. A flag given by its published name is returned under ours.
    """
    usage = " ".join(["%(prog)s", *filter(None, [positional.upper()]), "[--FLAG VALUE ...]"])
    parser = Parser(description=description, usage=usage)
    values = flag_defaults(*configs) | dict(defaults or {})
    readers: dict[str, Reader] = {}
    for config in configs:
        group = parser.add_argument_group((config.__doc__ or "").splitlines()[0].rstrip("."))
        for field in dataclasses.fields(config):
            name = flag_name(config, field)
            if name == positional:
                parser.add_argument(name, metavar=name.upper(), help=field.metadata["help"])
            elif name not in readers:
                readers[name] = partial(_read, name, field)
                _add_flag(group, name, field, values[name], readers[name])
    aliases = _add_published_names(parser, readers)
    idle = parser.add_argument_group("Accepted, without effect here")
    for name in sorted(WITHOUT_EFFECT.keys() - readers):
        idle.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar="VALUE")
    explicit = vars(parser.parse_args())
    for alias in sorted(aliases.keys() & explicit):
        name, value = aliases[alias], explicit.pop(alias)
        if explicit.setdefault(name, value) != value:
            parser.error(f"--{alias} {value} means --{name}, which is {explicit[name]}: give one")
    return values | explicit, set(explicit)


def _read(name: str, field: dataclasses.Field, text: str) -> Any:
    """The value of a flag that is given as this text."""
    is_none = text == "None" and field.default is None
    return None if is_none else convert(field.metadata["kind"], name, text)


def _add_flag(
    group: Any, name: str, field: dataclasses.Field, default: Any, reader: Reader
) -> None:
    text = f"{field.metadata['help']} (default: {default!r})".replace("%", "%%")
    options = {"default": argparse.SUPPRESS, "metavar": field.metadata["kind"].__name__.upper()}
    group.add_argument(f"--{name}", type=reader, help=text, **options)


def _add_published_names(parser: Parser, readers: Mapping[str, Reader]) -> dict[str, str]:
    """Add the published names of the flags that have these readers -> published name, flag."""
    group = parser.add_argument_group("Published names")
    aliases = {
        alias: name
        for alias, name in PUBLISHED_NAMES.items()
        if name in readers and alias not in readers
    }
    for alias, name in aliases.items():
        text = f"the same as {name}"
        hidden, kind = argparse.SUPPRESS, readers[name]
        group.add_argument(f"--{alias}", default=hidden, type=kind, metavar="VALUE", help=text)
    return aliases


def pick(config: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
    """The config made of its flags among `values`; ValueError naming an impossible one."""
    fields = dataclasses.fields(config)
    return config(**{f.name: values[flag_name(config, f)] for f in fields})


def notes_on(explicit: set[str], *configs: type[Config]) -> list[str]:
    """What to report about explicit flags of a script that has `configs`."""
    idle = explicit - flag_defaults(*configs).keys()
    return [
        f"--{name} has no effect: {why}" for name, why in WITHOUT_EFFECT.items() if name in idle
    ]
