"""The leading directions of a weighted sum of factored matrices, and exactly what they leave, near what reading costs.

A Gram matrix squares the condition of what it is made of. A QR decomposition does not, and takes some ten times as
long. So the cheap way is taken where a bound says that it is good enough, and the dear one elsewhere. Whichever it is,
the rest is the sum minus what was taken out, by construction: nothing is lost, however well the directions were found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedmomentum.lowrank import CHUNK, CORE_DTYPE, LowRank, gram, numerical_rank
from fedmomentum.sums import Matrix, exact_sum, norm, plus, strongest

# How much worse than the best of its rank the directions may be, as a share of the best's error ...
SLACK = 4e-5
# ... or of the whole sum, where the best leaves next to nothing: half the step of float32.
FLOOR = 6e-8
# The norms of the factors over that of their product: beyond it the parts cancel, and float32 loses digits of the sum.
MAX_CANCELLATION = 16.0
# Power iteration finds a norm from below: its steps, and by how much it may be short.
POWERS = 4
SAFETY = 2.0


@dataclass(frozen=True, eq=False)
class Leading:
    """`sum_i w_i B_i A_i = U diag(S) Vh + rest`.

    Attributes:
        U: `(out, m)`, orthonormal columns, float64.
        S: `(m,)`, descending, all above round-off, float64.
        Vh: `(m, in)`, orthonormal rows, float64.
        rest: the remainder, in the dtype asked for: factored, its rank the sum of the ranks minus m or less, or dense
            where the sum is and not all of its directions were looked for.
        energy: `||sum_i w_i B_i A_i||_F^2`.
        left: `||rest||_F^2`.
        path: how it was found: `gram32`, `gram64`, `dense` or `svd`.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    rest: Matrix
    energy: float
    left: float
    path: str


def leading(
    matrices: Sequence[LowRank],
    weights: Sequence[float] | Tensor,
    rank: int,
    *,
    also: Sequence[Matrix] = (),
    dtype: torch.dtype,
    reference: LowRank | None = None,
    generator: torch.Generator | None = None,
) -> Leading:
    r"""The best approximation of rank at most `rank` of `sum_i w_i B_i A_i`, and what it leaves.

    With the stack `B = [w_1 B_1, ...]` `(out, R)`, `A = [A_1; ...]` `(R, in)`:

    - `gram32`, `gram64`: `A A^T = L L^T`, `L^T (B^T B) L = Z diag(S^2) Z^T`, all R x R; `U S = B L Z_r`,
      `V^T = Z_r^T L^-1 A`. In float32 where the factors are so well conditioned that the bound below holds, else in
      float64. `O((d + k) R^2)`, once, and `O((d + k) R r)` for the rest.
    - `dense`: R is so large that the dense sum is the smaller form. Subspace iteration on it, warm from
      `reference`.
    - `svd`: `LowRank.svd`, for float64, for parts that cancel, for sums of less than full rank, and wherever a bound
      fails.

    The directions are those of a sum that differs from the true one by at most p, so that
    `||sum - U S V^T|| <= best + 2 p`; a path is taken where `p <= SLACK best` or `p <= FLOOR ||sum||`.

    Args:
        matrices: n matrices of one shape.
        weights: n finite numbers.
        rank: how many directions, at least 1.
        also: more matrices of that shape, each with factor 1.
        dtype: float32 or float64; that of `rest`, and what the tall products may be made in.
        reference: a matrix whose row space is near the wanted one; only a start, the result does not depend on it
            beyond the bound.
        generator: draws the rest of that start.

    Raises:
        ValueError: see `weighted_sum`; a factor holds NaN or Inf.

    Source:
        Fukaya et al., Shifted Cholesky QR, arXiv 1809.11085, for what a Gram matrix can bear; Halko, Martinsson, Tropp,
        arXiv 0909.4061, section 9, for the projected approximation.
    """
    total = exact_sum(matrices, weights, also, dtype=dtype)
    if isinstance(total, Tensor):
        return _of_dense(total, rank, dtype, reference, generator)
    if dtype == CORE_DTYPE:
        return _by_svd(total, rank, dtype)
    for core in (torch.float32, torch.float64):
        if rank < total.rank and (found := _by_gram(total, rank, core)):
            return found
    again = exact_sum(matrices, weights, also)
    assert isinstance(again, LowRank)  # as `total` is
    return _by_svd(again, rank, dtype)


def _of_dense(
    delta: Tensor, rank: int, dtype: torch.dtype, reference: LowRank | None, generator: torch.Generator | None
) -> Leading:
    generator = generator or torch.Generator().manual_seed(0)
    shape = delta.shape[0], delta.shape[1]
    U, S, Vh, beyond = strongest(delta, rank, generator, near=reference)
    m = min(rank, numerical_rank(S, shape))
    others = _components(U, S, Vh, m, numerical_rank(S, shape, CORE_DTYPE))
    rest = others if beyond is None else plus(beyond, others)
    left = norm(rest) ** 2
    energy = float(S[:m].square().sum()) + left
    return Leading(U[:, :m], S[:m], Vh[:m], rest.to(dtype), energy, left, "dense")


def _by_svd(total: LowRank, rank: int, dtype: torch.dtype) -> Leading:
    U, S, Vh = total.svd()
    held = numerical_rank(S, total.shape, CORE_DTYPE)  # below it is round-off of the core itself
    m = min(rank, numerical_rank(S, total.shape))
    rest = _components(U, S, Vh, m, held).to(dtype)
    squares = S.square()
    return Leading(U[:, :m], S[:m], Vh[:m], rest, float(squares.sum()), float(squares[m:].sum()), "svd")


def _components(U: Tensor, S: Tensor, Vh: Tensor, start: int, end: int) -> LowRank:
    """The singular directions from `start` to `end`."""
    root = S[start:end].sqrt()  # on both sides: the product of two small factors may be too small for float32
    return LowRank(U[:, start:end] * root, root[:, None] * Vh[start:end])


# ── by Gram matrices ──


def _by_gram(total: LowRank, rank: int, dtype: torch.dtype) -> Leading | None:
    """None where the bound does not hold in `dtype`."""
    eps = math.sqrt(total.rank) * torch.finfo(dtype).eps  # of a Gram matrix, relative: round-off adds like noise
    if dtype == torch.float32 and total.shape[1] > 8 * total.rank:
        # a few columns tell at an eighth of the cost whether float32 would be tried in vain; they count for no more
        if eps * _factored(gram(total.A[:, : 4 * total.rank])).condition > 2 * SLACK:
            return None
    G_A = gram(total.A, dtype)
    if not _is_normal(G_A.diagonal()):
        return None
    of_A = _factored(G_A)
    G_A, L, sizes = of_A.C, of_A.L, of_A.sizes
    if not eps * of_A.condition <= SLACK:  # p cannot hold, whatever B is
        return None
    G_B = gram(total.B.mT, dtype)
    if not _is_normal(G_B.diagonal()):
        return None
    G_B = G_B * sizes * sizes[:, None]  # the rows of A are taken at unit length, and their lengths to B
    of_B = _factored(G_B)
    energy = float((G_A * G_B).sum(dtype=CORE_DTYPE))
    size = of_A.norm * of_B.norm * float(of_B.sizes.max())  # ||A|| ||B||
    p = eps * size * (of_A.condition + of_B.condition)
    if not p <= SLACK * math.sqrt(max(energy, 0.0)) or size > MAX_CANCELLATION * math.sqrt(energy):
        return None
    squares, Z = torch.linalg.eigh(L.mT @ G_B @ L)  # ascending
    squares = squares[-rank:].flip(0).to(CORE_DTYPE).clamp(min=0)
    left = max(energy - float(squares.sum()), 0.0)
    if not p <= max(SLACK * math.sqrt(left), FLOOR * math.sqrt(energy)):
        return None
    if numerical_rank(squares.sqrt(), total.shape) < rank:
        return None
    Z = torch.linalg.qr(Z[:, -rank:].flip(1).to(CORE_DTYPE)).Q  # (R, rank)
    L, sizes = L.to(CORE_DTYPE), sizes[:, None].to(CORE_DTYPE)
    Y = torch.linalg.solve_triangular(L.mT, Z, upper=True) / sizes  # V^T = Y^T A
    X = sizes * (L @ Z)  # U S = B X; Y^T X = I
    W, V = _product(X.mT.to(dtype), total.B.mT).mT, _product(Y.mT.to(dtype), total.A)
    rest = _deflated(total, Y, X.to(total.dtype), V.to(total.dtype))
    path = "gram32" if dtype == torch.float32 else "gram64"
    return Leading(*_orthonormal(W, V), rest, energy, left, path)


def _is_normal(squares: Tensor, reach: float = 1e64) -> bool:
    """Whether the greatest of these squared norms is far from where float32 numbers lose digits."""
    return 1 / reach < float(squares.max()) < reach


def _product(left: Tensor, rows: Tensor) -> Tensor:
    """`left rows`, `(m, R)` times `(R, size)`, in the dtype of `left`; other rows are cast a piece at a time."""
    if left.dtype == rows.dtype:
        return left @ rows
    return torch.cat([left @ rows[:, i : i + CHUNK].to(left.dtype) for i in range(0, rows.shape[1], CHUNK)], dim=1)


class _Factored(NamedTuple):
    """Of the Gram matrix of some factors at unit length: itself, `C = L L^T`, and the factors' lengths.

    `norm` and `condition` are those of the factors, `sqrt(||C||)` and `sqrt(||C|| ||C^-1||)`: by power iteration, and
    with `SAFETY` for what that underestimates. The condition is infinite where C is singular.
    """

    C: Tensor
    L: Tensor
    sizes: Tensor
    norm: float
    condition: float


def _factored(G: Tensor) -> _Factored:
    sizes = G.diagonal().sqrt()
    reach = 1e24 if G.dtype == torch.float32 else 1e200  # of the squares themselves
    if not _is_normal(G.diagonal(), reach) or not bool((sizes > 0).all()):
        return _Factored(G, G, sizes, math.inf, math.inf)
    C = G / sizes / sizes[:, None]
    L, failed = torch.linalg.cholesky_ex(C)
    if int(failed):
        return _Factored(C, L, sizes, math.inf, math.inf)
    top, inverse = _top(lambda x: C @ x, C), _top(lambda x: torch.cholesky_solve(x, L), C)
    return _Factored(C, L, sizes, SAFETY * math.sqrt(top), SAFETY * math.sqrt(top * inverse))


def _top(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """The greatest eigenvalue of a positive matrix, from below: power iteration of a few columns at once."""
    drawn = torch.randn(len(like), 8, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    x = drawn.to(like)
    for _ in range(POWERS):
        x = apply(x / torch.linalg.vector_norm(x))
    return float(torch.linalg.vector_norm(x))


def _orthonormal(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of `W V`, `(out, m)` times `(m, in)`, whose columns and rows are orthogonal but for round-off."""
    W, V = W.to(CORE_DTYPE), V.to(CORE_DTYPE)
    sizes = W.norm(dim=0)
    W = W / sizes
    L_W, L_V = torch.linalg.cholesky(W.mT @ W), torch.linalg.cholesky(V @ V.mT)
    P, S, Qh = torch.linalg.svd(L_W.mT * sizes @ L_V)
    U = W @ torch.linalg.solve_triangular(L_W.mT, P, upper=True)
    return U, S, torch.linalg.solve_triangular(L_V, Qh, upper=False, left=False) @ V


def _deflated(total: LowRank, Y: Tensor, X: Tensor, V: Tensor) -> LowRank:
    r"""`B A - (B X)(Y^T A)` in `R - m` components instead of `R`, for `V = Y^T A` and `Y^T X = I`.

    `A' = A - X V` has `Y^T A' = 0`: the rows K of A', m of them, are `-Y_K^-T Y_J^T A'_J`, so that

        B A' = (B_J - B_K Y_K^-T Y_J^T)(A_J - X_J V).

    K is where Gaussian elimination with partial pivoting finds its pivots in Y: then `Y_K^-T Y_J^T` is small. The
    result is made within the memory of `total`, which is used up: new memory costs as much as the product.
    """
    keep = total.rank - Y.shape[1]
    K, J = _pivots(Y)
    moved = J != torch.arange(keep, device=J.device)
    T = torch.linalg.solve(Y[K].mT, Y[J].mT).to(total.dtype)  # (m, R - m)
    B_K = total.B[:, K]
    for factor in (total.B.mT, total.A, X):
        factor[:keep][moved] = factor[J[moved]]
    B, A = total.B[:, :keep], total.A[:keep]
    return LowRank(B.addmm_(B_K, T, alpha=-1), A.addmm_(X[:keep], V, alpha=-1))


def _pivots(Y: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `(R, m)` that elimination takes as pivots, and the others: in order, but for the last ones.

    The others are `0, ..., R - m - 1`, with those of them that are pivots replaced by what is no pivot beyond.
    """
    order, m = list(range(len(Y))), Y.shape[1]
    for i, pivot in enumerate(torch.linalg.lu_factor(Y).pivots.tolist()):
        order[i], order[pivot - 1] = order[pivot - 1], order[i]
    chosen, keep = set(order[:m]), len(Y) - m
    spare = iter([i for i in range(keep, len(Y)) if i not in chosen])
    others = [next(spare) if i in chosen else i for i in range(keep)]
    K, J = (torch.tensor(rows, device=Y.device) for rows in (order[:m], others))
    return K, J
