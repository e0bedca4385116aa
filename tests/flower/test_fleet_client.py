"""A node's connection: how long it lasts, and that it ends only when nothing writes to its sockets any more."""

import threading
import time

import httpx
import pytest

from fedmomentum.flower import fleet_client as module
from fedmomentum.flower.fleet_client import ConnectionLost
from tests.flower.network import connect, make_keys

from flwr.proto.fleet_pb2 import ActivateNodeResponse  # isort: skip


def refusal(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://127.0.0.1/")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(status))


class Service:
    """Stands in for Flower's client; one kind of its requests takes until it is released.

    `node_id` is what the server calls the node; heartbeats under another id are refused.
    """

    def __init__(self):
        self.release = threading.Event()
        self.started = threading.Event()
        self.num_under_way = 0
        self.num_at_close = None
        self.node_id = 7
        self.answers = []  # statuses of the next heartbeats and activations
        self.heartbeats = []
        self.num_pulls = 0

    def _answer(self):
        if self.answers:
            raise refusal(self.answers.pop(0))

    def ActivateNode(self, request):  # noqa: N802
        self._answer()
        return ActivateNodeResponse(node_id=self.node_id)

    def SendNodeHeartbeat(self, request):  # noqa: N802
        self._answer()
        if request.node.node_id != self.node_id:
            raise refusal(401)
        self.heartbeats.append(request.node.node_id)

    def PullMessages(self, request):  # noqa: N802
        self.num_pulls += 1
        raise httpx.ReadError("connection reset by peer")

    def DeactivateNode(self, request):  # noqa: N802
        self.deactivated = request.node_id

    def part(self, request):
        self.num_under_way += 1
        self.started.set()
        self.release.wait(20)
        self.num_under_way -= 1

    def close(self):
        self.num_at_close = self.num_under_way


@pytest.fixture
def service():
    found = Service()
    yield found
    found.release.set()


@pytest.fixture
def connection(tmp_path, service):
    found = connect(1, make_keys(tmp_path, "north"), "north")
    found._client.close()
    found._client = service
    return found


def start_part(connection, service) -> threading.Thread:
    """A thread that sends a part of a reply and is not waited for, as Flower's helpers leave them."""
    thread = threading.Thread(target=connection._call, args=(service.part, None), daemon=True)
    thread.start()
    assert service.started.wait(20)
    return thread


def test_sockets_are_closed_when_no_thread_writes_to_them_any_more(connection, service):
    with connection:
        thread = start_part(connection, service)
        threading.Timer(0.2, service.release.set).start()
    thread.join(20)
    assert service.num_at_close == 0 and service.deactivated == 7


def test_sockets_that_a_thread_still_uses_are_left_to_it(connection, service, monkeypatch):
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.1)
    with connection:
        start_part(connection, service)
    assert service.num_at_close is None and service.deactivated == 7
    with pytest.raises(ConnectionLost, match="closed"):  # and nothing new is sent
        connection._call(service.part, None)


def test_a_message_is_asked_for_once_per_connection(connection, service):
    """The server hands it out once; a second request would find nothing, and the task would be lost."""
    with connection:
        with pytest.raises(ConnectionLost, match="connection reset by peer"):
            connection.pull()
        assert service.num_pulls == 1


# ── heartbeats ──


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.03)


def until(is_true):
    end = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 504])
def test_an_answer_that_blames_the_moment_does_not_end_the_heartbeats(
    connection, service, quick, status
):
    with connection:
        service.answers = [status, status]
        until(lambda: service.heartbeats)
        assert connection._call(lambda request: "answered", None) == "answered"


def test_a_busy_node_is_connected_again_after_the_server_restarted(connection, service, quick):
    """But sends nothing of its old connection, which would be another's to the new server."""
    with connection:
        until(lambda: service.heartbeats)
        service.answers = [401, 502, 403]  # it is back, is not, and does not admit the node yet
        service.node_id = 8
        until(lambda: 8 in service.heartbeats)
        with pytest.raises(ConnectionLost, match="the server answered 403"):
            connection._call(lambda request: "answered", None)
        with pytest.raises(ConnectionLost, match="the server answered 403"):
            connection.pull()
    assert service.num_pulls == 0 and service.deactivated == 8
