"""The parts of a global model: its adapter as objects, and checks of parts that were read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmomentum.errors import ModelError
from fedmomentum.global_model.objects import StoredObject, check_matrix
from fedmomentum.linalg.low_rank import LowRank, difference
from fedmomentum.lora.adapter import PREFIX, Adapter, split_tensors, to_tensors
from fedmomentum.lora.half_precision import DTYPES, decode_factors, dtype_of, encode_factors
from fedmomentum.utils.tensors import is_finite, read_safetensors, safetensors_bytes

if TYPE_CHECKING:
    from fedmomentum.formats.manifest import Manifest
    from fedmomentum.linalg.matrix import Matrix


ADAPTER_TITLE = "global adapter"
# Maps the hash of an object to the object.
Fetch = Callable[[str], StoredObject]


# ── the adapter ───────────────────────────────────────────────────────────────────────────────────


def adapter_objects(adapter: Adapter, dtype: torch.dtype) -> dict[str, StoredObject]:
    """Return an adapter as the objects that are sent and stored.

    Factors are separate objects, so that one that did not change is not sent again.

    Args:
        adapter: The adapter.
        dtype: The dtype in which factors are sent.

    Returns:
        `A` for all factors A, `B` for all factors B, and `saved` for fully trained tensors.
    """
    tensors_by_kind: dict[str, dict[str, Tensor]] = {}
    for name, tensor in encode_factors(to_tensors(adapter), dtype).items():
        kind = "saved"
        if ".lora_B.weight" in name:
            kind = "B"
        elif ".lora_A.weight" in name:
            kind = "A"
        tensors_by_kind.setdefault(kind, {})[name] = tensor
    objects = {}
    for kind, tensors in sorted(tensors_by_kind.items()):
        objects[kind] = StoredObject(safetensors_bytes(tensors))
    return objects


def split_adapter(
    tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Return an adapter's modules and its saved tensors, from float32 tensors under PEFT's names.

    Raises:
        ModelError: If a factor is missing, two factors do not fit together, or a number is not
            finite.
    """
    for key, tensor in tensors.items():
        _check_adapter_tensor(key, tensor, tensors, where)
    try:
        return split_tensors(tensors)
    except ValueError as error:
        raise ModelError(f"{where}: {error}") from error


def read_adapter_objects(
    manifest: Manifest, fetch: Fetch, where: str
) -> tuple[Adapter, torch.dtype]:
    """Return the adapter in float32, and the dtype in which its factors are stored."""
    # Its tensors are in up to three objects, with factors in 16 bits if the run sends them so.
    tensors: dict[str, Tensor] = {}
    for name in manifest.adapter.names:
        part = read_safetensors(fetch(name).data, where)[0]
        duplicates = sorted(part.keys() & tensors.keys())
        if duplicates:
            raise ModelError(f"{where}: tensor {duplicates[0]} is in two of the adapter's objects")
        tensors |= part
    dtype = dtype_of(tensors)
    if dtype not in DTYPES.values():
        raise ModelError(f"{where}: the adapter's factors are {dtype}; wanted {', '.join(DTYPES)}")
    modules, saved = split_adapter(decode_factors(tensors, dtype, where), where)
    if modules.keys() != manifest.scalings.keys():
        raise ModelError(f"{where}: the manifest's scalings and the adapter's modules differ")
    adapter = Adapter(
        modules=modules,
        scalings=manifest.scalings,
        saved=saved,
        config=manifest.adapter_config,
        name=ADAPTER_TITLE,
    )
    return adapter, dtype


def _check_adapter_tensor(
    key: str, tensor: Tensor, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Refuse a tensor that does not belong to an adapter, or is not finite."""
    if not key.startswith(PREFIX):
        raise ModelError(
            f"{where}: tensor {key[:200]} does not belong to an adapter; names begin with {PREFIX}"
        )
    other = None
    if key.endswith(".lora_A.weight"):
        other = key.removesuffix(".lora_A.weight") + ".lora_B.weight"
    elif key.endswith(".lora_B.weight"):
        other = key.removesuffix(".lora_B.weight") + ".lora_A.weight"
    if other is None:
        if tensor.is_complex() or (tensor.is_floating_point() and not is_finite(tensor)):
            raise ModelError(f"{where}: tensor {key} holds NaN, Inf or complex numbers")
        return
    if other not in tensors:
        raise ModelError(f"{where}: tensor {key} comes without its other factor")
    check_matrix(tensor, f"{where}: tensor {key}")


# ── merged parts ──────────────────────────────────────────────────────────────────────────────────


def checked(fetch: Fetch, where: str) -> Fetch:
    """Wrap `fetch` with a check that an object has the requested hash."""

    def fetch_checked(name: str) -> StoredObject:
        stored = fetch(name)
        if stored.name != name:
            raise ModelError(
                f"{where}: object {name[:16]}... does not match its hash; it was damaged or altered"
            )
        return stored

    return fetch_checked


def check_changes(objects: Sequence[StoredObject], adapter: Adapter, where: str) -> None:
    """Refuse objects that change anything but the adapter's modules, or with other shapes."""
    for stored in objects:
        for module, matrix in stored.matrices.items():
            wanted = adapter.modules[module].shape if module in adapter.modules else None
            if tuple(matrix.shape) != wanted:
                raise ModelError(
                    f"{where}: object {stored.name[:16]} changes module {module} "
                    f"{tuple(matrix.shape)}, which is not adapted or has another shape ({wanted})"
                )


def rounding_losses(exact: Adapter, rounded: Adapter) -> dict[str, LowRank]:
    """Return `s (B A - B' A')` of every module."""
    losses = {}
    for module, matrix in exact.modules.items():
        lost = difference(matrix, rounded.modules[module])
        losses[module] = lost.scaled(rounded.scalings[module])
    return losses


def without_tail(matrix: Matrix, tail: Matrix) -> LowRank | None:
    """Return the leading components of a matrix that ends in `tail`; None if it does not."""
    if not isinstance(matrix, LowRank) or not isinstance(tail, LowRank):
        return None
    if tail.rank >= matrix.rank:
        return None
    split = matrix.rank - tail.rank
    if not torch.equal(matrix.B[:, split:], tail.B) or not torch.equal(matrix.A[split:], tail.A):
        return None
    return LowRank(matrix.B[:, :split].contiguous(), matrix.A[:split].contiguous())
