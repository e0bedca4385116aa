"""The server's process: Flower's fleet service, and the run on top of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from fedmomentum.flower.apps import server_app
from fedmomentum.flower.parties import server_roster
from fedmomentum.flower.superlink import SuperLink
from fedmomentum.flower.transport import FlowerTransport
from fedmomentum.formats.run_files import SERVER_LOG
from fedmomentum.run.networked import run_federation
from fedmomentum.server.callbacks import Callback, CallbackList
from fedmomentum.server.status import StatusWriter
from fedmomentum.utils.terminal import Throttle, log_file

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config


RESUME_WAIT_SECONDS = 60.0
"""How long a resumed run waits for all nodes, which try to reconnect at least twice a minute."""
LIBRARIES = ("flwr", "uvicorn", "asyncio", "httpx")
"""Libraries whose logging strangers and nodes can trigger: throttled, and only to `server.log`."""


def serve(
    config: Config,
    keys: Path,
    out: Path,
    *,
    host: str,
    port: int,
    resume: bool = False,
    server_round: int | None = None,
    callbacks: Iterable[Callback] = (),
) -> None:
    """Serve a run to the admitted nodes until it ends.

    Args:
        config: The run's configuration; its `[data]` is not used.
        keys: Directory written by `fedmomentum keys server`.
        out: The run's directory, which also receives `status.json` and `server.log`.
        host: Address to listen on.
        port: Port to listen on.
        resume: Continue the run in `out`.
        server_round: Resume after this round instead of the last; later rounds are repeated.
        callbacks: Receive progress, traffic, and which nodes are connected.

    Raises:
        ConfigError: If keys or settings are wrong, or the port cannot be opened; see `SuperLink`.
        ModelError: If `out` cannot be used; see `run_federation`.
        QuorumError: If too few nodes take part.
    """
    federation = config.federation
    with (
        _server_log(out),
        SuperLink(keys, host, port) as superlink,
        StatusWriter(out, federation.num_rounds) as status,
    ):
        callback_list = CallbackList([status, *callbacks])

        def run(grid: Grid, context: Context) -> None:
            transport = FlowerTransport(
                grid,
                superlink,
                round_timeout=federation.round_timeout,
                join_timeout=federation.join_timeout,
                min_valid_fraction=federation.min_valid_fraction,
                start_timeout=RESUME_WAIT_SECONDS if resume else None,
                callback=callback_list,
            )
            run_federation(
                transport,
                config,
                out,
                resume=resume,
                server_round=server_round,
                callbacks=[callback_list],
                roster=server_roster(keys) if config.privacy.secure_aggregation else None,
            )

        admitted = ", ".join(superlink.registered()) or "nobody yet (fedmomentum keys admit)"
        callback_list.on_message(
            f"Listening on {host}:{superlink.port} (TLS). Admitted: {admitted}"
        )
        # run in this thread until the run ends
        app = server_app(run)
        app(grid=superlink.grid, context=Context(0, 0, {}, RecordDict(), {}))


@contextlib.contextmanager
def _server_log(out: Path) -> Iterator[None]:
    """Write the log to `out/server.log`, including the libraries' warnings, which only go there.

    Lines are truncated and free of control characters, no matter who caused them.
    """
    out.mkdir(parents=True, exist_ok=True)
    with log_file(out / SERVER_LOG) as file_handler:
        # from libraries, drop the lines that ours replace, and limit the rest
        library_handler = _ForwardingHandler(file_handler)
        library_handler.addFilter(_is_not_refusal)
        library_handler.addFilter(Throttle(burst=100, rate=0.2))
        # set aside their usual handlers, such as the terminal
        loggers = [logging.getLogger(name) for name in LIBRARIES]
        previous = [
            (logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers
        ]
        for logger in loggers:
            logger.handlers = [library_handler]
            logger.propagate = False
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, handlers, propagate, level in previous:
                logger.handlers = handlers
                logger.propagate = propagate
                logger.setLevel(level)


class _ForwardingHandler(logging.Handler):
    """Forwards records to another handler, so that filters added here apply only to them."""

    def __init__(self, target: logging.Handler) -> None:
        super().__init__()
        self._target = target

    def emit(self, record: logging.LogRecord) -> None:
        # one line each, without a traceback
        record.exc_info = None
        record.exc_text = None
        self._target.handle(record)


def _is_not_refusal(record: logging.LogRecord) -> bool:
    """Drop Flower's log line (with the key) about a node that may not join; ours is shorter."""
    return "/v1/fleet/activate-node" not in str(record.msg)
