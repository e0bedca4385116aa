"""Gives each client its training and test examples, from built-in tasks or the user's own files."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path

import numpy as np

from fedmomentum.data.examples import ClientData, Example, Prompt
from fedmomentum.data.partition import partition, share
from fedmomentum.data.read import column_texts, read_rows, to_examples
from fedmomentum.data.tasks import DEFAULT_TASKS, task_examples
from fedmomentum.errors import DataError
from fedmomentum.names import check_client_name

BUILT_IN = "reasoning-gym"
"""The ``source`` that stands for the built-in tasks."""

# From this many examples on, a client with any test share keeps at least one aside.
_FEWEST_TO_TEST = 10

# Draws that must differ although they come from one seed.
_PARTITION, _TEST, _TEST_OWNER, _HELD_OUT = range(4)

_log = logging.getLogger(__name__)

Held = dict[str, list[Example]]  # by client id


def load_clients(
    *,
    source: str | Path | None = None,
    client_files: Mapping[str, str | Path] | None = None,
    client_column: str | None = None,
    test_source: str | Path | None = None,
    test_fraction: float = 0.1,
    tasks: Sequence[str] | None = None,
    num_examples: int = 2000,
    num_test_examples: int = 400,
    num_clients: int = 10,
    how: str = "iid",
    category_column: str | None = None,
    concentration: float = 0.5,
    min_examples: int = 1,
    categories_per_client: int = 2,
    sizes: Sequence[float] | None = None,
    split: str = "train",
    test_split: str = "test",
    seed: int = 0,
) -> list[ClientData]:
    """Load the examples of all clients, sorted by client id.

    Who holds what comes from the first of these that applies:

    1. ``client_files``: one file a client.
    2. ``client_column``: one source whose column names the client of each row.
    3. Otherwise one source, divided by `partition` among "client-0", "client-1", ... (zeros in front where needed).

    No prompt is both trained on and tested on: a held-out example's prompt occurs once in the whole source (with
    ``client_files``: once in that client's file, for no client sees another's), and rows of a ``test_source``
    or built-in tests whose prompt is trained on are left out.

    Args:
        source: ``"reasoning-gym"`` for the built-in tasks, or what `read_rows` takes. Not with ``client_files``.
        client_files: Client id -> what `read_rows` takes.
        client_column: Column of ``source`` that holds the client id.
        test_source: A shared test set, in place of ``test_fraction``. Divided by ``client_column`` where it has
            that column; else each category in proportion to the clients' training examples of it (a category that
            nobody trains on: to all their examples). The global test set is the union of the clients'.
        test_fraction: Share of its own examples that each client keeps aside, in [0, 1): rounded, but at least one
            for a client with 10 or more, and never all.
        tasks: Names out of `DEFAULT_TASKS`; None is all of them. Built-in tasks only.
        num_examples: Training examples in all. Built-in tasks only.
        num_test_examples: Test examples in all, divided like a ``test_source``. Built-in tasks only.
        num_clients: How many clients to divide one source among.
        how: The partition, one of `PARTITIONS`.
        category_column: Column whose value is the example's category; "dirichlet" and "categories" need it for
            the user's own data. The built-in tasks' category is the task.
        concentration: See `partition`.
        min_examples: See `partition`; counted before the test share is taken.
        categories_per_client: See `partition`.
        sizes: See `partition`.
        split: Split to train on, where a source has several.
        test_split: Split of ``test_source``, where it has several.
        seed: Decides the built-in examples, the partition and what is held out.

    Raises:
        DataError: Settings contradict each other, a file cannot be used, or the data does not suffice; with the
            file, row or client named.
    """
    _check_sources(source, client_files, tasks, client_column, category_column, test_source, test_fraction, seed)
    built_in = source == BUILT_IN
    names = list(DEFAULT_TASKS if tasks is None else tasks)
    owners: list[str] | None = None
    if client_files is not None:
        held = {client: _read(file, split, category_column) for client, file in client_files.items()}
    else:
        assert source is not None
        if built_in:
            examples = task_examples(names, num_examples, seed)
        else:
            rows = read_rows(source, split=split)
            examples = to_examples(rows, category_column=category_column, where=str(source))
            if client_column:
                owners = column_texts(rows, client_column, where=str(source))
                for number, owner in enumerate(owners, start=1):
                    check_client_name(owner, f"{source}, row {number}, column {client_column!r}", DataError)
        if owners is None:
            if how in ("dirichlet", "categories") and not built_in and category_column is None:
                raise DataError(f'partition "{how}" divides by category; give category_column')
            parts = partition(
                [example.category for example in examples],
                num_clients=num_clients,
                how=how,
                seed=_derive(seed, _PARTITION),
                concentration=concentration,
                min_examples=min_examples,
                categories_per_client=categories_per_client,
                sizes=sizes,
            )
            width = len(str(num_clients - 1))
            held = {f"client-{k:0{width}d}": [examples[i] for i in part] for k, part in enumerate(parts)}
        else:
            held = _by_owner(examples, owners)
    held = dict(sorted(held.items()))

    if built_in:
        generated = _built_in_tests(names, num_test_examples, held, seed)
        tests = _in_proportion(generated, held, seed)
    elif test_source is not None:
        tests = _shared_tests(test_source, test_split, category_column, client_column, held, seed)
    else:
        held, tests = _hold_out(held, test_fraction, seed, apart=client_files is not None)
    return [ClientData(client, tuple(held[client]), tuple(tests[client])) for client in held]


def partition_table(clients: Sequence[ClientData]) -> dict[str, dict[str, dict[str, int]]]:
    """Count each client's examples: {client id: {"train": {category: count}, "test": {category: count}}}."""
    return {
        client.client_id: {
            part: dict(sorted(Counter(example.category for example in examples).items()))
            for part, examples in (("train", client.train), ("test", client.test))
        }
        for client in clients
    }


def _check_sources(
    source: str | Path | None,
    client_files: Mapping[str, str | Path] | None,
    tasks: Sequence[str] | None,
    client_column: str | None,
    category_column: str | None,
    test_source: str | Path | None,
    test_fraction: float,
    seed: int,
) -> None:
    if (source is None) == (client_files is None):
        raise DataError("give either source or client_files, and not both")
    if client_files is not None and not client_files:
        raise DataError("client_files is empty; name at least one client and its file")
    if client_files is not None and client_column is not None:
        raise DataError("client_column belongs to one source; client_files already say who holds what")
    if source != BUILT_IN and tasks is not None:
        raise DataError(f'tasks are only for source "{BUILT_IN}"; got {source or "client_files"}')
    own = {"client_column": client_column, "category_column": category_column, "test_source": test_source}
    given = [name for name, value in own.items() if value is not None]
    if source == BUILT_IN and given:
        raise DataError(f'{", ".join(given)}: only for your own data, not for source "{BUILT_IN}"')
    if not 0 <= test_fraction < 1:
        raise DataError(f"test_fraction={test_fraction} must be at least 0 and below 1")
    if seed < 0:
        raise DataError(f"seed={seed} must be at least 0")


def _read(source: str | Path, split: str, category_column: str | None) -> list[Example]:
    return to_examples(read_rows(source, split=split), category_column=category_column, where=str(source))


def _by_owner(examples: Sequence[Example], owners: Sequence[str]) -> Held:
    held: Held = {}
    for owner, example in zip(owners, examples, strict=True):
        held.setdefault(owner, []).append(example)
    return held


def _built_in_tests(names: list[str], num_examples: int, held: Held, seed: int) -> list[Example]:
    if num_examples == 0:
        return []
    if num_examples < len(names):
        raise DataError(f"num_test_examples={num_examples} must be 0, or at least {len(names)}, one a task")
    trained = {_key(example.prompt) for examples in held.values() for example in examples}
    return task_examples(names, num_examples, _derive(seed, _TEST), exclude=trained)


def _shared_tests(
    source: str | Path,
    split: str,
    category_column: str | None,
    client_column: str | None,
    held: Held,
    seed: int,
) -> Held:
    rows = read_rows(source, split=split)
    tests = to_examples(rows, category_column=category_column, where=str(source))
    trained = {_key(example.prompt) for examples in held.values() for example in examples}
    is_new = [_key(example.prompt) not in trained for example in tests]
    if not any(is_new):
        raise DataError(f"{source}: every prompt is also trained on; give a test set of other prompts")
    if not all(is_new):
        message = "%s: %d of %d test examples left out, their prompts are also trained on"
        _log.warning(message, source, is_new.count(False), len(is_new))
    if client_column is None or client_column not in rows.column_names:
        return _in_proportion(list(compress(tests, is_new)), held, seed)
    owners = column_texts(rows, client_column, where=str(source))
    if unknown := sorted(set(owners) - set(held)):
        raise DataError(
            f"{source}: column {client_column!r} names clients without training examples: {', '.join(unknown)}"
        )
    found = _by_owner(list(compress(tests, is_new)), list(compress(owners, is_new)))
    return {client: found.get(client, []) for client in held}


def _in_proportion(tests: Sequence[Example], held: Held, seed: int) -> Held:
    """Divide each category's tests in proportion to the clients' training examples of it."""
    rng = np.random.default_rng(_derive(seed, _TEST_OWNER))
    counts = [Counter(example.category for example in examples) for examples in held.values()]
    positions: list[list[int]] = [[] for _ in held]
    for category in sorted({example.category for example in tests}):
        indices = [index for index, example in enumerate(tests) if example.category == category]
        proportions = [count[category] for count in counts]
        if not any(proportions):
            proportions = [count.total() for count in counts]
        for client, part in zip(positions, share(indices, proportions, rng), strict=True):
            client.extend(part)
    return {client: [tests[i] for i in sorted(part)] for client, part in zip(held, positions, strict=True)}


def _hold_out(held: Held, fraction: float, seed: int, *, apart: bool) -> tuple[Held, Held]:
    """Take each client's test share out of the examples whose prompt comes once, in its own file or in all."""
    times = {client: Counter(_key(example.prompt) for example in held[client]) for client in held}
    if not apart:
        times = dict.fromkeys(held, sum(times.values(), Counter()))
    train, test = {}, {}
    for client, examples in held.items():
        # Seeded by the client's name, so that a client alone finds the same share as among others.
        rng = np.random.default_rng([_derive(seed, _HELD_OUT), *client.encode()])
        once = [i for i, example in enumerate(examples) if times[client][_key(example.prompt)] == 1]
        wanted = round(fraction * len(examples))
        if fraction > 0 and len(examples) >= _FEWEST_TO_TEST:
            wanted = max(wanted, 1)
        chosen = set(rng.permutation(once)[: min(wanted, len(examples) - 1)].tolist())
        train[client] = [example for i, example in enumerate(examples) if i not in chosen]
        test[client] = [example for i, example in enumerate(examples) if i in chosen]
    return train, test


def _key(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _derive(seed: int, purpose: int) -> int:
    return int(np.random.SeedSequence([seed, purpose]).generate_state(1)[0])
