"""`SideBranch`: updates merged into one weight, kept next to it, and products with their sum.

The sum of a 16-bit weight and a small update does not fit in 16 bits, and neither does the sum of
their products: an output rounded to bfloat16 before the update's part is added loses four fifths of
a part of 3e-4. So both products are added in float32, and the sum is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import Matrix
from fedmomentum.linalg.probes import probe

# Number of weight elements cast to float32 at a time: 16 MB.
BLOCK_ELEMENTS = 2**22
INT8_MAX = 127


@dataclass(frozen=True, eq=False)
class Int8Matrix:
    """A matrix in 8 bits: `diag(scales) values`.

    Attributes:
        values: `(out, in)`, int8, from -127 to 127.
        scales: `(out, 1)`, float32.
    """

    values: Tensor
    scales: Tensor

    def rows(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return the rows from `start` to `end`, in `dtype`."""
        return self.values[start:end].to(dtype).mul_(self.scales[start:end].to(dtype))


@dataclass(frozen=True, eq=False)
class SideBranch:
    """What is added to a weight: `diag(scales) values + B A`.

    Attributes:
        dense: The 8-bit part; None if there is none.
        factors: The factored part, in the dtype of the products; None if there is none.
    """

    dense: Int8Matrix | None = None
    factors: LowRank | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is added."""
        return self.dense is None and self.factors is None

    def probe(self, U: Tensor, X: Tensor, scratch: Tensor | None = None) -> Tensor:
        """Compute `diag(U^T D X)` for the branch D."""
        total = X.new_zeros(X.shape[1])
        if self.dense is not None:
            scales = self.dense.scales.to(U)
            total += probe(self.dense.values, scales * U, X, scratch)
        if self.factors is not None:
            B, A = self.factors.B, self.factors.A
            total += probe(LowRank(B.to(U), A.to(U)), U, X)
        return total

    def __deepcopy__(self, memo: Any) -> SideBranch:
        """Return the same branch, since it is immutable."""
        return self


EMPTY = SideBranch()


# ── from parts ────────────────────────────────────────────────────────────────────────────────────


def make_branch(
    parts: Sequence[Matrix],
    own: LowRank | None,
    shape: tuple[int, int],
    like: Tensor,
    dense: Int8Matrix | None = None,
) -> SideBranch:
    """Return the branch of these parts, as factors while they are smaller than an int8 matrix.

    It depends only on the parts: adding one part per round yields the same bits as adding all parts
    at once.

    Args:
        parts: The merged parts, oldest first, in float32.
        own: Added last, and always kept as factors.
        shape: `(out, in)` of the weight.
        like: A tensor on the weight's device, in the dtype of its products.
        dense: The 8-bit sum of these parts, if already computed.
    """
    out_size, in_size = shape
    factors = [part for part in parts if isinstance(part, LowRank)]
    num_bytes = sum(part.rank for part in factors) * (out_size + in_size) * like.dtype.itemsize
    are_smaller = len(factors) == len(parts) and num_bytes < out_size * in_size
    if not are_smaller and dense is None:
        dense = _quantized_sum(parts, shape, like.device)
    stacked = [*factors] if are_smaller else []
    if own is not None:
        stacked.append(own)
    return SideBranch(dense, _stack(stacked, like) if stacked else None)


def _stack(factors: Sequence[LowRank], like: Tensor) -> LowRank:
    """Return the sum as stacked factors in the dtype and on the device of `like`.

    Each component's norm is balanced between its two factors, since a small factor would lose
    digits in float16. Scaling by powers of two is otherwise lossless.
    """
    B = torch.cat([part.B.to(like.device, torch.float32) for part in factors], dim=1)
    A = torch.cat([part.A.to(like.device, torch.float32) for part in factors], dim=0)
    norms_of_B = B.norm(dim=0)
    norms_of_A = A.norm(dim=1)
    is_alive = (norms_of_B > 0) & (norms_of_A > 0)
    ratio = torch.where(is_alive, norms_of_A / norms_of_B, 1.0)
    balance = torch.exp2((ratio.log2() / 2).round())
    return LowRank((B * balance).to(like.dtype), (A / balance[:, None]).to(like.dtype))


def _quantized_sum(
    parts: Sequence[Matrix], shape: tuple[int, int], device: torch.device
) -> Int8Matrix:
    """Return the sum of the parts, added one by one in float32, then quantized to 8 bits.

    It is computed a few rows at a time, since a row's scale depends only on that row.
    """
    out_size, in_size = shape
    moved = [p if isinstance(p, Tensor) else LowRank(p.B.to(device), p.A.to(device)) for p in parts]
    values = torch.empty(out_size, in_size, dtype=torch.int8, device=device)
    scales = torch.empty(out_size, 1, dtype=torch.float32, device=device)
    for start, end in _blocks(shape):
        total = torch.zeros(end - start, in_size, dtype=torch.float32, device=device)
        for part in moved:
            if isinstance(part, LowRank):
                total.addmm_(part.B[start:end], part.A)
            else:
                total += part[start:end].to(device)
        scale = total.abs().amax(dim=1, keepdim=True) / INT8_MAX
        scales[start:end] = scale
        # A row of zeros has scale 0; avoid dividing by it.
        total /= torch.where(scale > 0, scale, 1.0)
        values[start:end] = total.round_().to(torch.int8)
    return Int8Matrix(values, scales)


def _blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each block of rows of a matrix of this shape."""
    out_size, in_size = shape
    step = max(1, BLOCK_ELEMENTS // in_size)
    for start in range(0, out_size, step):
        yield start, min(start + step, out_size)


# ── products ──────────────────────────────────────────────────────────────────────────────────────


class BranchedProduct(torch.autograd.Function):
    """`x (W + D)^T + bias` with a frozen weight, branch and bias, rounded once.

    For the backward pass, only the branch and the function that returns the weight are kept, so
    weights are dequantized again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Callable[[], Tensor], branch: SideBranch, bias: Tensor | None
    ) -> Tensor:
        """Return the output `(n, out)`, in the dtype of x.

        Args:
            ctx: What the backward pass needs.
            x: `(n, in)`.
            weight: Returns the weight `(out, in)`; called again in the backward pass.
            branch: The branch that is added to it.
            bias: `(out,)`.
        """
        ctx.weight = weight
        ctx.branch = branch
        y = multiply(x, weight(), branch)
        if bias is not None:
            y += bias
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of x."""
        (gradient,) = gradients
        result = multiply_transposed(gradient, ctx.weight(), ctx.branch)
        return result.to(gradient.dtype), None, None, None


def multiply(x: Tensor, weight: Tensor, branch: SideBranch) -> Tensor:
    """Return `x (W + D)^T` `(n, out)` in float32, or in float64 if x is.

    Args:
        x: `(n, in)`.
        weight: W, `(out, in)`.
        branch: D.
    """
    wide = _wide(x.dtype)
    if _multiplies_narrow(x):
        y = _product(x, weight.to(x.dtype).mT)
        if branch.dense is not None:
            # Integers up to 127 are exact in 16 bits; their scales are applied in float32.
            values = branch.dense.values.to(x.dtype)
            y.addcmul_(_product(x, values.mT), branch.dense.scales.mT.to(wide))
    else:
        x_wide = x.to(wide)
        y = x_wide.new_empty(len(x), len(weight))
        for start, end in _blocks((weight.shape[0], weight.shape[1])):
            torch.mm(x_wide, _sum_of_rows(weight, branch, start, end, wide).mT, out=y[:, start:end])
    if branch.factors is not None:
        inner = _product(x, branch.factors.A.to(x.dtype).mT)
        _add_product_(y, inner.to(x.dtype), branch.factors.B.to(x.dtype).mT)
    return y


def multiply_transposed(gradient: Tensor, weight: Tensor, branch: SideBranch) -> Tensor:
    """Return `g (W + D)` `(n, in)` in float32, or in float64 if g is.

    Args:
        gradient: g, `(n, out)`.
        weight: W, `(out, in)`.
        branch: D.
    """
    wide = _wide(gradient.dtype)
    if _multiplies_narrow(gradient):
        result = _product(gradient, weight.to(gradient.dtype))
        if branch.dense is not None:
            # Use scales relative to the largest, so that gradients do not underflow in float16.
            largest = branch.dense.scales.max().clamp(min=torch.finfo(torch.float32).tiny)
            scaled = gradient * (branch.dense.scales / largest).mT.to(gradient.dtype)
            values = branch.dense.values.to(gradient.dtype)
            result.addcmul_(_product(scaled, values), largest.to(wide))
    else:
        g_wide = gradient.to(wide)
        result = g_wide.new_zeros(len(gradient), weight.shape[1])
        for start, end in _blocks((weight.shape[0], weight.shape[1])):
            rows = _sum_of_rows(weight, branch, start, end, wide)
            result.addmm_(g_wide[:, start:end], rows)
    if branch.factors is not None:
        inner = _product(gradient, branch.factors.B.to(gradient.dtype))
        _add_product_(result, inner.to(gradient.dtype), branch.factors.A.to(gradient.dtype))
    return result


def _sum_of_rows(
    weight: Tensor, branch: SideBranch, start: int, end: int, dtype: torch.dtype
) -> Tensor:
    """Return the rows from `start` to `end` of the weight plus the 8-bit branch, in `dtype`."""
    rows = weight[start:end].to(dtype)
    if branch.dense is not None:
        return rows + branch.dense.rows(start, end, dtype)
    return rows


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two matrices of the same dtype, in float32 or wider."""
    wide = _wide(left.dtype)
    if left.dtype == wide:
        return left @ right
    if _multiplies_narrow(left):
        return torch.mm(left, right, out_dtype=wide)
    return left.to(wide) @ right.to(wide)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of two matrices of the same dtype, in place, to a float32 or wider total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _multiplies_narrow(left):
        # A single pass over the sum; a separate product would be written, read and added.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products are added: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _multiplies_narrow(x: Tensor) -> bool:
    """Return whether the device multiplies in the dtype of x while accumulating in float32.

    A CPU does not: there the weight is cast to float32, a few rows at a time, and D is added to it.
    """
    return x.device.type == "cuda"
