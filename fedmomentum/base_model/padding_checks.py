"""Checks that padding changes nothing, so that the rows of a padded batch are independent."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmomentum.base_model.library_errors import translate_library_errors
from fedmomentum.base_model.load_checks import (
    MAX_CAUSALITY_TOKEN_ID,
    NUM_CAUSALITY_TOKENS,
    vocabulary_size,
)
from fedmomentum.errors import ModelError
from fedmomentum.utils.modules import compute_logits

NUM_PADDING = 4
# How far the logits of a padded row may deviate from the unpadded ones, relative to their norm, at
# the median position. Rounding stays far below; a model that reads padding is far above.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6}
TOLERANCE_16_BITS = 0.05


def refuse_padding_dependence(directory: Path, model: Any) -> None:
    """Reject a model whose logits for a row depend on how much the row is padded.

    Its loss would depend on which examples share a batch, for example in recurrent layers that
    ignore the mask.

    Raises:
        ModelError: If padding changes the logits.
    """
    if not type(model).__module__.startswith("transformers."):
        return  # a user's class, whose inputs are unknown
    num_ids = min(vocabulary_size(model) or 2, MAX_CAUSALITY_TOKEN_ID)
    row = torch.arange(1, NUM_CAUSALITY_TOKENS + 1) * 7 % num_ids
    with translate_library_errors(f"the model in {directory} cannot compute", {}), torch.no_grad():
        alone = compute_logits(model, row[None])[0]
        padded = _padded_logits(model, row)[NUM_PADDING:]
    _refuse_difference(directory, model, alone, padded)


def refuse_padding_dependent_classifier(directory: Path, model: Any) -> None:
    """Reject a classifier whose logits for a text depend on how much the text is padded.

    An example is an encoder whose convolutions or Fourier transforms include padding.

    Args:
        directory: The model's directory, for messages.
        model: The classifier; its configuration has the pad token (see `set_pad_token`).

    Raises:
        ModelError: If padding changes the logits.
    """
    num_ids = min(vocabulary_size(model) or 2, MAX_CAUSALITY_TOKEN_ID)
    pad = int(model.config.get_text_config().pad_token_id)
    row = torch.arange(1, NUM_CAUSALITY_TOKENS + 1) * 7 % num_ids
    # A pad token within a text would be mistaken for its end.
    row[row == pad] = (pad + 1) % num_ids
    padded_row = torch.cat([row, torch.full((NUM_PADDING,), pad)])
    mask = (torch.arange(len(padded_row)) < len(row)).long()
    with translate_library_errors(f"the model in {directory} cannot compute", {}), torch.no_grad():
        alone = compute_logits(model, row[None], {"attention_mask": torch.ones_like(row)[None]})
        padded = compute_logits(model, padded_row[None], {"attention_mask": mask[None]})
    _refuse_difference(directory, model, alone, padded)


def _refuse_difference(directory: Path, model: Any, alone: Tensor, padded: Tensor) -> None:
    """Reject a model if the logits `(rows, classes)` of the same text differ."""
    alone, padded = alone.float(), padded.float()
    differences = (padded - alone).norm(dim=-1) / alone.norm(dim=-1).clamp(min=1e-12)
    difference = float(differences.median())
    if difference > TOLERANCES.get(model.dtype, TOLERANCE_16_BITS):
        raise ModelError(
            f"the model in {directory} ({type(model).__name__}) computes other logits for a row "
            f"that is padded (they differ by {difference:.2g} of their norm): it counts padding as "
            "text, so that its loss would depend on which examples share a batch. This "
            "architecture cannot be trained here"
        )


def _padded_logits(model: Any, row: Tensor) -> Tensor:
    """Return the logits of a row padded on the left, as in training batches."""
    padding = torch.zeros(NUM_PADDING, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(row)])
    inputs = {"attention_mask": mask[None]}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(dim=0) - 1).clamp(min=0)[None]
    logits: Tensor = compute_logits(model, torch.cat([padding, row])[None], inputs)[0]
    return logits
