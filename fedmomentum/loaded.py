"""Whether what transformers loaded is what the checkpoint holds, a causal language model, and long enough."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedmomentum.data.batches import inner_model
from fedmomentum.errors import ConfigError, FedMomentumError, ModelError
from fedmomentum.schema import printable
from fedmomentum.stored import FLOATING, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def told_by_name(what: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Turn whatever a library raises while it loads into a `ModelError`: memory, missing packages, broken files.

    Args:
        what: The beginning of the message.
        config: The JSON in which ``auto_map`` would name code of the directory's own.
    """
    try:
        yield
    except FedMomentumError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = printable(lines[0]) if lines else type(error).__name__
        if _is_out_of_memory(error):
            reason = _out_of_memory(error)
        elif isinstance(error, ImportError):
            reason = f"a library is missing: {printable(' '.join(lines))}"
        elif config.get("auto_map") and "trust_remote_code" in str(error):
            reason = (
                "it needs code that lies in the directory (auto_map), which is never run, and transformers has none of "
                "its own for it. Use a model that transformers supports"
            )
        raise ModelError(f"{what}: {reason}") from error


@contextmanager
def within_memory(what: str) -> Iterator[None]:
    """Turn running out of memory, on whatever device, into a `ModelError` that begins with `what`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise ModelError(f"{what}: {_out_of_memory(error)}") from error


def _out_of_memory(error: BaseException) -> str:
    reason = printable((str(error).strip() or type(error).__name__).splitlines()[0], 200)
    return (
        f"out of memory ({reason}). Choose a smaller model, dtype bfloat16, or a device with more memory, and close "
        "what else is using it"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        part in text for part in ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate")
    )


def refuse_incomplete(
    folder: Path, model: PreTrainedModel, info: Mapping[str, Any], supplied: Collection[str], *, is_classifier: bool
) -> None:
    """Refuse a model that holds random weights, or a checkpoint of which weights were left out."""
    advice = "; the checkpoint is of another kind of model, or incomplete"
    missing = sorted(set(info["missing_keys"]) - set(supplied))
    if missing:
        raise ModelError(
            f"{folder} lacks {_some(missing)}, which {type(model).__name__} needs and would draw at random{advice}"
        )
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        if name not in supplied:
            raise ModelError(
                f"{folder} holds {name} of shape {tuple(stored)}; {type(model).__name__} needs {tuple(wanted)} and "
                f"would draw it at random{advice}"
            )
    unexpected = sorted(info["unexpected_keys"])
    if is_classifier:  # a classifier made from a language model has no use for its head
        unexpected = [name for name in unexpected if not re.search(r"(^|\.)(lm_head|embed_out)\.", name)]
    if unexpected:
        raise ModelError(
            f"{folder} holds {_some(unexpected)}, for which {type(model).__name__} has no place: what is trained would "
            "be another model than the one stored. If they are no part of the language model, load it with "
            "transformers and write it anew by save_pretrained"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in stored_tensors(folder).items():
        same = [live for live in (name, f"{model.base_model_prefix}.{name}") if live in parameters]
        if same and tensor.dtype not in FLOATING:
            raise ModelError(
                f"{folder} stores the weight {name} in {tensor.dtype}; wanted floating-point weights. Quantized base "
                "models are not supported"
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more tensors" if len(names) > 3 else shown


def refuse_other_kinds(folder: Path, model: PreTrainedModel) -> None:
    """Refuse what transformers loads as a causal language model and is none."""
    declared = model.config.architectures or []
    if declared and type(model).__name__ not in declared:
        raise ModelError(
            f"{folder} was saved as {', '.join(map(printable, declared))}, which is no causal language model; "
            f"transformers would load it as {type(model).__name__}. Use the language model that it was made from"
        )
    if not type(model).__module__.startswith("transformers."):
        return  # A class of the user's own: its inputs may mean anything.
    # Two rows that differ in the last token only. A causal model's answers before it are the same.
    size = min(vocabulary_size(model) or 2, 1000)
    row = torch.arange(8) * 7 % size
    rows = torch.stack([row, torch.cat([row[:-1], (row[-1:] + 1) % size])])
    with told_by_name(f"the model in {folder} cannot compute", {}), torch.no_grad():
        logits = answers(model, rows)[:, :-1].float()
    if not bool(logits.isfinite().all()):
        raise ModelError(
            f"the model in {folder} computes NaN or Inf in {str(model.dtype).removeprefix('torch.')}; its weights are "
            "damaged, or too large for this dtype (try bfloat16 or float32)"
        )
    difference = float((logits[0] - logits[1]).abs().max())
    if difference > 16 * torch.finfo(model.dtype).eps * float(logits.abs().max()):
        raise ModelError(
            f"the model in {folder} is no causal language model: a later token changes its answer to earlier ones (by "
            f"{difference:.2g}). Encoders and embedding models cannot be trained here"
        )


def answers(model: Any, tokens: Tensor) -> Tensor:
    """Return the model's logits for rows of tokens, of one pass without a cache."""
    tokens = tokens.to(next(model.parameters()).device)
    # A PEFT wrapper's own forward takes anything; what counts is the model inside.
    has_cache = "use_cache" in inspect.signature(inner_model(model).forward).parameters
    logits: Tensor = (model(input_ids=tokens, use_cache=False) if has_cache else model(input_ids=tokens)).logits
    return logits


def vocabulary_size(model: nn.Module) -> int | None:
    """How many tokens the model embeds; None where it has no table of embeddings."""
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return int(weight.shape[0])


def max_positions(model: nn.Module) -> tuple[int | None, bool]:
    """How many tokens a row may have, None if the model does not say, and whether longer ones cannot be computed.

    A model with a table of positions has no row for a position beyond it. Rotary and relative positions go on, though
    the model has never seen them.
    """
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None, False
    # Tables may have some rows more, for padding: OPT has two.
    tables = [
        name for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.ndim == 2 and positions <= tensor.shape[0] <= positions + 8
    ]  # fmt: skip
    return positions, any(re.search(r"(^|[._])(wpe|pos)", name) for name in tables)


def check_max_length(model: nn.Module, max_length: int, key: str = "data.max-length") -> None:
    """Refuse a longest row for which the model has no positions.

    Raises:
        ConfigError: If it is longer than the model's table of positions.
    """
    positions, is_hard = max_positions(model)
    if is_hard and positions is not None and max_length > positions:
        raise ConfigError(f"{key} is {max_length}, and the model has {positions} positions; set {key} to {positions}")


def check_token_ids(model: nn.Module, rows: Iterable[Sequence[int]], owner: str) -> None:
    """Refuse tokens that the model cannot embed.

    Raises:
        ModelError: If a token lies beyond the model's vocabulary.
    """
    size = vocabulary_size(model)
    largest = max((max(row) for row in rows if row), default=-1)
    if size is not None and largest >= size:
        raise ModelError(
            f"{owner}: the tokenizer gives token {largest}, and the model embeds {size} tokens (0 to {size - 1}). The "
            "tokenizer is of another model, or tokens were added to it without resizing the model"
        )
