"""Nodes that report their own names: who is asked, who counts, and what happens to those that cannot."""

import re

import pytest

pytest.importorskip("flwr")

from fedmomentum.errors import ConfigError, QuorumError
from fedmomentum.flower import node_roster
from fedmomentum.flower.apps import client_app
from fedmomentum.flower.node_roster import NodeRoster
from fedmomentum.flower.transport import FlowerTransport
from tests.flower.loop_grid import LoopGrid

# after fedmomentum.flower, which sets what flwr reads when it is imported
from flwr.app import Context, RecordDict  # isort: skip


def node(number, name):
    """A node whose ClientApp says a name, or raises it."""

    def say(context):
        if isinstance(name, Exception):
            raise name
        return name

    app = client_app(lambda payload, timeout, context: payload, say)
    return lambda message: app(message, Context(1, number, {}, RecordDict(), {}))


def grid(**names):
    return LoopGrid({int(key[1:]): node(int(key[1:]), name) for key, name in names.items()})


def settled(roster):
    """What it says when all that was asked is answered."""
    roster.registered()
    return {name: session.node_id for name, session in roster.online().items()}


def test_each_node_is_asked_once():
    nodes = grid(n10="north", n20="south")
    roster = NodeRoster(nodes)
    assert roster.registered() == []  # asked now, and not waited for
    assert settled(roster) == {"north": 10, "south": 20}
    assert settled(roster) == {"north": 10, "south": 20} and len(nodes.sent) == 2


def test_a_node_that_left_is_registered_and_not_online():
    nodes = grid(n10="north", n20="south")
    roster = NodeRoster(nodes)
    settled(roster)
    gone = nodes.nodes.pop(10)
    assert roster.registered() == ["north", "south"] and set(roster.online()) == {"south"}
    nodes.nodes[11] = gone  # without authentication a node that restarts has another number
    assert settled(roster) == {"north": 11, "south": 20}


def test_a_reactivated_node_has_another_session_and_may_have_another_name():
    nodes = grid(n10="north")
    roster = NodeRoster(nodes)
    settled(roster)
    before = roster.online()["north"]
    nodes.nodes[10] = node(10, "west")
    nodes.activated[10] = "later"
    assert settled(roster) == {"west": 10} and roster.online()["west"] != before


def test_a_name_is_the_first_nodes_while_that_is_connected(caplog):
    nodes = grid(n10="north")
    roster = NodeRoster(nodes)
    settled(roster)
    nodes.nodes[20] = node(20, "north")
    for _ in range(3):
        assert settled(roster) == {"north": 10}
    (record,) = [record for record in caplog.records if "so does node 10" in record.message]
    assert record.message.startswith("node 20 says that it is north")
    del nodes.nodes[10]
    assert settled(roster) == {"north": 20}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (ConfigError("the node config has no name"), "ConfigError: the node config has no name"),
        (ValueError("Mrs Miller"), r"ValueError \(its own log says more\)"),
        ("a\nb", "control character"),
        ("", "a client has no name"),
        (None, "AttributeError"),
    ],
)
def test_a_node_without_a_name_takes_no_part_and_is_asked_again(name, words, caplog, monkeypatch):
    nodes = grid(n10=name)
    roster = NodeRoster(nodes)
    for _ in range(3):
        assert settled(roster) == {}
    (warning,) = [r.message for r in caplog.records if "takes no part" in r.message]

    assert re.search(words, warning) and "Mrs Miller" not in warning
    monkeypatch.setattr(node_roster.time, "monotonic", lambda: 1e9)
    nodes.nodes[10] = node(10, "north")
    assert settled(roster) == {"north": 10}


def test_a_start_waits_for_clients_that_were_never_seen(monkeypatch):
    transport = FlowerTransport(
        grid(n10="north"),
        NodeRoster(grid(n10="north")),
        round_timeout=1,
        join_timeout=0,
        min_valid_fraction=0.6,
        num_clients=3,
    )
    with pytest.raises(QuorumError, match=r"of 3 .* 2 are needed.*3 that have not joined"):
        transport.clients()
