"""The section [data] of a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from fedmomentum.config.columns import COLUMNS
from fedmomentum.config.fields import option, require, require_at_least, require_choice
from fedmomentum.utils.names import check_client_name

PARTITIONS = ("iid", "dirichlet", "categories", "sizes")
BUILT_IN_SOURCE = "reasoning-gym"
"""The `data.source` that stands for the built-in tasks."""


@dataclass(frozen=True)
class DataConfig:
    """Where each client's data is, and how much of it is held out."""

    source: str = option(
        "",
        "one source for all clients: a JSONL, JSON, CSV, Excel or Parquet file, a directory saved "
        "by datasets, a hub name, or reasoning-gym (the built-in tasks)",
    )
    client_files: dict[str, str] = option({}, "instead, one file per client: client name = file")
    client_column: str | None = option(None, "column of the source that names each row's client")
    columns: dict[str, str] = option(
        {},
        'your names for the columns that are read, such as question = "Frage"; an empty name means '
        "that the column is not read. See docs/data.md",
    )
    encoding: str = option(
        "auto",
        "encoding of text files, such as cp1252; auto: UTF-8, or for CSV files what is detected",
    )
    split: str = option("train", "split to use if a source has several")
    tasks: list[str] = option([], "built-in tasks to mix; empty: all")
    num_examples: int = option(2000, "training examples over all clients (built-in tasks)")
    num_test_examples: int = option(400, "held-out examples over all clients (built-in tasks)")
    num_clients: int = option(
        4, "number of simulated clients, for a source that does not name its clients"
    )
    partition: str = option("iid", "how to divide it among them: iid, dirichlet, categories, sizes")
    category_column: str | None = option(None, "column to partition and report by")
    concentration: float = option(0.5, "for partition dirichlet: small is skewed, large is even")
    min_examples: int = option(
        8,
        "smallest number of examples per simulated client; others may have fewer",
    )
    categories_per_client: int = option(2, "for partition categories")
    sizes: list[float] = option([], "for partition sizes: one number per client, in proportion")
    test_source: str | None = option(None, "a held-out source, divided among the clients")
    test_split: str = option("test", "split of the held-out source")
    test_fraction: float = option(
        0.1, "fraction of its own examples that each client holds out, if there is no test-source"
    )
    max_length: int = option(512, "most tokens in an example; longer ones are truncated")
    max_truncated_fraction: float = option(
        0.02, "refuse to run if a larger fraction of examples loses its whole answer to truncation"
    )

    def __post_init__(self) -> None:
        self._check_sources()
        self._check_reading()
        require_choice("data.partition", self.partition, PARTITIONS)
        require_at_least("data.num-clients", self.num_clients, 1)
        require(self.concentration > 0, "data.concentration", self.concentration, "above 0")
        require(0 <= self.test_fraction < 1, "data.test-fraction", self.test_fraction, "in [0, 1)")
        require(
            0 <= self.max_truncated_fraction <= 1,
            "data.max-truncated-fraction",
            self.max_truncated_fraction,
            "in [0, 1]",
        )
        require_at_least("data.max-length", self.max_length, 2)

    def _check_sources(self) -> None:
        """Refuse keys that contradict the source."""
        for client in self.client_files:
            check_client_name(client, "data.client-files")
        if self.client_files:
            wanted = "left out where client-files is given"
            require(not self.source, "data.source", self.source, wanted)
            require(self.client_column is None, "data.client-column", self.client_column, wanted)
        # The built-in tasks have no columns, and are generated with their tests.
        if self.source == BUILT_IN_SOURCE:
            wanted = f'left out with source "{BUILT_IN_SOURCE}"'
            for key in ("client_column", "category_column", "test_source"):
                value = getattr(self, key)
                require(value is None, f"data.{key.replace('_', '-')}", value, wanted)
        else:
            wanted = f'left out, for it belongs to source "{BUILT_IN_SOURCE}"'
            require(not self.tasks, "data.tasks", self.tasks, wanted)

    def _check_reading(self) -> None:
        """Refuse names of columns that are never read, and encodings that are none."""
        for ours, theirs in self.columns.items():
            key = f"data.columns.{ours}"
            known = ", ".join(COLUMNS)
            require(
                ours in COLUMNS, key, theirs, f"left out: the columns that are read are {known}"
            )
            others = [name for name in self.columns if self.columns[name] == theirs and theirs]
            wanted = f"the name of a column that no other key has; {' and '.join(others)} share it"
            require(len(others) < 2, key, theirs, wanted)
        if self.encoding == "auto":
            return
        try:
            "a".encode(self.encoding)
            is_known = True
        except (LookupError, ValueError):
            is_known = False
        wanted = "auto or a text encoding that Python knows, such as utf-16 or cp1252"
        require(is_known, "data.encoding", self.encoding, wanted)
