"""The process of the page: it is there before the run, shows its end, and ends with it however it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from fedmomentum.dashboard.dashboard import Dashboard
from fedmomentum.dashboard.process import page_url
from fedmomentum.errors import ConfigError
from tests.dashboard.serving import Viewer, ask
from tests.report.live import write_running


def port_of(url):
    return int(url.rpartition(":")[2].strip("/"))


def is_open(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(event, seconds=20.0):
    end = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_a_page_from_before_the_run_to_its_end(tmp_path):
    folder = tmp_path / "run"
    with Dashboard(folder, "server.log", "127.0.0.1", 0) as dashboard:
        port = port_of(dashboard.url)
        assert (
            dashboard.url == f"http://127.0.0.1:{port}/"
            and "Before the first round" in ask(port)[2]
        )
        process = dashboard._process._process.pid
        assert os.getpriority(os.PRIO_PROCESS, process) > os.getpriority(os.PRIO_PROCESS, 0)
        viewer = Viewer(port)
        viewer.read_until('"now"')
        status = write_running(folder, num_rounds=1)
        viewer.read_until("Round 2 of 10")
        status.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        started = time.monotonic()
    # the viewer has all of it although the port is closed: the reason, and the report
    with viewer:
        text = viewer.read_until("event: end")
    assert "it was interrupted" in text and "Base model against federated model" in text
    assert time.monotonic() - started < 20 and not is_open(port)


def test_a_port_in_use_is_refused_with_the_reason(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError,
            match=rf"no dashboard: cannot listen on 127.0.0.1:{port}; is the port in use.*--dashboard-address",
        ):
            with Dashboard(tmp_path, "run.log", "127.0.0.1", port):
                pass


def test_the_page_ends_with_a_run_that_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from fedmomentum.dashboard.dashboard import Dashboard;"
        "d = Dashboard(Path(sys.argv[1]), 'server.log', '127.0.0.1', 0); d.__enter__(); print(d.url, flush=True);"
        "time.sleep(60)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    port = port_of(run.stdout.readline().strip())
    write_running(tmp_path, num_rounds=0)
    with Viewer(port) as viewer:
        viewer.read_until("Round 1 of 10")
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        assert "process is gone" in viewer.read_until("event: end")
    until(lambda: not is_open(port))
    run.stdout.close()


def test_killing_the_page_does_not_affect_the_run(tmp_path):
    with Dashboard(tmp_path, "run.log", "127.0.0.1", 0) as dashboard:
        os.kill(dashboard._process._process.pid, signal.SIGKILL)
        started = time.monotonic()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("host", "token", "wanted"),
    [
        ("127.0.0.1", None, "http://127.0.0.1:9444/"),
        ("::1", None, "http://[::1]:9444/"),
        ("0.0.0.0", "a-b_c", f"http://{os.uname().nodename}:9444/?token=a-b_c"),
        ("fed.example.org", "x", "http://fed.example.org:9444/?token=x"),
    ],
)
def test_the_url_to_open(host, token, wanted):
    assert page_url(host, 9444, token) == wanted


def test_on_all_addresses_the_terminal_has_the_token_and_nothing_else(tmp_path):
    with Dashboard(tmp_path, "run.log", "0.0.0.0", 0) as dashboard:
        address, _, token = dashboard.url.partition("?token=")
        port = port_of(address)
        assert len(token) > 40 and ask(port)[0] == 401 and ask(port, f"/?token={token}")[0] == 303
    assert token not in json.dumps(os.listdir(tmp_path))
