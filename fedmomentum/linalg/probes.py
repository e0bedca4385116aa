"""Random bilinear probes `u^T M x` of weight matrices, and comparisons based on them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import LowRank

NUM_PROBES = 8
"""Probes per module. Over 60 modules, their mean square is within 7 % of the squared norm."""

# Number of matrix elements cast to float64 at a time: 4 MB, which stays in a CPU's cache.
BLOCK_ELEMENTS = 2**19

# A product is split among threads only if each gets at least this many rows.
MIN_ROWS_PER_THREAD = 64

# `BLOCK_ELEMENTS` for a GPU, which needs large products to stay busy: 256 MB.
GPU_BLOCK_ELEMENTS = 2**25


def probe_vectors(module: str, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Sample the Gaussian probe vectors of one module.

    They are the same on every machine with the same seed: sampled on the CPU, with a generator
    seeded by `seed` and the module's name.

    Args:
        module: Name of the module.
        shape: `(out, in)` of its weight.
        seed: Seed of the round's probes.

    Returns:
        U `(out, NUM_PROBES)` and X `(in, NUM_PROBES)`, float64.
    """
    digest = hashlib.sha256(f"{seed}/probe/{module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    # float32 takes a third of the time, which matters: an 8B model needs 21 million numbers.
    U = torch.randn(shape[0], NUM_PROBES, generator=generator)
    X = torch.randn(shape[1], NUM_PROBES, generator=generator)
    return U.double(), X.double()


def probe(matrix: Tensor | LowRank, U: Tensor, X: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Compute `diag(U^T M X)`: scalars linear in M whose mean square is `||M||_F^2` in expectation.

    Args:
        matrix: M, `(out, in)`. A dense M of any dtype, on any device, is read once, a few rows at
            a time.
        U: `(out, NUM_PROBES)`.
        X: `(in, NUM_PROBES)`.
        scratch: `BLOCK_ELEMENTS` float64 elements to cast into, for a caller that probes many
            matrices: fresh memory for every block can take three times as long.

    Returns:
        `(NUM_PROBES,)`, in the dtype of X, on the CPU.
    """
    if matrix.device.type == "cuda":
        return _probe_on_device(matrix, U, X)
    if isinstance(matrix, LowRank):
        return (U * (matrix.B.to(X) @ (matrix.A.to(X) @ X))).sum(0)
    out_size, in_size = matrix.shape
    block_rows = max(1, BLOCK_ELEMENTS // in_size)
    if scratch is None or scratch.numel() < block_rows * in_size:
        scratch = X.new_empty(block_rows * in_size)
    cast_block = scratch[: block_rows * in_size].view(block_rows, -1)
    UtM = X.new_zeros(X.shape[1], in_size)
    for start in range(0, out_size, block_rows):
        rows = matrix[start : start + block_rows]
        cast_rows = cast_block[: len(rows)].copy_(rows)
        _add_product_(UtM, U[start : start + block_rows], cast_rows)
    return (UtM.mT * X).sum(0)


def _probe_on_device(matrix: Tensor | LowRank, U: Tensor, X: Tensor) -> Tensor:
    """Compute the probes on the matrix's device; only the results are copied to the CPU."""
    U = U.to(matrix.device)
    return (U * times(matrix, X.to(matrix.device))).sum(0).cpu()


def times(matrix: Tensor | LowRank, X: Tensor) -> Tensor:
    """Return `M X` `(out, n)` in the dtype and on the device of X.

    A dense M is cast a few rows at a time.
    """
    if isinstance(matrix, LowRank):
        return matrix.B.to(X) @ (matrix.A.to(X) @ X)
    limit = GPU_BLOCK_ELEMENTS if X.device.type == "cuda" else BLOCK_ELEMENTS
    rows = matrix.split(max(1, limit // matrix.shape[1]))
    return torch.cat([block.to(X) @ X for block in rows])


def _add_product_(UtM: Tensor, U: Tensor, rows: Tensor) -> None:
    """Add `U^T rows` to `UtM` in place, splitting the rows among threads.

    Each core then multiplies the rows that it cast itself, which may be only in its own cache.
    """
    num_parts = max(1, min(torch.get_num_threads(), len(rows) // MIN_ROWS_PER_THREAD))
    even = len(rows) // num_parts * num_parts
    U_parts = U[:even].view(num_parts, -1, U.shape[1])
    row_parts = rows[:even].view(num_parts, -1, rows.shape[1])
    UtM += torch.bmm(U_parts.mT, row_parts).sum(0)
    UtM.addmm_(U[even:].mT, rows[even:])


def stack_probes(probes: Mapping[str, Tensor]) -> Tensor:
    """Return `(num_modules, NUM_PROBES)`, modules in sorted order."""
    return torch.stack([probes[module] for module in sorted(probes)])


def relative_rms(error: Mapping[str, Tensor], size: Mapping[str, Tensor]) -> float:
    """Return the root mean square of all probes of `error` over that of `size`.

    This estimates a relative Frobenius norm over all modules.
    """
    numerator = sum(float(values.square().sum()) for values in error.values())
    denominator = sum(float(values.square().sum()) for values in size.values())
    if denominator > 0:
        return math.sqrt(numerator / denominator)
    return 0.0 if numerator == 0 else math.inf


def applied_fraction(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return the fraction of a change that arrived: `<got, wanted> / <wanted, wanted>`.

    The inner products sum over all probes of all modules. The result is 1 if the whole change
    arrived, and less if rounding swallowed some. It is also 1 if nothing was wanted, so never NaN.
    """
    fraction = AppliedFraction()
    for module, change in wanted.items():
        fraction.add(got[module], change)
    return fraction.value


@dataclass
class AppliedFraction:
    """The fraction of a change that arrived, accumulated over tensors; see `applied_fraction`."""

    numerator: float = 0.0
    denominator: float = 0.0

    def add(self, got: Tensor, wanted: Tensor) -> None:
        """Add one tensor of what arrived, and the one that should have."""
        self.numerator += float((got * wanted).sum())
        self.denominator += float(wanted.square().sum())

    @property
    def value(self) -> float:
        """The fraction so far."""
        return self.numerator / self.denominator if self.denominator > 0 else 1.0
