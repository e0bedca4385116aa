"""Rounds whose updates are summed under masks: the same model, whichever process is killed, and nothing of a single client."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from msgspec import structs

from fedmomentum.errors import ConfigError, ModelError, QuorumError
from fedmomentum.formats.metrics_file import parse_record_line
from fedmomentum.global_model.mean_changes import means_object, read_means
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.protocol.codec import encode_task
from fedmomentum.protocol.messages import EvaluateRequest, TrainRequest
from fedmomentum.protocol.secure_messages import FIRST_SUM, SCORE_SUM, SECOND_SUM, SumRequest
from fedmomentum.run.networked import run_federation
from fedmomentum.secure_sum.roster import Roster, make_parties
from fedmomentum.secure_sum.server import SumResult
from fedmomentum.server import exchange as exchange_module
from fedmomentum.server.checkpoint import RunDirectory
from fedmomentum.server.round_sums import RoundSums
from fedmomentum.server.sum_exchange import SumExchange
from tests.runs import start, tiny_config
from tests.secure_runs import PRIVACY, Federation, ServerKilled, dense_model, position


def rows(out):
    lines = (out / "metrics.jsonl").read_bytes().splitlines()
    return [parse_record_line(line, "metrics", ConfigError) for line in lines]


def resumed(out):
    folder = RunDirectory(out)
    try:
        return folder.resume()
    finally:
        folder.close()


def distance(one, other):
    """The largest relative difference of two models, over the modules."""
    return max(float((one[m] - other[m]).norm() / other[m].norm()) for m in other)


# ── the same model as without masks ──


@pytest.mark.parametrize(
    ("method", "sketch_ranks"),
    [
        ("fedit", 1),
        pytest.param("fedsvd", 1, marks=pytest.mark.long),
        ("fedmomentum", 2),
        pytest.param("flora", 2, marks=pytest.mark.long),
    ],
)
def test_a_run_in_one_process_ends_with_the_model_of_the_same_run_without(
    tmp_path, method, sketch_ranks
):
    """Means are exact; products too, with a sketch of (n - 1) times the rank."""
    settings = {"method": {"name": method}, "federation": {"num_rounds": 1}}
    plain = start(tiny_config(tmp_path, **settings), tmp_path / "plain")
    privacy = {**PRIVACY, "sketch_ranks": sketch_ranks}
    secure = start(tiny_config(tmp_path, **settings, privacy=privacy), tmp_path / "secure")
    assert distance(dense_model(secure.model), dense_model(plain.model)) < 5e-6

    # Losses and scores are those of all clients together, and nothing is reported of a single one.
    for ours, theirs in zip(rows(tmp_path / "secure"), rows(tmp_path / "plain"), strict=True):
        assert ours.evaluation.total.num_exact == theirs.evaluation.total.num_exact
        assert ours.evaluation.total.num_tokens == theirs.evaluation.total.num_tokens
        assert ours.evaluation.compared.loss == pytest.approx(theirs.evaluation.compared.loss)
        assert ours.train_loss == (theirs.train_loss and pytest.approx(theirs.train_loss))
        assert ours.accepted == theirs.accepted
        assert not ours.evaluation.by_client and not ours.evaluation.by_category
        assert not ours.clients and not ours.num_examples and not ours.weights
        assert not ours.screening and ours.diagnostics is None and ours.exactness_error is None
        assert ours.round == 0 or 0 < ours.uplink_rounding < 1e-4


def test_a_run_in_one_process_resumes_to_the_same_bits(tmp_path):
    config = tiny_config(tmp_path, privacy=PRIVACY, federation={"num_rounds": 2})
    uninterrupted = start(config, tmp_path / "whole")

    def kill(event, facts):
        if event == "aggregate" and not killed:
            killed.append(facts)
            raise ServerKilled

    killed = []
    with pytest.raises(ServerKilled):
        start(config, tmp_path / "killed", observer=kill)
    resumed_run = start(config, tmp_path / "killed", resume=True)
    assert resumed_run.model.manifest() == uninterrupted.model.manifest()


# ── kills ──


def test_a_server_killed_at_every_step_of_every_sum_ends_with_the_same_model(tmp_path):
    """It continues from the replies that it kept, since clients open every sum once."""
    settings = {"evaluation": {"every": 1}, "federation": {"num_rounds": 1}}
    expected = Federation(tmp_path, stores="a", **settings).run(tmp_path / "whole")
    federation = Federation(tmp_path, stores="b", **settings)
    killed = set()
    trained = []

    def before(task):
        place = position(task)
        server_round, number, _ = place
        if task.kind == "train":
            trained.append((server_round, task.client_id))
        # in the middle of each step: some have answered, and others have not
        if server_round and number and task.client_id == "site2" and place not in killed:
            killed.add(place)
            raise ServerKilled

    federation.before = before
    out = tmp_path / "killed"
    model, num_kills = federation.run_through(out)
    assert num_kills == len(killed) == 3 * 5
    assert model.manifest() == expected.manifest()
    # Nobody was asked to train a second time, and nothing is left behind.
    assert len(trained) == len(set(trained)) == 4
    assert not (out / "secure").exists()
    ours, theirs = rows(out), rows(tmp_path / "whole")
    assert [row.evaluation for row in ours] == [row.evaluation for row in theirs]
    assert [row.accepted for row in ours] == [row.accepted for row in theirs]


def test_clients_killed_at_any_step_leave_model_and_feedback_the_exact_mean(tmp_path):
    """Feedback is neither lost nor doubled, be it within a sum, between the two or while unmasking."""
    # Of seven clients five open a sum: two may leave, here each at its own step.
    kills = {
        1: {"site1": (1, 0), "site4": (1, 2)},
        2: {"site1": (1, 3), "site4": (1, 4)},
        3: {"site1": (2, 0), "site4": (2, 2)},
        4: {"site1": (2, 4), "site4": (2, 1)},
        5: {"site0": (2, 1), "site1": (2, 1), "site4": (2, 2)},
        6: {},
    }
    federation = Federation(
        tmp_path, num_clients=7, federation={"num_rounds": len(kills)}, run={"keep_checkpoints": 99}
    )
    changes = {}

    def before(task):
        server_round, number, step = position(task)
        client = federation.clients[task.client_id]
        if number == 1 and step == 0:
            changes[server_round, task.client_id] = client._round.changes
        if kills.get(server_round, {}).get(task.client_id) == (number, step):
            federation.start_client(task.client_id)

    federation.before = before
    out = tmp_path / "out"
    model = federation.run(out)
    accepted = {row.round: row.accepted for row in rows(out) if row.round}
    all_clients = federation.names
    assert accepted[1] == [name for name in all_clients if name not in ("site1", "site4")]
    assert all(accepted[server_round] == all_clients for server_round in (2, 3, 4, 5, 6))

    # What the exact means of all rounds would have given.
    exact = {}
    for server_round, clients in accepted.items():
        start_of_round = RunDirectory(out)
        before_it, _ = start_of_round.resume(server_round - 1)
        start_of_round.close()
        total = sum(changes[server_round, client].num_examples for client in clients)
        for module, matrix in before_it.adapter.modules.items():
            B, A = matrix.B.double(), matrix.A.double()
            for client in clients:
                change = changes[server_round, client].modules[module]
                product = (B + change.b) @ (A + change.a) - B @ A
                share = before_it.adapter.scalings[module] * change.num_examples / total
                exact[module] = exact.get(module, 0) + share * product
    _, state = resumed(out)
    feedback = federation.feedback(state)
    got = dense_model(model)
    scaled = {m: model.adapter.scalings[m] * feedback[m] for m in got}
    assert distance({m: got[m] + scaled[m] for m in got}, exact) < 5e-6
    # It matters: without the feedback the model is off by far more.
    assert distance(got, exact) > 1e-3


def test_a_client_that_was_killed_takes_part_again_in_the_next_round(tmp_path):
    federation = Federation(tmp_path)

    def before(task):
        if position(task) == (1, 1, 1) and task.client_id == "site3":
            federation.start_client("site3")

    federation.before = before
    federation.run(tmp_path / "out")
    first, second = rows(tmp_path / "out")[1:]
    assert first.accepted == ["site0", "site1", "site2"] and second.accepted == federation.names
    assert "site3 has nothing of round 1: it was started again" in first.failures["site3"]


def test_too_few_clients_for_a_sum_end_the_run_and_a_resumed_one_restarts_the_round(tmp_path):
    expected = Federation(tmp_path, stores="a").run(tmp_path / "whole")
    federation = Federation(tmp_path, stores="b")
    out = tmp_path / "out"

    def before(task):
        if position(task)[:2] == (2, 1) and task.client_id in ("site1", "site2"):
            return False
        return None

    federation.before = before
    with pytest.raises(QuorumError, match="2 clients gave their keys, and 3 are needed"):
        federation.run(out)
    # The clients are restarted as well: none has values of that round any more.
    federation.before = lambda task: None
    for name in federation.names:
        federation.start_client(name)
    model = federation.run(out, resume=True)
    assert model.manifest() == expected.manifest()


def test_a_round_that_was_opened_and_cannot_be_finished_changes_nothing(tmp_path):
    """Asked again, those that are there still open it; if too few are left, the run continues with the next round."""
    for stores, restarts, accepted in (("kept", False, 4), ("lost", True, 0)):
        federation = Federation(tmp_path, stores=stores)

        def leave(task):
            # The first to answer has opened its shares; the others are away.
            return position(task) != (1, 1, 4) or task.client_id == "site0"

        federation.before = leave
        out = tmp_path / f"out {stores}"
        with pytest.raises(QuorumError, match="1 clients gave their openings, and 3 are needed"):
            federation.run(out)
        federation.before = lambda task: None
        if restarts:
            for name in federation.names:
                federation.start_client(name)
        model = federation.run(out, resume=True)
        _, first, second = rows(out)
        assert len(first.accepted) == accepted
        if not accepted:
            # Those that did their part are told apart, and what was sent counts.
            assert first.failures.keys() == set(federation.names)
            assert "were lost" in first.failures["site0"]
            assert set(first.uplink_bytes) == set(first.downlink_bytes) == set(federation.names)
        assert second.accepted == federation.names
        # What was trained in a lost round is in neither the model nor the feedback.
        _, state = resumed(out)
        assert {outcome.server_round for outcome in state.outcomes.values()} == {2}
        assert model.server_round == 2


def test_a_client_that_was_admitted_later_breaks_no_sum(tmp_path, caplog):
    """Its key is in no roster yet: it is neither sampled nor asked for its scores."""
    federation = Federation(tmp_path, evaluation={"every": 1}, federation={"num_rounds": 2})
    roster = Roster({name: federation.roster.keys[name] for name in federation.names[:3]})
    federation.roster = roster
    for name in federation.names[:3]:
        federation.start_client(name)
    with caplog.at_level(logging.WARNING, logger="fedmomentum"):
        federation.run(tmp_path / "out")
    asked = {task.client_id for task, _, _ in federation.seen if task.kind != "describe"}
    assert asked == set(federation.names[:3])
    for row in rows(tmp_path / "out"):
        assert row.failures == {} and row.evaluation.total.num_examples
    warnings = [
        line for line in caplog.messages if "site3 was admitted after this run began" in line
    ]
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("given", "num_clients", "wanted"),
    [
        (None, 5, 4),  # a round's clients
        (None, 10, 7),  # all clients evaluate before the first round and after the last
        (5, 5, 5),
        (5, 10, 7),
        (3, 5, 3),  # for clients that trust the server
        (3, 10, 6),
    ],
)
def test_threshold_suffices_for_sums_of_more_clients_than_a_round_has(
    tmp_path, given, num_clients, wanted
):
    names = [f"site{number}" for number in range(10)]
    privacy = {**PRIVACY, **({} if given is None else {"threshold": given})}
    config = tiny_config(tmp_path, privacy=privacy, federation={"client_fraction": 0.5})
    _, roster = make_parties(names)
    sums = RoundSums(None, roster, None, config, None)
    assert sums.threshold(0, names[:num_clients], {}) == wanted


# ── what a client accepts, and what it tells ──


def test_a_client_takes_part_only_in_the_kind_of_run_it_is_configured_for(tmp_path):
    federation = Federation(tmp_path)
    open_config = tiny_config(tmp_path, num_clients=4)
    with pytest.raises(QuorumError, match="takes part in runs with secure aggregation only"):
        federation.run(tmp_path / "open", config=open_config)
    for client in federation.clients.values():
        client.party = None
    with pytest.raises(QuorumError, match=r"\[privacy\] here does not"):
        federation.run(tmp_path / "secure")


def test_errors_about_a_clients_own_values_stay_with_it(tmp_path, caplog):
    federation = Federation(tmp_path)

    def train_too_far(model, examples, *, on_step, **rest):
        from tests.runs import nudge

        report = nudge(model, examples, on_step=on_step, **rest)
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.requires_grad:
                    tensor += 7.5
        return report

    federation.clients["site1"].training_function = train_too_far
    with caplog.at_level(logging.ERROR, logger="fedmomentum"):
        federation.run(tmp_path / "out")
    first = rows(tmp_path / "out")[1]
    assert first.accepted == ["site0", "site2", "site3"]
    reason = first.failures["site1"]
    assert reason.endswith("takes no part in the round's sums; its own log says why")
    assert "7.5" not in reason and "bound" not in reason
    assert any("and the sum's bound is" in line for line in caplog.messages)


def test_the_servers_view_does_not_depend_on_which_client_has_which_update(
    tmp_path, caplog, monkeypatch
):
    """Two clients swap places: the sum is the same, and so is everything but keys, masks and masked values."""
    monkeypatch.setattr("secrets.token_hex", lambda size: "ab" * size)
    views = []
    for swap in (False, True):
        out = tmp_path / f"swap {swap}"
        federation = Federation(tmp_path, stores=f"nodes {swap}", evaluation={"every": 1})
        place = {name: name for name in federation.names}
        if swap:
            place |= {"site0": "site1", "site1": "site0"}
        # equal numbers of examples, so that only the updates differ
        shared = federation.clients["site0"].train
        for name, client in federation.clients.items():
            client.train = shared
            client.training_function = update_of(place[name])
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="fedmomentum"):
            model = federation.run(out)
        replies = []
        for task, payload, reply in federation.seen:
            replies.append(
                (task.client_id, *position(task), len(payload), len(reply), plain(reply))
            )
        views.append((model.manifest(), replies, list(caplog.messages), rows_without_times(out)))
    assert views[0] == views[1]


def update_of(name):
    """Instead of training: a step that depends on a name alone."""
    from fedmomentum.training import TrainReport

    def train(model, examples, *, on_step, **_):
        draw = torch.Generator().manual_seed(sum(name.encode()))
        with torch.no_grad():
            for _, tensor in sorted(model.named_parameters()):
                if tensor.requires_grad:
                    tensor += 0.02 * (torch.rand(tensor.shape, generator=draw) - 0.5)
        loss = 1.0 + sum(name.encode()) % 7
        on_step(1, 1, loss)
        return TrainReport(
            loss=loss, first_loss=loss, last_loss=loss, num_steps=1, num_tokens=len(examples)
        )

    return train


def plain(reply):
    """What a reply says besides a sum's message."""
    from fedmomentum.utils.tensors import read_safetensors

    tensors, metadata = read_safetensors(reply, "a reply")
    shapes = {name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()}
    others = {name: t.tolist() for name, t in tensors.items() if name != "message"}
    return metadata, shapes, others


def rows_without_times(out):
    found = []
    for row in rows(out):
        table = row.to_json()
        table.pop("seconds")
        found.append(table)
    return found


def other_learning_rate(task):
    if isinstance(task.request, TrainRequest):
        return replace(task, request=structs.replace(task.request, learning_rate=1e-30))
    return task


def other_limits(task):
    request = task.request
    if isinstance(request, TrainRequest):
        terms = structs.replace(request.secure, expected_examples=1)
        return replace(task, request=structs.replace(request, secure=terms))
    return task


def other_projection(task):
    """All but one client project their cross terms on nothing."""
    name = getattr(task.request, "means", None)
    if not isinstance(task.request, SumRequest) or name is None:
        return task
    means = read_means(StoredObject(task.objects[name]), "means")
    modules = {module: replace(mean, Q=0 * mean.Q) for module, mean in means.modules.items()}
    altered = means_object(replace(means, modules=modules))
    objects = {key: data for key, data in task.objects.items() if key != name}
    return replace(
        task,
        request=structs.replace(task.request, means=altered.name),
        objects={**objects, altered.name: altered.data},
    )


def other_examples(task):
    if isinstance(task.request, EvaluateRequest):
        return replace(task, request=structs.replace(task.request, num_examples=0))
    return task


@pytest.mark.parametrize(
    ("alter", "number"),
    [
        (other_learning_rate, FIRST_SUM),
        (other_limits, FIRST_SUM),
        (other_projection, SECOND_SUM),
        (other_examples, SCORE_SUM),
    ],
)
def test_a_server_that_has_others_do_different_work_gets_no_sum(
    tmp_path, monkeypatch, caplog, alter, number
):
    """Else the sum would show the values of the one client whose work is real."""
    federation = Federation(tmp_path, federation={"num_rounds": 1}, evaluation={"every": 1})

    def encode_altered(task):
        return encode_task(task if task.client_id == "site1" else alter(task))

    opened = []
    run = SumExchange.run

    def noted(exchange, plan, *rest):
        result = run(exchange, plan, *rest)
        opened.append((plan.server_round, plan.number))
        return result

    monkeypatch.setattr(exchange_module, "encode_task", encode_altered)
    monkeypatch.setattr(SumExchange, "run", noted)
    if number == FIRST_SUM:
        with pytest.raises(QuorumError):
            federation.run(tmp_path / "out")
    else:
        federation.run(tmp_path / "out")
    assert (1, number) not in opened
    assert ((1, FIRST_SUM) in opened) == (number != FIRST_SUM)
    assert "over other work than this client was asked to do" in caplog.text


def test_a_server_that_makes_up_the_first_sum_gets_no_second_one(tmp_path, monkeypatch):
    """With means of zero, the second sum would be the product of the one client's own changes."""
    federation = Federation(tmp_path, federation={"num_rounds": 1})
    opened = []
    run = SumExchange.run

    def run_without_the_first(exchange, plan, kept=None, means=None):
        if plan.number != FIRST_SUM:
            opened.append(run(exchange, plan, kept, means))
            return opened[-1]
        # What honest clients would have summed, without asking them.
        kept.directory.mkdir(parents=True)
        values = {block.name: np.zeros(block.size) for block in plan.blocks}
        values["examples"] += 100
        return SumResult(survivors=list(plan.parties), values=values)

    def encode_altered(task):
        return encode_task(task if task.client_id == "site1" else other_learning_rate(task))

    monkeypatch.setattr(exchange_module, "encode_task", encode_altered)
    monkeypatch.setattr(SumExchange, "run", run_without_the_first)
    federation.run(tmp_path / "out")
    assert not opened


def test_a_damaged_reply_that_was_kept_is_refused_by_name(tmp_path):
    """Masked values look the same whether they are damaged or not."""
    federation = Federation(tmp_path)

    def kill(task):
        if position(task) == (1, 1, 3):
            raise ServerKilled

    federation.before = kill
    out = tmp_path / "out"
    with pytest.raises(ServerKilled):
        federation.run(out)
    federation.before = lambda task: None
    (reply,) = out.glob("secure/*/0001-1-1/2/site1")
    data = reply.read_bytes()
    reply.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ModelError, match="site1 was damaged or altered"):
        federation.run(out, resume=True)
    reply.write_bytes(data)
    assert federation.run(out, resume=True).server_round == 2


def test_over_a_network_no_round_is_done_again(tmp_path):
    federation = Federation(tmp_path, federation={"num_rounds": 1})
    federation.run(tmp_path / "out")
    with pytest.raises(ConfigError, match="clients open the sums of a round once"):
        run_federation(
            None,
            federation.config,
            tmp_path / "out",
            resume=True,
            server_round=0,
            roster=federation.roster,
        )
    with pytest.raises(ConfigError, match="needs clients with keys of their own"):
        run_federation(None, federation.config, tmp_path / "other")
