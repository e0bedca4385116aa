"""`LowRank(B, A)`: the matrix `B @ A` kept as its two factors, and algebra that never forms it.

For a matrix of shape `(d, k)` and rank R, everything here costs `O((d + k) R^2 + R^3)` time and
`O((d + k) R)` memory instead of `O(d k min(d, k))` and `O(d k)`. The core runs in float64 whatever
the dtype of the factors. Half precision is an input format only; float32 and float64 factors yield
results in their own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CORE_DTYPE = torch.float64
# How much smaller than its terms a sum of squares may be: at this ratio, cancellation has cost four
# of the sixteen digits of float64, or two of the seven of float32.
MAX_CANCELLED_SQUARE = {torch.float64: 1e4, torch.float32: 1e2}
# Number of columns cast to another dtype at a time, so that a block stays in cache.
CHUNK_COLUMNS = 1024
# A Gram matrix of more rows than this is computed in blocks, skipping the lower triangle.
MIN_BLOCKED_ROWS = 128


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix `B @ A` of rank at most `rank`, kept factored.

    Args:
        B: `(out, rank)`, the up-projection (`lora_B`).
        A: `(rank, in)`, the down-projection (`lora_A`).

    Raises:
        ValueError: If the factors are not matrices, their inner sizes differ, or they differ in
            dtype or device.

    Example:
        >>> import torch
        >>> m = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]))
        >>> m.shape, m.rank
        ((2, 2), 1)
        >>> m.dense().tolist()
        [[3.0, 4.0], [6.0, 8.0]]
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        """Validate the factors; no other method checks them again."""
        B, A = self.B, self.A
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
            raise ValueError(
                f"B must be (out, rank) and A (rank, in); got B {tuple(B.shape)} and A "
                f"{tuple(A.shape)}"
            )
        if B.dtype != A.dtype or B.device != A.device:
            raise ValueError(
                f"B and A must have one dtype and device; got B {B.dtype} on {B.device}, A "
                f"{A.dtype} on {A.device}"
            )

    @property
    def rank(self) -> int:
        """Number of columns of B; an upper bound on the rank of the matrix."""
        return self.B.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the matrix."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.B.device

    def __repr__(self) -> str:
        """Return shape, rank and dtype; never the elements."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"LowRank({self.shape[0]}x{self.shape[1]}, rank {self.rank}, {dtype})"

    def to(self, dtype: torch.dtype) -> LowRank:
        """Return the same matrix with both factors cast to `dtype`."""
        return LowRank(self.B.to(dtype), self.A.to(dtype))

    def dense(self) -> Tensor:
        """Form and return the dense `(out, in)` matrix."""
        return self.B @ self.A

    def scaled(self, factor: float) -> LowRank:
        """Return `factor * B @ A`; the factor is multiplied into B."""
        return LowRank(self.B * factor, self.A)

    def inner(self, other: LowRank, dtype: torch.dtype = CORE_DTYPE) -> float:
        r"""Return the Frobenius inner product `<B A, B' A'> = sum((B^T B') * (A A'^T))`.

        Args:
            other: A matrix of the same shape, of any rank.
            dtype: The dtype for products of the tall factors.
        """
        if self.shape != other.shape:
            raise ValueError(f"inner product of a {self.shape} with a {other.shape} matrix")
        BtB = self.B.to(dtype).mT @ other.B.to(dtype)
        AAt = self.A.to(dtype) @ other.A.to(dtype).mT
        return float((BtB * AAt).sum(dtype=CORE_DTYPE))

    def norm(self, dtype: torch.dtype = CORE_DTYPE) -> float:
        """Return the Frobenius norm.

        Without cancellation, it is `sqrt(inner(self, self))`. Squaring loses any norm below 1e-8 of
        the factors' own size, such as that of the difference of two close matrices; such norms are
        computed from the triangular factors of QR decompositions instead.

        Args:
            dtype: The dtype for the Gram matrices; float32 takes a third of the time and yields
                five correct digits.
        """
        if self.rank == 0:
            return 0.0
        if self.rank >= min(self.shape):
            return float(torch.linalg.matrix_norm(self.to(CORE_DTYPE).dense()))
        G_B = gram(self.B.mT, dtype)
        G_A = gram(self.A, dtype)
        square = float((G_B * G_A).sum(dtype=CORE_DTYPE))
        size = float(G_B.norm()) * float(G_A.norm())
        if MAX_CANCELLED_SQUARE[dtype] * square > size > torch.finfo(dtype).tiny:
            return math.sqrt(square)
        if dtype != CORE_DTYPE:
            return self.norm()
        R_B = torch.linalg.qr(self.B.to(CORE_DTYPE), mode="r").R
        R_A = torch.linalg.qr(self.A.to(CORE_DTYPE).mT, mode="r").R
        return float(torch.linalg.matrix_norm(R_B @ R_A.mT))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Compute the exact thin SVD `B A = U diag(S) Vh` in float64, without forming the matrix.

        `B = Q_b R_b`, `A^T = Q_a R_a`, `R_b R_a^T = U' diag(S) V'^T`, `U = Q_b U'`, `V = Q_a V'`:
        the same singular values and vectors (up to their usual ambiguity) as
        `torch.linalg.svd(B @ A, full_matrices=False)`. If the rank is not below both sides of the
        matrix, the dense SVD is cheaper and is used.

        Returns:
            U `(out, m)`, S `(m,)` descending, Vh `(m, in)`, with `m = min(rank, out, in)`.

        Raises:
            ValueError: If a factor contains NaN or Inf.
        """
        B = self.B.to(CORE_DTYPE)
        A = self.A.to(CORE_DTYPE)
        # Sums propagate NaN and Inf, so checking them checks every element.
        if not math.isfinite(float(B.sum()) + float(A.sum())):
            raise ValueError(
                f"the factors of {self!r} hold NaN or Inf; find out which client sent them"
            )
        if self.rank == 0:
            return B, B.new_zeros(0), A
        if self.rank >= min(self.shape):
            U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
            return U, S, Vh
        Q_b, R_b = torch.linalg.qr(B)  # (out, R), (R, R)
        Q_a, R_a = torch.linalg.qr(A.mT)  # (in, R), (R, R)
        U, S, Vh = torch.linalg.svd(R_b @ R_a.mT)
        return Q_b @ U, S, Vh @ Q_a.mT

    def recompress(self, *, rank: int | None = None, energy: float = 1.0) -> LowRank:
        """Return the best approximation (Eckart-Young) of the lowest rank that keeps the energy.

        Args:
            rank: Maximum rank of the result; unlimited by default.
            energy: Fraction of the squared singular values to keep, in (0, 1]. 1 keeps everything
                above round-off (`numerical_rank`).

        Returns:
            `LowRank(U S, Vh)` in the dtype of this matrix.
        """
        U, S, Vh = self.svd()
        if energy < 1:
            keep = energy_rank(S, energy)
        else:
            keep = numerical_rank(S, self.shape, CORE_DTYPE)
        if rank is not None:
            keep = min(rank, keep)
        return from_svd(U[:, :keep], S[:keep], Vh[:keep], result_dtype(self.dtype))

    def split_rank(self, rank: int) -> tuple[LowRank, LowRank]:
        """Return the first `rank` components (columns of B, rows of A), and the rest.

        Both are views, so they are bit-identical on every machine. The first is the best
        approximation at its rank if the components are singular directions in descending order.

        Raises:
            ValueError: If `rank` is not in 1..self.rank.
        """
        if not 1 <= rank <= self.rank:
            raise ValueError(f"rank must be from 1 to {self.rank}, that of {self!r}; got {rank}")
        head = LowRank(self.B[:, :rank], self.A[:rank])
        tail = LowRank(self.B[:, rank:], self.A[rank:])
        return head, tail

    def canonical(self) -> LowRank:
        """Return the same matrix with singular directions as components, in descending order.

        `B = U S^1/2`, `A = S^1/2 V^T`. Components whose singular value is zero get a unit row of A,
        so that they can train.
        """
        U, S, Vh = self.svd()
        keep = numerical_rank(S, self.shape, S.dtype)
        root = S.sqrt()
        B = U * root
        B[:, keep:] = 0
        A = root[:, None] * Vh
        A[keep:] = Vh[keep:]
        return LowRank(B, A).to(self.dtype)

    def concatenate(self, other: LowRank) -> LowRank:
        """Return `B A + B' A'` as stacked factors, in the dtype of this matrix."""
        B = torch.cat([self.B, other.B.to(self.dtype)], dim=1)
        A = torch.cat([self.A, other.A.to(self.dtype)], dim=0)
        return LowRank(B, A)


def result_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return float64 if all dtypes are float64, else float32.

    Half precision is an input format only.
    """
    return torch.float64 if all(dtype == torch.float64 for dtype in dtypes) else torch.float32


def gram(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute `rows rows^T` `(n, n)` from its upper blocks, five eighths of the full work.

    Args:
        rows: `(n, size)`. Rows of another dtype are cast in chunks that stay in cache.
        dtype: The dtype of the product; that of `rows` by default.
    """
    n, size = rows.shape
    dtype = dtype or rows.dtype
    step = max(n if n <= MIN_BLOCKED_ROWS else -(-n // 4), 1)
    width = max(size if rows.dtype == dtype else CHUNK_COLUMNS, 1)
    G = torch.zeros(n, n, dtype=dtype, device=rows.device)
    for start in range(0, size, width):
        chunk = rows[:, start : start + width].to(dtype)
        for i in range(0, n, step):
            G[i : i + step, i:].addmm_(chunk[i : i + step], chunk[i:].mT)
    for i in range(0, n, step):
        G[i + step :, i : i + step] = G[i : i + step, i + step :].mT
    return G


def from_svd(U: Tensor, S: Tensor, Vh: Tensor, dtype: torch.dtype) -> LowRank:
    """Return `LowRank(U diag(S), Vh)` cast to `dtype`; all singular values are in B."""
    return LowRank((U * S).to(dtype), Vh.to(dtype))


def zeros(
    shape: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LowRank:
    """Return the zero matrix of `shape`, with rank 0."""
    B = torch.zeros(shape[0], 0, dtype=dtype, device=device)
    A = torch.zeros(0, shape[1], dtype=dtype, device=device)
    return LowRank(B, A)


def weighted_sum(
    matrices: Sequence[LowRank],
    weights: Sequence[float] | Tensor,
    *,
    dtype: torch.dtype = CORE_DTYPE,
) -> LowRank:
    r"""Stack the exact sum `sum_i w_i B_i A_i = [w_1 B_1, ..., w_n B_n] [A_1; ...; A_n]`.

    Only `w_i B_i` is computed here; use `recompress`, `svd` or `truncated_svd` to reduce the rank.

    Args:
        matrices: N matrices of the same shape, of any ranks and floating-point dtypes.
        weights: N finite numbers of any sign; not normalized here.
        dtype: The dtype of the stack. In float32, each term is exact to float32 precision.

    Returns:
        The stacked factors in `dtype`, of rank `sum_i rank_i`.

    Raises:
        ValueError: If there are no matrices, their shapes differ, or there is not one weight per
            matrix.

    Source:
        FLoRA, arXiv 2409.05976, section 3: stacking is the noise-free sum.
    """
    weights = [float(w) for w in weights]
    if not matrices or len(matrices) != len(weights):
        raise ValueError(
            f"weighted_sum needs one weight per matrix; got {len(matrices)} matrices, "
            f"{len(weights)} weights"
        )
    shapes = {m.shape for m in matrices}
    if len(shapes) > 1:
        raise ValueError(f"weighted_sum needs matrices of one shape; got {sorted(shapes)}")
    out_size, in_size = matrices[0].shape
    rank = sum(m.rank for m in matrices)
    B = torch.empty(out_size, rank, dtype=dtype, device=matrices[0].device)
    A = torch.empty(rank, in_size, dtype=dtype, device=matrices[0].device)
    start = 0
    for m, w in zip(matrices, weights, strict=True):
        end = start + m.rank
        torch.mul(m.B.to(dtype), w, out=B[:, start:end])
        A[start:end].copy_(m.A)
        start = end
    return LowRank(B, A)


def difference(left: LowRank, right: LowRank) -> LowRank:
    """Return `left - right` as stacked factors in float64, of rank `left.rank + right.rank`."""
    return weighted_sum([left, right], [1.0, -1.0])


def numerical_rank(S: Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> int:
    """Count the descending singular values above `S[0] * max(shape) * eps(dtype)`.

    The threshold is that of NumPy's `matrix_rank`: smaller values are round-off in a matrix stored
    as `dtype`.
    """
    values = S.tolist()
    threshold = max(values, default=0.0) * max(shape) * torch.finfo(dtype).eps
    return sum(value > threshold for value in values) if threshold > 0 else 0


def energy_rank(S: Tensor, energy: float) -> int:
    """Return how many leading singular values hold a fraction `energy` of the sum of squares."""
    squares = S.square().cumsum(0)
    if len(S) == 0 or squares[-1] <= 0:
        return 0
    return min(int((squares < energy * squares[-1]).sum()) + 1, len(S))
