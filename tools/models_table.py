"""Make `fedmomentum/base_model/families.json` and docs/models.md: `python tools/models_table.py`.

Trains and exports a tiny model of every family, which takes a minute. Run by `make docs`;
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
    from tests.families import FAMILIES, NOT_TRIED, run_family

    # What is known so far stays where only some are asked for; every record is written at once.
    known = {family.family: family for family in known_families()} if names else {}
    for name in names or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            known[name] = run_family(name, Path(folder))
        print(name, known[name].refused or "ok", flush=True)
        records = [msgspec.to_builtins(known[key]) for key in FAMILIES if key in known]
        content = {"families": records, "not_tried": NOT_TRIED}
        RECORDS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (ROOT / "docs" / "models.md").write_text(families_page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
