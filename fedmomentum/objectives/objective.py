"""The interface of objectives, and the objective of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from fedmomentum.objectives.collation import (
    IGNORED,
    Row,
    completion_batch,
    model_inputs,
    next_token_pairs,
)


class Predictions(NamedTuple):
    """A model's output on a batch, with the targets.

    Attributes:
        logits: Logits of shape ``(batch, positions, classes)``.
        labels: Targets of shape ``(batch, positions)``; ``IGNORED`` where there is none.
        reference: The reference model's values for the same examples, for objectives that compare
            the model with a reference.
    """

    logits: Tensor
    labels: Tensor
    reference: Tensor | None = None


class BatchLoss(NamedTuple):
    """The loss of a batch, summed over its targets.

    Attributes:
        nll: Negative log-likelihood of the targets in nats, which is reported.
        optimized: The loss to differentiate; `nll` itself unless labels are smoothed.
        num_targets: Number of targets.
    """

    nll: Tensor
    optimized: Tensor
    num_targets: int


class ExampleScore(NamedTuple):
    """The score of one example.

    Attributes:
        nll: Summed negative log-likelihood of its targets, in nats.
        num_targets: Number of targets.
        is_exact: Whether the most likely class is the target at every position; for a pair of
            answers, whether the chosen one has the larger reward.
        margin: The chosen answer's reward minus the rejected one's; None if there is no pair.
        label: The name of its class; empty unless examples have one.
        predicted: The name of the most likely class; empty in the same cases.
    """

    nll: float
    num_targets: int
    is_exact: bool
    margin: float | None = None
    label: str = ""
    predicted: str = ""


class Objective(Protocol):
    """A training and scoring objective.

    Local training minimizes `loss`; evaluation sums `score` over the examples. To add an objective,
    write a class with these methods and create it in `objectives.choice.make_objective`.
    """

    @property
    def settings(self) -> str:
        """What is learned, in the configuration's terms; equal for all parties of a run."""

    @property
    def compares_pairs(self) -> bool:
        """Whether examples are pairs of answers and the model is compared with a reference."""

    def collate(self, examples: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
        """Collate tokenized examples into a batch."""

    def num_targets(self, batch: Mapping[str, Tensor]) -> int:
        """Count the targets of a batch."""

    def predict(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Predictions:
        """Run the model on a batch."""

    def loss(self, predictions: Predictions, *, label_smoothing: float = 0.0) -> BatchLoss:
        """Compute the loss of a batch, summed over its targets."""

    def score(self, predictions: Predictions) -> Iterator[ExampleScore]:
        """Score the examples of a batch one by one."""


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction on the completions: loss = -sum_t log p(y_t | prompt, y_<t).

    Attributes:
        loss_on: Which turns of a chat are completions: ``last``, or ``all-assistant``.
    """

    loss_on: str = "last"
    compares_pairs: ClassVar[bool] = False

    @property
    def settings(self) -> str:
        """What is learned, in the configuration's terms."""
        return f"objective = sft, loss-on = {self.loss_on}"

    def collate(self, examples: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
        """Collate prompts with their completions; see `completion_batch`."""
        return completion_batch(
            [example.input_ids for example in examples],
            [example.num_prompt_tokens for example in examples],
            pad_token_id,
            [example.gaps for example in examples],
        )

    def num_targets(self, batch: Mapping[str, Tensor]) -> int:
        """Count the completion tokens of a batch."""
        return int((batch["labels"] != IGNORED).sum())

    def predict(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Predictions:
        """Run the model on a batch and align its logits with the next tokens."""
        output = model(**model_inputs(model, batch))
        return Predictions(*next_token_pairs(output.logits, batch))

    def loss(self, predictions: Predictions, *, label_smoothing: float = 0.0) -> BatchLoss:
        """Compute the summed cross entropy of the completion tokens in float32."""
        logits = predictions.logits.float().flatten(0, 1)
        labels = predictions.labels.flatten()
        nll = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        optimized = nll
        if label_smoothing:
            optimized = F.cross_entropy(
                logits,
                labels,
                ignore_index=IGNORED,
                reduction="sum",
                label_smoothing=label_smoothing,
            )
        return BatchLoss(nll, optimized, int((labels != IGNORED).sum()))

    def score(self, predictions: Predictions) -> Iterator[ExampleScore]:
        """Score each completion; the sum over its tokens is in float64."""
        for row_logits, row_labels in zip(predictions.logits, predictions.labels, strict=True):
            # One row at a time, so that only one row's logits are copied to float32.
            is_target = row_labels != IGNORED
            logits = row_logits[is_target].float()  # (completion, vocabulary)
            labels = row_labels[is_target]  # (completion,)
            nll = F.cross_entropy(logits, labels, reduction="none").double().sum().item()
            is_exact = bool((logits.argmax(dim=-1) == labels).all())
            yield ExampleScore(nll, len(labels), is_exact)


CAUSAL_LM: Objective = CausalLM()
