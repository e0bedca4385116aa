"""Federations whose updates are summed under masks: clients that outlive their server, each with a disk of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fedmomentum.client.secure_work import SecureParty, settled_feedback
from fedmomentum.config.schema import Config
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.protocol.codec import decode_task
from fedmomentum.protocol.messages import Task
from fedmomentum.protocol.secure_messages import SUM_MESSAGE, SumRequest
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from fedmomentum.secure_sum.journal import PartyJournal
from fedmomentum.secure_sum.messages import ServerMessage, decode_message
from fedmomentum.secure_sum.party import Identity
from fedmomentum.secure_sum.roster import make_parties
from tests.runs import nudge, tiny_config

PRIVACY = {"secure_aggregation": True, "max_examples": 100, "max_change": 0.05}
STEPS = ("plan", "advertisements", "inbox", "survivors", "endorsements")


class ServerKilled(BaseException):
    """The server's process ended."""


Position = tuple[int, int, int]
"""Round, sum and step of a message; sum 0 for other tasks."""


def position(task: Task) -> Position:
    """Where in the run a task is."""
    request = task.request
    if not isinstance(request, SumRequest):
        return task.server_round, 0, 0
    message = decode_message(task.objects[SUM_MESSAGE], ServerMessage, "the server")
    tag = type(message).__struct_config__.tag
    return task.server_round, request.number, STEPS.index(tag)


class Federation:
    """Clients over a tiny model; `before(task)` is called before a client gets a task.

    It may raise `ServerKilled`, or return False for a client that is away.
    """

    def __init__(
        self, folder: Path, num_clients: int = 4, *, stores: str = "nodes", **sections
    ) -> None:
        self.stores = folder / stores
        sections = {
            "privacy": PRIVACY,
            "federation": {"num_rounds": 2},
            "evaluation": {"every": 0},
            "lora": {"target-modules": ["v_proj"]},
            **sections,
        }
        self.config: Config = tiny_config(folder, num_clients=num_clients, **sections)
        self.names = sorted(self.config.data.client_files)
        self.keys, self.roster = make_parties(self.names)
        self.clients = {}
        self.before: Callable[[Task], bool | None] = lambda task: None
        self.seen: list[tuple[Task, bytes, bytes]] = []
        for name in self.names:
            self.start_client(name)

    def start_client(self, name: str) -> None:
        """Start a client, or start it again: only its disk is left of what it was."""
        store = self.stores / name
        local = self.clients[self.names[0]].model if self.clients else None
        client = prepare_client(self.config, name, store, local=local)
        client.training_function = nudge
        identity = Identity(name, self.keys[name], self.roster)
        client.party = SecureParty(identity, PartyJournal(store / "opened-sums.json"))
        self.clients[name] = client

    def run(self, out: Path, *, resume: bool = False, config: Config | None = None):
        """Run one server to its end; return the global model."""
        transport = _Transport(self)
        return run_federation(
            transport, config or self.config, out, resume=resume, roster=self.roster
        )

    def run_through(self, out: Path):
        """Run servers, one after the other, until one finishes."""
        num_kills = 0
        while True:
            try:
                return self.run(out, resume=num_kills > 0), num_kills
            except ServerKilled:
                num_kills += 1

    def feedback(self, state) -> dict[str, torch.Tensor]:
        """Module to what the model lacks of all clients' cross terms, before the adapter's scaling."""
        totals: dict[str, torch.Tensor] = {}
        last = self.config.federation.num_rounds
        for name, client in self.clients.items():
            outcome = state.outcomes.get(name)
            kept = settled_feedback(client.store, name, state.run_id, last + 1, outcome)
            for module, matrix in kept.items():
                totals[module] = totals.get(module, 0.0) + to_dense(matrix)
        return totals


class _Transport(InProcessTransport):
    def __init__(self, federation: Federation) -> None:
        super().__init__({name: self.handler(federation, name) for name in federation.names})

    def send_and_receive(self, tasks):
        for name in sorted(tasks):
            yield name, self._reply(name, tasks)

    @staticmethod
    def handler(federation: Federation, name: str):
        def handle(payload: bytes) -> bytes:
            task = decode_task(payload)
            if federation.before(task) is False:
                raise ConnectionError("away")
            reply = federation.clients[name].handle(payload)
            federation.seen.append((task, payload, reply))
            return reply

        return handle


def dense_model(model) -> dict[str, torch.Tensor]:
    """Module to what the federation has added to it: what is merged, and the adapter."""
    total = {
        module: to_dense(model.adapter.effective(module)).double()
        for module in model.adapter.modules
    }
    for part in model.base_update:
        for module, matrix in part.matrices.items():
            total[module] = total[module] + to_dense(matrix).double()
    return total
