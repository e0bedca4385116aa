"""Gives each client its training and test examples, from built-in tasks or the user's own files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from fedmomentum.config.data import BUILT_IN_SOURCE, DataConfig
from fedmomentum.config.schema import CAUSAL_LM, CLASSIFICATION
from fedmomentum.data.builtin_tasks import DEFAULT_TASKS, task_examples
from fedmomentum.data.examples import ClientData, Example
from fedmomentum.data.label_columns import column_texts, warn_of_lookalikes, with_units
from fedmomentum.data.labeled_texts import to_labeled_examples
from fedmomentum.data.partition import divide_in_proportion, partition
from fedmomentum.data.prompts import (
    ClientExamples,
    PromptKey,
    prompt_key,
    trained_prompts,
    warn_of_shared_prompts,
)
from fedmomentum.data.readers import read_rows, to_examples
from fedmomentum.errors import ConfigError, DataError
from fedmomentum.utils.names import check_client_name
from fedmomentum.utils.seeding import data_seed

if TYPE_CHECKING:
    from fedmomentum.data.rows import Rows


# A client with at least this many examples holds out at least one when it holds out a fraction.
MIN_EXAMPLES_TO_HOLD_OUT = 10

_log = logging.getLogger(__name__)


class Purpose(IntEnum):
    """Uses of randomness in preparing the data; each has its own seed."""

    PARTITION = 0
    TEST_EXAMPLES = 1
    TEST_OWNERS = 2
    HELD_OUT = 3


def load_clients(
    config: DataConfig,
    seed: int,
    *,
    loss_on: str = "last",
    task: str = CAUSAL_LM,
    unit_column: str | None = None,
) -> list[ClientData]:
    """Load the examples of all clients, sorted by client id.

    Which client has which examples is decided by the first of these that applies:

    1. ``client-files``: one file per client.
    2. A JSON file with a list of rows for each client.
    3. ``client-column``: one source with a column that names each row's client.
    4. Otherwise one source, divided by `partition` among "client-0", "client-1", ... (zero-padded).

    No prompt is used for both training and testing: the prompt of a held-out example occurs only
    once in the source (with ``client-files``, once in that client's file, since clients do not see
    each other's files), and rows of a ``test-source`` or built-in tests whose prompt is trained on
    are left out. When all turns of a chat are learned, its prompt is everything before the
    assistant's first turn, so that the rule holds for every turn.

    Args:
        config: The [data] section of the configuration.
        seed: Determines the built-in examples, the partition and what is held out.
        loss_on: Which turns of a chat are learned; see `tokenize`.
        task: The model's task, `model.task`; it determines which columns are read.
        unit_column: The column that names each training example's privacy unit.

    Returns:
        The clients.

    Raises:
        ConfigError: If the configuration names no data.
        DataError: If a file cannot be used or there is too little data; the message names the
            file, row or client.
    """
    if not config.source and not config.client_files:
        raise ConfigError("data.source must be given, or data.client-files; got neither")
    examples = dict(sorted(assign_clients(config, seed, task, unit_column).items()))
    key = partial(prompt_key, loss_on=loss_on)
    train, test = hold_out(config, examples, seed, key, task)
    warn_of_shared_prompts(train, test, key)
    return [ClientData(client, tuple(train[client]), tuple(test[client])) for client in train]


def partition_table(clients: Sequence[ClientData]) -> dict[str, dict[str, dict[str, int]]]:
    """Count each client's examples: {client id: {"train": {category: count}, "test": ...}}."""
    return {
        client.client_id: {
            "train": _count_categories(client.train),
            "test": _count_categories(client.test),
        }
        for client in clients
    }


def _count_categories(examples: Sequence[Example]) -> dict[str, int]:
    return dict(sorted(Counter(example.category for example in examples).items()))


# ── which client has which examples ───────────────────────────────────────────────────────────────


def assign_clients(
    config: DataConfig, seed: int, task: str = CAUSAL_LM, unit_column: str | None = None
) -> ClientExamples:
    """Return all examples of each client, before any is held out.

    Raises:
        DataError: If a file cannot be used, or the data cannot be divided this way.
    """
    if config.client_files:
        clients = {}
        for client, file in config.client_files.items():
            rows, examples = read_source(file, config, config.split, task)
            if rows.owners is not None:
                raise DataError(
                    f"{file}: holds lists of rows by client, and data.client-files says that it is "
                    f"{client}'s; name it as data.source, or keep one client's list"
                )
            clients[client] = with_units(rows, examples, unit_column, where=file)
        return clients
    if config.source == BUILT_IN_SOURCE:
        if unit_column is not None:
            raise ConfigError(
                f"privacy.dp.unit-column is {unit_column!r}, and the built-in tasks have no "
                "columns; leave it out"
            )
        examples = task_examples(task_names(config), config.num_examples, seed)
        return _simulate_clients(config, examples, seed, has_categories=True)
    rows, examples = read_source(config.source, config, config.split, task)
    examples = with_units(rows, examples, unit_column, where=config.source)
    owners = row_owners(rows, config)
    if owners is not None:
        return _by_owner(examples, owners)
    has_categories = config.category_column is not None or task == CLASSIFICATION
    return _simulate_clients(config, examples, seed, has_categories=has_categories)


def row_owners(rows: Rows, config: DataConfig) -> Sequence[str] | None:
    """Return the client of each row of the source; None if the source does not name its clients.

    Raises:
        DataError: If both the file and a column name clients, there is no such column, or a name
            cannot be used.
    """
    if rows.owners is not None:
        if config.client_column:
            raise DataError(
                f"{config.source}: holds lists of rows by client, and data.client-column names a "
                "column; leave one of them out"
            )
        return rows.owners
    if not config.client_column:
        return None
    owners = column_texts(rows, config.client_column, where=config.source)
    warn_of_lookalikes(owners, config.client_column, config.source)
    for number, owner in enumerate(owners, start=1):
        where = f"{config.source}, row {number}, column {config.client_column!r}"
        check_client_name(owner, where, DataError)
    return owners


def read_source(
    source: str,
    config: DataConfig,
    split: str,
    task: str = CAUSAL_LM,
) -> tuple[Rows, list[Example]]:
    """Read a file, directory or Hub data set, both as rows and as examples.

    Args:
        source: What to read.
        config: The encoding, the column names and the category column.
        split: The split to read, if the source has several.
        task: The model's task, `model.task`.

    Raises:
        DataError: If it cannot be used.
    """
    own_names = set(config.columns.values())
    rows = read_rows(source, split=split, encoding=config.encoding, row_columns=own_names)
    if task == CLASSIFICATION:
        return rows, to_labeled_examples(rows, where=source, columns=config.columns)
    examples = to_examples(
        rows, category_column=config.category_column, where=source, columns=config.columns
    )
    return rows, examples


def task_names(config: DataConfig) -> list[str]:
    """Return the names of the built-in tasks to mix."""
    return list(config.tasks or DEFAULT_TASKS)


def _simulate_clients(
    config: DataConfig, examples: Sequence[Example], seed: int, *, has_categories: bool
) -> ClientExamples:
    """Divide one source among numbered clients."""
    by_category = config.partition in ("dirichlet", "categories")
    if by_category and not has_categories:
        raise DataError(f'partition "{config.partition}" divides by category; give category-column')
    parts = partition(
        [example.category for example in examples],
        num_clients=config.num_clients,
        how=config.partition,
        seed=data_seed(seed, Purpose.PARTITION),
        concentration=config.concentration,
        min_examples=config.min_examples,
        categories_per_client=config.categories_per_client,
        sizes=config.sizes or None,
    )
    # Zero-padded, so that names sort numerically.
    width = len(str(config.num_clients - 1))
    return {
        f"client-{number:0{width}d}": [examples[index] for index in part]
        for number, part in enumerate(parts)
    }


def _by_owner(examples: Sequence[Example], owners: Sequence[str]) -> ClientExamples:
    """Group examples by client."""
    clients: ClientExamples = {}
    for owner, example in zip(owners, examples, strict=True):
        clients.setdefault(owner, []).append(example)
    return clients


# ── what is held out ──────────────────────────────────────────────────────────────────────────────


def hold_out(
    config: DataConfig, clients: ClientExamples, seed: int, key: PromptKey, task: str
) -> tuple[ClientExamples, ClientExamples]:
    """Return each client's training examples and each client's test examples.

    Raises:
        DataError: If a test source cannot be used, or no test examples are left.
    """
    if config.source == BUILT_IN_SOURCE:
        tests = _built_in_tests(config, clients, seed, key)
        return clients, _assign_in_proportion(tests, clients, seed)
    if config.test_source is not None:
        return clients, _shared_tests(config, config.test_source, clients, seed, key, task)
    return _hold_out_fraction(config, clients, seed, key)


def _built_in_tests(
    config: DataConfig, clients: ClientExamples, seed: int, key: PromptKey
) -> list[Example]:
    """Generate test examples of the built-in tasks, with prompts that no client trains on."""
    names = task_names(config)
    if config.num_test_examples == 0:
        return []
    if config.num_test_examples < len(names):
        raise DataError(
            f"num-test-examples = {config.num_test_examples} must be 0, or at least {len(names)}, "
            "one a task"
        )
    test_seed = data_seed(seed, Purpose.TEST_EXAMPLES)
    return task_examples(
        names, config.num_test_examples, test_seed, exclude=trained_prompts(clients, key)
    )


def _shared_tests(
    config: DataConfig, source: str, clients: ClientExamples, seed: int, key: PromptKey, task: str
) -> ClientExamples:
    """Divide a common test set among the clients.

    Rows are assigned by the client column if there is one; otherwise each category is divided in
    proportion to the clients' training examples of it.
    """
    # Leave out examples that are trained on.
    rows, tests = read_source(source, config, config.test_split, task)
    trained = trained_prompts(clients, key)
    is_new = [key(example) not in trained for example in tests]
    if not any(is_new):
        raise DataError(
            f"{source}: every prompt is also trained on; give a test set of other prompts"
        )
    if not all(is_new):
        message = "%s: %d of %d test examples left out, their prompts are also trained on"
        _log.warning(message, source, is_new.count(False), len(is_new))
    # Give each client its own test rows, or a share of all.
    new_tests = list(compress(tests, is_new))
    column = config.client_column
    owners: Sequence[str]
    if rows.owners is not None:
        owners = rows.owners
        place = "the outer object"
    elif column is not None and column in rows.column_names:
        owners = column_texts(rows, column, where=source)
        place = f"column {column!r}"
    else:
        return _assign_in_proportion(new_tests, clients, seed)
    unknown = sorted(set(owners) - set(clients))
    if unknown:
        raise DataError(
            f"{source}: {place} names clients without training examples: {', '.join(unknown)}"
        )
    by_owner = _by_owner(new_tests, list(compress(owners, is_new)))
    return {client: by_owner.get(client, []) for client in clients}


def _assign_in_proportion(
    tests: Sequence[Example], clients: ClientExamples, seed: int
) -> ClientExamples:
    """Divide each category's tests in proportion to the clients' training examples of it.

    A category that no client trains on is divided in proportion to all training examples.
    """
    rng = np.random.default_rng(data_seed(seed, Purpose.TEST_OWNERS))
    # Each client's number of training examples per category.
    counts = [Counter(example.category for example in examples) for examples in clients.values()]
    positions: list[list[int]] = [[] for _ in clients]
    for category in sorted({example.category for example in tests}):
        indices = [index for index, example in enumerate(tests) if example.category == category]
        proportions = [count[category] for count in counts]
        if not any(proportions):
            proportions = [count.total() for count in counts]
        parts = divide_in_proportion(indices, proportions, rng)
        for client_positions, part in zip(positions, parts, strict=True):
            client_positions.extend(part)
    # Keep the order of the test set, whatever the order of the categories.
    assigned = {}
    for client, part in zip(clients, positions, strict=True):
        assigned[client] = [tests[index] for index in sorted(part)]
    return assigned


def _hold_out_fraction(
    config: DataConfig, clients: ClientExamples, seed: int, key: PromptKey
) -> tuple[ClientExamples, ClientExamples]:
    """Hold out a fraction of each client's examples, from those whose prompt occurs only once.

    The number is rounded, but at least one for clients with `MIN_EXAMPLES_TO_HOLD_OUT` examples or
    more, and never all of them.
    """
    # Count how often each prompt occurs.
    counts = {}
    for client, examples in clients.items():
        counts[client] = Counter(key(example) for example in examples)
    # With separate files, count within the client's own file: it does not see the others.
    if not config.client_files:
        counts = dict.fromkeys(clients, sum(counts.values(), Counter()))
    train = {}
    test = {}
    for client, examples in clients.items():
        # Seeded by the client's name, so that a client on its own holds out the same examples as
        # in a simulation of all.
        rng = np.random.default_rng([data_seed(seed, Purpose.HELD_OUT), *client.encode()])
        unique = []
        for index, example in enumerate(examples):
            if counts[client][key(example)] == 1:
                unique.append(index)
        num_wanted = round(config.test_fraction * len(examples))
        if config.test_fraction > 0 and len(examples) >= MIN_EXAMPLES_TO_HOLD_OUT:
            num_wanted = max(num_wanted, 1)
        num_taken = min(num_wanted, len(examples) - 1)
        taken = set(rng.permutation(unique)[:num_taken].tolist())
        train[client] = [example for index, example in enumerate(examples) if index not in taken]
        test[client] = [example for index, example in enumerate(examples) if index in taken]
    return train, test
