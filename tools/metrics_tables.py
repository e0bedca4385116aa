"""Generate the tables of docs/metrics.md from `RoundRecord`: `python tools/metrics_tables.py`.

The page marks each table with `<!-- table: CLASS FIELD ... -->` and `<!-- end -->`; without fields,
all of the class are listed. Run by `make docs`; tests/test_docs.py fails where a table is out of
date, or a field is in none.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, get_origin, get_type_hints

import msgspec

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "metrics.md"
sys.path.insert(0, str(ROOT))

MARKED = re.compile(r"(<!-- table: (\w+)((?: \w+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def documentation(kind: type[msgspec.Struct]) -> dict[str, tuple[str, str]]:
    """Return field to (unit, meaning) for the documented fields of a class."""
    fields = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        for meta in hint.__metadata__:
            if isinstance(meta, msgspec.Meta) and meta.description:
                fields[name] = ((meta.extra or {}).get("unit", ""), meta.description)
    return fields


def table(class_name: str, names: list[str]) -> str:
    """Return the table of a class, or of some of its fields."""
    from fedmomentum.formats import round_record

    fields = documentation(getattr(round_record, class_name))
    rows = ["| key | unit | meaning |", "|---|---|---|"]
    for name in names or list(fields):
        unit, meaning = fields[name]
        rows.append(f"| `{name}` | {unit} | {meaning} |".replace("|  |", "| |"))
    return "\n".join(rows)


def page() -> str:
    """Return the page with its tables renewed."""
    text = PAGE.read_text(encoding="utf-8")
    return MARKED.sub(
        lambda match: match[1] + table(match[2], match[3].split()) + "\n" + match[4], text
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
