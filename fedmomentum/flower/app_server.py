"""A ServerApp for an existing SuperLink: runs the rounds of `serve` over its grid."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmomentum.flower.app_settings import read_run
from fedmomentum.flower.apps import server_app
from fedmomentum.flower.node_roster import NodeRoster
from fedmomentum.flower.transport import FlowerTransport
from fedmomentum.server.callbacks import Callback, CallbackList
from fedmomentum.server.status import StatusWriter
from fedmomentum.utils.process import wait_briefly
from fedmomentum.utils.terminal import LineFormatter

if TYPE_CHECKING:
    from fedmomentum.formats.plan import Plan
    from fedmomentum.formats.round_record import RoundRecord

LOG = logging.getLogger("fedmomentum")
RESUME_WAIT_SECONDS = 60.0
"""How long a resumed run waits for all nodes once enough are connected."""


def make_server_app() -> ServerApp:
    """Return a ServerApp that runs a federation as configured by the run config.

    ::

        app = make_server_app()
    """
    # before torch is loaded in this process or in one that it starts
    wait_briefly()
    return server_app(_run)


def _run(grid: Grid, context: Context) -> None:
    """Run the rounds and write the report.

    Raises:
        FedMomentumError: If a setting is wrong or too few clients take part; Flower's log and
            `flwr list` show the message.
    """
    settings, config = read_run(context.run_config)
    out = Path(settings.out)
    federation = config.federation
    with (
        _run_log(out),
        StatusWriter(out, federation.num_rounds) as status,
    ):
        # Imported once the settings are known to be valid, since torch is slow to load.
        from fedmomentum.report import write_report
        from fedmomentum.run.networked import run_federation

        callback_list = CallbackList([status, _RoundLog()])
        transport = FlowerTransport(
            grid,
            NodeRoster(grid),
            round_timeout=federation.round_timeout,
            join_timeout=federation.join_timeout,
            min_valid_fraction=federation.min_valid_fraction,
            start_timeout=RESUME_WAIT_SECONDS if settings.resume else None,
            num_clients=settings.num_clients,
            callback=callback_list,
        )
        run_federation(transport, config, out, resume=settings.resume, callbacks=[callback_list])
        page = write_report(out)
        LOG.info("The result is in %s, its report in %s", out.resolve(), page.resolve())


@contextlib.contextmanager
def _run_log(out: Path) -> Iterator[None]:
    """Log to Flower's log, which `flwr run --stream` shows, and to `out/server.log`."""
    out.mkdir(parents=True, exist_ok=True)
    stream_handler = logging.StreamHandler()
    stream_handler.setFormatter(LineFormatter("%(message)s"))
    file_handler = logging.FileHandler(out / "server.log", encoding="utf-8")
    file_handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = LOG.level
    LOG.setLevel(logging.INFO)
    for handler in (stream_handler, file_handler):
        LOG.addHandler(handler)
    try:
        yield
    finally:
        for handler in (stream_handler, file_handler):
            LOG.removeHandler(handler)
            handler.close()
        LOG.setLevel(level)


class _RoundLog(Callback):
    """Logs clients that connect or leave, and a line or two per round."""

    def __init__(self) -> None:
        self._online: set[str] = set()
        self._missing: list[str] = []

    def on_message(self, text: str) -> None:
        """Log what the server is doing."""
        LOG.info(text)

    def on_nodes(self, registered: Sequence[str], online: Sequence[str]) -> None:
        """Log which clients have connected and which have left."""
        connected = set(online)
        for name in sorted(connected - self._online):
            LOG.info("%s is connected", name)
        for name in sorted(self._online - connected):
            LOG.info("%s is gone", name)
        self._online = connected

    def on_waiting(self, missing: Sequence[str], seconds: float) -> None:
        """Log which clients the server is waiting for, if they have changed."""
        if list(missing) != self._missing:
            self._missing = list(missing)
            LOG.info("Waiting up to %.0f s for %s", seconds, ", ".join(missing) or "clients")

    def on_plan(self, plan: Plan) -> None:
        """Log the plan's notes."""
        for warning in plan.warnings:
            LOG.info("note: %s", warning)

    def on_round_begin(self, server_round: int, clients: Sequence[str]) -> None:
        """Log which clients train."""
        if server_round:
            LOG.info("Round %d: %s train", server_round, ", ".join(clients))

    def on_failure(self, client: str, reason: str) -> None:
        """Log why a client sent no usable reply."""
        LOG.warning("%s: %s", client, reason)

    def on_round_end(self, record: RoundRecord) -> None:
        """Log the outcome of a round."""
        parts = [f"Round {record.round} is saved"]
        if record.round:
            parts.append(f"{len(record.accepted)} of {len(record.participants)} clients count")
        if record.train_loss is not None:
            parts.append(f"training loss {record.train_loss:.3f}")
        if record.evaluation is not None and record.evaluation.total.num_tokens:
            parts.append(f"held-out loss {record.evaluation.total.loss:.3f}")
        LOG.info("%s", ", ".join(parts))
