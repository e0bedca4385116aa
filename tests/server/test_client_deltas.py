"""Clients' own updates by what they moved: inner products that hold however small the moves are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmomentum.linalg.low_rank import LowRank, zeros
from fedmomentum.server.client_deltas import ClientDeltas
from tests.helpers import clients, error, random_matrix, some_weights


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(40, 30), (9, 25)]),
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    rank=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_inner_products_and_mean_are_the_dense_ones(shape, ranks, rank, dtype, seed):
    start, sent, w = (
        random_matrix(*shape, rank, seed=seed + 900),
        clients(shape, ranks, seed=seed),
        some_weights(len(ranks)),
    )
    own = torch.stack([(client.dense() - start.dense()).flatten() for client in sent])
    moves, atol = (
        ClientDeltas.of(start, sent, max([rank, *ranks]), dtype),
        1e-12 if dtype == torch.float64 else 1e-4,
    )
    assert torch.allclose(moves.inner_products(), own @ own.mT, rtol=0, atol=atol)
    assert torch.allclose(moves.mean(w).dense().double().flatten(), w @ own, rtol=0, atol=atol)
    x = torch.randn(shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(
        moves.mean_times(w, x).double(), (w @ own).view(shape) @ x, rtol=0, atol=10 * atol
    )


@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-6])
def test_small_moves_keep_their_digits_in_float32(share):
    """The products themselves agree to share: in float32 their differences would have lost as much again."""
    start = random_matrix(60, 50, 4, seed=9, dtype=torch.float32).to(torch.float64)
    sent = [
        LowRank(start.B + share * u.B, start.A + share * u.A).to(torch.float32).to(torch.float64)
        for u in clients((60, 50), (4,) * 3)
    ]
    own = torch.stack([(client.dense() - start.dense()).flatten() for client in sent])
    got = ClientDeltas.of(start, sent, 4, torch.float32)
    assert error(got.inner_products(), own @ own.mT) < 1e-5
    assert error(got.mean(some_weights(3)).dense(), (some_weights(3) @ own).view(60, 50)) < 1e-5


def test_a_client_without_the_module_has_moved_by_all_of_it():
    start = random_matrix(12, 9, 3, seed=1)
    got = ClientDeltas.of(start, [zeros((12, 9), dtype=torch.float64)], 3, torch.float64)
    assert float(got.inner_products()) == pytest.approx(start.inner(start), rel=1e-12)
