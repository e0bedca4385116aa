"""What a file of examples is taken for, and what the model would see of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fedmomentum.base_model.hub import resolve_base
from fedmomentum.base_model.loading import load_tokenizer
from fedmomentum.config.schema import CLASSIFICATION
from fedmomentum.data.client_data import prompt_key, read_source
from fedmomentum.data.columns import find_format, resolve_names
from fedmomentum.data.labeled_texts import sort_labels
from fedmomentum.run.task import make_rows
from fedmomentum.utils.chat_date import set_chat_date

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config, ModelConfig
    from fedmomentum.data.examples import Example
    from fedmomentum.data.rows import Origin, Rows
    from fedmomentum.data.tokenized import TokenizedExample, TokenizedExamples

NO_LIMIT = 10**9
"""More tokens than any example has."""
NUM_SHOWN = 3
PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class Segment:
    """A part of an example, as text.

    Attributes:
        text: What its tokens read as.
        is_learned: Whether there is a loss on them.
    """

    text: str
    is_learned: bool


@dataclass(frozen=True)
class ShownExample:
    """An example as the model sees it.

    Attributes:
        segments: Its tokens as text, cut at `data.max-length`.
        note: What else belongs to it: a label, or a rejected answer.
    """

    segments: Sequence[Segment]
    note: str = ""


@dataclass(frozen=True)
class DataReport:
    """What a source of examples holds.

    Attributes:
        source: The source.
        origin: What its file was found to be.
        kind: The format of its rows.
        columns: Our name of each column that is read, to the file's own.
        ignored: The file's columns that are not read.
        num_rows: Number of rows.
        clients: Rows of each client, where the file names clients.
        shown: The first examples.
        percentiles: Percentage of the rows to the number of tokens that as many have at most.
        max_length: `data.max-length`.
        num_cut: Examples that lose a part of what is learned.
        lost_rows: Numbers of the rows that are dropped, since their prompt fills the length.
        num_copies: Rows that repeat an earlier one.
        num_repeated: Rows whose prompt occurs more than once, so that they are never held out.
        is_refused: Whether a run would refuse to drop so many.
    """

    source: str
    origin: Origin
    kind: str
    columns: Mapping[str, str]
    ignored: Sequence[str]
    num_rows: int
    clients: Mapping[str, int]
    shown: Sequence[ShownExample]
    percentiles: Mapping[int, int]
    max_length: int
    num_cut: int
    lost_rows: Sequence[int]
    num_copies: int
    num_repeated: int
    is_refused: bool


def load_tokenizer_of(model: ModelConfig) -> Any:
    """Return the tokenizer of a base model, of which no weights are loaded.

    Raises:
        ModelError: If the model cannot be found, or has no tokenizer.
    """
    directory = resolve_base(model.name, model.revision, with_weights=False)
    tokenizer = load_tokenizer(directory, generates=model.task != CLASSIFICATION)
    set_chat_date(tokenizer, model.chat_date)
    return tokenizer


def report_data(source: str, config: Config, tokenizer: Any) -> DataReport:
    """Read a source as a run would, and say what is made of it.

    Args:
        source: A file, directory or hub name.
        config: How to read it, and how long examples may be.
        tokenizer: The base model's tokenizer.

    Raises:
        DataError: If it cannot be used; the message names row and column.
    """
    rows, examples = read_source(source, config.data, config.data.split, config.model.task)
    labels: tuple[str, ...] = ()
    if config.model.task == CLASSIFICATION:
        labels = sort_labels(example.completion for example in examples)
    # Uncut, so that all lengths are known.
    tokens = make_rows(
        examples,
        tokenizer,
        labels,
        owner=source,
        max_length=NO_LIMIT,
        max_truncated_fraction=1,
        loss_on=config.training.loss_on,
    )
    max_length = config.data.max_length
    lengths = [tokens.example(index).length - bool(labels) for index in range(len(tokens))]
    # What a run would cut at its length, and which rows would have nothing left to learn.
    lost_rows = []
    num_cut = 0
    for index in range(len(tokens)):
        if labels:
            num_cut += lengths[index] > max_length
        elif tokens.num_prompt_tokens[index] >= max_length:
            lost_rows.append(index + 1)
        else:
            num_cut += _learned_end(tokens.example(index)) > max_length
    # What is read, and what occurs twice.
    columns, kind = _columns(rows, config)
    own_names = set(columns.values())
    prompts = Counter(prompt_key(example, config.training.loss_on) for example in examples)
    return DataReport(
        source=source,
        origin=rows.origin,
        kind=kind,
        columns=columns,
        ignored=[name for name in rows.column_names if name not in own_names],
        num_rows=rows.num_rows,
        clients=Counter(rows.owners or ()),
        shown=_shown_examples(examples, tokens, tokenizer, labels, max_length),
        percentiles=_percentiles(lengths),
        max_length=max_length,
        num_cut=num_cut,
        lost_rows=lost_rows,
        num_copies=len(examples) - len({_content(example) for example in examples}),
        num_repeated=sum(count for count in prompts.values() if count > 1),
        is_refused=len(lost_rows) > config.data.max_truncated_fraction * len(examples),
    )


def _columns(rows: Rows, config: Config) -> tuple[dict[str, str], str]:
    """Return the columns that are read, by our names, and the format."""
    mapping = config.data.columns
    if config.model.task == CLASSIFICATION:
        names = resolve_names(rows.column_names, mapping, "")
        texts = ("text", "text_a", "text_b", "label")
        return {ours: names[ours] for ours in texts if ours in names}, "labeled texts"
    form = find_format(rows.column_names, mapping, "")
    return dict(form.names), form.kind


def _content(example: Example) -> str:
    """Return a text that two examples share if and only if they are the same."""
    return json.dumps([example.prompt, example.completion, example.rejected], sort_keys=True)


def _learned_end(example: TokenizedExample) -> int:
    """Return the position after the last token that is learned, or compared."""
    end = len(example.input_ids)
    if example.gaps and example.gaps[-1][1] == end:
        end = example.gaps[-1][0]
    return max(end, len(example.rejected_ids))


def _percentiles(lengths: Sequence[int]) -> dict[int, int]:
    """Return how many tokens so many percent of the examples have at most."""
    ordered = sorted(lengths)
    return {
        percent: ordered[max(0, -(-percent * len(ordered) // 100) - 1)] for percent in PERCENTILES
    }


# ── examples as text ──────────────────────────────────────────────────────────────────────────────


def _shown_examples(
    examples: Sequence[Example],
    tokens: TokenizedExamples,
    tokenizer: Any,
    labels: Sequence[str],
    max_length: int,
) -> list[ShownExample]:
    """Return the first examples as the model sees them."""
    shown = []
    for index in range(min(NUM_SHOWN, len(tokens))):
        one = tokens.example(index)
        # A classifier learns its label, and no token.
        if labels:
            text = tokenizer.decode(list(one.input_ids[:-1][:max_length]))
            note = f"label: {examples[index].completion}"
            shown.append(ShownExample([Segment(text, is_learned=False)], note))
            continue
        note = ""
        if one.rejected_ids:
            rejected = one.rejected_ids[one.num_prompt_tokens : max_length]
            note = f"rejected: {tokenizer.decode(list(rejected))}"
        shown.append(ShownExample(_segments(one, tokenizer, max_length), note))
    return shown


def _segments(example: TokenizedExample, tokenizer: Any, max_length: int) -> list[Segment]:
    """Return an example's tokens as text, learned ones apart from the others."""
    # One flag a token, then neighbors with the same flag together.
    is_learned = [index >= example.num_prompt_tokens for index in range(len(example.input_ids))]
    for start, end in example.gaps:
        is_learned[start:end] = [False] * (end - start)
    marked = list(zip(is_learned, example.input_ids, strict=True))[:max_length]
    segments = []
    for learned, group in groupby(marked, key=lambda token: token[0]):
        ids = [token for _, token in group]
        segments.append(Segment(str(tokenizer.decode(ids, skip_special_tokens=False)), learned))
    return segments
