"""What is known of each family of models: a record that the tests make and keep current.

Every family is built tiny from its configuration, trained by two clients for two rounds and
exported; `families.json` holds what came of it.
"""

from __future__ import annotations

from pathlib import Path

from fedmomentum.errors import ModelError
from fedmomentum.utils.schema import Schema, parse_json

RECORDS = Path(__file__).with_name("families.json")
COLUMNS = ("family", "class", "adapted by default", "not adapted", "trains and exports")
INTRODUCTION = """# Models

What happens with each family of causal language models that transformers supports, when
`lora.target-modules` is not set. `fedmomentum models` lists them, and `fedmomentum models NAME`
shows all of those whose name or class contains NAME. This table is made by
`python tools/models_table.py`, which builds a tiny model of every family from its configuration
class, has two clients train it for two rounds, writes both exports, loads them by stock
transformers and PEFT, and compares their logits; a test repeats this for every family. Counts are
those of the tiny models, most of which have two layers.

- **adapted by default**: PEFT's choice for the architecture; where PEFT has none, the projections
  of the decoder layers. What else is possible: [what is adapted](training.md).
- **not adapted**: what `target-modules = "all-linear"` leaves out too, and why.
- **trains and exports**: `yes`, or why a run is refused before it starts.

Image-text models (classes that end in `ForConditionalGeneration`) are trained on text: their
language model is adapted, the rest stays as it is and is part of the merged export.
"""


class Family(Schema, frozen=True):
    """What came of a family's tiny model.

    Attributes:
        family: transformers' name of the architecture, `model_type` in config.json.
        kind: The class of the model.
        adapted: The modules that are adapted by default, layers together.
        is_peft_default: Whether that is PEFT's choice.
        left_out: The linear modules and experts that `all-linear` leaves out, with the reason.
        refused: Why a run is refused; empty if it trains and exports.
    """

    family: str
    kind: str
    adapted: list[str]
    is_peft_default: bool
    left_out: list[str]
    refused: str


class _Records(Schema, frozen=True):
    """The file.

    Attributes:
        families: Every family that was tried.
        not_tried: The other causal language models of transformers, with the reason.
    """

    families: list[Family]
    not_tried: dict[str, str]


def known_families() -> list[Family]:
    """Return what is known of every family that was tried, sorted by name."""
    return _read().families


def untried_families() -> dict[str, str]:
    """Return the families that were not tried, with the reason."""
    return _read().not_tried


def _read() -> _Records:
    return parse_json(RECORDS.read_bytes(), _Records, str(RECORDS), ModelError)


def family_cells(family: Family) -> list[str]:
    """Return a family's cells under `COLUMNS`."""
    adapted = "; ".join(family.adapted)
    if family.is_peft_default:
        adapted += " (PEFT)"
    left_out = "; ".join(family.left_out)
    return [family.family, family.kind, adapted, left_out, family.refused or "yes"]


def families_page() -> str:
    """Return docs/models.md."""
    lines = [INTRODUCTION, f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for family in known_families():
        cells = [cell.replace("*", "\\*").replace("|", "\\|") for cell in family_cells(family)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Not tried:"]
    untried = [f"{name} ({reason})" for name, reason in untried_families().items()]
    lines += [", ".join(untried) + ".", ""]
    return "\n".join(lines)
