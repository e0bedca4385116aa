"""The clients' updates of one module: a lazy sequence that caches no factors."""

import gc
import weakref

import pytest
import torch

from fedmomentum.aggregation import AggregationContext, ClientUpdates, FedMomentum
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import LazySequence, to_dense
from tests.helpers import clients, dense_sum, error, random_matrix, some_weights


def test_sums_equal_the_dense_ones():
    matrices, weights = clients(ranks=(4, 4, 4)), some_weights(3)
    updates = ClientUpdates(matrices, weights)
    B = sum(w * u.B for w, u in zip(weights, matrices, strict=True))
    A = sum(w * u.A for w, u in zip(weights, matrices, strict=True))
    mean = updates.mean_factors()
    assert error(mean.B, B) < 1e-14 and error(mean.A, A) < 1e-14
    assert error(updates.mean_A(4), A) < 1e-14
    total = dense_sum(matrices, weights)
    assert error(to_dense(updates.sum()), total) < 1e-14
    extra = random_matrix(40, 30, 2, seed=9)
    assert error(to_dense(updates.sum([extra])), total + extra.dense()) < 1e-14
    assert error(to_dense(updates.averaging_error(mean)), total - B @ A) < 1e-12
    halved = updates.map(lambda update: update.scaled(0.5))
    assert error(to_dense(halved.sum()), total / 2) < 1e-14 and halved.weights is weights


def test_mean_A_takes_clients_of_any_rank():
    matrices, weights = clients(ranks=(2, 5)), some_weights(2)
    expected = torch.zeros(4, 30, dtype=torch.float64)
    expected[:2] += weights[0] * matrices[0].A
    expected += weights[1] * matrices[1].A[:4]
    assert error(ClientUpdates(matrices, weights).mean_A(4), expected) < 1e-14


def test_shape_ranks_and_dtype_read_each_update_once():
    looks = []

    def load(index: int) -> LowRank:
        looks.append(index)
        return random_matrix(40, 30, index + 1, dtype=torch.bfloat16)

    updates = ClientUpdates(LazySequence(load, range(3)), some_weights(3))
    assert looks == []
    assert updates.shape == (40, 30) and updates.ranks == [1, 2, 3]
    assert updates.dtype == torch.float32 and updates.shapes == [(40, 30)] * 3
    assert looks == [0, 1, 2]


@pytest.mark.parametrize("rank", [1, 4])
def test_no_update_is_kept(rank):
    alive = weakref.WeakSet()
    most = 0

    def load(index: int) -> LowRank:
        nonlocal most
        update = random_matrix(40, 30, rank, seed=index)
        alive.add(update.B)
        most = max(most, len(alive))
        return update

    updates = ClientUpdates(LazySequence(load, range(20)), some_weights(20))
    updates.averaging_error(updates.mean_factors())
    updates.mean_A(rank)
    del updates
    gc.collect()
    assert most <= 4 and not alive


def test_a_dense_carried_matrix_is_refused_by_the_sketch_not_dropped():
    updates = ClientUpdates(clients(), some_weights(3))
    carried = torch.ones(40, 30, dtype=torch.float64)
    context = AggregationContext(rank=4, carried=carried)
    with pytest.raises(ValueError, match="'randomized' takes what was carried as factors"):
        FedMomentum(svd="randomized", residual="carried").aggregate(updates, context)
