"""Sequence classification: one label per text or pair of texts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmomentum.objectives.collation import Row
from fedmomentum.objectives.objective import CAUSAL_LM, BatchLoss, ExampleScore, Predictions
from fedmomentum.utils.modules import inner_model


@dataclass(frozen=True)
class SequenceClassification:
    """The label of a text: loss = -log p(label | text).

    A row holds the token ids of the text, including special tokens, followed by the index of its
    label: the target comes last, as in every row of tokenized examples.

    Attributes:
        labels: The names of the labels, in the order of the head's outputs.
    """

    labels: tuple[str, ...]
    compares_pairs: ClassVar[bool] = False

    @property
    def settings(self) -> str:
        """What is learned, in the configuration's terms; the labels belong to the base model."""
        return "task = sequence-classification"

    def collate(self, examples: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
        """Collate rows into a batch padded on the right.

        Padding goes on the right because a decoder's score head reads the last token that is
        not padding, and an encoder counts positions from the left.

        Args:
            examples: The rows, whose prompt is the first text of a pair.
            pad_token_id: The pad token of the model.
        """
        longest = max(len(example.input_ids) for example in examples) - 1
        # Pad the text, mask and segments of each row to the longest.
        padded = []
        mask = []
        segments = []
        labels = []
        for example in examples:
            # The label comes last and is not a token.
            *text, label = example.input_ids
            num_first = example.num_prompt_tokens
            padding = longest - len(text)
            padded.append([*text, *[pad_token_id] * padding])
            mask.append([1] * len(text) + [0] * padding)
            labels.append(label)
            segments.append([0] * num_first + [1] * (len(text) - num_first) + [0] * padding)
        return {
            "input_ids": torch.tensor(padded),
            "attention_mask": torch.tensor(mask),
            "token_type_ids": torch.tensor(segments),
            "labels": torch.tensor(labels),
        }

    def num_targets(self, batch: Mapping[str, Tensor]) -> int:
        """Count the labels of a batch, one per text."""
        return len(batch["labels"])

    def predict(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Predictions:
        """Run the model on a batch, with one position per text."""
        accepted = inspect.signature(inner_model(model).forward).parameters
        inputs: dict[str, Any] = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
        }
        # A model without segments would misinterpret them.
        if bool(batch["token_type_ids"].any()):
            inputs["token_type_ids"] = batch["token_type_ids"]
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        logits = model(**inputs).logits
        return Predictions(logits[:, None, :], batch["labels"][:, None])

    def loss(self, predictions: Predictions, *, label_smoothing: float = 0.0) -> BatchLoss:
        """Compute the summed cross entropy of the labels in float32."""
        return CAUSAL_LM.loss(predictions, label_smoothing=label_smoothing)

    def score(self, predictions: Predictions) -> Iterator[ExampleScore]:
        """Score each text, with its true label and the most likely one."""
        for row_logits, row_labels in zip(predictions.logits, predictions.labels, strict=True):
            logits = row_logits.float()
            nll = F.cross_entropy(logits, row_labels).double().item()
            label = int(row_labels[0])
            predicted = int(logits.argmax(dim=-1)[0])
            yield ExampleScore(
                nll,
                1,
                predicted == label,
                label=self.labels[label],
                predicted=self.labels[predicted],
            )
