"""Every diagnostic of a round against its dense formula, with scalings that are not 1."""

import json
import math
from dataclasses import replace

import pytest
import torch
from msgspec.structs import asdict

from fedmomentum.aggregation.aggregate import RoundContext, aggregate_updates
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.errors import ModelError
from fedmomentum.formats.directories import retained_rounds
from fedmomentum.formats.round_record import CosineRange, PerFactor
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.linalg.probes import BLOCK_ELEMENTS, probe, probe_vectors
from fedmomentum.lora.adapter import Adapter
from fedmomentum.server.client_deltas import distance
from fedmomentum.server.diagnostics import (
    GlobalUpdate,
    factor_norms,
    round_diagnostics,
    subspace_angle,
)
from tests.helpers import random_matrix
from tests.runs import start, timeless, tiny_config

SHAPES = {"a": (12, 9), "b": (7, 15)}
SCALINGS = {"a": 3.0, "b": 0.5}
WEIGHTS = [0.5, 0.3, 0.2]


def adapter(seed: int, rank: int = 3, scale: float = 1.0) -> Adapter:
    modules = {
        m: random_matrix(*shape, rank, seed=seed + i).scaled(scale)
        for i, (m, shape) in enumerate(SHAPES.items())
    }
    return Adapter(modules, SCALINGS, name=f"adapter {seed}")


@pytest.mark.parametrize(
    "shape", [(7, 5), (300, 1000), (3, 200_000)]
)  # less, and more, than is read at a time
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_probe_is_its_formula_whatever_the_size_dtype_and_layout(shape, dtype):
    U, X = probe_vectors("m", shape, 3)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = torch.diagonal(U.mT @ matrix.double() @ X)
    for view in (matrix, matrix.mT.contiguous().mT):
        got = probe(view, U, X)
        assert torch.allclose(got, wanted, rtol=0, atol=1e-12 * float(wanted.norm()))
        assert torch.equal(
            probe(view, U, X, torch.full((BLOCK_ELEMENTS,), torch.nan, dtype=torch.float64)), got
        )


@pytest.mark.parametrize("together", [0, 150, 10**6])  # each by itself, two at once, all of a shape
@pytest.mark.parametrize("ranks", [(3, 3), (2, 4), (0, 2), (0, 0)])
def test_a_distance_is_the_dense_one_however_many_modules_are_taken_at_once(
    together, ranks, monkeypatch
):
    monkeypatch.setattr("fedmomentum.server.client_deltas.BATCH_ELEMENTS", together)
    one, other = (
        Adapter(
            {
                f"{m}{i}": random_matrix(*shape, rank, seed=seed + i)
                for m, shape in SHAPES.items()
                for i in range(4)
            },
            {f"{m}{i}": scaling + i for m in SHAPES for i in range(4)},
        )
        for rank, seed, scaling in zip(ranks, (0, 50), (2.0, 0.5), strict=True)
    )
    differences = [
        one.scalings[m] * one.modules[m].dense() - other.scalings[m] * other.modules[m].dense()
        for m in one.modules
    ]
    wanted = math.sqrt(sum(float(matrix.square().sum()) for matrix in differences))
    assert distance(one, other) == pytest.approx(wanted, rel=1e-12)
    assert distance(one, one) <= 1e-7 * distance(
        one, replace(one, scalings=dict.fromkeys(one.scalings, 0.0))
    )


def nearby(one: Adapter, seed: int, by: float = 0.1) -> Adapter:
    """As a client trains: both factors move."""
    step = adapter(seed, one.modules["a"].rank)
    modules = {
        m: LowRank(f.B + by * step.modules[m].B, f.A + by * step.modules[m].A)
        for m, f in one.modules.items()
    }
    return replace(one, modules=modules)


def dense(one: Adapter) -> torch.Tensor:
    """All effective matrices as one vector."""
    return torch.cat([(SCALINGS[m] * one.modules[m].dense()).flatten() for m in SHAPES])


def flat(changes) -> torch.Tensor:
    nothing = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}
    return torch.cat(
        [(to_dense(changes[m]) if m in changes else nothing[m]).flatten() for m in SHAPES]
    )


def angle(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


@pytest.fixture
def facts():
    begin = adapter(0)
    clients = [nearby(begin, 10 * k) for k in (1, 2, 3)]
    return (
        begin,
        clients,
        adapter(70),
        {"a": random_matrix(12, 9, 4, seed=80)},
        {"b": random_matrix(7, 15, 2, seed=90)},
    )


def test_every_value_is_the_dense_one(facts):
    begin, clients, after, merged, last = facts
    got = round_diagnostics(
        begin, clients, WEIGHTS, after, merged, GlobalUpdate(begin, begin, last)
    )
    update = dense(after) - dense(begin) + flat(merged)
    own = [dense(one) - dense(begin) for one in clients]
    cosines = [angle(one, update) for one in own]
    mean = sum(w * one for w, one in zip(WEIGHTS, own, strict=True))
    assert got.update_norm == pytest.approx(float(update.norm()), rel=1e-12)
    assert got.update_cosine == pytest.approx(angle(update, flat(last)), rel=1e-10)
    assert got.client_cosine.min == pytest.approx(min(cosines), rel=1e-10)
    assert got.client_cosine.max == pytest.approx(max(cosines), rel=1e-10)
    assert got.client_cosine.mean == pytest.approx(sum(cosines) / 3, rel=1e-10)
    drift = sum(float((one - mean).norm() / mean.norm()) for one in own) / 3
    assert got.client_drift == pytest.approx(drift, rel=1e-10)
    for factor in ("A", "B"):
        norms = [
            math.sqrt(sum(float(getattr(f, factor).square().sum()) for f in c.modules.values()))
            for c in clients
        ]
        wanted = sum(w * norm for w, norm in zip(WEIGHTS, norms, strict=True))
        assert getattr(got.factor_norms.before, factor) == pytest.approx(wanted, rel=1e-12)
        assert getattr(got.factor_norms.after, factor) == getattr(factor_norms(after), factor)
    for factor, side in (("A", lambda m: m.A.mT), ("B", lambda m: m.B)):
        degrees = []
        for module in SHAPES:
            P, Q = (torch.linalg.qr(side(one.modules[module])).Q for one in (begin, after))
            degrees.append(
                float(torch.rad2deg(torch.linalg.svdvals(P.mT @ Q).clamp(max=1).acos()).mean())
            )
        assert getattr(got.subspace_angle, factor) == pytest.approx(sum(degrees) / 2, rel=1e-6)


def test_a_change_is_the_dense_one(facts):
    begin, clients, after, merged, last = facts
    one = GlobalUpdate(begin, after, merged)
    assert torch.allclose(flat(one), dense(after) - dense(begin) + flat(merged), atol=1e-12)
    assert isinstance(
        one["a"], torch.Tensor
    )  # rank 10 would be more than 12 x 9 numbers, and so is rank 6


def test_undefined_values_are_none():
    fresh = adapter(0)
    fresh = replace(
        fresh, modules={m: LowRank(torch.zeros_like(f.B), f.A) for m, f in fresh.modules.items()}
    )
    clients = [nearby(fresh, 10 * k) for k in (1, 2, 3)]
    first = round_diagnostics(fresh, clients, WEIGHTS, adapter(5), {}, None)
    assert first.update_cosine is None and first.subspace_angle == PerFactor()
    assert first.client_cosine.min is not None and first.client_drift > 0
    begin = adapter(7)
    still = round_diagnostics(
        begin, [begin] * 3, WEIGHTS, begin, {}, GlobalUpdate(fresh, begin, {})
    )
    assert still.update_norm == 0 and still.update_cosine is None and still.client_drift is None
    assert still.client_cosine == CosineRange()
    assert still.subspace_angle.A == pytest.approx(0, abs=1e-5)
    one = round_diagnostics(
        begin, [begin, nearby(begin, 3), nearby(begin, 4)], WEIGHTS, adapter(9), {}, None
    )
    assert one.client_cosine.mean == pytest.approx(
        (one.client_cosine.min + one.client_cosine.max) / 2
    )


def test_clients_that_agree_and_an_exact_method(facts):
    begin = facts[0]
    same = nearby(begin, 10)
    result = aggregate_updates(
        [same] * 3,
        WEIGHTS,
        METHODS["fedmomentum"](split="balanced"),
        RoundContext(ranks=dict.fromkeys(SHAPES, 3), scalings=SCALINGS, reference=begin),
    )
    got = round_diagnostics(begin, [same] * 3, WEIGHTS, result.adapter, result.residual, None)
    assert got.client_cosine.min == pytest.approx(1) and got.client_drift == pytest.approx(
        0, abs=1e-7
    )
    assert got.update_norm == pytest.approx(float((dense(same) - dense(begin)).norm()))


@pytest.mark.parametrize("rank", [1, 2])
def test_the_split_shows_in_the_norms_of_the_factors(facts, rank):
    norms = {}
    for split in ("balanced", "singular"):
        result = aggregate_updates(
            facts[1],
            WEIGHTS,
            METHODS["fedmomentum"](split=split),
            RoundContext(ranks=dict.fromkeys(SHAPES, rank), scalings=SCALINGS, reference=facts[0]),
        )
        norms[split] = factor_norms(result.adapter)
    assert norms["balanced"].A == pytest.approx(norms["balanced"].B)
    assert norms["singular"].A == pytest.approx(math.sqrt(rank * len(SHAPES)))


def test_angles_of_the_same_and_of_orthogonal_spaces():
    A = torch.eye(4, dtype=torch.float64)
    one = Adapter({"a": LowRank(A[:, :2], A[:2])}, {"a": 2.0})
    other = Adapter({"a": LowRank(A[:, 1:3], A[2:])}, {"a": 2.0})
    assert asdict(subspace_angle(one, one)) == {"A": pytest.approx(0), "B": pytest.approx(0)}
    assert asdict(subspace_angle(one, other)) == {"A": pytest.approx(90), "B": pytest.approx(45)}


# ── in runs ──


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def effective(model: GlobalModel) -> dict[str, torch.Tensor]:
    found = {module: model.effective(module) for module in model.adapter.modules}
    return {m: to_dense(matrix) for m, matrix in found.items()}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"federation": {"downlink_dtype": "float16"}},
        {"method": {"name": "fedit"}},
        {"method": {"settings": {"energy": 0.8}}},
    ],
)
def test_rows_hold_what_the_saved_models_say(folder, tmp_path, sections):
    """Fourteen rounds: long enough that the base is consolidated."""
    federation = {"num_rounds": 14, **sections.get("federation", {})}
    config = tiny_config(
        folder,
        **{**sections, "federation": federation},
        evaluation={"every": 0},
        run={"keep_checkpoints": 50},
    )
    run = start(config, tmp_path / "run")
    models = [
        effective(GlobalModel.load(tmp_path / "run", r)) for r in retained_rounds(tmp_path / "run")
    ]
    if "method" not in sections:
        assert len(run.model.base_update) < 14  # it was
    updates = [
        torch.cat([(now[m] - before[m]).flatten() for m in now])
        for before, now in zip(models, models[1:], strict=False)
    ]
    rows = timeless(tmp_path / "run")
    assert rows[0]["diagnostics"] is None and rows[1]["diagnostics"]["update_cosine"] is None
    for row, update in zip(rows[1:], updates, strict=True):
        assert row["diagnostics"]["update_norm"] == pytest.approx(float(update.norm()), rel=1e-4)
    for row, before, now in zip(rows[2:], updates, updates[1:], strict=False):
        assert row["diagnostics"]["update_cosine"] == pytest.approx(angle(now, before), abs=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_a_run(folder, tmp_path, name):
    config = tiny_config(
        folder, method={"name": name}, evaluation={"every": 0}, run={"keep_checkpoints": 50}
    )
    start(config, tmp_path / "run")
    models = [
        effective(GlobalModel.load(tmp_path / "run", r)) for r in retained_rounds(tmp_path / "run")
    ]
    for row, before, now in zip(timeless(tmp_path / "run")[1:], models, models[1:], strict=False):
        update = torch.cat([(now[m] - before[m]).flatten() for m in now])
        assert row["diagnostics"]["update_norm"] == pytest.approx(float(update.norm()), rel=1e-4)
        if name != "fedsalora":  # whose server sees one factor only
            assert row["diagnostics"]["client_drift"] > 0


def test_clients_of_unequal_rank_count_with_all_that_they_add(folder, tmp_path):
    own = {"site0": {"rank": 1}, "site1": {"target-modules": ["q_proj"]}}
    config = tiny_config(
        folder, lora={"clients": own}, federation={"num_rounds": 3}, evaluation={"every": 0}
    )
    start(config, tmp_path / "run")
    for row in timeless(tmp_path / "run")[
        2:
    ]:  # an exact method: the update is the clients' mean, so none is far off
        assert (
            row["diagnostics"]["client_cosine"]["min"] > 0
            and row["diagnostics"]["client_drift"] < 3
        )


def test_they_are_measured_where_the_tensors_are():
    """The default device holds no numbers, so a tensor made there would show."""
    start, clients = adapter(1), [nearby(adapter(1), seed) for seed in (2, 3, 4)]
    after, merged = (
        nearby(start, 9),
        {m: random_matrix(*shape, 2, seed=7) for m, shape in SHAPES.items()},
    )
    wanted = round_diagnostics(
        start, clients, WEIGHTS, after, merged, GlobalUpdate(start, after, {})
    )
    with torch.device("meta"):
        got = round_diagnostics(
            start, clients, WEIGHTS, after, merged, GlobalUpdate(start, after, {})
        )
    assert got == wanted


@pytest.mark.long
def test_they_survive_kill_resume_and_pruning(folder, tmp_path):
    """One checkpoint is kept, and every round is started by another process."""
    settings = {"evaluation": {"every": 0}, "run": {"keep_checkpoints": 1}}
    full_config = tiny_config(folder, federation={"num_rounds": 12}, **settings)
    start(full_config, tmp_path / "whole")

    def killed(model, examples, *, seed, **rest):
        raise KeyboardInterrupt

    for count in range(1, 13):
        config = tiny_config(folder, federation={"num_rounds": count}, **settings)
        start(config, tmp_path / "parts", resume=count > 1)
        with pytest.raises(KeyboardInterrupt):
            start(
                tiny_config(folder, federation={"num_rounds": 13}, **settings),
                tmp_path / "parts",
                resume=True,
                function=killed,
            )
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    assert retained_rounds(tmp_path / "parts") == [12]
    state = json.loads((tmp_path / "parts" / "rounds" / "0012.json").read_text())["run"]
    kept = {file.stem for file in (tmp_path / "parts" / "objects").iterdir()}
    recipes = {name for recipe in state["recipes"] for name in (*recipe["parts"], recipe["ties"])}
    assert recipes  # the base was consolidated on the way
    assert kept == {
        *GlobalModel.load(tmp_path / "parts").objects(),
        *state["started_from"],
        *state["merged"],
        *recipes,
    }


def test_a_checkpoint_that_does_not_say_what_they_are_measured_against_is_refused(folder, tmp_path):
    start(tiny_config(folder, federation={"num_rounds": 2}), tmp_path / "run")
    file = tmp_path / "run" / "rounds" / "0002.json"
    manifest = json.loads(file.read_text())
    for key in ("started_from", "merged"):
        del manifest["run"][key]
        file.write_text(json.dumps(manifest))
        with pytest.raises(
            ModelError, match="0002.json: run: Object missing required field `started_from`"
        ):
            start(tiny_config(folder, federation={"num_rounds": 4}), tmp_path / "run", resume=True)
