"""Results for each family of models, recorded and kept current by the tests.

For every family, a tiny model is built from its configuration, as a causal language model and as a
sequence classifier if these classes exist, trained by two clients for two rounds, and exported.
`families.json` contains the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmomentum.errors import ModelError
from fedmomentum.utils.schema import Schema, parse_json

RECORDS = Path(__file__).with_name("families.json")
COLUMNS = ("family", "class", "adapted by default", "not adapted", "trains and exports")
CLASSIFIER_COLUMNS = ("family", "class", "adapted by default", "trains and exports")
INTRODUCTION = """# Models

What happens with each family of causal language models that transformers supports, when
`lora.target-modules` is not set. `fedmomentum models` lists them, and `fedmomentum models NAME`
shows all of those whose name or class contains NAME. This table is made by
`python tools/models_table.py`, which builds a tiny model of every family from its configuration
class, has two clients train it for two rounds, writes both exports, loads them by stock
transformers and PEFT, and compares their logits; a test repeats this for every family. Counts are
those of the tiny models, most of which have two layers.

- **adapted by default**: PEFT's choice for the architecture; where PEFT has none, the projections
  of the decoder layers. What else is possible:
  [which modules are adapted](training.md#which-modules-are-adapted).
- **not adapted**: what `target-modules = "all-linear"` leaves out too, and why.
- **trains and exports**: `yes`, or why a run is refused before it starts.

Image-text models (classes that end in `ForConditionalGeneration`) are trained on text: their
language model is adapted, the rest stays as it is and is part of the merged export.
"""
CLASSIFIERS_INTRODUCTION = """
## Sequence classifiers

The same for `model.task = "sequence-classification"` ([classifiers](classification.md)): the
encoder or decoder is stored without a head, two clients train it with a head for three labels, and
the logits of both exports are compared. A model whose logits for a text depend on how far the text
is padded is refused.
"""


class Family(Schema, frozen=True):
    """Results for a family's tiny model.

    Attributes:
        family: transformers' name of the architecture, `model_type` in config.json.
        kind: The class of the model.
        adapted: The modules that are adapted by default, grouped over layers.
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


class ClassifierFamily(Schema, frozen=True):
    """Results for a family's tiny sequence classifier.

    Attributes:
        family: transformers' name of the architecture, `model_type` in config.json.
        kind: The class of the classifier.
        adapted: The modules that are adapted by default, grouped over layers.
        is_peft_default: Whether that is PEFT's choice.
        refused: Why a run is refused; empty if it trains and exports.
    """

    family: str
    kind: str
    adapted: list[str]
    is_peft_default: bool
    refused: str


class Records(Schema, frozen=True):
    """The contents of `families.json`.

    Attributes:
        families: Every causal language model that was tried.
        not_tried: The other causal language models of transformers, with the reason.
        classifiers: Every sequence classifier that was tried.
        classifiers_not_tried: The other sequence classifiers of transformers, with the reason.
    """

    families: list[Family]
    not_tried: dict[str, str]
    classifiers: list[ClassifierFamily]
    classifiers_not_tried: dict[str, str]


def known_families() -> Records:
    """Return the results for every family, sorted by name."""
    return parse_json(RECORDS.read_bytes(), Records, str(RECORDS), ModelError)


def family_cells(family: Family | ClassifierFamily) -> list[str]:
    """Return a family's cells under `COLUMNS`, or a classifier's under `CLASSIFIER_COLUMNS`."""
    adapted = "; ".join(family.adapted)
    if family.is_peft_default:
        adapted += " (PEFT)"
    cells = [family.family, family.kind, adapted, family.refused or "yes"]
    if isinstance(family, Family):
        cells.insert(3, "; ".join(family.left_out))
    return cells


def families_page() -> str:
    """Return the text of docs/models.md."""
    known = known_families()
    lines = [
        INTRODUCTION,
        *_table(COLUMNS, known.families, known.not_tried),
        CLASSIFIERS_INTRODUCTION,
        *_table(CLASSIFIER_COLUMNS, known.classifiers, known.classifiers_not_tried),
    ]
    return "\n".join(lines)


def _table(
    columns: Sequence[str],
    families: Sequence[Family | ClassifierFamily],
    untried: Mapping[str, str],
) -> list[str]:
    """Return the lines of a Markdown table, followed by a list of what was not tried."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for family in families:
        cells = [cell.replace("*", "\\*").replace("|", "\\|") for cell in family_cells(family)]
        lines.append(f"| {' | '.join(cells)} |")
    reasons = [f"{name} ({reason})" for name, reason in untried.items()]
    return [*lines, "", "Not tried:", ", ".join(reasons) + ".", ""]
