"""The result in use: evaluated on the user's data, answering prompts, beside the untouched model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from fedmomentum.base import load_base, load_tokenizer, pick_device, pick_dtype
from fedmomentum.chat_date import DEFAULT_DATE, set_chat_date
from fedmomentum.data.examples import Example, Prompt
from fedmomentum.data.read import read_rows, to_examples
from fedmomentum.data.tasks import score
from fedmomentum.data.tokens import TokenisedExamples, prompt_token_ids, tokenise
from fedmomentum.errors import ConfigError, DataError, ModelError
from fedmomentum.evaluation import Evaluation, Score, evaluate, generate
from fedmomentum.identity import identify
from fedmomentum.loaded import check_token_ids, max_positions, vocabulary_size
from fedmomentum.origin import check_data, fingerprints, follow, refuse_missing_data
from fedmomentum.report.text import number
from fedmomentum.results import Result, base_folder
from fedmomentum.run import held_out_order, load_data, set_threads
from fedmomentum.run_files import EnvironmentFile, PartitionFile, read_facts
from fedmomentum.schema import printable
from fedmomentum.tuned import TunedModel

LOG = logging.getLogger("fedmomentum")
DEFAULT_MAX_LENGTH = 512
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Settings:
    """How a model is loaded to be used; what is left empty is as the run had it.

    Attributes:
        base: The base model's directory, where it is not where the run found it.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        device: `auto`, `cpu`, `cuda`, ...
    """

    base: str = ""
    dtype: str = ""
    device: str = ""


class Both:
    """The untouched and the tuned model in one: the tuned weights are added to the base and taken off again.

    Args:
        result: The model.
        settings: How to load it.

    Raises:
        ModelError: If the base cannot be found or loaded, or is another one.
        ConfigError: If the model is a sequence classifier.
    """

    def __init__(self, result: Result, settings: Settings) -> None:
        model = result.model
        if model.adapter.config.get("task_type") == "SEQ_CLS":
            raise ConfigError(
                f"{result.path} is of a sequence classifier; export it and use transformers' own pipeline"
            )
        folder = base_folder(result, settings.base)
        found = identify(settings.base or model.base.name, folder)
        model.base.check(found)
        dtype, device = _as_in_the_run(result, settings)
        if result.config is not None:
            set_threads(result.config.run.threads)
        if model.base.tokenizer_sha256 and found.tokenizer_sha256 != model.base.tokenizer_sha256:
            LOG.warning(
                "the tokenizer or chat template in %s is not that of the run %s; scores and answers may differ",
                folder,
                result.path,
            )
        try:
            chosen = pick_device(device)
        except ModelError as error:
            raise ModelError(f"{error}. Give another by --device") from error
        self.model = load_base(folder, pick_dtype(dtype, chosen), chosen)
        self._tuned = TunedModel(self.model, folder, model)
        date = result.config.model.chat_date if result.config is not None else DEFAULT_DATE
        self._set_tokenizers(result, folder, date)
        self.tokenizer = self._tokenizers[0]

    def _set_tokenizers(self, result: Result, folder: Path, date: str) -> None:
        """Choose the tokenizers of the untouched and of the tuned model: the same, unless tokens were added."""
        size = vocabulary_size(self.model)
        tuned = _tokenizer(result, folder, size)
        untouched = tuned
        if size is not None and len(tuned) > size and (folder / "tokenizer_config.json").is_file():
            untouched = load_tokenizer(folder, size)
        for tokenizer in (untouched, tuned):
            set_chat_date(tokenizer, date)
        self._tokenizers = untouched, tuned

    @property
    def longest(self) -> int | None:
        """The most tokens that the model can see; None where it does not say."""
        return max_positions(self.model)[0]

    @contextmanager
    def tuned(self) -> Iterator[None]:
        """Be the tuned model for a while, with its own tokenizer."""
        with self._tuned.applied():
            self.tokenizer = self._tokenizers[1]
            try:
                yield
            finally:
                self.tokenizer = self._tokenizers[0]


def _as_in_the_run(result: Result, settings: Settings) -> tuple[str, str]:
    """Return dtype and device: those asked for, else those of the run, else `auto`."""
    model = result.config.model if result.config is not None else None
    dtype = settings.dtype or (model.dtype if model is not None else "auto")
    device = settings.device or (model.device if model is not None else "auto")
    if dtype == "auto" and not settings.dtype and model is not None:
        dtype = _dtype_of_the_run(result.path) or dtype
    return dtype, device


def _dtype_of_the_run(path: Path) -> str | None:
    """The dtype that `auto` came to on the machine of the run; None where that is not known, in a run over a network.

    Raises:
        ModelError: If environment.json is missing or damaged.
    """
    file = path / "environment.json"
    try:
        environment, _ = read_facts(file, EnvironmentFile)
    except FileNotFoundError:
        raise ModelError(
            f"{file} is missing; it says in which dtype the run was. Restore it, or give --dtype"
        ) from None
    except ModelError as error:
        raise ModelError(f"{error}. Restore it from a copy, or give --dtype") from error
    dtype = environment.get("dtype")
    return dtype if dtype in ("float32", "bfloat16", "float16") else None


def _tokenizer(result: Result, folder: Path, vocabulary: int | None) -> Any:
    """The tokenizer that belongs to the result: an adapter's directory may hold one of its own, or a chat template."""
    own = result.path
    if (own / "adapter_config.json").is_file():
        if any((own / name).is_file() for name in TOKENIZER_FILES):
            tables = [tensor.shape[0] for tensor in result.model.adapter.saved.values() if tensor.ndim == 2]
            return load_tokenizer(own, max([vocabulary, *tables]) if vocabulary is not None else None)
        if (own / CHAT_TEMPLATE).is_file():
            tokenizer = load_tokenizer(folder, vocabulary)
            tokenizer.chat_template = (own / CHAT_TEMPLATE).read_text(encoding="utf-8")
            return tokenizer
    return load_tokenizer(folder, vocabulary)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def answers(
    result: Result, prompts: Sequence[str], settings: Settings, *, max_new_tokens: int, plain: bool
) -> list[tuple[str, str, str]]:
    """Return (prompt, the untouched model's answer, the tuned model's) for every prompt, greedily.

    Args:
        result: The model.
        prompts: Questions; wrapped as a user's message where the tokenizer has a chat template.
        settings: How to load the model.
        max_new_tokens: Where to stop.
        plain: Give the prompts as they are.

    Raises:
        ConfigError: If nothing is to be generated.
        DataError: If a prompt is empty, or leaves no room for an answer.
        FedMomentumError: See `Both`.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1; got {max_new_tokens}")
    for prompt in prompts:
        if not prompt.strip():
            raise DataError("a --prompt is empty; there is nothing to answer")
    both = Both(result, settings)
    chat = bool(both.tokenizer.chat_template) and not plain
    asked: list[Any] = []
    for prompt in prompts:
        asked.append(({"role": "user", "content": prompt},) if chat else prompt)
    untouched = _generated(both, asked, max_new_tokens=max_new_tokens)
    with both.tuned():
        tuned = _generated(both, asked, max_new_tokens=max_new_tokens)
    return list(zip(prompts, untouched, tuned, strict=True))


def _generated(both: Both, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_size: int = 32) -> list[str]:
    """Answer prompts with the model as it is now.

    Raises:
        DataError: If a prompt and its answer are longer than what the model can see.
        FedMomentumError: If a prompt has a token that the model does not know.
    """
    for prompt in prompts:
        ids = prompt_token_ids(prompt, both.tokenizer)
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        name = f"the prompt {printable(text, 40)!r}"
        check_token_ids(both.model, [ids], name)
        if both.longest is not None and len(ids) + max_new_tokens > both.longest:
            raise DataError(
                f"{name} has {len(ids)} tokens, and with {max_new_tokens} more passes the {both.longest} that the "
                "model can see; shorten it, or lower --max-new-tokens"
            )
    return generate(both.model, both.tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Part:
    """Examples that are scored together: the user's own, or what one client holds out.

    Attributes:
        owner: What to call them in messages.
        examples: The examples.
        most: The first so many that are not too long count.
        client: Whose they are; empty for the user's own.
    """

    owner: str
    examples: Sequence[Example]
    most: int | None = None
    client: str = ""


@dataclass(frozen=True)
class Scored:
    """A model's scores.

    Attributes:
        all: In total and by category.
        by_client: For a run's own held-out examples, by the client that holds them.
    """

    all: Evaluation
    by_client: Mapping[str, Score]


@dataclass(frozen=True)
class Comparison:
    """The untouched and the tuned model on the same examples.

    Attributes:
        untouched: The base model's scores.
        tuned: The tuned model's.
        num_cut: How many examples lost a part of their answer, so that they cannot be exact.
        num_lost: How many further examples were left out, because their prompt alone is too long.
        max_length: The longest example in tokens.
        by_generation: Whether answers were generated.
    """

    untouched: Scored
    tuned: Scored
    num_cut: int
    num_lost: int
    max_length: int
    by_generation: bool


def evaluate_on(
    result: Result,
    data: str | None,
    settings: Settings,
    *,
    category_column: str | None = None,
    split: str = "test",
    limit: int | None = None,
    max_length: int | None = None,
    by_generation: bool = False,
) -> Comparison:
    """Score the untouched and the tuned model on held-out examples.

    Args:
        result: The model.
        data: A file, directory or hub name, in any format that `to_examples` reads. None: what the run itself held
            out, as many of each client's examples as its last evaluation had.
        settings: How to load the model.
        category_column: Column of `data` to report by.
        split: Split of data that has several.
        limit: The first so many examples; of the run's own, of each client's.
        max_length: Longest example in tokens; by default the run's, or 512.
        by_generation: Generate answers and score their text, instead of one teacher-forced pass.

    Raises:
        ConfigError: If a number is out of range, or there is no data.
        FedMomentumError: See `Both`, `read_rows`, `tokenise`.
    """
    config = result.config
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1; got {limit}")
    if max_length is not None and max_length < 2:
        raise ConfigError(f"--max-length must be at least 2; got {max_length}")
    if data is not None:
        rows = to_examples(read_rows(data, split=split), category_column=category_column, where=data)
        parts = [_Part(data, rows[:limit])]
    else:
        if category_column is not None:
            raise ConfigError("--category-column is a column of --data; the run's own examples have their categories")
        parts = _held_out(result, limit)
    both = Both(result, settings)
    if max_length is None:
        max_length = config.data.max_length if config is not None else DEFAULT_MAX_LENGTH
        if both.longest is not None and data is not None:
            max_length = min(max_length, both.longest)
    elif both.longest is not None and max_length > both.longest:
        raise ConfigError(
            f"--max-length is {max_length}, and the model can see {both.longest} tokens; give that or less"
        )
    measure = _generating if by_generation else _teacher_forced
    return measure(both, parts, max_length, config.evaluation.batch_size if config is not None else 32)


def _held_out(result: Result, limit: int | None) -> list[_Part]:
    """What each client of a run holds out, in the order and to the number of the run's last evaluation."""
    if result.config is None:
        raise ConfigError(f"give the examples to evaluate {result.path} on: --data FILE")
    try:
        config = follow(result.config, result.path)
        refuse_missing_data(config)
        parties = load_data(config)
    except (ConfigError, DataError) as error:
        raise DataError(f"the run's own held-out examples are not here: {error}. Or give others by --data") from error
    check_data(result.path, fingerprints(parties))
    _refuse_reference(result.path, {party.client_id for party in parties})
    evaluation = config.evaluation
    most = max(evaluation.num_examples, evaluation.final_num_examples) if limit is None else limit
    parts = []
    for party in parties:
        if party.test and result.client in ("", party.client_id):
            held_out = held_out_order(config, party)
            parts.append(_Part(f"{party.client_id} (held out)", held_out, most, party.client_id))
    if not parts:
        raise DataError(f"the clients of {result.title} hold out no examples; give some by --data")
    return parts


def _refuse_reference(path: Path, clients: set[str]) -> None:
    """Refuse a comparison's reference (`centralised`, `local`): it is scored on the examples of all as one client's.

    Raises:
        DataError: If it is one.
        ModelError: If partition.json, which tells, is missing or damaged.
    """
    file = path / "partition.json"
    try:
        partition, _ = read_facts(file, PartitionFile)
    except FileNotFoundError:
        raise ModelError(f"{file} is missing; restore it from a copy, or give --data") from None
    except ModelError as error:
        raise ModelError(f"{error}. Restore it from a copy, or give --data") from error
    if partition["clients"].keys() != clients:
        raise DataError(f"{path} is a reference of a comparison, with other clients than its data; give --data")


def _teacher_forced(both: Both, parts: Sequence[_Part], max_length: int, batch_size: int) -> Comparison:
    """One pass over the examples with their answers."""
    # The two models may have tokenizers of their own, where tokens were added.
    tokens_by_tokenizer: dict[int, list[tuple[str, TokenisedExamples]]] = {}

    def tokens() -> list[tuple[str, TokenisedExamples]]:
        tokenizer = both.tokenizer
        if id(tokenizer) not in tokens_by_tokenizer:
            own = tokens_by_tokenizer[id(tokenizer)] = []
            for part in parts:
                made = tokenise(part.examples, tokenizer, max_length=max_length, max_lost_share=1, owner=part.owner)
                check_token_ids(both.model, made.input_ids, part.owner)
                own.append((part.client, made.first(part.most)))
        return tokens_by_tokenizer[id(tokenizer)]

    def measured() -> Scored:
        total = Evaluation(Score(), {})
        by_client = {}
        for client, examples in tokens():
            one = evaluate(both.model, examples, pad_token_id=both.tokenizer.pad_token_id, batch_size=batch_size)
            total = total + one
            if client:
                by_client[client] = one.total
        return Scored(total, by_client)

    untouched = measured()
    with both.tuned():
        tuned = measured()
        num_cut = sum(examples.num_truncated for _, examples in tokens())
        num_lost = sum(examples.num_lost for _, examples in tokens())
    return Comparison(untouched, tuned, num_cut, num_lost, max_length, by_generation=False)


def _generating(both: Both, parts: Sequence[_Part], max_length: int, batch_size: int) -> Comparison:
    """Real greedy answers, right where the task's own scorer gives full marks."""
    answer_lengths = [len(both.tokenizer(e.completion).input_ids) for part in parts for e in part.examples]
    max_new_tokens = min(max(answer_lengths, default=1) + 8, max_length)
    room = max_length - 1 if both.longest is None else min(max_length - 1, both.longest - max_new_tokens)
    asked: list[tuple[str, Example]] = []
    num_lost = 0
    for part in parts:
        short = [e for e in part.examples if len(prompt_token_ids(e.prompt, both.tokenizer)) <= room]
        num_lost += len(part.examples) - len(short)
        asked += [(part.client, example) for example in short[: part.most]]
    if not asked:
        raise DataError(
            f"no prompt of the {num_lost} leaves room for an answer of {max_new_tokens} tokens within "
            f"{both.longest or max_length}; shorten the prompts, or raise --max-length"
        )

    def measured() -> Scored:
        prompts = [example.prompt for _, example in asked]
        texts = _generated(both, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
        total = Evaluation(Score(), {})
        by_client: dict[str, Score] = {}
        for (client, example), text in zip(asked, texts, strict=True):
            one = Score(0.0, 0, 1, int(score(example, text) >= 1))
            total = total + Evaluation(one, {example.category: one})
            if client:
                by_client[client] = by_client.get(client, Score()) + one
        return Scored(total, by_client)

    untouched = measured()
    with both.tuned():
        tuned = measured()
    return Comparison(untouched, tuned, 0, num_lost, max_length, by_generation=True)


def heading(result: Result, comparison: Comparison) -> str:
    """Return what was scored: which model, on how many examples, and how."""
    how = ", answers generated" if comparison.by_generation else ""
    num_examples = comparison.tuned.all.total.num_examples
    return f"{result.title}: {num_examples} examples{how}; exact match in % [95 % interval]"


def notes(comparison: Comparison) -> list[str]:
    """Return what the scores leave out."""
    found = []
    if comparison.num_lost:
        few = f"{comparison.num_lost} more {'is' if comparison.num_lost == 1 else 'are'} left out"
        found.append(f"{few}: the prompt alone is too long for {comparison.max_length} tokens")
    if comparison.num_cut:
        found.append(f"{comparison.num_cut} of the answers are cut at {comparison.max_length} tokens and never exact")
    return found


def comparison_table(comparison: Comparison) -> Table:
    """Return the scores as a table: of all examples, by client, by category."""
    untouched, tuned = comparison.untouched, comparison.tuned
    columns = [Column(name, no_wrap=True) for name in ("untouched", "tuned", "loss")]
    table = Table(Column("", overflow="fold", min_width=8), *columns, "perplexity")
    table.add_row("all", *_columns(untouched.all.total, tuned.all.total))
    if len(untouched.by_client) > 1:
        table.add_section()
        for client in sorted(untouched.by_client):
            table.add_row(Text(printable(client)), *_columns(untouched.by_client[client], tuned.by_client[client]))
    if len(untouched.all.by_category) > 1:
        table.add_section()
        for category in sorted(untouched.all.by_category.keys() | tuned.all.by_category.keys()):
            before = untouched.all.by_category.get(category, Score())
            after = tuned.all.by_category.get(category, Score())
            table.add_row(Text(printable(category)), *_columns(before, after))
    return table


def _columns(before: Score, after: Score) -> list[str]:
    if not before.num_tokens:
        return [_exact(before), _exact(after), "-", "-"]
    return [
        _exact(before),
        _exact(after),
        f"{number(before.loss)} -> {number(after.loss)}",
        f"{before.perplexity:.3g} -> {after.perplexity:.3g}",
    ]


def _exact(one: Score) -> str:
    low, high = one.interval
    return f"{100 * one.exact_match:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
