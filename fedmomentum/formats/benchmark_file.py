"""A run's benchmarks.json: which examples of standard benchmarks its models answered correctly."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fedmomentum.formats.manifest import Manifest
from fedmomentum.formats.scores import NORMAL_95, Score
from fedmomentum.utils.io import canonical_json, sha256
from fedmomentum.utils.schema import Count, Hash, Label, PositiveCount, Size

BENCHMARKS = "benchmarks.json"
BENCHMARK_FORMAT = "fedmomentum benchmarks"
BENCHMARK_VERSION = 1

Outcomes = Annotated[str, Meta(min_length=1, max_length=10**7, pattern=r"^[01]+\Z")]
"""One character per example, in the order of the data: 1 if answered correctly, else 0."""

MetricName = Literal["acc", "acc_norm", "acc_bytes", "exact_match", "pass_at_1"]
TaskName = Annotated[str, Meta(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\Z")]
ExtractionName = Annotated[str, Meta(max_length=60, pattern=r"^[A-Za-z0-9_.-]*\Z")]


class _Open(msgspec.Struct, frozen=True, kw_only=True):
    """A table with declared fields; others are ignored."""


class MetricScore(_Open, frozen=True, kw_only=True):
    """One metric of one model on one task.

    Attributes:
        metric: `acc`, `acc_norm`, `acc_bytes`, `exact_match` or `pass_at_1`.
        extraction: How the answer was extracted from the text; empty if there is only one way.
        correct: Which examples were answered correctly.
    """

    metric: MetricName
    extraction: ExtractionName = ""
    correct: Outcomes

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.metric}, {self.extraction}" if self.extraction else self.metric

    @property
    def num_examples(self) -> int:
        """The number of examples."""
        return len(self.correct)

    @property
    def fraction(self) -> float:
        """The fraction answered correctly."""
        return self.correct.count("1") / len(self.correct)

    @property
    def standard_error(self) -> float | None:
        """The fraction's standard error, as lm-eval computes it; None for one example."""
        if len(self.correct) == 1:
            return None
        return math.sqrt(self.fraction * (1 - self.fraction) / (len(self.correct) - 1))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the fraction."""
        return Score(0.0, 0, len(self.correct), self.correct.count("1")).interval


class ModelScores(_Open, frozen=True, kw_only=True):
    """One model's scores on a task.

    Attributes:
        model: The base model, or a federated one.
        round: The federated model's round; None if it is not from a run.
        client: Whose model it is; empty if there is one for all.
        version: The model's version; None for the base model.
        adapter: The hash of its adapter; None for the base model.
        num_truncated: Number of prompts that were cut from the left to fit the model's context.
        num_unfinished: Number of answers that were cut at the maximum length.
        seconds: How long it took.
    """

    model: Literal["base", "federated"]
    round: Count | None = None
    client: Label = ""
    version: Hash | None = None
    adapter: Hash | None = None
    num_truncated: Count
    num_unfinished: Count
    seconds: Size
    scores: Annotated[list[MetricScore], Meta(min_length=1)]

    @property
    def key(self) -> tuple[str, int | None, str]:
        """What distinguishes it from the task's other models."""
        return self.model, self.round, self.client


class TaskSettings(_Open, frozen=True, kw_only=True):
    """The settings that must be equal for two models' answers to be comparable.

    Attributes:
        sha256: Hash of the task file and its data.
        base: Hash of the base model; None if unknown.
        tokenizer: Hash of its tokenizer; None if unknown.
        quantization: How the base was quantized on loading; None if it was not.
        limit: Only the first `limit` examples were used; None for all.
        num_fewshot: Number of worked examples in a prompt.
        chat: Whether prompts use the chat template.
        truncate: Whether prompts may be cut.
        batch_size: Number of prompts in a forward pass.
        dtype: The model's dtype.
        device: The kind of device.
        lm_eval: The version of lm-evaluation-harness.
    """

    sha256: Hash
    base: Hash | None
    tokenizer: Hash | None
    quantization: Label | None = None
    limit: PositiveCount | None
    num_fewshot: Count
    chat: bool
    truncate: bool
    batch_size: PositiveCount
    dtype: Label
    device: Label
    lm_eval: Label


class TaskResult(_Open, frozen=True, kw_only=True):
    """All models on one task, with the same settings."""

    task: TaskName
    settings: TaskSettings
    models: Annotated[list[ModelScores], Meta(min_length=1)]

    def __post_init__(self) -> None:
        """Check that all models answered the same examples, each once."""
        scores = [score for model in self.models for score in model.scores]
        if len({score.num_examples for score in scores}) > 1:
            raise ValueError(f"{self.task}: the models have different numbers of examples")
        if len({model.key for model in self.models}) < len(self.models):
            raise ValueError(f"{self.task}: a model is there twice")
        for model in self.models:
            if len({score.name for score in model.scores}) < len(model.scores):
                raise ValueError(f"{self.task}: a metric is there twice")

    @property
    def variant(self) -> str:
        """How the task was asked: `5-shot chat first 100 float32`."""
        asked = self.settings
        parts = [f"{asked.num_fewshot}-shot"]
        parts += ["chat"] if asked.chat else []
        parts += ["cut"] if asked.truncate else []
        parts += [f"first {asked.limit}"] if asked.limit is not None else []
        return " ".join([*parts, asked.dtype])

    @property
    def base(self) -> ModelScores | None:
        """The base model's scores."""
        return next((model for model in self.models if model.model == "base"), None)

    @property
    def federated(self) -> list[ModelScores]:
        """The federated models, by round and client."""
        found = [model for model in self.models if model.model == "federated"]
        return sorted(found, key=lambda model: (model.round or 0, model.client))


class BenchmarkFile(_Open, frozen=True, kw_only=True):
    """benchmarks.json."""

    sha256: Hash
    run_id: str | None = None
    format: Literal["fedmomentum benchmarks"]
    format_version: Literal[1]
    tasks: list[TaskResult]


def adapter_hash(manifest: Manifest) -> str:
    """Return the hash of what a model adds to its base, apart from `base_update`."""
    parts = {"adapter": msgspec.to_builtins(manifest.adapter), "scalings": manifest.scalings}
    return sha256(canonical_json(parts).encode())


def paired_difference(base: MetricScore, other: MetricScore) -> tuple[float, float, float]:
    """Return the difference of two fractions on the same examples, with its 95 % interval.

    The interval is Agresti and Min's: half an example is added to each of the four pairs of
    outcomes, so that it does not collapse if the models never disagree.

    Source:
        Agresti, Min (2005): Simple improved confidence intervals for comparing matched proportions.
    """
    n = base.num_examples
    pairs = list(zip(base.correct, other.correct, strict=True))
    gained = pairs.count(("0", "1"))
    lost = pairs.count(("1", "0"))
    # This adds one example to the pairs that differ, and two in total.
    center = (gained - lost) / (n + 2)
    variance = ((gained + lost + 1) / (n + 2) - center**2) / (n + 2)
    half_width = NORMAL_95 * math.sqrt(variance)
    return (gained - lost) / n, max(-1.0, center - half_width), min(1.0, center + half_width)


def merge_results(old: list[TaskResult], new: TaskResult) -> list[TaskResult]:
    """Return results with a new one added.

    The new result is merged into one with equal settings. It replaces one of the same variant with
    other data or another base model. Other variants are kept alongside.
    """
    name = (new.task, new.variant)
    kept = [result for result in old if (result.task, result.variant) != name]
    previous = next((result for result in old if (result.task, result.variant) == name), None)
    if previous is not None and previous.settings == new.settings:
        keys = {model.key for model in new.models}
        models = [model for model in previous.models if model.key not in keys] + new.models
        new = msgspec.structs.replace(new, models=models)
    return sorted([*kept, new], key=lambda result: (result.task, result.variant))
