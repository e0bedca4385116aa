"""What a network costs: bytes on the wire besides the payload, tasks with and without a worker.

    python benchmarks/network.py [--megabytes 1 20 100] [--repeats 3] [--json FILE]

Bytes are counted by a TCP proxy between a node's connection and the server, TLS and all. The second
table times one training step of the bundled model through a node's worker: warm, as in a run, and
started for the task, as Flower's own node would do it.
"""

import argparse
import os
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path

from common import CONFIG, Target, finish
from flwr.app import Message, MessageType
from rich.console import Console
from rich.table import Table

from fedmomentum.config.toml import load_config
from fedmomentum.flower.certificates import make_server_keys
from fedmomentum.flower.fleet_client import FleetClient
from fedmomentum.flower.keys import admit_node, load_private_key, make_node_key
from fedmomentum.flower.payloads import pack_payload
from fedmomentum.flower.superlink import SuperLink
from fedmomentum.flower.worker import Worker

LARGE = 10e6
"""From so many bytes of payload on, what is around it should not matter."""


class CountingProxy:
    """Passes TCP on to a port of this machine and counts the bytes of each direction."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.up = self.down = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listening.accept()
            server = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._pass, args=(client, server, "up"), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, "down"), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while data := source.recv(2**16):
                setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            sink.close()


def wire(megabytes: float, folder: Path) -> dict[str, float]:
    """Send one message of that size to a node, and one back."""
    keys = folder / "keys"
    if not keys.exists():
        make_server_keys(keys, ["127.0.0.1"])
        _, public = make_node_key("node", folder)
        admit_node(public, keys)
    payload = os.urandom(int(megabytes * 1e6))
    reply = os.urandom(int(megabytes * 1e6))
    with SuperLink(keys, "127.0.0.1", 0) as link:
        proxy = CountingProxy(link.port)
        key = load_private_key(folder / "node.key")
        with FleetClient(
            f"127.0.0.1:{proxy.port}", (keys / "ca.pem").read_bytes(), key
        ) as connection:
            node_id = link.online()["node"].node_id
            proxy.up = proxy.down = 0
            started = time.perf_counter()
            names = list(
                link.grid.push_messages(
                    [Message(pack_payload(payload, 60.0), node_id, MessageType.TRAIN)]
                )
            )
            message = connection.pull()
            assert message is not None
            arrived = time.perf_counter()
            connection.push(Message(pack_payload(reply), reply_to=message))
            while not list(link.grid.pull_messages(names)):
                time.sleep(0.01)
            ended = time.perf_counter()
            return {
                "payload_bytes": len(payload),
                "down_bytes": proxy.down,
                "up_bytes": proxy.up,
                "down_ratio": proxy.down / len(payload),
                "up_ratio": proxy.up / len(reply),
                "down_seconds": arrived - started,
                "up_seconds": ended - arrived,
            }


def workers(repeats: int, folder: Path) -> dict[str, list[float]]:
    """Time a one-step task, warm and cold, alternating."""
    config = load_config(CONFIG, ["run.threads=2"])
    warm = Worker(config, "client-0", folder / "warm")
    times: dict[str, list[float]] = {"warm": [], "cold": []}
    try:
        warm.wait_until_ready()
        warm.run_smoke_test(600)
        for _ in range(repeats):
            started = time.perf_counter()
            warm.run_smoke_test(600)
            times["warm"].append(time.perf_counter() - started)
            cold = Worker(config, "client-0", folder / "cold")
            started = time.perf_counter()
            cold.run_smoke_test(600)
            times["cold"].append(time.perf_counter() - started)
            cold.stop()
    finally:
        warm.stop()
    return times


def main() -> None:
    """Measure both, and print the tables and targets."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--megabytes", type=float, nargs="*", default=[1, 20, 100])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [wire(size, folder) for size in options.megabytes]
        table = Table(
            "payload MB",
            "down, wire / payload",
            "s",
            "up, wire / payload",
            "s",
            title="Bytes on the wire",
        )
        for row in rows:
            table.add_row(
                f"{row['payload_bytes'] / 1e6:g}",
                f"{row['down_ratio']:.4f}",
                f"{row['down_seconds']:.2f}",
                f"{row['up_ratio']:.4f}",
                f"{row['up_seconds']:.2f}",
            )
        console.print(table)
        times = workers(options.repeats, folder) if options.repeats else {}
        table = Table(
            "worker", "median s", "all", title="One training step, asked for and answered"
        )
        for kind, seconds in times.items():
            table.add_row(
                kind, f"{statistics.median(seconds):.2f}", " ".join(f"{s:.2f}" for s in seconds)
            )
        console.print(table)
    large = [row for row in rows if row["payload_bytes"] >= LARGE]
    targets = [
        Target.at_most(
            f"{row['payload_bytes'] / 1e6:g} MB {way}: bytes on the wire over the payload's",
            1.01,
            ratio,
        )
        for row in large
        for way, ratio in (("down", row["down_ratio"]), ("up", row["up_ratio"]))
    ]
    finish(targets, options.json, console, "flwr", wire=rows, workers=times)


if __name__ == "__main__":
    main()
