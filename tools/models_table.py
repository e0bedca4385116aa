"""Make `fedmomentum/base_model/families.json` and docs/models.md: `python tools/models_table.py`.

Trains and exports a tiny model of every family, which takes some ten minutes. Run by `make docs`;
tests/test_families.py fails where the record of a family is out of date. Names of families after
the command renew their records only.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import msgspec

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def main(names: list[str]) -> None:
    """Renew the records of some families, or of all, and the page."""
    from fedmomentum.base_model.families import RECORDS, families_page, known_families
    from tests import classifier_families
    from tests.classifier_families import CLASSIFIERS, run_classifier
    from tests.families import FAMILIES, NOT_TRIED, run_family

    # What is known so far stays where only some are asked for.
    families = {}
    classifiers = {}
    if names:
        families = {record.family: record for record in known_families().families}
        classifiers = {record.family: record for record in known_families().classifiers}

    # Every record is written at once: what is measured stays measured.
    for name in names or sorted({*FAMILIES, *CLASSIFIERS}):
        if name in FAMILIES:
            with tempfile.TemporaryDirectory() as folder:
                families[name] = run_family(name, Path(folder))
            print(name, families[name].refused or "ok", flush=True)
        if name in CLASSIFIERS:
            with tempfile.TemporaryDirectory() as folder:
                classifiers[name] = run_classifier(name, Path(folder))
            print(name, "as a classifier", classifiers[name].refused or "ok", flush=True)
        content = {
            "families": [families[key] for key in sorted(families)],
            "not_tried": NOT_TRIED,
            "classifiers": [classifiers[key] for key in sorted(classifiers)],
            "classifiers_not_tried": classifier_families.NOT_TRIED,
        }
        RECORDS.write_text(json.dumps(msgspec.to_builtins(content), indent=1) + "\n")
    (ROOT / "docs" / "models.md").write_text(families_page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
