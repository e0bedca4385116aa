"""Runs the same two apps under Flower's simulation engine, with the clients in Ray processes.

This is for Ray clusters; on a single machine, `fedmomentum run` does the same without Ray. Ray
pickles what it moves between its processes, but that is only this installation's code and messages,
which do not cross a trust boundary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.serverapp import Grid

from fedmomentum.errors import ConfigError
from fedmomentum.flower.apps import client_app, server_app
from fedmomentum.flower.node_roster import NodeRoster
from fedmomentum.flower.transport import FlowerTransport
from fedmomentum.run.networked import run_federation
from fedmomentum.run.origin import fingerprints, refuse_missing, with_moved_paths
from fedmomentum.run.setup import load_data
from fedmomentum.server.callbacks import Callback, CallbackList
from fedmomentum.utils.names import directory_name

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config


def simulate(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    server_round: int | None = None,
    callbacks: Iterable[Callback] = (),
) -> None:
    """Run a federation under Flower's simulation engine.

    Args:
        config: The run's configuration, data included.
        out: The run's directory; the clients' stores are in `out/clients`.
        resume: Continue the run in `out`.
        server_round: Resume after this round instead of the last; later rounds are repeated.
        callbacks: Receive progress.

    Raises:
        ConfigError: If Ray is not installed.
        Exception: Whatever ended the run, which Flower's engine would hide.
    """
    # no telemetry; Ray reads this when it starts
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        from flwr.simulation import run_simulation
    except ImportError as error:
        raise ConfigError(
            "the simulation engine needs Ray; install it with: pip install "
            "'fedmomentum[simulation]'"
        ) from error
    # read the data here for its names and fingerprints; each Ray process reads it again
    if resume:
        config = with_moved_paths(config, out)
        refuse_missing(config)
    clients = load_data(config)
    names = [client.client_id for client in clients]
    data = fingerprints(clients)
    federation = config.federation
    errors: list[BaseException] = []
    callback_list = CallbackList(callbacks)

    def run(grid: Grid, context: Context) -> None:
        """Run the federation; keep an error, which Flower would only log."""
        try:
            transport = FlowerTransport(
                grid,
                NodeRoster(grid),
                round_timeout=federation.round_timeout,
                join_timeout=federation.join_timeout,
                min_valid_fraction=federation.min_valid_fraction,
                num_clients=len(names),
                callback=callback_list,
            )
            run_federation(
                transport,
                config,
                out,
                resume=resume,
                server_round=server_round,
                callbacks=[callback_list],
                data=data,
            )
        except BaseException as error:
            errors.append(error)
            raise

    # one node per client; Ray starts as many processes as the machine has cores
    simulated = _SimulatedClients(config, names, (out / "clients").resolve())
    resources = {"num_cpus": 1.0, "num_gpus": 0.0}
    try:
        run_simulation(
            server_app(run),
            client_app(simulated.answer, simulated.name),
            num_supernodes=len(names),
            backend_config={
                "client_resources": resources,  # type: ignore[dict-item]
                "init_args": {"include_dashboard": False},
            },
        )
    except BaseException as error:
        if not errors:
            raise
        raise errors[0] from error
    finally:
        ray.shutdown()
    if errors:
        raise errors[0]


@dataclass(frozen=True)
class _SimulatedClients:
    """Answers messages in a Ray process, each as the client of the message's node.

    Attributes:
        config: The run's configuration.
        names: The clients' names; a node's partition is an index into them.
        store: Directory of the clients' stores.
    """

    config: Config
    names: list[str]
    store: Path

    def name(self, context: Context) -> str:
        return self.names[int(context.node_config["partition-id"])]

    def answer(self, payload: bytes, timeout: float, context: Context) -> bytes:
        name = self.name(context)
        # Imported only where tasks are answered: the server's process has no model.
        from fedmomentum.flower.process_clients import answer_here

        return answer_here(self.config, name, self.store / directory_name(name), payload)
