"""The leading directions of a sum, and the rest: exact and nearly optimal on every path, whatever the factors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmomentum.aggregation import FedMomentum
from fedmomentum.aggregation.aggregate import RoundContext, aggregate_updates
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.linalg.low_rank import LowRank, gram, weighted_sum
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.linalg.truncated_svd import dense
from fedmomentum.linalg.truncated_svd import gram as gram_path
from fedmomentum.linalg.truncated_svd import subspace_iteration as iteration_path
from fedmomentum.linalg.truncated_svd.dispatch import truncated_svd
from fedmomentum.lora.adapter import Adapter
from tests.helpers import (
    aggregate,
    clients,
    dense_sum,
    error,
    generator,
    random_matrix,
    some_weights,
    valid_updates,
)

DEVICES = [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.mps.is_available() else []),
]
FLOAT32 = torch.finfo(torch.float32).eps
EXACT = {torch.float32: 1e-6, torch.float64: 1e-10}


@pytest.fixture(scope="module", autouse=True)
def all_paths():
    """The matrices here are small, and would all be decomposed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedmomentum.linalg.truncated_svd.dispatch.MAX_QR_MULTIPLICATIONS", 0)
        yield


@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 5, 1)])
def test_small_factors_are_decomposed(ranks, monkeypatch):
    updates = [u.to(torch.float32) for u in clients((60, 50), ranks)]
    work = (60 + 50) * sum(ranks) ** 2
    for small, path in ((work, "svd"), (work - 1, "gram32")):
        monkeypatch.setattr(
            "fedmomentum.linalg.truncated_svd.dispatch.MAX_QR_MULTIPLICATIONS", small
        )
        assert check(updates, some_weights(3), 3).path == path


def check(updates, weights, rank, *, dtype=torch.float32, reference=None):
    """Every law of one call, against the dense sum in float64; returns what was found."""
    wanted = dense_sum(updates, weights)
    size, S = torch.linalg.matrix_norm(wanted), torch.linalg.svdvals(wanted)
    found = truncated_svd(updates, weights, rank, dtype=dtype, reference=reference)
    held = len(found.S)  # fewer than asked for only where the others are round-off of float32
    assert (
        held == rank
        or held <= rank
        and float(S[held]) <= 1.01 * max(wanted.shape) * FLOAT32 * float(S[0])
    )
    best = S[held:].square().sum().sqrt()
    leading = (found.U * found.S) @ found.Vh
    root = found.S.sqrt()
    adapter = (
        LowRank(found.U * root, root[:, None] * found.Vh).to(dtype).to(torch.float64)
    )  # as it will be sent
    full = adapter.dense() + to_dense(found.residual.to(torch.float64))
    # a dense rest below float32's normal numbers has an absolute precision only
    floor = (
        1e-45 * wanted.numel() ** 0.5 / float(size)
        if isinstance(found.residual, torch.Tensor)
        else 0.0
    )
    assert found.residual.dtype == dtype and found.U.dtype == found.Vh.dtype == torch.float64
    assert error(full, wanted) <= EXACT[dtype] + floor
    assert torch.linalg.matrix_norm(wanted - leading) <= 1.0001 * best + 2e-7 * size
    eye = torch.eye(len(found.S), dtype=torch.float64)
    assert torch.allclose(found.U.mT @ found.U, eye, atol=1e-10)
    assert torch.allclose(found.Vh @ found.Vh.mT, eye, atol=1e-10)
    assert bool((found.S[:-1] >= found.S[1:]).all())
    total = sum(u.rank for u in updates)
    if total * sum(wanted.shape) < wanted.numel():
        assert found.residual.rank <= total - held
    else:
        assert found.path == "dense"
    assert found.energy == pytest.approx(float(size**2), rel=1e-5)
    assert found.residual_energy == pytest.approx(
        float(torch.linalg.matrix_norm(wanted - leading)) ** 2, abs=1e-5 * float(size**2)
    )
    return found


def spread(shape, rank, condition, kind, g) -> LowRank:
    """Factors of a condition number: singular values graded, or two clusters, or one small one."""
    small = 1 / condition
    values = {
        "graded": torch.logspace(0, float(torch.tensor(small).log10()), rank, dtype=torch.float64),
        "clustered": torch.tensor(
            [1.0 if i < rank // 2 else small for i in range(rank)], dtype=torch.float64
        ),
        "one small": torch.tensor([1.0] * (rank - 1) + [small], dtype=torch.float64),
    }[kind]
    bases = [
        torch.linalg.qr(torch.randn(n, rank, generator=g, dtype=torch.float64)).Q for n in shape
    ]
    mix = [
        torch.linalg.qr(torch.randn(rank, rank, generator=g, dtype=torch.float64)).Q
        for _ in range(2)
    ]
    return LowRank(bases[0] * values @ mix[0], mix[1] @ (values[:, None] * bases[1].mT))


def moved_from(start, steps, share) -> list[LowRank]:
    """Clients that start from one adapter and move by a share."""
    return [LowRank(start.B + share * u.B, start.A + share * u.A) for u in steps]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(90, 70), (70, 90), (400, 60), (30, 50)]),
    exponent=st.integers(0, 6),
    kind=st.sampled_from(["graded", "clustered", "one small"]),
    num=st.integers(1, 6),
    common=st.sampled_from([None, 1.0, 0.1, 1e-3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_exact_and_nearly_optimal_whatever_the_condition(
    shape, exponent, kind, num, common, dtype, seed
):
    g = generator(seed)
    updates = [spread(shape, 6, 10.0**exponent, kind, g) for _ in range(num)]
    if common:
        updates = moved_from(updates[0], updates, common)
    check([u.to(dtype) for u in updates], some_weights(num, seed), 6, dtype=dtype)


@pytest.mark.parametrize(
    ("condition", "path"),
    [(1, "gram32"), (3, "gram32"), (1e2, "gram64"), (1e4, "gram64"), (1e6, "gram64")],
)
def test_the_cheap_paths_are_taken_and_hold(condition, path):
    updates = clients((600, 500), (8,) * 6, dtype=torch.float32, condition=condition)
    found = check(updates, some_weights(6), 8)
    assert found.path == path and found.residual.rank == 40


@settings(max_examples=40, deadline=None)
@given(
    share=st.sampled_from([0.3, 0.1, 1e-2, 1e-3, 1e-5]),
    condition=st.sampled_from([1.0, 10.0, 1e3]),
    turned=st.sampled_from([1.0, 1e2, 1e4]),
    shape=st.sampled_from([(600, 500), (300, 700)]),
    zero=st.booleans(),
    seed=st.integers(0, 99),
)
def test_clients_of_one_start_are_iterated(share, condition, turned, shape, zero, seed):
    """Whatever the start's spectrum, and the gauge that it comes in; also where all B start at zero."""
    start = random_matrix(*shape, 8, seed=seed + 1000, condition=condition)
    G = random_matrix(8, 8, 8, seed=seed, condition=turned).dense()
    start = LowRank(torch.linalg.solve(G, start.B, left=False) * (not zero), G @ start.A)
    sizes = [float(torch.linalg.matrix_norm(factor)) for factor in (start.B, start.A)]
    steps = [
        LowRank(u.B * (sizes[0] or 1.0) / 3, u.A * sizes[1] / 3)
        for u in clients(shape, (8,) * 6, seed=seed)
    ]
    found = check(
        [u.to(torch.float32) for u in moved_from(start, steps, share)], some_weights(6, seed), 8
    )
    if turned == 1 and not zero and condition <= 10 and share * condition <= 0.1:
        assert found.path == "iterated" and found.residual.rank == 40


@settings(max_examples=40, deadline=None)
@given(
    strength=st.sampled_from([0.3, 1.0, 3.0, 30.0]),
    count=st.sampled_from([1, 4, 8]),
    axis=st.booleans(),
    share=st.sampled_from([1e-1, 1e-3]),
    seed=st.integers(0, 99),
)
def test_directions_that_cancel_in_the_clients_mean_are_found(strength, count, axis, share, seed):
    """One client has its own directions that outweigh the common ones, and their A is nearly invisible."""
    start = random_matrix(600, 500, 8, seed=seed)
    updates = moved_from(start, clients((600, 500), (8,) * 6, seed=seed + 1), share)
    other = random_matrix(600, 500, 8, seed=seed + 2000)
    B, A = updates[0].B.clone(), updates[0].A.clone()
    rows = torch.eye(500, dtype=torch.float64)[:count] if axis else other.A[:count]
    B[:, :count], A[:count] = 1e4 * strength * other.B[:, :count], 1e-4 * rows
    updates[0] = LowRank(B, A)
    check([u.to(torch.float32) for u in updates], some_weights(6, seed), 8)


def test_float64_stays_with_the_exact_svd():
    assert (
        check(clients((600, 500), (8,) * 6), some_weights(6), 8, dtype=torch.float64).path == "svd"
    )


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e12, 1e18])
@pytest.mark.parametrize("balance", [1, -1])
@pytest.mark.parametrize("shape", [(200, 150), (40, 60)])
def test_tiny_and_huge_numbers_take_a_fast_path_exactly(scale, balance, shape):
    updates = [
        LowRank(u.B * scale, u.A * scale**balance)
        for u in clients(shape, (8,) * 6, dtype=torch.float32, condition=3)
    ]
    assert check(updates, some_weights(6), 8).path != "svd"


@pytest.mark.parametrize("factor", ["B", "A"])
def test_denormal_numbers_are_decomposed_by_the_full_svd(factor):
    updates = clients((200, 150), (4,) * 4, dtype=torch.float32)
    updates = [
        LowRank(u.B * (1e-40 if factor == "B" else 1), u.A * (1e-40 if factor == "A" else 1))
        for u in updates
    ]
    assert check(updates, some_weights(4), 4).path == "svd"


def test_sums_of_less_than_full_rank_leave_no_more_than_they_have():
    some = clients((200, 150), (4,) * 3, dtype=torch.float32)
    weights = some_weights(6)
    cases = {
        "clients twice": some + some,
        "zero updates": some + [LowRank(torch.zeros_like(u.B), u.A) for u in some],
        "zero in both": some
        + [LowRank(torch.zeros_like(u.B), torch.zeros_like(u.A)) for u in some],
        "one A for all": [LowRank(u.B * i, some[0].A) for i, u in enumerate(some + some, start=1)],
    }
    for name, updates in cases.items():
        found = check(updates, weights, 4)
        assert found.path == ("svd" if name == "one A for all" else "gram32"), name
        assert found.residual.rank == (0 if name == "one A for all" else 8), name
    nothing = LowRank(torch.zeros(200, 4), torch.zeros(4, 150))
    empty = truncated_svd([nothing] * 3, some_weights(3), 4, dtype=torch.float32)
    assert len(empty.S) == 0 and empty.residual.rank == 0 and empty.energy == 0


def test_parts_that_cancel_are_not_left_to_float32():
    some, other = (clients((200, 150), (4,) * 3, seed=s, dtype=torch.float32) for s in (0, 5))
    against = [
        LowRank(-u.B + 1e-4 * v.B, u.A + 1e-4 * v.A) for u, v in zip(some, other, strict=True)
    ]
    assert check(some + against, torch.full((6,), 1 / 6), 4).path == "svd"


@pytest.mark.parametrize("shape", [(60, 50), (50, 60), (120, 100), (50, 400)])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("small", [0, 512])
def test_where_the_stack_is_larger_than_the_matrix_it_is_dense(
    shape, condition, small, monkeypatch
):
    """By iteration, and by the full SVD that small matrices get."""
    monkeypatch.setattr(dense, "MAX_FULL_SVD_SIDE", small)
    updates = clients(shape, (10,) * 12, dtype=torch.float32, condition=condition)
    found = check(updates, some_weights(12), 4)
    assert found.path == "dense" and found.residual.shape == shape


def test_the_iteration_is_warm_from_the_reference(monkeypatch):
    monkeypatch.setattr(dense, "MAX_FULL_SVD_SIDE", 0)
    updates, weights = (
        clients((300, 200), (10,) * 30, dtype=torch.float32, condition=30),
        some_weights(30),
    )
    previous, sweeps, qr = weighted_sum(updates, weights).recompress(rank=10), [], torch.linalg.qr
    monkeypatch.setattr(
        torch.linalg, "qr", lambda *args, **more: sweeps.append(1) or qr(*args, **more)
    )
    check(updates, weights, 10, reference=previous)
    warm = len(sweeps)
    check(updates, weights, 10)
    assert 2 * warm < len(sweeps) - warm


def test_where_a_bound_fails_the_exact_svd_is_taken(monkeypatch):
    updates, weights = clients((200, 150), (8,) * 6, dtype=torch.float32), some_weights(6)
    assert check(updates, weights, 8).path != "svd"
    for module in (gram_path, iteration_path):
        monkeypatch.setattr(module, "RTOL", 0.0)
        monkeypatch.setattr(module, "ATOL", 0.0)
    assert check(updates, weights, 8).path == "svd"


@pytest.mark.parametrize("ranks", [(8,) * 6, (10,) * 20, (8, 8, 8, 2)])
def test_same_input_same_bits(ranks):
    updates, weights = (
        clients((200, 150), ranks, dtype=torch.float32, condition=9),
        some_weights(len(ranks)),
    )
    one, two = (truncated_svd(updates, weights, 8, dtype=torch.float32) for _ in range(2))
    assert torch.equal(one.U, two.U) and torch.equal(one.S, two.S) and torch.equal(one.Vh, two.Vh)
    assert torch.equal(to_dense(one.residual), to_dense(two.residual))


def test_order_of_clients_does_not_matter_in_float32():
    updates, weights = (
        clients((200, 150), (8,) * 6, dtype=torch.float32, condition=9),
        some_weights(6),
    )
    one = aggregate(FedMomentum(), updates, weights, rank=8)
    two = aggregate(FedMomentum(), updates[::-1], weights.flip(0), rank=8)
    assert error(two.adapter.dense(), one.adapter.dense().double()) < 1e-6
    assert error(two.residual.dense(), one.residual.dense().double()) < 1e-6


def test_nan_and_inf_are_refused():
    for bad in (float("nan"), float("inf")):
        updates = clients((200, 150), (8,) * 3, dtype=torch.float32)
        updates[1].B[3, 2] = bad
        with pytest.raises(ValueError, match="NaN or Inf"):
            truncated_svd(updates, some_weights(3), 8, dtype=torch.float32)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 90), size=st.sampled_from([0, 1, 7, 1023, 1025]), seed=st.integers(0, 9))
def test_gram_is_the_product_in_any_dtype(n, size, seed):
    rows = torch.randn(n, size, generator=generator(seed), dtype=torch.float32)
    wanted = rows.double() @ rows.double().mT
    assert torch.allclose(gram(rows, torch.float64), wanted, atol=1e-10, rtol=1e-12)
    assert torch.allclose(gram(rows.double()), wanted, atol=1e-10, rtol=1e-12)
    assert torch.allclose(gram(rows).double(), wanted, atol=1e-3)


# ── devices ──


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", [cls() for cls in METHODS.values()], ids=repr)
def test_results_stay_on_the_device_of_the_input(method, device):
    """The default device is one that holds no numbers: a tensor made there would end the call or the comparison."""
    reference = random_matrix(60, 50, 4, seed=9, dtype=torch.float32)
    updates = valid_updates(method, clients((60, 50), (4,) * 3, dtype=torch.float32), reference)
    weights = some_weights(3)
    wanted = aggregate(method, updates, weights, rank=4, reference=reference, seed=1)
    moved = [LowRank(u.B.to(device), u.A.to(device)) for u in [*updates, reference]]
    with torch.device("meta"):
        got = aggregate(method, moved[:-1], weights, rank=4, reference=moved[-1], seed=1)
    assert (got.residual is None) == (wanted.residual is None)
    for part, like in ((got.adapter, wanted.adapter), (got.residual, wanted.residual)):
        if part is not None:
            assert part.device.type == device
            assert error(to_dense(part).cpu() + 1, to_dense(like).double() + 1) < 1e-5
    assert all(isinstance(value, float) for value in got.findings.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["iterated", "gram32", "gram64", "dense", "svd"])
def test_every_path_stays_on_its_device(case, device):
    ranks = (10,) * 12 if case == "dense" else (8,) * 6
    shape = (60, 50) if case == "dense" else (600, 500)
    updates = clients(shape, ranks, dtype=torch.float32, condition=1e4 if case == "gram64" else 1)
    if case == "iterated":
        updates = moved_from(updates[0], updates, 0.1)
    if case == "svd":
        updates = updates[:3] + [
            LowRank(-1.0001 * u.B, u.A + 1e-5 * u.A.flip(0)) for u in updates[:3]
        ]
    moved = [LowRank(u.B.to(device), u.A.to(device)) for u in updates]
    weights = some_weights(len(ranks))
    with torch.device("meta"):
        found = truncated_svd(moved, weights, 8, dtype=torch.float32, reference=moved[0])
    assert found.path == case
    assert {t.device.type for t in (found.U, found.S, found.Vh, found.residual)} == {device}
    restored = ((found.U * found.S) @ found.Vh).cpu() + to_dense(
        found.residual.to(torch.float64)
    ).cpu()
    assert error(restored, dense_sum(updates, weights)) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_full_adapters_are_combined_on_their_device(device):
    """Scalings that differ, a module that one lacks, a tensor trained in full."""
    factors = clients((60, 50), (4,) * 6, dtype=torch.float32)
    moved = [LowRank(u.B.to(device), u.A.to(device)) for u in factors]
    saved = [{"head.weight": torch.full((2, 3), float(i), device=device)} for i in range(3)]
    adapters = [
        Adapter({"a": moved[0], "b": moved[1]}, {"a": 1.0, "b": 3.0}, saved=saved[0]),
        Adapter({"a": moved[2]}, {"a": 2.0}, saved=saved[1]),
        Adapter({"a": moved[3], "b": moved[4]}, {"a": 0.3, "b": 1.0}, saved=saved[2]),
    ]
    for method in (FedMomentum(), METHODS["hetlora"](min_rank=1), METHODS["flora"]()):
        with torch.device("meta"):
            got = aggregate_updates(
                adapters,
                [1.0, 2.0, 1.0],
                method,
                RoundContext(ranks={"a": 4, "b": 4}, scalings={"a": 1.0, "b": 1.0}),
            )
        for part in (*got.adapter.modules.values(), *got.residual.values()):
            assert part.device.type == device and bool(torch.isfinite(part.dense()).all())
        assert got.adapter.saved["head.weight"].device.type == device
    share = got.weights.tolist()
    wanted = share[0] * 3 * factors[1].dense().double() + share[2] * factors[4].dense().double()
    assert error(got.residual["b"].dense().cpu(), wanted) < 1e-6
