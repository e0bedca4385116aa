"""Start a coordinator and nodes over loopback, control and kill them, and compare the result to a run without faults.

Nothing here sleeps and hopes: every step waits for an event in a log, in `status.json` or in
`metrics.jsonl`, and the case's hard limit ends them all.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Message

from fedmomentum.client.secure_work import SecureParty
from fedmomentum.config.schema import Config
from fedmomentum.config.toml import to_toml
from fedmomentum.flower.certificates import make_server_keys
from fedmomentum.flower.fleet_client import ConnectionLost, FleetClient
from fedmomentum.flower.keys import admit_node, load_private_key, make_node_key
from fedmomentum.flower.parties import node_party
from fedmomentum.flower.payloads import pack_payload, unpack_payload
from fedmomentum.formats.status_file import StatusFile, read_status
from fedmomentum.protocol.codec import decode_task
from fedmomentum.protocol.messages import Task
from fedmomentum.protocol.transport import Failure, InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from fedmomentum.secure_sum.journal import PartyJournal
from fedmomentum.secure_sum.party import Identity
from fedmomentum.secure_sum.roster import make_parties
from fedmomentum.utils.io import write_json
from fedmomentum.utils.seeding import derive_seed
from tests.runs import chain, nudge, objects, timeless, tiny_config
from tests.secure_runs import position

REPOSITORY = Path(__file__).parents[2]
TOKEN = "FAULTS_CASE"
"""Set in the environment of all that a case starts, and inherited by what these start: how leftovers are found."""
NODE_SECONDS = 15.0
"""A node that is told to leave is gone within this."""

Fail = tuple[str, int, str]
"""`("train" or "evaluate", round, client)`: gave no usable answer; `("gone", round, client)`: was not connected;
`("sum-NUMBER-STEP", round, client)`: nor in that step of a sum under masks, from 0."""


class TimeLimit(Exception):
    """A case exceeded its time limit."""


@contextmanager
def hard_limit(seconds: float) -> Iterator[None]:
    """Interrupt the main thread after this many seconds."""

    def ring(number: int, frame: object) -> None:
        raise TimeLimit(f"not over after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def until(event: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """Wait for an event; return its value."""
    end = time.monotonic() + seconds
    while not (found := event()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds:g} s in vain for: {what}")
        time.sleep(0.05)
    return found


class Program:
    """A process of its own group, its output in a file."""

    def __init__(
        self, arguments: list[str], folder: Path, log: Path, environment: Mapping[str, str]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **environment},
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
            )  # as a script's background commands have it: it must end them all the same

    def text(self) -> str:
        """All its output, over all its starts."""
        return self.log.read_text(errors="replace")

    def wait_for_output(self, pattern: str, times: int = 1) -> None:
        """Wait until its output contains a pattern that many times."""
        until(lambda: len(re.findall(pattern, self.text())) >= times, f"{pattern!r} in {self.log}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to it alone, not to what it started; SIGKILL also waits for the end."""
        self.popen.send_signal(number)
        if number == signal.SIGKILL:
            self.popen.wait()

    def exit_code(self, seconds: float = 120.0) -> int:
        """Wait for its end."""
        until(
            lambda: self.popen.poll() is not None, f"the end of the process of {self.log}", seconds
        )
        return self.popen.returncode

    def child(self) -> psutil.Process:
        """The one process that it started."""
        (child,) = psutil.Process(self.popen.pid).children()
        return child


def free_port() -> int:
    """A free loopback port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Federation:
    """One case's: keys, a coordinator, its nodes.

    Args:
        folder: of the case.
        shared: folder of base model and data, which all cases share.
        sections: of the configuration, beside what makes it quick and everything kept.
    """

    def __init__(self, folder: Path, shared: Path, **sections: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True)
        self.folder, self.out, self.keys = folder, folder / "run", folder / "keys"
        self.port = free_port()
        tables: dict[str, dict[str, Any]] = {
            "federation": {
                "num_rounds": 3,
                "min-valid-fraction": 0.3,
                "round_timeout": 120.0,
                "join_timeout": 120.0,
            },
            "training": {"function": "tests.faults.training:train"},
            "run": {"threads": 1, "keep_checkpoints": 99},
        }
        for name, table in sections.items():
            tables[name] = {**tables.get(name, {}), **table}
        self.config = tiny_config(shared, num_clients=4, **tables)
        make_server_keys(self.keys, ["127.0.0.1", "localhost"])
        self.token = uuid.uuid4().hex
        self.server: Program = None  # type: ignore[assignment]
        self.nodes: dict[str, Program] = {}
        self.raws: dict[str, Raw] = {}
        self.names: list[str] = []
        self.orders: dict[str, dict[str, str]] = {}
        self.lost: list[str] = []
        self.compared = ""

    # ── starting ──

    @cached_property
    def environment(self) -> dict[str, str]:
        """Of every process."""
        return {
            TOKEN: self.token,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",
        }

    def key(self, name: str, *, admitted: bool = True) -> Path:
        """The private key of a node, made and admitted if it is not yet."""
        private = self.folder / "private" / f"{name}.key"
        if not private.exists():
            make_node_key(name, private.parent)
        if admitted and name not in self.names:
            admit_node(private.with_suffix(".pub"), self.keys)
            self.names.append(name)
        return private

    def node_config(self, **keys: Path) -> Config:
        """The configuration of a node: in a run with secure aggregation it has a roster of all nodes so far.

        Args:
            keys: Node to the public key that the roster has for it, where that is another one.
        """
        if not self.config.privacy.secure_aggregation:
            return self.config
        file = self.folder / f"roster{'-'.join(['', *sorted(keys)])}.pub"
        lines = [
            keys.get(name, self.key(name).with_suffix(".pub")).read_bytes() for name in self.names
        ]
        file.write_bytes(b"".join(lines))
        privacy = replace(self.config.privacy, roster=str(file))
        return replace(self.config, privacy=privacy)

    def serve(self, *, resume: bool = False, stall: str = "") -> Program:
        """Start the coordinator; nodes that count must have a key by now."""
        file = self.folder / "config.toml"
        file.write_text(to_toml(self.config))
        self.server = Program(
            [
                "-m",
                "tests.faults.server" if stall else "fedmomentum",
                "serve",
                str(file),
                "--out",
                str(self.out),
                "--keys",
                str(self.keys),
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                *(["--resume"] if resume else []),
            ],
            self.folder,
            self.folder / "server.out",
            self.environment | ({"FAULTS_STALL": stall} if stall else {}),
        )
        return self.server

    def join(
        self,
        name: str,
        *,
        config: Config | None = None,
        admitted: bool = True,
        ca: Path | None = None,
    ) -> Program:
        """Start a node, or restart it."""
        file = self.folder / f"{name}.toml"
        file.write_text(to_toml(config or self.node_config()))
        self.nodes[name] = Program(
            [
                "-m",
                "fedmomentum",
                "join",
                str(file),
                "--server",
                f"127.0.0.1:{self.port}",
                "--key",
                str(self.key(name, admitted=admitted)),
                "--ca",
                str(ca or self.keys / "ca.pem"),
                "--store",
                str(self.store(name)),
            ],
            self.folder / name,
            self.folder / f"{name}.out",
            self.environment,
        )
        return self.nodes[name]

    def start(self, *names: str, raw: str = "", act: Act | None = None) -> None:
        """Start a coordinator, nodes, and a client of the test that answers as `act` does."""
        for name in (*names, *([raw] if raw else [])):
            self.key(name)
        self.serve()
        for name in names:
            self.join(name)
        if raw:
            self.raw(raw, act).start()

    def raw(self, name: str, act: Act | None = None) -> Raw:
        """A client of the test in this process, not started yet."""
        self.raws[name] = Raw(self, name, act or honest)
        return self.raws[name]

    def store(self, name: str) -> Path:
        """Where a node keeps what it is sent."""
        return self.folder / f"{name}-store"

    # ── steering ──

    def steer(self, name: str, server_round: int, order: str) -> None:
        """Set what a node does in the training of a round: "raise", "exit", "hold", or "" for nothing."""
        orders = self.orders.setdefault(name, {})
        orders[str(self._seed(name, server_round))] = order
        (self.folder / name).mkdir(exist_ok=True)
        write_json(self.folder / name / "steer.json", orders)

    def _seed(self, name: str, server_round: int) -> int:
        return derive_seed(self.config.run.seed, "batches", server_round, name)

    def until_held(self, name: str, server_round: int, seconds: float = 120.0) -> None:
        """Wait until a node has stopped where it was told to hold."""
        mark = self.folder / name / f"held-{self._seed(name, server_round)}"
        until(mark.exists, f"{name} training in round {server_round}", seconds)

    # ── watching ──

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the run so far."""
        return timeless(self.out) if (self.out / "metrics.jsonl").is_file() else []

    def until_row(self, server_round: int) -> None:
        """Wait until a round is finished."""
        until(lambda: len(self.rows()) > server_round, f"the end of round {server_round}")

    def status(self) -> StatusFile | None:
        """`status.json`, if it is there."""
        return read_status(self.out) if (self.out / "status.json").is_file() else None

    def waiting_for(self) -> list[str]:
        """The clients that the server waits for."""
        status = self.status()
        return [] if status is None else status.waiting_for

    def state(self, name: str, key: str = "state") -> Any:
        """The server's status of a client."""
        status = self.status()
        return None if status is None else getattr(status.clients.get(name), key, None)

    def log(self) -> str:
        """RUN/server.log."""
        return (self.out / "server.log").read_text()

    def finish(self) -> None:
        """Wait for the end of the run; it must succeed."""
        code = self.server.exit_code(seconds=600)  # the case's hard limit is shorter
        assert code == 0, f"the coordinator ended with {code}:\n{self.server.text()[-3000:]}"

    # ── checking ──

    def check(
        self,
        *,
        fails: Iterable[Fail] = (),
        messages: Mapping[tuple[int, str], str] | None = None,
        log: Iterable[str] = (),
        lies: Mapping[str, Callable[..., bytes]] | None = None,
        configs: Mapping[str, Config] | None = None,
        forgets_held: bool = False,
    ) -> str:
        """Wait for the end; every bit must be that of a run in one process in which the same clients failed.

        Args:
            fails: who gave no usable answer, when, in both runs.
            messages: (round, client) to a pattern of the message in the row of the round; all failures
                there are.
            log: patterns that RUN/server.log holds.
            lies: clients whose answers are altered in both runs: `(payload, honest) -> bytes`.
            configs: of nodes that have another than the run's.
            forgets_held: whether the coordinator lost what clients told it that they hold, which
                it then sends again.

        Returns:
            What the coordinator said of the first failure.
        """
        self.finish()
        fails, messages = set(fails), messages or {}
        rows = self.rows()
        assert [row["round"] for row in rows] == list(range(self.config.federation.num_rounds + 1))
        found = {
            (row["round"], client): text for row in rows for client, text in row["failures"].items()
        }
        assert found.keys() == messages.keys(), f"failures are {found}"
        for where, pattern in messages.items():
            assert re.search(pattern, found[where]), (
                f"{where}: {found[where]!r} does not contain {pattern!r}"
            )
        # a client that gave neither an update nor an evaluation has two reasons, which are reported separately
        reasons = [part for text in found.values() for part in re.split("; (?=evaluation: )", text)]
        # The log names sum, client and step before the reason.
        reasons = [re.sub(r"^sum \d+ of round \d+, attempt \d+: ", "", text) for text in reasons]
        for pattern in [*log, *map(re.escape, reasons)]:
            assert re.search(pattern, self.log()), (
                f"server.log does not contain {pattern!r}:\n{self.log()}"
            )
        other = self.folder / "reference"
        Reference(self, fails, lies or {}, configs or {}).run(other)
        _same("metrics.jsonl", _comparable(rows), _comparable(timeless(other)))
        manifests = [_manifests(out, rows) for out in (self.out, other)]
        if forgets_held:
            for manifest in (m for found in manifests for m in found.values()):
                manifest["run"].pop("held")
        _same("rounds", *manifests)
        _same("objects", objects(self.out), objects(other))
        self.compared = f"{len(rows)} rows, same bits"
        gone = {(n, client) for what, n, client in fails if what == "gone"}
        self.lost = [f"{client} in round {n}" for n, client in sorted(gone | found.keys())]
        return next((text for _, text in sorted(found.items())), "")

    # ── ending ──

    def close(self) -> list[str]:
        """Stop everything; return what was wrong with how it ended. Nodes leave by Ctrl-C, as their people would end them."""
        wrong = []
        for raw in self.raws.values():
            raw.stop.set()
        alive = {name: node for name, node in self.nodes.items() if node.popen.poll() is None}
        for node in alive.values():
            node.kill(signal.SIGINT)
        for name, node in alive.items():
            try:
                code = node.exit_code(NODE_SECONDS)
                if code != 130:
                    wrong.append(f"{name} left with {code} upon Ctrl-C")
            except AssertionError:
                wrong.append(f"{name} did not leave upon Ctrl-C")
        if self.server and self.server.popen.poll() is None:
            self.server.kill()
        for raw in self.raws.values():
            if raw.ident:
                raw.join(10)
            if raw.error:
                wrong.append(
                    f"{raw.name}, a client of our own: {type(raw.error).__name__}: {raw.error}"
                )
        try:
            until(lambda: not leftovers(self.token), "", 5)
        except AssertionError:
            for process in leftovers(self.token):
                wrong.append(f"left behind: {process.pid} {' '.join(process.cmdline())[:150]}")
                process.kill()
        return wrong


def leftovers(token: str) -> list[psutil.Process]:
    """The running processes of a case, whichever process started them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(TOKEN) == token:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _same(what: str, got: Any, wanted: Any) -> None:
    """Equal, or an error that shows the first difference."""
    if got == wanted:
        return
    lines = [
        json.dumps(v, indent=1, sort_keys=True, default=sorted).splitlines() for v in (got, wanted)
    ]
    pairs = [f"{a.strip()!r}, wanted {b.strip()!r}" for a, b in zip(*lines) if a != b]
    raise AssertionError(
        f"{what} differs from that of the run in one process: {(pairs or ['its length'])[0]}"
    )


def _comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what a fault may change: reasons, and bytes where a client was asked twice."""
    return [
        {k: v for k, v in row.items() if k not in ("failures", "uplink_bytes", "downlink_bytes")}
        for row in rows
    ]


def _manifests(out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The chain; of what clients hold, that of the accepted: what a failed one holds does not matter."""
    found = chain(out)
    for row in rows[1:]:
        run = found[f"{row['round']:04d}.json"]["run"]
        run["held"] = {
            client: names for client, names in run["held"].items() if client in row["accepted"]
        }
    return found


class Reference(InProcessTransport):
    """A run in this process in which the given clients fail in the given rounds."""

    def __init__(
        self,
        federation: Federation,
        fails: set[Fail],
        lies: Mapping[str, Callable[..., bytes]],
        configs: Mapping[str, Config],
    ) -> None:
        self._config, self._fails, self._lies = federation.config, fails, lies
        self._names, self._configs = sorted(federation.names), configs
        self._asked = (
            -3 if self._config.evaluation.every else -2
        )  # twice to start, and once for round 0

    def run(self, out: Path) -> None:
        """The run, in a folder beside which the clients' stores are."""
        steps = {}
        # Sums of integers do not depend on keys and masks.
        keys, roster = make_parties(self._names)
        if not self._config.privacy.secure_aggregation:
            roster = None
        for name in self._names:
            client = prepare_client(
                self._configs.get(name, self._config), name, out.with_name(f"{name}-there")
            )
            client.training_function = nudge
            steps[name] = client.handle
            if name in self._lies:
                steps[name] = partial(self._lies[name], honest=steps[name])
            if roster is not None:
                journal = PartyJournal(out.with_name(f"{name}-there") / "opened-sums.json")
                client.party = SecureParty(Identity(name, keys[name], roster), journal)
        super().__init__(steps)
        run_federation(self, self._config, out, roster=roster)

    def clients(self) -> list[str]:
        """Who is connected in the round that begins."""
        self._asked += 1
        return [
            name for name in super().clients() if ("gone", self._asked, name) not in self._fails
        ]

    def send_and_receive(self, tasks: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        """Ask those that do not fail."""
        asked = {name: decode_task(payload) for name, payload in tasks.items()}
        failed = {
            name
            for name, task in asked.items()
            if (place_of(task), task.server_round, name) in self._fails
        }
        yield from ((name, Failure("as ordered")) for name in failed)
        yield from super().send_and_receive(
            {name: p for name, p in tasks.items() if name not in failed}
        )


def place_of(task: Task) -> str:
    """What a task asks for, as `Fail` names it."""
    if task.kind != "sum":
        return task.kind
    _, number, step = position(task)
    return f"sum-{number}-{step}"


# ── test clients, for what no real node does ──


@dataclass
class Asked:
    """A message that a client of the test received.

    Attributes:
        raw: the client.
        connection: over which it came.
        message: Flower's.
        payload: the task's bytes.
        task: the task.
    """

    raw: Raw
    connection: FleetClient
    message: Message
    payload: bytes = field(repr=False)
    task: Task

    def is_training(self, server_round: int) -> bool:
        """Whether it asks to train in this round."""
        return self.task.kind == "train" and self.task.server_round == server_round

    def honest(self) -> bytes:
        """The reply that it should have."""
        return self.raw.step(self.payload)

    def message_of(self, payload: bytes) -> Message:
        """Flower's message with a reply."""
        return Message(pack_payload(payload), reply_to=self.message)

    def answer(self, payload: bytes) -> None:
        """Send a reply."""
        self.connection.push(self.message_of(payload))


Act = Callable[[Asked], None]


def honest(asked: Asked) -> None:
    """Answer as a node does."""
    asked.answer(asked.honest())


class Raw(threading.Thread):
    """A client in this process, over the nodes' own connection."""

    def __init__(self, federation: Federation, name: str, act: Act) -> None:
        super().__init__(name=name, daemon=True)
        self._federation, self._act = federation, act
        self._key, self._authority = (
            load_private_key(federation.key(name)),
            (federation.keys / "ca.pem").read_bytes(),
        )
        self.stop = threading.Event()
        self.lost: list[str] = []
        self.error: BaseException | None = None
        config = federation.node_config()
        party = node_party(config, name, federation.key(name), federation.store(name))
        if not config.privacy.secure_aggregation:  # whose bounds of a function are given
            config = replace(config, training=replace(config.training, function=None))
        client = prepare_client(config, name, federation.store(name))
        client.training_function = nudge
        client.party = party
        self.step: Callable[[bytes], bytes] = client.handle

    def connection(self) -> FleetClient:
        """A connection that is not open yet."""
        return FleetClient(f"127.0.0.1:{self._federation.port}", self._authority, self._key)

    def run(self) -> None:
        """Answer what comes, and connect again when the connection is lost."""
        while not self.stop.is_set():
            try:
                with self.connection() as connection:
                    self._serve(connection)
            except ConnectionLost as error:
                self.lost.append(str(error))
                self.stop.wait(0.5)
            except BaseException as error:
                self.error = error
                return

    def _serve(self, connection: FleetClient) -> None:
        while not self.stop.is_set():
            message = connection.pull()
            if message is None:
                self.stop.wait(0.2)
                continue
            payload, _ = unpack_payload(message.content)
            self._act(Asked(self, connection, message, payload, decode_task(payload)))
