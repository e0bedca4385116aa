"""Labeled texts for sequence classification: from rows to examples to tokens.

An example's completion and category are both its label: examples are partitioned and scores
reported by label.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmomentum.data.columns import resolve_names
from fedmomentum.data.encoding import TEXTS_PER_CALL
from fedmomentum.data.examples import MAX_CATEGORIES, Example, Prompt, TextPair
from fedmomentum.data.label_columns import column_texts, warn_of_lookalikes
from fedmomentum.data.rows import Rows
from fedmomentum.data.tokenized import TokenizedExamples
from fedmomentum.errors import DataError
from fedmomentum.utils.text import first_few, printable, short_repr

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


LABEL_COLUMN = "label"
TEXT_COLUMNS = (("text",), ("text_a", "text_b"))
"""The columns to classify: one text or a pair."""
MAX_SHOWN = 5
"""The most labels that an error message lists."""

_log = logging.getLogger(__name__)


# ── from rows to examples ─────────────────────────────────────────────────────────────────────────


def to_labeled_examples(
    rows: Rows | Dataset, *, where: str = "", columns: Mapping[str, str] | None = None
) -> list[Example]:
    """Convert rows with the columns `text`, or `text_a` and `text_b`, and `label` into examples.

    Args:
        rows: The rows, from `read_rows`.
        where: Name of the file, for error messages.
        columns: Our column names -> the file's, as in `data.columns`.

    Returns:
        One example per row, in row order.

    Raises:
        DataError: If a column is missing, or a row has no text or label (the message names it).
    """
    rows = Rows.of(rows)
    prefix = f"{where}: " if where else ""
    own_names = resolve_names(rows.column_names, columns or {}, where)
    names = [own_names[name] for name in _text_columns(list(own_names), rows.column_names, prefix)]
    label_column = own_names[LABEL_COLUMN]
    labels = column_texts(rows, label_column, where=where)
    if len(set(labels)) > MAX_CATEGORIES:
        raise DataError(
            f"{prefix}column {label_column!r} has {len(set(labels))} different values, more than "
            f"{MAX_CATEGORIES}; a label is what many rows have in common"
        )
    warn_of_lookalikes(labels, label_column, where)
    # Row by row, so that error messages can name the row.
    values = [rows[name] for name in names]
    examples = []
    for number, (label, *texts) in enumerate(zip(labels, *values, strict=True), start=1):
        for name, text in zip(names, texts, strict=True):
            _check_text(text, f"{prefix}{rows.place(number)}: column {name!r}")
        prompt: Prompt = texts[0] if len(texts) == 1 else TextPair(*texts)
        examples.append(Example(prompt=prompt, completion=label, category=label))
    return examples


def _text_columns(known: Sequence[str], columns: Sequence[str], prefix: str) -> tuple[str, ...]:
    """Return the columns to classify, among those known by our names."""
    fitting = [names for names in TEXT_COLUMNS if set(names) <= set(known)]
    if len(fitting) == 1 and LABEL_COLUMN in known:
        return fitting[0]
    problem = "has the columns of one text and of a pair; remove those of one of them"
    if len(fitting) < 2:
        problem = (
            "is no data for sequence classification; rename its columns, or say in [data.columns] "
            "which is which"
        )
    raise DataError(
        f"{prefix}the data, with the columns {printable(', '.join(columns))}, {problem}. Wanted: "
        "text, or text_a and text_b; and label"
    )


def _check_text(value: Any, place: str) -> None:
    """Reject a value that is not text, is empty or was cut off in the middle of a character."""
    if not isinstance(value, str):
        raise DataError(f"{place} is {short_repr(value)}; it must be text")
    if not value.strip():
        raise DataError(f"{place} is empty; fill it in or drop the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{place} holds half of a character that takes two (a lone surrogate): the text was "
            "cut within a character. Write the row again, or drop it"
        ) from None


# ── labels ────────────────────────────────────────────────────────────────────────────────────────


def sort_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels, sorted: integers by value, names alphabetically."""
    different = sorted(set(names))
    if all(name.removeprefix("-").isdecimal() for name in different):
        different.sort(key=int)
    return tuple(different)


def refuse_unknown_labels(examples: Iterable[Example], labels: Collection[str], owner: str) -> None:
    """Reject examples with a label that the head has no output for.

    Raises:
        DataError: If there are any; the message names the labels.
    """
    unknown = sort_labels({example.completion for example in examples} - set(labels))
    if unknown:
        raise DataError(
            f"{owner}: the label {_listed(unknown)} is none of the classifier's {len(labels)} "
            f"labels ({_listed(list(labels))}). Correct or drop those rows, or name all labels in "
            "model.labels, the same for all clients"
        )


def _listed(labels: Sequence[str]) -> str:
    return first_few([printable(repr(label), 60) for label in labels], MAX_SHOWN)


# ── from examples to tokens ───────────────────────────────────────────────────────────────────────


def tokenize_labeled(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    *,
    max_length: int,
    owner: str,
) -> TokenizedExamples:
    """Convert labeled texts into token rows: the text's token ids, then its label's index.

    The token ids are the tokenizer's output for the text or pair, including special tokens. What
    is too long is truncated at the end, a pair's longer text first. The number of prompt tokens
    is the length of the first text's segment.

    Args:
        examples: The labeled texts.
        tokenizer: The base model's tokenizer.
        labels: The names of the labels, in the order of the head's outputs.
        max_length: The maximum number of tokens of a text or pair.
        owner: Whose examples these are, for error messages.

    Raises:
        DataError: If there are no examples, a label is unknown, or the tokenizer does not number
            segments 0 and 1.
    """
    if not examples:
        raise DataError(f"{owner}: no examples; give at least one, or leave this client out")
    refuse_unknown_labels(examples, labels, owner)
    # In batches, since the overhead of a tokenizer call exceeds the cost of a short text.
    index_by_label = {label: index for index, label in enumerate(labels)}
    input_ids: list[tuple[int, ...]] = []
    num_first: list[int] = []
    num_cut = 0
    for start in range(0, len(examples), TEXTS_PER_CALL):
        batch = examples[start : start + TEXTS_PER_CALL]
        # Untruncated to count those that are too long, then truncated by the tokenizer, which keeps
        # the separators.
        lengths = map(len, _encode(batch, tokenizer)["input_ids"])
        num_cut += sum(length > max_length for length in lengths)
        encoded = _encode(batch, tokenizer, truncation=True, max_length=max_length)
        segments = encoded.get("token_type_ids")
        for row, example in enumerate(batch):
            ids = encoded["input_ids"][row]
            if not ids:
                raise DataError(
                    f"{owner}, example {start + row}: the tokenizer makes no token of its text"
                )
            input_ids.append((*ids, index_by_label[example.completion]))
            segment = [0] * len(ids) if segments is None else segments[row]
            num_first.append(_first_segment(segment, owner))
    if num_cut:
        _log.warning(
            "%s: %d of %d texts are longer than max-length = %d tokens; their ends are cut off",
            owner,
            num_cut,
            len(examples),
            max_length,
        )
    return TokenizedExamples(
        tuple(input_ids),
        tuple(num_first),
        tuple(example.category for example in examples),
        (False,) * len(examples),
        0,
        units=tuple(example.unit for example in examples),
    )


def _encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Mapping[str, list[list[int]]]:
    """Return the tokenizer's output for texts or pairs."""
    prompts = [example.prompt for example in examples]
    if all(isinstance(prompt, TextPair) for prompt in prompts):
        firsts, seconds = zip(*prompts, strict=True)
        encoded: Any = tokenizer(list(firsts), list(seconds), **options)
    else:
        encoded = tokenizer(prompts, **options)
    return dict(encoded)


def _first_segment(segments: Sequence[int], owner: str) -> int:
    """Return the number of tokens of the first segment.

    Raises:
        DataError: If the segment ids are not zeros followed by ones.
    """
    num_second = sum(segments)
    num_first = len(segments) - num_second
    if list(segments) != [0] * num_first + [1] * num_second:
        raise DataError(
            f"{owner}: this tokenizer numbers the parts of a text otherwise than 0 and 1 "
            "(token_type_ids), which is not supported"
        )
    return num_first
