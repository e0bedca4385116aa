"""Encode and decode tasks and replies; every field is checked before any is used."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from fedmomentum.errors import PayloadError
from fedmomentum.protocol.messages import (
    MAX_OBJECTS,
    PROTOCOL,
    Answer,
    Description,
    Reply,
    Request,
    Task,
    TrainRequest,
    Version,
    kind_of,
)
from fedmomentum.utils.io import canonical_json
from fedmomentum.utils.schema import (
    MAX_COUNT,
    Count,
    Hash,
    Label,
    PositiveCount,
    Schema,
    check_free_form,
    parse_json,
)
from fedmomentum.utils.tensors import bytes_to_tensor, read_safetensors, safetensors_bytes


class _TaskHead(Schema, frozen=True, kw_only=True):
    protocol: int
    run_id: Label
    client_id: Label
    server_round: Count
    request: Request


class _ReplyHead(Schema, frozen=True, kw_only=True):
    protocol: int
    run_id: Label
    client_id: Label
    server_round: Count
    version: Version
    holds: Annotated[list[Hash], Meta(max_length=MAX_OBJECTS)]
    num_examples: PositiveCount
    split: Hash
    answer: Answer


H = TypeVar("H")


# ── tasks ─────────────────────────────────────────────────────────────────────────────────────────


def encode_task(task: Task) -> bytes:
    """Encode a task; objects are uint8 tensors named by their hashes."""
    head = _TaskHead(
        protocol=PROTOCOL,
        run_id=task.run_id,
        client_id=task.client_id,
        server_round=task.server_round,
        request=task.request,
    )
    tensors = {name: bytes_to_tensor(data) for name, data in task.objects.items()}
    return safetensors_bytes(tensors, ("task", canonical_json(msgspec.to_builtins(head))))


def decode_task(data: bytes) -> Task:
    """Decode a task.

    Raises:
        PayloadError: If the bytes are not a task of this protocol.
    """
    tensors, head = _open(data, "task", _TaskHead, "a task")
    objects = {}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.uint8 or tensor.ndim != 1:
            raise PayloadError(
                f"a task: object {name[:64]!r} is {tensor.dtype} {tuple(tensor.shape)}; wanted "
                "bytes"
            )
        objects[name] = tensor.numpy().tobytes()
    if isinstance(head.request, TrainRequest):
        _check_train_request(head.request)
    return Task(head.run_id, head.client_id, head.server_round, head.request, objects)


def _check_train_request(request: TrainRequest) -> None:
    """Check what the types cannot express."""
    check_free_form(request.arguments, "a task: its training arguments")
    if (request.local_steps is None) == (request.local_epochs is None):
        raise PayloadError("a task: exactly one of local_steps and local_epochs must be given")


# ── replies ───────────────────────────────────────────────────────────────────────────────────────


def encode_reply(reply: Reply) -> bytes:
    """Encode a reply."""
    head = _ReplyHead(protocol=PROTOCOL, **{name: getattr(reply, name) for name in Reply.HEAD})
    return safetensors_bytes(reply.tensors, ("reply", canonical_json(msgspec.to_builtins(head))))


def decode_reply(data: bytes, task: Task, max_bytes: int) -> Reply:
    """Decode the reply to a task.

    Args:
        data: The bytes received.
        task: The task that was sent.
        max_bytes: The largest size of a valid reply.

    Raises:
        PayloadError: If there are more than `max_bytes`, or the bytes are not a reply, answer
            another task, or do not fit the types; the message says what was received and expected.
    """
    name = f"client {task.client_id}"
    if len(data) > max_bytes:
        raise PayloadError(
            f"{name}: the reply has {len(data)} bytes; at most {max_bytes} were expected"
        )
    tensors, head = _open(data, "reply", _ReplyHead, name)
    for key in ("run_id", "client_id", "server_round"):
        got = getattr(head, key)
        expected = getattr(task, key)
        if got != expected:
            raise PayloadError(f"{name}: the reply is for {key} {got!r}; expected {expected!r}")
    kind = kind_of(head.answer)
    may_be_missing = kind == "missing" and task.kind in ("train", "evaluate")
    if kind != task.answer_kind and not may_be_missing:
        raise PayloadError(f"{name}: the reply is for kind {kind!r}; expected {task.answer_kind!r}")
    if isinstance(head.answer, Description):
        check_free_form(head.answer.adapter_config, f"{name}: its adapter_config")
    return Reply(**{key: getattr(head, key) for key in Reply.HEAD}, tensors=tensors)


# ── payloads ──────────────────────────────────────────────────────────────────────────────────────


class _ProtocolOnly(msgspec.Struct):
    """The protocol version, from a message of any version."""

    protocol: int


def _open(data: bytes, key: str, head_type: type[H], name: str) -> tuple[dict[str, Tensor], H]:
    """Return the tensors of a payload, and the JSON in its metadata as `head_type`.

    Raises:
        PayloadError: If the bytes are not a payload of this protocol.
    """
    tensors, metadata = read_safetensors(data, name)
    text = metadata.get(key)
    if not isinstance(text, str) or len(metadata) != 1:
        raise PayloadError(f"{name}: the bytes hold no {key}")
    # Check the version first: a message of another version may have other fields.
    version = parse_json(text, _ProtocolOnly, name)
    if version.protocol != PROTOCOL:
        raise PayloadError(
            f"{name}: protocol version {min(abs(version.protocol), MAX_COUNT)}; expected "
            f"{PROTOCOL}. Use the same fedmomentum release everywhere"
        )
    return tensors, parse_json(text, head_type, name)
