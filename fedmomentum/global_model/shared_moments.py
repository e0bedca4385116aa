"""The optimizer moments that all clients of a round start from, as an object and in replies.

Tensors are named `<module>.<factor>.<part>`, where the factor is `B` or `A` and the parts are
`first`, `step`, and for the second moment either its means, `rows` and `columns`, or all of it,
`second`. With means, everything but the step is sent in bfloat16, which has float32's exponent
range and three digits; full moments are sent in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.aggregation.moments import Moments, SecondMomentMeans
from fedmomentum.errors import PayloadError
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.utils.schema import MAX_COUNT
from fedmomentum.utils.tensors import is_finite, read_safetensors, safetensors_bytes

WIRE_DTYPE = torch.bfloat16
Shapes = Mapping[str, tuple[int, int]]
"""`<module>.<factor>` to the factor's shape."""


@dataclass(frozen=True, eq=False)
class SharedMoments:
    """The moments that clients start from.

    Attributes:
        moments: `<module>.<factor>` to its moments, for the factors that have been trained.
        is_full: Whether second moments are sent in full, or as means of rows and columns.
    """

    moments: Mapping[str, Moments]
    is_full: bool

    def of_module(self, module: str) -> dict[str, Moments]:
        """Return the moments of one module, keyed by `B` and `A`, as far as there are any."""
        keys = {kind: f"{module}.{kind}" for kind in "BA"}
        return {kind: self.moments[key] for kind, key in keys.items() if key in self.moments}

    def as_object(self) -> StoredObject:
        """Return the object that is stored and sent."""
        tensors = encode_moments(self.moments) if self.is_full else _encode_factored(self.moments)
        return StoredObject(safetensors_bytes(tensors))

    @classmethod
    def read(cls, stored: StoredObject, shapes: Shapes, *, is_full: bool) -> SharedMoments:
        """Read the moments in an object.

        Args:
            stored: The object.
            shapes: The factors that may have moments.
            is_full: Whether it holds second moments in full.

        Raises:
            PayloadError: If it holds anything else; the message names the tensor.
        """
        name = f"object {stored.name[:16]}"
        tensors, _ = read_safetensors(stored.data, name)
        known = {key: shapes[key] for key in shapes if f"{key}.step" in tensors}
        if is_full:
            return cls(decode_moments(tensors, known, name), is_full)
        return cls(_decode_factored(tensors, known, name), is_full)


# ── moments in full ───────────────────────────────────────────────────────────────────────────────


def encode_moments(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Return the tensors of full moments, in float32."""
    tensors = {}
    for key, moment in moments.items():
        tensors[f"{key}.first"] = moment.first.to(torch.float32).cpu()
        tensors[f"{key}.step"] = torch.tensor([moment.step], dtype=torch.int64)
        if moment.second is not None:
            tensors[f"{key}.second"] = moment.second.to(torch.float32).cpu()
    return tensors


def decode_moments(tensors: Mapping[str, Tensor], shapes: Shapes, name: str) -> dict[str, Moments]:
    """Return the moments of exactly these factors.

    Args:
        tensors: The tensors of `encode_moments`.
        shapes: The factors.
        name: What messages call the sender.

    Raises:
        PayloadError: If a tensor is missing, unexpected, malformed, or out of range.
    """
    parts = _Parts(tensors, name)
    moments = {}
    for key, shape in shapes.items():
        first = parts.take(f"{key}.first", shape, torch.float32)
        second = None
        if f"{key}.second" in tensors:
            second = parts.take(f"{key}.second", shape, torch.float32, least=0.0)
        moments[key] = Moments(first, second, parts.take_step(f"{key}.step"))
    parts.check_all_taken()
    return moments


# ── second moments by their means ─────────────────────────────────────────────────────────────────


def encode_means(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Return the row and column means of second moments, in 16 bits; nothing for SGD."""
    tensors = {}
    for key, moment in moments.items():
        if moment.second is not None:
            means = SecondMomentMeans.of(moment.second)
            tensors[f"{key}.rows"] = means.rows.to(WIRE_DTYPE).cpu()
            tensors[f"{key}.columns"] = means.columns.to(WIRE_DTYPE).cpu()
    return tensors


def decode_means(
    tensors: Mapping[str, Tensor], shapes: Shapes, name: str
) -> dict[str, SecondMomentMeans]:
    """Return the means of exactly these factors.

    Args:
        tensors: The tensors of `encode_means`.
        shapes: The factors.
        name: What messages call the sender.

    Raises:
        PayloadError: If a tensor is missing, unexpected, malformed, or out of range.
    """
    parts = _Parts(tensors, name)
    means = {}
    for key, shape in shapes.items():
        means[key] = parts.take_means(key, shape)
    parts.check_all_taken()
    return means


def _encode_factored(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    tensors = encode_means(moments)
    for key, moment in moments.items():
        tensors[f"{key}.first"] = moment.first.to(WIRE_DTYPE).cpu()
        tensors[f"{key}.step"] = torch.tensor([moment.step], dtype=torch.int64)
    return tensors


def _decode_factored(
    tensors: Mapping[str, Tensor], shapes: Shapes, name: str
) -> dict[str, Moments]:
    parts = _Parts(tensors, name)
    moments = {}
    for key, shape in shapes.items():
        first = parts.take(f"{key}.first", shape, WIRE_DTYPE).to(torch.float32)
        second = None
        if f"{key}.rows" in tensors:
            second = parts.take_means(key, shape).expand().to(torch.float32)
        moments[key] = Moments(first, second, parts.take_step(f"{key}.step"))
    parts.check_all_taken()
    return moments


# ── checks ────────────────────────────────────────────────────────────────────────────────────────


class _Parts:
    """Takes tensors by name, checks their form, and tracks which were taken."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self._tensors = tensors
        self._name = name
        self._remaining = set(tensors)

    def take(
        self, key: str, shape: tuple[int, ...], dtype: torch.dtype, least: float | None = None
    ) -> Tensor:
        """Return a tensor with this shape and dtype, checked to be finite.

        Raises:
            PayloadError: If it is missing or malformed, or an element is below `least`.
        """
        tensor = self._tensors.get(key)
        wanted = f"{tuple(shape)} in {dtype}"
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            got = "missing" if tensor is None else f"{tuple(tensor.shape)} in {tensor.dtype}"
            raise PayloadError(f"{self._name}: optimizer tensor {key} is {got}; wanted {wanted}")
        if not is_finite(tensor):
            raise PayloadError(f"{self._name}: optimizer tensor {key} holds NaN or Inf")
        if least is not None and bool((tensor < least).any()):
            raise PayloadError(
                f"{self._name}: optimizer tensor {key} holds a number below {least:g}; a mean of "
                "squares has none"
            )
        self._remaining.discard(key)
        return tensor

    def take_means(self, key: str, shape: tuple[int, int]) -> SecondMomentMeans:
        """Return the row and column means of a second moment, in float32."""
        rows = self.take(f"{key}.rows", shape[:1], WIRE_DTYPE, least=0.0)
        columns = self.take(f"{key}.columns", shape[1:], WIRE_DTYPE, least=0.0)
        return SecondMomentMeans(rows.to(torch.float32), columns.to(torch.float32))

    def take_step(self, key: str) -> int:
        """Return a number of steps.

        Raises:
            PayloadError: If it is missing or out of range.
        """
        step = self._tensors.get(key)
        if step is None or step.dtype != torch.int64 or tuple(step.shape) != (1,):
            raise PayloadError(f"{self._name}: optimizer tensor {key} is no number of steps")
        if not 1 <= int(step) <= MAX_COUNT:
            raise PayloadError(
                f"{self._name}: optimizer tensor {key} is {int(step)}; wanted a number of steps "
                f"from 1 to {MAX_COUNT}"
            )
        self._remaining.discard(key)
        return int(step)

    def check_all_taken(self) -> None:
        """Refuse tensors that were not expected.

        Raises:
            PayloadError: If there are any.
        """
        if self._remaining:
            raise PayloadError(
                f"{self._name}: optimizer tensor {min(self._remaining)} was not requested"
            )
