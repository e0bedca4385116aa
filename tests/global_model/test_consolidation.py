"""Any client that holds the parts builds the snapshot, to the same bytes; no client downloads more than one; nothing is lost."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fedmomentum.aggregation.aggregate import AggregationResult
from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.errors import FedMomentumError, ModelError, PayloadError
from fedmomentum.formats.round_record import RoundRecord
from fedmomentum.global_model import consolidation
from fedmomentum.global_model.consolidation import (
    Recipe,
    consolidate,
    make_snapshot,
    plan_delivery,
    prune_recipes,
    rebuild_snapshot,
    should_consolidate,
)
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.lora.adapter import Adapter
from fedmomentum.protocol.codec import decode_task, encode_task
from fedmomentum.protocol.transport import Failure, InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from fedmomentum.server.checkpoint import RunDirectory
from fedmomentum.server.state import ServerState
from fedmomentum.utils.schema import parse_json
from fedmomentum.utils.tensors import read_safetensors, safetensors_bytes
from tests.helpers import error, generator, random_matrix
from tests.runs import Events, chain, nudge, objects, timeless, tiny_config

RECIPE = {"makes": "0" * 64, "onto": None, "parts": [], "ties": "0" * 64}
NO_TIES = StoredObject(safetensors_bytes({}))


def reordered(parts, draw) -> list[StoredObject]:
    """The same sum in another order: of the parts, and of the components within each."""
    mixed = []
    for blob in (parts[i] for i in torch.randperm(len(parts), generator=draw)):
        matrices = {}
        for module, matrix in blob.matrices.items():
            if isinstance(matrix, LowRank):
                order = torch.randperm(matrix.rank, generator=draw)
                matrix = LowRank(matrix.B[:, order], matrix.A[order])
            matrices[module] = matrix
        mixed.append(StoredObject.of(matrices))
    return mixed


# ── the arithmetic ──


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 23), st.integers(1, 40)),
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    dense=st.integers(0, 2),
    exponents=st.lists(
        st.sampled_from([-80, -60, -21, -3, 0, 0, 0, 8, 40]), min_size=8, max_size=8
    ),
    cancels=st.booleans(),
    block=st.sampled_from([1, 7, 100, 2**20]),
    threads=st.integers(1, 2),
    seed=st.integers(0, 10**6),
)
def test_any_order_blocking_and_threads_give_the_servers_bytes(
    shape, ranks, dense, exponents, cancels, block, threads, seed
):
    """Whatever the sizes of the parts, from below float32's denormals to 2^80, and whatever cancels."""
    draw, shapes = generator(seed), {"a": shape, "b": shape[::-1]}
    parts = []
    for rank, exponent in zip(ranks, exponents, strict=False):
        drawn = {}
        for module, (out_size, in_size) in shapes.items():
            B, A = (
                torch.randn(out_size, rank, generator=draw),
                torch.randn(rank, in_size, generator=draw),
            )
            drawn[module] = LowRank(B * 2.0**exponent, A * 2.0**exponent)
        parts.append(StoredObject.of(drawn))
    parts += [StoredObject.of({"a": torch.randn(shape, generator=draw)}) for _ in range(dense)]
    if cancels:
        taken_off = {m: matrix.scaled(-1.0) for m, matrix in parts[0].matrices.items()}
        parts += [StoredObject.of(taken_off), parts[0], parts[0]]
    wanted, ties = make_snapshot(parts)
    before, threads_before = consolidation.BLOCK_ELEMENTS, torch.get_num_threads()
    try:
        consolidation.BLOCK_ELEMENTS = block
        torch.set_num_threads(threads)
        snapshot = rebuild_snapshot(reordered(parts, draw), ties, shapes)
    finally:
        consolidation.BLOCK_ELEMENTS = before
        torch.set_num_threads(threads_before)
    assert snapshot.name == wanted.name
    for total in wanted.matrices.values():
        assert not torch.signbit(total[total == 0]).any()


def near_a_tie() -> list[StoredObject]:
    """1 + 2^-24 (1 + 2^-20) is just above the middle of two float32 numbers; 2^31 in between takes that from it."""
    ones = LowRank(torch.ones(5, 1), torch.ones(1, 3))
    large = ones.scaled(2.0**31)
    middle = ones.scaled(2.0**-24 * (1 + 2.0**-20))
    return [StoredObject.of({"m": matrix}) for matrix in (ones, middle, large, large.scaled(-1.0))]


def test_near_ties_are_decided_by_the_server():
    """An input on which two orders round apart: the list, and nothing else, makes them one."""
    parts, shapes = near_a_tie(), {"m": (5, 3)}
    wanted, ties = make_snapshot(parts)
    other = [parts[i] for i in (2, 3, 0, 1)]
    assert rebuild_snapshot(other, NO_TIES, shapes).name != wanted.name
    assert rebuild_snapshot(other, ties, shapes).name == wanted.name
    found = read_safetensors(ties.data, "ties")[0]
    assert found["m.index"].tolist() == list(range(15))
    assert torch.equal(found["m.value"], wanted.matrices["m"].flatten())


def test_the_bound_is_wide_enough_for_the_worst_order():
    """64 times 2^-53 added to one are lost, each by itself; added first they are 2^-47, and that passes the middle."""
    one, half, small = 1.0, 2.0**-24 * (1 - 2.0**-24), (2.0**-26, 2.0**-27)
    parts = [StoredObject.of({"m": torch.tensor([[x]])}) for x in (one, half)]
    parts += [
        StoredObject.of({"m": LowRank(torch.tensor([[small[0]]]), torch.tensor([[small[1]]]))})
    ] * 64
    wanted, ties = make_snapshot(parts)
    assert rebuild_snapshot(parts[::-1], NO_TIES, {"m": (1, 1)}).name != wanted.name
    assert rebuild_snapshot(parts[::-1], ties, {"m": (1, 1)}).name == wanted.name


@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    spread=st.integers(0, 30),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_the_bound_holds_against_exact_arithmetic_and_the_list_is_short(ranks, spread, seed):
    """Every element that is not listed is the exact sum's nearest float32 number."""
    draw, parts = generator(seed), []
    for rank in ranks:
        scales = 2.0 ** torch.randint(-spread, spread + 1, (rank,), generator=draw)
        parts.append(
            LowRank(
                torch.randn(4, rank, generator=draw) * scales, torch.randn(rank, 6, generator=draw)
            )
        )
    snapshot, ties = make_snapshot([StoredObject.of({"m": matrix}) for matrix in parts])
    listed = set(read_safetensors(ties.data, "ties")[0].get("m.index", torch.zeros(0)).tolist())
    got = snapshot.matrices["m"]
    for i in range(4):
        for k in range(6):
            exact = sum(
                Fraction(float(m.B[i, r])) * Fraction(float(m.A[r, k]))
                for m in parts
                for r in range(m.rank)
            )
            rounded = got[i, k]
            others = [
                torch.nextafter(rounded, torch.tensor(side))
                for side in (-float("inf"), float("inf"))
            ]
            misses = [abs(Fraction(float(x)) - exact) for x in (rounded, *others)]
            assert i * 6 + k in listed or misses[0] <= min(misses[1:])
    assert len(listed) <= (24 if spread > 10 else 1)


def test_ties_are_few_at_the_size_of_a_layer():
    parts = [
        StoredObject.of({"m": random_matrix(384, 512, 24, seed=i, dtype=torch.float32)})
        for i in range(12)
    ]
    snapshot, ties = make_snapshot(
        [StoredObject.of({"m": torch.randn(384, 512, generator=generator(1)) * 1e-3}), *parts]
    )
    assert 0 < len(ties.data) < 1e-3 * len(snapshot.data)


REMAKE = """
import sys
from pathlib import Path
from fedmomentum.global_model.consolidation import rebuild_snapshot
from fedmomentum.global_model.objects import StoredObject
*parts, ties = (StoredObject(Path(file).read_bytes()) for file in sys.argv[1:])
print(rebuild_snapshot(parts, ties, {"m": (300, 400)}).name)
"""


def test_another_code_path_of_the_matrix_product_makes_the_same_snapshot(tmp_path):
    """MKL's path for any processor, where torch has MKL: nearly all of its float64 sums have other last bits."""
    parts = [StoredObject.of({"m": random_matrix(300, 400, 60, seed=i)}) for i in range(5)]
    wanted, ties = make_snapshot(parts)
    files = [tmp_path / str(i) for i in range(6)]
    for file, blob in zip(files, (*parts, ties), strict=True):
        file.write_bytes(blob.data)
    process = subprocess.run(
        [sys.executable, "-c", REMAKE, *map(str, files)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"},
    )
    assert process.stdout.strip() == wanted.name


def test_no_full_matrix_is_ever_in_float64(monkeypatch):
    monkeypatch.setattr(consolidation, "BLOCK_ELEMENTS", 2000)
    parts, largest = (
        [StoredObject.of({"m": random_matrix(90, 100, 3, seed=i)}) for i in range(3)],
        [],
    )
    parts.append(StoredObject.of({"m": torch.ones(90, 100)}))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                largest.append(result.numel())
            return result

    with Watch():
        _, ties = make_snapshot(parts)
        rebuild_snapshot(parts, ties, {"m": (90, 100)})
    assert largest and max(largest) <= 2000


def test_a_sum_beyond_float32_is_refused_before_any_client_adopts_it():
    large = StoredObject.of(
        {"m": LowRank(torch.full((2, 1), 1e38), torch.tensor([[1.0, 3.4028234, -2.0]]))}
    )
    snapshot, ties = make_snapshot([large])
    assert rebuild_snapshot([large], ties, {"m": (2, 3)}).name == snapshot.name
    for parts in (
        [large, large],
        [StoredObject.of({"m": LowRank(torch.full((2, 1), 1e38), torch.full((1, 3), 10.0))})],
    ):
        with pytest.raises(ModelError, match="the sum of module m is beyond float32"):
            make_snapshot(parts)
        with pytest.raises(ModelError, match="the sum of module m is beyond float32"):
            rebuild_snapshot(parts, ties, {"m": (2, 3)})


WRONG_TIES = {
    "an index out of range": {"m.index": torch.tensor([15]), "m.value": torch.ones(1)},
    "a negative index": {"m.index": torch.tensor([-1]), "m.value": torch.ones(1)},
    "another dtype": {"m.index": torch.tensor([1], dtype=torch.int32), "m.value": torch.ones(1)},
    "no values": {"m.index": torch.tensor([1])},
    "no indices": {"m.value": torch.ones(1)},
    "more values": {"m.index": torch.tensor([1]), "m.value": torch.ones(2)},
    "a matrix of them": {"m.index": torch.tensor([[1]]), "m.value": torch.ones(1, 1)},
    "another module": {"n.index": torch.tensor([1]), "n.value": torch.ones(1)},
}


@pytest.mark.parametrize("what", WRONG_TIES)
def test_ties_of_other_matrices_are_refused(what):
    with pytest.raises(ModelError, match="ties"):
        rebuild_snapshot(
            near_a_tie(), StoredObject(safetensors_bytes(WRONG_TIES[what])), {"m": (5, 3)}
        )


def test_parts_of_other_modules_or_shapes_are_refused_before_anything_is_built():
    huge = StoredObject.of(
        {"m": LowRank(torch.zeros(2**20, 0), torch.zeros(0, 2**20))}
    )  # 4 TB as a matrix
    for shapes in ({"m": (5, 3)}, {}):
        with pytest.raises(ModelError, match="changes module m"):
            rebuild_snapshot([huge], NO_TIES, shapes)
    with pytest.raises(FedMomentumError):
        rebuild_snapshot(near_a_tie(), StoredObject(b"no safetensors"), {"m": (5, 3)})


# ── what is sent ──

A, B, C, D, E, F, S1, S2, S3, T1, T2, T3 = (c * 64 for c in "abcdef123789")
RECIPES = (
    Recipe(makes=S1, onto=None, parts=(A, B), ties=T1),
    Recipe(makes=S2, onto=S1, parts=(C, D), ties=T2),
    Recipe(makes=S3, onto=S2, parts=(E,), ties=T3),
)
SIZES = (
    {name: 30 for name in (A, B, C, D, E, F)}
    | {name: 100 for name in (S1, S2, S3)}
    | dict.fromkeys((T1, T2, T3), 1)
)


@pytest.mark.parametrize(
    ("held", "objects", "recipes"),
    [
        ({S3, F}, set(), 0),
        ({S3}, {F}, 0),
        (set(), {S3, F}, 0),  # a new client: the snapshot, and what came after
        ({S2, E}, {T3, F}, 1),  # holds all: the ties alone
        ({S2}, {E, T3, F}, 1),  # missed the last round before the snapshot
        ({S1, C, D}, {E, T2, T3, F}, 2),  # across two snapshots
        ({S1, C}, {D, E, T2, T3, F}, 2),
        ({S1}, {S3, F}, 0),  # 30 + 30 + 30 + 2 + 30 against 100 + 30: the chain is C, D, E
        ({A, B}, {C, D, E, T1, T2, T3, F}, 3),
        ({A}, {S3, F}, 0),  # would be dearer than the snapshot
    ],
)
def test_the_cheaper_way_is_taken(held, objects, recipes):
    way = plan_delivery(
        [S3, F], held, RECIPES, {**SIZES, S3: 91 if held == {S1} else 100}.__getitem__
    )
    assert way.objects == objects and way.recipes == RECIPES[len(RECIPES) - recipes :]
    assert way.size == sum({**SIZES, S3: 91 if held == {S1} else 100}[name] for name in objects)


def test_at_equal_cost_the_snapshot_is_downloaded():
    recipe = [Recipe(makes=S2, onto=S1, parts=(C,), ties=T2)]
    assert plan_delivery([S2], {S1}, recipe, {**SIZES, S2: 31}.__getitem__).objects == {S2}
    assert plan_delivery([S2], {S1}, recipe, {**SIZES, S2: 32}.__getitem__).objects == {C, T2}


def test_a_repeated_part_is_sent_once():
    """As FRLoRA's start, in every round."""
    recipe = [Recipe(makes=S1, onto=None, parts=(A, B, A, C, A), ties=T1)]
    way = plan_delivery([S1, A, D], {A, B}, recipe, SIZES.__getitem__)
    assert way.objects == {C, T1, D} and way.size == 61
    way = plan_delivery([S1, A, D], {B, C}, recipe, SIZES.__getitem__)
    assert way.objects == {A, T1, D} and way.recipes == tuple(recipe)


def test_with_a_missing_link_or_a_cycle_the_snapshot_is_sent():
    for recipes in (
        (RECIPES[0], RECIPES[2]),
        (),
        (Recipe(makes=S3, onto=S3, parts=(A,), ties=T1),),
        (
            Recipe(makes=S3, onto=S2, parts=(A,), ties=T1),
            Recipe(makes=S2, onto=S3, parts=(A,), ties=T1),
        ),
    ):
        assert plan_delivery([S3], {S1, C, D, E}, recipes, SIZES.__getitem__).objects == {S3}
    assert plan_delivery([], {A}, RECIPES, SIZES.__getitem__).objects == frozenset()


def test_recipes_are_kept_while_they_can_be_cheaper():
    size = SIZES.__getitem__
    assert prune_recipes(RECIPES, size, 1000) == RECIPES
    assert prune_recipes(RECIPES, size, 93) == RECIPES  # 92 bytes before the first
    assert prune_recipes(RECIPES, size, 92) == RECIPES[1:]
    assert prune_recipes(RECIPES, size, 31) == RECIPES[2:]
    assert (
        prune_recipes(RECIPES, size, 1) == RECIPES[2:]
    )  # the last always: a client that holds all of them builds the snapshot


def test_recipes_from_elsewhere_are_checked():
    good = msgspec.structs.asdict(RECIPES[1])
    assert parse_json(json.dumps(good), Recipe, "a task") == RECIPES[1]
    for bad in (
        [],
        {**good, "parts": "abc"},
        {**good, "parts": ["../../x"]},
        {**good, "ties": None},
        {**good, "more": 1},
        {**good, "makes": 7},
        {**good, "onto": "../x"},
        {k: v for k, v in good.items() if k != "onto"},
        {**good, "parts": [A] * 5000},
    ):
        with pytest.raises(PayloadError, match="a task: "):
            parse_json(json.dumps(bad), Recipe, "a task")


def test_the_number_of_recipes_is_bounded():
    """What a client would have to look through is bounded, whatever a run has had."""
    names = [f"{number:064x}" for number in range(201)]
    many = [
        Recipe(makes=names[number + 1], onto=names[number], parts=(A,), ties=T1)
        for number in range(200)
    ]
    assert prune_recipes(many, lambda name: 0, 1) == tuple(many[-64:])
    wide = [
        Recipe(makes=recipe.makes, onto=recipe.onto, parts=(A,) * 1000, ties=T1) for recipe in many
    ]
    assert prune_recipes(wide, lambda name: 0, 1) == tuple(wide[-4:])


# ── many rounds ──

ALLOWANCE = (
    1.02  # of a dense size: headers and ties, in a matrix of 48 x 64; they shrink with its size
)


class Party:
    """A client's store, as `ClientStore` keeps it."""

    def __init__(self):
        self.blobs: dict[str, StoredObject] = {}

    def names(self):
        return tuple(sorted(self.blobs))

    def takes(self, way, fetch, model, shapes):
        self.blobs |= {name: StoredObject(fetch(name)) for name in way.objects}
        for recipe in way.recipes:
            snapshot = rebuild_snapshot(
                [self.blobs[name] for name in recipe.summed], self.blobs[recipe.ties], shapes
            )
            assert snapshot.name == recipe.makes
            self.blobs[snapshot.name] = snapshot
        needed = {blob.name for blob in model.base_update}
        self.blobs = {name: blob for name, blob in self.blobs.items() if name in needed}
        assert self.blobs.keys() == needed


@pytest.mark.parametrize(
    ("rank", "newcomers"),
    [
        (1, False),
        (3, True),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [(3, False), (9, True), (40, True)]
        ),
    ],
)
def test_no_client_downloads_more_than_a_snapshot_in_two_hundred_and_twenty_rounds(
    tmp_path, rank, newcomers
):
    """Clients that are new, or missed any number of rounds; those that missed none download none. And the sum is exact.

    Rank 40 stands for a residual that is dense, where a round's own part is a snapshot's size.
    """
    from fedmomentum.server.delivery import consolidate_if_due, plan_deliveries

    shape, is_dense = (48, 64), rank == 40
    start = Adapter({"m": random_matrix(*shape, 2).to(torch.float32)}, {"m": 1.0})
    model, state = GlobalModel(BaseIdentity("tiny"), start), ServerState("run")
    folder = RunDirectory(tmp_path / "run", keep=1)
    size, wanted = 4 * shape[0] * shape[1], torch.zeros(shape, dtype=torch.float64)
    parties = {"always": Party(), **{f"every {k}": Party() for k in (2, 5, 13, 50)}}
    snapshots, merged_bytes, all_bytes, chains = 0, 0, 0, 0
    for server_round in range(1, 221):
        if newcomers:
            parties[f"new in {server_round}"] = Party()
        asked = [
            name
            for name in parties
            if name == "always"
            or name == f"new in {server_round}"
            or name.startswith("every")
            and server_round % int(name.split()[1]) == 0
        ]
        model, state = consolidate_if_due(model, state, asked, folder)
        ways = plan_deliveries(model, state, asked, folder)
        sent = {blob.name: blob.data for blob in model.base_update}
        for name, way in ways.items():
            parties[name].takes(
                way, lambda n, sent=sent: sent.get(n) or folder.read(n), model, {"m": shape}
            )
            assert way.size <= ALLOWANCE * size, (server_round, name)
            state = state.with_cached_objects(name, parties[name].names())
            chains += len(way.recipes) > 1
        always = ways["always"].objects
        snapshots += any("m.dense" in read_safetensors(sent[n], "")[0] for n in always if n in sent)
        all_bytes += ways["always"].size
        residual = random_matrix(*shape, rank, seed=server_round).scaled(1e-3).to(torch.float32)
        residual = residual.dense() if is_dense else residual
        model = model.advance(
            AggregationResult(start, {"m": residual}, {}, {}, torch.ones(1)), "method"
        )
        merged_bytes += len(model.newest[0].data)
        wanted += to_dense(residual).double()
        model, state = consolidate_if_due(model, state, [], folder)
        assert (
            sum(part.num_parameters for part in model.base_update)
            <= (1 if is_dense else 2) * shape[0] * shape[1]
        )
        state = state.after_round(model, model)
        folder.commit(model, state, RoundRecord(round=server_round))
        kept = sum(folder.size(file.stem) for file in (tmp_path / "run" / "objects").iterdir())
        assert kept < 5 * size  # the list, the chain, the last round's part
    assert error(to_dense(model.merged("m")), wanted) < 3e-7
    if not is_dense:
        assert (
            snapshots == 0 and all_bytes < 1.15 * merged_bytes
        )  # ties and headers: the parts have only 448 bytes
    if newcomers and not is_dense:
        assert (
            chains > 0
        )  # clients that missed rounds across several snapshots built them one after the other
    folder.close()


# ── runs ──


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


ABSENT = {"site2": {1, 2, 3, 4}, "site3": {2, 3, 5, 6}}
"""Rounds in which a client does not answer."""


def config_of(folder, **sections):
    lora = {"rank": 2, "target-modules": ["v_proj"]}
    federation = {"num_rounds": 8, "min-valid-fraction": 0.01, **sections.pop("federation", {})}
    return tiny_config(
        folder, num_clients=4, lora=lora, federation=federation, evaluation={"every": 0}, **sections
    )


class Watched(InProcessTransport):
    """Separate clients, some absent at times; keeps what each task brought, and may alter it."""

    def __init__(self, parties, absent=ABSENT, alter=lambda task: task):
        super().__init__({name: client.handle for name, client in parties.items()})
        self.absent, self.alter, self.tasks = absent, alter, []

    def send_and_receive(self, tasks):
        for name in sorted(tasks):
            task = decode_task(tasks[name])
            self.tasks.append(task)
            if task.server_round in self.absent.get(name, ()):
                yield name, Failure("away")
            else:
                yield from super().send_and_receive({name: encode_task(self.alter(task))})


def make_clients(config, stores):
    clients = {}
    for name in config.data.client_files:
        client = prepare_client(config, name, stores / name)
        client.training_function = nudge
        clients[name] = client
    return clients


def run_and_record(config, out, **transport):
    watched = Watched(make_clients(config, out), **transport)
    model = run_federation(watched, config, out / "run")
    return watched.tasks, model


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    return (*run_and_record(config_of(folder), out), out)


def update_bytes(task):
    """Bytes of what a task brought for the base."""
    adapter = {*task.request.manifest.adapter.names}
    return sum(len(data) for name, data in task.objects.items() if name not in adapter)


def dense_of(model):
    return 4 * sum(matrix.shape[0] * matrix.shape[1] for matrix in model.adapter.modules.values())


def test_clients_that_join_late_download_one_snapshot_and_the_others_none(undisturbed):
    tasks, model, out = undisturbed
    dense, trained = dense_of(model), [task for task in tasks if task.kind == "train"]
    assert any(task.request.recipes for task in trained)
    largest = {
        name: max(update_bytes(task) for task in trained if task.client_id == name)
        for name in ("site0", "site1", "site2", "site3")
    }
    assert max(largest.values()) < dense + 1024 < 2 * dense  # headers of two small matrices
    snapshots = {
        task.client_id
        for task in trained
        for data in task.objects.values()
        if any(key.endswith(".dense") for key in read_safetensors(data, "")[0])
    }
    assert snapshots <= {"site2", "site3"}
    assert all(not set(row["failures"]) - set(ABSENT) for row in timeless(out / "run"))
    assert [name for name in ABSENT if name in timeless(out / "run")[8]["failures"]] == []


@pytest.mark.parametrize("name", ["frlora", "fedexlora", "flora"])
def test_clients_that_join_late_with_other_methods(folder, tmp_path, name):
    """FRLoRA's list names its start again and again; FLoRA's clients draw the adapter themselves."""
    config = config_of(folder, method={"name": name}, federation={"num_rounds": 12})
    tasks, model = run_and_record(config, tmp_path)
    trained = [task for task in tasks if task.kind == "train"]
    assert any(task.request.recipes for task in trained)
    assert max(map(update_bytes, trained)) < dense_of(model) + 1024
    rows = timeless(tmp_path / "run")
    assert (
        all(row["failures"].keys() <= ABSENT.keys() for row in rows) and rows[-1]["failures"] == {}
    )


def test_a_run_that_consolidates_for_a_client_resumes_to_the_same_bits(
    folder, undisturbed, tmp_path
):
    """Killed after the snapshot was made and before its round was saved, and in the round after."""
    tasks, _, uninterrupted = undisturbed
    config, parties = config_of(folder), make_clients(config_of(folder), tmp_path)
    needed = sorted({task.server_round for task in tasks if getattr(task.request, "recipes", [])})
    for number, server_round in enumerate(
        [*needed, needed[0] + 1 if needed[0] + 1 not in needed else 8]
    ):

        def stop(event, facts, server_round=server_round):
            done = (
                len(list((tmp_path / "run" / "rounds").glob("*.json")))
                and timeless(tmp_path / "run")[-1]["round"]
            )
            if event == "aggregate" and done == server_round - 1:
                raise KeyboardInterrupt

        try:
            run_federation(
                Watched(parties),
                config,
                tmp_path / "run",
                resume=number > 0,
                callbacks=[Events(stop)],
            )
        except KeyboardInterrupt:
            continue
    run_federation(Watched(parties), config, tmp_path / "run", resume=True)
    assert chain(tmp_path / "run") == chain(uninterrupted / "run")
    assert timeless(tmp_path / "run") == timeless(uninterrupted / "run")
    assert objects(tmp_path / "run") == objects(uninterrupted / "run")


@pytest.mark.parametrize(
    "what", ["ties", "other ties", "a part", "no part", "parts twice", "what it makes"]
)
def test_tampering_never_gives_another_base(folder, undisturbed, tmp_path, what):
    """The client discards the result, says what it lacks, and is sent the snapshot; the run is the same."""
    altered = []

    def alter(task):
        recipes = [
            msgspec.structs.asdict(recipe) for recipe in getattr(task.request, "recipes", [])
        ]
        if not recipes:
            return task
        last, sent = recipes[-1], dict(task.objects)
        altered.append((task.client_id, task.server_round))
        if what == "ties":
            sent[last["ties"]] = sent[last["ties"]][:-1] + b"?"
        elif what == "other ties":  # complete, under their own name, and wrong
            module = next(iter(task.request.manifest.scalings))
            wrong = StoredObject(
                safetensors_bytes(
                    {f"{module}.index": torch.tensor([0]), f"{module}.value": torch.ones(1)}
                )
            )
            last["ties"], sent[wrong.name] = wrong.name, wrong.data
        elif what == "a part":
            wrong = StoredObject.of(
                {m: random_matrix(16, 32, 1, seed=3) for m in task.request.manifest.scalings}
            )
            last["parts"], sent[wrong.name] = [wrong.name, *last["parts"][1:]], wrong.data
        elif what == "no part":
            last["parts"] = last["parts"][1:]
        elif what == "parts twice":
            last["parts"] = [*last["parts"], *last["parts"]]
        else:
            last["makes"] = "0" * 64
        changed = [Recipe(**recipe) for recipe in recipes]
        return replace(
            task, objects=sent, request=msgspec.structs.replace(task.request, recipes=changed)
        )

    tasks, model, uninterrupted = undisturbed
    config = config_of(folder)
    more, got = run_and_record(config, tmp_path, alter=alter)
    assert altered and got.version == model.version and got.adapter_objects == model.adapter_objects
    wanted = [
        {**row, "downlink_bytes": None, "uplink_bytes": None}
        for row in timeless(uninterrupted / "run")
    ]
    rows = [
        {**row, "downlink_bytes": None, "uplink_bytes": None} for row in timeless(tmp_path / "run")
    ]
    assert rows == wanted
    repeated = [task for task in more if (task.client_id, task.server_round) in altered]
    assert len(repeated) == 2 * len(altered)  # each was asked again, with the snapshot
    assert {file.name for file in (tmp_path / "site0").rglob("*.safetensors")} == {
        file.name for file in (uninterrupted / "site0").rglob("*.safetensors")
    }


@pytest.mark.parametrize(
    "bad",
    ["x", [1], [{**RECIPE, "makes": "../../x"}], [RECIPE] * 100_000],
    ids=["text", "numbers", "path", "many"],
)
def test_recipes_of_another_form_are_refused_by_name(folder, tmp_path, bad):
    config = config_of(folder, federation={"num_rounds": 1})

    def alter(task):
        changed = msgspec.structs.replace(task.request, recipes=bad)
        return replace(task, request=changed) if task.client_id == "site1" else task

    tasks, _ = run_and_record(
        config,
        tmp_path,
        absent={},
        alter=lambda task: alter(task) if task.kind == "train" else task,
    )
    row = timeless(tmp_path / "run")[1]
    assert list(row["failures"]) == ["site1"]
    assert "PayloadError: a task: request.recipes" in row["failures"]["site1"]


def test_a_snapshot_is_due_by_size_by_need_and_never_of_one_part():
    model = GlobalModel(
        BaseIdentity("b"), Adapter({"m": random_matrix(10, 10, 1, dtype=torch.float32)}, {"m": 1.0})
    )
    part = [
        StoredObject.of({"m": random_matrix(10, 10, 2, seed=i)}) for i in range(6)
    ]  # 40 numbers of 100
    assert not should_consolidate(model) and not should_consolidate(
        replace(model, base_update=(part[0],)), [10**6]
    )
    assert not should_consolidate(replace(model, base_update=tuple(part[:5])), [400])
    assert should_consolidate(replace(model, base_update=tuple(part[:2])), [400, 401])
    assert should_consolidate(replace(model, base_update=tuple(part)))
    dense = StoredObject.of({"m": torch.ones(10, 10)})
    assert should_consolidate(replace(model, base_update=(part[0], dense), newest=(dense,)))
    next_model, recipe, ties = consolidate(replace(model, base_update=(dense, *part, part[0])))
    assert recipe.onto == dense.name and recipe.parts == tuple(
        blob.name for blob in (*part, part[0])
    )
    assert recipe.ties == ties.name and [recipe.makes] == [
        blob.name for blob in next_model.base_update
    ]
    assert consolidate(replace(model, base_update=tuple(part)))[1].onto is None
