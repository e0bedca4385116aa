"""A data set as columns, each read on first use: unused columns can hold anything.

Reads JSON lines, JSON, CSV, Excel and Parquet files, directories written by
``datasets.save_to_disk``, and data sets from the Hugging Face Hub. No pickles are read, and no code
that comes with the data is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmomentum.config.columns import COLUMNS
from fedmomentum.data.csv_files import read_csv
from fedmomentum.data.decoding import AUTO, DecodedText, read_text
from fedmomentum.data.json_files import JsonRows, column_names, json_column, json_rows
from fedmomentum.data.tables import Table
from fedmomentum.data.workbooks import read_workbook
from fedmomentum.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset  # slow to import, so done where rows are read


TEXT_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
FILE_ENDINGS = (*TEXT_ENDINGS, ".xlsx", ".parquet")
"""Extensions of files that can be read, in lower case; those of text files may end in `.gz`."""


@dataclass(frozen=True)
class Origin:
    """The detected form of a data set, for display and error messages.

    Attributes:
        kind: The file's format.
        encoding: The encoding, for text files.
        details: Other detected properties.
        lines: The line on which each row begins, if that is not obvious; otherwise None.
    """

    kind: str
    encoding: str = ""
    details: tuple[str, ...] = ()
    lines: Sequence[int] | None = None


class Rows:
    """A data set.

    Args:
        columns: Name of each column -> a function that reads it: one value per row, None for rows
            that do not have it.
        num_rows: Number of rows.
        label_names: Name of a column -> the labels that its integers stand for.
        owners: The client of each row, if the file itself names clients; otherwise None.
        origin: The detected form of the data set.
    """

    def __init__(
        self,
        columns: Mapping[str, Callable[[], Iterable[Any]]],
        num_rows: int,
        label_names: Mapping[str, Sequence[str]] | None = None,
        *,
        owners: Sequence[str] | None = None,
        origin: Origin = Origin("rows"),  # noqa: B008 (frozen)
    ) -> None:
        self._columns = columns
        self._values: dict[str, list[Any]] = {}
        self.num_rows = num_rows
        self.label_names = label_names or {}
        self.owners = owners
        self.origin = origin

    @classmethod
    def of(cls, dataset: Rows | Dataset) -> Rows:
        """Wrap a data set of the ``datasets`` library; unused columns are not decoded."""
        if isinstance(dataset, Rows):
            return dataset
        from datasets import ClassLabel

        def read(name: str) -> Iterator[Any]:
            return iter(dataset.select_columns([name]).with_format(None)[name])

        labels = {}
        for name, feature in dataset.features.items():
            if isinstance(feature, ClassLabel):
                labels[name] = feature.names
        columns = {name: partial(read, name) for name in dataset.column_names}
        return cls(columns, dataset.num_rows, labels, origin=Origin("saved data set"))

    @property
    def column_names(self) -> list[str]:
        """The names of all columns."""
        return list(self._columns)

    def place(self, number: int) -> str:
        """Return how error messages refer to a row, counted from 1."""
        if self.origin.lines is None:
            return f"row {number}"
        return f"row {number} (line {self.origin.lines[number - 1]})"

    def __getitem__(self, name: str) -> list[Any]:
        """Return a column's values.

        Raises:
            DataError: If they cannot be read; the message names the row if known.
        """
        if name not in self._values:
            self._values[name] = list(self._columns[name]())
        return self._values[name]


def read_rows(
    source: str | Path,
    *,
    split: str = "train",
    encoding: str = AUTO,
    row_columns: Collection[str] = (),
) -> Rows:
    """Locate a data set and read its column names.

    Args:
        source: A ``.jsonl`` or ``.ndjson`` file (one object per line), ``.json`` (a list of
            objects, one object per line, or an object with a list of them for each client),
            ``.csv`` or ``.tsv`` (with a header; all values are text), ``.xlsx`` or ``.parquet``,
            in upper or lower case, text files optionally compressed (``.gz``); a directory written
            by ``datasets.save_to_disk``; or a Hub name.
        split: The split of a Hub data set or of a directory with several; ignored for files.
        encoding: The encoding of text files; `AUTO` means UTF-8 or the detected encoding.
        row_columns: Additional column names by which to recognize rows: a JSON object with any of
            these keys is a row, not a table of clients.

    Returns:
        The rows.

    Raises:
        DataError: If the source does not exist, is empty or cannot be reached, or a row is broken
            (the message names it).
    """
    path = Path(source)
    looks_like_path = (
        file_ending(path) in FILE_ENDINGS
        or path.is_absolute()
        or str(source).startswith((".", "~"))
    )
    if path.is_dir():
        rows = Rows.of(_read_directory(path, split))
    elif path.is_file():
        rows = _read_file(path, encoding, row_columns)
    elif looks_like_path:
        raise DataError(f"{source}: no such file or directory")
    else:
        rows = Rows.of(_read_hub(str(source), split))
    if not rows.num_rows or not rows.column_names:
        raise DataError(f"{source}: no rows; an empty data set cannot be used")
    return rows


def has_splits(source: str) -> bool:
    """Return whether a source is a Hub data set, or a saved one with splits."""
    path = Path(source)
    return not path.exists() or (path / "dataset_dict.json").is_file()


def file_ending(path: Path) -> str:
    """Return the extension that identifies a file's format: in lower case, without `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_file(path: Path, encoding: str, row_columns: Collection[str]) -> Rows:
    """Return the rows of a file; the extension determines the format."""
    ending = file_ending(path)
    if ending not in FILE_ENDINGS:
        found = path.suffix or "a file without ending"
        hint = ""
        if ending == ".xls":
            hint = ". Save the workbook as .xlsx"
        raise DataError(f"{path}: cannot read {found}; known: {', '.join(FILE_ENDINGS)}{hint}")
    if ending not in TEXT_ENDINGS and path.suffix.lower() == ".gz":
        raise DataError(f"{path}: {ending} files are compressed in themselves; unpack it")
    if ending == ".parquet":
        return _read_parquet(path)
    if ending == ".xlsx":
        return _table_rows(read_workbook(path), Origin("Excel workbook"))
    is_csv = ending in (".csv", ".tsv")
    decoded = read_text(path, encoding, may_be_windows=is_csv)
    if is_csv:
        table = read_csv(path, decoded.text, "\t" if ending == ".tsv" else None)
        return _table_rows(table, _text_origin("CSV", decoded))
    found_rows = json_rows(path, decoded.text, {*COLUMNS, *row_columns})
    return _json_table(path, found_rows, decoded)


def _text_origin(kind: str, decoded: DecodedText) -> Origin:
    """Return the detected form of a text file."""
    details = ("compressed by gzip",) if decoded.is_compressed else ()
    return Origin(kind, decoded.encoding, details)


def _table_rows(table: Table, origin: Origin) -> Rows:
    """Return the rows of a CSV file or workbook."""
    details = [*origin.details, table.detail]
    if table.has_index:
        details.append("a first column without a name left out")
    num_rows = len(next(iter(table.columns.values()), []))
    return Rows(
        {name: partial(iter, column) for name, column in table.columns.items()},
        num_rows,
        origin=Origin(origin.kind, origin.encoding, tuple(details), table.lines),
    )


def _json_table(path: Path, rows: JsonRows, decoded: DecodedText) -> Rows:
    """Return the rows of a JSON file."""
    objects = rows.objects
    origin = _text_origin(rows.kind, decoded)
    return Rows(
        {name: partial(json_column, path, objects, name) for name in column_names(objects)},
        len(objects),
        owners=rows.owners,
        origin=Origin(origin.kind, origin.encoding, origin.details, rows.lines),
    )


# ── Parquet ───────────────────────────────────────────────────────────────────────────────────────


def _read_parquet(path: Path) -> Rows:
    """Return the rows of a Parquet file; its columns are read later, one by one."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            num_rows = file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None
    if len(set(schema.names)) != len(schema.names):
        repeated = next(name for name in schema.names if schema.names.count(name) > 1)
        raise DataError(f"{path}: the column {repeated!r} comes twice; name each column once")
    columns = {name: partial(_parquet_column, path, name) for name in schema.names}
    labels = _stored_labels(schema.metadata)
    return Rows(columns, num_rows, labels, origin=Origin("Parquet"))


def _parquet_column(path: Path, name: str) -> Iterator[Any]:
    """Yield the values of one column of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        # The fields of nested columns have dotted names, so other columns may be read with it.
        column = pyarrow.parquet.read_table(path, columns=[name]).column(name)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: column {name!r} cannot be read: {error}") from None
    for number, value in enumerate(column, start=1):
        try:
            yield value.as_py()
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:
            raise DataError(
                f"{path}, row {number}: column {name!r} cannot be read: {error}"
            ) from None


def _stored_labels(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the labels that ``datasets`` stored in a file's metadata for integer columns."""
    labels = {}
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        for name, feature in features.items():
            is_label = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
            if is_label and isinstance(feature["names"], list):
                labels[name] = [str(label) for label in feature["names"]]
    # There is no such metadata, or not in the known form.
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return labels


# ── directories and the hub ───────────────────────────────────────────────────────────────────────


def _read_directory(path: Path, split: str) -> Dataset:
    """Load a data set written by ``datasets.save_to_disk``."""
    from datasets import DatasetDict, load_from_disk

    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise DataError(
            f"{path}: a directory without a saved data set; name one file in it, or write one with "
            "save_to_disk"
        )
    try:
        dataset = load_from_disk(str(path))
    # A damaged directory can cause any kind of error.
    except Exception as error:
        raise DataError(f"{path}: not a readable saved data set: {_reason(error)}") from None
    if not isinstance(dataset, DatasetDict):
        return dataset
    if split not in dataset:
        raise DataError(f"{path}: no split {split!r}; found: {', '.join(dataset)}")
    return dataset[split]


def _read_hub(name: str, split: str) -> Dataset:
    """Load a split of a data set from the Hugging Face Hub."""
    from datasets import Dataset, load_dataset

    try:
        dataset = load_dataset(name, split=split)
    # The Hub client raises many kinds of errors; each means that there are no rows.
    except Exception as error:
        raise DataError(
            f"{name}: no such file here, and the data set of that name on the Hugging Face hub "
            f"could not be loaded (split {split!r}): {_reason(error)}; check the name and the "
            "connection, or download it and name the file"
        ) from None
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"{name}: split {split!r} gives {type(dataset).__name__}; name one split, such as "
            "'train'"
        )
    return dataset


def _reason(error: Exception) -> str:
    """Return the first line of an error's message, or its type if there is no message."""
    return str(error).strip().split("\n")[0] or type(error).__name__
