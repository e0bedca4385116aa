"""A run's scores on standard benchmarks, for the rounds that the run currently has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fedmomentum.formats.benchmark_file import (
    BenchmarkFile,
    MetricScore,
    ModelScores,
    TaskResult,
    adapter_hash,
    paired_difference,
)
from fedmomentum.formats.directories import read_manifest, retained_rounds, round_file
from fedmomentum.formats.round_record import RoundRecord


@dataclass(frozen=True)
class BenchmarkLine:
    """One metric of one federated model, next to the base model's.

    Attributes:
        task: The task's name, with its variant if there are several.
        result: All models on the task.
        model: The federated model.
        score: Its metric.
        base: The base model's metric; None if it was not scored.
    """

    task: str
    result: TaskResult
    model: ModelScores
    score: MetricScore
    base: MetricScore | None

    @property
    def difference(self) -> tuple[float, float, float] | None:
        """The difference from the base model on the same examples, with its 95 % interval."""
        return None if self.base is None else paired_difference(self.base, self.score)

    @property
    def name(self) -> str:
        """What figures call it: the task, the metric, and the client if there is one."""
        whose = f", {self.model.client}" if self.model.client else ""
        return f"{self.task}, {self.score.name}{whose}"


@dataclass(frozen=True)
class BenchmarkResults:
    """Scores that can be shown.

    Attributes:
        tasks: The tasks, with the models that the run still has.
        num_outdated: Number of scores left out because the run no longer has these models.
    """

    tasks: list[TaskResult]
    num_outdated: int

    @property
    def lines(self) -> list[BenchmarkLine]:
        """One line per task, federated model and metric."""
        return benchmark_lines(self.tasks)

    @property
    def truncated(self) -> list[str]:
        """The tasks with prompts that had to be cut."""
        return [
            result.task
            for result in self.tasks
            if any(model.num_truncated for model in result.models)
        ]

    @property
    def newest(self) -> list[BenchmarkLine]:
        """The lines of each task's last round."""
        last: dict[str, int] = {}
        for line in self.lines:
            last[line.task] = max(last.get(line.task, 0), line.model.round or 0)
        return [line for line in self.lines if (line.model.round or 0) == last[line.task]]


def benchmark_lines(tasks: Sequence[TaskResult]) -> list[BenchmarkLine]:
    """Return one line per task, federated model and metric."""
    lines = []
    names = [result.task for result in tasks]
    for result in tasks:
        is_only = names.count(result.task) == 1
        task = result.task if is_only else f"{result.task} {result.variant}"
        base = {score.name: score for score in result.base.scores} if result.base else {}
        for model in result.federated:
            for score in model.scores:
                line = BenchmarkLine(task, result, model, score, base.get(score.name))
                lines.append(line)
    return lines


def current_benchmarks(
    file: BenchmarkFile, directory: Path, rounds: Sequence[RoundRecord]
) -> BenchmarkResults:
    """Leave out the scores of rounds that the run has since retrained, or does not have.

    Args:
        file: All scores.
        directory: The run's directory, whose manifests identify the models of retained rounds.
        rounds: The run's rounds.

    Raises:
        ModelError: If a manifest is damaged.
    """
    versions = {record.round: record.version for record in rounds}
    adapters = {}
    for server_round in retained_rounds(directory):
        adapters[server_round] = adapter_hash(read_manifest(round_file(directory, server_round)))

    def is_current(model: ModelScores) -> bool:
        if model.model == "base":
            return True
        if model.round not in versions:
            return False
        version = versions[model.round]
        if version is not None and version != model.version:
            return False
        # A client's own adapter is not the one in the manifest.
        return bool(model.client) or adapters.get(model.round, model.adapter) == model.adapter

    tasks = []
    num_outdated = 0
    for result in file.tasks:
        models = [model for model in result.models if is_current(model)]
        num_outdated += len(result.models) - len(models)
        if models:
            tasks.append(msgspec.structs.replace(result, models=models))
    return BenchmarkResults(tasks, num_outdated)
