"""The transport over a stand-in for Flower's grid, with a fake clock: what was sent is compared to what arrived."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch

from fedmomentum.aggregation.registry import METHODS
from fedmomentum.errors import PayloadError, QuorumError
from fedmomentum.flower import transport as module
from fedmomentum.flower.payloads import pack_payload, unpack_payload
from fedmomentum.flower.transport import FlowerTransport, Session
from fedmomentum.protocol.codec import decode_task, encode_task
from fedmomentum.protocol.transport import Failure, InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from fedmomentum.utils.names import directory_name
from fedmomentum.utils.tensors import read_safetensors
from tests.helpers import generator
from tests.runs import Events, chain, nudge, objects, start, timeless, tiny_config, train_task

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict  # isort: skip
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode  # isort: skip
from flwr.supercore.task_identity import TaskIdentity  # isort: skip

ROUND, JOIN = 100.0, 50.0


@dataclass
class World:
    """Clients, their connections, a grid and a clock that moves only while something sleeps.

    `script` holds for each client what to do when it is asked: a list of (seconds until then, act),
    where act is given the message.
    """

    registered_names: list[str]
    now: float = 0.0
    script: dict[str, Callable] = field(default_factory=dict)
    sent: list[tuple[float, str, Message]] = field(default_factory=list)
    events: list[tuple[str, dict]] = field(default_factory=list)
    asked_for: set[str] = field(default_factory=set)
    withdrawn: set[str] = field(default_factory=set)
    discarded: list[str] = field(default_factory=list)
    takes_messages: bool = True

    def __post_init__(self):
        self.here = {name: Session(i, "first") for i, name in enumerate(self.registered_names, 100)}
        self._plans: list[tuple[float, Callable]] = []
        self._arrived: dict[str, Message] = {}

    # the clock
    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        for plan in [plan for plan in self._plans if plan[0] <= self.now]:
            self._plans.remove(plan)
            plan[1]()

    def at(self, seconds, act):
        self._plans.append((self.now + seconds, act))

    # the roster
    def registered(self):
        return sorted(self.registered_names)

    def online(self):
        return dict(self.here)

    def withdraw(self, names):
        self.withdrawn |= set(names)

    def discard(self, name):
        self.discarded.append(name)

    # the grid
    def push_messages(self, messages):
        names = []
        for message in messages:
            if not self.takes_messages:
                names.append("")
                continue
            name = f"message {len(self.sent)}"
            message.metadata.__dict__["_message_id"] = name
            client = next(
                n for n, s in self.here.items() if s.node_id == message.metadata.dst_node_id
            )
            self.sent.append((self.now, client, message))
            names.append(name)
            for seconds, act in self.script.get(client, lambda message: [])(message):
                self.at(seconds, partial(act, message))
        return names

    def pull_messages(self, message_ids):
        self.asked_for = set(message_ids)
        return [self._arrived.pop(name) for name in list(message_ids) if name in self._arrived]

    # what clients do
    def answers(self, payload, message):
        self.arrive(Message(pack_payload(payload), reply_to=message), message)

    def arrive(self, reply, message):
        self._arrived[message.metadata.message_id] = reply

    def events_of(self, event):
        return [facts for name, facts in self.events if name == event]

    def transport(self, *, min_valid_fraction=0.5, start_timeout=None):
        return FlowerTransport(
            self,
            self,
            round_timeout=ROUND,
            join_timeout=JOIN,
            min_valid_fraction=min_valid_fraction,
            start_timeout=start_timeout,
            callback=Events(lambda event, facts: self.events.append((event, dict(facts)))),
        )


@pytest.fixture
def world(monkeypatch):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    found = World(["east", "north", "south"])
    monkeypatch.setattr(module, "time", found)
    return found


def after(seconds, act):
    return lambda message: [(seconds, act)]


def never(message):
    return []


# ── one exchange ──


def test_what_many_clients_are_sent_has_its_large_parts_in_common():
    """Flower keeps equal parts once: the store holds what two clients lack once, and a head for each."""
    large = {"0" * 64: torch.randn(3_000_000, generator=generator(0)).numpy().tobytes()}
    sizes: dict[str, int] = {}
    for client in ("east", "the far north"):
        payload = encode_task(train_task(client, objects=large, seed=len(client)))
        record = pack_payload(payload, 1.0)
        assert unpack_payload(record) == (payload, 1.0)
        arrays = record["payload"]
        assert isinstance(arrays, ArrayRecord)
        sizes |= {array.object_id: len(array.data) for array in arrays.values()}
    assert sum(sizes.values()) < 1.001 * len(large["0" * 64])
    for payload in (b"", b"short", b"\xff" * 20):
        assert unpack_payload(pack_payload(payload)) == (payload, 0.0)


def test_every_payload_comes_back_under_its_name_in_whatever_order(world):
    for name, seconds in (("east", 30), ("north", 5), ("south", 60)):
        world.script[name] = after(seconds, partial(world.answers, f"{name}'s answer".encode()))
    answers = dict(
        world.transport().send_and_receive({name: f"to {name}".encode() for name in world.here})
    )
    assert answers == {name: f"{name}'s answer".encode() for name in world.here}
    for when, name, message in world.sent:
        payload, seconds = unpack_payload(message.content)
        assert (
            when == 0 and payload == f"to {name}".encode() and seconds == ROUND
        )  # the time limit that it is given
        assert message.metadata.ttl > ROUND
    assert [f["client"] for f in world.events_of("answered")] == ["north", "east", "south"]
    assert 60 <= world.now < 61


def test_no_client_is_waited_for_beyond_the_deadline_and_the_others_count(world):
    """Flower silently leaves hanging clients out of its answers; here every client asked has an answer or a reason."""
    world.script["east"] = after(1, partial(world.answers, b"fine"))
    answers = dict(world.transport().send_and_receive(dict.fromkeys(world.here, b"task")))
    assert answers == {
        "east": b"fine",
        "north": Failure("no answer within 100 s"),
        "south": Failure("no answer within 100 s"),
    }
    assert ROUND <= world.now < ROUND + 1
    assert [f["client"] for f in world.events_of("failed")] == ["north", "south"]


def test_a_reply_that_arrives_while_another_is_processed_is_in_time(world):
    world.script = {
        "east": after(99.5, partial(world.answers, b"east's")),
        "south": after(98.9, partial(world.answers, b"south's")),
    }
    answers = {}
    for client, answer in world.transport().send_and_receive({"east": b"task", "south": b"task"}):
        answers[client] = answer
        world.sleep(2)
    assert answers == {"east": b"east's", "south": b"south's"} and world.now > ROUND


def failed(world, code, reason):
    """The server's own error about a node: Flower signs it with the server's node id."""

    def act(message):
        reply = Message(Error(code, reason), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        world.arrive(reply, message)

    return act


def test_an_error_by_the_server_itself_counts_for_the_node_it_is_about(world):
    """The request decides whose answer it is, not the sender that the answer names."""
    world.script = {
        "east": after(2, failed(world, 8, "ClientApp stopped responding.")),
        "south": after(3, failed(world, 8, "")),
    }
    world.script["north"] = after(4, partial(world.answers, b"fine"))
    answers = dict(world.transport().send_and_receive(dict.fromkeys(world.here, b"task")))
    assert answers == {
        "east": Failure("ClientApp stopped responding."),
        "north": b"fine",
        "south": Failure("Flower's error 8"),
    }


def test_a_lost_connection_does_not_delay_the_round_for_long(world):
    """Flower's report that it is gone ends nothing yet; but once all others have answered, half a minute is enough."""

    def disconnects(message):
        del world.here["east"]
        failed(world, ErrorCode.NODE_UNAVAILABLE, "Node unavailable")(message)

    world.script = {
        "east": after(5, disconnects),
        "north": after(20, partial(world.answers, b"fine")),
    }
    answers = dict(world.transport().send_and_receive(dict.fromkeys(["east", "north"], b"task")))
    assert answers["north"] == b"fine" and "lost its connection" in answers["east"].reason
    assert 20 <= world.now < ROUND / 2 and len(world.sent) == 2


def test_a_client_that_leaves_while_its_reply_arrives_is_not_waited_for_longer(world):
    """Flower no longer reports a client as gone once its reply has begun."""
    world.script = {
        "east": lambda message: [(5, lambda message: world.here.pop("east"))],
        "north": after(20, partial(world.answers, b"fine")),
    }
    answers = dict(world.transport().send_and_receive(dict.fromkeys(["east", "north"], b"task")))
    assert answers["north"] == b"fine" and "lost its connection" in answers["east"].reason
    assert 35 <= world.now < 40 and world.discarded == ["message 0"]


def test_a_client_that_leaves_once_it_has_answered_counts(world):
    def answers_and_leaves(message):
        del world.here["east"]
        world.answers(b"in time", message)

    world.script["east"] = after(1.95, answers_and_leaves)
    assert dict(world.transport().send_and_receive({"east": b"task"})) == {"east": b"in time"}


def test_a_client_that_flower_reported_gone_and_that_reconnects_still_answers(world):
    def disconnects(message):
        del world.here["east"]
        failed(world, ErrorCode.NODE_UNAVAILABLE, "Node unavailable")(message)

    def reconnects(message):
        world.here["east"] = Session(100, "second")
        world.script["east"] = after(5, partial(world.answers, b"after all"))

    world.script["east"] = lambda message: [(5, disconnects), (25, reconnects)]
    assert dict(world.transport().send_and_receive({"east": b"task"})) == {"east": b"after all"}


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict(
            {"payload": ConfigRecord({"bytes": b"x"}), "limits": ConfigRecord({"seconds": 1.0})}
        ),
        RecordDict({"payload": ArrayRecord(), "limits": ConfigRecord({"seconds": 1.0})}),
        RecordDict(
            {"payload": pack_payload(b"x")["payload"], "limits": ConfigRecord({"seconds": "soon"})}
        ),
    ],
)
def test_a_malformed_answer_is_a_failure(world, content):
    world.script["east"] = after(1, lambda m: world.arrive(Message(content, reply_to=m), m))
    assert dict(world.transport().send_and_receive({"east": b"task"})) == {
        "east": Failure("its answer could not be read: a message without a payload")
    }


def test_a_client_that_is_reconnecting_when_a_round_begins_is_asked_when_it_is_back(world):
    away = world.here.pop("south")
    world.at(3, lambda: world.here.update(south=replace(away, connected_at="second")))
    world.script = {
        "east": after(60, partial(world.answers, b"east's")),
        "south": after(1, partial(world.answers, b"south's")),
    }
    answers = dict(world.transport().send_and_receive(dict.fromkeys(["east", "south"], b"task")))
    assert answers == {"east": b"east's", "south": b"south's"}
    assert [client for _, client, _ in world.sent] == ["east", "south"]


def test_an_absence_delays_the_exchanges_by_half_a_minute_altogether(world):
    """Not each of them: a client that is gone for good is waited for once."""
    transport, fine = world.transport(), partial(world.answers, b"fine")
    away = world.here.pop("south")
    world.script = {name: after(1, fine) for name in ("east", "south")}
    gone = Failure("lost its connection and did not come back in time")
    for seconds in (30, 1):
        before = world.now
        answers = dict(transport.send_and_receive(dict.fromkeys(["east", "south"], b"task")))
        assert answers == {"east": b"fine", "south": gone}
        assert seconds <= world.now - before < seconds + 1
    # and once more when it has been back
    world.here["south"] = away
    assert dict(transport.send_and_receive({"south": b"task"})) == {"south": b"fine"}
    del world.here["south"]
    before = world.now
    assert dict(transport.send_and_receive({"south": b"task"})) == {"south": gone}
    assert 30 <= world.now - before < 31


def test_a_client_that_flower_does_not_reach_is_not_waited_for(world):
    world.takes_messages = False
    assert dict(world.transport().send_and_receive({"east": b"task"})) == {
        "east": Failure("Flower did not take the message")
    }
    assert world.now < 2


def test_an_answer_after_the_deadline_is_ignored_and_reported(world, caplog):
    """It does not stand in for the answer to the next request."""
    world.script["east"] = after(ROUND + 20, partial(world.answers, b"old"))
    transport = world.transport()
    assert dict(transport.send_and_receive({"east": b"first"})) == {
        "east": Failure("no answer within 100 s")
    }
    world.script["east"] = after(60, partial(world.answers, b"new"))
    with caplog.at_level(logging.WARNING, "fedmomentum"):
        assert dict(transport.send_and_receive({"east": b"second"})) == {"east": b"new"}
    assert (
        world.events_of("late") == [{"client": "east"}]
        and "east answered 20 s too late; ignored" in caplog.text
    )
    dict(transport.send_and_receive({}))
    assert len(world.events_of("late")) == 1


# ── connecting and disconnecting ──


def test_a_client_that_reconnects_is_asked_again_with_the_remaining_time(world):
    def disconnects(message):
        del world.here["east"]

    def reconnects(message):
        world.here["east"] = Session(100, "second")
        world.script["east"] = after(5, partial(world.answers, b"after all"))

    world.script["east"] = lambda message: [(10, disconnects), (30, reconnects)]
    assert dict(world.transport().send_and_receive({"east": b"task"})) == {"east": b"after all"}
    (first, _, _), (second, _, again) = world.sent
    payload, seconds = unpack_payload(again.content)
    assert (
        first == 0
        and 30 <= second <= 33
        and payload == b"task"
        and seconds == pytest.approx(ROUND - second)
    )
    assert world.now < 40 and world.discarded == ["message 0"]


def test_a_client_that_stays_connected_is_asked_once(world):
    world.script["east"] = after(90, partial(world.answers, b"fine"))
    dict(world.transport().send_and_receive({"east": b"task"}))
    assert len(world.sent) == 1


def test_an_answer_to_a_task_from_before_the_disconnect_is_not_taken_for_a_later_one(world):
    """Only what answers the last question counts, and one client has one answer."""

    def reconnects(message):
        world.here["east"] = Session(100, "second")
        world.script["east"] = after(20, partial(world.answers, b"second"))

    world.script["east"] = lambda message: [
        (10, reconnects),
        (15, partial(world.answers, b"first")),
    ]
    assert dict(world.transport().send_and_receive({"east": b"task"})) == {"east": b"second"}


def test_a_start_waits_for_all_and_a_round_for_the_quorum(world):
    del world.here["south"]
    world.at(20, lambda: world.here.update(south=Session(102, "first")))
    transport = world.transport()
    assert transport.clients() == ["east", "north", "south"] and 20 <= world.now < 23
    assert world.events_of("waiting")[0] == {"for": ["south"], "seconds": JOIN}
    del world.here["south"]
    before = world.now
    assert (
        transport.clients() == ["east", "north"] and world.now == before
    )  # two of three is the quorum
    del world.here["north"]
    world.at(30, lambda: world.here.update(north=Session(101, "second")))
    assert transport.clients() == ["east", "north"] and 30 <= world.now - before < 33


def test_a_start_continues_without_clients_that_did_not_connect_in_time(world, caplog):
    del world.here["south"]
    with caplog.at_level(logging.WARNING, "fedmomentum"):
        assert world.transport().clients() == ["east", "north"]
    assert JOIN <= world.now < JOIN + 3 and "starting without south" in caplog.text


def test_too_few_clients_at_the_deadline_are_reported_with_names_and_numbers(world):
    del world.here["south"], world.here["north"]
    with pytest.raises(QuorumError) as raised:
        world.transport().clients()
    assert str(raised.value) == (
        "1 of 3 registered clients are connected after 50 s, and 2 are needed "
        "(federation.min-valid-fraction). Missing: north, "
        "south. Start them and resume"
    )
    world.registered_names, world.here = [], {}
    with pytest.raises(
        QuorumError, match="0 of 0 registered clients .* Missing: none is registered"
    ):
        world.transport().clients()


def test_who_is_connected_is_known_without_waiting_for_a_quorum(world):
    del world.here["south"], world.here["north"]
    assert world.transport(min_valid_fraction=1.0).connected() == ["east"] and world.now == 0


@pytest.mark.parametrize(
    ("min_valid_fraction", "needed"),
    [(0.01, 1), (1 / 3, 1), (0.34, 2), (2 / 3, 2), (0.67, 3), (1.0, 3)],
)
def test_the_quorum_is_a_share_of_those_admitted_rounded_up(world, min_valid_fraction, needed):
    names = list(world.here)
    for name in names[needed:]:
        del world.here[name]
    assert len(world.transport(min_valid_fraction=min_valid_fraction).clients()) == needed
    del world.here[names[0]]
    with pytest.raises(QuorumError, match=f"and {needed} are needed"):
        world.transport(min_valid_fraction=min_valid_fraction).clients()


# ── a whole run ──


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def real_steps(config, stores):
    """Three real clients, each with its own store."""
    steps = {}
    for name in ("site0", "site1", "site2"):
        client = prepare_client(config, name, stores / name)
        client.training_function = nudge
        steps[name] = client.handle
    return steps


@pytest.fixture
def parties(request, folder, tmp_path, world):
    """Three real clients behind the grid; each answers after a second. The parameter: a method."""
    config = tiny_config(
        folder,
        method={"name": getattr(request, "param", "fedmomentum")},
        federation={"num_rounds": 2},
    )
    steps = real_steps(config, tmp_path)
    world.registered_names = list(steps)
    world.__post_init__()

    def run_step(name, message):
        world.answers(steps[name](unpack_payload(message.content)[0]), message)

    world.script = {name: after(1, partial(run_step, name)) for name in steps}
    return config, steps


@pytest.mark.parametrize("parties", METHODS, indirect=True)
def test_a_run_over_the_grid_has_the_bits_of_one_in_process(parties, world, tmp_path):
    config, _ = parties
    run_federation(world.transport(), config, tmp_path / "over")
    run_federation(
        InProcessTransport(real_steps(config, tmp_path / "there")), config, tmp_path / "one"
    )
    rows = timeless(tmp_path / "over")
    assert len(rows) == 3 and all(row["failures"] == {} for row in rows)
    assert rows == timeless(tmp_path / "one")
    assert chain(tmp_path / "over") == chain(tmp_path / "one")
    assert objects(tmp_path / "over") == objects(tmp_path / "one")
    for name in ("site0", "site1", "site2"):  # and what clients keep of it
        here, there = (
            {file.name for file in (stores / name).rglob("*.safetensors")}
            for stores in (tmp_path, tmp_path / "there")
        )
        assert here == there


def test_snapshots_that_clients_make_are_the_same_over_the_grid(folder, tmp_path, world):
    """Two of three clients a round, so that the third has to catch up; some make snapshots, some are sent them."""
    config = tiny_config(
        folder,
        lora={"rank": 4, "target-modules": ["v_proj"]},
        evaluation={"every": 0},
        federation={"num_rounds": 10, "client-fraction": 0.6},
    )
    steps, recipes = real_steps(config, tmp_path), []
    world.registered_names = list(steps)
    world.__post_init__()

    def run_step(name, message):
        payload = unpack_payload(message.content)[0]
        recipes.extend(getattr(decode_task(payload).request, "recipes", []))
        world.answers(steps[name](payload), message)

    world.script = {name: after(1, partial(run_step, name)) for name in steps}
    run_federation(world.transport(), config, tmp_path / "over")
    run_federation(
        InProcessTransport(real_steps(config, tmp_path / "there")), config, tmp_path / "one"
    )
    assert recipes
    assert timeless(tmp_path / "over") == timeless(tmp_path / "one")
    assert chain(tmp_path / "over") == chain(tmp_path / "one")
    assert objects(tmp_path / "over") == objects(tmp_path / "one")
    for name in steps:
        assert objects(tmp_path / name) == objects(tmp_path / "there" / name)


def test_every_client_keeps_its_own_factors_over_the_grid_whatever_its_name(
    folder, tmp_path, world
):
    config = tiny_config(folder, method={"name": "fedsalora"}, federation={"num_rounds": 3})
    files = dict(
        zip(("north", "north-2", "a/../b"), config.data.client_files.values(), strict=True)
    )
    config = replace(config, data=replace(config.data, client_files=files))

    def steps(stores):
        found = {}
        for name in files:
            client = prepare_client(config, name, stores / directory_name(name))
            client.training_function = nudge
            found[name] = client.handle
        return found

    grid = steps(tmp_path / "grid")
    world.registered_names = list(grid)
    world.__post_init__()

    def run_step(name, message):
        world.answers(grid[name](unpack_payload(message.content)[0]), message)

    world.script = {name: after(1, partial(run_step, name)) for name in grid}
    run_federation(world.transport(), config, tmp_path / "over")
    start(config, tmp_path / "one")
    assert [row["evaluation"]["by_client"] for row in timeless(tmp_path / "over")] == [
        row["evaluation"]["by_client"] for row in timeless(tmp_path / "one")
    ]
    assert objects(tmp_path / "over") == objects(tmp_path / "one")
    for name in files:
        last = [
            read_safetensors(file.read_bytes(), name)[0]
            for stores in (tmp_path / "grid" / directory_name(name), tmp_path / "one")
            for file in stores.glob(f"personal/*/{directory_name(name)}/0003.safetensors")
        ]
        assert len(last) == 2 and all(torch.equal(last[0][key], last[1][key]) for key in last[0])


def test_a_client_that_hangs_is_left_out_of_the_round_and_back_in_the_next(
    parties, world, tmp_path
):
    config, _ = parties
    run_step = world.script["site1"]

    def hangs_in_round_one(message):
        task = decode_task(unpack_payload(message.content)[0])
        return [] if (task.kind, task.server_round) == ("train", 1) else run_step(message)

    world.script["site1"] = hangs_in_round_one
    run_federation(world.transport(), config, tmp_path / "over")
    rows = timeless(tmp_path / "over")
    assert [row["accepted"] for row in rows[1:]] == [
        ["site0", "site2"],
        ["site0", "site1", "site2"],
    ]
    assert rows[1]["failures"] == {"site1": "no answer within 100 s"}


def test_a_payload_that_is_too_large_is_refused_before_anything_is_sent(parties, world, tmp_path):
    config, _ = parties
    transport = world.transport()
    transport.max_payload_bytes = 4000
    with pytest.raises(
        PayloadError,
        match=r"the task for site0 has \d+ bytes.*carries at most 4000. Lower lora.rank",
    ):
        run_federation(transport, config, tmp_path / "over")
    kinds = {decode_task(unpack_payload(message.content)[0]).kind for _, _, message in world.sent}
    assert kinds == {"describe"}  # the questions before the first round are small


def test_a_resumed_run_waits_a_while_for_all_and_then_for_the_quorum(world):
    gone = world.here.pop("south")
    assert world.transport(start_timeout=20).clients() == ["east", "north"] and 20 <= world.now < 30
    world.here["south"] = gone
    started = world.now
    assert (
        world.transport(start_timeout=20).clients() == ["east", "north", "south"]
        and world.now == started
    )
    world.here = {"east": world.here["east"]}
    world.at(40, lambda: world.here.update(south=gone))
    assert world.transport(start_timeout=20, min_valid_fraction=0.6).clients() == ["east", "south"]
    assert 40 <= world.now - started < 50  # below the quorum it waits on
