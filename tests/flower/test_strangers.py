"""Strangers: however many connections they open and whatever they send, nodes can connect and the process survives."""

import contextlib
import logging
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from fedmomentum.flower.gate import NOTICE_INTERVAL_SECONDS, ThrottledLog
from fedmomentum.flower.keys import admit_node, make_node_key
from fedmomentum.flower.superlink import SuperLink
from fedmomentum.web.limits import ConnectionLimits, default_limits
from tests.flower.network import Stranger, connect, fetch, make_keys, round_trip

ROOT = Path(__file__).parents[2]
SIGNATURE = ("flwr-public-key", "flwr-timestamp", "flwr-signature")
QUICK = ConnectionLimits(
    max_connections=24,
    max_strangers=8,
    max_per_address=6,
    max_per_node=4,
    stranger_seconds=1.5,
    handshake_seconds=1.0,
    idle_seconds=2.0,
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys"), "north", "south")


@pytest.fixture
def link(keys):
    with SuperLink(keys, "127.0.0.1", 0, QUICK) as found:
        yield found


@pytest.fixture
def stranger(link, keys):
    found = Stranger(link.port, keys)
    yield found
    found.close()


def until(event, seconds=10.0):
    end = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def tcp(port):
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def tls(port, keys):
    return ssl.create_default_context(cafile=keys / "ca.pem").wrap_socket(
        tcp(port), server_hostname="127.0.0.1"
    )


def is_closed(connection):
    """Whether the other end has closed the connection."""
    connection.settimeout(10)
    try:
        while connection.recv(1000):
            continue  # what it still sends, such as a refusal
    except (ssl.SSLError, ConnectionError):
        return True
    except TimeoutError:
        return False
    return True


# ── connections ──


def test_silent_connections_are_few_and_short_and_nodes_get_in_beside_them(link, keys):
    with contextlib.ExitStack() as open_ones:
        held = [open_ones.enter_context(tcp(link.port)) for _ in range(40)]
        until(lambda: link.num_connections() <= QUICK.max_per_address)
        with connect(link.port, keys, "north") as node:
            assert round_trip(link, node, "north", b"task", b"reply") == (b"task", b"reply")
        assert all(
            is_closed(connection) for connection in held
        )  # the handshake was due within a second
    until(lambda: link.num_connections() == 0)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nX-",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n123",
    ],
    ids=["nothing", "half a head", "half a body"],
)
def test_a_client_that_does_not_finish_a_request_is_disconnected(link, keys, sent):
    with tls(link.port, keys) as connection:
        connection.sendall(sent)
        started = time.monotonic()
        assert is_closed(connection)
        assert time.monotonic() - started < 5


def test_a_request_head_sent_byte_by_byte_is_cut_off(link, keys):
    with tls(link.port, keys) as connection, pytest.raises((OSError, ssl.SSLError)):
        connection.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nX-Slow: ")
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.1)


def test_a_node_that_stops_in_a_request_is_disconnected(link, keys, stranger):
    """Its signature gives it more time, but not forever."""
    lines = "".join(f"{key}: {value}\r\n" for key, value in stranger.signature("north").items())
    head = f"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n{lines}content-type: application/protobuf\r\n"
    with tls(link.port, keys) as connection:
        connection.sendall(f"{head}content-length: 0\r\n\r\n".encode())
        assert connection.recv(1000).startswith(
            b"HTTP/1.1 401"
        )  # signed by an admitted key, but of no node
        connection.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nX-")
        assert is_closed(connection)


def test_a_node_with_many_connections_loses_its_oldest_and_other_nodes_lose_none(link, keys):
    with connect(link.port, keys, "south") as south, contextlib.ExitStack() as open_ones:
        assert fetch(south) is None
        for _ in range(12):
            client = Stranger(link.port, keys)
            open_ones.callback(client.close)
            assert (
                client.post("pull-messages", headers=client.signature("north")).status_code == 401
            )
        until(lambda: link.num_connections() <= QUICK.max_per_node + 4)
        assert fetch(south) is None


def test_a_process_out_of_file_descriptors_continues_once_some_are_free(keys):
    """Accepting fails without free file descriptors for a while: nothing ends, and a node joins once there are some."""
    limits = ConnectionLimits(
        max_connections=4000,
        max_strangers=4000,
        max_per_address=4000,
        stranger_seconds=60,
        handshake_seconds=60,
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with SuperLink(keys, "127.0.0.1", 0, limits) as link, contextlib.ExitStack() as open_ones:
        count = len(list(Path("/proc/self/fd").iterdir()))
        try:
            # each connection takes two files here, as both ends are this process's
            resource.setrlimit(resource.RLIMIT_NOFILE, (count + 21, hard))
            with contextlib.suppress(OSError):
                for _ in range(30):
                    open_ones.enter_context(tcp(link.port))
            time.sleep(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with connect(link.port, keys, "north") as node:
            assert round_trip(link, node, "north", b"task", b"reply") == (b"task", b"reply")


def test_file_descriptors_are_left_for_the_run_under_any_limit():
    """Half of what the process may open, at most, is for connections; it raises its own limit where it may."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), "
        "int(sys.argv[2])));"
        "from fedmomentum.web.limits import default_limits; limits = default_limits();"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], limits.max_connections, limits.max_strangers, "
        "limits.max_per_address)"
    )
    for soft, hard, wanted in ((100, 1024, "1024 512 128 32"), (64, 64, "64 32 16 8")):
        got = subprocess.run(
            [sys.executable, "-c", code, str(soft), str(hard)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert got.stdout.strip() == wanted, got.stderr
    limits = default_limits()
    assert limits.handshake_seconds <= limits.stranger_seconds < 60


# ── requests ──


def raw(link, keys, *lines, body=b""):
    """The first line of the answer to a request written by hand."""
    with tls(link.port, keys) as connection:
        connection.sendall("".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body)
        connection.settimeout(10)
        return connection.recv(4096).split(b"\r\n")[0].decode()


ASK = "POST /v1/fleet/pull-messages HTTP/1.1"


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ((ASK, "Host: x", "Content-Length: " + "0" * 5000), 413),
        ((ASK, "Host: x", "Content-Length: " + "9" * 5000), 400),
        ((ASK, "Host: x", "Content-Length: -1"), 400),
        ((ASK, "Host: x", "Content-Length: 1_0"), 400),
        ((ASK, "Host: x", "Content-Length: ٣"), 400),
        ((ASK, "Host: x", "Content-Length: 0", "Content-Length: 5"), 400),
        ((ASK, "Host: x", "Transfer-Encoding: chunked"), 413),
        ((ASK, "Host: x", "Transfer-Encoding: chunked", "Content-Length: 3"), 400),
        (
            (ASK, "Host: x", "Content-Length: 0", "flwr-signature: YQ==", "flwr-signature: Yg=="),
            400,
        ),
        ((ASK, "Host: x", "Content-Length: 0", "flwr-signature: " + "YQ==" * 4000), 401),
        (
            (
                ASK,
                "Content-Length: 0",
                "flwr-public-key: *",
                "flwr-signature: YQ==",
                "flwr-timestamp: 1",
            ),
            401,
        ),
        ((ASK, "Host: x", "Connection: Upgrade", "Upgrade: websocket", "Content-Length: 0"), 401),
        (
            (
                "GET /v1/fleet/pull-messages HTTP/1.1",
                "Host: x",
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
                "Sec-WebSocket-Version: 13",
            ),
            404,
        ),
        (("POST * HTTP/1.1", "Host: x", "Content-Length: 0"), 404),
        (("POST /\x7f\x01 HTTP/1.1", "Host: x"), 400),
        (("\x00\x01\x02",), 400),
        ((ASK.replace("pull-messages", "x" * 60000), "Host: x"), 404),
    ],
    ids=lambda value: None if isinstance(value, int) else str(value[-1])[:30],
)
def test_odd_requests_get_a_4xx_and_the_service_continues(link, keys, caplog, lines, status):
    with caplog.at_level(logging.ERROR):
        assert raw(link, keys, *lines).startswith(f"HTTP/1.1 {status} ")
        with connect(link.port, keys, "north") as node:
            assert round_trip(link, node, "north", b"task", b"reply") == (b"task", b"reply")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    "timestamp", ["", "now", "2026-01-01", "9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00-23:59"]
)
def test_odd_times_are_no_signature(stranger, timestamp):
    headers = stranger.signature("north") | {"flwr-timestamp": timestamp}
    assert stranger.post("pull-messages", headers=headers).status_code == 401


def test_only_the_head_of_an_unsigned_request_is_read(link, keys):
    """Not one byte of a body of 16 MiB is read: the refusal comes first."""
    with tls(link.port, keys) as connection:
        connection.sendall(f"{ASK}\r\nHost: x\r\nContent-Length: {16 * 2**20}\r\n\r\n".encode())
        connection.settimeout(10)
        assert connection.recv(1000).startswith(b"HTTP/1.1 401")
        assert is_closed(connection)


def test_a_hundred_bad_requests_leave_one_line_in_the_log_at_most(link, keys, stranger, caplog):
    make_node_key("nobody", keys.parent)
    with caplog.at_level(logging.INFO):
        for number in range(25):
            assert stranger.post("pull-messages").status_code == 401
            assert (
                stranger.post(
                    "activate-node", b"\xff" * number, headers={"content-type": "x"}
                ).status_code
                == 401
            )
            refused = stranger.post("activate-node", headers=stranger.signature("nobody"))
            assert refused.status_code == 403 and refused.json()["code"] == 2004
    lines = [
        record.getMessage() for record in caplog.records if record.name in ("fedmomentum", "flwr")
    ]
    assert len(lines) == 1 and lines[0].startswith(
        "a node that is not admitted asked to join; its public key"
    ), lines
    (keys.parent / "nobody.key").unlink()


def test_forwarded_headers_do_not_change_an_address(link, keys):
    """A stranger cannot spread its connections over addresses of its own making."""
    with contextlib.ExitStack() as open_ones:
        for number in range(20):
            connection = open_ones.enter_context(tls(link.port, keys))
            connection.sendall(f"{ASK}\r\nX-Forwarded-For: 10.0.0.{number}\r\n".encode())
        assert link.num_connections() <= QUICK.max_per_address


def test_a_flood_of_one_node_is_slowed_down_and_the_others_are_served(link, keys):
    """Sixteen at once, and two hundred a second after a burst; south is answered in between."""
    stop = threading.Event()
    counts = []

    def flood():
        client = Stranger(link.port, keys)
        headers, number = client.signature("north"), 0
        while not stop.is_set():
            with contextlib.suppress(httpx.HTTPError):
                client.post("pull-messages", headers=headers)
                number += 1
        counts.append(number)
        client.close()

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        started = time.monotonic()
        with connect(link.port, keys, "south") as node:
            for _ in range(3):
                assert round_trip(link, node, "south", b"task", b"reply") == (b"task", b"reply")
        assert time.monotonic() - started < 20
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    seconds = time.monotonic() - started
    assert sum(counts) <= 400 + 200 * (seconds + 1)


def test_the_same_message_about_a_node_is_logged_once_a_minute(caplog):
    now = [0.0]
    notices = ThrottledLog(lambda: now[0])
    with caplog.at_level(logging.INFO, "fedmomentum"):
        for _ in range(3):
            notices.log(logging.INFO, "north", "looked in")
            notices.log(logging.INFO, "south", "looked in\x1b]0;title\x07\n2026 forged line")
        now[0] += NOTICE_INTERVAL_SECONDS + 1
        notices.log(logging.INFO, "north", "looked in")
    assert [record.getMessage() for record in caplog.records] == [
        "north looked in",
        "south looked in\ufffd]0;title\ufffd\ufffd2026 forged line",
        "north looked in",
    ]


def test_two_addresses_of_one_name_are_both_listened_on(keys):
    with SuperLink(keys, "localhost", 0) as link:
        connect(link.port, keys, "north", host="localhost").probe()


def test_a_node_that_was_removed_can_be_admitted_again(keys):
    _, public = make_node_key("east", keys.parent)
    with SuperLink(keys, "127.0.0.1", 0) as link:
        for _ in range(2):
            admit_node(public, keys)
            assert link.registered() == ["east", "north", "south"]
            with connect(link.port, keys, "east") as node:
                assert round_trip(link, node, "east", b"task", b"reply") == (b"task", b"reply")
            (keys / "nodes" / "east.pub").unlink()
            assert link.registered() == ["north", "south"]
