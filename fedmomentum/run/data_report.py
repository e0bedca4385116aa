"""How a file of examples is interpreted, and what the model would see of it."""

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
from fedmomentum.data.client_data import read_source, row_owners
from fedmomentum.data.columns import find_format, resolve_names
from fedmomentum.data.labeled_texts import sort_labels
from fedmomentum.data.prompts import prompt_key
from fedmomentum.data.rows import has_splits
from fedmomentum.objectives.choice import make_objective
from fedmomentum.run.task import make_rows
from fedmomentum.run.training_checks import check_pairs
from fedmomentum.utils.chat_date import set_chat_date

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config, ModelConfig
    from fedmomentum.data.examples import Example
    from fedmomentum.data.rows import Origin, Rows
    from fedmomentum.data.tokenized import TokenizedExample, TokenizedExamples

NO_LIMIT = 10**9
"""More tokens than any example has, so that nothing is cut."""
NUM_SHOWN = 3
PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class Segment:
    """A part of an example, as text.

    Attributes:
        text: Its tokens, decoded.
        is_learned: Whether they count in the loss.
    """

    text: str
    is_learned: bool


@dataclass(frozen=True)
class ShownExample:
    """An example as the model sees it.

    Attributes:
        segments: Its tokens as text, cut at `data.max-length`.
        note: The example's label or rejected answer, if any.
    """

    segments: Sequence[Segment]
    note: str = ""


@dataclass(frozen=True)
class DataReport:
    """What a source of examples contains.

    Attributes:
        source: The source.
        split: The split that is read; empty for a source without splits, such as a file.
        origin: The detected format of its file.
        kind: The format of its rows.
        columns: Our name of each column that is read, to the file's own.
        ignored: The file's columns that are not read.
        num_rows: Number of rows.
        clients: Number of rows of each client, if the source names clients.
        shown: The first examples.
        percentiles: Percentile to the length of the examples in tokens.
        max_length: `data.max-length`.
        num_cut: Number of examples that lose part of what is learned.
        lost_rows: Numbers of the rows that are dropped because their prompt fills the length.
        num_copies: Number of rows that repeat an earlier one.
        num_repeated: Number of rows whose prompt occurs more than once; they are never held out.
        is_refused: Whether a run would refuse to drop so many rows.
    """

    source: str
    split: str
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
    """Return the tokenizer of a base model without loading any weights.

    Raises:
        ModelError: If the model cannot be found, or has no tokenizer.
    """
    directory = resolve_base(model.name, model.revision, with_weights=False)
    tokenizer = load_tokenizer(directory, generates=model.task != CLASSIFICATION)
    set_chat_date(tokenizer, model.chat_date)
    return tokenizer


def report_data(
    source: str, split: str, config: Config, tokenizer: Any, *, is_run_config: bool = False
) -> DataReport:
    """Read a source as a run would, and report what is found.

    Args:
        source: A file, directory or hub name.
        split: The split to read, if the source has several.
        config: How to read it, and how long examples may be.
        tokenizer: The base model's tokenizer.
        is_run_config: Whether the configuration is that of a run; the examples must suit its
            objective.

    Raises:
        DataError: If it cannot be used; the message names row and column.
    """
    rows, examples = read_source(source, config.data, split, config.model.task)
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
    if is_run_config:
        check_pairs(tokens, make_objective(config.training, labels), source)
    # Which clients the source names, and which columns a run reads besides the text.
    owners = rows.owners
    used = {config.data.category_column}
    if config.privacy.dp is not None:
        used.add(config.privacy.dp.unit_column)
    if source == config.data.source:
        owners = row_owners(rows, config.data)
        used.add(config.data.client_column)
    max_length = config.data.max_length
    lengths = [tokens.example(index).length - bool(labels) for index in range(len(tokens))]
    # Which rows a run would cut at `max_length`, and which would have nothing left to learn.
    lost_rows = []
    num_cut = 0
    for index in range(len(tokens)):
        if labels:
            num_cut += lengths[index] > max_length
        elif tokens.num_prompt_tokens[index] >= max_length:
            lost_rows.append(index + 1)
        else:
            num_cut += _learned_end(tokens.example(index)) > max_length
    # Which columns are read, and which rows are duplicates.
    columns, kind = _columns(rows, config)
    used.update(columns.values())
    prompts = Counter(prompt_key(example, config.training.loss_on) for example in examples)
    return DataReport(
        source=source,
        split=split if has_splits(source) else "",
        origin=rows.origin,
        kind=kind,
        columns=columns,
        ignored=[name for name in rows.column_names if name not in used],
        num_rows=rows.num_rows,
        clients=Counter(owners or ()),
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
    """Return the columns that are read, keyed by our names, and the format."""
    mapping = config.data.columns
    if config.model.task == CLASSIFICATION:
        names = resolve_names(rows.column_names, mapping, "")
        texts = ("text", "text_a", "text_b", "label")
        return {ours: names[ours] for ours in texts if ours in names}, "labeled texts"
    form = find_format(rows.column_names, mapping, "")
    return dict(form.names), form.kind


def _content(example: Example) -> str:
    """Return a key that two examples share if and only if they are the same."""
    return json.dumps([example.prompt, example.completion, example.rejected], sort_keys=True)


def _learned_end(example: TokenizedExample) -> int:
    """Return the position after the last token that is learned or compared."""
    end = len(example.input_ids)
    if example.gaps and example.gaps[-1][1] == end:
        end = example.gaps[-1][0]
    return max(end, len(example.rejected_ids))


def _percentiles(lengths: Sequence[int]) -> dict[int, int]:
    """Return the percentiles of the examples' lengths in tokens."""
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
        # A classifier learns a label, not tokens.
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
    """Return an example's tokens as text, split into learned and other segments."""
    # One flag per token; then group neighbors with the same flag.
    is_learned = [index >= example.num_prompt_tokens for index in range(len(example.input_ids))]
    for start, end in example.gaps:
        is_learned[start:end] = [False] * (end - start)
    marked = list(zip(is_learned, example.input_ids, strict=True))[:max_length]
    segments = []
    for learned, group in groupby(marked, key=lambda token: token[0]):
        ids = [token for _, token in group]
        segments.append(Segment(str(tokenizer.decode(ids, skip_special_tokens=False)), learned))
    return segments
