"""Direct preference optimization (DPO): learn to prefer the chosen one of two answers.

Rafailov et al., arXiv 2305.18290, with the sigmoid loss. Rewards are measured relative to a fixed
reference model, whose log-probabilities are part of the tokenized examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmomentum.errors import ConfigError, DataError
from fedmomentum.objectives.collation import (
    IGNORED,
    Row,
    completion_batch,
    model_inputs,
    next_token_pairs,
)
from fedmomentum.objectives.objective import BatchLoss, ExampleScore, Predictions


@dataclass(frozen=True)
class DPO:
    """Direct preference optimization: loss = -log sigmoid(margin), one target per pair.

    The reward of an answer y is beta (log p(y | prompt) - log p_reference(y | prompt)), and the
    margin is the reward of the chosen answer minus that of the rejected one.

    Attributes:
        beta: The scale of the reward; the larger it is, the closer the model stays to the
            reference.
    """

    beta: float = 0.1
    compares_pairs: ClassVar[bool] = True

    @property
    def settings(self) -> str:
        """What is learned, in the configuration's terms."""
        return f"objective = dpo, dpo-beta = {self.beta!r}"

    def collate(self, examples: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
        """Collate pairs: all rows of chosen answers first, then those of rejected ones.

        Raises:
            DataError: If an example is not a pair, or its reference was not measured.
        """
        batch = pair_batch(examples, pad_token_id)
        if not all(len(example.reference) == 2 for example in examples):
            raise DataError(
                "the log-probabilities of these pairs under the reference model are not measured; "
                "call measure_reference first"
            )
        # In float64, since differences of large numbers will be taken.
        batch["reference"] = torch.tensor(
            [example.reference for example in examples], dtype=torch.float64
        )
        return batch

    def num_targets(self, batch: Mapping[str, Tensor]) -> int:
        """Count the pairs of a batch."""
        return len(batch["reference"])

    def predict(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Predictions:
        """Run the model on both answers of each pair."""
        logits, labels = predict_answers(model, batch)
        return Predictions(logits, labels, batch["reference"])

    def loss(self, predictions: Predictions, *, label_smoothing: float = 0.0) -> BatchLoss:
        """Compute the summed loss of the pairs.

        Args:
            predictions: The predictions of `predict`.
            label_smoothing: Must be 0.

        Raises:
            ConfigError: If label smoothing is requested.
        """
        if label_smoothing:
            raise ConfigError(
                f"label smoothing must be 0 for pairs of answers; got {label_smoothing:g}. It "
                "smooths the labels of tokens, and a pair has none"
            )
        loss = -F.logsigmoid(self._margins(answer_log_probs(predictions), predictions)).sum()
        return BatchLoss(loss, loss, len(predictions.labels) // 2)

    def score(self, predictions: Predictions) -> Iterator[ExampleScore]:
        """Score each pair."""
        margins = self._margins(answer_log_probs(predictions), predictions)
        losses = -F.logsigmoid(margins)
        for loss, margin in zip(losses.tolist(), margins.tolist(), strict=True):
            yield ExampleScore(loss, 1, margin > 0, margin)

    def _margins(self, log_probs: Tensor, predictions: Predictions) -> Tensor:
        """Return the margin of each pair."""
        assert predictions.reference is not None  # set by `predict`
        chosen, rejected = log_probs.chunk(2)
        reference_chosen, reference_rejected = predictions.reference.unbind(dim=1)
        # Subtract per answer first, so that it is exactly 0 where model and reference agree.
        return self.beta * ((chosen - reference_chosen) - (rejected - reference_rejected))


def pair_batch(examples: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Collate pairs without their reference values; see `DPO.collate`.

    Raises:
        DataError: If an example is not a pair.
    """
    if not all(example.rejected_ids for example in examples):
        raise DataError(
            "an example has no rejected answer; preferences need rows of prompt, chosen, rejected"
        )
    rows = [example.input_ids for example in examples]
    rows += [example.rejected_ids for example in examples]
    num_prompt_tokens = [example.num_prompt_tokens for example in examples]
    return completion_batch(rows, num_prompt_tokens * 2, pad_token_id)


def predict_answers(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits of a batch of pairs and the tokens that they predict."""
    output = model(**model_inputs(model, batch))
    return next_token_pairs(output.logits, batch)


def answer_log_probs(predictions: Predictions) -> Tensor:
    """Return the log-probability of each row's answer, summed over its tokens in float64."""
    log_probs = []
    for row_logits, row_labels in zip(predictions.logits, predictions.labels, strict=True):
        # One row at a time, so that only one row's logits are copied to float32.
        nll = F.cross_entropy(
            row_logits.float(), row_labels, ignore_index=IGNORED, reduction="none"
        )
        log_probs.append(-nll.double().sum())
    return torch.stack(log_probs)
