"""The coordinator's process: Flower's fleet service, and the run over it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from fedmomentum.config import Config
from fedmomentum.flower.apps import server_app
from fedmomentum.flower.link import Link
from fedmomentum.flower.status import Status
from fedmomentum.flower.transport import FlowerTransport
from fedmomentum.run import run_over

Told = Callable[[str, Mapping[str, Any]], None]


def serve(config: Config, keys: Path, out: Path, *, host: str, port: int, resume: bool = False, told: Told) -> None:
    """Serve a run to the nodes that are admitted in `keys`, to its end.

    Args:
        config: the run; its `[data]` does not count here.
        keys: folder of `fedmomentum keys server`.
        out: the run's folder; also gets `status.json` and `server.log`.
        host: address to listen on.
        port: port to listen on.
        resume: go on with what is in `out`.
        told: told of progress: the events of `run_over`, of `FlowerTransport`, and `listening`.

    Raises:
        ConfigError, ModelError, QuorumError: see `Link` and `run_over`.
    """
    federation = config.federation
    with _logged(out), Link(keys, host, port) as link, contextlib.ExitStack() as after:
        status = Status(out, config.federation.num_rounds)

        def observe(event: str, facts: Mapping[str, Any]) -> None:
            status.observe(event, facts)
            told(event, facts)

        def run(grid: Grid) -> None:
            transport = FlowerTransport(
                grid, link, round_seconds=federation.round_seconds, join_seconds=federation.join_seconds,
                quorum=federation.quorum, observer=observe,
            )  # fmt: skip
            run_over(transport, config, out, resume=resume, observer=observe)

        told("listening", {"host": host, "port": link.port, "registered": link.registered()})
        after.callback(status.close)
        server_app(run)(grid=link.grid, context=Context(0, 0, {}, RecordDict(), {}))


def _without_refusals(record: logging.LogRecord) -> bool:
    """Not the line, key and all, that Flower writes whenever a node may not join: anybody could fill a disk."""
    return "/v1/fleet/activate-node" not in record.getMessage()


@contextlib.contextmanager
def _logged(out: Path) -> Iterator[None]:
    """Keep what is logged, Flower's warnings too, in `out/server.log`; Flower's own go there only."""
    out.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(out / "server.log")
    handler.addFilter(_without_refusals)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours, flower = logging.getLogger("fedmomentum"), logging.getLogger("flwr")
    theirs = list(flower.handlers)
    ours.addHandler(handler)
    flower.handlers, flower.propagate = [handler], False
    flower.setLevel(logging.WARNING)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        flower.handlers = theirs
        handler.close()
