"""`LowRank(B, A)`: the matrix B @ A kept as its two factors, and the algebra that never forms it.

With `d, k` the shape of the matrix and `R` its rank, everything here costs O((d + k) R^2 + R^3) time and
O((d + k) R) memory instead of O(d k min(d, k)). The core runs in float64 whatever the factors' dtype: half
precision factors are read as they are, float32 ones come back as float32, float64 stays float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CORE_DTYPE = torch.float64
# A square that is so much smaller than what it is summed of has lost four of its sixteen digits, or two of seven.
MAX_LOSS = {torch.float64: 1e4, torch.float32: 1e2}
# Columns that are cast at a time.
CHUNK = 1024


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix `B @ A` of rank at most `rank`, kept factored.

    Args:
        B: `(out, rank)`, the up-projection (`lora_B`).
        A: `(rank, in)`, the down-projection (`lora_A`).

    Raises:
        ValueError: the factors are not matrices, their inner sizes differ, or they differ in dtype or device.

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
        """Check the factors once, here; nothing below checks them again."""
        B, A = self.B, self.A
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
            raise ValueError(f"B must be (out, rank) and A (rank, in); got B {tuple(B.shape)} and A {tuple(A.shape)}")
        if B.dtype != A.dtype or B.device != A.device:
            raise ValueError(
                f"B and A must share dtype and device; got B {B.dtype} on {B.device}, A {A.dtype} on {A.device}"
            )

    @property
    def rank(self) -> int:
        """Number of columns of B; an upper bound of the matrix rank."""
        return self.B.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the matrix."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The factors' dtype."""
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        """The factors' device."""
        return self.B.device

    def __repr__(self) -> str:
        """Shape, rank and dtype; never the numbers."""
        return f"LowRank({self.shape[0]}x{self.shape[1]}, rank {self.rank}, {str(self.dtype)[6:]})"

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same matrix with both factors cast to `dtype`."""
        return LowRank(self.B.to(dtype), self.A.to(dtype))

    def dense(self) -> Tensor:
        """The `(out, in)` matrix, formed on purpose."""
        return self.B @ self.A

    def scaled(self, factor: float) -> LowRank:
        """`factor * B @ A`; the factor goes to B."""
        return LowRank(self.B * factor, self.A)

    def inner(self, other: LowRank, dtype: torch.dtype = CORE_DTYPE) -> float:
        r"""Frobenius inner product `<B A, B' A'> = sum((B^T B') * (A A'^T))`; the tall products are made in `dtype`."""
        if self.shape != other.shape:
            raise ValueError(f"inner product of a {self.shape} with a {other.shape} matrix")
        BtB = self.B.to(dtype).mT @ other.B.to(dtype)
        AAt = self.A.to(dtype) @ other.A.to(dtype).mT
        return float((BtB * AAt).sum(dtype=CORE_DTYPE))

    def norm(self, dtype: torch.dtype = CORE_DTYPE) -> float:
        """Frobenius norm; in float32, a third of the time, five digits of it are good.

        `sqrt(inner(self, self))` where nothing cancels. That square loses every norm below 1e-8 of the factors' own
        size, and a difference of two close matrices has such a norm: it is taken through the triangular factors.
        """
        if self.rank == 0:
            return 0.0
        if self.rank >= min(self.shape):
            return float(torch.linalg.matrix_norm(self.to(CORE_DTYPE).dense()))
        G_B, G_A = gram(self.B.mT, dtype), gram(self.A, dtype)
        square, size = float((G_B * G_A).sum(dtype=CORE_DTYPE)), float(G_B.norm()) * float(G_A.norm())
        if MAX_LOSS[dtype] * square > size > torch.finfo(dtype).tiny:
            return math.sqrt(square)
        if dtype != CORE_DTYPE:
            return self.norm()
        B, A = self.B.to(CORE_DTYPE), self.A.to(CORE_DTYPE)
        return float(torch.linalg.matrix_norm(torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Exact thin SVD `B A = U diag(S) Vh` without forming the matrix, in float64.

        `B = Q_b R_b`, `A^T = Q_a R_a`, `R_b R_a^T = U' diag(S) V'^T`, `U = Q_b U'`, `V = Q_a V'`; same singular
        values and vectors (up to their usual freedom) as `torch.linalg.svd(B @ A, full_matrices=False)`. Where
        the rank is not below both sides of the matrix, the dense SVD is the cheaper one and is taken.

        Returns:
            U `(out, m)`, S `(m,)` descending, Vh `(m, in)`, with `m = min(rank, out, in)`.

        Raises:
            ValueError: a factor holds NaN or Inf.
        """
        B, A = self.B.to(CORE_DTYPE), self.A.to(CORE_DTYPE)
        if not math.isfinite(float(B.sum()) + float(A.sum())):  # a sum keeps every NaN and Inf
            raise ValueError(f"the factors of {self!r} hold NaN or Inf; find out which client sent them")
        if self.rank == 0:
            return B.new_zeros(self.shape[0], 0), B.new_zeros(0), B.new_zeros(0, self.shape[1])
        if self.rank >= min(self.shape):
            U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
            return U, S, Vh
        Q_b, R_b = torch.linalg.qr(B)  # (out, R), (R, R)
        Q_a, R_a = torch.linalg.qr(A.mT)  # (in, R), (R, R)
        U, S, Vh = torch.linalg.svd(R_b @ R_a.mT)
        return Q_b @ U, S, Vh @ Q_a.mT

    def recompress(self, *, rank: int | None = None, energy: float = 1.0) -> LowRank:
        """The best approximation of the least rank that keeps `energy`, and of at most `rank` (Eckart-Young).

        Args:
            rank: the largest rank of the result; no bound by default.
            energy: share of the squared singular values to keep, in (0, 1]. 1 keeps all but what is below
                round-off (`numerical_rank`).

        Returns:
            `LowRank(U S, Vh)` in this matrix's dtype.
        """
        U, S, Vh = self.svd()
        keep = energy_rank(S, energy) if energy < 1 else numerical_rank(S, self.shape, CORE_DTYPE)
        keep = keep if rank is None else min(rank, keep)
        return from_svd(U[:, :keep], S[:keep], Vh[:keep], _out_dtype(self.dtype))


def gram(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`rows rows^T` `(n, n)` by its upper blocks: five eighths of the product's work.

    In `dtype`, or that of `rows`; `(n, size)` rows of another dtype are cast a piece at a time, which stays in cache.
    """
    (n, size), dtype = rows.shape, dtype or rows.dtype
    step, width = max(n if n <= 128 else -(-n // 4), 1), size if rows.dtype == dtype else CHUNK
    G = torch.zeros(n, n, dtype=dtype, device=rows.device)
    for start in range(0, size, max(width, 1)):
        piece = rows[:, start : start + width].to(dtype)
        for i in range(0, n, step):
            G[i : i + step, i:].addmm_(piece[i : i + step], piece[i:].mT)
    for i in range(0, n, step):
        G[i + step :, i : i + step] = G[i : i + step, i + step :].mT
    return G


def _out_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is an input format only: results are float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def from_svd(U: Tensor, S: Tensor, Vh: Tensor, dtype: torch.dtype) -> LowRank:
    """`LowRank(U diag(S), Vh)`, cast to `dtype`; all singular values on the B side."""
    return LowRank((U * S).to(dtype), Vh.to(dtype))


def zeros(shape: tuple[int, int], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> LowRank:
    """The zero matrix of `shape` at rank 0."""
    return LowRank(
        torch.zeros(shape[0], 0, dtype=dtype, device=device),
        torch.zeros(0, shape[1], dtype=dtype, device=device),
    )


def weighted_sum(
    matrices: Sequence[LowRank], weights: Sequence[float] | Tensor, *, dtype: torch.dtype = CORE_DTYPE
) -> LowRank:
    r"""The exact sum `sum_i w_i B_i A_i = [w_1 B_1, ..., w_n B_n] [A_1; ...; A_n]`, of rank `sum_i rank_i`.

    Nothing is computed but `w_i B_i`; `recompress`, `svd` or `leading` do the work when it is wanted.

    Args:
        matrices: n matrices of one shape, of any ranks and floating dtypes.
        weights: n finite numbers, of any sign; not normalised here.
        dtype: what to stack in; in float32 each part is as exact as float32 numbers are.

    Returns:
        The stacked factors, in `dtype`.

    Raises:
        ValueError: no matrices, shapes that differ, or another number of weights.

    Source:
        FLoRA, arXiv 2409.05976, section 3: stacking is the noise-free sum.
    """
    weights = weights.tolist() if isinstance(weights, Tensor) else [float(w) for w in weights]
    if not matrices or len(matrices) != len(weights):
        raise ValueError(
            f"weighted_sum needs one weight a matrix; got {len(matrices)} matrices, {len(weights)} weights"
        )
    shapes = {m.shape for m in matrices}
    if len(shapes) > 1:
        raise ValueError(f"weighted_sum needs matrices of one shape; got {sorted(shapes)}")
    (out_size, in_size), rank = matrices[0].shape, sum(m.rank for m in matrices)
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
    """`left - right`, stacked, in float64; rank `left.rank + right.rank`."""
    return weighted_sum([left, right], [1.0, -1.0])


def relative_error(got: LowRank, wanted: LowRank) -> float:
    """`||got - wanted||_F / ||wanted||_F`; infinite where only `wanted` is zero, 0 where both are."""
    error, size = difference(got, wanted).norm(), wanted.norm()
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)


def randomised_svd(matrix: LowRank | Tensor, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The published randomised SVD of the dense sum: for comparison, `LowRank.svd` is exact and faster.

    `Delta` is formed densely in float32, sketched by a Gaussian `Omega (in, width)` without power iteration,
    `Q = qr(Delta Omega)`, and `Q^T Delta` is decomposed. With `width >= rank(Delta)` it is exact up to
    float32 round-off.

    Args:
        matrix: the matrix `Delta`, `(out, in)`, in factors or as it is.
        width: columns of the sketch; the paper takes the sum of the clients' ranks.
        generator: draws `Omega`.

    Returns:
        U `(out, m)`, S `(m,)`, Vh `(m, in)` in float64, `m = min(width, out, in)`.

    Source:
        FedMomentum, arXiv 2603.08014, aggregation step; Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.1.
    """
    delta = matrix.to(torch.float32)
    delta = delta.dense() if isinstance(delta, LowRank) else delta
    width = min(width, *matrix.shape)
    omega = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float32).to(delta.device)
    Q = torch.linalg.qr(delta @ omega).Q  # (out, width)
    U, S, Vh = torch.linalg.svd(Q.mT @ delta, full_matrices=False)
    return (Q @ U).to(CORE_DTYPE), S.to(CORE_DTYPE), Vh.to(CORE_DTYPE)


def numerical_rank(S: Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> int:
    """How many of the descending singular values stand above `S[0] * max(shape) * eps(dtype)`.

    NumPy's `matrix_rank` uses the same threshold: below it a value is round-off of a matrix held in `dtype`.
    """
    values = S.tolist()
    limit = max(values, default=0.0) * max(shape) * torch.finfo(dtype).eps
    return sum(value > limit for value in values) if limit > 0 else 0


def energy_rank(S: Tensor, energy: float) -> int:
    """The least number of leading singular values whose squares reach `energy` of the whole."""
    squares = S.square().cumsum(0)
    if len(S) == 0 or squares[-1] <= 0:
        return 0
    return min(int((squares < energy * squares[-1]).sum()) + 1, len(S))


def principal_angles(left: LowRank, right: LowRank) -> tuple[Tensor, Tensor]:
    """Angles between the row spaces of two matrices, and between their column spaces.

    The spaces are those of the numerically non-zero directions; the angles are those of
    `scipy.linalg.subspace_angles`, in ascending order.

    Returns:
        Twice `(min(rank, rank'),)` angles in radians, in [0, pi/2], float64.

    Source:
        Björck, Golub, Numerical methods for computing angles between linear subspaces, 1973; Knyazev,
        Argentati, SIAM J. Sci. Comput. 23, 2002: sines below 45 degrees, where cosines lose digits.
    """
    (columns, rows), (other_columns, other_rows) = _spaces(left), _spaces(right)
    return _angles([rows, other_rows]), _angles([columns, other_columns])


def _spaces(matrix: LowRank) -> tuple[Tensor, Tensor]:
    """Orthonormal columns that span the column space, and the row space."""
    if 0 < matrix.rank < min(matrix.shape):
        Q_b, R_b = torch.linalg.qr(matrix.B.to(CORE_DTYPE))
        Q_a, R_a = torch.linalg.qr(matrix.A.mT.to(CORE_DTYPE))
        S = torch.linalg.svdvals(R_b @ R_a.mT)
        if numerical_rank(S, matrix.shape) == matrix.rank:  # then that of each factor
            return Q_b, Q_a
    U, S, Vh = matrix.svd()
    keep = numerical_rank(S, matrix.shape)
    return U[:, :keep], Vh[:keep].mT


def _angles(bases: Sequence[Tensor]) -> Tensor:
    P, Q = sorted(bases, key=lambda basis: basis.shape[1], reverse=True)  # dim P >= dim Q
    cosines = torch.linalg.svdvals(P.mT @ Q).clamp(max=1)
    sines = torch.linalg.svdvals(Q - P @ (P.mT @ Q)).clamp(max=1).flip(0)
    return torch.where(cosines.square() >= 0.5, sines.asin(), cosines.acos())
