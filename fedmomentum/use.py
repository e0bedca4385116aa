"""The result in use: evaluated on the user's data, answering prompts, beside the untouched model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedmomentum.base import load_base, load_tokenizer, pick_device, pick_dtype
from fedmomentum.data.examples import Example
from fedmomentum.data.read import read_rows, to_examples
from fedmomentum.data.tasks import score
from fedmomentum.data.tokens import tokenise
from fedmomentum.errors import ConfigError, DataError
from fedmomentum.evaluation import Evaluation, Score, evaluate, generate
from fedmomentum.global_model import GlobalModel
from fedmomentum.identity import BaseIdentity, identify, resolve_base
from fedmomentum.loaded import vocabulary_size
from fedmomentum.peft_io import read_adapter
from fedmomentum.report.text import number, percent, percent_range
from fedmomentum.tuned import TunedModel


class Both:
    """The untouched and the tuned model in one: the tuned weights are added to the base and taken off again.

    Args:
        what: a run's or global model's folder, or a PEFT adapter's.
        server_round: of a run: a number, `last` or `best`.
        base: the base model's folder, where it is not where the run found it.

    Raises:
        ModelError: no such thing, or another base.
        AdapterError: an adapter we cannot read.
    """

    def __init__(self, what: Path, server_round: str, base: str) -> None:
        if (what / "adapter_config.json").is_file():
            adapter = read_adapter(what)
            name = str(adapter.config.get("base_model_name_or_path") or "")
            model = GlobalModel(BaseIdentity(name, adapter.config.get("revision")), adapter)
        else:
            model = GlobalModel.load(what, server_round)
        if model.adapter.config.get("task_type") == "SEQ_CLS":
            raise ConfigError(f"{what} is of a sequence classifier; export it and use transformers' own pipeline")
        if not base and not model.base.name:
            raise ConfigError(f"{what} does not say which base model it is for; give --base")
        folder = resolve_base(base or model.base.name, model.base.revision)
        model.base.check(identify(base or model.base.name, folder))
        device = pick_device("auto")
        self.model = load_base(folder, pick_dtype("auto", device), device)
        self.tokenizer = load_tokenizer(folder, vocabulary_size(self.model))
        self._tuned = TunedModel(self.model, folder, model)

    @contextmanager
    def tuned(self) -> Iterator[None]:
        """Inside, the model is the tuned one."""
        with self._tuned.applied():
            yield


def answers(
    what: Path, prompts: Sequence[str], *, server_round: str, max_new_tokens: int, plain: bool, base: str
) -> list[tuple[str, str, str]]:
    """(prompt, the untouched model's answer, the tuned model's) for every prompt, greedily.

    Args:
        what: run, global model or adapter folder.
        prompts: questions; wrapped as a user's message where the tokenizer has a chat template.
        server_round: as in `Both`.
        max_new_tokens: where to stop.
        plain: give the prompts as they are.
        base: as in `Both`.

    Raises:
        FedMomentumError: see `Both`.
    """
    both = Both(what, server_round, base)
    chat = bool(both.tokenizer.chat_template) and not plain
    asked: list[Any] = [({"role": "user", "content": p},) if chat else p for p in prompts]
    untouched = generate(both.model, both.tokenizer, asked, max_new_tokens=max_new_tokens)
    with both.tuned():
        tuned = generate(both.model, both.tokenizer, asked, max_new_tokens=max_new_tokens)
    return list(zip(prompts, untouched, tuned, strict=True))


def evaluate_on(
    what: Path,
    data: str,
    *,
    server_round: str,
    category_column: str | None,
    split: str,
    limit: int | None,
    max_length: int,
    by_generation: bool,
    base: str,
) -> Table:
    """The untouched and the tuned model on the user's held-out examples, as a table.

    Args:
        what: run, global model or adapter folder.
        data: a file, folder or hub name, in any format that `to_examples` reads.
        server_round: as in `Both`.
        category_column: column to report by.
        split: split of data that has several.
        limit: the first so many examples.
        max_length: longest example in tokens.
        by_generation: generate answers and score their text, instead of one teacher-forced pass.
        base: as in `Both`.

    Raises:
        FedMomentumError: see `Both`, `read_rows`, `tokenise`.
    """
    examples = to_examples(read_rows(data, split=split), category_column=category_column, where=data)[:limit]
    if not examples:
        raise DataError(f"{data} holds no examples")
    both = Both(what, server_round, base)

    def measured() -> Evaluation:
        if by_generation:
            return _by_generation(both, examples, max_length)
        tokens = tokenise(examples, both.tokenizer, max_length=max_length, max_lost_share=0.02, owner=data)
        return evaluate(both.model, tokens, pad_token_id=both.tokenizer.pad_token_id)

    untouched = measured()
    with both.tuned():
        tuned = measured()
    title = f"{len(examples)} examples, 95 % intervals" + (", answers generated" if by_generation else "")
    table = Table("", "untouched model", "tuned model", "loss", "perplexity", title=title)
    table.add_row("all", *_columns(untouched.total, tuned.total))
    if len(untouched.by_category) > 1:
        table.add_section()
        for category in sorted(untouched.by_category):
            table.add_row(Text(category), *_columns(untouched.by_category[category], tuned.by_category[category]))
    return table


def _by_generation(both: Both, examples: Sequence[Example], max_length: int) -> Evaluation:
    """Real greedy answers, right where the task's own scorer gives full marks."""
    longest = max(len(both.tokenizer(e.completion).input_ids) for e in examples) + 8
    texts = generate(both.model, both.tokenizer, [e.prompt for e in examples], max_new_tokens=min(longest, max_length))
    by_category: dict[str, Score] = {}
    total = Score(0.0, 0, 0, 0)
    for example, text in zip(examples, texts, strict=True):
        one = Score(0.0, 0, 1, int(score(example, text) >= 1))
        total = total + one
        by_category[example.category] = by_category.get(example.category, Score(0.0, 0, 0, 0)) + one
    return Evaluation(total, by_category)


def _columns(before: Score, after: Score) -> list[str]:
    def told(one: Score) -> str:
        return f"{percent(one.exact_match)}  ({percent_range(one.interval)})"

    if not before.num_tokens:
        return [told(before), told(after), "-", "-"]
    return [
        told(before), told(after), f"{number(before.loss)} -> {number(after.loss)}",
        f"{number(before.perplexity)} -> {number(after.perplexity)}",
    ]  # fmt: skip
