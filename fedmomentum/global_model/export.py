"""Exports: a merged model directory, or one plain PEFT adapter for the unchanged base model.

Both are read back before they count as written: stock transformers and PEFT load them from their
directory in float32, and their logits for a few tokens are compared with those of the run's model.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmomentum.base_model.checkpoint_files import read_config
from fedmomentum.base_model.identity import BaseIdentity, identify
from fedmomentum.errors import ModelError
from fedmomentum.formats.adapter_base import write_adapter_base
from fedmomentum.global_model.base_loading import is_classifier
from fedmomentum.global_model.card import NO_FACTS, CardFacts, write_card
from fedmomentum.global_model.export_tokenizer import (
    copy_tokenizer,
    find_stop_tokens,
    write_stop_tokens,
)
from fedmomentum.global_model.single_adapter import to_single_adapter
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.probes import AppliedFraction
from fedmomentum.lora.adapter import Adapter, to_tensors
from fedmomentum.lora.peft_folder import read_adapter, write_adapter

if TYPE_CHECKING:
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.global_model.objects import StoredObject
    from fedmomentum.global_model.tuned_model import TunedModel
    from fedmomentum.linalg.matrix import Matrix

CPU = torch.device("cpu")
# Alphas within 1e-9 of a whole number are rounded; scalings read back differ by round-off only.
SCALING_TOL = 1e-12
# Number of rows of a matrix that are compared at a time.
ROWS = 1024


@dataclass(frozen=True, eq=False)
class _Reference:
    """The outputs of the run's model.

    Attributes:
        tokens: One row of tokens.
        logits: The model's logits for them.
        is_rounded: Whether merged parts were held in 8 bits, beside weights held as loaded.
        unquantized: The base's linear layers that are not quantized.
    """

    tokens: Tensor
    logits: Tensor
    is_rounded: bool
    unquantized: Sequence[str] = ()


def require_empty_directory(out: Path) -> None:
    """Refuse to overwrite anything.

    Raises:
        ModelError: If `out` is a file, or a directory that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not empty; nothing was written. Give another --out")


def _identity_of(model: GlobalModel, base_directory: Path) -> BaseIdentity:
    """Return the identity of a base model, loaded like the global model's base."""
    name = str(base_directory)
    return identify(name, base_directory, quantization=model.base.quantization)


# ── an adapter ────────────────────────────────────────────────────────────────────────────────────


def export_adapter(
    model: GlobalModel,
    out: Path,
    *,
    base_directory: Path | None = None,
    device: torch.device = CPU,
    tokenizer: Any = None,
    facts: CardFacts = NO_FACTS,
) -> float | None:
    """Write one plain PEFT adapter that turns the base into the global model, and read it back.

    Args:
        model: The global model.
        out: A new or empty directory.
        base_directory: The base model's directory, for its tokenizer, and to load the adapter on
            it. Without it, only the written tensors are checked.
        device: Where both models compute the logits that are compared.
        tokenizer: The tokenizer to write; by default the base model's.
        facts: Facts for the model card that the model does not hold.

    Returns:
        The difference between the logits of the adapter, as loaded by PEFT, and those of the run,
        as a fraction of their norm; None without a base model.

    Raises:
        ModelError: If `out` is not empty, the base is not the right one, or the written adapter
            does not reproduce the model.
        AdapterError: If the adapter does not fit the base.
    """
    from fedmomentum.global_model.readback import written_aside

    require_empty_directory(out)
    # Compute the run's logits first, so that only one model is in memory at a time.
    reference = None
    if base_directory is not None:
        model.base.check(_identity_of(model, base_directory))
        reference = _reference_logits(model, base_directory, device)
    with written_aside(out) as temporary:
        adapter = to_single_adapter(model)
        write_adapter(adapter, temporary)
        _check_written(adapter, temporary)
        stop_ids: Sequence[int] = ()
        if base_directory is not None:
            tokenizer = copy_tokenizer(base_directory, temporary, tokenizer)
            if not is_classifier(adapter):
                stop_ids = find_stop_tokens(base_directory, tokenizer)
        if model.base.sha256:
            write_adapter_base(model.base.record(), temporary)
        load = f"PeftModel.from_pretrained(base, {_quoted(facts, out)})"
        unquantized = reference.unquantized if reference is not None else ()
        write_card(
            model,
            temporary,
            "peft",
            load,
            facts=facts,
            unquantized=unquantized,
            stop_ids=stop_ids,
        )
        if base_directory is None or reference is None:
            return None
        return _read_back_adapter(
            replace(model, adapter=adapter), temporary, base_directory, reference, device
        )


def _reference_logits(model: GlobalModel, base_directory: Path, device: torch.device) -> _Reference:
    """Compute the logits of the run's model, and free it."""
    from fedmomentum.base_model.loading import tied_names
    from fedmomentum.base_model.quantization import find_unquantized
    from fedmomentum.global_model.base_loading import load_base_for

    base = load_base_for(model, base_directory, None, device)
    unquantized = find_unquantized(base)
    reference, _ = _compute_as_trained(model, base, base_directory, tied_names(base))
    del base
    gc.collect()
    return replace(reference, unquantized=unquantized)


def _compute_as_trained(
    model: GlobalModel, base: Any, base_directory: Path, tied: Mapping[str, Collection[str]]
) -> tuple[_Reference, Any]:
    """Compute the logits of the run's model: the merged base with PEFT's layers around it.

    The model is assembled as for training, and shares no code with the exports.

    Returns:
        The tokens and logits, and the base model in its original state.
    """
    from fedmomentum.base_model.base_weights import choose_weight_format, make_merged_weights
    from fedmomentum.base_model.weight_format import AS_LOADED
    from fedmomentum.base_model.weight_slots import find_owners
    from fedmomentum.global_model.readback import logits_of, probe_tokens
    from fedmomentum.lora.peft_model import detach_adapter, wrap_with_adapter

    trained = wrap_with_adapter(base, model.adapter)
    live = trained.get_base_model()
    weight_format = choose_weight_format("auto", live)
    owners = find_owners(live, model.adapter.modules)
    base_weights = make_merged_weights(
        owners, base_directory, weight_format=weight_format, model=live, tied=tied
    )
    # Beside weights held as loaded, merged parts are exact as factors, but not in 8 bits.
    factors = _merged_factors(model) if weight_format == AS_LOADED else None
    if factors is None:
        base_weights.apply(model.base_update)
    else:
        base_weights.apply([], factors)
    tokens = probe_tokens(base)
    logits = logits_of(trained, tokens)
    base_weights.apply([])
    is_rounded = weight_format == AS_LOADED and factors is None
    return _Reference(tokens, logits, is_rounded), detach_adapter(trained)


def _merged_factors(model: GlobalModel) -> StoredObject | None:
    """Return the sum of all merged parts as factors; None if a module's sum is dense."""
    from fedmomentum.global_model.objects import StoredObject

    changed = {module for part in model.base_update for module in part.matrices}
    sums = {}
    for module in sorted(changed):
        total = model.merged(module)
        if not isinstance(total, LowRank):
            return None
        sums[module] = total.to(torch.float32)
    return StoredObject.of(sums)


def _check_written(adapter: Adapter, directory: Path) -> None:
    """Refuse a directory that does not hold exactly the tensors and scalings of the adapter."""
    written = read_adapter(directory)
    expected = to_tensors(adapter)
    tensors = to_tensors(written)
    is_same = expected.keys() == tensors.keys() and all(
        torch.equal(expected[name], tensors[name]) for name in expected
    )
    for module, scaling in adapter.scalings.items():
        is_same = is_same and abs(written.scalings[module] - scaling) <= SCALING_TOL
    if not is_same:
        raise ModelError(
            f"the adapter written to {directory} reads back as another one; the disk is damaged"
        )


def _read_back_adapter(
    model: GlobalModel,
    directory: Path,
    base_directory: Path,
    reference: _Reference,
    device: torch.device,
) -> float:
    """Load the written adapter with PEFT, and return the difference of its logits."""
    from fedmomentum.global_model.base_loading import load_base_for
    from fedmomentum.global_model.readback import check_logits, logits_of
    from fedmomentum.lora.peft_model import load_with_peft, resize_for

    base = load_base_for(model, base_directory, None, device)
    resize_for(base, model.adapter)
    adapted = load_with_peft(base, directory)
    logits = logits_of(adapted, reference.tokens)
    what = "the adapter, read back by PEFT, is another model"
    tolerance = torch.float16 if reference.is_rounded else torch.float32
    return check_logits(logits, reference.logits, tolerance, what)


# ── a merged model ────────────────────────────────────────────────────────────────────────────────


def export_merged(
    model: GlobalModel,
    out: Path,
    *,
    base_directory: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    tokenizer: Any = None,
    facts: CardFacts = NO_FACTS,
) -> float:
    """Write the global model as an ordinary transformers directory, and read it back.

    At most the largest weight and one shard are in memory, besides the mapped files. Weights are
    merged on the CPU, so that their bits do not depend on the device.

    Args:
        model: The global model.
        out: A new or empty directory.
        base_directory: The base model's directory; its identity is checked.
        dtype: The dtype of the weights on disk. In 16 bits, part of the change is rounded away. A
            quantized base is dequantized.
        device: Where the models compute the logits that are compared.
        tokenizer: The tokenizer to write; by default the base model's.
        facts: Facts for the model card that the model does not hold.

    Returns:
        The fraction of the change that is on disk: `<W - base, change> / <change, change>` over
        adapted and fully trained modules, in `dtype`; 1 in float32.

    Raises:
        ModelError: If the base is not the right one, `out` is not empty, or what was written does
            not reproduce the model.
        AdapterError: If a tensor of `modules_to_save` has no place in the model.
    """
    from fedmomentum.base_model.loading import load_base, tied_names
    from fedmomentum.global_model.base_loading import load_base_for, num_labels
    from fedmomentum.global_model.dequantized_base import base_quantization
    from fedmomentum.global_model.model_files import round_weights, save_model
    from fedmomentum.global_model.readback import check_logits, logits_of, written_aside
    from fedmomentum.global_model.tuned_model import TunedModel, record_untied_weights

    require_empty_directory(out)
    model.base.check(_identity_of(model, base_directory))
    if base_quantization(model, base_directory) is not None:
        return _export_dequantized(model, out, base_directory, dtype, device, tokenizer, facts)

    # Merge in float32, and compare with the model as it was trained.
    base = load_base_for(model, base_directory, None, device)
    tied = tied_names(base)
    reference, live = _compute_as_trained(model, base, base_directory, tied)
    tuned = TunedModel(live, base_directory, model, tied)
    tuned.apply()
    tokens = reference.tokens
    what = "the merged model is another model than the run's"
    check_logits(logits_of(live, tokens), reference.logits, torch.float32, what)
    applied_fraction = _applied_fraction(model, tuned, dtype)

    with written_aside(out) as temporary:
        # Round, write, and free the model, so that only one is in memory.
        record_untied_weights(live)
        round_weights(live, dtype)
        rounded_logits = logits_of(live, tokens)
        save_model(live, base_directory, temporary, dtype)
        class_name = type(live).__name__
        del base, live, tuned
        gc.collect()

        # Read it back: exactly what was written, and the run's model up to rounding.
        saved = load_base(temporary, None, device, num_labels=num_labels(model))
        logits = logits_of(saved, tokens)
        what = "the merged model, read back, is not what was written"
        check_logits(logits, rounded_logits, torch.float32, what)
        what = f"the merged model, read back from {dtype}, is another model"
        check_logits(logits, reference.logits, dtype, what)
        tokenizer = copy_tokenizer(base_directory, temporary, tokenizer)
        if not is_classifier(model.adapter):
            write_stop_tokens(temporary, tokenizer)
        load = f"{class_name}.from_pretrained({_quoted(facts, out)})"
        write_card(model, temporary, "transformers", load, facts=facts)
    return applied_fraction


def _export_dequantized(
    model: GlobalModel,
    out: Path,
    base_directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: Any,
    facts: CardFacts,
) -> float:
    """Export a global model with a quantized base as one with the dequantized base.

    The merged change would not survive quantization.
    """
    from fedmomentum.global_model.dequantized_base import dequantized_base

    with dequantized_base(model, base_directory, out) as (plain, directory):
        fraction = export_merged(
            plain,
            out,
            base_directory=directory,
            dtype=dtype,
            device=device,
            tokenizer=tokenizer,
        )
    # The card names the run's own, quantized base.
    class_name = read_config(out)["architectures"][0]
    load = f"{class_name}.from_pretrained({_quoted(facts, out)})"
    write_card(model, out, "transformers", load, facts=facts, is_dequantized=True)
    return fraction


def _applied_fraction(model: GlobalModel, tuned: TunedModel, dtype: torch.dtype) -> float:
    """Return the fraction of the change that survives rounding the weights to `dtype`."""
    from fedmomentum.base_model.streamed_weights import StreamedWeights

    fraction = AppliedFraction()
    assert isinstance(tuned.base_weights, StreamedWeights)
    for module in tuned.base_weights.layers:
        pretrained = tuned.base_weights.pretrained(module)
        merged = tuned.base_weights.weight(module)
        effective = model.effective(module)
        # A block of rows at a time: in float64, a large matrix takes gigabytes.
        for first in range(0, len(merged), ROWS):
            rows = slice(first, first + ROWS)
            change = merged[rows].to(dtype).double() - pretrained[rows].to(dtype).double()
            fraction.add(change, _rows_of(effective, rows))
    for before, after in tuned.saved:
        if not after.is_floating_point():
            continue
        # Added tokens have no rows in the base.
        start = torch.zeros_like(after)
        start[tuple(slice(0, size) for size in before.shape)] = before
        change = after.to(dtype).double() - start.to(dtype).double()
        fraction.add(change.cpu(), (after.double() - start.double()).cpu())
    return fraction.value


def _rows_of(matrix: Matrix, rows: slice) -> Tensor:
    """Return some rows of a matrix in dense form."""
    return matrix.B[rows] @ matrix.A if isinstance(matrix, LowRank) else matrix[rows]


def _quoted(facts: CardFacts, out: Path) -> str:
    """Return the location of an export, quoted for a line of Python."""
    return repr(facts.location or out.name)
