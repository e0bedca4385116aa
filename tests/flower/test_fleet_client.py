"""A node's connection ends only when nothing of this process still writes to its sockets."""

import threading

import pytest

from fedmomentum.flower import fleet_client as module
from fedmomentum.flower.fleet_client import ConnectionLost
from tests.flower.network import connect, make_keys

from flwr.proto.fleet_pb2 import ActivateNodeResponse  # isort: skip


class Service:
    """Stands in for Flower's client; one kind of its requests takes until it is released."""

    def __init__(self):
        self.release = threading.Event()
        self.started = threading.Event()
        self.num_under_way = 0
        self.num_at_close = None

    def ActivateNode(self, request):  # noqa: N802
        return ActivateNodeResponse(node_id=7)

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
