"""Generate parts of docs/architecture.md from the code: `python tools/architecture.py`.

Writes the picture of the layers, docs/architecture/layers.svg, from the table in
tests/test_layers.py, and the list of packages from their docstrings. Run by `make docs`;
tests/test_docs.py fails where either is out of date.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fedmomentum"
PAGE = ROOT / "docs" / "architecture.md"
FIGURE = ROOT / "docs" / "architecture" / "layers.svg"
sys.path.insert(0, str(ROOT))

# Sizes in the picture, in SVG units.
WIDTH = 860
LEFT = 40
RIGHT = 30
ROW_HEIGHT = 52
BOX_HEIGHT = 34
GAP = 10
TOP = 14

STYLE = """
  text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #22262a; }
  .number { font-size: 12px; fill: #5c646c; }
  .box { fill: #e8f1f8; stroke: #0072b2; }
  .arrow { stroke: #5c646c; fill: none; stroke-width: 1.5; }
  .head { fill: #5c646c; }
  .paper { fill: #fdfdfb; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e3e5e6; }
    .number { fill: #a2abb2; }
    .box { fill: #1d2c38; stroke: #4aa8e0; }
    .arrow { stroke: #a2abb2; }
    .head { fill: #a2abb2; }
    .paper { fill: #16191c; }
  }
"""


def summary(file: Path) -> str:
    """Return the first line of a module's docstring, without its period."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0].rstrip(".")


def figure() -> str:
    """Draw the layers, the highest at the top."""
    from tests.test_layers import LAYERS

    height = 2 * TOP + len(LAYERS) * ROW_HEIGHT
    right = WIDTH - RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-label="Packages in layers; a package imports from lower layers only">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}" rx="8"/>',
    ]
    for number, layer in enumerate(LAYERS, start=1):
        y = TOP + (len(LAYERS) - number) * ROW_HEIGHT
        middle = y + ROW_HEIGHT // 2
        parts.append(f'<text class="number" x="16" y="{middle + 4}">{number}</text>')
        parts += boxes(sorted(layer), y + (ROW_HEIGHT - BOX_HEIGHT) // 2, right - LEFT)

    # The direction of imports.
    x = WIDTH - RIGHT // 2
    end = height - TOP - 8
    parts.append(f'<path class="arrow" d="M{x} {TOP + 8}V{end}"/>')
    parts.append(f'<path class="head" d="M{x - 5} {end - 4}h10l-5 10z"/>')
    return "\n".join([*parts, "</svg>", ""])


def boxes(names: list[str], y: int, width: int) -> list[str]:
    """Draw the packages of one layer, equally wide."""
    box_width = (width - GAP * (len(names) - 1)) // len(names)
    parts = []
    for position, name in enumerate(names):
        x = LEFT + position * (box_width + GAP)
        parts.append(
            f'<rect class="box" x="{x}" y="{y}" width="{box_width}" height="{BOX_HEIGHT}" rx="5"/>'
        )
        parts.append(
            f'<text x="{x + box_width // 2}" y="{y + BOX_HEIGHT // 2 + 5}" '
            f'text-anchor="middle">{name}</text>'
        )
    return parts


def packages() -> str:
    """Return the table of packages, the highest layer first."""
    from tests.test_layers import LAYERS

    rows = ["| layer | package | what it does |", "|---|---|---|"]
    for number in range(len(LAYERS), 0, -1):
        for name in sorted(LAYERS[number - 1]):
            rows.append(f"| {number} | `{name}` | {summary(PACKAGE / name / '__init__.py')} |")
    return "\n".join(rows)


def page() -> str:
    """Return the page with its generated part renewed."""
    text = PAGE.read_text(encoding="utf-8")
    table = packages()
    text, count = re.subn(
        r"(<!-- packages: made by `make docs` -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{table}\n{match[2]}",
        text,
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"{PAGE} has {count} places for the packages")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    FIGURE.write_text(figure(), encoding="utf-8")
