"""`--dashboard`: what is refused before a run starts, and a complete run that is watched."""

import importlib.util
import socket

import pytest
from typer.testing import CliRunner

from fedmomentum.cli.dashboard import dashboard_address, local_page
from fedmomentum.cli.main import app
from fedmomentum.config.toml import to_toml
from fedmomentum.errors import ConfigError
from fedmomentum.formats.status_file import read_status
from tests.dashboard.serving import ask
from tests.runs import Events, start, timeless, tiny_config


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("", ("127.0.0.1", 9444)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:80", ("::1", 80)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
    ],
)
def test_the_address_of_the_page(address, wanted):
    assert dashboard_address(True, address) == wanted


@pytest.mark.parametrize(
    "address",
    [
        "9444",
        "127.0.0.1",
        "127.0.0.1:",
        ":9444",
        "127.0.0.1:65536",
        "127.0.0.1:x",
        "a:1/x",
        "u@a:1",
        "[::1:5",
        "a:1?token=x",
    ],
)
def test_an_invalid_address_is_refused(address):
    with pytest.raises(ConfigError, match="--dashboard-address must be HOST:PORT"):
        dashboard_address(True, address)


def test_an_address_without_a_page_is_a_user_error():
    assert dashboard_address(False, "") is None
    with pytest.raises(ConfigError, match="add --dashboard"):
        dashboard_address(False, "127.0.0.1:1")


@pytest.mark.parametrize("missing", ["uvicorn", "starlette"])
def test_the_extra_that_is_missing_is_named(monkeypatch, missing):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else found(name)
    )
    with pytest.raises(ConfigError, match=r"pip install 'fedmomentum\[dashboard\]'"):
        dashboard_address(True, "")


@pytest.mark.parametrize("command", ["run", "serve"])
def test_a_port_in_use_is_reported_before_anything_is_loaded(tmp_path, command):
    job = tmp_path / "job.toml"
    job.write_text(to_toml(tiny_config(tmp_path)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        words = [
            command,
            str(job),
            "--out",
            str(tmp_path / "run"),
            "--dashboard",
            "--dashboard-address",
            address,
        ]
        result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ConfigError) and f"cannot listen on {address}" in str(
        result.exception
    )
    assert not (tmp_path / "run").exists() and "Reading" not in result.output


def test_a_watched_run_is_the_run_and_its_page_follows_it(tmp_path, capsys):
    config = tiny_config(tmp_path, num_clients=2, federation={"num_rounds": 2})
    start(config, tmp_path / "plain")
    out = tmp_path / "watched"
    pages = {}
    with local_page(("127.0.0.1", 0), out, config) as watchers:
        port = int(capsys.readouterr().out.strip().rpartition(":")[2].strip("/"))

        def look(event, facts):
            if event == "evaluate" and facts["clients"] and not pages:
                pages["early"] = ask(port)[2]

        watched = start(config, out, callbacks=[*watchers, Events(look)])
        assert read_status(out).clients["site0"].rounds == 2
    assert (
        "Dashboard" not in pages["early"]
        and "The base model is evaluated" in pages["early"]
        and "site1" in pages["early"]
    )
    status = read_status(out)
    assert status.phase == "ended" and status.reason is None and not status.networked
    assert status.clients["site0"].up_bytes == sum(
        record.uplink_bytes["site0"] for record in watched.directory.records
    )
    assert timeless(out) == timeless(tmp_path / "plain")
