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
from fedmomentum.terminal import LineFormatter, Throttle

RETURN_SECONDS = 60.0
"""How long a resumed run waits for all: nodes that were there look for the server at least twice a minute."""

Told = Callable[[str, Mapping[str, Any]], None]


def serve(
    config: Config,
    keys: Path,
    out: Path,
    *,
    host: str,
    port: int,
    resume: bool = False,
    server_round: int | None = None,
    told: Told,
) -> None:
    """Serve a run to the nodes that are admitted in `keys`, to its end.

    Args:
        config: the run; its `[data]` does not count here.
        keys: folder of `fedmomentum keys server`.
        out: the run's folder; also gets `status.json` and `server.log`.
        host: address to listen on.
        port: port to listen on.
        resume: go on with what is in `out`.
        server_round: from this round instead of the last; the rounds after it are done again.
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
                quorum=federation.quorum, start_seconds=RETURN_SECONDS if resume else None, observer=observe,
            )  # fmt: skip
            run_over(transport, config, out, resume=resume, server_round=server_round, observer=observe)

        told("listening", {"host": host, "port": link.port, "registered": link.registered()})
        after.callback(status.close)
        server_app(run)(grid=link.grid, context=Context(0, 0, {}, RecordDict(), {}))


LIBRARIES = ("flwr", "uvicorn", "asyncio", "httpx")
"""Whose loggers strangers and nodes can make speak: they go to `server.log` alone, and not without end."""


@contextlib.contextmanager
def _logged(out: Path) -> Iterator[None]:
    """Keep what is logged, the libraries' warnings too, in `out/server.log`; theirs go there only.

    Lines are cut and have no control characters, whoever caused them.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(out / "server.log", encoding="utf-8")
    file.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler = _Throttled(file)
    handler.addFilter(_without_refusals)
    handler.addFilter(Throttle(burst=100, rate=0.2))
    ours = logging.getLogger("fedmomentum")
    level = ours.level
    ours.addHandler(file)
    ours.setLevel(logging.INFO)
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        ours.removeHandler(file)
        ours.setLevel(level)
        for logger, handlers, propagate, old_level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(old_level)
        file.close()


class _Throttled(logging.Handler):
    """Passes records on to another handler: filters put here count for them alone."""

    def __init__(self, target: logging.Handler) -> None:
        super().__init__()
        self._target = target

    def emit(self, record: logging.LogRecord) -> None:
        record.exc_info = record.exc_text = None  # a line each, no traceback
        self._target.handle(record)


def _without_refusals(record: logging.LogRecord) -> bool:
    """Not the line, key and all, that Flower writes whenever a node may not join; ours says it shorter."""
    return "/v1/fleet/activate-node" not in str(record.msg)
