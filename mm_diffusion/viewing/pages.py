"""HTML pages from templates with one style."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2

STYLE = Path(__file__).with_name("style.css")


def render(template: Path, **values: Any) -> str:
    """A page of this template, which has the common `style` and needs a value for every name."""
    text, style = template.read_text(encoding="utf-8"), STYLE.read_text(encoding="utf-8")
    strict = jinja2.StrictUndefined
    parsed = jinja2.Template(text, autoescape=True, undefined=strict, trim_blocks=True)
    page = parsed.render(style=style, **values)
    return os.fsencode(page).decode("utf-8", errors="replace")  # file names may be no Unicode
