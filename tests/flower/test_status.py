"""`status.json`, what `fedmomentum status` makes of it, and what goes into server.log."""

import io
import json
import logging
import threading
import time

import pytest

from fedmomentum.cli.network_views import NodeView, status_table
from fedmomentum.errors import ModelError
from fedmomentum.flower.node_callback import TaskInfo
from fedmomentum.flower.serve import _server_log
from fedmomentum.formats.status_file import STALE_SECONDS, STATUS_FILE, read_status
from fedmomentum.server.status import StatusWriter
from fedmomentum.utils.terminal import SafeConsole
from tests.flower.network import Stranger, connect, make_keys, running


def shown(status, now):
    console = SafeConsole(file=io.StringIO(), width=200)
    console.print(status_table(status, now))
    return console.file.getvalue()


@pytest.fixture
def status(tmp_path):
    found = StatusWriter(tmp_path, 5)
    found.on_nodes(["north", "south"], ["north", "south"])
    found.on_round_begin(2, ["north", "south"])
    found.on_task_sent("north", 1000, 60.0)
    found.on_failure("south", "a\ufffdreason [bold]")
    return found


def row(text, name):
    (line,) = [line for line in text.splitlines() if f" {name} " in line]
    return line


def test_who_is_connected_is_shown_while_it_is_known(status, tmp_path):
    read = read_status(tmp_path)
    text = shown(read, read.written + 1)
    assert (
        " yes " in row(text, "north")
        and " asked " in row(text, "north")
        and " 59 s " in row(text, "north")
    )
    assert "failed" in row(text, "south") and "a\ufffdreason [bold]" in row(text, "south")
    text = shown(read, read.written + STALE_SECONDS + 1)  # a server that was killed, or is busy
    assert (
        "the server is busy, or gone" in text
        and " ? " in row(text, "north")
        and " yes " not in text
    )


def test_after_the_end_no_client_is_online_or_working(status, tmp_path):
    status.close()
    read = read_status(tmp_path)
    assert [client.connected for client in read.clients.values()] == [False, False]
    assert read.clients["north"].state == "idle" and read.clients["north"].until is None
    text = shown(read, read.written + 1000)
    assert " yes " not in text and " ? " not in text and "busy" not in text and "ended" in text


def test_clients_of_a_run_on_this_machine_are_neither_online_nor_offline(tmp_path):
    found = StatusWriter(tmp_path, 5, networked=False)
    found.on_round_begin(2, ["north", "south"])
    found.on_task_sent("north", 1000, 60.0)
    read = read_status(tmp_path)
    text = shown(read, read.written + 1)
    assert "online" not in text and " no " not in text and " asked " in row(text, "north")
    assert "the run is busy" in shown(read, read.written + STALE_SECONDS + 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clients": []}, "clients"),
        ({"clients": {"north": {}}}, "clients"),
        ({"written": "now"}, "written"),
        ({"round": -1}, "round"),
        ({"phase": "\x1b[2J"}, "phase"),
        ({"more": 1}, "was damaged or altered since it was written"),
    ],
)
def test_a_damaged_status_is_reported_by_field(status, tmp_path, change, words):
    (tmp_path / STATUS_FILE).write_text(
        json.dumps(json.loads((tmp_path / STATUS_FILE).read_text()) | change)
    )
    with pytest.raises(ModelError, match=words):
        read_status(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 10**6, b"null"])
def test_an_invalid_status_file_is_a_user_error(tmp_path, content):
    (tmp_path / STATUS_FILE).write_bytes(content)
    with pytest.raises(ModelError):
        read_status(tmp_path)
    (tmp_path / STATUS_FILE).unlink()
    (tmp_path / STATUS_FILE).mkdir()
    with pytest.raises(ModelError, match="is no regular file"):
        read_status(tmp_path)


def test_a_check_leaves_one_clean_line_in_the_servers_log(tmp_path):
    """docs/deployment.md says so; Flower's own line about it is left out."""
    keys = make_keys(tmp_path, "north")
    with _server_log(tmp_path / "run"), running(keys) as link:
        for _ in range(3):
            connect(link.port, keys, "north").probe()
    lines = (tmp_path / "run" / "server.log").read_text().splitlines()
    assert len(lines) == 1 and lines[0].endswith(
        " INFO fedmomentum: north looked in: ok (join --check)"
    ), lines


def test_what_strangers_and_nodes_cause_does_not_fill_the_servers_log(tmp_path, capfd):
    keys = make_keys(tmp_path, "north")
    with _server_log(tmp_path / "run"), running(keys) as link:
        stranger = Stranger(link.port, keys)
        started = time.monotonic()
        for number in range(150):
            stranger.post("pull-messages", b"\xff" * 50, headers=stranger.signature("north"))
            logging.getLogger("uvicorn.error").error(
                "Exception\n\x1b[2J in %s", number, exc_info=ValueError("x" * 10**5)
            )
        logging.getLogger("fedmomentum").warning(
            "north is left out: %s", "\x1b]0;x\x07\n" + "y" * 10**6
        )
        stranger.close()
    # A burst of 100 lines, and another in every five seconds that a busy machine takes for this.
    num_allowed = 102 + 0.2 * (time.monotonic() - started)
    text = (tmp_path / "run" / "server.log").read_text()
    assert len(text.splitlines()) <= num_allowed and len(text) < 50_000
    assert (
        "\x1b" not in text
        and "Traceback" not in text
        and "north is left out: \ufffd]0;x\ufffd\ufffdyyy" in text
    )
    assert "Exception" not in capfd.readouterr().err  # nor the terminal


def test_what_the_server_says_cannot_write_on_a_nodes_terminal(caplog):
    console = SafeConsole(file=io.StringIO(), width=120)
    with NodeView(console) as view:
        view.on_connection_lost("\x1b]0;owned\x07" + "z" * 10**6, 1.0)
        view.on_task(TaskInfo("train\nforged", "\x1b[2J"), 1)
        view.on_warning("THE EXAMPLES ARE DIVIDED OTHERWISE")
        logging.getLogger("flwr").warning("\x1b[2J%s", "w" * 10**6)
    text = console.file.getvalue()
    assert "\x1b" not in text and "\x07" not in text and len(text) < 10_000
    assert "Not connected: \ufffd]0;owned\ufffdzzz" in text and "train\ufffdforged" in text
    assert "THE EXAMPLES ARE DIVIDED OTHERWISE" in text
    assert threading.active_count() >= 1 and caplog.handler is not None
