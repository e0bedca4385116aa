"""The task that a model is trained for (`model.task`): its labels and its rows of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmomentum.base_model.classifier import order_labels
from fedmomentum.base_model.hub import resolve_base
from fedmomentum.base_model.load_checks import check_token_ids
from fedmomentum.config.data import BUILT_IN_SOURCE
from fedmomentum.config.schema import CLASSIFICATION
from fedmomentum.data.labeled_texts import refuse_unknown_labels, sort_labels, tokenize_labeled
from fedmomentum.data.tokenization import tokenize_parts
from fedmomentum.data.tokenized import EMPTY_EXAMPLES, TokenizedExamples
from fedmomentum.errors import ConfigError, DataError
from fedmomentum.utils.schema import MAX_LABELS

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config, ModelConfig
    from fedmomentum.data.examples import ClientData, Example


def check_task(config: Config) -> None:
    """Refuse settings that a classifier cannot use.

    Raises:
        ConfigError: If there are any.
    """
    if config.model.task != CLASSIFICATION:
        return
    task = f'model.task = "{CLASSIFICATION}"'
    if config.data.source == BUILT_IN_SOURCE:
        raise ConfigError(
            f'data.source "{BUILT_IN_SOURCE}" has answers, not labels; {task} needs data with the '
            "columns text, or text_a and text_b, and label"
        )
    if config.data.category_column is not None:
        raise ConfigError(
            f"data.category-column is {config.data.category_column!r}; with {task} the category of "
            "a text is its label: leave it out"
        )
    # A PEFT adapter does not say which label each row of its head stands for.
    if config.lora.start_from is not None:
        raise ConfigError(
            f"lora.start-from cannot be used with {task}: the adapter's head does not name its "
            "labels, and could have them in another order. Leave it out"
        )
    # Settings for answers of language models; a label is not an answer.
    for key, value, wanted in (
        ("objective", config.training.objective, "sft"),
        ("loss-on", config.training.loss_on, "last"),
    ):
        if value != wanted:
            raise ConfigError(
                f'training.{key} = "{value}" is for the answers of language models; {task} learns '
                "labels: leave it out"
            )


def require_labels(model: ModelConfig) -> tuple[str, ...]:
    """Return the labels configured for a client or server in a federation over a network.

    Since nobody sees all of the data, labels cannot be found there.

    Raises:
        ConfigError: If the model is a classifier and they are missing.
    """
    if model.task == CLASSIFICATION and not model.labels:
        raise ConfigError(
            "model.labels is missing: over a network nobody sees all of the data, so the run's "
            'settings name the labels, in one order for server and clients: labels = ["A", "B"]'
        )
    return tuple(model.labels)


def find_labels(model: ModelConfig, clients: Sequence[ClientData]) -> tuple[str, ...]:
    """Return a classifier's labels from its settings or data; none for a language model.

    Labels found in the data include those of held-out examples. They are in the order of the
    checkpoint's own head if that has exactly these labels, else sorted.

    Raises:
        DataError: If the data has a label that the settings do not name, or only one.
        ModelError: If the base model cannot be found.
    """
    if model.task != CLASSIFICATION:
        return ()
    if model.labels:
        for client in clients:
            refuse_unknown_labels((*client.train, *client.test), model.labels, client.client_id)
        return tuple(model.labels)
    # Use the labels of all clients, so that every client has the same.
    found: set[str] = set()
    for client in clients:
        found.update(example.completion for example in (*client.train, *client.test))
    if len(found) < 2:
        raise DataError(
            f"all examples have the label {next(iter(found))!r}; a classifier needs two labels at "
            "least. If others come later, name all of them in model.labels"
        )
    if len(found) > MAX_LABELS:
        raise DataError(
            f"the clients' data has {len(found)} different labels, more than {MAX_LABELS}; a label "
            "is what many rows have in common"
        )
    return order_labels(resolve_base(model.name, model.revision), sort_labels(found))


def count_labels(labels: Sequence[str], examples: Sequence[TokenizedExamples]) -> dict[str, int]:
    """Count the training examples of each label, in the order of the labels; {} without labels."""
    if not labels:
        return {}
    counts: Counter[str] = Counter()
    for part in examples:
        counts.update(labels[ids[-1]] for ids in part.input_ids)
    return {label: counts[label] for label in labels}


def make_rows(
    examples: Sequence[Example],
    tokenizer: Any,
    labels: Sequence[str],
    *,
    owner: str,
    max_length: int,
    max_truncated_fraction: float,
    loss_on: str = "last",
) -> TokenizedExamples:
    """Tokenize examples for a classifier or, without labels, for a causal language model.

    Raises:
        DataError: If they cannot be used; see `tokenize_parts` and `tokenize_labeled`.
    """
    if not examples:
        return EMPTY_EXAMPLES
    (rows,) = make_parts(
        {owner: examples},
        tokenizer,
        labels,
        max_length=max_length,
        max_truncated_fraction=max_truncated_fraction,
        loss_on=loss_on,
    )
    return rows


def make_parts(
    parts: Mapping[str, Sequence[Example]],
    tokenizer: Any,
    labels: Sequence[str],
    *,
    max_length: int,
    max_truncated_fraction: float,
    loss_on: str = "last",
    trains: bool = True,
) -> tuple[TokenizedExamples, ...]:
    """Tokenize the parts of a client's examples, each of which may be empty.

    Args:
        parts: Each part's name, for error messages, and its examples.
        tokenizer: The base model's tokenizer.
        labels: The labels of a classifier; none for a causal language model.
        max_length: The maximum number of tokens per row.
        max_truncated_fraction: The fraction of all examples that may lose their entire answer.
        loss_on: Which turns of a chat are learned.
        trains: Whether the first part is trained on, and must not lose all of its examples.

    Raises:
        DataError: If they cannot be used; see `tokenize_parts` and `tokenize_labeled`.
    """
    if not labels:
        return tokenize_parts(
            parts,
            tokenizer,
            max_length=max_length,
            max_truncated_fraction=max_truncated_fraction,
            loss_on=loss_on,
            trains=trains,
        )
    rows = []
    for owner, examples in parts.items():
        part = EMPTY_EXAMPLES
        if examples:
            part = tokenize_labeled(examples, tokenizer, labels, max_length=max_length, owner=owner)
        rows.append(part)
    return tuple(rows)


def check_rows(model: Any, rows: TokenizedExamples, labels: Sequence[str], owner: str) -> None:
    """Refuse tokens that the model cannot embed; the label at a row's end is not a token.

    Raises:
        ModelError: If there are any.
    """
    texts = [ids[:-1] for ids in rows.input_ids] if labels else rows.rows
    check_token_ids(model, texts, owner)
