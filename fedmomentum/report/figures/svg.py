"""Matplotlib figures as SVG with the page's colors and font, unique ids and reproducible bytes."""

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

# Placeholder colors, to be replaced by the page's CSS variables so that figures work in both the
# light and the dark theme.
INK = "#010101"
GRID = "#010102"
SOFT = "#010103"
PAPER = "#010104"
SERIES = tuple(f"#01020{k}" for k in range(7))
_CSS = {INK: "currentColor", GRID: "var(--grid)", SOFT: "var(--soft)", PAPER: "var(--paper)"}
_CSS |= {color: f"var(--series-{k})" for k, color in enumerate(SERIES)}

# In inches, equal to 360 SVG units: text is legible at the width of a phone.
WIDTH = 5.0
# First characters that make a spreadsheet interpret a cell as a formula.
_FORMULA_STARTS = {"=", "+", "-", "@", "\t"}
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
    # A client's name may be $x$.
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Key:
    """One line of a legend, which is drawn by the page because text does not wrap in SVG.

    Attributes:
        label: Its text.
        color: One of the placeholder colors above.
        shape: `line`, `thick`, `dashed`, `dotted`, `bar`, `dot`, `ring` or `down`.
    """

    label: str
    color: str
    shape: str = "line"

    @property
    def css(self) -> str:
        """The color's name in the page's CSS."""
        return _CSS[self.color]


@dataclass(frozen=True)
class Plot:
    """A figure with its title, caption, legend and data; `key` is unique on the page."""

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
        key: A key that is unique on the page; also the name of the CSV.
        title: The title above the figure, also used as the image's alternative text.
        draw: Draws the data and labels on the axes.
        caption: What the plot shows, in a sentence or two.
        data: The rows of the CSV, header first.
        height: The height in inches.
        legend: The legend, drawn by the page.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Text is measured with the bundled font but drawn with the reader's, so missing glyphs do
        # not matter here.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams["svg.hashsalt"] = key
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = _inline_svg(buffer.getvalue(), key, f"{title}. {caption}")
    return Plot(key, title, caption, svg, tuple(legend), _to_csv(data))


def _inline_svg(document: str, key: str, label: str) -> Markup:
    """Return the SVG document as an element of the page, with ids prefixed by `key`."""
    # Remove metadata and style sheets, which would apply to the whole page.
    root = ElementTree.fromstring(document)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local_name(child.tag) in {"metadata", "style"}:
                parent.remove(child)

    # Strip namespaces, and adapt attributes to the page's ids, font and colors.
    for element in root.iter():
        element.tag = _local_name(element.tag)
        attributes: dict[str, str] = {}
        for qualified_name, value in element.items():
            name = _local_name(qualified_name)
            value = _page_attribute(name, value, key)
            # Pages may forbid inline styles, but each property is also an SVG attribute.
            attributes |= _properties(value) if name == "style" else {name: value}
        element.attrib = attributes

    # The page determines the size.
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": label, "class": "plot"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local_name(name: str) -> str:
    """Return an XML name without its namespace."""
    return name.rpartition("}")[2]


def _page_attribute(name: str, value: str, key: str) -> str:
    """Return an attribute's value with the page's ids, font and colors."""
    if name == "id":
        return f"{key}-{value}"
    if name == "href":
        return value.replace("#", f"#{key}-", 1)
    if name not in {"style", "clip-path", "fill", "stroke"}:
        return value
    value = re.sub(r"url\(#", f"url(#{key}-", value)
    # Use the page's font family, but keep the size.
    value = re.sub(r"font: ([\d.]+)px [^;]*", r"font-size: \1px", value)
    return re.sub(r"#0[0-9a-f]{5}", lambda color: _CSS.get(color[0], color[0]), value)


def _properties(style: str) -> dict[str, str]:
    """Return the properties of an inline style."""
    properties = {}
    for declaration in style.split(";"):
        name, _, value = declaration.partition(":")
        if name.strip():
            properties[name.strip()] = value.strip()
    return properties


def _to_csv(rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        writer.writerow([_csv_cell(value) for value in row])
    return buffer.getvalue()


def _csv_cell(value: Any) -> Any:
    """Return a value that no spreadsheet interprets as a formula, whatever a client's name is."""
    if isinstance(value, str) and value[:1] in _FORMULA_STARTS:
        return f"'{value}"
    return value
