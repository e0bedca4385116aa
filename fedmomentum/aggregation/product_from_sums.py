r"""The exact weighted mean of products, from just two sums of vectors.

A masked sum adds vectors, but `sum_i N_i B_i A_i` cannot be computed from sums of the factors. Let
all clients start from `(B_0, A_0)`, `b_i = B_i - B_0`, `a_i = A_i - A_0`, means weighted by
`N_i / N`::

    mean(B A) = (B_0 + b)(A_0 + a) + mean((b_i - b)(a_i - a)),        b = mean(b_i), a = mean(a_i)

The first sum yields N, b, a, and a sketch of the last term, the cross term. The second sum projects
the cross term onto the sketch's range Q. Each client keeps what Q misses, as feedback f_i for the
next round::

    sum 1     N_i,  N_i b_i,  N_i a_i,  (N_i b_i a_i + N' f_i) Omega
    server    Q = orth(sum/N - b a Omega)
    sum 2     Q^T (N_i (b_i - b)(a_i - a) + N f_i)
    result    (B_0 + b)(A_0 + a) + Q sum/N
    client    f_i <- (I - Q Q^T) ((N_i/N) (b_i - b)(a_i - a) + f_i)

So the result plus all new `f_i` equals the mean plus all old `f_i`, for any Q and any set of
clients. The `f_i` are in units of the model, so their meaning does not depend on N. N is not yet
known in the first sum; N' is a guess, such as the previous round's N, that affects only Q. A client
that drops out between the sums keeps its whole cross term, as if Q had no columns.

Scalings do not appear here: either factors are in effective units, or the result is multiplied by
the clients' common scaling.

Source:
    The two-pass sketch is from FedASK, arXiv 2507.09990, which has no masks, no feedback and no
    residual.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank
from fedmomentum.linalg.matrix import Matrix, scale
from fedmomentum.linalg.weighted_sum import exact_sum


@dataclass(frozen=True, eq=False)
class ClientChange:
    """How one client changed one module's factors in one round, in float64.

    Attributes:
        num_examples: Its weight `N_i`.
        b: `(out, r)`, the change of B.
        a: `(r, in)`, the change of A.
        feedback: The part of its earlier cross terms that the model still lacks; None if nothing.
    """

    num_examples: int
    b: Tensor
    a: Tensor
    feedback: Matrix | None = None

    @classmethod
    def of(
        cls, start: LowRank, trained: LowRank, num_examples: int, feedback: Matrix | None = None
    ) -> ClientChange:
        """Return the difference between the factors that a client trained and those it was sent.

        Raises:
            ValueError: If the factors differ in shape.
        """
        if start.shape != trained.shape or start.rank != trained.rank:
            raise ValueError(f"changes from {start!r} to {trained!r}, which is of another shape")
        b = trained.B.to(CORE_DTYPE) - start.B.to(CORE_DTYPE)
        a = trained.A.to(CORE_DTYPE) - start.A.to(CORE_DTYPE)
        return cls(num_examples, b, a, feedback)


@dataclass(frozen=True, eq=False)
class FirstTerms:
    """What the first sum adds up: one client's terms, or the total.

    Attributes:
        num_examples: `N_i`.
        b: `(out, r)`, `N_i b_i`.
        a: `(r, in)`, `N_i a_i`.
        sketch: `(out, c)`, `(N_i b_i a_i + N' f_i) Omega`.
    """

    num_examples: int
    b: Tensor
    a: Tensor
    sketch: Tensor


@dataclass(frozen=True, eq=False)
class MeanChange:
    """The outcome of the first sum for one module, which the server sends to the clients.

    Server and clients must compute with the same numbers: if they are sent at lower precision, the
    server rounds them before using them. Q need not be orthonormal for the result to be exact.

    Attributes:
        num_examples: N, of all clients in the first sum.
        b: `(out, r)`, the mean change of B.
        a: `(r, in)`, the mean change of A.
        Q: `(out, c)`, orthonormal, the range in which cross terms are summed.
    """

    num_examples: int
    b: Tensor
    a: Tensor
    Q: Tensor


@dataclass(frozen=True, eq=False)
class MeanChanges:
    """The outcome of the first sum, over all modules.

    Attributes:
        num_examples: The total number of examples of the clients included.
        modules: Module to the mean change.
        saved: Name of each fully trained tensor to its mean change.
    """

    num_examples: int
    modules: Mapping[str, MeanChange]
    saved: Mapping[str, Tensor]


def sketch_matrix(module: str, in_size: int, width: int, seed: int) -> Tensor:
    """Sample the matrix Omega of one module, the same on every machine.

    Args:
        module: Name of the module.
        in_size: The module's input size.
        width: The number c of columns.
        seed: Seed of the round's sketches, which is public.

    Returns:
        `(in, width)`, float64.
    """
    digest = hashlib.sha256(f"{seed}/sketch/{module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(in_size, width, generator=generator, dtype=CORE_DTYPE)


def first_terms(
    change: ClientChange, omega: Tensor, expected_examples: int, feedback_limit: float = math.inf
) -> FirstTerms:
    """Return what a client adds to the first sum.

    Args:
        change: How the client changed the factors.
        omega: `(in, c)`.
        expected_examples: N', approximately the round's total number of examples.
        feedback_limit: The largest magnitude that feedback may add to an element of the sketch;
            larger feedback is scaled down.
    """
    N_i = change.num_examples
    sketch = N_i * (change.b @ (change.a @ omega))
    if change.feedback is not None:
        returned = expected_examples * _times(change.feedback, omega)
        sketch += _scale_to_limit(returned, feedback_limit) * returned
    return FirstTerms(N_i, N_i * change.b, N_i * change.a, sketch)


def mean_change(total: FirstTerms, omega: Tensor) -> MeanChange:
    """Return the means, and the range of the cross terms, from the first sum.

    Q has as many columns as the shorter side of the sketch; columns beyond the rank of the sketch
    are arbitrary directions, which do no harm.
    """
    # The sketch of mean(b_i a_i) minus that of b a is the sketch of the cross term.
    N = total.num_examples
    b = total.b / N
    a = total.a / N
    sketch = total.sketch / N - b @ (a @ omega)
    return MeanChange(N, b, a, torch.linalg.qr(sketch).Q)


def second_terms(
    change: ClientChange, mean: MeanChange, feedback_limit: float = math.inf
) -> Tensor:
    """Return what a client adds to the second sum: `(c, in)`.

    Args:
        change: How the client changed the factors.
        mean: The first sum's outcome.
        feedback_limit: The largest magnitude that feedback may add to an element; larger feedback
            is scaled down, and `next_feedback`, with the same limit, keeps the rest.
    """
    # N is known now, so feedback has its full effect whatever the other clients' weights.
    cross = _cross_factors(change, mean)
    terms = change.num_examples * ((mean.Q.mT @ cross.B) @ cross.A)
    if change.feedback is not None:
        returned = mean.num_examples * _left_times(mean.Q, change.feedback)
        terms += _scale_to_limit(returned, feedback_limit) * returned
    return terms


def combine_sums(
    start: LowRank, mean: MeanChange, second: Tensor | None
) -> tuple[LowRank, LowRank]:
    """Return the two parts of the result: the product of mean factors, and the cross term.

    Args:
        start: What the clients started from.
        mean: The first sum's outcome.
        second: `(c, in)`, the second sum; None if there was none, so that clients keep all cross
            terms.
    """
    factors = LowRank(start.B.to(CORE_DTYPE) + mean.b, start.A.to(CORE_DTYPE) + mean.a)
    if second is None:
        return factors, LowRank(mean.Q[:, :0], mean.a[:0])
    return factors, LowRank(mean.Q, second / mean.num_examples)


def stand_ins(
    factors: LowRank, cross: LowRank, num_pairs: int | None = None
) -> tuple[list[LowRank], Tensor]:
    """Return updates with the same mean factors and the same mean product as the clients'.

    A method that depends only on these means gives the same result as with the clients' updates.
    The stand-ins come in pairs `(B + x, A + y)`, `(B - x, A - y)`: x and y cancel in the mean
    factors, and their product remains in the mean product.

    Args:
        factors: The mean factors B and A, of rank r.
        cross: The mean product minus the product of the mean factors, of rank c.
        num_pairs: The number of pairs; by default the fewest that hold the cross term,
            `ceil(c / r)`.

    Returns:
        Updates of rank r (two per pair, or a single one if there are no pairs), and their weights,
        summing to 1.

    Raises:
        ValueError: If the pairs cannot hold the cross term.
    """
    r = factors.rank
    if num_pairs is None:
        num_pairs = -(-cross.rank // r)
    if cross.rank > num_pairs * r:
        raise ValueError(f"{num_pairs} pairs of rank {r} do not hold a cross term {cross!r}")
    if not num_pairs:
        return [factors], torch.ones(1, dtype=CORE_DTYPE)
    # Zeros pad the last pair to rank r. Balanced factors keep x and y similar in size.
    padding = num_pairs * r - cross.rank
    balanced = cross.canonical()
    X = torch.nn.functional.pad(balanced.B, (0, padding)) * num_pairs**0.5
    Y = torch.nn.functional.pad(balanced.A, (0, 0, 0, padding)) * num_pairs**0.5
    # One pair for every r components.
    updates = []
    for start in range(0, num_pairs * r, r):
        x = X[:, start : start + r]
        y = Y[start : start + r]
        updates.append(LowRank(factors.B + x, factors.A + y))
        updates.append(LowRank(factors.B - x, factors.A - y))
    return updates, torch.full((2 * num_pairs,), 0.5 / num_pairs, dtype=CORE_DTYPE)


def next_feedback(
    change: ClientChange,
    mean: MeanChange,
    *,
    in_second_sum: bool,
    feedback_limit: float = math.inf,
) -> Matrix:
    """Return the part of a client's cross terms that the model lacks after the round, in float64.

    Called once for each client included in the first sum. Any other client keeps its feedback
    unchanged.

    Args:
        change: How the client changed the factors, with the feedback from before the round.
        mean: The first sum's outcome.
        in_second_sum: Whether its terms are in the second sum too.
        feedback_limit: The limit passed to `second_terms`.

    Returns:
        Factored, or dense if that is smaller.
    """
    cross = [_cross_factors(change, mean)]
    weights = [change.num_examples / mean.num_examples]
    before = change.feedback
    if not in_second_sum:
        return exact_sum(cross, weights, [] if before is None else [before])
    if before is None:
        return _outside(exact_sum(cross, weights), mean.Q)
    # The model now contains the returned feedback, except for its part outside of Q.
    scale_factor = _scale_to_limit(mean.num_examples * _left_times(mean.Q, before), feedback_limit)
    returned = scale(before, scale_factor, CORE_DTYPE)
    missing = _outside(exact_sum(cross, weights, [returned]), mean.Q)
    if scale_factor == 1:
        return missing
    return exact_sum([], [], [missing, scale(before, 1 - scale_factor, CORE_DTYPE)])


def _outside(matrix: Matrix, Q: Tensor) -> Matrix:
    """Return `(I - Q Q^T) matrix`."""
    if isinstance(matrix, LowRank):
        return LowRank(matrix.B - Q @ (Q.mT @ matrix.B), matrix.A)
    return matrix - Q @ (Q.mT @ matrix)


def _scale_to_limit(terms: Tensor, limit: float) -> float:
    """Return the largest factor, at most 1, that scales all elements to within the limit."""
    largest = float(terms.abs().max())
    return 1.0 if largest <= limit else limit / largest


def _cross_factors(change: ClientChange, mean: MeanChange) -> LowRank:
    """Return `(b_i - b)(a_i - a)`."""
    return LowRank(change.b - mean.b, change.a - mean.a)


def _times(matrix: Matrix, x: Tensor) -> Tensor:
    """Return `matrix x` for x `(in, c)`, in float64."""
    if isinstance(matrix, LowRank):
        return matrix.B.to(x) @ (matrix.A.to(x) @ x)
    return matrix.to(x) @ x


def _left_times(Q: Tensor, matrix: Matrix) -> Tensor:
    """Return `Q^T matrix` for Q `(out, c)`, in float64."""
    if isinstance(matrix, LowRank):
        return (Q.mT @ matrix.B.to(Q)) @ matrix.A.to(Q)
    return Q.mT @ matrix.to(Q)
