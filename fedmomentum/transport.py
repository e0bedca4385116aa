"""The seam: `Task` to a client, `Reply` from it, as bytes both ways; and the transport within one process.

Every transport carries the same bytes, so they are counted where they are made. A payload is a safetensors file: the
tensors, and one JSON text in its metadata. Nothing in it is trusted by whoever decodes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedmomentum.errors import PayloadError
from fedmomentum.files import read_safetensors, safetensors_bytes, tensor_of

PROTOCOL = 1
PROBE = "probe."
"""Replies hold the tensors `probe.base` and `probe.effective`: what the client measured on its live weights."""
SECONDS = "seconds"
"""And `seconds`: (loading the global model, the task itself); a tensor, so that a reply's size tells no time."""


@dataclass(frozen=True)
class Task:
    """What the server asks of one client in one round.

    Attributes:
        kind: `describe`, `train` or `evaluate`.
        run_id: which run; a reply names it, and counts for no other.
        client_id: whom.
        server_round: from 1; 0 before the first round.
        manifest: the global model to load (`GlobalModel.manifest`), by content hash; empty to `describe`.
        objects: hash to bytes of the objects that this client lacks.
        settings: what the kind needs, as JSON values: learning rate, steps, seeds, how many examples.
    """

    kind: str
    run_id: str
    client_id: str
    server_round: int
    manifest: Mapping[str, Any]
    objects: Mapping[str, bytes] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What a client answers.

    Attributes:
        kind: the task's.
        run_id: the task's.
        client_id: who.
        server_round: the task's.
        version: the version of the base that the client ended with.
        holds: hashes of the objects that the client now holds, of those the manifest named.
        num_examples: how many examples stand behind the answer; its weight.
        metrics: numbers and tables, as JSON values. Only `{"lacking": [hash, ...]}` where the client cannot do the
            task because it lacks objects that the server believed it held; the server then asks again with them.
        tensors: the trained adapter (`train`) and the probes, or the fresh adapter (`describe`).
    """

    kind: str
    run_id: str
    client_id: str
    server_round: int
    version: str
    holds: Sequence[str]
    num_examples: int
    metrics: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def encode_task(task: Task) -> bytes:
    """The task as bytes; objects travel as tensors of uint8 under their hashes."""
    head = {key: getattr(task, key) for key in ("kind", "run_id", "client_id", "server_round", "manifest", "settings")}
    return safetensors_bytes({name: tensor_of(data) for name, data in task.objects.items()}, ("task", _json(head)))


def decode_task(data: bytes) -> Task:
    """The inverse of `encode_task`.

    Raises:
        PayloadError: anything else.
    """
    tensors, head = _open(data, "task", "a task")
    objects = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    try:
        return Task(**head, objects=objects)
    except TypeError as error:
        raise PayloadError(f"a task with other fields than protocol {PROTOCOL} has: {error}") from error


def encode_reply(reply: Reply) -> bytes:
    """The reply as bytes."""
    keys = ("kind", "run_id", "client_id", "server_round", "version", "holds", "num_examples", "metrics")
    return safetensors_bytes(reply.tensors, ("reply", _json({key: getattr(reply, key) for key in keys})))


def decode_reply(data: bytes, task: Task, max_bytes: int) -> Reply:
    """The inverse of `encode_reply`, for the answer to `task`.

    Raises:
        PayloadError: more than `max_bytes`, not a reply, the answer to another question, an example count that is no
            positive integer, or metrics that are not finite; naming what came and what was wanted.
    """
    name = f"client {task.client_id}"
    if len(data) > max_bytes:
        raise PayloadError(f"{name}: the reply has {len(data)} bytes; at most {max_bytes} were expected")
    tensors, head = _open(data, "reply", name)
    try:
        reply = Reply(**head, tensors=tensors)
    except TypeError as error:
        raise PayloadError(f"{name}: a reply with other fields than protocol {PROTOCOL} has: {error}") from error
    for key in ("kind", "run_id", "client_id", "server_round"):
        got, wanted = getattr(reply, key), getattr(task, key)
        if got != wanted or type(got) is not type(wanted):
            raise PayloadError(f"{name}: the reply is for {key} {got!r}; asked was {wanted!r}")
    count = reply.num_examples
    if type(count) is not int or not 0 < count < 2**53:
        raise PayloadError(f"{name}: num_examples is {count!r}; wanted a positive whole number")
    if not isinstance(reply.metrics, dict) or not _finite(reply.metrics):
        raise PayloadError(f"{name}: its metrics hold a value that is not finite")
    if not isinstance(reply.holds, list) or not all(isinstance(item, str) for item in reply.holds):
        raise PayloadError(f"{name}: holds is no list of hashes")
    return reply


def _open(data: bytes, kind: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = read_safetensors(data, name)
    try:
        head = json.loads(metadata[kind])
        if head.pop("protocol") != PROTOCOL:
            raise PayloadError(f"{name}: another protocol version; wanted {PROTOCOL}. Use one fedmomentum everywhere")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise PayloadError(f"{name}: the bytes hold no {kind}") from error
    return tensors, head


def _json(head: Mapping[str, Any]) -> str:
    return json.dumps({"protocol": PROTOCOL, **head}, sort_keys=True, separators=(",", ":"))


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(_finite(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_finite(item) for item in value)
    return True


def stack_probes(probes: Mapping[str, Tensor]) -> Tensor:
    """`(num_modules, NUM_PROBES)`, modules in sorted order."""
    return torch.stack([probes[module] for module in sorted(probes)])


# ── transports ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Failure:
    """No usable answer, and why."""

    reason: str


class Transport(Protocol):
    """Carries encoded tasks to clients and their encoded replies back."""

    max_payload_bytes: int
    """The largest payload it carries to one client."""

    def clients(self) -> Sequence[str]:
        """Everyone who can be asked now, sorted.

        Raises:
            QuorumError: too few, and waiting for more has a limit that has passed.
        """
        ...

    def send_and_receive(self, tasks: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        """Ask, wait, and yield an answer or a failure for every client asked, in the order in which they come.

        Both ways are made for many clients: `tasks` may encode a payload when it is looked up, and whoever reads the
        answers is done with one before the next is handed over. So neither side need hold more than one.
        """
        ...


class InProcessTransport:
    """Clients in this process, one after the other, each a function from bytes to bytes."""

    max_payload_bytes = 2**63

    def __init__(self, clients: Mapping[str, Callable[[bytes], bytes]]) -> None:
        self._clients = dict(sorted(clients.items()))

    def clients(self) -> Sequence[str]:
        """The clients' names, sorted."""
        return list(self._clients)

    def send_and_receive(self, tasks: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        """Run the clients in the order of their names; what one raises is its failure."""
        for client_id in sorted(tasks):
            yield client_id, self._answer(client_id, tasks)

    def _answer(self, client_id: str, tasks: Mapping[str, bytes]) -> bytes | Failure:
        if client_id not in self._clients:
            return Failure("missing: no such client is connected")
        payload = tasks[client_id]
        try:
            return self._clients[client_id](payload)
        except Exception as error:  # whatever a client does, the round goes on without it
            return Failure(f"{type(error).__name__}: {error}")
