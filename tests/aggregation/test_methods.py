"""What is specific to each method: its formula, computed directly, and what it costs on the wire."""

import math
import re
from dataclasses import replace

import pytest
import torch

from fedmomentum.aggregation import (
    FedExLoRA,
    FedIT,
    FedMomentum,
    FedRotLoRA,
    FedSALoRA,
    FedSVD,
    FFALoRA,
    FLoRA,
    FLoRIST,
    FRLoRA,
    HetLoRA,
    LoRAFAIR,
    RoLoRA,
)
from fedmomentum.aggregation.aggregate import RoundContext, aggregate_adapters, aggregate_updates
from fedmomentum.aggregation.client_adapters import initialize_adapter
from fedmomentum.aggregation.registry import METHODS, build_method
from fedmomentum.errors import AdapterError, ConfigError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.lora.adapter import Adapter, fresh_adapter
from fedmomentum.utils.seeding import module_seed
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
from tests.runs import start, timeless, tiny_config

SCALINGS = (0.5, 2.0, 4.0)  # lora_alpha / rank of three clients
EYE = torch.eye(4, dtype=torch.float64)


def adapters(*, sharing: str = "", scalings=SCALINGS, ranks=(4, 4, 4), seed=0) -> list[Adapter]:
    """Whole adapters of two modules in float64; `sharing` names the factor that is the same for all."""
    created = []
    for i, (scaling, rank) in enumerate(zip(scalings, ranks, strict=True)):
        modules = {}
        for number, shape in enumerate([(40, 30), (20, 50)]):
            own = random_matrix(*shape, rank, seed=seed + 100 * number + i)
            first = random_matrix(*shape, rank, seed=seed + 100 * number)
            modules[f"m{number}"] = LowRank(
                first.B if "B" in sharing else own.B, first.A if "A" in sharing else own.A
            )
        created.append(Adapter(modules, dict.fromkeys(modules, scaling), name=f"client {i}"))
    return created


def effective(result, module: str) -> torch.Tensor:
    """What an aggregate of whole adapters adds to a module's weight, what is carried included."""
    parts = [result.residual.get(module), result.carried.get(module)]
    return result.adapter.effective(module).dense() + sum(
        part.dense() for part in parts if part is not None
    )


def dense_effective(given: list[Adapter], weights, module: str) -> torch.Tensor:
    return dense_sum([a.effective(module) for a in given], weights)


# ── the exact methods agree ──

MOMENTA = [
    FedMomentum(split=split, residual=residual)
    for split in ("balanced", "procrustes", "singular", "aligned")
    for residual in ("merged", "carried")
]
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("rank", [None, 6, 2])
def test_a_module_that_is_smaller_than_the_rank_gets_its_full_rank(rank):
    """Such as a gate with one output, which PEFT adapts at the rank of all others."""
    given = []
    for i, scaling in enumerate((0.5, 3.0)):
        modules = {
            "gate": random_matrix(1, 30, 6, seed=i),
            "q": random_matrix(20, 30, 6, seed=9 + i),
        }
        given.append(Adapter(modules, dict.fromkeys(modules, scaling), name=f"adapter {i}"))
    result = aggregate_adapters(given, [1, 2], rank=rank)
    assert {m: f.rank for m, f in result.adapter.modules.items()} == {"gate": 1, "q": rank or 6}
    for module in ("gate", "q"):
        total = result.adapter.effective(module).dense()
        if module in result.residual:
            total = total + to_dense(result.residual[module])
        assert error(total, dense_effective(given, [1 / 3, 2 / 3], module)) < 1e-10
    with pytest.raises(AdapterError, match="rank must be from 1 to 20, the full rank of the larg"):
        aggregate_adapters(given, rank=21)


@pytest.mark.parametrize(
    "method", [FLoRA(), FLoRIST(energy=1), FedExLoRA(), FedMomentum(merge_every=3), *MOMENTA]
)
@pytest.mark.parametrize("sharing", ["", "A", "B"])
def test_exact_methods_give_one_effective_model(method, sharing):
    given = adapters(sharing=sharing)
    result = aggregate_adapters(given, WEIGHTS.tolist(), method, scaling=3.0)
    for module in ("m0", "m1"):
        assert error(effective(result, module), dense_effective(given, WEIGHTS, module)) < 1e-10


@pytest.mark.parametrize(
    ("method", "sharing", "server_round"),
    [
        (FFALoRA(), "A", 1),
        (FedSVD(), "A", 1),
        (RoLoRA(), "A", 1),
        (RoLoRA(), "B", 2),
        (FedIT(), "A", 1),
    ],
)
def test_methods_of_one_factor_are_exact_too_where_the_other_is_shared(
    method, sharing, server_round
):
    given = adapters(sharing=sharing)
    scalings = {"m0": 3.0, "m1": 0.25}
    result = aggregate_updates(
        given,
        WEIGHTS.tolist(),
        method,
        RoundContext(
            ranks=dict.fromkeys(scalings, 4), scalings=scalings, server_round=server_round
        ),
    )
    for module in scalings:
        assert error(effective(result, module), dense_effective(given, WEIGHTS, module)) < 1e-10
    assert not result.residual and not result.carried


@pytest.mark.parametrize(
    "method", [cls() for cls in METHODS.values() if cls is not FRLoRA], ids=repr
)
def test_a_single_client_is_returned_unchanged_in_another_scaling(method):
    (given,) = adapters(scalings=(0.5,), ranks=(4,))
    result = aggregate_adapters([given], method=method, scaling=3.0)
    for module in given.modules:
        reported = 3.0**2 * result.findings[module].get("dropped_energy", 0.0)
        lost = effective(result, module) - given.effective(module).dense()
        assert float(lost.square().sum()) == pytest.approx(reported, abs=1e-20)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "flora"},
        {"name": "fedexlora"},
        {"name": "fedmomentum", "settings": {"merge_every": 2}},
        {"name": "fedmomentum", "settings": {"residual": "carried", "split": "singular"}},
    ],
)
def test_exactness_is_that_of_the_weights_that_clients_load(method, tmp_path):
    start(tiny_config(tmp_path, method=method, federation={"num_rounds": 3}), tmp_path / "run")
    assert all(row["exactness_error"] < 1e-5 for row in timeless(tmp_path / "run")[1:])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("server_round", [1, 2])
def test_factors_that_are_not_sent_are_known_through_scalings_and_float32(name, server_round):
    """Through scalings and float32: a factor that is not sent has the bits that everyone has, or can draw."""
    method, sent = METHODS[name](), adapters(scalings=(3.0,), ranks=(4,), seed=9)[0]
    sent = replace(
        sent, modules={m: matrix.to(torch.float32) for m, matrix in sent.modules.items()}
    )
    given = [
        replace(
            a,
            modules={
                m: valid_updates(
                    method, [a.modules[m].to(torch.float32)], sent.modules[m], server_round
                )[0]
                for m in a.modules
            },
        )
        for a in adapters()
    ]
    result = aggregate_updates(
        given,
        [5, 2, 3],
        method,
        RoundContext(
            ranks={"m0": 4, "m1": 4},
            scalings=sent.scalings,
            reference=sent,
            server_round=server_round,
            seed=6,
        ),
    )
    for module, matrix in result.adapter.modules.items():
        seed = generator(module_seed(6, server_round, module))
        drawn = fresh_adapter(matrix.shape, 4, seed, dtype=torch.float32)
        for factor in set(method.shared_factors) - set(method.sent_factors(server_round)):
            known = drawn if method.fresh else sent.modules[module]
            assert torch.equal(getattr(matrix, factor), getattr(known, factor))


# ── averages of factors ──


def mean_of(factors, weights) -> torch.Tensor:
    return sum(float(w) * f for w, f in zip(weights, factors, strict=True))


def cross_term(updates, weights) -> torch.Tensor:
    """sum_i w_i (B_i - B)(A_i - A), the long way."""
    B, A = mean_of([u.B for u in updates], weights), mean_of([u.A for u in updates], weights)
    return sum(float(w) * (u.B - B) @ (u.A - A) for w, u in zip(weights, updates, strict=True))


def padded(update: LowRank, rank: int) -> LowRank:
    more = rank - update.rank
    B = torch.cat([update.B, torch.zeros(len(update.B), more, dtype=torch.float64)], 1)
    return LowRank(
        B, torch.cat([update.A, torch.zeros(more, update.A.shape[1], dtype=torch.float64)])
    )


@pytest.mark.parametrize("method", [FedIT(), FedSALoRA(), FRLoRA(), HetLoRA(), FedExLoRA()])
def test_a_mean_of_factors_is_off_by_the_cross_term(method):
    updates, weights = clients(), some_weights(3)
    reference = random_matrix(40, 30, 4, seed=8)
    result = aggregate(method, updates, weights, rank=4, reference=reference)
    wanted = cross_term(updates, weights)
    B, A = mean_of([u.B for u in updates], weights), mean_of([u.A for u in updates], weights)
    assert torch.allclose(dense_sum(updates, weights) - B @ A, wanted, atol=1e-12)
    if isinstance(method, FRLoRA):
        assert torch.equal(result.adapter.B, reference.B) and torch.equal(
            result.adapter.A, reference.A
        )
        assert error(result.residual.dense(), B @ A - reference.dense()) < 1e-12
    else:
        assert error(result.adapter.B, B) < 1e-12 and error(result.adapter.A, A) < 1e-12
    if isinstance(method, FedExLoRA):
        assert error(result.residual.dense(), wanted) < 1e-12
        assert result.residual.rank == 2 * 4  # (n - 1) rank
    else:
        assert result.findings["dropped_energy"] == pytest.approx(
            float(wanted.square().sum()), rel=1e-10
        )


# ── FRLoRA ──


@pytest.mark.parametrize("scaling", [0.25, 1.0, 8.0])
def test_frlora_starts_as_the_base_and_telescopes(scaling):
    W0 = {
        "m0": torch.randn(40, 30, generator=generator(1)),
        "m1": torch.randn(20, 50, generator=generator(2)),
    }
    fresh = adapters(scalings=(scaling,), ranks=(4,))[0]
    start, changes = initialize_adapter(FRLoRA(), fresh, W0.__getitem__)
    base = {module: W0[module].double() + changes[module].dense() for module in W0}
    for module, W in W0.items():
        assert error(base[module] + start.effective(module).dense(), W.double()) < 1e-12
        B0, A0 = start.modules[module].B, start.modules[module].A
        U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        assert error(scaling * B0 @ A0, (U[:, :4] * S[:4]) @ Vh[:4]) < 1e-12
        assert torch.allclose(B0.mT @ B0, torch.diag(S[:4] / scaling)) and torch.allclose(
            A0 @ A0.mT, B0.mT @ B0
        )
    expected = {module: W.double() for module, W in W0.items()}
    for server_round in (1, 2, 3):
        given = adapters(scalings=(scaling,) * 3, seed=10 * server_round)
        result = aggregate_updates(
            given,
            WEIGHTS.tolist(),
            FRLoRA(),
            RoundContext(
                ranks=dict.fromkeys(W0, 4),
                scalings=start.scalings,
                reference=start,
                server_round=server_round,
            ),
        )
        for module in W0:
            base[module] = base[module] + result.residual[module].dense()
            B = mean_of([a.modules[module].B for a in given], WEIGHTS)
            A = mean_of([a.modules[module].A for a in given], WEIGHTS)
            expected[module] = expected[module] + scaling * (B @ A - start.modules[module].dense())
            deployed = base[module] + result.adapter.effective(module).dense()
            assert error(deployed, expected[module]) < 1e-12


def test_frlora_refuses_to_run_without_its_initial_adapter():
    with pytest.raises(
        ValueError, match="the adapter they started from, of rank 4; got None for it"
    ):
        aggregate(FRLoRA(), clients(), some_weights(3), rank=4)
    with pytest.raises(ValueError, match="base weight"):
        initialize_adapter(FRLoRA(), adapters()[0])


def test_other_methods_start_as_lora_does():
    fresh = adapters()[0]
    for cls in METHODS.values():
        if not cls.reads_base:
            start, changes = initialize_adapter(cls(), fresh)
            assert not changes and all(start.modules[m] is fresh.modules[m] for m in fresh.modules)


# ── FLoRA, FLoRIST ──


def test_flora_sends_the_stack_and_starts_from_a_new_adapter():
    updates, weights = clients(ranks=(2, 4, 8)), some_weights(3)
    result = aggregate(FLoRA(), updates, weights, rank=4, seed=3)
    assert result.residual.rank == 14
    assert torch.equal(result.residual.A, torch.cat([u.A for u in updates]))
    assert not result.adapter.B.any()
    assert 0.9 / math.sqrt(30) < float(result.adapter.A.abs().max()) < 1 / math.sqrt(30)
    other = aggregate(FLoRA(), updates, weights, rank=4, seed=4)
    assert not torch.equal(result.adapter.A, other.adapter.A)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_florist_cuts_flora_at_its_energy(energy):
    updates, weights = clients((60, 50), (2, 4, 8), condition=10), some_weights(3)
    flora = aggregate(FLoRA(), updates, weights, rank=4, seed=3)
    florist = aggregate(FLoRIST(energy=energy), updates, weights, rank=4, seed=3)
    assert torch.equal(florist.adapter.A, flora.adapter.A) and torch.equal(
        florist.adapter.B, flora.adapter.B
    )
    U, S, Vh = torch.linalg.svd(dense_sum(updates, weights))
    p = (
        14
        if energy == 1
        else next(p for p in range(1, 15) if S[:p].square().sum() >= energy * S.square().sum())
    )
    assert florist.residual.rank == p
    assert error(florist.residual.dense(), (U[:, :p] * S[:p]) @ Vh[:p]) < 1e-10
    assert torch.allclose(
        florist.residual.A @ florist.residual.A.mT, torch.eye(p, dtype=torch.float64)
    )
    if energy == 1:
        assert error(florist.residual.dense(), flora.residual.dense()) < 1e-12


# ── one factor at a time ──


def test_ffa_and_rolora_leave_the_frozen_factor_as_it_is():
    start = LowRank(torch.zeros(40, 4, dtype=torch.float64), random_matrix(40, 30, 4).A)
    for method, server_round, trained in (
        (FFALoRA(), 1, "B"),
        (FFALoRA(), 2, "B"),
        (RoLoRA(), 1, "B"),
        (RoLoRA(), 2, "A"),
    ):
        updates = valid_updates(method, clients(), start, server_round)
        adapter = aggregate(
            method, updates, WEIGHTS, rank=4, reference=start, server_round=server_round
        ).adapter
        frozen = {"A": "B", "B": "A"}[trained]
        assert torch.equal(getattr(adapter, frozen), getattr(start, frozen))
        assert (
            error(
                getattr(adapter, trained), mean_of([getattr(u, trained) for u in updates], WEIGHTS)
            )
            < 1e-12
        )
    assert [RoLoRA().trained_factors(t) for t in (1, 2, 3, 4)] == [
        "B",
        "A",
        "B",
        "A",
    ]  # B first: it starts at zero


def test_fedsvd_makes_A_orthonormal_and_keeps_the_product():
    adapter = LowRank(torch.zeros(40, 4, dtype=torch.float64), random_matrix(40, 30, 4).A)
    for server_round in range(1, 4):
        updates = valid_updates(FedSVD(), clients(seed=server_round), adapter)
        before = dense_sum(updates, WEIGHTS)
        adapter = aggregate(
            FedSVD(), updates, WEIGHTS, rank=4, reference=adapter, server_round=server_round
        ).adapter
        assert torch.allclose(adapter.A @ adapter.A.mT, EYE, atol=1e-12)
        assert error(adapter.dense(), before) < 1e-12
        BtB = adapter.B.mT @ adapter.B
        assert torch.allclose(
            BtB, torch.diag(torch.linalg.svdvals(before)[:4].square()), atol=1e-12
        )
    with_nothing_learned = aggregate(
        FedSVD(), [LowRank(adapter.B * 0, adapter.A)], torch.ones(1), rank=4
    ).adapter
    assert not with_nothing_learned.B.any() and torch.allclose(
        with_nothing_learned.A @ with_nothing_learned.A.mT, EYE
    )


# ── HetLoRA ──


def test_hetlora_pads_averages_and_truncates():
    updates, weights = clients(ranks=(2, 4, 8)), some_weights(3)
    wide = [padded(u, 8) for u in updates]
    B, A = mean_of([u.B for u in wide], weights), mean_of([u.A for u in wide], weights)
    full = aggregate(HetLoRA(), updates, weights, rank=8)
    assert error(full.adapter.B, B) < 1e-12 and error(full.adapter.A, A) < 1e-12
    assert full.findings["dropped_energy"] == pytest.approx(
        float(cross_term(wide, weights).square().sum())
    )
    cut = aggregate(HetLoRA(), updates, weights, rank=3)
    assert error(cut.adapter.B, B[:, :3]) < 1e-12 and error(cut.adapter.A, A[:3]) < 1e-12
    own, tail = HetLoRA().client_adapter(full.adapter, 2)
    assert torch.equal(own.B, full.adapter.B[:, :2]) and torch.equal(tail.A, full.adapter.A[2:])


def test_hetlora_weights_clients_by_the_norm_of_their_full_update():
    given = adapters()
    norms = torch.tensor(
        [
            math.sqrt(sum(float(a.effective(m).dense().square().sum()) for m in a.modules))
            for a in given
        ],
        dtype=torch.float64,
    )
    ranks, scalings = {"m0": 4, "m1": 4}, {"m0": 3.0, "m1": 3.0}
    result = aggregate_updates(
        given, [8, 1, 1], HetLoRA(), RoundContext(ranks=ranks, scalings=scalings)
    )
    assert torch.allclose(result.weights, norms / norms.sum(), atol=1e-12)
    others = aggregate_updates(
        given, [8, 1, 1], FedIT(), RoundContext(ranks=ranks, scalings=scalings)
    )
    assert torch.allclose(others.weights, torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64))
    A = mean_of([a.modules["m0"].A for a in given], norms / norms.sum())
    assert error(result.adapter.modules["m0"].A, A) < 1e-12
    shares = torch.tensor([0.8, 0.2])
    assert torch.equal(
        HetLoRA().client_weights(shares, lambda: torch.zeros(2)),
        torch.full((2,), 0.5, dtype=torch.float64),
    )
    one_sided = HetLoRA().client_weights(shares, lambda: torch.tensor([0.0, 2.0]))
    assert float(one_sided.min()) > 0 and float(one_sided[1]) == pytest.approx(1)


@pytest.mark.parametrize("decay, rank", [(0.29, 100), (0.57, 100), (0.58, 50), (0.7, 90)])
def test_hetlora_prunes_to_the_whole_number_that_the_product_is(decay, rank):
    """In floating point 0.29 * 100 is 28.999999999999996."""
    tail = [LowRank(torch.zeros(3, rank), torch.zeros(rank, 3))]
    start = [LowRank(torch.ones(3, rank), torch.ones(rank, 3))]
    method = HetLoRA(decay=decay)
    assert method.next_rank(rank, start, tail) == round(decay * rank)
    assert method.next_rank(rank - 1, start, tail) == int(decay * (rank - 1))


def test_hetloras_penalty_is_on_the_tail_and_prunes():
    method = HetLoRA(decay=0.75, strength=0.3, min_rank=5)
    B = torch.randn(40, 8, generator=generator(1), dtype=torch.float64, requires_grad=True)
    A = torch.randn(8, 30, generator=generator(2), dtype=torch.float64, requires_grad=True)
    other = random_matrix(20, 50, 4)
    penalty = method.penalty([LowRank(B, A), other])
    wanted = B[:, 6:].norm() * A[6:].norm() + other.B[:, 3:].norm() * other.A[3:].norm()
    assert float(penalty.detach()) == pytest.approx(0.3 * float(wanted.detach()))
    penalty.backward()
    assert not B.grad[:, :6].any() and not A.grad[:6].any()
    assert torch.allclose(B.grad[:, 6:], 0.3 * A[6:].norm() * B[:, 6:] / B[:, 6:].norm())
    start = torch.zeros(40, 8, requires_grad=True)
    method.penalty([LowRank(start, A.detach().float())]).backward()
    assert bool(torch.isfinite(start.grad).all())  # B starts at zero
    assert HetLoRA(strength=0).penalty([other]) is None and FedIT().penalty([other]) is None

    before = [LowRank(B.detach(), A.detach())]
    smaller = [LowRank(B.detach() * 0.9, A.detach())]
    assert method.next_rank(8, before, smaller) == 6
    assert method.next_rank(8, before, before) == 8 and method.next_rank(8, smaller, before) == 8
    assert HetLoRA(decay=0.25).next_rank(8, before, smaller) == 5  # min_rank
    assert HetLoRA(decay=0.5).next_rank(4, before, smaller) == 4  # below it already
    assert FedIT().next_rank(8, before, smaller) == 8


# ── FedRot-LoRA ──


def rotation(rank: int, seed: int, *, proper: bool = True) -> torch.Tensor:
    Q = torch.linalg.qr(torch.randn(rank, rank, generator=generator(seed), dtype=torch.float64)).Q
    return torch.cat(
        [Q[:, :-1], Q[:, -1:] * (1 if (torch.linalg.det(Q) > 0) == proper else -1)], dim=1
    )


@pytest.mark.parametrize(
    "method", [FedRotLoRA(), FedRotLoRA(strength=1), FedRotLoRA(rotation="hard")], ids=repr
)
@pytest.mark.parametrize("server_round", [1, 2])
def test_fedrot_turns_factors_and_keeps_products(method, server_round):
    reference = random_matrix(40, 30, 4, seed=5)
    updates, weights = clients(), some_weights(3)
    turned = [method.rotate(u, reference, server_round) for u in updates]
    for before, after in zip(updates, turned, strict=True):
        assert error(after.dense(), before.dense()) < 1e-12
        assert torch.allclose(after.A @ after.A.mT @ EYE, after.A @ after.A.mT)
        assert after.A.norm() == pytest.approx(float(before.A.norm()))
    result = aggregate(
        method, updates, weights, rank=4, reference=reference, server_round=server_round
    )
    assert error(result.adapter.B, mean_of([u.B for u in turned], weights)) < 1e-12
    assert error(result.adapter.A, mean_of([u.A for u in turned], weights)) < 1e-12
    assert result.findings["dropped_energy"] == pytest.approx(
        float(cross_term(turned, weights).square().sum())
    )


@pytest.mark.parametrize(("server_round", "factor"), [(2, "A"), (3, "B")])
@pytest.mark.parametrize("proper", [True, False])
def test_fedrot_undoes_a_rotation_and_only_the_hard_one_undoes_a_reflection(
    server_round, factor, proper
):
    reference = random_matrix(40, 30, 4, seed=5)
    R = rotation(4, 3, proper=proper)
    update = LowRank(reference.B @ R, R.mT @ reference.A)
    hard = FedRotLoRA(rotation="hard").rotate(update, reference, server_round)
    full = FedRotLoRA(strength=1).rotate(update, reference, server_round)
    assert error(hard.B, reference.B) < 1e-10 and error(hard.A, reference.A) < 1e-10
    assert (error(full.B, reference.B) < 1e-10) is proper
    # none of many rotations comes closer, and a soft rotation lies between
    distances = [
        error(
            getattr(FedRotLoRA(strength=s).rotate(update, reference, server_round), factor),
            getattr(reference, factor),
        )
        for s in (0, 0.25, 0.5, 0.75, 1)
    ]
    if proper:
        assert (
            distances == sorted(distances, reverse=True)
            and distances[0] > distances[2] > distances[4]
        )
    for seed in range(30):
        Q = rotation(4, seed)
        other = LowRank(update.B @ Q, Q.mT @ update.A)
        assert distances[4] <= error(getattr(other, factor), getattr(reference, factor)) + 1e-12


def test_fedrot_of_strength_zero_or_without_a_reference_is_fedit():
    updates, weights = clients(), some_weights(3)
    reference = random_matrix(40, 30, 4, seed=5)
    fedit = aggregate(FedIT(), updates, weights, rank=4)
    untrained = LowRank(reference.B * 0, reference.A)
    for method, known in (
        (FedRotLoRA(strength=0), reference),
        (FedRotLoRA(), None),
        (FedRotLoRA(), untrained),
    ):
        for server_round in (1, 2):
            got = aggregate(
                method, updates, weights, rank=4, reference=known, server_round=server_round
            ).adapter
            assert error(got.B, fedit.adapter.B) < 1e-12 and error(got.A, fedit.adapter.A) < 1e-12


def test_fedrot_shrinks_the_error_of_clients_that_differ_by_a_rotation():
    start = random_matrix(40, 30, 4, seed=5)
    drift = [torch.randn(4, 4, generator=generator(s), dtype=torch.float64) for s in range(3)]
    turns = [torch.linalg.matrix_exp(0.4 * (d - d.mT)) for d in drift]
    updates = [LowRank(start.B @ R, R.mT @ start.A) for R in turns]
    weights = some_weights(3)
    lost = [
        aggregate(method, updates, weights, rank=4, reference=start, server_round=2).findings[
            "dropped_energy"
        ]
        for method in (FedIT(), FedRotLoRA(), FedRotLoRA(rotation="hard"))
    ]
    assert lost[0] > lost[1] > lost[2] and lost[2] < 1e-20


# ── LoRA-FAIR ──


def fair_clients():
    start = random_matrix(40, 30, 4, seed=5)
    return [LowRank(start.B + 0.7 * u.B, start.A + 0.7 * u.A) for u in clients()], torch.tensor(
        [0.5, 0.2, 0.3], dtype=torch.float64
    )


@pytest.mark.parametrize("strength", [1e-3, 0.5, 100.0])
def test_lorafair_ridge_is_the_closed_form(strength):
    updates, weights = fair_clients()
    result = aggregate(
        LoRAFAIR(objective="ridge", strength=strength), updates, weights, rank=4
    ).adapter
    B, A = mean_of([u.B for u in updates], weights), mean_of([u.A for u in updates], weights)
    E = dense_sum(updates, weights) - B @ A
    assert error(result.B, B + E @ A.mT @ torch.linalg.inv(A @ A.mT + strength * EYE)) < 1e-10
    assert error(result.A, A) < 1e-12


def cosine_objective(C, delta, B, A, strength):
    product = C @ A
    cosine = (delta * product).sum() / (delta.norm() * product.norm())
    return 1 - cosine + strength * (C - B).norm()


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 0.03])
def test_lorafair_cosine_is_at_the_minimum_of_the_dense_objective(strength):
    updates, weights = fair_clients()
    result = aggregate(LoRAFAIR(strength=strength), updates, weights, rank=4)
    delta = dense_sum(updates, weights)
    B, A = mean_of([u.B for u in updates], weights), mean_of([u.A for u in updates], weights)
    C = result.adapter.B.clone().requires_grad_()
    value = cosine_objective(C, delta, B, A, strength)
    (gradient,) = torch.autograd.grad(value, C)
    assert float(gradient.norm()) < 1e-10
    value = value.detach()
    assert value < cosine_objective(B, delta, B, A, strength)
    dense_cosine = (delta * result.adapter.dense()).sum() / (
        delta.norm() * result.adapter.dense().norm()
    )
    assert result.findings["cosine"] == pytest.approx(float(dense_cosine), abs=1e-12)
    for seed in range(4):  # no descent from another start ends lower
        other = (
            B + 0.3 * torch.randn(B.shape, generator=generator(seed), dtype=torch.float64)
        ).requires_grad_()
        descent = torch.optim.LBFGS(
            [other], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12
        )

        def closure(other=other, descent=descent):
            descent.zero_grad()
            loss = cosine_objective(other, delta, B, A, strength)
            loss.backward()
            return loss

        descent.step(closure)
        assert closure().detach() >= value - 1e-12


def test_lorafair_cosine_where_the_mean_factors_point_away_from_the_sum():
    """Two adapters with the signs of their factors flipped: the objective has no minimizer."""
    first = random_matrix(12, 10, 1, seed=4)
    other = random_matrix(12, 10, 1, seed=5)
    flipped = LowRank(-2 * first.B + 0.1 * other.B, -0.9 * first.A + 0.01 * other.A)
    updates = [first, flipped]
    weights = torch.full((2,), 0.5, dtype=torch.float64)
    delta = dense_sum(updates, weights)
    mean = LowRank((first.B + flipped.B) / 2, (first.A + flipped.A) / 2)
    assert float((delta * mean.dense()).sum()) < 0
    result = aggregate(LoRAFAIR(), updates, weights, rank=1)
    least_squares = delta @ torch.linalg.pinv(mean.A)
    assert error(result.adapter.B, least_squares) < 1e-10
    assert result.findings["cosine"] > 0.99


def test_lorafair_cosine_leaves_B_where_the_gain_is_below_the_price():
    updates, weights = fair_clients()
    fedit = aggregate(FedIT(), updates, weights, rank=4).adapter
    delta, B = dense_sum(updates, weights), fedit.B.clone().requires_grad_()
    cosine_objective(B, delta, fedit.B + 1, fedit.A, 0.0).backward()
    price = float(B.grad.norm())
    stays = aggregate(LoRAFAIR(strength=price * 1.001), updates, weights, rank=4).adapter
    moves = aggregate(LoRAFAIR(strength=price * 0.999), updates, weights, rank=4).adapter
    assert torch.equal(stays.B, fedit.B)
    assert 0 < error(moves.B, fedit.B) < 0.01


@pytest.mark.parametrize("objective", ["cosine", "ridge"])
def test_lorafair_corrects_nothing_where_nothing_was_learned(objective):
    A = random_matrix(40, 30, 4).A
    update = LowRank(torch.zeros(40, 4, dtype=torch.float64), A)
    result = aggregate(
        LoRAFAIR(objective=objective), [update, update], some_weights(2), rank=4
    ).adapter
    assert not result.B.any() and error(result.A, A) < 1e-12


# ── the wire ──


def P(rank, out_size, in_size):
    return rank * (out_size + in_size)


PAYLOADS = {  # rank, residual rank, out, in, round -> numbers up, numbers down
    "fedmomentum": lambda r, q, d, k, t: (P(r, d, k), P(r, d, k) + P(q, d, k)),
    "fedit": lambda r, q, d, k, t: (P(r, d, k), P(r, d, k)),
    "flora": lambda r, q, d, k, t: (P(r, d, k), P(q, d, k)),
    "ffalora": lambda r, q, d, k, t: (r * d, r * d),
    "frlora": lambda r, q, d, k, t: (P(r, d, k), P(r, d, k)),
    "flexlora": lambda r, q, d, k, t: (P(r, d, k), P(r, d, k)),
    "fedexlora": lambda r, q, d, k, t: (P(r, d, k), P(r, d, k) + P(q, d, k)),
    "hetlora": lambda r, q, d, k, t: (P(r, d, k), P(r, d, k)),
    "rolora": lambda r, q, d, k, t: (r * d, r * d) if t % 2 else (r * k, r * k),
    "fedsvd": lambda r, q, d, k, t: (r * d, P(r, d, k)),
    "fedsalora": lambda r, q, d, k, t: (r * k, r * k),
    "lorafair": lambda r, q, d, k, t: (P(r, d, k), P(r, d, k)),
    "fedrotlora": lambda r, q, d, k, t: (P(r, d, k), P(r, d, k)),
    "florist": lambda r, q, d, k, t: (P(r, d, k), P(q, d, k)),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("server_round", [1, 2])
def test_payloads_are_those_of_the_papers(name, server_round):
    method = METHODS[name]()
    reference = random_matrix(40, 30, 4, seed=77)
    updates = valid_updates(method, clients(condition=10), reference, server_round)
    result = aggregate(
        method, updates, some_weights(3), rank=4, reference=reference, server_round=server_round
    )
    q = result.residual.rank if result.residual else 0
    up, down = PAYLOADS[name](4, q, 40, 30, server_round)
    assert method.num_uplink_parameters(40, 30, 4, server_round) == up
    assert method.num_downlink_parameters(40, 30, 4, q, server_round) == down
    bound = {
        "fedmomentum": 8,
        "fedexlora": 8,
        "flora": 12,
        "florist": 12,
        "frlora": 8,
    }  # (n - 1) r, n r, 2 r
    assert q <= bound.get(name, 0) == method.max_residual_rank(4, 3)


# ── settings ──


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("florist", {"energy": 0.0}, "energy"),
        ("florist", {"energy": 1.5}, "energy"),
        ("hetlora", {"decay": 0.0}, "decay"),
        ("hetlora", {"decay": 1.1}, "decay"),
        ("hetlora", {"strength": -1.0}, "strength"),
        ("hetlora", {"min_rank": 0}, "min_rank"),
        ("lorafair", {"objective": "l2"}, "cosine or ridge; got 'l2'"),
        ("lorafair", {"strength": 0.0}, "strength"),
        ("fedrotlora", {"rotation": "firm"}, "soft or hard; got 'firm'"),
        ("fedrotlora", {"strength": 1.5}, "strength"),
        ("fedrotlora", {"strength": -0.1}, "strength"),
    ],
)
def test_invalid_settings_are_refused_by_the_constructor(name, settings, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name](**settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fedmomentum", {"energy": "x"}, "energy must be a finite number; got 'x'"),
        ("fedmomentum", {"energy": True}, "energy must be a finite number; got True"),
        ("fedmomentum", {"energy": math.nan}, "energy must be a finite number; got nan"),
        ("fedmomentum", {"merge_every": True}, "merge_every must be a whole number; got True"),
        ("fedmomentum", {"split": 3}, "split must be a text; got 3"),
        ("hetlora", {"min_rank": 1.5}, "min_rank must be a whole number; got 1.5"),
        ("hetlora", {"strength": "much"}, "strength must be a finite number; got 'much'"),
        ("hetlora", {"strength": math.nan}, "strength must be a finite number; got nan"),
        ("fedrotlora", {"strength": True}, "strength must be a finite number; got True"),
    ],
)
def test_a_setting_of_another_type_is_refused_by_name(name, settings, message):
    with pytest.raises(ConfigError, match=re.escape(f"method {name}: {message}")):
        build_method(name, settings)


def test_a_whole_number_is_a_number():
    assert build_method("fedmomentum", {"energy": 1}).energy == 1
