"""Benchmarks a run, a global model or an adapter against its base model, round by round."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.benchmark.language_model import BenchmarkModel, PromptSettings
from fedmomentum.benchmark.plain_model import PlainModel, is_plain_model
from fedmomentum.benchmark.sandbox import check_sandbox
from fedmomentum.benchmark.task_files import TaskData, read_task
from fedmomentum.benchmark.tasks import make_task
from fedmomentum.errors import ConfigError, DataError, FedMomentumError
from fedmomentum.formats.benchmark_file import (
    ModelScores,
    TaskResult,
    TaskSettings,
    adapter_hash,
)
from fedmomentum.formats.directories import retained_rounds
from fedmomentum.formats.manifest import as_manifest
from fedmomentum.run.inference import LoadSettings, ModelPair, refuse_generation
from fedmomentum.run.saved_model import Result, open_result

Loaded = ModelPair | PlainModel
OnResult = Callable[[TaskResult], None]
OnStep = Callable[[str, int], None]


@dataclass(frozen=True)
class Subject:
    """The models to benchmark.

    Attributes:
        path: The directory of a run, a global model, a PEFT adapter, or a plain model.
        rounds: The rounds of a run: numbers, `last`, `best` or `all`.
        client: The client whose model to use, if the method gives each client its own.
        store: Where that client's own factors are, if not in the run's directory.
    """

    path: Path
    rounds: tuple[str, ...] = ("last",)
    client: str = ""
    store: Path | None = None


@dataclass(frozen=True)
class Benchmarks:
    """The benchmarks to run.

    Attributes:
        tasks: Names of task files.
        directory: Their directory.
        prompt_settings: How prompts are presented to the model.
        num_fewshot: Number of few-shot examples per prompt; None for each task's own.
        run_code: Whether programs that the model writes may be run.
        truncate: Whether prompts that exceed the model's context may be truncated from the left.
    """

    tasks: tuple[str, ...]
    directory: Path
    prompt_settings: PromptSettings = PromptSettings()
    num_fewshot: int | None = None
    run_code: bool = False
    truncate: bool = False


def run_benchmarks(
    subject: Subject,
    benchmarks: Benchmarks,
    load: LoadSettings = LoadSettings(),  # noqa: B008 (frozen)
    *,
    on_result: OnResult = lambda result: None,
    on_step: OnStep = lambda step, num_prompts: None,
) -> list[TaskResult]:
    """Score the base model and each round's federated model; score a plain model alone.

    Everything that can be rejected without computation is rejected first.

    Args:
        subject: The models.
        benchmarks: The tasks.
        load: How to load the model.
        on_result: Called with the new result after each task of each model.
        on_step: Called with the current step and its number of answered prompts.

    Returns:
        One result per task, in the order requested.

    Raises:
        ConfigError: If a task does not exist, a task runs programs but that is not allowed, or the
            model is a classifier.
        DataError: If a task file, its data or a prompt cannot be used.
        FedMomentumError: See `open_result` and `ModelPair`.
    """
    tasks = _read_tasks(benchmarks)
    collected: dict[str, TaskResult] = {}
    # A plain model has no base model to compare with.
    if is_plain_model(subject.path):
        _refuse_choices(subject, load)
        plain = PlainModel(subject.path, load.dtype, load.device)
        for name, scores in _score_all(plain, None, tasks, benchmarks, on_step):
            settings = _settings(plain, plain.base, tasks[name], benchmarks)
            collected[name] = TaskResult(task=name, settings=settings, models=[scores])
            on_result(collected[name])
        return [collected[name] for name in tasks]
    results = _open_rounds(subject)
    # A classifier does not give likelihoods of answers.
    for result in results:
        refuse_generation(result)
    for number, result in enumerate(results):
        on_step(f"loading {result.title}", 0)
        pair = ModelPair(result, load)
        # The base model is the same for all rounds.
        if number == 0:
            for name, scores in _score_all(pair, None, tasks, benchmarks, on_step):
                settings = _settings(pair, result.model.base, tasks[name], benchmarks)
                collected[name] = TaskResult(task=name, settings=settings, models=[scores])
                on_result(collected[name])
        with pair.tuned():
            for name, scores in _score_all(pair, result, tasks, benchmarks, on_step):
                one = collected[name]
                new = TaskResult(task=name, settings=one.settings, models=[*one.models, scores])
                collected[name] = new
                on_result(new)
        # Two models at a time may not fit in memory.
        del pair
    return [collected[name] for name in tasks]


# ── what is asked ─────────────────────────────────────────────────────────────────────────────────


def _read_tasks(benchmarks: Benchmarks) -> dict[str, TaskData]:
    """Read all task files, and reject what can be rejected before loading a model."""
    if not benchmarks.tasks:
        raise ConfigError("--tasks names no task; give one or more, such as gsm8k,arc_easy")
    for name in ("limit", "batch_size"):
        value = getattr(benchmarks.prompt_settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    if benchmarks.num_fewshot is not None and not 0 <= benchmarks.num_fewshot <= 1000:
        raise ConfigError(f"--num-fewshot must be from 0 to 1000; got {benchmarks.num_fewshot}")
    tasks = {name: read_task(benchmarks.directory, name) for name in benchmarks.tasks}
    programs = [name for name, data in tasks.items() if data.file.runs_code]
    if programs and not benchmarks.run_code:
        raise ConfigError(
            f"{', '.join(programs)}: answers are programs, and scoring runs them. Allow it by "
            "--run-code; each is run in a sandbox, see docs/security.md"
        )
    with _quiet():
        for data in tasks.values():
            make_task(data, benchmarks.num_fewshot)
    if programs:
        check_sandbox()
    return tasks


def _open_rounds(subject: Subject) -> list[Result]:
    """Open each requested round once, in ascending order."""
    names: list[str] = []
    # `all` means the rounds that the run still has.
    for name in subject.rounds:
        if name == "all":
            rounds = retained_rounds(subject.path)
            if not rounds:
                raise ConfigError(f"--rounds all: {subject.path} is no run, and has no rounds")
            names += [str(server_round) for server_round in rounds]
        else:
            names.append(name)
    if not names:
        raise ConfigError("--rounds names no round; give numbers, last, best or all")
    # `last` and `best` may coincide with an explicitly named round.
    opened = {}
    for name in names:
        result = open_result(
            subject.path, server_round=name, client=subject.client, store=subject.store
        )
        opened[result.model.server_round] = result
    return [opened[server_round] for server_round in sorted(opened)]


def _refuse_choices(subject: Subject, load: LoadSettings) -> None:
    """Reject the choice of a round, client or base model for a plain model."""
    if subject.rounds != ("last",) or subject.client or subject.store or load.base:
        raise ConfigError(
            f"{subject.path} is a plain model; --rounds, --client, --store and --base are for runs"
        )


def _settings(
    pair: Loaded, base: BaseIdentity, data: TaskData, benchmarks: Benchmarks
) -> TaskSettings:
    """Return the settings that must be equal for two models to be compared."""
    shots = benchmarks.num_fewshot
    return TaskSettings(
        sha256=data.sha256,
        base=base.sha256 or None,
        tokenizer=base.tokenizer_sha256 or None,
        quantization=str(base.quantization) if base.quantization is not None else None,
        limit=benchmarks.prompt_settings.limit,
        num_fewshot=data.file.num_fewshot if shots is None else shots,
        chat=benchmarks.prompt_settings.chat,
        truncate=benchmarks.truncate,
        batch_size=benchmarks.prompt_settings.batch_size,
        dtype=str(pair.model.dtype).removeprefix("torch."),
        device=pair.model.device.type,
        lm_eval=version("lm_eval"),
    )


# ── scores ────────────────────────────────────────────────────────────────────────────────────────


def _score_all(
    pair: Loaded,
    result: Result | None,
    tasks: dict[str, TaskData],
    benchmarks: Benchmarks,
    on_step: OnStep,
) -> Iterator[tuple[str, ModelScores]]:
    """Yield the scores of the model in its current state; `result` is None for the base model."""
    who = "the base model" if result is None else result.title
    step = ""
    num_prompts = 0

    def count(num_new: int) -> None:
        nonlocal num_prompts
        num_prompts += num_new
        on_step(step, num_prompts)

    with _quiet():
        model = BenchmarkModel(pair.model, pair.tokenizer, benchmarks.prompt_settings, count)
        # Measure all prompts before answering the first.
        truncated = {}
        for name, data in tasks.items():
            task = make_task(data, benchmarks.num_fewshot)
            truncated[name] = model.count_truncated(task)
            _refuse_truncated(name, truncated[name], model, benchmarks)
        for name, data in tasks.items():
            step = f"{name}, {who}"
            num_prompts = 0
            on_step(step, 0)
            begin = time.perf_counter()
            try:
                outcome = model.score(make_task(data, benchmarks.num_fewshot))
            except FedMomentumError as error:
                raise type(error)(f"{name}, {who}: {error}") from error
            yield (
                name,
                ModelScores(
                    model="base" if result is None else "federated",
                    round=_round_of(result),
                    client="" if result is None else result.client,
                    version=None if result is None else result.model.version,
                    adapter=None if result is None else _adapter_of(result),
                    num_truncated=truncated[name],
                    num_unfinished=outcome.num_unfinished,
                    seconds=round(time.perf_counter() - begin, 3),
                    scores=outcome.scores,
                ),
            )


def _refuse_truncated(
    name: str, num_truncated: int, model: BenchmarkModel, benchmarks: Benchmarks
) -> None:
    if num_truncated and not benchmarks.truncate:
        raise DataError(
            f"{name}: {num_truncated} prompts are longer than the {model.max_length} tokens that "
            "the model can see, the answer included; a score on parts of them may be wrong. Use "
            "fewer worked examples (--num-fewshot), or --truncate to cut prompts from the left, "
            "which the scores then say"
        )


def _round_of(result: Result | None) -> int | None:
    """Return the round of a run; None for the base model or if there is no run."""
    return None if result is None or result.config is None else result.model.server_round


def _adapter_of(result: Result) -> str:
    model = result.model
    return adapter_hash(as_manifest(model.manifest(), result.title))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's advice off the terminal; what it warns about is rejected or counted here."""
    logger = logging.getLogger("lm_eval")
    previous = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(previous)
