"""Checks of what a user asks of an evaluation, before anything is read."""

from __future__ import annotations

from fedmomentum.data.rows import has_splits
from fedmomentum.errors import ConfigError

TEST_SPLIT = "test"
"""The split that is scored if the data has several and none is named."""


def check_options(
    data: str | None,
    *,
    category_column: str | None,
    split: str | None,
    limit: int | None,
    max_length: int | None,
    is_labeled: bool,
) -> None:
    """Refuse numbers out of range, and options that would be ignored.

    Args:
        data: The user's examples; None for the run's own.
        category_column: The column to group scores by, if given.
        split: The split of the data, if given.
        limit: The maximum number of examples, if given.
        max_length: The maximum length of an example in tokens, if given.
        is_labeled: Whether the model is a classifier.

    Raises:
        ConfigError: If there are any; the message names the option.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1; got {limit}")
    if max_length is not None and max_length < 2:
        raise ConfigError(f"--max-length must be at least 2; got {max_length}")
    if is_labeled and category_column is not None:
        raise ConfigError(
            f"--category-column is {category_column!r}; a classifier is scored by label: leave it "
            "out"
        )
    if data is None:
        if category_column is not None:
            raise ConfigError(
                "--category-column is a column of --data; the run's own examples have their "
                "categories"
            )
        if split is not None:
            raise ConfigError(
                f"--split is {split!r}, a part of --data, and without --data the examples that the "
                "run held out are scored; name the data as well, or leave --split out"
            )
    elif split is not None and not has_splits(data):
        raise ConfigError(
            f"--split is {split!r}, and {data} has no splits, so all of it would be scored; leave "
            "--split out, or name a file with the rows of that split"
        )
