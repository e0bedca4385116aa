"""A data set as columns, each read when it is asked for: a column that nobody uses can hold anything.

JSON lines, JSON, CSV and Parquet files, folders written by ``datasets.save_to_disk``, and data sets of the
Hugging Face hub. No pickle is read and no code that comes with the data is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmomentum.data.text_files import column_names, csv_columns, json_column, json_rows, read_text
from fedmomentum.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset  # heavy: imported where rows are read

FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


class Rows:
    """A data set.

    Args:
        columns: Name to what reads that column: one value a row, None where a row lacks it.
        num_rows: How many rows each has.
        label_names: Name to the labels that a column's whole numbers stand for.
    """

    def __init__(
        self,
        columns: Mapping[str, Callable[[], Iterable[Any]]],
        num_rows: int,
        label_names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._columns, self._read = columns, dict[str, list[Any]]()
        self.num_rows, self.label_names = num_rows, label_names or {}

    @classmethod
    def of(cls, dataset: Rows | Dataset) -> Rows:
        """Return a data set of the library ``datasets`` as rows; its other columns are not decoded."""
        if isinstance(dataset, Rows):
            return dataset
        from datasets import ClassLabel

        def read(name: str) -> Iterator[Any]:
            return iter(dataset.select_columns([name]).with_format(None)[name])

        labels = {name: kind.names for name, kind in dataset.features.items() if isinstance(kind, ClassLabel)}
        return cls({name: partial(read, name) for name in dataset.column_names}, dataset.num_rows, labels)

    @property
    def column_names(self) -> list[str]:
        """The names of all columns."""
        return list(self._columns)

    def __getitem__(self, name: str) -> list[Any]:
        """Return a column's values.

        Raises:
            DataError: If they cannot be read; names the row where that is known.
        """
        if name not in self._read:
            self._read[name] = list(self._columns[name]())
        return self._read[name]

    def to_list(self) -> list[dict[str, Any]]:
        """Return all rows with all of their columns."""
        columns = [self[name] for name in self.column_names]
        return [dict(zip(self.column_names, values, strict=True)) for values in zip(*columns, strict=True)]


def read_rows(source: str | Path, *, split: str = "train") -> Rows:
    """Find a data set, and read its columns' names.

    Args:
        source: A ``.jsonl``, ``.json`` (a list of objects, or one object a line), ``.csv`` (UTF-8, with a header;
            all values are text) or ``.parquet`` file; a folder written by ``datasets.save_to_disk``; or a hub
            name.
        split: Which split of a folder with several or of a hub data set; files have none and ignore it.

    Raises:
        DataError: If it does not exist, is empty, cannot be reached, or a row is broken (named).
    """
    path = Path(source)
    if path.is_dir():
        rows = Rows.of(_read_folder(path, split))
    elif path.is_file():
        rows = _read_file(path)
    elif path.suffix in FILE_ENDINGS or path.is_absolute() or str(source).startswith((".", "~")):
        raise DataError(f"{source}: no such file or folder")
    else:
        rows = Rows.of(_read_hub(str(source), split))
    if not rows.num_rows or not rows.column_names:
        raise DataError(f"{source}: no rows; an empty data set cannot be used")
    return rows


def _read_file(path: Path) -> Rows:
    if path.suffix not in FILE_ENDINGS:
        raise DataError(
            f"{path}: cannot read {path.suffix or 'a file without ending'}; known: {', '.join(FILE_ENDINGS)}"
        )
    if path.suffix == ".parquet":
        return _read_parquet(path)
    text = read_text(path)
    if path.suffix == ".csv":
        columns = csv_columns(path, text)
        num_rows = len(next(iter(columns.values()), []))
        return Rows({name: partial(iter, values) for name, values in columns.items()}, num_rows)
    objects = json_rows(path, text)
    return Rows({name: partial(json_column, path, objects, name) for name in column_names(objects)}, len(objects))


# ── Parquet ──


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None
    if len(set(schema.names)) != len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise DataError(f"{path}: the column {twice!r} comes twice; name each column once")
    return Rows(
        {name: partial(_parquet_column, path, name) for name in schema.names}, num_rows, _stored_labels(schema.metadata)
    )


def _parquet_column(path: Path, name: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        # A nested column's parts have dotted names, so others may come with it.
        column = pyarrow.parquet.read_table(path, columns=[name]).column(name)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: column {name!r} cannot be read: {error}") from None
    for number, value in enumerate(column, start=1):
        try:
            yield value.as_py()
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}, row {number}: column {name!r} cannot be read: {error}") from None


def _stored_labels(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the labels that the library ``datasets`` notes in a file, for columns that hold their numbers."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature["names"], list)
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


# ── folders and the hub ──


def _read_folder(path: Path, split: str) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise DataError(
            f"{path}: a folder without a saved data set; name one file in it, or write one with save_to_disk"
        )
    try:
        found = load_from_disk(str(path))
    except Exception as error:  # of a damaged folder anything can come
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{path}: not a readable saved data set: {reason}") from None
    if not isinstance(found, DatasetDict):
        return found
    if split not in found:
        raise DataError(f"{path}: no split {split!r}; found: {', '.join(found)}")
    return found[split]


def _read_hub(name: str, split: str) -> Dataset:
    from datasets import Dataset, load_dataset

    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises many kinds; each means that there are no rows
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{name}: no such file here, and the data set of that name on the Hugging Face hub could not be loaded "
            f"(split {split!r}): {reason}; check the name and the connection, or download it and name the file"
        ) from None
    if not isinstance(rows, Dataset):
        raise DataError(f"{name}: split {split!r} gives {type(rows).__name__}; name one split, such as 'train'")
    return rows
