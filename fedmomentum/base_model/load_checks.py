"""Checks of a loaded model: that it matches the checkpoint, is causal, and has enough positions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedmomentum.base_model.checkpoint_files import FLOATING, stored_tensors
from fedmomentum.base_model.classifier import is_other_head
from fedmomentum.base_model.library_errors import translate_library_errors
from fedmomentum.errors import ConfigError, ModelError
from fedmomentum.utils.modules import compute_logits
from fedmomentum.utils.quantized import quantized_layers
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Maximum number of tensor names listed in a message.
MAX_SHOWN = 3
# In units of the dtype's eps, relative to the largest logit; mere summation order stays below this.
CAUSALITY_TOL = 16
NUM_CAUSALITY_TOKENS = 8
# Ordinary tokens have small ids; special tokens, which a model may mask, tend to have large ones.
MAX_CAUSALITY_TOKEN_ID = 1000
# Position tables may have a few more rows than positions: OPT's has two.
POSITION_PADDING = 8

# ── complete ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class LoadingInfo:
    """What transformers reports about loading a checkpoint.

    Attributes:
        missing: Names of parameters that the checkpoint does not contain.
        mismatched: Names, stored shapes and model shapes of parameters whose shapes differ.
        unexpected: Names of stored tensors that the model does not use.
    """

    missing: frozenset[str]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    unexpected: frozenset[str]

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> LoadingInfo:
        """Convert the report of `from_pretrained(..., output_loading_info=True)`."""
        mismatched = []
        for name, stored_shape, shape in sorted(info["mismatched_keys"]):
            mismatched.append((name, tuple(stored_shape), tuple(shape)))
        return cls(
            frozenset(info["missing_keys"]), tuple(mismatched), frozenset(info["unexpected_keys"])
        )


def refuse_incomplete(
    directory: Path,
    model: PreTrainedModel,
    info: LoadingInfo,
    supplied: Collection[str],
    *,
    is_classifier: bool,
) -> None:
    """Reject a model with random weights, or one that leaves out weights of the checkpoint.

    Args:
        directory: Where it was loaded from.
        model: The loaded model.
        info: What transformers reports.
        supplied: Names of tensors that the caller sets afterward.
        is_classifier: Whether it was loaded as a sequence classifier.

    Raises:
        ModelError: If the model does not match the checkpoint.
    """
    kind = type(model).__name__
    advice = "; the checkpoint is of another kind of model, or incomplete"
    missing = sorted(info.missing - set(supplied))
    if missing:
        raise ModelError(
            f"{directory} does not hold {_shown(missing)}, which {kind} needs and would initialize "
            f"at random{advice}"
        )
    for name, stored_shape, shape in info.mismatched:
        if name not in supplied:
            raise ModelError(
                f"{directory} holds {name} of shape {stored_shape}; {kind} needs {shape} and would "
                f"initialize it at random{advice}"
            )
    unexpected = sorted(info.unexpected)
    if is_classifier:
        # A classifier made from a language model or an encoder does not use the stored head.
        stored = stored_tensors(directory)
        unexpected = [name for name in unexpected if not is_other_head(name, model, stored)]
    if unexpected:
        raise ModelError(
            f"{directory} holds {_shown(unexpected)}, for which {kind} has no place: another model "
            "than the stored one would be trained. If they are no part of the language model, "
            "load it with transformers and write it again by save_pretrained"
        )
    _refuse_integer_weights(directory, model)


def _refuse_integer_weights(directory: Path, model: PreTrainedModel) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # The codes of quantized layers are supposed to be integers.
    for path, _ in quantized_layers(model):
        parameters.pop(f"{path}.weight")
    for name, tensor in stored_tensors(directory).items():
        is_weight = name in parameters or f"{model.base_model_prefix}.{name}" in parameters
        if is_weight and tensor.dtype not in FLOATING:
            raise ModelError(
                f"{directory} stores the weight {name} in {tensor.dtype}; wanted floating-point "
                "weights. Its configuration names no quantization that these could be codes of"
            )


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:MAX_SHOWN])
    num_others = len(names) - MAX_SHOWN
    return f"{shown} and {num_others} more tensors" if num_others > 0 else shown


# ── causal ────────────────────────────────────────────────────────────────────────────────────────


def refuse_other_kinds(directory: Path, model: PreTrainedModel) -> None:
    """Reject a model that transformers loads as a causal language model although it is not one.

    Raises:
        ModelError: If it was saved as another kind of model, computes NaN or Inf, or is not causal.
    """
    declared = model.config.architectures or []
    if declared and type(model).__name__ not in declared:
        raise ModelError(
            f"{directory} was saved as {', '.join(map(printable, declared))}, which is no causal "
            f"language model; transformers would load it as {type(model).__name__}. Use the "
            "language model that it was made from"
        )
    if not type(model).__module__.startswith("transformers."):
        return  # a user's class, whose inputs are unknown

    # Two rows that differ only in the last token: a causal model's earlier logits are the same.
    num_ids = min(vocabulary_size(model) or 2, MAX_CAUSALITY_TOKEN_ID)
    # Do not start at 0: it is often the padding token, which some models mask by themselves.
    row = torch.arange(1, NUM_CAUSALITY_TOKENS + 1) * 7 % num_ids
    other_row = torch.cat([row[:-1], (row[-1:] + 1) % num_ids])
    what = f"the model in {directory} cannot compute"
    with translate_library_errors(what, {}), torch.no_grad():
        logits = compute_logits(model, torch.stack([row, other_row]))[:, :-1].float()
    if not bool(logits.isfinite().all()):
        dtype = str(model.dtype).removeprefix("torch.")
        raise ModelError(
            f"the model in {directory} computes NaN or Inf in {dtype}; {_why_not_finite(model)}"
        )
    difference = float((logits[0] - logits[1]).abs().max())
    tolerance = CAUSALITY_TOL * torch.finfo(model.dtype).eps * float(logits.abs().max())
    if difference > tolerance:
        raise ModelError(
            f"the model in {directory} is no causal language model: a later token changes its "
            f"logits for earlier ones (by {difference:.2g}). Encoders and embedding models cannot "
            'be trained here, except as classifiers: model.task = "sequence-classification"'
        )


def _why_not_finite(model: PreTrainedModel) -> str:
    """Name the first weight that contains NaN, or give other possible reasons."""
    for name, parameter in model.named_parameters():
        # Weights too large for the dtype become Inf, so NaN must have been in the files.
        if parameter.is_floating_point() and bool(parameter.float().isnan().any()):
            module = name.removesuffix(".weight")
            return f"the weight of {module} in it holds NaN or Inf; download the model again"
    return "its weights are damaged, or too large for this dtype (try bfloat16 or float32)"


# ── sizes ─────────────────────────────────────────────────────────────────────────────────────────


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the number of tokens that the model embeds; None if it has no embedding table."""
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return int(weight.shape[0])


def max_positions(model: nn.Module) -> tuple[int | None, bool]:
    """Return the longest sequence that the model was made for, and whether that is a hard limit.

    A table of position embeddings has no entry for positions beyond its end. Rotary and relative
    positions have no hard limit, though the model was not trained on longer sequences.

    Returns:
        The number of positions, or None if the model's configuration does not specify it; and
        whether the model has a table of positions.
    """
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None, False
    has_table = False
    usable = positions
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_table = tensor.ndim == 2 and 0 <= tensor.shape[0] - positions <= POSITION_PADDING
        if not is_table or not re.search(r"(^|[._])(wpe|pos)", name):
            continue
        has_table = True
        # RoBERTa starts counting after its pad token, which leaves fewer usable positions.
        owner = model.get_submodule(name.rpartition(".")[0])
        padding = getattr(owner, "padding_idx", None)
        if padding is not None:
            usable = min(usable, tensor.shape[0] - padding - 1)
    return usable, has_table


def check_max_length(model: nn.Module, max_length: int, key: str = "data.max-length") -> None:
    """Reject sequences for which the model has no positions.

    Raises:
        ConfigError: If `max_length` exceeds the model's table of positions.
    """
    positions, has_table = max_positions(model)
    if has_table and positions is not None and max_length > positions:
        raise ConfigError(
            f"{key} is {max_length}, and the model has {positions} positions; set {key} to "
            f"{positions}"
        )


def check_token_ids(model: nn.Module, rows: Iterable[Sequence[int]], owner: str) -> None:
    """Reject tokens that the model cannot embed.

    Raises:
        ModelError: If a token id is outside the model's vocabulary.
    """
    size = vocabulary_size(model)
    largest = max((max(row) for row in rows if row), default=-1)
    if size is not None and largest >= size:
        raise ModelError(
            f"{owner}: the tokenizer gives token {largest}, and the model embeds {size} tokens (0 "
            f"to {size - 1}). The tokenizer belongs to another model, or tokens were added to it "
            "without resizing the model"
        )
