"""The same two apps under Flower's simulation engine, which plays the clients in Ray's processes on one machine.

For whoever has a cluster that Ray runs on; on one machine `fedmomentum run` does the same without it. Ray pickles what
it moves between its own processes: code and messages of one's own, no trust boundary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid

from fedmomentum.client import Client, LocalModel, client_step
from fedmomentum.config import Config
from fedmomentum.errors import ConfigError
from fedmomentum.flower.apps import client_app, server_app
from fedmomentum.flower.transport import FlowerTransport, Session, packed, unpacked
from fedmomentum.names import directory_name
from fedmomentum.origin import fingerprints, follow, refuse_missing
from fedmomentum.run import load_data, prepare_party, run_over

WHO = b"who are you?"
_PARTIES: dict[str, tuple[Client, LocalModel]] = {}
"""The parties that this process plays; a Ray process lives through the run, and one base model serves them all."""


def simulate(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    server_round: int | None = None,
    told: Callable[[str, Mapping[str, Any]], None],
) -> None:
    """Run a federation under Flower's simulation engine.

    Args:
        config: the run, data included.
        out: its folder; the clients keep what they are sent in `out/clients`.
        resume: go on with what is in `out`.
        server_round: from this round instead of the last; the rounds after it are done again.
        told: told of progress.

    Raises:
        ConfigError: Ray is not there.
        Exception: whatever ended the run; Flower's engine keeps it to itself, this does not.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        from flwr.simulation import run_simulation
    except ImportError as error:
        raise ConfigError(
            "the simulation engine needs Ray; install it with: pip install 'fedmomentum[simulation]'"
        ) from error
    if resume:
        config = follow(config, out)
        refuse_missing(config)
    parties = load_data(config)
    names = [party.client_id for party in parties]
    data = fingerprints(parties)
    federation, ended = config.federation, list[BaseException]()

    def run(grid: Grid) -> None:
        try:
            transport = FlowerTransport(
                grid, _Names(grid, names), round_seconds=federation.round_seconds, join_seconds=federation.join_seconds,
                quorum=federation.quorum, observer=told,
            )  # fmt: skip
            run_over(transport, config, out, resume=resume, server_round=server_round, observer=told, data=data)
        except BaseException as error:
            ended.append(error)
            raise

    store = (out / "clients").resolve()
    app = client_app(lambda payload, seconds, context: _answer(payload, context, config, names, store))
    resources = {"num_cpus": 1.0, "num_gpus": 0.0}
    try:
        run_simulation(
            server_app(run), app, num_supernodes=len(names),
            backend_config={"client_resources": resources, "init_args": {"include_dashboard": False}},  # type: ignore[dict-item]
        )  # fmt: skip
    except BaseException as error:
        if not ended:
            raise
        raise ended[0] from error
    finally:
        ray.shutdown()
    if ended:
        raise ended[0]


def _answer(payload: bytes, context: Context, config: Config, names: list[str], store: Path) -> bytes:
    """In a Ray process: be the party of this node."""
    name = names[int(context.node_config["partition-id"])]
    if payload == WHO:
        return name.encode()
    if name not in _PARTIES:
        shared = next((local for _, local in _PARTIES.values()), None)
        _PARTIES[name] = prepare_party(config, name, store / directory_name(name), local=shared)
    client, local = _PARTIES[name]
    return client_step(payload, client, local)


class _Names:
    """The roster: node ids are random, so each node is asked once which party it plays."""

    def __init__(self, grid: Grid, names: list[str]) -> None:
        self._grid, self._names = grid, names
        self._nodes: dict[str, Session] = {}

    def withdraw(self, names: Iterable[str]) -> None:
        """Not here: what is asked of Ray's processes is fetched at once."""

    def registered(self) -> list[str]:
        """All parties."""
        return self._names

    def online(self) -> dict[str, Session]:
        """All that have said who they are."""
        known = {session.node_id for session in self._nodes.values()}
        asked = [
            Message(packed(WHO), node_id, MessageType.TRAIN)
            for node_id in self._grid.get_node_ids()
            if node_id not in known
        ]
        for reply in self._grid.send_and_receive(asked, timeout=120.0) if asked else []:
            if reply.has_content():
                name, _ = unpacked(reply.content)
                self._nodes[name.decode()] = Session(reply.metadata.src_node_id, "")
        return dict(sorted(self._nodes.items()))
