"""Batches padded on the left, so that all completions end in the last column and only they need the vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
"""The label on which no loss is taken (the convention of torch's cross entropy)."""


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return the rows as one matrix ``(len(rows), longest)``, short ones filled with ``value`` on the left."""
    longest = max(map(len, rows))
    return torch.tensor([[value] * (longest - len(row)) + list(row) for row in rows])


def completion_batch(
    input_ids: Sequence[Sequence[int]], num_prompt_tokens: Sequence[int], pad_token_id: int
) -> dict[str, Tensor]:
    """Return ``input_ids``, ``attention_mask`` ``(batch, length)`` and ``labels`` ``(batch, longest answer + 1)``.

    Only the last columns have labels. The first of those is ``IGNORED`` everywhere: the logits there predict the
    first completion token of the longest answer.
    """
    answers = [row[num_prompt:] for row, num_prompt in zip(input_ids, num_prompt_tokens, strict=True)]
    labels = pad_left(answers, IGNORED)
    return {
        "input_ids": pad_left(input_ids, pad_token_id),
        "attention_mask": pad_left([[1] * len(row) for row in input_ids], 0),
        "labels": torch.cat([torch.full((len(answers), 1), IGNORED), labels], dim=1),
    }


def model_inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Return what the model's forward wants in order to score the batch's labels.

    Positions count from each row's first real token (models with absolute positions would otherwise count the
    padding), and ``logits_to_keep`` limits the projection to the vocabulary to the columns with labels. A batch
    without padding carries neither mask nor positions: attention is then purely causal, which has faster kernels.
    """
    # A PEFT wrapper's own forward takes anything; what counts is the model inside.
    wanted = inspect.signature(inner_model(model).forward).parameters
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
    mask = batch["attention_mask"]
    if not mask.all():
        inputs["attention_mask"] = mask
        if "position_ids" in wanted:
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if "logits_to_keep" in wanted:
        # As positions, not as a number: a slice is not contiguous, and the projection of one copies the whole
        # vocabulary matrix for each row (a third of a training step on a 135M model).
        length = mask.shape[1]
        inputs["logits_to_keep"] = torch.arange(length - batch["labels"].shape[1], length, device=mask.device)
    if "use_cache" in wanted:
        inputs["use_cache"] = False
    return inputs


def next_token_pairs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits ``(batch, answer, vocabulary)`` and the labels ``(batch, answer)`` that they predict."""
    num_columns = labels.shape[1]
    return logits[:, -num_columns:-1], labels[:, 1:]


def inner_model(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper, adapters and all; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
