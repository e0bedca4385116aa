"""A data set as columns, each read when it is used: a column that nobody uses can hold anything.

JSON lines, JSON, CSV and Parquet files, directories written by ``datasets.save_to_disk``, and data
sets of the Hugging Face hub. No pickle is read and no code that comes with the data is run.
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
    from datasets import Dataset  # slow to import: done where rows are read


FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


class Rows:
    """A data set.

    Args:
        columns: Name of each column to a function that reads it: one value a row, None where a row
            does not have it.
        num_rows: Number of rows.
        label_names: Name of a column to the labels that its whole numbers stand for.
    """

    def __init__(
        self,
        columns: Mapping[str, Callable[[], Iterable[Any]]],
        num_rows: int,
        label_names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._columns = columns
        self._values: dict[str, list[Any]] = {}
        self.num_rows = num_rows
        self.label_names = label_names or {}

    @classmethod
    def of(cls, dataset: Rows | Dataset) -> Rows:
        """Return a data set of the library ``datasets`` as rows; unused columns are not decoded."""
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
        return cls(columns, dataset.num_rows, labels)

    @property
    def column_names(self) -> list[str]:
        """The names of all columns."""
        return list(self._columns)

    def __getitem__(self, name: str) -> list[Any]:
        """Return a column's values.

        Raises:
            DataError: If they cannot be read; the message names the row where that is known.
        """
        if name not in self._values:
            self._values[name] = list(self._columns[name]())
        return self._values[name]

    def to_list(self) -> list[dict[str, Any]]:
        """Return all rows with all of their columns."""
        columns = [self[name] for name in self.column_names]
        rows = []
        for values in zip(*columns, strict=True):
            rows.append(dict(zip(self.column_names, values, strict=True)))
        return rows


def read_rows(source: str | Path, *, split: str = "train") -> Rows:
    """Find a data set, and read the names of its columns.

    Args:
        source: A ``.jsonl``, ``.json`` (a list of objects, or one object a line), ``.csv`` (UTF-8,
            with a header; all values are text) or ``.parquet`` file; a directory written by
            ``datasets.save_to_disk``; or a hub name.
        split: Which split of a directory with several or of a hub data set; files have none and
            ignore it.

    Returns:
        The rows.

    Raises:
        DataError: If the source does not exist, is empty or cannot be reached, or a row is broken
            (named).
    """
    path = Path(source)
    looks_like_path = (
        path.suffix in FILE_ENDINGS or path.is_absolute() or str(source).startswith((".", "~"))
    )
    if path.is_dir():
        rows = Rows.of(_read_directory(path, split))
    elif path.is_file():
        rows = _read_file(path)
    elif looks_like_path:
        raise DataError(f"{source}: no such file or directory")
    else:
        rows = Rows.of(_read_hub(str(source), split))
    if not rows.num_rows or not rows.column_names:
        raise DataError(f"{source}: no rows; an empty data set cannot be used")
    return rows


def _read_file(path: Path) -> Rows:
    """Return the rows of a file; its ending decides the format."""
    if path.suffix not in FILE_ENDINGS:
        ending = path.suffix or "a file without ending"
        raise DataError(f"{path}: cannot read {ending}; known: {', '.join(FILE_ENDINGS)}")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    text = read_text(path)
    if path.suffix == ".csv":
        values = csv_columns(path, text)
        num_rows = len(next(iter(values.values()), []))
        return Rows({name: partial(iter, column) for name, column in values.items()}, num_rows)
    objects = json_rows(path, text)
    columns = {name: partial(json_column, path, objects, name) for name in column_names(objects)}
    return Rows(columns, len(objects))


# ── Parquet ───────────────────────────────────────────────────────────────────────────────────────


def _read_parquet(path: Path) -> Rows:
    """Return the rows of a Parquet file; columns are read from it later, one by one."""
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
    return Rows(columns, num_rows, _stored_labels(schema.metadata))


def _parquet_column(path: Path, name: str) -> Iterator[Any]:
    """Yield the values of one column of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        # A nested column's parts have dotted names, so others may be read with it.
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
    """Return the labels that the library ``datasets`` notes in a file for columns of numbers."""
    labels = {}
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        for name, feature in features.items():
            is_label = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
            if is_label and isinstance(feature["names"], list):
                labels[name] = [str(label) for label in feature["names"]]
    # No such note, or not in the form that we know.
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return labels


# ── directories and the hub ───────────────────────────────────────────────────────────────────────


def _read_directory(path: Path, split: str) -> Dataset:
    """Return a data set that ``datasets.save_to_disk`` wrote."""
    from datasets import DatasetDict, load_from_disk

    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise DataError(
            f"{path}: a directory without a saved data set; name one file in it, or write one with "
            "save_to_disk"
        )
    try:
        dataset = load_from_disk(str(path))
    # A damaged directory causes errors of any kind.
    except Exception as error:
        raise DataError(f"{path}: not a readable saved data set: {_reason(error)}") from None
    if not isinstance(dataset, DatasetDict):
        return dataset
    if split not in dataset:
        raise DataError(f"{path}: no split {split!r}; found: {', '.join(dataset)}")
    return dataset[split]


def _read_hub(name: str, split: str) -> Dataset:
    """Return a split of a data set of the Hugging Face hub."""
    from datasets import Dataset, load_dataset

    try:
        dataset = load_dataset(name, split=split)
    # The hub's client raises many kinds of error; each means that there are no rows.
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
    """Return the first line of an error's message, or the error's kind where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__
