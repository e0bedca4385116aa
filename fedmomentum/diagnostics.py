"""Pure measures of adapters and weights. torch only: tensors in, numbers out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedmomentum.lowrank import LowRank

NUM_PROBES = 8
"""Probes a module. Over 60 modules their mean square is within 7 % of the Frobenius norm it stands for."""


def probe_vectors(module: str, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian probe vectors of one module: U `(out, NUM_PROBES)`, X `(in, NUM_PROBES)`, float64.

    The same on every machine that is given the same seed: drawn on the CPU, from the module's name.
    """
    digest = hashlib.sha256(f"{seed}/probe/{module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    U = torch.randn(shape[0], NUM_PROBES, generator=generator, dtype=torch.float64)
    X = torch.randn(shape[1], NUM_PROBES, generator=generator, dtype=torch.float64)
    return U, X


def probe(matrix: Tensor | LowRank, U: Tensor, X: Tensor) -> Tensor:
    """`diag(U^T M X)`: `(NUM_PROBES,)` numbers linear in M whose mean square is `||M||_F^2`."""
    if isinstance(matrix, LowRank):
        return (U * (matrix.B.to(X) @ (matrix.A.to(X) @ X))).sum(0)
    return (U * (matrix.to(X) @ X)).sum(0)


def relative_rms(error: Mapping[str, Tensor], size: Mapping[str, Tensor]) -> float:
    """Root mean square of all probes of `error` over that of `size`: a relative Frobenius norm over modules."""
    top = sum(float(values.square().sum()) for values in error.values())
    bottom = sum(float(values.square().sum()) for values in size.values())
    return math.sqrt(top / bottom) if bottom > 0 else (0.0 if top == 0 else math.inf)


def applied_share(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """`<got, wanted> / <wanted, wanted>` over all modules' probes: the share of a change that arrived.

    1 where all of it is there; a change that rounding swallowed gives less. NaN-free: 1 where nothing was wanted.
    """
    top = sum(float((got[m] * wanted[m]).sum()) for m in wanted)
    bottom = sum(float(wanted[m].square().sum()) for m in wanted)
    return top / bottom if bottom > 0 else 1.0
