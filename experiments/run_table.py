"""A table of an experiment's runs, one line each: a run that is in it is not made again."""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Row = dict[str, str]


class RunTable:
    """The lines of a CSV file; a line that is added is on disk at once.

    Args:
        file: The file; it need not exist.
        columns: Its columns.
    """

    def __init__(self, file: Path, columns: Sequence[str]) -> None:
        self._file = file
        self._columns = columns
        self.rows = read_rows(file) if file.is_file() else []

    def find(self, key: Mapping[str, str]) -> Row | None:
        """Return the line with these values; None if there is none."""
        for row in self.rows:
            if key.items() <= row.items():
                return row
        return None

    def find_or_make(self, key: Mapping[str, str], make: Callable[[], Row]) -> Row:
        """Return the line with these values; if there is none, add it with what `make` returns."""
        row = self.find(key)
        if row is None:
            row = {**key, **make()}
            self.add(row)
        return row

    def add(self, row: Row) -> None:
        """Add a line, and write the file."""
        self.rows.append(row)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._file.with_name(f"{self._file.name}.part")
        with scratch.open("w", newline="", encoding="utf-8") as opened:
            lines = csv.DictWriter(opened, self._columns, lineterminator="\n")
            lines.writeheader()
            lines.writerows(self.rows)
        os.replace(scratch, self._file)


def read_rows(file: Path) -> list[Row]:
    """Read all lines of a CSV file."""
    with file.open(newline="", encoding="utf-8") as opened:
        return [dict(row) for row in csv.DictReader(opened)]
