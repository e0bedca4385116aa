"""The round: exact on the weights that clients load, robust to bad clients, and independent of the order of replies."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedmomentum.errors import ConfigError, ModelError, QuorumError
from fedmomentum.evaluation.teacher_forcing import evaluate
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import to_tensors
from fedmomentum.protocol.codec import decode_task, encode_task
from fedmomentum.protocol.transport import Failure, InProcessTransport
from fedmomentum.server.selection import sample_clients
from fedmomentum.server.server import Server
from fedmomentum.utils.tensors import safetensors_bytes
from tests.runs import altered, chain, nudge, prepare, start, timeless, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


# ── a run ──


@pytest.fixture(scope="module")
def trained(folder):
    """Real training, three rounds."""
    config = tiny_config(folder)
    return start(config, folder / "trained", function=None), folder / "trained"


def test_rows_hold_the_documented_keys_and_the_law_holds_on_loaded_weights(trained):
    _, out = trained
    rows = timeless(out)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert (
            row["accepted"] == row["participants"] == ["site0", "site1", "site2"]
            and row["failures"] == {}
        )
        assert sum(row["weights"].values()) == pytest.approx(1) and row["weights"][
            "site2"
        ] == pytest.approx(1 / 2, abs=0.02)
        assert (
            row["exactness_error"] < 1e-4
        )  # float32 weights: their round-off over the size of one round's change
        assert row["residual_rank"] == 4 and 0.5 < row["retained_energy"] < 1
        assert row["evaluation"]["total"]["num_examples"] == sum(
            s["num_examples"] for s in row["evaluation"]["by_client"].values()
        )
        assert all(
            row["uplink_bytes"][c] > 0 and row["downlink_bytes"][c] > 0 for c in row["participants"]
        )
    assert all(row["applied_share"] > 0.999 for row in rows[1:])
    assert rows[3]["evaluation"]["total"]["loss"] < rows[0]["evaluation"]["total"]["loss"]
    assert (
        rows[0]["applied_share"] is None
        and rows[0]["evaluation"]["total"]["num_examples"] == 3 + 4 + 4
    )
    assert sum(row["is_best"] for row in rows) >= 1
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[1])["seconds"].keys() == {
        "train",
        "encode",
        "aggregate",
        "merge",
        "evaluate",
        "loading",
    }


def test_probes_are_of_the_weights_as_they_are_when_asked(trained):
    """What is kept between calls is drawn or on disk; a live weight that changes, by whatever means, is seen."""
    run, _ = trained
    run.local.load_global_model(run.model)
    module, *others = sorted(run.local.base_weights.layers)
    before = run.local.probes(5)
    assert run.local.applied_fraction(run.model, 5) == pytest.approx(1, abs=1e-4)
    run.local.base_weights.layers[module].weight.data.copy_(
        run.local.base_weights.pretrained(module)
    )  # as if nothing was merged
    after = run.local.probes(5)
    lost = run.local.applied_fraction(run.model, 5)
    for name in ("base", "effective"):
        assert not torch.equal(after[name][module], before[name][module])
        assert all(torch.equal(after[name][other], before[name][other]) for other in others)
    run.local.base_weights.apply([])
    none = run.local.applied_fraction(run.model, 5)
    run.local.load_global_model(run.model)
    repeated = run.local.probes(5)
    assert none == pytest.approx(0, abs=1e-6) and none < lost < 0.99
    assert all(
        torch.equal(repeated["base"][m], before["base"][m]) for m in run.local.base_weights.layers
    )


def test_evaluation_before_saving_equals_after_loading(trained, folder):
    run, out = trained
    before = timeless(out)[-1]["evaluation"]["by_client"]
    second_run = prepare(tiny_config(folder), folder / "again")
    second_run.close()
    second_run.local.load_global_model(GlobalModel.load(out))
    for client in second_run.clients:
        total = evaluate(second_run.local.peft, client.test, pad_token_id=0).total
        if len(client.test) == before[client.client_id]["num_examples"]:
            assert total.nll == pytest.approx(before[client.client_id]["nll"], rel=1e-6)
            assert total.num_exact == before[client.client_id]["num_exact"]


def test_exports_give_the_runs_logits_in_stock_libraries(trained, folder, tmp_path):
    run, out = trained
    model = GlobalModel.load(out)
    base = run.local.directory
    share = export_merged(model, tmp_path / "merged", base_directory=base)
    export_adapter(model, tmp_path / "adapter", base_directory=base)
    assert share == pytest.approx(1, abs=1e-5)
    ids = torch.randint(4, 100, (3, 20), generator=torch.Generator().manual_seed(0))
    run.local.load_global_model(model)
    with torch.no_grad():
        wanted = run.local.peft(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
        stock = AutoModelForCausalLM.from_pretrained(base)
        untouched = stock(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(stock, tmp_path / "adapter")(input_ids=ids).logits
    assert (wanted - untouched).abs().max() > 1e-2
    assert (merged - wanted).abs().max() < 1e-4 and (adapted - wanted).abs().max() < 1e-4
    for name in ("merged", "adapter"):
        card = (tmp_path / name / "README.md").read_text()
        assert "FedMomentum(" in card and model.base.sha256 in card and "| rounds | 3 |" in card
        assert (tmp_path / name / "tokenizer.json").is_file() and (
            tmp_path / name / "chat_template.jinja"
        ).is_file()


def test_sixteen_bit_export_reports_what_arrives(trained, tmp_path):
    run, out = trained
    model = GlobalModel.load(out)
    share = export_merged(
        model, tmp_path / "half", base_directory=run.local.directory, dtype=torch.bfloat16
    )
    assert 0.3 < share < 1.7 and share != 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_fedit_is_inexact_and_its_report_shows_by_how_much(folder, tmp_path):
    config = tiny_config(folder, method={"name": "fedit"}, federation={"num_rounds": 1})
    updates = {}

    def spy(model, examples, **settings):
        report = nudge(model, examples, **settings)
        updates[settings["seed"]] = {
            k: t.clone().double() for k, t in model.state_dict().items() if "lora_" in k
        }
        return report

    run = start(config, tmp_path / "run", function=spy)
    row = timeless(tmp_path / "run")[1]
    assert row["retained_energy"] is None and run.model.base_update == ()
    factors, weights = list(updates.values()), list(row["weights"].values())
    top = bottom = 0.0
    for key in factors[0]:
        if "lora_A" in key:
            B = [f[key.replace("lora_A", "lora_B")] for f in factors]
            A = [f[key] for f in factors]
            mean_B = sum(w * b for w, b in zip(weights, B, strict=True))
            mean_A = sum(w * a for w, a in zip(weights, A, strict=True))
            cross = sum(
                w * (b - mean_B) @ (a - mean_A) for w, b, a in zip(weights, B, A, strict=True)
            )
            top += float(cross.square().sum())
            bottom += float(
                sum(w * b @ a for w, b, a in zip(weights, B, A, strict=True)).square().sum()
            )
    assert row["exactness_error"] == pytest.approx(
        math.sqrt(top / bottom), rel=0.5
    )  # by 8 probes a module
    assert row["exactness_error"] > 0.01


def test_a_round_that_learns_nothing_keeps_the_previous_A_alive(folder, tmp_path):
    """Law 3 in a run: with a zero sum, the next adapter's A spans what the clients were sent, not something random."""

    def idle(model, examples, *, on_step, **_):
        on_step(1, 1, 1.0)
        return nudge(model, examples, learning_rate=0.0, seed=0, on_step=on_step)

    run = prepare(tiny_config(folder, federation={"num_rounds": 1}), tmp_path / "run")
    before = run.model.adapter
    run.close()
    after = start(
        tiny_config(folder, federation={"num_rounds": 1}), tmp_path / "again", function=idle
    ).model
    assert after.base_update == ()
    for module, matrix in after.adapter.modules.items():
        sent = before.modules[module].A.double()
        off = matrix.A.double() - matrix.A.double() @ torch.linalg.pinv(sent) @ sent
        assert float(off.norm()) < 1e-5 * float(matrix.A.norm()) and not matrix.B.any()


def test_a_carried_tail_keeps_the_sum_exact(folder, tmp_path):
    config = tiny_config(folder, method={"settings": {"energy": 0.6, "split": "singular"}})
    run = start(config, tmp_path / "run")
    rows = timeless(tmp_path / "run")
    assert all(row["exactness_error"] < 1e-4 for row in rows[1:])
    assert all(row["carried_norm"] > 0.01 for row in rows[1:]) and run.model.carried
    assert GlobalModel.load(tmp_path / "run").carried.keys() == run.model.carried.keys()


def test_a_bfloat16_base_trains_and_everything_arrives(folder, tmp_path):
    config = tiny_config(folder, model={"dtype": "bfloat16"})
    run = start(config, tmp_path / "run", function=None)
    assert run.local.dtype == torch.bfloat16
    for row in timeless(tmp_path / "run")[1:]:
        assert row["applied_share"] > 0.999 and row["exactness_error"] < 1e-4


# ── order, participation, weights ──


def test_the_order_of_clients_does_not_change_a_bit(folder, tmp_path):
    config = tiny_config(folder)
    one = start(config, tmp_path / "one")
    other = prepare(config, tmp_path / "other")
    for client in other.clients:
        client.training_function = nudge
    other.clients.reverse()
    other.model = other.start(lambda event, facts: None)
    other.close()
    assert (
        one.model.version == other.model.version
        and one.model.adapter_objects == other.model.adapter_objects
    )
    assert timeless(tmp_path / "one") == timeless(tmp_path / "other")
    assert chain(tmp_path / "one") == chain(tmp_path / "other")


def test_participation_below_one_is_sampled_by_seed_and_absent_clients_catch_up(folder, tmp_path):
    config = tiny_config(
        folder, num_clients=5, federation={"client-fraction": 0.4, "num_rounds": 4}
    )
    run = start(config, tmp_path / "run")
    rows = timeless(tmp_path / "run")
    drawn = [tuple(row["participants"]) for row in rows[1:]]
    assert all(len(p) == 2 for p in drawn) and len(set(drawn)) > 1
    # a client that missed rounds is sent all that it lacks: its first task is the largest
    lacking = [c for c in rows[-1]["downlink_bytes"] if c not in {x for p in drawn for x in p}]
    assert all(row["exactness_error"] < 1e-4 for row in rows[1:])
    if lacking:
        assert rows[-1]["downlink_bytes"][lacking[0]] > sum(
            len(b.data) for b in run.model.base_update
        )


@given(
    n=st.integers(1, 50),
    client_fraction=st.floats(0.01, 1.0),
    seed=st.integers(0, 10**6),
    server_round=st.integers(1, 99),
)
def test_sampling_is_a_function_of_seed_and_round(n, client_fraction, seed, server_round):
    clients = [f"client-{i:02d}" for i in range(n)]
    drawn = sample_clients(seed, server_round, clients, client_fraction)
    assert (
        drawn
        == sample_clients(seed, server_round, clients[::-1], client_fraction)
        == sorted(set(drawn))
    )
    assert len(drawn) == max(1, math.ceil(client_fraction * n - 1e-9)) and set(drawn) <= set(
        clients
    )


# ── faults ──


def run_over(run, transport):
    """Run the prepared rounds over another transport, with clients that nudge; return the model."""
    for client in run.clients:
        client.training_function = nudge
    try:
        return Server(
            transport,
            method=run.method,
            model=run.model,
            state=run.state,
            config=run.config,
            directory=run.directory,
        ).run()
    finally:
        run.close()


def with_faults(config, out, faults, rounds=None, kind="train", stores=None):
    """A run in which `faults[client](payload, honest) -> bytes | Failure` stands between a client and the server."""
    run = with_faults.run = prepare(config, out)
    for client in run.clients:
        client.store.directory = (stores or {}).get(client.client_id, client.store.directory)

    steps = {c.client_id: c.handle for c in run.clients}

    def wrapped(client_id):
        def step(payload):
            task = decode_task(payload)
            if (
                client_id in faults
                and task.kind == kind
                and (rounds is None or task.server_round in rounds)
            ):
                return faults[client_id](payload, steps[client_id])
            return steps[client_id](payload)

        return step

    class Transport(InProcessTransport):
        def send_and_receive(self, tasks):
            return ((c, a) for c, a in super().send_and_receive(tasks) if a is not None)

    return run_over(run, Transport({c: wrapped(c) for c in steps}))


def _raise(payload, honest):
    raise OSError("the disk of this hospital is full")


def _set(key, value):
    return altered(lambda fields: fields.__setitem__(key, value))


def _metrics(**changes):
    return altered(lambda fields: fields["metrics"].update(changes))


def _tensor(change, name="lora_A"):
    def edit(fields):
        tensors = fields["tensors"]
        change(tensors, next(k for k in sorted(tensors) if name in k))

    return altered(edit)


FAULTS = {
    "raises": (_raise, "OSError: the disk of this hospital is full"),
    "missing": (lambda payload, honest: None, "missing"),
    "garbage": (lambda payload, honest: b"\x00" * 100, "not safetensors"),
    "claims terabytes": (
        lambda payload, honest: (2**43).to_bytes(8, "little") + b"{}",
        "header claims",
    ),
    "a task back": (lambda payload, honest: payload, "no reply|at most"),
    "NaN": (_tensor(lambda t, k: t.__setitem__(k, t[k] * float("nan"))), "NaN or Inf"),
    "wrong shape": (_tensor(lambda t, k: t.__setitem__(k, t[k][:, :-1])), "has shape"),
    "wrong rank": (_tensor(lambda t, k: t.__setitem__(k, t[k][:-1])), "has shape"),
    "wrong dtype": (_tensor(lambda t, k: t.__setitem__(k, t[k].double())), "has dtype"),
    "missing tensor": (_tensor(lambda t, k: t.pop(k)), "is missing"),
    "unknown tensor": (
        _tensor(lambda t, k: t.__setitem__("evil", t[k].clone())),
        "evil is unknown",
    ),
    "too far": (
        _tensor(lambda t, k: [t.__setitem__(n, v * 1e3) for n, v in t.items() if "lora_" in n]),
        "times the round's",
    ),
    "absurd count": (_set("num_examples", 10**400 // 10**384 * 10**20), "num_examples"),
    "negative count": (_set("num_examples", -3), "num_examples"),
    "count of another type": (_set("num_examples", 3.5), "num_examples"),
    "another round": (_set("server_round", 99), "server_round 99"),
    "another run": (_set("run_id", "else"), "run_id"),
    "another client": (_set("client_id", "site0"), "client_id"),
    "another base version": (_set("version", "0" * 64), "base version"),
    "metrics of NaN": (
        _set("metrics", {"loss": float("nan"), "first_loss": 1.0, "last_loss": 1.0}),
        "not valid JSON",
    ),
    "rounding beyond what a record holds": (
        _metrics(rounding=1e308),
        "rounding.*Expected .float. <= 1e.300",
    ),
    "rounding beyond belief": (_metrics(rounding=1e7), "its rounding error is 1e.07 of the update"),
    "metrics missing": (_set("metrics", {}), "answer: .*kind"),
    "too large": (_tensor(lambda t, k: t.__setitem__("pad", torch.zeros(2**20))), "bytes; at most"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_bad_client_does_not_stop_the_round(folder, tmp_path, name):
    """It is named with its reason, and the result is that of the others alone."""
    fault, reason = FAULTS[name]
    config = tiny_config(
        folder, num_clients=4, federation={"num_rounds": 2}, evaluation={"every": 0}
    )
    model = with_faults(config, tmp_path / "run", {"site1": fault}, rounds={1})
    rows = timeless(tmp_path / "run")
    assert rows[1]["accepted"] == ["site0", "site2", "site3"]
    assert list(rows[1]["failures"]) == ["site1"]
    assert __import__("re").search(reason, rows[1]["failures"]["site1"]), rows[1]["failures"]
    assert rows[2]["accepted"] == ["site0", "site1", "site2", "site3"] and rows[2]["failures"] == {}
    absent = with_faults(
        config, tmp_path / "absent", {"site1": lambda payload, honest: Failure("away")}, rounds={1}
    )
    assert model.version == absent.version and model.adapter_objects == absent.adapter_objects


def test_impossible_evaluations_are_refused_by_name(folder, tmp_path):
    """A client that claims more than its examples, or NaN, decides neither the score nor which round is best."""
    lies = {
        "nll": -1.0,
        "num_exact": 10**6,
        "num_examples": 7,
        "num_tokens": -2,
    }
    config = tiny_config(folder, federation={"num_rounds": 1})
    for key, value in lies.items():

        def lie(fields, key=key, value=value):
            fields["metrics"] = {
                **fields["metrics"],
                "total": {**fields["metrics"]["total"], key: value},
            }

        with_faults(config, tmp_path / key, {"site1": altered(lie)}, kind="evaluate")
        row = timeless(tmp_path / key)[1]
        assert (
            set(row["evaluation"]["by_client"]) == {"site0", "site2"} and "site1" in row["failures"]
        )
    # Counts that are valid one by one, but whose sum over two clients no record could hold.
    many = altered(lambda fields: fields["metrics"]["total"].update(num_tokens=2**53 - 1))
    nothing = {"nll": 0.0, "num_tokens": 0, "num_examples": 0, "num_exact": 0}
    empty = altered(
        lambda fields: fields["metrics"]["by_category"].update(
            {f"category {i}": nothing for i in range(1000)}
        )
    )
    for name, fault, reason in (
        ("many", many, "9007199254740991 tokens in"),
        ("empty", empty, "its category category 0 has no examples"),
    ):
        with_faults(config, tmp_path / name, {"site1": fault}, kind="evaluate")
        row = timeless(tmp_path / name)[1]
        assert set(row["evaluation"]["by_client"]) == {"site0", "site2"}
        assert reason in row["failures"]["site1"]
    nan = _tensor(
        lambda t, k: t.__setitem__("probe.effective", t["probe.effective"] * float("nan")),
        "probe.effective",
    )
    with_faults(config, tmp_path / "nan", {"site1": nan}, kind="evaluate")
    row = timeless(tmp_path / "nan")[1]
    assert row["exactness_error"] < 1e-4 and "probe.effective holds NaN" in row["failures"]["site1"]
    assert "lower the learning rate" in row["failures"]["site1"]


def test_clients_without_held_out_examples_take_part(folder, tmp_path):
    run = start(
        tiny_config(folder, data={"test_fraction": 0.0}, federation={"num_rounds": 1}),
        tmp_path / "run",
    )
    assert any("nothing will be evaluated" in warning for warning in run.plan.warnings)
    assert timeless(tmp_path / "run")[1]["evaluation"] is None
    assert timeless(tmp_path / "run")[1]["exactness_error"] < 1e-4


@pytest.mark.parametrize("what", ["damaged", "wiped"])
def test_what_a_client_lost_is_sent_again_in_the_same_round(folder, tmp_path, what):
    config = tiny_config(folder, federation={"num_rounds": 4}, evaluation={"every": 0})
    other, broken = tmp_path / "elsewhere", []

    def lose(payload, honest):
        if not broken:
            for file in (other / "objects").iterdir():
                file.write_bytes(
                    b"rotten" + file.read_bytes()[6:]
                ) if what == "damaged" else file.unlink()
            # as in a process of its own, which reads its own disk
            with_faults.run.clients[0].store.cache.clear()
        broken.append(len(payload))
        return honest(payload)

    model = with_faults(
        config, tmp_path / "run", {"site1": lose}, rounds={3}, stores={"site1": other}
    )
    rows = timeless(tmp_path / "run")
    assert all(row["failures"] == {} for row in rows) and len(broken) == 2
    assert rows[3]["downlink_bytes"]["site1"] == sum(broken) > rows[3]["downlink_bytes"]["site0"]
    undisturbed = start(config, tmp_path / "undisturbed").model
    assert (
        model.version == undisturbed.version
        and model.adapter_objects == undisturbed.adapter_objects
    )


def test_a_client_that_stores_nothing_fails_by_name(folder, tmp_path):
    config = tiny_config(folder, federation={"num_rounds": 3}, evaluation={"every": 0})
    other = tmp_path / "elsewhere"

    def forget(payload, honest):
        with_faults.run.clients[0].store.cache.clear()
        task = decode_task(payload)
        return honest(encode_task(replace(task, objects={})))

    with_faults(config, tmp_path / "run", {"site1": forget}, rounds={2}, stores={"site1": other})
    rows = timeless(tmp_path / "run")
    assert rows[2]["failures"] == {
        "site1": "client site1 says that it does not have what it was just sent; is its disk full or "
        "broken?"
    }
    assert rows[3]["failures"] == {}


def test_below_the_quorum_the_run_stops_with_everything_saved_and_resumes(folder, tmp_path):
    config = tiny_config(folder, federation={"num_rounds": 3, "min-valid-fraction": 0.6})
    out = tmp_path / "run"
    bad = dict.fromkeys(("site0", "site1"), _raise)
    with pytest.raises(
        QuorumError,
        match=r"round 2: 1 of 3 .* at least 2 must .*site0, site1: OSError.*Rounds up to 1 are saved",
    ):
        with_faults(config, out, bad, rounds={2})
    assert [row["round"] for row in timeless(out)] == [0, 1]
    resumed = start(config, out, resume=True)
    uninterrupted = start(config, tmp_path / "whole")
    assert resumed.model.version == uninterrupted.model.version
    assert timeless(out) == timeless(tmp_path / "whole")


def test_a_failed_evaluation_is_reported_and_the_round_counts(folder, tmp_path):
    config = tiny_config(folder, federation={"num_rounds": 1})
    run = prepare(config, tmp_path / "run")
    from functools import partial

    def step(payload, client):
        if decode_task(payload).kind == "evaluate" and client.client_id == "site2":
            raise RuntimeError("no test data today")
        return client.handle(payload)

    run_over(run, InProcessTransport({c.client_id: partial(step, client=c) for c in run.clients}))
    row = timeless(tmp_path / "run")[1]
    assert row["accepted"] == ["site0", "site1", "site2"]
    assert row["failures"] == {"site2": "evaluation: RuntimeError: no test data today"}
    assert set(row["evaluation"]["by_client"]) == {"site0", "site1"}


def test_clients_that_leave_after_the_last_update_do_not_undo_the_round(folder, tmp_path):
    """Fewer are connected than a round needs; those whose updates count are asked for scores anyway."""
    config = tiny_config(folder, federation={"num_rounds": 1, "min-valid-fraction": 1.0})
    run = prepare(config, tmp_path / "run")
    steps = {client.client_id: client.handle for client in run.clients}

    class Transport(InProcessTransport):
        """Loses two clients, one of them for good, while it sends the last update."""

        has_trained = False

        def clients(self):
            if self.has_trained:
                raise QuorumError("1 of 3 registered clients are connected")
            return super().clients()

        def connected(self):
            return ["site2"] if self.has_trained else super().connected()

        def send_and_receive(self, tasks):
            kinds = {decode_task(payload).kind for payload in tasks.values()}
            for client, answer in super().send_and_receive(tasks):
                is_away = kinds == {"evaluate"} and self.has_trained and client == "site0"
                yield client, Failure("gone") if is_away else answer
            self.has_trained |= kinds == {"train"}

    run_over(run, Transport(steps))
    row = timeless(tmp_path / "run")[1]
    assert row["accepted"] == ["site0", "site1", "site2"]
    assert row["failures"] == {"site0": "evaluation: gone"}
    assert set(row["evaluation"]["by_client"]) == {"site1", "site2"}


# ── resume ──


def test_resume_equals_uninterrupted(folder, tmp_path):
    config = tiny_config(folder, federation={"num_rounds": 4, "client-fraction": 0.7})
    uninterrupted = start(config, tmp_path / "whole", function=None)

    class Stop(Exception):
        pass

    def stop_in_round(wanted):
        def observer(event, facts):
            if event == "aggregate" and len(run_rows()) == wanted:
                raise Stop

        return observer

    out = tmp_path / "parts"

    def run_rows():
        return timeless(out) if (out / "metrics.jsonl").exists() else []

    for number, wanted in enumerate((1, 3)):
        with pytest.raises(Stop):
            start(config, out, function=None, resume=number > 0, observer=stop_in_round(wanted))
    parts = start(config, out, function=None, resume=True)
    assert (
        parts.model.version == uninterrupted.model.version
        and parts.model.adapter_objects == uninterrupted.model.adapter_objects
    )
    assert timeless(out) == timeless(tmp_path / "whole")
    assert chain(out) == chain(tmp_path / "whole")
    finished = start(config, out, function=None, resume=True)
    assert finished.model.version == uninterrupted.model.version


def test_a_run_folder_is_not_overwritten_nor_resumed_with_other_settings(folder, tmp_path):
    config = tiny_config(folder, federation={"num_rounds": 1})
    start(config, tmp_path / "run")
    with pytest.raises(ModelError, match="holds a run already.*--resume"):
        prepare(config, tmp_path / "run")
    other = tiny_config(folder, federation={"num_rounds": 1}, lora={"rank": 1})
    with pytest.raises(ConfigError, match=r"these differ: lora.rank"):
        prepare(other, tmp_path / "run", resume=True)
    longer = start(tiny_config(folder, federation={"num_rounds": 2}), tmp_path / "run", resume=True)
    assert longer.model.server_round == 2
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").touch()
    with pytest.raises(ModelError, match="not empty"):
        prepare(config, tmp_path / "else")
    run = prepare(config, tmp_path / "busy")
    with pytest.raises(ModelError, match="in use by another process"):
        prepare(config, tmp_path / "busy", resume=True)
    run.close()


def test_reply_bytes_do_not_depend_on_time(folder, tmp_path):
    one = start(tiny_config(folder), tmp_path / "one")
    assert one.model.server_round == 3
    other = start(tiny_config(folder), tmp_path / "two")
    assert (
        timeless(tmp_path / "one") == timeless(tmp_path / "two")
        and other.model.version == one.model.version
    )


def test_tensors_of_the_global_model_are_canonical(trained):
    run, out = trained
    model = GlobalModel.load(out)
    tensors = to_tensors(model.adapter)
    for kind, blob in model.adapter_objects.items():
        assert blob.data == safetensors_bytes(
            {n: t for n, t in tensors.items() if f"lora_{kind}" in n}
        )


# ── update filters ──


class Halving:
    """Halves what clients add, and doubles the result of the sum."""

    def __init__(self):
        self.seen = []

    def on_client(self, update):
        self.seen.append((update.client_id, update.server_round))
        modules = {}
        for name, matrix in update.trained.modules.items():
            start = update.start.modules[name]
            modules[name] = LowRank(start.B + (matrix.B - start.B) / 2, matrix.A)
        return replace(update.trained, modules=modules)

    def on_server(self, aggregate, server_round):
        self.seen.append(("server", server_round))
        modules = {m: LowRank(2 * x.B, x.A) for m, x in aggregate.adapter.modules.items()}
        return replace(aggregate, adapter=replace(aggregate.adapter, modules=modules))


def test_an_update_filter_sees_every_update_and_its_aggregate(folder, tmp_path):
    """In round 1 B starts from zero: halving each B and doubling their mean cancel exactly."""
    config = tiny_config(folder, method={"name": "ffalora"}, federation={"num_rounds": 1})
    plain = start(config, tmp_path / "plain")
    halving = Halving()
    run = prepare(config, tmp_path / "filtered", update_filter=halving)
    for client in run.clients:
        client.training_function = nudge
    run.start()
    assert halving.seen == [("site0", 1), ("site1", 1), ("site2", 1), ("server", 1)]
    for module, matrix in plain.model.adapter.modules.items():
        filtered = run.model.adapter.modules[module]
        assert torch.equal(filtered.B, matrix.B) and torch.equal(filtered.A, matrix.A)
    sent = [row["screening"]["site0"]["norm"] for row in (timeless(plain.trainer.directory)[1],)]
    halved = timeless(run.trainer.directory)[1]["screening"]["site0"]["norm"]
    assert halved == pytest.approx(sent[0] / 2)
