"""What the pages have in common: their templates, and how they are put in place."""

import os
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from fedmomentum.report import text
from fedmomentum.report.svg import Plot


def render(template: str, content: Mapping[str, Any], csv_link: Callable[[Plot], str]) -> str:
    """The page as HTML.

    Args:
        template: its file beside this one.
        content: what it shows.
        csv_link: where a plot's CSV is.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: (files("fedmomentum.report") / name).read_text(encoding="utf-8")),
    )  # fmt: skip
    environment.filters |= {
        "percent": text.percent,
        "percent_range": text.percent_range,
        "points": text.points,
        "number": text.number,
        "count": text.count,
        "bytes": text.human_bytes,
        "seconds": text.human_seconds,
        "spread": text.spread,
        "interval": text.interval,
        "csv_link": csv_link,
    }
    return environment.get_template(template).render(content)


def write_page(path: Path, page: str) -> Path:
    """Write the file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(page, encoding="utf-8", newline="\n")
    os.replace(unfinished, path)
    return path
