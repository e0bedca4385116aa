"""Faults of the Flower app: a stock SuperLink and SuperNodes, with TLS and authenticated nodes, over loopback."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.cases import case
from tests.faults.harness import Federation, Program, free_port, leftovers, until
from tests.flower.app_config import EXAMPLE, flat

SCRIPTS = Path(sys.executable).parent
ENDING_SECONDS = 40.0
"""What Flower starts ends by itself within this, after the SuperLink and the SuperNodes have."""
SECONDS = 400.0
SECTIONS = {
    "federation": {"num_rounds": 2, "round_timeout": 40.0},
    "evaluation": {"every": 0},
}
"""Few messages: Flower takes some seconds for each, many where the machine has other work."""


class Stock:
    """A SuperLink and SuperNodes as Flower starts them, and the app; `fed.server` is `flwr run`.

    Args:
        fed: the case's keys, configuration and directories.
    """

    def __init__(self, fed: Federation) -> None:
        self.fed = fed
        self.folder = fed.folder
        self.address = f"127.0.0.1:{fed.port}"
        self.home = self.folder / "home"
        self.home.mkdir()
        ca = fed.keys / "ca.pem"
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "loop"\n[superlink.loop]\naddress = "{self.address}"\n'
            f'root-certificates = "{ca}"\n'
        )
        self.environment = fed.environment | {
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{SCRIPTS}:/usr/bin:/bin",
        }
        self.link: Program = None  # type: ignore[assignment]
        self.nodes: dict[str, Program] = {}
        self.app = self.folder / "app"
        shutil.copytree(EXAMPLE, self.app, ignore=shutil.ignore_patterns("__pycache__"))
        text = (self.app / "pyproject.toml").read_text()
        lines = [f"{key} = {json.dumps(value)}" for key, value in flat(fed.config, fed.out).items()]
        head = text[: text.index("[tool.flwr.app.config]")]
        (self.app / "pyproject.toml").write_text(
            f"{head}[tool.flwr.app.config]\n" + "\n".join(lines) + "\n"
        )

    def _program(self, name: str, log: str, *arguments: str, folder: str = "") -> Program:
        command = [str(SCRIPTS / name), *arguments]
        return Program(command, self.folder / folder, self.folder / log, self.environment)

    def start_link(self) -> None:
        """Start the SuperLink, or restart it on its database."""
        keys = self.fed.keys
        options = ["--host", "127.0.0.1", "--port", str(self.fed.port)]
        options += ["--ssl-ca-certfile", str(keys / "ca.pem")]
        options += ["--ssl-certfile", str(keys / "server.pem")]
        options += ["--ssl-keyfile", str(keys / "server.key"), "--enable-supernode-auth"]
        options += ["--disable-runtime-dependency-installation"]
        options += ["--database", str(self.folder / "state.db")]
        times = self.link.text().count("Uvicorn running") if self.link else 0
        self.link = self._program("flower-superlink", "link.out", *options)
        self.link.wait_for_output("Uvicorn running", times + 1)

    def join(self, name: str) -> None:
        """Register a SuperNode with the key that `fedmomentum keys node` makes, and start it."""
        key = self.fed.key(name)
        public = str(key.with_suffix(".pub"))
        process = self._program("flwr", "flwr.out", "supernode", "register", public, "loop")
        assert process.exit_code() == 0 and "registered successfully" in process.text(), (
            process.text()
        )
        data = self.fed.config.data.client_files[name]
        options = ["--superlink", self.address, "--port", str(free_port())]
        options += ["--root-certificates", str(self.fed.keys / "ca.pem")]
        options += ["--auth-supernode-private-key", str(key)]
        options += ["--node-config", f'name="{name}" data="{data}"']
        self.nodes[name] = self._program("flower-supernode", f"{name}.out", *options, folder=name)

    def run(self, *changes: str) -> None:
        """Start the app; `fed.check` waits for its end."""
        options = ["run", str(self.app), "loop", "--stream"]
        if changes:
            options += ["-c", " ".join(changes)]
        self.fed.server = self._program("flwr", "run.out", *options)

    def end(self) -> None:
        """Stop all processes; what they have started must end too, including workers with their models."""
        for program in [*self.nodes.values(), self.link]:
            if program is not None and program.popen.poll() is None:
                program.kill(signal.SIGTERM)
        for program in [*self.nodes.values(), self.link]:
            if program is not None:
                program.exit_code(ENDING_SECONDS)
        until(lambda: not leftovers(self.fed.token), "the end of all", ENDING_SECONDS)


@contextmanager
def running(fed: Federation) -> Iterator[Stock]:
    """A SuperLink with two SuperNodes and the app; all ended afterwards."""
    stock = Stock(fed)
    try:
        stock.start_link()
        for name in ("site0", "site1"):
            stock.join(name)
        stock.run("num-clients=2")
        yield stock
    finally:
        stock.end()


def is_gone(fed: Federation, program: str) -> Callable[[], bool]:
    """Whether no process of the case runs this program."""
    return lambda: not any(program in " ".join(p.cmdline()) for p in leftovers(fed.token))


@case(
    "a stock SuperNode with the Flower app is killed by -9 in a round", seconds=SECONDS, **SECTIONS
)
def app_node_killed(fed: Federation) -> str:
    fed.steer("site1", 2, "hold")
    with running(fed) as stock:
        fed.until_held("site1", 2, SECONDS)
        stock.nodes["site1"].kill()
        pattern = "no answer within 40 s|lost its connection"
        seen = fed.check(fails={("train", 2, "site1")}, messages={(2, "site1"): pattern})
        # one process held the base model of site0, whatever Flower has started for its messages
        text = stock.nodes["site0"].text()
        assert text.count("Start `flwr-clientapp` process") >= 4 and text.count("is loaded") == 1
    return seen


@case(
    "a stock SuperLink with the Flower app is killed by -9 in a round", seconds=SECONDS, **SECTIONS
)
def app_superlink_killed(fed: Federation) -> str:
    for name in ("site0", "site1"):
        fed.steer(name, 2, "hold")
    with running(fed) as stock:
        fed.until_held("site0", 2, SECONDS)
        stock.link.kill()
        until(is_gone(fed, "flwr-serverapp"), "the end of the ServerApp")
        fed.server.kill()
        for name in ("site0", "site1"):
            fed.steer(name, 2, "")
        stock.start_link()
        stock.run("resume=true")
        fed.check()
    return "the run is resumed by another flwr run"
