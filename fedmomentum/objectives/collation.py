"""Collates batches padded on the left.

All completions end in the last column, and only their columns are projected to the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedmomentum.utils.modules import inner_model

IGNORED = -100
"""The label of positions without a target (as in torch's cross entropy)."""


class Row(Protocol):
    """A tokenized example, as declared by `data.tokenized.TokenizedExample`."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Token ids of prompt, completion and end token."""

    @property
    def num_prompt_tokens(self) -> int:
        """Number of these that belong to the prompt."""

    @property
    def gaps(self) -> Sequence[tuple[int, int]]:
        """Ranges after the prompt that carry no loss."""

    @property
    def rejected_ids(self) -> Sequence[int]:
        """Token ids of the prompt and the rejected answer; empty if there is none."""

    @property
    def reference(self) -> Sequence[float]:
        """Log-probabilities of both answers under the reference model, if measured."""


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return the rows as a matrix ``(len(rows), longest)``, padded with a value on the left."""
    longest = max(map(len, rows))
    padded = [[value] * (longest - len(row)) + list(row) for row in rows]
    return torch.tensor(padded)


def completion_batch(
    input_ids: Sequence[Sequence[int]],
    num_prompt_tokens: Sequence[int],
    pad_token_id: int,
    gaps: Sequence[Sequence[tuple[int, int]]] = (),
) -> dict[str, Tensor]:
    """Collate examples into a batch with labels only on the completions.

    Only the last columns have labels. The first of them is ``IGNORED`` in every row: its logits
    predict the first completion token of the longest completion.

    Args:
        input_ids: Token ids of prompt and completion of each example.
        num_prompt_tokens: Number of prompt tokens of each example.
        pad_token_id: Pads short rows; can be any valid id, since it is masked.
        gaps: Ranges of each example that have no labels although they come after its prompt.

    Returns:
        ``input_ids`` and ``attention_mask`` of shape ``(batch, length)``, and ``labels`` of shape
        ``(batch, longest completion + 1)``. With gaps, also ``columns``: the columns of the labels
        whose logits predict a label in any row; without gaps, these are all but the last.
    """
    completions = []
    for row, num_prompt in zip(input_ids, num_prompt_tokens, strict=True):
        completions.append(list(row[num_prompt:]))
    for completion, num_prompt, ranges in zip(completions, num_prompt_tokens, gaps):
        for start, end in ranges:
            completion[start - num_prompt : end - num_prompt] = [IGNORED] * (end - start)
    no_label = torch.full((len(completions), 1), IGNORED)
    labels = torch.cat([no_label, pad_left(completions, IGNORED)], dim=1)
    batch = {
        "input_ids": pad_left(input_ids, pad_token_id),
        "attention_mask": pad_left([[1] * len(row) for row in input_ids], 0),
        "labels": labels,
    }
    if any(gaps):
        # Columns from which no row learns need not be projected to the vocabulary.
        batch["columns"] = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().flatten()
    return batch


def model_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the keyword arguments of the forward pass that scores a batch's labels.

    Positions start at each row's first real token (models with absolute positions would otherwise
    count the padding), and ``logits_to_keep`` limits the vocabulary projection to the columns with
    labels. A batch without padding gets neither mask nor positions: attention is then purely
    causal, for which there are faster kernels.
    """
    # A PEFT wrapper's own forward accepts anything, so look at the model inside.
    accepted = inspect.signature(inner_model(model).forward).parameters
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
    mask = batch["attention_mask"]
    if not mask.all():
        inputs["attention_mask"] = mask
        if "position_ids" in accepted:
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        # Pass positions rather than a number: a number gives a non-contiguous slice, whose
        # projection copies the vocabulary matrix for each row (a third of a training step on a
        # 135M model).
        length = mask.shape[1]
        first = length - batch["labels"].shape[1]
        if "columns" in batch:
            inputs["logits_to_keep"] = first + batch["columns"]
        else:
            inputs["logits_to_keep"] = torch.arange(first, length, device=mask.device)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def next_token_pairs(logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Align the logits of a forward pass with the labels that they predict.

    Args:
        logits: Logits of shape ``(batch, columns, vocabulary)``, at least those that
            `model_inputs` asks for.
        batch: The batch of `completion_batch`.

    Returns:
        Logits ``(batch, positions, vocabulary)`` and labels ``(batch, positions)``; the positions
        are those of the longest completion, without columns that have no label in any row.
    """
    labels = batch["labels"]
    num_columns = labels.shape[1]
    if "columns" not in batch:
        return logits[:, -num_columns:-1], labels[:, 1:]
    columns = batch["columns"]
    # A model without `logits_to_keep` projects every column.
    if logits.shape[1] >= num_columns:
        logits = logits[:, logits.shape[1] - num_columns + columns]
    return logits, labels[:, columns + 1]
