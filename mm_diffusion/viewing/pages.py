"""HTML pages: templates that extend `page.html`, which has what all have in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """A page of this template, which needs a value for every name."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template(template).render(**values)
    return os.fsencode(page).decode("utf-8", errors="replace")  # file names may be no Unicode
