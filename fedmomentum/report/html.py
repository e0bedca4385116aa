"""Shared parts of the pages: rendering a template and writing the file."""

import functools
import os
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from fedmomentum.report.figures.svg import Plot
from fedmomentum.results import formatting


def render(template: str, content: Mapping[str, Any], csv_link: Callable[[Plot], str]) -> str:
    """Render a page as HTML.

    Args:
        template: A template file of this package.
        content: The data for the template.
        csv_link: Returns the URL of a plot's CSV.
    """
    return _environment(csv_link).get_template(template).render(content)


@functools.cache
def _environment(csv_link: Callable[[Plot], str]) -> jinja2.Environment:
    """Return the environment of all templates, which compiles each only once."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_load_template),
    )
    environment.filters |= {
        "percent": formatting.percent,
        "target": formatting.target_percent,
        "percent_range": formatting.percent_range,
        "points": formatting.points,
        "number": formatting.number,
        "count": formatting.count,
        "bytes": formatting.human_bytes,
        "seconds": formatting.human_seconds,
        "spread": formatting.mean_and_spread,
        "interval": formatting.mean_and_interval,
        "clock": formatting.clock,
        "left": formatting.time_left,
        "csv_link": csv_link,
    }
    return environment


def asset(name: str) -> str:
    """Return a file of this package, such as a style sheet."""
    return _load_template(name)


def _load_template(name: str) -> str:
    return (files("fedmomentum.report") / name).read_text(encoding="utf-8")


def write_page(path: Path, page: str) -> Path:
    """Write a page atomically and return its path."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(page, encoding="utf-8", newline="\n")
    os.replace(unfinished, path)
    return path
