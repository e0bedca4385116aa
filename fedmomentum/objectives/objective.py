"""The contract of an objective, and the objectives by task type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from fedmomentum.objectives.collation import (
    IGNORED,
    completion_batch,
    model_inputs,
    next_token_pairs,
)


class Predictions(NamedTuple):
    """A model's output on a batch, beside the targets.

    Attributes:
        logits: Logits of shape ``(batch, positions, classes)``.
        labels: Targets of shape ``(batch, positions)``; ``IGNORED`` where there is none.
    """

    logits: Tensor
    labels: Tensor


class BatchLoss(NamedTuple):
    """The loss of a batch, summed over its targets.

    Attributes:
        nll: Negative log-likelihood of the targets in nats: what is reported.
        optimized: The loss whose gradient is taken; `nll` itself unless labels are smoothed.
        num_targets: Number of targets.
    """

    nll: Tensor
    optimized: Tensor
    num_targets: int


class ExampleScore(NamedTuple):
    """The score of one example.

    Attributes:
        nll: Negative log-likelihood of its targets, summed, in nats.
        num_targets: Number of targets.
        is_exact: Whether the most likely class is the target at every position.
        label: The name of its class; empty unless each example has one.
        predicted: The name of the most likely class; empty likewise.
    """

    nll: float
    num_targets: int
    is_exact: bool
    label: str = ""
    predicted: str = ""


class Objective(Protocol):
    """What a model is trained and scored on.

    Local training minimizes `loss`; evaluation sums `score` over the examples. A new task type is a
    class with these methods.
    """

    def collate(
        self,
        input_ids: Sequence[Sequence[int]],
        num_prompt_tokens: Sequence[int],
        pad_token_id: int,
    ) -> dict[str, Tensor]:
        """Collate tokenized examples into a batch."""

    def num_targets(self, batch: Mapping[str, Tensor]) -> int:
        """Count the targets of a batch."""

    def predict(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Predictions:
        """Run the model on a batch."""

    def loss(self, predictions: Predictions, *, label_smoothing: float = 0.0) -> BatchLoss:
        """Compute the loss of a batch, summed over its targets."""

    def score(self, predictions: Predictions) -> Iterator[ExampleScore]:
        """Score the examples of a batch one after the other."""


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction on the completions: loss = -sum_t log p(y_t | prompt, y_<t)."""

    def collate(
        self,
        input_ids: Sequence[Sequence[int]],
        num_prompt_tokens: Sequence[int],
        pad_token_id: int,
    ) -> dict[str, Tensor]:
        """Collate prompts with their completions; see `completion_batch`."""
        return completion_batch(input_ids, num_prompt_tokens, pad_token_id)

    def num_targets(self, batch: Mapping[str, Tensor]) -> int:
        """Count the completion tokens of a batch."""
        return int((batch["labels"] != IGNORED).sum())

    def predict(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Predictions:
        """Run the model on a batch and align its logits with the next tokens."""
        output = model(**model_inputs(model, batch))
        return Predictions(*next_token_pairs(output.logits, batch["labels"]))

    def loss(self, predictions: Predictions, *, label_smoothing: float = 0.0) -> BatchLoss:
        """Compute the cross entropy of the completion tokens in float32, summed."""
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
        for row_logits, row_labels in zip(*predictions, strict=True):
            # One row at a time, so that the float32 copy of the logits is that of one row.
            is_target = row_labels != IGNORED
            logits = row_logits[is_target].float()  # (completion, vocabulary)
            labels = row_labels[is_target]  # (completion,)
            nll = F.cross_entropy(logits, labels, reduction="none").double().sum().item()
            is_exact = bool((logits.argmax(dim=-1) == labels).all())
            yield ExampleScore(nll, len(labels), is_exact)


CAUSAL_LM: Objective = CausalLM()
