"""Sums of many clients: exact in either form, as good as the full SVD, and never all in memory."""

import errno
import gc
import itertools
import math
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmomentum.aggregation import FedMomentum
from fedmomentum.aggregation.aggregate import RoundContext, aggregate_updates
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.linalg import matrix as sums
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import add, inner, inner_products, norm, rank_bound, scale, to_dense
from fedmomentum.linalg.truncated_svd.dense import dense_truncated_svd
from fedmomentum.linalg.weighted_sum import deduplicate_rows, exact_sum
from fedmomentum.lora.adapter import Adapter
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.server.checkpoint import RunDirectory
from fedmomentum.server.diagnostics import round_diagnostics
from fedmomentum.server.update_store import UpdateStore
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
from tests.runs import chain, objects, start, timeless, tiny_config

SHAPE = (23, 17)


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    others=st.lists(st.sampled_from(["factors", "dense"]), max_size=2),
    block=st.sampled_from([1, 5, 256]),
)
def test_a_sum_is_the_dense_one_in_either_form_and_the_smaller_of_the_two(ranks, others, block):
    matrices = [random_matrix(*SHAPE, rank, seed=i) for i, rank in enumerate(ranks)]
    weights = [(-1.0) ** i / (i + 1) for i in range(len(ranks))]
    also = [random_matrix(*SHAPE, 2, seed=50 + i) for i in range(len(others))]
    also = [
        matrix.dense() if kind == "dense" else matrix
        for kind, matrix in zip(others, also, strict=True)
    ]
    before, sums.BLOCK_COLUMNS = sums.BLOCK_COLUMNS, block
    try:
        total = exact_sum(matrices, weights, also)
        products = inner_products(matrices, total)
    finally:
        sums.BLOCK_COLUMNS = before
    wanted = sum(w * m.dense() for w, m in zip(weights, matrices, strict=True)) + sum(
        to_dense(m) for m in also
    )
    size = max(1.0, float(torch.linalg.matrix_norm(wanted)))
    assert (
        total.dtype == torch.float64
        and float((to_dense(total) - wanted).abs().max()) < 1e-10 * size
    )
    rank = sum(ranks) + sum(2 for kind in others if kind == "factors")
    assert isinstance(total, LowRank) == (
        "dense" not in others and rank * sum(SHAPE) < math.prod(SHAPE)
    )
    for matrix, product in zip(matrices, products.tolist(), strict=True):
        assert product == pytest.approx(
            float((matrix.dense() * wanted).sum()), rel=1e-10, abs=1e-10 * size**2
        )


@pytest.mark.parametrize("forms", itertools.product((True, False), repeat=2))
def test_products_and_sums_of_two_are_the_dense_ones_in_all_forms(forms):
    factored = [random_matrix(*SHAPE, 3, seed=i) for i in (1, 2)]
    dense = [matrix.dense() for matrix in factored]
    left, right = (
        f if keep else d.clone() for keep, f, d in zip(forms, factored, dense, strict=True)
    )
    assert inner(left, right) == pytest.approx(float((dense[0] * dense[1]).sum()), rel=1e-12)
    assert norm(left) == pytest.approx(float(dense[0].norm()), rel=1e-12) and rank_bound(left) == (
        3 if forms[0] else 17
    )
    assert error(to_dense(scale(left, 3.0, torch.float64)), 3 * dense[0]) < 1e-14
    assert error(to_dense(add(left, right)), dense[0] + dense[1]) < 1e-14
    assert torch.equal(to_dense(right), dense[1])  # it is not written to


def test_sums_that_have_no_meaning_are_refused():
    with pytest.raises(ValueError, match="no matrices"):
        exact_sum([], [])
    with pytest.raises(ValueError, match="got 1 matrices, 2 weights"):
        exact_sum([random_matrix(*SHAPE, 2)], [1.0, 2.0])
    with pytest.raises(ValueError, match="a 23 x 17 matrix and one of .*17, 23"):
        exact_sum([random_matrix(*SHAPE, 9), random_matrix(17, 23, 9)], [1.0, 1.0])


@pytest.mark.parametrize("shape", [(530, 600), (700, 520)])
@pytest.mark.parametrize("decay, energy", [(1.0, 0.05), (0.97, 0.6)])
def test_the_strongest_directions_of_a_large_dense_matrix_are_as_good_as_the_svds(
    shape, decay, energy
):
    """Law 4, also for a flat spectrum, with an unrelated start."""
    U, V = (
        torch.linalg.qr(torch.randn(n, n, generator=generator(n), dtype=torch.float64)).Q
        for n in shape
    )
    S = decay ** torch.arange(min(shape), dtype=torch.float64)
    S = S * (1 + 0.1 * torch.rand(len(S), generator=generator(1), dtype=torch.float64))
    matrix = (U[:, : len(S)] * S) @ V[: len(S)]
    P, found, Qh, residual = dense_truncated_svd(
        matrix.clone(), 8, generator(2), near=random_matrix(*shape, 8)
    )
    assert len(found) == 8 and error((P * found) @ Qh + residual, matrix) < 1e-12
    assert error(P.mT @ P, torch.eye(8)) < 1e-12 and error(Qh @ Qh.mT, torch.eye(8)) < 1e-12
    best = S.sort(descending=True).values
    assert float(residual.norm()) <= 1.0001 * float(best[8:].norm())
    _, many, _, residual = dense_truncated_svd(matrix.clone(), 8, generator(2), energy=energy)
    assert float(many.square().sum()) >= energy * float(S.square().sum()) and 8 < len(many) < 100
    assert float(residual.norm()) ** 2 <= (1 - energy) * float(S.square().sum()) * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    equal=st.lists(st.integers(0, 5), max_size=12),
    side=st.sampled_from("BA"),
    zeros=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 9),
)
def test_equal_components_are_merged_and_others_left_alone(equal, side, zeros, dtype, seed):
    """`equal[i]` says which of six rows of A, or columns of B, component i has."""
    n, few = len(equal), random_matrix(40, 30, 6, seed=seed + 50)
    B, A = (
        torch.randn(*size, generator=generator(seed), dtype=torch.float64)
        for size in ((40, n), (n, 30))
    )
    B, A = (few.B[:, equal], A) if side == "B" else (B, few.A[equal])
    matrix = LowRank(
        torch.cat([B, torch.zeros(40, zeros)], 1), torch.cat([A, torch.ones(zeros, 30)])
    ).to(dtype)
    got = deduplicate_rows(matrix)
    assert got.rank == len(set(equal)) and got.dtype == dtype
    assert torch.allclose(
        got.dense(), matrix.dense(), atol=1e-12 if dtype == torch.float64 else 1e-4
    )
    if len(set(equal)) == n and not zeros:
        assert got is matrix


MOMENTUM = [
    FedMomentum(),
    FedMomentum(split="aligned"),
    FedMomentum(energy=0.05),
    FedMomentum(residual="carried"),
    FedMomentum(merge_every=2),
]


@pytest.mark.parametrize("method", MOMENTUM, ids=repr)
def test_nothing_is_lost_where_the_sum_of_many_clients_is_dense(method):
    """Laws 1 and 4 over rounds, what is carried being dense as well."""
    shape, reference, carried = (520, 560), random_matrix(520, 560, 4, seed=9), None
    for server_round in (1, 2, 3):
        updates = [random_matrix(*shape, 8, seed=100 * server_round + i) for i in range(60)]
        weights = some_weights(60, seed=server_round)
        result = aggregate(
            method,
            updates,
            weights,
            rank=4,
            reference=reference,
            carried=carried,
            server_round=server_round,
            seed=server_round,
        )
        expected = dense_sum(updates, weights) + (to_dense(carried) if carried is not None else 0)
        parts = [
            to_dense(part)
            for part in (result.adapter, result.residual, result.carried)
            if part is not None
        ]
        assert error(sum(parts), expected) < 1e-10
        entered = expected if method.merge_every == 1 else dense_sum(updates, weights)
        best = torch.linalg.svdvals(entered)[4:].norm()
        assert float((entered - result.adapter.dense()).norm()) <= 1.0001 * float(best)
        assert result.findings["energy"] == pytest.approx(float(entered.norm()) ** 2, rel=1e-10)
        carried = result.carried
    assert any(isinstance(part, torch.Tensor) for part in (result.residual, result.carried))


# ── never all in memory ──


class Counted(LowRank):
    """Factors that are counted while they are alive."""

    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def __post_init__(self):
        super().__post_init__()
        Counted.alive.add(self)
        Counted.most = max(Counted.most, len(Counted.alive))

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class LazyModules(dict):
    """Modules whose factors are new tensors at each access, as the spool reads them."""

    def __getitem__(self, module):
        matrix = super().__getitem__(module)
        return Counted(matrix.B, matrix.A)

    def get(self, module, default=None):
        return self[module] if module in self else default

    def items(self):
        return ((module, self[module]) for module in self)

    def values(self):
        return (self[module] for module in self)


@pytest.mark.parametrize("name", METHODS)
def test_memory_holds_few_clients_factors_however_many_clients_there_are(name, monkeypatch):
    monkeypatch.setattr(sums, "BLOCK_COLUMNS", 12)
    shapes = {"a": (14, 10), "b": (9, 16)}
    reference = Adapter(
        {m: random_matrix(*s, 2, seed=7) for m, s in shapes.items()}, dict.fromkeys(shapes, 2.0)
    )
    most = {}
    for count in (20, 80):
        method = METHODS[name]()
        sent = {
            m: valid_updates(method, clients(s, (2,) * count), reference.modules[m])
            for m, s in shapes.items()
        }
        adapters = [
            Adapter(
                LazyModules({m: sent[m][i] for m in shapes}),
                dict.fromkeys(shapes, 2.0),
                name=f"{i}",
            )
            for i in range(count)
        ]
        gc.collect()
        Counted.most = len(Counted.alive)
        result = aggregate_updates(
            adapters,
            [1.0] * count,
            method,
            RoundContext(
                ranks=dict.fromkeys(shapes, 2),
                scalings=dict.fromkeys(shapes, 2.0),
                reference=reference,
            ),
        )
        round_diagnostics(
            reference, adapters, result.weights.tolist(), result.adapter, result.residual, None
        )
        most[count] = Counted.most
    assert most[20] == most[80] <= 14


def test_a_spooled_adapter_is_read_as_it_was_stored(tmp_path):
    modules = {
        "a": random_matrix(7, 5, 2).to(torch.float32),
        "b": random_matrix(4, 9, 3, seed=1).to(torch.float32),
    }
    one = Adapter(
        modules, {"a": 2.0, "b": 0.5}, {"head.weight": torch.arange(6.0)}, {"r": 2}, "client x"
    )
    spool = UpdateStore(tmp_path / "updates")
    got = spool.put(one)
    assert (
        got.digest() == one.digest() and got.name == "client x" and list(got.modules) == ["a", "b"]
    )
    assert "c" not in got.modules and got.modules.get("c") is None
    with pytest.raises(KeyError):
        got.modules["c"]
    spool.clear()
    assert not (tmp_path / "updates").exists()


def test_files_of_a_killed_server_are_deleted_when_the_folder_is_opened(tmp_path):
    (tmp_path / "updates").mkdir(parents=True)
    (tmp_path / "updates" / "000000.safetensors").write_bytes(b"half")
    opened = RunDirectory(tmp_path)
    assert not (tmp_path / "updates").exists()
    opened.close()


# ── in runs ──


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def test_the_order_of_arrival_does_not_change_a_bit(folder, tmp_path, monkeypatch):
    config = tiny_config(folder, evaluation={"every": 1})
    start(config, tmp_path / "one")
    answer = InProcessTransport.send_and_receive

    def backwards(self, tasks):
        return reversed(list(answer(self, tasks)))

    monkeypatch.setattr(InProcessTransport, "send_and_receive", backwards)
    start(config, tmp_path / "other")
    assert timeless(tmp_path / "one") == timeless(tmp_path / "other")
    assert (
        chain(tmp_path / "one") == chain(tmp_path / "other")
        and not (tmp_path / "one" / "updates").exists()
    )
    assert objects(tmp_path / "one") == objects(tmp_path / "other")


def test_a_full_disk_ends_the_run_and_is_not_blamed_on_a_client(folder, tmp_path, monkeypatch):
    config, write = tiny_config(folder, evaluation={"every": 0}), Path.write_bytes

    def full(self, data):
        if self.parent.name == "updates" and self.name.startswith("000001"):
            write(self, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        start(config, tmp_path / "run")
    assert not (tmp_path / "run" / "updates").exists() and len(timeless(tmp_path / "run")) == 1
    monkeypatch.undo()
    start(config, tmp_path / "run", resume=True)
    start(config, tmp_path / "whole")
    assert chain(tmp_path / "run") == chain(tmp_path / "whole")
