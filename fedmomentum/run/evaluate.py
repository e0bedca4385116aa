"""Score a model or an adapter on held-out examples, together with its base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.config.data import DataConfig
from fedmomentum.config.schema import CAUSAL_LM, CLASSIFICATION
from fedmomentum.config.training import TrainingConfig
from fedmomentum.data.client_data import read_source
from fedmomentum.data.tokenization import prompt_token_ids
from fedmomentum.data.tokenized import TokenizedExamples
from fedmomentum.errors import ConfigError, DataError, ModelError
from fedmomentum.evaluation.tasks import Evaluation, GenerationTask
from fedmomentum.evaluation.teacher_forcing import evaluate as evaluate_examples
from fedmomentum.evaluation.teacher_forcing import measure_reference
from fedmomentum.formats.run_files import PartitionFile, read_facts
from fedmomentum.formats.scores import NO_EXAMPLES, Score
from fedmomentum.global_model.base_loading import is_classifier
from fedmomentum.objectives.choice import make_objective
from fedmomentum.run.client_examples import held_out_order
from fedmomentum.run.evaluation_options import TEST_SPLIT, check_options
from fedmomentum.run.inference import (
    DEFAULT_MAX_LENGTH,
    LoadSettings,
    ModelPair,
    _generated,
    refuse_generation,
)
from fedmomentum.run.origin import check_data, fingerprints, refuse_missing_data, with_moved_paths
from fedmomentum.run.saved_model import Result, open_result
from fedmomentum.run.setup import load_data
from fedmomentum.run.task import check_rows, make_parts

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config
    from fedmomentum.data.examples import Example, Prompt
    from fedmomentum.objectives.objective import Objective


# ── scores ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Part:
    """Examples that are scored together: the user's own, or what one client holds out.

    Attributes:
        owner: What to call them in messages.
        examples: The examples.
        most: How many to use: the first ones that are not too long; None for all.
        client: The client that they belong to; empty for the user's own.
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
        by_client: For a run's own held-out examples, by client.
    """

    all: Evaluation
    by_client: Mapping[str, Score]


@dataclass(frozen=True)
class ModelComparison:
    """The scores of the base and the tuned model on the same examples.

    Attributes:
        base: The base model's scores.
        tuned: The tuned model's scores.
        num_cut: How many examples lost part of their answer, so that they cannot be exact.
        num_lost: How many further examples were left out because their prompt alone is too long.
        max_length: The maximum length of an example in tokens.
        by_generation: Whether answers were generated.
    """

    base: Scored
    tuned: Scored
    num_cut: int
    num_lost: int
    max_length: int
    by_generation: bool


def evaluate_on(
    result: Result,
    data: str | None,
    settings: LoadSettings,
    *,
    category_column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    by_generation: bool = False,
) -> ModelComparison:
    """Score the base and the tuned model on held-out examples.

    Args:
        result: The model.
        data: A file, directory or hub name, in any format that `to_examples` reads. None: the run's
            own held-out examples, as many of each client's as its last evaluation used.
        settings: How to load the model.
        category_column: Column of `data` to group scores by.
        split: Which split of `data` to use; by default `TEST_SPLIT` if it has several.
        limit: Use at most this many examples; with the run's own, of each client.
        max_length: Maximum length of an example in tokens; by default the run's, or 512.
        by_generation: Generate answers and score their text, instead of one teacher-forced pass.

    Raises:
        ConfigError: If a number is out of range, an option would be ignored, or there is no data.
        FedMomentumError: See `ModelPair`, `read_rows`, `tokenize`.
    """
    config = result.config
    is_labeled = is_classifier(result.model.adapter)
    check_options(
        data,
        category_column=category_column,
        split=split,
        limit=limit,
        max_length=max_length,
        is_labeled=is_labeled,
    )
    # The examples: the user's, or the run's own held-out ones.
    if by_generation:
        refuse_generation(result)
    if data is not None:
        task = CLASSIFICATION if is_labeled else CAUSAL_LM
        _, examples = read_source(
            data, _reading(config, category_column), split or TEST_SPLIT, task
        )
        parts = [_Part(data, examples[:limit])]
    else:
        parts = _held_out(result, limit)
    pair = ModelPair(result, settings)
    # No row may be longer than the model's context.
    if max_length is None:
        max_length = config.data.max_length if config is not None else DEFAULT_MAX_LENGTH
        if pair.longest is not None and data is not None:
            max_length = min(max_length, pair.longest)
    elif pair.longest is not None and max_length > pair.longest:
        raise ConfigError(
            f"--max-length is {max_length}, and the model can see {pair.longest} tokens; give that "
            "or less"
        )
    batch_size = config.evaluation.batch_size if config is not None else 32
    if by_generation:
        return _generating(pair, parts, max_length, batch_size)
    training = config.training if config is not None else TrainingConfig()
    return _teacher_forced(pair, parts, max_length, batch_size, training)


def evaluate(
    path: Path | str,
    data: str | None = None,
    *,
    server_round: int | str = "last",
    client: str = "",
    settings: LoadSettings = LoadSettings(),  # noqa: B008 (frozen)
    category_column: str | None = None,
    limit: int | None = None,
) -> ModelComparison:
    """Score the base and the tuned model of a run, a global model or a PEFT adapter.

    Args:
        path: The run's directory, or that of a global model or adapter.
        data: A file, directory or hub name; None: the run's own held-out examples.
        server_round: A round of the run, `last` or `best`.
        client: Whose model, if the method gives each client its own.
        settings: How to load the model.
        category_column: Column of `data` to group scores by.
        limit: Evaluate only this many examples.

    Raises:
        FedMomentumError: See `evaluate_on`.
    """
    result = open_result(Path(path), server_round=str(server_round), client=client)
    return evaluate_on(result, data, settings, category_column=category_column, limit=limit)


def _reading(config: Config | None, category_column: str | None) -> DataConfig:
    """Return how to read the user's data: with the encoding and column names of the run."""
    own = config.data if config is not None else DataConfig()
    return DataConfig(category_column=category_column, columns=own.columns, encoding=own.encoding)


def _held_out(result: Result, limit: int | None) -> list[_Part]:
    """Return each client's held-out examples, as many and in the order of the last evaluation."""
    if result.config is None:
        raise ConfigError(f"give the examples to evaluate {result.path} on: --data FILE")
    try:
        config = with_moved_paths(result.config, result.path)
        refuse_missing_data(config)
        clients = load_data(config)
    except (ConfigError, DataError) as error:
        raise DataError(
            f"the run's own held-out examples are not here: {error}. Or give others by --data"
        ) from error
    # Scores on other data would be wrongly compared with the run's metrics.
    check_data(result.path, fingerprints(clients))
    _refuse_reference(result.path, {client.client_id for client in clients})
    evaluation = config.evaluation
    # As many as in the last evaluation, unless the user limits them.
    most = max(evaluation.num_examples, evaluation.final_num_examples) if limit is None else limit
    parts = []
    for client in clients:
        if client.test and result.client in ("", client.client_id):
            held_out = held_out_order(config, client)
            parts.append(_Part(f"{client.client_id} (held out)", held_out, most, client.client_id))
    if not parts:
        raise DataError(f"the clients of {result.title} hold out no examples; give some by --data")
    return parts


def _refuse_reference(path: Path, clients: set[str]) -> None:
    """Refuse a comparison's reference: it was scored on all clients' examples as a single client.

    Raises:
        DataError: If it is one.
        ModelError: If partition.json, which tells them apart, is missing or damaged.
    """
    file = path / "partition.json"
    try:
        partition, _ = read_facts(file, PartitionFile)
    except FileNotFoundError:
        raise ModelError(f"{file} is missing; restore it from a copy, or give --data") from None
    except ModelError as error:
        raise ModelError(f"{error}. Restore it from a copy, or give --data") from error
    if partition["clients"].keys() != clients:
        raise DataError(
            f"{path} is a reference of a comparison, with other clients than its data; give --data"
        )


def _teacher_forced(
    pair: ModelPair,
    parts: Sequence[_Part],
    max_length: int,
    batch_size: int,
    training: TrainingConfig,
) -> ModelComparison:
    """Score both models in one pass over the examples with their answers."""
    # The two models may have different tokenizers, if tokens were added.
    tokens_by_tokenizer: dict[int, list[tuple[str, TokenizedExamples]]] = {}

    def tokens() -> list[tuple[str, TokenizedExamples]]:
        tokenizer = pair.tokenizer
        if id(tokenizer) not in tokens_by_tokenizer:
            # A client may have lost all of its examples, as in the run itself.
            tokenized = make_parts(
                {part.owner: part.examples for part in parts},
                tokenizer,
                pair.labels,
                max_length=max_length,
                max_truncated_fraction=1,
                loss_on=training.loss_on,
                trains=False,
            )
            own = tokens_by_tokenizer[id(tokenizer)] = []
            for part, rows in zip(parts, tokenized, strict=True):
                check_rows(pair.model, rows, pair.labels, part.owner)
                own.append((part.client, rows[: part.most]))
        return tokens_by_tokenizer[id(tokenizer)]

    def measured(references: Sequence[TokenizedExamples]) -> Scored:
        total = Evaluation(NO_EXAMPLES, {})
        by_client = {}
        for number, (client, examples) in enumerate(tokens()):
            if not examples:
                continue
            if examples.are_pairs:
                examples = _with_reference(examples, references[number])
            one = evaluate_examples(
                pair.model,
                examples,
                pad_token_id=pair.tokenizer.pad_token_id,
                batch_size=batch_size,
                objective=_objective(examples, training, pair.labels),
            )
            total = total + one
            if client:
                by_client[client] = one.total
        return Scored(total, by_client)

    # The base model comes first; its weights are restored bit for bit after the tuned one. It is
    # also the reference for pairs.
    references = []
    for _, examples in tokens():
        if examples.are_pairs:
            pad = pair.tokenizer.pad_token_id
            examples = measure_reference(
                pair.model, examples, pad_token_id=pad, batch_size=batch_size
            )
        references.append(examples)
    base = measured(references)
    with pair.tuned():
        tuned = measured(references)
        num_cut = sum(examples.num_truncated for _, examples in tokens())
        num_lost = sum(examples.num_lost for _, examples in tokens())
    return ModelComparison(base, tuned, num_cut, num_lost, max_length, by_generation=False)


def _prompt_of(example: Example, owner: str) -> Prompt:
    """Return the prompt to answer.

    Raises:
        ConfigError: If the example is a text without a prompt.
    """
    if example.prompt is None:
        raise ConfigError(
            f"{owner}: the examples are texts without prompts, so there is nothing to answer; "
            "leave out --generate"
        )
    return example.prompt


def _objective(
    examples: TokenizedExamples, training: TrainingConfig, labels: Sequence[str]
) -> Objective:
    """Return the objective for scoring: pairs by their rewards, whatever was trained."""
    objective = "dpo" if examples.are_pairs else "sft"
    return make_objective(replace(training, objective=objective), labels)


def _with_reference(examples: TokenizedExamples, measured: TokenizedExamples) -> TokenizedExamples:
    """Return pairs with the reference that the base model measured.

    Raises:
        DataError: If the tuned model's tokenizer tokenizes them differently.
    """
    is_same = examples.rows == measured.rows
    if not is_same:
        raise DataError(
            "the tuned model's tokenizer writes these pairs with other tokens than the base "
            "model's, so their likelihoods cannot be compared; evaluate on rows with one answer"
        )
    return replace(examples, reference=measured.reference)


def _generating(
    pair: ModelPair, parts: Sequence[_Part], max_length: int, batch_size: int
) -> ModelComparison:
    """Score greedily generated answers; one is right if the task's own scorer gives full marks."""
    # Leave room in the context for the longest reference answer, and a few tokens more.
    answer_lengths = [
        len(pair.tokenizer(e.completion).input_ids) for part in parts for e in part.examples
    ]
    max_new_tokens = min(max(answer_lengths, default=1) + 8, max_length)
    room = (
        max_length - 1
        if pair.longest is None
        else min(max_length - 1, pair.longest - max_new_tokens)
    )
    asked: list[tuple[str, Example]] = []
    num_lost = 0
    for part in parts:
        short = []
        for example in part.examples:
            if len(prompt_token_ids(_prompt_of(example, part.owner), pair.tokenizer)) <= room:
                short.append(example)
        num_lost += len(part.examples) - len(short)
        asked += [(part.client, example) for example in short[: part.most]]
    if not asked:
        raise DataError(
            f"no prompt of the {num_lost} leaves room for an answer of {max_new_tokens} tokens "
            f"within {pair.longest or max_length}; shorten the prompts, or raise --max-length"
        )

    task = GenerationTask([example for _, example in asked])

    def measured() -> Scored:
        prompts = [_prompt_of(example, client) for client, example in asked]
        texts = _generated(pair, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
        total = Evaluation(NO_EXAMPLES, {})
        by_client: dict[str, Score] = {}
        for (client, example), text in zip(asked, texts, strict=True):
            one = task.evaluate(example, text)
            total = total + Evaluation(one, {example.category: one})
            if client:
                by_client[client] = by_client.get(client, NO_EXAMPLES) + one
        return Scored(total, by_client)

    # First with the base weights, then with the tuned weights applied to the same model.
    base = measured()
    with pair.tuned():
        tuned = measured()
    return ModelComparison(base, tuned, 0, num_lost, max_length, by_generation=True)
