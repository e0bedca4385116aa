"""Clients of unequal rank: what each holds of the global adapter, and what happens to the remainder."""

from dataclasses import replace

import pytest
import torch

from fedmomentum.aggregation import FedMomentum, FlexLoRA, FLoRA, HetLoRA
from fedmomentum.aggregation.aggregate import RoundContext, aggregate_updates
from fedmomentum.aggregation.client_adapters import client_adapter, with_fixed_residual
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import Adapter
from tests.helpers import aggregate, dense_sum, error, generator, random_matrix

RANKS = (2, 2, 2, 8)
SCALINGS = (8.0, 8.0, 8.0, 2.0)  # lora_alpha 16 for all, as in FlexLoRA's code
WEIGHTS = [0.3, 0.2, 0.1, 0.4]


def global_adapter(rank=8, scaling=2.0, split="balanced") -> Adapter:
    """An adapter of two modules as FedMomentum would leave it."""
    modules = {
        f"m{i}": aggregate(
            FedMomentum(split=split),
            [random_matrix(40, 30, rank, seed=i, condition=3)],
            torch.ones(1),
            rank=rank,
        )
        for i in range(2)
    }
    return Adapter({m: a.adapter for m, a in modules.items()}, dict.fromkeys(modules, scaling))


def trained(own: Adapter, seed: int, step: float) -> Adapter:
    """A client's adapter after training: both factors have moved, of components that it has."""
    modules = {}
    for number, (module, matrix) in enumerate(own.modules.items()):
        g = generator(100 * seed + number)
        B = matrix.B + step * torch.randn(matrix.B.shape, generator=g, dtype=torch.float64)
        modules[module] = LowRank(
            B, matrix.A + step * torch.randn(matrix.A.shape, generator=g, dtype=torch.float64)
        )
    return replace(own, modules=modules, name=f"client {seed}")


def one_round(method, current: Adapter, server_round: int, step: float):
    """Every client trains what it holds of the global adapter; return the aggregate and the expected sum."""
    updates, expected = [], {m: current.effective(m).dense() for m in current.modules}
    for i, (rank, scaling) in enumerate(zip(RANKS, SCALINGS, strict=True)):
        own, tails = client_adapter(
            method, current, dict.fromkeys(expected, rank), dict.fromkeys(expected, scaling)
        )
        after = trained(own, 10 * server_round + i, step)
        for module in expected:
            moved = after.effective(module).dense() - own.effective(module).dense()
            expected[module] = expected[module] + WEIGHTS[i] * moved
        updates.append(with_fixed_residual(after, tails) if method.keeps_tail else after)
    result = aggregate_updates(
        updates,
        WEIGHTS,
        method,
        RoundContext(
            ranks=dict.fromkeys(expected, 8),
            scalings=current.scalings,
            reference=current,
            server_round=server_round,
        ),
    )
    return result, expected


@pytest.mark.parametrize("split", ["balanced", "procrustes", "singular", "aligned"])
def test_own_adapter_and_tail_are_the_global_one_in_the_clients_scaling(split):
    current = global_adapter(split=split)
    own, tails = client_adapter(
        FedMomentum(split=split), current, {"m0": 3, "m1": 8}, {"m0": 5.0, "m1": 2.0}
    )
    assert own.scalings == {"m0": 5.0, "m1": 2.0} and tails.keys() == {"m0"}
    assert (
        error(own.effective("m0").dense() + tails["m0"].dense(), current.effective("m0").dense())
        < 1e-12
    )
    assert error(own.effective("m1").dense(), current.effective("m1").dense()) < 1e-12
    S = torch.linalg.svdvals(current.effective("m0").dense())
    assert tails["m0"].norm() == pytest.approx(
        float(S[3:].square().sum().sqrt())
    )  # the best of its rank
    back = with_fixed_residual(own, tails)
    assert error(back.effective("m0").dense(), current.effective("m0").dense()) < 1e-12


def test_split_rank_slices_the_factors_and_canonical_sorts_them():
    matrix = random_matrix(40, 30, 6, condition=10)
    own, tail = matrix.split_rank(2)
    assert torch.equal(own.B, matrix.B[:, :2]) and torch.equal(own.A, matrix.A[:2])
    assert torch.equal(own.concatenate(tail).B, matrix.B) and torch.equal(
        own.concatenate(tail).A, matrix.A
    )
    for rank in (0, 7):
        with pytest.raises(
            ValueError,
            match=rf"rank must be from 1 to 6, that of LowRank\(40x30, rank 6.*; got {rank}",
        ):
            matrix.split_rank(rank)
    ordered = matrix.canonical()
    assert error(ordered.dense(), matrix.dense()) < 1e-12
    S = torch.linalg.svdvals(matrix.dense())[:6]
    assert torch.allclose(ordered.B.mT @ ordered.B, torch.diag(S)) and torch.allclose(
        ordered.A @ ordered.A.mT, torch.diag(S)
    )
    untrained = LowRank(matrix.B * 0, matrix.A).canonical()
    assert not untrained.B.any() and float(torch.linalg.svdvals(untrained.A)[-1]) > 0.5  # alive


@pytest.mark.parametrize("split", ["balanced", "procrustes", "singular", "aligned"])
def test_the_sum_is_the_global_adapter_plus_what_clients_moved(split):
    method, current = FedMomentum(split=split), global_adapter(split=split)
    for server_round in (1, 2, 3):
        result, expected = one_round(method, current, server_round, step=0.05)
        for module in expected:
            got = result.adapter.effective(module).dense() + result.residual[module].dense()
            assert error(got, expected[module]) < 1e-10
        current = result.adapter


def energies(current: Adapter) -> tuple[float, float]:
    """The squared norm of the first two components, and of those beyond."""
    S = torch.linalg.svdvals(current.effective("m0").dense())
    return float(S[:2].square().sum()), float(S[2:].square().sum())


def test_flexlora_collapses_into_the_smallest_rank_and_fedmomentum_does_not():
    """No client trains: only the aggregation changes anything from round to round."""
    start = global_adapter()
    first, beyond = energies(start)
    flexlora, fedmomentum = start, start
    for server_round in range(1, 7):
        flexlora = one_round(FlexLoRA(), flexlora, server_round, step=0.0)[0].adapter
        result = one_round(FedMomentum(), fedmomentum, server_round, step=0.0)[0]
        fedmomentum = result.adapter
        # only the client of rank 8 carries what is beyond rank 2, and it has 0.4 of the weight
        assert energies(flexlora) == pytest.approx(
            (first, beyond * 0.4 ** (2 * server_round)), rel=1e-8
        )
        assert energies(fedmomentum) == pytest.approx((first, beyond), rel=1e-8)
        assert all(part.norm() < 1e-10 for part in result.residual.values())


def test_with_training_flexlora_loses_energy_and_fedmomentum_does_not():
    flexlora, fedmomentum, merged = (
        global_adapter(),
        global_adapter(),
        torch.zeros(40, 30, dtype=torch.float64),
    )
    expected = fedmomentum.effective("m0").dense()
    for server_round in range(1, 7):
        flexlora = one_round(FlexLoRA(), flexlora, server_round, step=0.02)[0].adapter
        result, summed = one_round(FedMomentum(), fedmomentum, server_round, step=0.02)
        expected = (
            expected + summed["m0"] - fedmomentum.effective("m0").dense()
        )  # base and adapter, as clients moved them
        fedmomentum, merged = result.adapter, merged + result.residual["m0"].dense()
        assert error(fedmomentum.effective("m0").dense() + merged, expected) < 1e-10
    start = energies(global_adapter())[1]
    assert energies(flexlora)[1] < 0.1 * start and energies(fedmomentum)[1] > 0.9 * start


def test_flexlora_sends_each_client_its_own_svd_in_its_own_scaling():
    current, weights = global_adapter(), torch.tensor(WEIGHTS, dtype=torch.float64)
    updates = []
    for i, (rank, scaling) in enumerate(zip(RANKS, SCALINGS, strict=True)):
        modules = {
            m: random_matrix(40, 30, rank, seed=10 * i + n, condition=3)
            for n, m in enumerate(("m0", "m1"))
        }
        updates.append(Adapter(modules, dict.fromkeys(modules, scaling), name=f"client {i}"))
    result = aggregate_updates(
        updates,
        WEIGHTS,
        FlexLoRA(),
        RoundContext(ranks={"m0": 8, "m1": 8}, scalings=current.scalings),
    )
    U, S, Vh = torch.linalg.svd(dense_sum([u.effective("m0") for u in updates], weights))
    for rank, scaling in zip(RANKS, SCALINGS, strict=True):
        own, _ = client_adapter(
            FlexLoRA(), result.adapter, {"m0": rank, "m1": rank}, {"m0": scaling, "m1": scaling}
        )
        B, A = own.modules["m0"].B, own.modules["m0"].A
        signs = torch.sign((A * Vh[:rank]).sum(1))
        assert torch.allclose(A, signs[:, None] * Vh[:rank], atol=1e-10)  # V^T to A
        assert torch.allclose(B, U[:, :rank] * S[:rank] * signs / scaling, atol=1e-10)  # U S to B
    assert result.findings["m0"]["dropped_energy"] == pytest.approx(
        float(S[8:].square().sum()) / current.scalings["m0"] ** 2
    )


def test_hetlora_and_flora_take_clients_of_any_rank():
    current = global_adapter()
    for method in (HetLoRA(), FLoRA()):
        result, _ = one_round(method, current, 1, step=0.01)
        assert result.adapter.modules["m0"].rank == 8
    own, tails = client_adapter(FLoRA(), result.adapter, {"m0": 2, "m1": 8}, {"m0": 8.0, "m1": 2.0})
    assert torch.equal(
        own.modules["m0"].A, result.adapter.modules["m0"].A[:2]
    )  # a fresh one of its rank
    assert not own.modules["m0"].B.any() and tails["m0"].norm() == 0
