"""`Exchange`: send each client its task, collect replies, and resend what a client has lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from fedmomentum.errors import FedMomentumError, PayloadError
from fedmomentum.formats.manifest import Manifest, Recipe, as_manifest
from fedmomentum.linalg.probes import NUM_PROBES
from fedmomentum.protocol.adapter_terms import FreshAdapter
from fedmomentum.protocol.codec import decode_reply, encode_task
from fedmomentum.protocol.messages import (
    MEASUREMENTS,
    EvaluateRequest,
    MissingObjects,
    Reply,
    Task,
    TrainRequest,
)
from fedmomentum.protocol.transport import Failure, Transport
from fedmomentum.server.delivery import plan_deliveries
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.server.checkpoint import RunDirectory
    from fedmomentum.server.state import ServerState
from fedmomentum.server.replies import Replies

LOG = logging.getLogger("fedmomentum")
PAYLOAD_MARGIN = 2**20
"""Allowance in bytes for the rest of a reply besides its tensors: names, header, JSON."""


Requests = Mapping[str, TrainRequest] | Mapping[str, EvaluateRequest]


class Exchange:
    """Asks clients to train or to evaluate a global model.

    A client is first assumed to have cached what it last reported. If it has lost some of it since
    (a new disk, an older copy), it says so, and is asked again with the missing objects.

    Args:
        transport: Reaches the clients.
        config: The run's settings.
        directory: The run's directory, which holds the objects that clients may need.
        samples_adapter: Whether clients sample the adapter themselves, from the run's seed.
    """

    def __init__(
        self,
        transport: Transport,
        config: Config,
        directory: RunDirectory,
        *,
        samples_adapter: bool,
    ) -> None:
        self._transport = transport
        self._config = config
        self._directory = directory
        self._samples_adapter = samples_adapter

    def ask(
        self,
        model: GlobalModel,
        state: ServerState,
        requests: Requests,
        server_round: int,
        accept: Callable[[Reply], None],
    ) -> tuple[Replies, ServerState]:
        """Send each client its request with the objects it has not cached; collect the replies.

        Args:
            model: The global model that the clients load.
            state: What the server remembers about the clients.
            requests: Client to its request.
            server_round: The round.
            accept: Takes each reply as it arrives; raises to refuse it.

        Returns:
            The replies, and the state updated with what the clients reported about themselves.
        """
        tasks = _Tasks(model, state, requests, server_round, self._fresh_adapter(model))
        limit = 8 * model.adapter.num_parameters() + PAYLOAD_MARGIN
        limit += 16 * NUM_PROBES * len(model.adapter.modules)
        if self._config.training.optimizer_state == "shared-full":
            limit += 8 * model.adapter.num_parameters()
        collected = Replies()
        reports = _ClientReports()

        # First try: send what the server believes each client needs.
        first_tasks = tasks.plan(self._directory)
        retry_tasks: dict[str, Task] = {}
        for client, reply in collect(self._transport, first_tasks, collected, limit):
            if not isinstance(reply.answer, MissingObjects):
                self._take(client, reply, model, tasks.needed, accept, collected, reports)
                continue
            missing = set(reply.answer.missing)
            if missing <= tasks.needed - first_tasks[client].objects.keys():
                retry_tasks[client] = tasks.task(client, missing)
            else:
                collected.failures[client] = _describe_lost_objects(client)

        # Second try, for clients that have lost objects.
        for client, reply in collect(self._transport, retry_tasks, collected, limit):
            if isinstance(reply.answer, MissingObjects):
                collected.failures[client] = _describe_lost_objects(client)
            else:
                self._take(client, reply, model, tasks.needed, accept, collected, reports)
        return collected, reports.apply_to(state, server_round)

    def _fresh_adapter(self, model: GlobalModel) -> FreshAdapter | None:
        """Return how clients sample the adapter themselves; they report it if the bits differ."""
        if not self._samples_adapter or not model.server_round:
            return None
        return FreshAdapter(
            seed=self._config.run.seed,
            server_round=model.server_round,
            dtype=self._config.federation.downlink_dtype,  # type: ignore[arg-type]
        )

    def _take(
        self,
        client: str,
        reply: Reply,
        model: GlobalModel,
        needed: frozenset[str],
        accept: Callable[[Reply], None],
        collected: Replies,
        reports: _ClientReports,
    ) -> None:
        """Pass a reply to `accept`; keep its small tensors, or the reason for refusing it."""
        if reply.version != model.version:
            collected.failures[client] = (
                f"client {client} ended with base version {reply.version[:16]!r}; wanted "
                f"{model.version[:16]}. It is left out of this round"
            )
            return
        reports.cached_objects[client] = tuple(sorted(needed.intersection(reply.holds)))
        reports.splits[client] = reply.split
        with contain_errors(client, collected.failures):
            accept(reply)
        if client in collected.failures:
            return
        measurements = {}
        for name, tensor in reply.tensors.items():
            if name in MEASUREMENTS:
                measurements[name] = tensor.clone()
        collected.replies[client] = replace(reply, tensors=measurements)


@dataclass
class _ClientReports:
    """What clients report about themselves, besides their answers."""

    cached_objects: dict[str, tuple[str, ...]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)

    def apply_to(self, state: ServerState, server_round: int) -> ServerState:
        """Return the state with these reports; warn of clients that now split data differently."""
        for client in sorted(self.cached_objects):
            split = self.splits[client]
            if state.splits.get(client, split) != split:
                LOG.warning(
                    "round %d: %s splits its examples differently than before (another seed, or "
                    "other data): it trains on examples that it held out, and its scores are too "
                    "good from here on. Restart it with the original seed and data",
                    server_round,
                    client,
                )
            state = state.with_cached_objects(client, self.cached_objects[client])
            state = state.with_split(client, split)
        return state


class _Tasks:
    """The tasks of one exchange: which objects each client is sent."""

    def __init__(
        self,
        model: GlobalModel,
        state: ServerState,
        requests: Requests,
        server_round: int,
        fresh: FreshAdapter | None,
    ) -> None:
        self._model = model
        self._state = state
        self._requests = requests
        self._server_round = server_round
        self._fresh = fresh
        self._objects: dict[str, bytes] = model.objects()
        self.needed = frozenset().union(*(request.needed for request in requests.values()))

    def plan(self, directory: RunDirectory) -> dict[str, Task]:
        """Return each client's task with what it has not cached, going by its last report."""
        clients = sorted(self._requests)
        deliveries = plan_deliveries(self._model, self._state, clients, directory)
        # Recipes may name parts that the model itself no longer has.
        wanted = self.needed.union(*(plan.objects for plan in deliveries.values()))
        for name in sorted(wanted - self._objects.keys()):
            self._objects[name] = directory.read(name)
        # Objects that are not part of the base: the adapter, the starting moments, and the outcome
        # of a client's last sums.
        base_update = {stored.name for stored in self._model.base_update}
        if self._fresh is not None:
            base_update |= {self._model.adapter_objects[kind].name for kind in "BA"}
        tasks = {}
        for client, plan in deliveries.items():
            others = self._requests[client].needed - base_update
            missing = plan.objects | (others - {*self._state.held.get(client, ())})
            tasks[client] = self.task(client, missing, plan.recipes)
        return tasks

    def task(self, client: str, missing: Collection[str], recipes: Sequence[Recipe] = ()) -> Task:
        """Return the client's task with the objects it is missing."""
        request: TrainRequest | EvaluateRequest = self._requests[client]
        request = msgspec.structs.replace(request, fresh=self._fresh, recipes=list(recipes))
        objects = {name: self._objects[name] for name in sorted(missing)}
        return Task(self._state.run_id, client, self._server_round, request, objects)


def sent_manifest(model: GlobalModel) -> Manifest:
    """Return the manifest as clients receive it: the carried part stays with the server."""
    return as_manifest({**model.manifest(), "carried": None}, "the model")


def _describe_lost_objects(client: str) -> str:
    return (
        f"client {client} says that it does not have what it was just sent; is its disk full or "
        "broken?"
    )


# ── sending and collecting ──


@contextmanager
def contain_errors(client: str, failures: dict[str, str]) -> Iterator[None]:
    """Contain an exception raised while handling one client's answer: only that client drops out.

    A full disk, or any other problem with this machine, is not the client's fault.

    Args:
        client: The client.
        failures: Receives the reason, under the client's name.

    Raises:
        OSError: If this machine failed.
    """
    try:
        yield
    except FedMomentumError as error:
        # A reason is kept under the client's name, which need not be said twice.
        failures[client] = printable(str(error).removeprefix(f"client {client}: "))
    except OSError:
        raise
    except Exception as error:
        LOG.debug("the answer of %s could not be handled", client, exc_info=error)
        failures[client] = f"its answer could not be handled ({type(error).__name__})"


class _Payloads(Mapping[str, bytes]):
    """Tasks as bytes, each encoded when it is sent, so that only one is in memory at a time."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self._tasks = tasks
        self.sizes: dict[str, int] = {}
        self.seconds = 0.0

    def __getitem__(self, client: str) -> bytes:
        started = time.perf_counter()
        payload = encode_task(self._tasks[client])
        self.sizes[client] = len(payload)
        self.seconds += time.perf_counter() - started
        return payload

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def check_size(self, limit: int) -> None:
        """Check that even the largest task fits the transport.

        Raises:
            PayloadError: If it does not.
        """

        def num_object_bytes(client: str) -> int:
            return sum(map(len, self._tasks[client].objects.values()))

        largest = max(self._tasks, key=num_object_bytes)
        size = len(self[largest])
        if size > limit:
            raise PayloadError(
                f"the task for {largest} has {size} bytes, {num_object_bytes(largest)} of them "
                f"objects that it misses; this transport carries at most {limit}. Lower lora.rank, "
                "adapt fewer modules, send 16 bits (federation.uplink-dtype, "
                "federation.downlink-dtype), or carry the residual if the method can (for "
                "fedmomentum, residual or energy in [method.settings])"
            )


def collect(
    transport: Transport, tasks: Mapping[str, Task], collected: Replies, max_bytes: int
) -> Iterator[tuple[str, Reply]]:
    """Send the tasks, and yield each decoded reply as it arrives; add failures to `collected`.

    Args:
        transport: Reaches the clients.
        tasks: Client to its task.
        collected: Receives failures, byte counts and times.
        max_bytes: The maximum size of a reply's tensors in bytes.

    Raises:
        PayloadError: If a task is too large for the transport; nothing was sent.
    """
    if not tasks:
        return
    payloads = _Payloads(tasks)
    payloads.check_size(transport.max_payload_bytes)
    silent_clients = set(tasks)
    waiting_since = time.perf_counter()
    encoded_before = payloads.seconds
    for client, answer in transport.send_and_receive(payloads):
        arrived = time.perf_counter()
        collected.wait_seconds += arrived - waiting_since
        silent_clients.discard(client)
        if isinstance(answer, Failure):
            collected.failures[client] = answer.reason
        else:
            num_bytes = collected.uplink_bytes.get(client, 0) + len(answer)
            collected.uplink_bytes[client] = num_bytes
            reply = None
            with contain_errors(client, collected.failures):
                reply = decode_reply(answer, tasks[client], max_bytes)
            if reply is not None:
                yield client, reply
        waiting_since = time.perf_counter()
        collected.encode_seconds += waiting_since - arrived

    # Tasks are encoded while the transport sends; count that time as encoding, not waiting.
    encoded_meanwhile = payloads.seconds - encoded_before
    waited = collected.wait_seconds + time.perf_counter() - waiting_since - encoded_meanwhile
    collected.wait_seconds = max(0.0, waited)
    collected.encode_seconds += payloads.seconds
    for client in silent_clients:
        collected.failures[client] = "missing: no answer in time"
    for client, size in payloads.sizes.items():
        collected.downlink_bytes[client] = collected.downlink_bytes.get(client, 0) + size
