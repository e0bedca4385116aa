"""fedmomentum/deploy/nginx.conf in a real nginx: nodes get through intact, and nothing else does."""

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from fedmomentum.flower.fleet_client import ConnectionLost
from fedmomentum.flower.gate import MAX_REQUEST_BYTES, PATHS
from tests.flower.network import Stranger, connect, fetch, make_keys, round_trip, running

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
CONFIGURATION = Path(__file__).parents[2] / "fedmomentum" / "deploy" / "nginx.conf"
MIB = 2**20
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(folder: Path, link, keys: Path):
    """nginx on a free port, in the foreground, as the user who runs the tests; the process and its port."""
    folder.mkdir()
    port, text = free_port(), CONFIGURATION.read_text()
    for shipped, here in (
        ("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        ("server 127.0.0.1:9443;", f"server 127.0.0.1:{link.port};"),
        ("/etc/nginx/fedmomentum/", f"{keys}/"),
    ):
        assert shipped in text
        text = text.replace(shipped, here)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log "
        f"{folder}/error.log;\nevents {{}}\n"
        f"http {{\naccess_log {folder}/access.log;\n{temporary}{text}\n}}\n"
    )
    command = [
        NGINX,
        "-p",
        str(folder),
        "-e",
        str(folder / "error.log"),
        "-c",
        str(folder / "nginx.conf"),
    ]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for _ in range(200):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return process, port
        time.sleep(0.02)
    process.kill()
    raise AssertionError((folder / "error.log").read_text())


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys"), "north")


@pytest.fixture(scope="module")
def link(keys):
    with running(keys) as found:
        yield found


@pytest.fixture(scope="module")
def port(link, keys, tmp_path_factory):
    process, found = start(tmp_path_factory.mktemp("nginx") / "prefix", link, keys)
    yield found
    process.terminate()
    process.wait(10)


@pytest.fixture
def stranger(port, keys):
    found = Stranger(port, keys)
    yield found
    found.close()


def test_a_node_exchanges_many_parts_through_it(link, port, keys):
    down, up = os.urandom(11 * MIB), os.urandom(12 * MIB)
    with connect(port, keys, "north") as connection:
        assert round_trip(link, connection, "north", down, up) == (down, up)
        for _ in range(150):  # more at once than any node makes
            assert fetch(connection) is None
        assert list(link.online()) == ["north"]
    assert list(link.online()) == []


def test_the_paths_are_those_of_the_link(stranger):
    (shipped,) = re.findall(r"\^/v1/fleet/\(([a-z|-]+)\)\$ {", CONFIGURATION.read_text())
    assert {f"/v1/fleet/{name}" for name in shipped.split("|")} == PATHS.keys()
    for path in PATHS:
        answer = stranger.client.post(
            path, content=b"", headers={"content-type": "application/protobuf"}
        )
        assert answer.status_code == 401  # it is serve that wants a signature
        for method in ("GET", "PUT", "DELETE", "OPTIONS"):
            refused = stranger.client.request(method, path)
            assert (
                refused.status_code == 404 and b"nginx" in refused.content
            )  # its own page: serve sends none


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/pull-object",
        "/v1/fleet/register-node",
        "/v1/fleet/get-fab",
        "/",
        "/docs",
        "/v1/fleet/pull-messages/x",
        "/x/v1/fleet/pull-messages",
        "/v1/fleet/pull-messages%2f",
    ],
)
def test_paths_other_than_the_fleet_services_are_404(stranger, path):
    answer = stranger.client.post(path, content=b"")
    assert answer.status_code == 404 and b"nginx" in answer.content


def test_large_bodies_and_plain_http_are_refused(stranger, port):
    assert stranger.post("push-object", b"x" * (MAX_REQUEST_BYTES + 1)).status_code == 413
    assert stranger.post("push-object", b"x" * MAX_REQUEST_BYTES).status_code != 413
    assert (
        httpx.post(f"http://127.0.0.1:{port}/v1/fleet/pull-messages", content=b"").status_code
        == 400
    )


def test_a_server_that_the_authority_does_not_vouch_for_is_not_passed_on_to(link, keys, tmp_path):
    mixed = make_keys(tmp_path / "other")
    for name in (
        "server.pem",
        "server.key",
    ):  # nodes trust the proxy; the proxy must not trust serve
        (mixed / name).write_bytes((keys / name).read_bytes())
    process, port = start(tmp_path / "prefix", link, mixed)
    try:
        with pytest.raises(ConnectionLost, match="the server answered 502"):
            connect(port, keys, "north").__enter__()
        assert "certificate verify" in (tmp_path / "prefix" / "error.log").read_text()
    finally:
        process.terminate()
        process.wait(10)
