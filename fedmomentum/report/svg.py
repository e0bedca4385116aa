"""Matplotlib figures as SVG that belongs to the page: its colours, its font, its own ids, the same bytes every time."""

import csv
import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours that nothing else uses stand for the page's own, so that one figure serves light and dark.
INK, GRID, SOFT, PAPER = "#010101", "#010102", "#010103", "#010104"
SERIES = tuple(f"#01020{k}" for k in range(7))
_CSS = {INK: "currentColor", GRID: "var(--grid)", SOFT: "var(--soft)", PAPER: "var(--paper)"}
_CSS |= {colour: f"var(--series-{k})" for k, colour in enumerate(SERIES)}

WIDTH = 5.0  # inches = 360 SVG units: text is legible where a phone shows the figure at its own width
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a client may be called $x$
}


@dataclass(frozen=True)
class Key:
    """One line of a legend, drawn by the page because text wraps there and not in an SVG."""

    label: str
    colour: str
    shape: str = "line"  # line | thick | dashed | bar | dot | ring | down

    @property
    def css(self) -> str:
        """The colour as the page knows it."""
        return _CSS[self.colour]


@dataclass(frozen=True)
class Plot:
    """A figure with everything a reader needs beside it. `key` is unique in the page."""

    key: str
    title: str
    caption: str
    svg: Markup
    legend: tuple[Key, ...]
    csv: str


def make_plot(
    key: str,
    title: str,
    draw: Callable[[Axes], None],
    *,
    caption: str,
    data: Iterable[Sequence[Any]],
    height: float = 2.7,
    legend: Sequence[Key] = (),
) -> Plot:
    """Draw one figure.

    Args:
        key: unique in the page; also the name of the CSV.
        title: shown above, and read out for the image.
        draw: puts the data and the labels on the axes.
        caption: what the plot shows, in a sentence or two.
        data: the rows of the CSV, its header first.
        height: inches.
        legend: the page's legend.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Text is measured with the bundled font and drawn with the reader's: a missing glyph is no concern here.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams["svg.hashsalt"] = key
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Plot(key, title, caption, _inline(buffer.getvalue(), key, f"{title}. {caption}"), tuple(legend), _csv(data))


def _inline(document: str, key: str, label: str) -> Markup:
    """The SVG document as an element of the page, its ids prefixed by `key`."""
    root = ElementTree.fromstring(document)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in {"metadata", "style"}:
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): _attribute(_local(name), value, key) for name, value in element.items()}
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": label, "class": "plot"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _attribute(name: str, value: str, key: str) -> str:
    if name == "id":
        return f"{key}-{value}"
    if name == "href":
        return value.replace("#", f"#{key}-", 1)
    if name in {"style", "clip-path", "fill", "stroke"}:
        value = re.sub(r"url\(#", f"url(#{key}-", value)
        value = re.sub(r"font: ([\d.]+)px [^;]*", r"font-size: \1px", value)  # the family is the page's
        return re.sub(r"#0[0-9a-f]{5}", lambda colour: _CSS.get(colour[0], colour[0]), value)
    return value


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """A cell that a spreadsheet does not take for a formula, whatever a client calls itself."""
    return f"'{value}" if isinstance(value, str) and value[:1] in {"=", "+", "-", "@", "\t"} else value
