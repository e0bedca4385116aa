"""What is specific to FedMomentum: gauges, energy, the carried tail."""

import pytest
import torch

from fedmomentum.aggregation import FedIT, FedMomentum
from fedmomentum.linalg.low_rank import LowRank, weighted_sum
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.linalg.spectral import relative_error
from tests.helpers import (
    aggregate,
    clients,
    dense_sum,
    error,
    generator,
    random_matrix,
    some_weights,
)


def common_start(n=4, *, seed=0, step=0.05):
    """Clients that trained a little from one adapter."""
    start = random_matrix(40, 30, 4, seed=seed)
    return start, [
        LowRank(
            start.B
            + step * torch.randn(40, 4, generator=generator(seed + 10 + i), dtype=torch.float64),
            start.A
            + step * torch.randn(4, 30, generator=generator(seed + 50 + i), dtype=torch.float64),
        )
        for i in range(n)
    ]


def test_splits_share_one_product():
    updates, weights = clients(ranks=(4, 4, 4)), some_weights(3)
    products = [
        aggregate(FedMomentum(split=s), updates, weights, rank=4).adapter
        for s in ("balanced", "procrustes", "singular", "aligned")
    ]
    for product in products[1:]:
        assert relative_error(product, products[0]) < 1e-10


def test_aligned_keeps_the_mean_A_of_clients_with_a_common_start():
    start, updates = common_start()
    weights = some_weights(4)
    result = aggregate(FedMomentum(split="aligned"), updates, weights, rank=4, reference=start)
    mean_A = sum(float(w) * u.A for w, u in zip(weights, updates, strict=True))
    V = torch.linalg.svd(dense_sum(updates, weights)).Vh[:4]
    assert torch.allclose(result.adapter.A, mean_A @ V.mT @ V, atol=1e-10)  # A = Ā V Vᵀ
    assert result.findings["fallback"] == 0.0
    fedit = aggregate(FedIT(), updates, weights, rank=4).adapter
    assert error(result.adapter.A, fedit.A) < 0.15  # the averaged trajectory, nearly


def test_aligned_falls_back_to_procrustes_where_the_mean_A_is_no_basis():
    start, updates = common_start()
    flat = [LowRank(u.B, torch.cat([u.A[:3], u.A[:1] * 1e-9])) for u in updates]
    flat[0] = LowRank(flat[0].B, updates[0].A * 1e-6)
    weights = some_weights(4)
    result = aggregate(FedMomentum(split="aligned"), flat, weights, rank=4)
    assert result.findings["fallback"] == 1.0
    assert (
        error((result.adapter.dense() + result.residual.dense()), dense_sum(flat, weights)) < 1e-10
    )
    # rotated, so still balanced: equal norms, and no rotation comes nearer to the mean A
    B, A = result.adapter.B, result.adapter.A
    assert torch.allclose(B.norm(), A.norm(), rtol=1e-10)
    mean_A = sum(float(w) * u.A for w, u in zip(weights, flat, strict=True))
    nearest = torch.linalg.matrix_norm(A - mean_A)
    for seed in range(50):
        turn = torch.linalg.qr(torch.randn(4, 4, generator=generator(seed), dtype=torch.float64)).Q
        assert nearest <= torch.linalg.matrix_norm(turn @ A - mean_A) + 1e-12


def distance_to_means(B, A, updates, weights):
    mean_B = sum(float(w) * u.B for w, u in zip(weights, updates, strict=True))
    mean_A = sum(float(w) * u.A for w, u in zip(weights, updates, strict=True))
    return float((B - mean_B).norm() ** 2 + (A - mean_A).norm() ** 2)


def test_procrustes_is_the_balanced_split_nearest_to_the_mean_factors():
    start, updates = common_start()
    weights = some_weights(4)
    result = aggregate(FedMomentum(split="procrustes"), updates, weights, rank=4, reference=start)
    B, A = result.adapter.B, result.adapter.A
    # Balanced: B^T B = A A^T; and the exact sum with its residual.
    assert error(B.mT @ B, A @ A.mT) < 1e-10
    assert error(B @ A + result.residual.dense(), dense_sum(updates, weights)) < 1e-10
    nearest = distance_to_means(B, A, updates, weights)
    for seed in range(50):
        draw = torch.randn(4, 4, generator=generator(seed), dtype=torch.float64)
        turn = torch.linalg.qr(torch.eye(4, dtype=torch.float64) + 0.1 * draw).Q
        assert nearest <= distance_to_means(B @ turn.mT, turn @ A, updates, weights) + 1e-12
    balanced = aggregate(
        FedMomentum(split="balanced"), updates, weights, rank=4, reference=start
    ).adapter
    assert nearest < 0.5 * distance_to_means(balanced.B, balanced.A, updates, weights)


def test_procrustes_leaves_clients_that_agree_where_they_are():
    balanced = random_matrix(40, 30, 4, condition=10).canonical()
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator(3), dtype=torch.float64)).Q
    agreed = LowRank(balanced.B @ turn.mT, turn @ balanced.A)
    method = FedMomentum(split="procrustes")
    result = aggregate(method, [agreed] * 3, some_weights(3), rank=4)
    assert error(result.adapter.B, agreed.B) < 1e-10
    assert error(result.adapter.A, agreed.A) < 1e-10


@pytest.mark.parametrize("with_start", [True, False])
def test_spare_directions_of_procrustes_can_train(with_start):
    """Two directions at rank 5: three combinations of rows are zero in B, and none is in A."""
    rank_two = random_matrix(40, 30, 2)
    start = random_matrix(40, 30, 5, seed=9)
    updates = [LowRank(torch.cat([rank_two.B, 0 * start.B[:, :3]], 1), start.A.clone())]
    updates[0].A[:2] = rank_two.A
    result = aggregate(
        FedMomentum(split="procrustes"),
        updates,
        torch.ones(1, dtype=torch.float64),
        rank=5,
        reference=start if with_start else None,
    )
    B, A = result.adapter.B, result.adapter.A
    assert error(B @ A, rank_two.dense()) < 1e-10
    assert float(torch.linalg.svdvals(A)[-1]) > 1e-3
    # The gradient of B is G A^T: of full rank for any G of full rank.
    assert int(torch.linalg.matrix_rank(B)) == 2


def test_procrustes_aligns_with_the_padded_means_of_unequal_ranks():
    updates = [random_matrix(40, 30, rank, seed=rank) for rank in (2, 4, 5)]
    weights = some_weights(3)
    result = aggregate(FedMomentum(split="procrustes"), updates, weights, rank=5)
    B, A = result.adapter.B, result.adapter.A
    assert error(B @ A + result.residual.dense(), dense_sum(updates, weights)) < 1e-10
    padded = [
        LowRank(
            torch.nn.functional.pad(u.B, (0, 5 - u.rank)),
            torch.nn.functional.pad(u.A, (0, 0, 0, 5 - u.rank)),
        )
        for u in updates
    ]
    nearest = distance_to_means(B, A, padded, weights)
    for seed in range(20):
        draw = torch.randn(5, 5, generator=generator(seed), dtype=torch.float64)
        turn = torch.linalg.qr(draw).Q
        assert nearest <= distance_to_means(B @ turn.mT, turn @ A, padded, weights) + 1e-12


def test_energy_bounds_what_is_applied_and_carries_the_rest():
    updates, weights = clients((60, 50), (4,) * 5), some_weights(5)
    wanted = dense_sum(updates, weights)
    S = torch.linalg.svdvals(wanted)
    result = aggregate(FedMomentum(energy=0.8), updates, weights, rank=4)
    applied = result.adapter.rank + result.residual.rank
    share = float(S[:applied].square().sum() / S.square().sum())
    assert share >= 0.8 and float(S[: applied - 1].square().sum() / S.square().sum()) < 0.8
    assert applied + result.carried.rank == 20
    assert (
        error(result.adapter.dense() + result.residual.dense() + result.carried.dense(), wanted)
        < 1e-10
    )


def test_the_carried_tail_enters_the_next_sum():
    updates, weights = clients((60, 50), (4,) * 5), some_weights(5)
    first = aggregate(FedMomentum(energy=0.5), updates, weights, rank=4)
    next_updates = clients((60, 50), (4,) * 5, seed=7)
    second = aggregate(FedMomentum(), next_updates, weights, rank=4, carried=first.carried)
    wanted = dense_sum(next_updates, weights) + first.carried.dense()
    assert error(parts(second.adapter, second.residual), wanted) < 1e-10 and second.carried is None


def test_energy_below_the_adapters_own_share_takes_nothing_from_the_adapter():
    updates, weights = clients(ranks=(4, 4)), some_weights(2)
    result = aggregate(FedMomentum(energy=0.01), updates, weights, rank=4)
    assert result.residual.rank == 0 and result.carried.rank == 4
    best = weighted_sum(updates, weights).recompress(rank=4)
    assert relative_error(result.adapter, best) < 1e-10


def rounds_of(method, num=7):
    """Rounds over the same clients, passing on what is carried: (round, updates, weights, carried in, result)."""
    carried, weights = None, some_weights(5)
    for server_round in range(1, num + 1):
        updates = clients((60, 50), (4,) * 5, seed=server_round)
        result = aggregate(
            method, updates, weights, rank=4, carried=carried, server_round=server_round
        )
        yield server_round, updates, weights, carried, result
        carried = result.carried


def parts(*matrices):
    return sum(to_dense(m) for m in matrices if m is not None)


@pytest.mark.parametrize(
    "method",
    [
        FedMomentum(),
        FedMomentum(energy=0.7),
        FedMomentum(merge_every=3),
        FedMomentum(residual="carried"),
    ],
)
def test_nothing_is_lost_over_rounds(method):
    expected, got = 0, 0
    for _, updates, weights, carried, result in rounds_of(method):
        expected = dense_sum(updates, weights) + parts(carried)
        got = parts(result.adapter, result.residual, result.carried)
        assert error(got, expected) < 1e-10


def test_merging_every_third_round_keeps_the_residual_outside_the_sums():
    waiting = torch.zeros(60, 50, dtype=torch.float64)
    for server_round, updates, weights, _, result in rounds_of(FedMomentum(merge_every=3)):
        now = aggregate(FedMomentum(), updates, weights, rank=4)
        assert error(result.adapter.dense(), now.adapter.dense()) < 1e-10
        waiting = waiting + now.residual.dense()
        if server_round % 3:
            assert result.residual.rank == 0 and error(result.carried.dense(), waiting) < 1e-10
        else:
            assert result.carried is None and error(result.residual.dense(), waiting) < 1e-10
            waiting = torch.zeros_like(waiting)


def test_a_carried_residual_is_never_merged_and_competes_again():
    for _, updates, weights, carried, result in rounds_of(FedMomentum(residual="carried")):
        assert result.residual.rank == 0
        total = dense_sum(updates, weights) + parts(carried)
        U, S, Vh = torch.linalg.svd(total, full_matrices=False)
        assert error(result.adapter.dense(), (U[:, :4] * S[:4]) @ Vh[:4]) < 1e-10


def test_a_dropped_residual_is_reported_and_not_called_exact():
    updates, weights = clients((60, 50), (4,) * 5), some_weights(5)
    method = FedMomentum(residual="dropped")
    result, kept = (
        aggregate(method, updates, weights, rank=4),
        aggregate(FedMomentum(), updates, weights, rank=4),
    )
    assert (
        not method.exact
        and FedMomentum(residual="carried").exact
        and FedMomentum(merge_every=5).exact
    )
    assert result.residual is None and result.carried is None
    assert error(result.adapter.dense(), kept.adapter.dense()) < 1e-12
    assert result.findings["dropped_energy"] == pytest.approx(kept.residual.norm() ** 2, rel=1e-10)


def test_the_carried_residual_survives_a_change_of_settings():
    updates, weights = clients((60, 50), (4,) * 5), some_weights(5)
    waits = aggregate(FedMomentum(merge_every=9), updates, weights, rank=4).carried
    for method in (
        FedMomentum(),
        FedMomentum(residual="carried"),
        FedMomentum(energy=0.5),
        FedMomentum(merge_every=2),
    ):
        result = aggregate(method, updates, weights, rank=4, carried=waits)
        got = parts(result.adapter, result.residual, result.carried)
        assert error(got, dense_sum(updates, weights) + waits.dense()) < 1e-10


def test_fedit_refuses_unequal_ranks_by_name():
    with pytest.raises(ValueError, match=r"ranks \[2, 4\]"):
        aggregate(FedIT(), clients(ranks=(2, 4)), some_weights(2), rank=4)


@pytest.mark.parametrize(
    "field",
    [
        {"split": "equal"},
        {"energy": 0.0},
        {"energy": 1.1},
        {"svd": "fast"},
        {"residual": "forgotten"},
        {"merge_every": 0},
        {"merge_every": 2.5},
        {"merge_every": 2, "residual": "carried"},
        {"energy": 0.9, "residual": "dropped"},
        {"energy": 0.9, "merge_every": 2},
    ],
)
def test_invalid_settings_are_refused_by_the_constructor(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        FedMomentum(**field)
