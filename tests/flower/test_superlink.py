"""The service accepts admitted nodes, on eight paths, for themselves only; and the private names of flwr that it uses exist."""

import ast
import importlib
import os
import re
import socket
import ssl
import threading
import time
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

import fedmomentum.flower
from fedmomentum.errors import ConfigError
from fedmomentum.flower import guard as guard_module
from fedmomentum.flower.fleet_client import ConnectionLost
from fedmomentum.flower.gate import MAX_REQUEST_BYTES, PATHS
from fedmomentum.flower.keys import admit_node, make_node_key
from fedmomentum.flower.records import HEARTBEAT_SECONDS
from fedmomentum.flower.superlink import SuperLink
from tests.flower import network
from tests.flower.network import (
    Stranger,
    answer,
    as_node,
    ask,
    connect,
    fetch,
    make_keys,
    payload_of,
    round_trip,
    running,
)

from flwr.app.message import remove_content_from_message  # isort: skip
from flwr.common.constant import SUPERLINK_NODE_ID  # isort: skip
from flwr.common.serde import message_to_proto  # isort: skip
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest  # isort: skip
from flwr.proto.message_pb2 import PullObjectRequest  # isort: skip
from flwr.proto.node_pb2 import Node  # isort: skip
from flwr.supercore.inflatable.inflatable_object import get_object_tree  # isort: skip
from flwr.supercore.primitives.asymmetric import public_key_to_bytes  # isort: skip
from flwr.superlink.routers.fleet.router import router  # isort: skip

MIB = 2**20


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys"), "north", "south")


@pytest.fixture(scope="module")
def link(keys):
    with running(keys) as found:
        yield found


@pytest.fixture
def stranger(link, keys):
    found = Stranger(link.port, keys)
    yield found
    found.close()


def activation(keys, name, seconds=1):
    """A request that is refused for its interval if name and signature are good, so that it admits nobody."""
    key = network.load_private_key(keys.parent / f"{name}.key")
    return ActivateNodeRequest(
        public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=seconds
    )


# ── what is there ──

CLOSED = [
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/get-run",
    "/v1/fleet/get-fab",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/pull-object",
    "/",
    "/docs",
    "/openapi.json",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/../fleet/pull-messages%2f",
]


@pytest.mark.parametrize("path", CLOSED)
def test_other_paths_are_not_found(stranger, path):
    assert stranger.client.post(path, content=b"").status_code == 404


def test_the_eight_paths_accept_posts_only_and_require_a_signature(stranger):
    assert len(PATHS) == 8 and {route.path for route in router.routes} >= PATHS.keys()
    for path in PATHS:
        assert stranger.client.get(path).status_code == 404
        assert stranger.post(path.removeprefix("/v1/fleet/")).status_code == 401


def test_a_body_that_is_too_large_or_has_no_content_length_is_refused_unread(stranger, link):
    assert stranger.post("pull-messages", b"x" * (MAX_REQUEST_BYTES + 1)).status_code == 413
    media = {"content-type": "application/protobuf"}
    parts = stranger.client.post("/v1/fleet/pull-messages", content=iter([b"x"] * 3), headers=media)
    assert parts.request.headers["transfer-encoding"] == "chunked" and parts.status_code == 413
    assert (
        stranger.post(
            "pull-messages", b"\xff" * 100, headers=stranger.signature("north")
        ).status_code
        == 400
    )
    assert link.registered() == ["north", "south"]


def test_plain_http_is_rejected(link):
    with pytest.raises(httpx.TransportError):
        httpx.post(f"http://127.0.0.1:{link.port}/v1/fleet/pull-messages", content=b"")
    with socket.create_connection(("127.0.0.1", link.port), timeout=5) as plain:
        plain.sendall(
            b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        )
        assert b"HTTP/" not in plain.recv(1000)


def test_a_port_in_use_and_missing_or_open_keys_are_reported_as_user_errors(link, keys, tmp_path):
    with (
        pytest.raises(
            ConfigError, match=f"cannot listen on 127.0.0.1:{link.port}; is the port in use"
        ),
        as_node(),
    ):
        SuperLink(keys, "127.0.0.1", link.port).__enter__()
    with pytest.raises(
        ConfigError, match="has no server.pem; make the keys with: fedmomentum keys server"
    ):
        SuperLink(tmp_path, "127.0.0.1", 0)
    other = make_keys(tmp_path)
    (other / "server.key").chmod(0o640)
    with pytest.raises(ConfigError, match="server.key can be read or written by others.*chmod 600"):
        SuperLink(other, "127.0.0.1", 0)


# ── admission ──


def test_only_a_fresh_signature_by_the_nodes_own_key_counts(stranger, keys):
    def status(name, **signature):
        headers = stranger.signature(name, **signature)
        return stranger.post("activate-node", activation(keys, name), headers=headers).status_code

    good = status("north")
    assert good not in (401, 404, 413)
    assert status("north", signer="south") == 401
    assert status("north", age=240) == good  # the node's clock is up to five minutes behind
    assert status("north", age=330) == 401
    assert status("north", age=-3) == good  # or a few seconds ahead
    assert status("north", age=-30) == 401
    stolen = stranger.post(
        "activate-node", activation(keys, "south"), headers=stranger.signature("north")
    )
    assert stolen.status_code == 401


def test_a_key_that_is_not_admitted_gets_the_reason_until_it_is(link, keys):
    _, public = make_node_key("east", keys.parent)
    with pytest.raises(
        ConnectionLost, match="does not admit this node: its public key is not admitted"
    ):
        connect(link.port, keys, "east").__enter__()
    with pytest.raises(ConnectionLost, match="does not admit this node"):
        connect(link.port, keys, "east").probe()
    admit_node(public, keys)
    assert link.registered() == ["east", "north", "south"]  # also while it runs
    connect(link.port, keys, "east").probe()
    assert "east" not in link.online()  # a check does not join
    with connect(link.port, keys, "east") as connection:
        assert fetch(connection) is None and list(link.online()) == ["east"]
    assert list(link.online()) == []
    (keys / "nodes" / "east.pub").unlink()
    assert link.registered() == ["north", "south"]


def test_a_node_removed_while_connected_can_do_nothing_more(link, keys):
    _, public = make_node_key("west", keys.parent)
    admit_node(public, keys)
    link.registered()
    with connect(link.port, keys, "west") as connection:
        message_id = ask(link, "west", b"task")
        message = fetch(connection)
        (keys / "nodes" / "west.pub").unlink()
        assert link.registered() == ["north", "south"] and list(link.online()) == []
        with pytest.raises(ConnectionLost):
            answer(connection, message, b"too late")
        with pytest.raises(ConnectionLost):
            fetch(connection)
        assert all(not reply.has_content() for reply in link.grid.pull_messages([message_id]))
    with pytest.raises(ConnectionLost, match="does not admit this node"):
        connect(link.port, keys, "west").__enter__()


def test_a_removed_node_is_refused_even_if_nothing_asks_who_is_admitted(link, keys):
    """As while the server aggregates."""
    _, public = make_node_key("northwest", keys.parent)
    admit_node(public, keys)
    assert "northwest" in link.registered()
    with connect(link.port, keys, "northwest") as connection:
        assert fetch(connection) is None
        (keys / "nodes" / "northwest.pub").unlink()
        with pytest.raises(ConnectionLost):
            for _ in range(100):
                fetch(connection)
                time.sleep(0.1)


def test_a_removed_node_is_not_sent_the_next_task(keys):
    _, public = make_node_key("southwest", keys.parent)
    admit_node(public, keys)
    with as_node():
        link = running(keys)  # without the thread that does the same
    for node in link._nodes.values():
        link._state.activate_node(node.node_id, HEARTBEAT_SECONDS)
    assert list(link.online()) == ["north", "south", "southwest"]
    (keys / "nodes" / "southwest.pub").unlink()
    assert list(link.online()) == ["north", "south"]


def test_a_name_is_its_key_and_one_process_at_a_time_has_it(link, keys):
    with connect(link.port, keys, "north"):
        with pytest.raises(ConnectionLost, match="another process uses the same key"):
            connect(link.port, keys, "north").__enter__()
        assert list(link.online()) == ["north"]


def test_a_heartbeat_in_flight_when_a_node_leaves_does_not_keep_it_registered(
    link, keys, monkeypatch
):
    """If it counted after the node left, no node could join under that name until it expired."""
    under_way, count = threading.Event(), link._state.acknowledge_node_heartbeat

    def slowly(*args):
        under_way.set()
        time.sleep(2)  # a busy machine
        return count(*args)

    monkeypatch.setattr(link._state, "acknowledge_node_heartbeat", slowly)
    with connect(link.port, keys, "north"):
        assert under_way.wait(HEARTBEAT_SECONDS)
    time.sleep(2)
    assert list(link.online()) == []
    with connect(link.port, keys, "north"):
        assert list(link.online()) == ["north"]


def test_a_node_speaks_for_itself_only(link, keys, stranger):
    """South cannot read north's messages, answer them, or put up messages as the server."""
    signed = stranger.signature("south")
    with connect(link.port, keys, "north") as north, connect(link.port, keys, "south") as south:
        ids = {name: session.node_id for name, session in link.online().items()}
        message_id = ask(link, "north", b"for north alone")
        assert fetch(south) is None
        others = PullMessagesRequest(node=Node(node_id=ids["north"]))
        assert stranger.post("pull-messages", others, headers=signed).status_code == 401

        message = fetch(north)
        forged = network.Message(network.pack_payload(b"forged"), reply_to=message)
        forged.metadata.__dict__["_message_id"] = forged.object_id

        def pushed_by_south(source):
            forged.metadata.__dict__["_src_node_id"] = source
            forged.metadata.__dict__["_message_id"] = forged.object_id  # it is named by its content
            push = PushMessagesRequest(
                node=Node(node_id=ids["south"]),
                messages_list=[message_to_proto(remove_content_from_message(forged))],
                message_object_trees=[get_object_tree(forged)],
            )
            return stranger.post("push-messages", push, headers=stranger.signature("south"))

        assert pushed_by_south(ids["north"]).status_code == 403
        assert pushed_by_south(SUPERLINK_NODE_ID).status_code == 403
        claimed = pushed_by_south(
            ids["south"]
        )  # in its own name, but the question was north's: nothing is taken
        assert claimed.status_code == 200 and b"forged" not in claimed.content
        assert list(link.grid.pull_messages([message_id])) == []
        twice = PushMessagesRequest(
            node=Node(node_id=ids["south"]), messages_list=[forged_proto(forged)] * 2
        )
        assert stranger.post("push-messages", twice, headers=signed).status_code == 403

        answer(north, message, b"north's own")
        (reply,) = link.grid.pull_messages([message_id])
        assert payload_of(reply) == b"north's own" and reply.metadata.src_node_id == ids["north"]


def forged_proto(message):
    return message_to_proto(remove_content_from_message(message))


def test_an_admitted_node_can_fetch_what_it_can_name(link, keys, stranger):
    """As docs/security.md says: by its SHA-256, nothing else, and only while admitted."""
    with connect(link.port, keys, "north") as north, connect(link.port, keys, "south"):
        message_id = ask(link, "north", b"secret")
        south = Node(node_id=link.online()["south"].node_id)

        def get(name, headers):
            request = PullObjectRequest(node=south, run_id=link.grid.run.run_id, object_id=name)
            return stranger.post("pull-object", request, headers=headers)

        assert get(message_id, {}).status_code == 401
        known = get(message_id, stranger.signature("south"))
        guessed = get("0" * 64, stranger.signature("south"))
        assert known.status_code == guessed.status_code == 200 and len(known.content) > 60 > len(
            guessed.content
        )
        answer(north, fetch(north), b"")
        assert len(list(link.grid.pull_messages([message_id]))) == 1
        assert len(get(message_id, stranger.signature("south")).content) == len(
            guessed.content
        )  # gone once answered


# ── what is carried ──


def test_many_parts_arrive_intact_both_ways(link, keys):
    down, up = os.urandom(11 * MIB), os.urandom(12 * MIB)
    with connect(link.port, keys, "north") as connection:
        assert round_trip(link, connection, "north", down, up) == (down, up)
        assert round_trip(link, connection, "north", b"", b"\0" * 6 * MIB) == (
            b"",
            b"\0" * 6 * MIB,
        )


def test_a_reply_above_the_size_limit_is_cut_off(link, keys, monkeypatch):
    monkeypatch.setattr(guard_module, "MAX_PAYLOAD_BYTES", 6 * MIB)
    with connect(link.port, keys, "north") as connection:
        message_id = ask(link, "north", b"task")
        with pytest.raises(ConnectionLost):
            answer(connection, fetch(connection), os.urandom(12 * MIB))
        (reply,) = link.grid.pull_messages(
            [message_id]
        )  # whatever waits for it gets the error at once
        assert (
            reply.error.reason
            == f"its answer was refused: a reply has at most {6 * MIB} bytes; more came"
        )
    with connect(link.port, keys, "south") as connection:  # the others continue
        assert round_trip(link, connection, "south", b"task", b"reply") == (b"task", b"reply")


def test_a_message_that_nobody_fetched_can_be_withdrawn(link, keys):
    with connect(link.port, keys, "north") as connection:
        stale, fetched = ask(link, "north", b"stale"), None
        link.withdraw([stale, "no such message"])
        assert fetch(connection) is None
        fresh = ask(link, "north", b"fresh")
        fetched = fetch(connection)
        link.withdraw([fresh])  # too late: its answer still arrives
        answer(connection, fetched, b"reply")
        assert len(list(link.grid.pull_messages([fresh]))) == 1


def test_restarting_a_reply_does_not_raise_its_size_limit(link, keys, monkeypatch):
    """A node that restarts its reply has no more bytes than before; the next request gives it new ones."""
    monkeypatch.setattr(guard_module, "MAX_PAYLOAD_BYTES", 20 * MIB)
    with connect(link.port, keys, "north") as connection:
        ask(link, "north", b"task")
        message = fetch(connection)
        answer(connection, message, os.urandom(9 * MIB))
        with pytest.raises(ConnectionLost, match="413"):
            for _ in range(3):
                link.grid._state.message_res_store.clear()
                link.grid._state.message_ins_id_to_message_res_id.clear()
                answer(connection, message, os.urandom(9 * MIB))
        assert link.ledger.pushed_bytes[message.metadata.dst_node_id] > 20 * MIB
        ask(link, "north", b"next")
        assert link.ledger.pushed_bytes[message.metadata.dst_node_id] == 0


def test_a_redirect_is_not_followed(keys):
    """Signed requests go to the server that was named, and to no other address."""
    visits = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self):
            visits.append(self.path)
            self.send_response(307)
            self.send_header("location", f"http://127.0.0.1:{plain.server_port}/taken")
            self.end_headers()

        def log_message(self, *_):
            pass

    plain, secure = (ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) for _ in range(2))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server.pem", keys / "server.key")
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    for server in (plain, secure):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ConnectionLost, match="307"), connect(secure.server_port, keys, "north"):
            pass
    finally:
        plain.shutdown()
        secure.shutdown()
    assert visits == ["/v1/fleet/activate-node"]


# ── what we use of flwr ──

PUBLIC = {
    "flwr.app",
    "flwr.serverapp",
    "flwr.clientapp",
    "flwr.simulation",
    "flwr.serverapp.strategy",
}
PRIVATE = {
    "flwr.app.message",
    "flwr.common.constant",
    "flwr.common.serde",
    "flwr.common.serde_utils",
    "flwr.proto.fleet_pb2",
    "flwr.proto.heartbeat_pb2",
    "flwr.proto.message_pb2",
    "flwr.proto.node_pb2",
    "flwr.proto.recorddict_pb2",
    "flwr.server.superlink.linkstate",
    "flwr.supercore.constant",
    "flwr.supercore.error",
    "flwr.supercore.inflatable.inflatable_object",
    "flwr.supercore.inflatable.inflatable_protobuf_utils",
    "flwr.supercore.inflatable.inflatable_utils",
    "flwr.supercore.object_store",
    "flwr.supercore.primitives.asymmetric",
    "flwr.supercore.protobuf.translation",
    "flwr.supercore.run",
    "flwr.supercore.task_identity",
    "flwr.superlink.federation",
    "flwr.superlink.routers.fleet.node_auth",
    "flwr.superlink.routers.fleet.router",
    "flwr.supernode.fleet_http_client",
    "flwr.supernode.node_auth_http_interceptor",
}


def test_private_names_of_flwr_are_the_listed_ones_and_the_version_is_pinned():
    """Flower may move these in any release: a new one is taken in only with this list and the pin looked at."""
    used = {}
    for file in Path(fedmomentum.flower.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr."):
                used.setdefault(node.module, set()).update(alias.name for alias in node.names)
            assert not (
                isinstance(node, ast.Import) and any(a.name.startswith("flwr") for a in node.names)
            ), file
    assert used.keys() - PUBLIC == PRIVATE
    for module in sorted(PRIVATE | {"flwr.app", "flwr.serverapp", "flwr.clientapp"}):
        for name in used[module]:
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    assert re.match(r"1\.4[12]\.", version("flwr"))
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    flower = pyproject["project"]["optional-dependencies"]["flower"]
    assert flower[0] == "flwr>=1.41,<1.43" and "uvicorn>=0.49,<0.50" in flower
    assert (
        HEARTBEAT_SECONDS == importlib.import_module("flwr.common.constant").HEARTBEAT_MIN_INTERVAL
    )


def test_tests_named_in_the_documentation_exist():
    root = Path(__file__).parents[2]
    named = re.findall(
        r"(tests/flower/\w+\.py)::(\w+)", (root / "docs" / "security.md").read_text()
    )
    assert len(named) > 15
    for file, name in named:
        assert f"def {name}(" in (root / file).read_text(), (file, name)
