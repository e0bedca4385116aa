"""What server and clients say to each other: typed tasks and replies, and their bytes.

A payload is a safetensors file: the tensors, and one JSON text in its metadata. Every transport carries the same
bytes, so they are counted where they are made. Nothing in a payload is trusted: the JSON is decoded straight into the
records below, and whatever does not fit them is refused by client and field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from fedmomentum.chat_date import DEFAULT_DATE
from fedmomentum.config import LoraConfig
from fedmomentum.errors import PayloadError
from fedmomentum.files import canonical_json, read_safetensors, safetensors_bytes, tensor_of
from fedmomentum.manifest import MAX_RECIPES, Manifest, Recipe
from fedmomentum.schema import (
    MAX_COUNT,
    Count,
    Hash,
    Label,
    ModulePath,
    PositiveCount,
    Schema,
    Seed,
    Size,
    Text,
    check_free_form,
    parse_json,
)

PROTOCOL = 2
MAX_OBJECTS = 100_000
"""Objects that a manifest or a reply may name."""
MAX_CATEGORIES = 10_000
"""Categories that a client may report its scores by."""
MAX_MODULES = 100_000
"""Modules that an adapter may have."""

BASE_PROBES = "probe.base"
EFFECTIVE_PROBES = "probe.effective"
"""Tensors of a reply: what the client measured on its live weights, `(num_modules, NUM_PROBES)` float64, without and
with the adapter's product."""
SECONDS = "seconds"
"""Tensor of a reply: seconds of (loading the global model, the task itself), `(2,)` float64. A tensor, so that a
reply's size tells no time."""

Version = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]
"""The version of a base, a SHA-256; empty where none was loaded."""
DType = Literal["float32", "float16", "bfloat16"]
Positive = Annotated[float, Meta(gt=0)]


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────────────────────


class ClientLora(Schema, frozen=True, kw_only=True):
    """What one client trains, for server and client to compare.

    Attributes:
        rank: Rank of its adapter.
        lora_alpha: Numerator of its scaling.
        target_modules: Names of its adapted modules; empty for PEFT's own choice.
        mixed: Whether the clients of the run have different ranks.
    """

    rank: PositiveCount
    lora_alpha: Positive
    target_modules: Annotated[list[Text], Meta(max_length=MAX_MODULES)]
    mixed: bool

    @classmethod
    def of(cls, lora: LoraConfig, mixed: bool) -> ClientLora:
        """Describe a client's own settings."""
        return cls(rank=lora.rank, lora_alpha=lora.lora_alpha, target_modules=list(lora.target_modules), mixed=mixed)


class FreshAdapter(Schema, frozen=True, kw_only=True):
    """The seed from which a client draws the round's adapter instead of downloading it.

    Attributes:
        seed: The run's seed.
        server_round: The round after which the adapter starts.
        dtype: What its factors are rounded to.
    """

    seed: Seed
    server_round: Count
    dtype: DType


class DescribeRequest(Schema, tag_field="kind", tag="describe", frozen=True, kw_only=True):
    """Say which base model, data and libraries are there.

    Attributes:
        adapter: Whether to send the fresh adapter too.
    """

    adapter: bool


class ModelRequest(Schema, frozen=True, kw_only=True):
    """What tasks on a global model have in common.

    Attributes:
        manifest: The global model to load (`GlobalModel.manifest`), by content hash.
        lora: What this client trains of it.
        chat_date: The date that chat templates take for today's; the client's must be the same.
        fresh: How to draw the adapter, where it is not sent.
        recipes: How to make the snapshots that are not sent, oldest first.
    """

    manifest: Manifest
    lora: ClientLora
    chat_date: Annotated[str, Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")] = DEFAULT_DATE
    fresh: FreshAdapter | None = None
    recipes: Annotated[list[Recipe], Meta(max_length=MAX_RECIPES)] = []


class TrainRequest(ModelRequest, tag_field="kind", tag="train", frozen=True, kw_only=True):
    """Train the adapter on the client's data.

    Attributes:
        learning_rate: Of the optimizer.
        local_steps: Optimizer steps; exactly one of this and `local_epochs` is given.
        local_epochs: Passes over the data.
        batch_size: Examples in a batch.
        arguments: Further fields of `transformers.TrainingArguments`.
        seed: Of the order of examples and of dropout.
        probe_seed: Of the probes of the trained weights.
        uplink_dtype: What the factors travel in.
    """

    learning_rate: Positive
    local_steps: PositiveCount | None
    local_epochs: Positive | None
    batch_size: PositiveCount
    arguments: dict[str, Any]
    seed: Seed
    probe_seed: Seed
    uplink_dtype: DType


class EvaluateRequest(ModelRequest, tag_field="kind", tag="evaluate", frozen=True, kw_only=True):
    """Score the model on the client's held-out examples.

    Attributes:
        num_examples: How many at most.
        num_compared: The first of them, which every evaluation of the run has in common.
        batch_size: Examples in a batch.
        probe_seed: Of the probes of the loaded weights; None to take none.
    """

    num_examples: Count
    num_compared: Count
    batch_size: PositiveCount
    probe_seed: Seed | None


Request = DescribeRequest | TrainRequest | EvaluateRequest


class _TaskHead(Schema, frozen=True, kw_only=True):
    protocol: int
    run_id: Label
    client_id: Label
    server_round: Count
    request: Request


@dataclass(frozen=True)
class Task:
    """What the server asks of one client in one round.

    Attributes:
        run_id: Which run; a reply names it, and counts for no other.
        client_id: Which client.
        server_round: From 1; 0 before the first round.
        request: What to do.
        objects: Hash to bytes of the objects that the client has not got.
    """

    run_id: str
    client_id: str
    server_round: int
    request: Request
    objects: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`describe`, `train` or `evaluate`."""
        return kind_of(self.request)


# ── replies ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Description(Schema, tag_field="kind", tag="describe", frozen=True, kw_only=True):
    """What a client has: the answer to a `DescribeRequest`.

    Attributes:
        sha256: Content hash of its base model.
        tokenizer_sha256: Content hash of its tokenizer and chat template.
        num_parameters: Of the base model.
        num_train: Training examples.
        num_test: Held-out examples.
        threads: CPU threads that it computes with.
        dtype: Of its base model in memory.
        versions: Package to version.
        adapter_config: The PEFT configuration of the fresh adapter.
        scalings: Module to `lora_alpha / rank`.
        shapes: Module to `(out, in)`.
        saved_shapes: Tensor of `modules_to_save` to its shape.
    """

    sha256: Hash
    tokenizer_sha256: Hash
    num_parameters: Count
    num_train: Count
    num_test: Count
    threads: Count
    dtype: Label
    versions: Annotated[dict[Label, Label], Meta(max_length=32)]
    adapter_config: dict[str, Any]
    scalings: Annotated[dict[ModulePath, Positive], Meta(max_length=MAX_MODULES)]
    shapes: Annotated[dict[ModulePath, tuple[PositiveCount, PositiveCount]], Meta(max_length=MAX_MODULES)]
    saved_shapes: Annotated[
        dict[ModulePath, Annotated[list[PositiveCount], Meta(max_length=8)]], Meta(max_length=MAX_MODULES)
    ]


class TrainResult(Schema, tag_field="kind", tag="train", frozen=True, kw_only=True):
    """How training went.

    Attributes:
        loss: Mean loss of a completion token, in nats.
        first_loss: Of the first step.
        last_loss: Of the last step.
        num_steps: Optimizer steps.
        num_tokens: Completion tokens that the loss was taken on.
        rounding: What the wire's dtype took from the update, relative to it.
        next_rank: The rank at which the client continues, for methods that prune.
    """

    loss: float
    first_loss: float
    last_loss: float
    num_steps: Count
    num_tokens: Count
    rounding: Size
    next_rank: PositiveCount | None = None


class ScoreSums(Schema, frozen=True, kw_only=True):
    """Sums over a group of held-out examples, so that groups and clients add up.

    Attributes:
        nll: Negative log-likelihood of the completion tokens, in nats.
        num_tokens: Completion tokens.
        num_examples: Examples.
        num_exact: Examples answered word for word.
    """

    nll: Size
    num_tokens: Count
    num_examples: Count
    num_exact: Count


class EvaluateResult(Schema, tag_field="kind", tag="evaluate", frozen=True, kw_only=True):
    """How the model scored.

    Attributes:
        applied_share: Fraction of what was merged that is in the live weights; None where it was not measured.
        compared: Over the examples that every evaluation has in common; None where the client holds out nothing.
        total: Over all examples.
        by_category: Over each category's.
    """

    applied_share: float | None = None
    compared: ScoreSums | None = None
    total: ScoreSums | None = None
    by_category: Annotated[dict[Label, ScoreSums], Meta(max_length=MAX_CATEGORIES)] = {}


class MissingObjects(Schema, tag_field="kind", tag="missing", frozen=True, kw_only=True):
    """The task cannot be done: the server believed that the client has these objects, and it has not.

    Attributes:
        missing: Hashes, to be sent with the task once more.
    """

    missing: Annotated[list[Hash], Meta(min_length=1, max_length=MAX_OBJECTS)]


Answer = Description | TrainResult | EvaluateResult | MissingObjects


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


@dataclass(frozen=True)
class Reply:
    """What a client answers.

    Attributes:
        run_id: The task's.
        client_id: Who answers.
        server_round: The task's.
        version: The version of the base that the client ended with; empty where it loaded none.
        holds: Hashes of the objects that the client now has, of those the manifest named.
        num_examples: How many examples stand behind the answer; its weight.
        split: A hash of how the client's examples are divided into those trained on and those held out. It must not
            change during a run: scores would be taken on examples that were trained on.
        answer: What came of the task.
        tensors: The trained adapter, the fresh adapter, or the probes.
    """

    run_id: str
    client_id: str
    server_round: int
    version: str
    holds: list[str]
    num_examples: int
    split: str
    answer: Answer
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    HEAD: ClassVar[tuple[str, ...]] = (
        "run_id",
        "client_id",
        "server_round",
        "version",
        "holds",
        "num_examples",
        "split",
        "answer",
    )

    @property
    def kind(self) -> str:
        """`describe`, `train`, `evaluate` or `missing`."""
        return kind_of(self.answer)


def kind_of(message: Schema) -> str:
    """Return the tag of a request or an answer."""
    return str(type(message).__struct_config__.tag)


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def encode_task(task: Task) -> bytes:
    """Encode a task; objects travel as tensors of uint8 under their hashes."""
    head = _TaskHead(
        protocol=PROTOCOL,
        run_id=task.run_id,
        client_id=task.client_id,
        server_round=task.server_round,
        request=task.request,
    )
    tensors = {name: tensor_of(data) for name, data in task.objects.items()}
    return safetensors_bytes(tensors, ("task", canonical_json(msgspec.to_builtins(head))))


def decode_task(data: bytes) -> Task:
    """Decode a task.

    Raises:
        PayloadError: If the bytes are no task of this protocol.
    """
    tensors, head = _open(data, "task", _TaskHead, "a task")
    objects = {}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.uint8 or tensor.ndim != 1:
            raise PayloadError(f"a task: object {name[:64]!r} is {tensor.dtype} {tuple(tensor.shape)}; wanted bytes")
        objects[name] = tensor.numpy().tobytes()
    request = head.request
    if not isinstance(request, DescribeRequest):
        if isinstance(request, TrainRequest):
            check_free_form(request.arguments, "a task: its training arguments")
            if (request.local_steps is None) == (request.local_epochs is None):
                raise PayloadError("a task: exactly one of local_steps and local_epochs must be given")
    return Task(head.run_id, head.client_id, head.server_round, request, objects)


def encode_reply(reply: Reply) -> bytes:
    """Encode a reply."""
    head = _ReplyHead(protocol=PROTOCOL, **{name: getattr(reply, name) for name in Reply.HEAD})
    return safetensors_bytes(reply.tensors, ("reply", canonical_json(msgspec.to_builtins(head))))


def decode_reply(data: bytes, task: Task, max_bytes: int) -> Reply:
    """Decode the reply to a task.

    Args:
        data: What came.
        task: What was asked.
        max_bytes: The largest reply that can be right.

    Raises:
        PayloadError: If there are more than `max_bytes`, or if the bytes are no reply, the reply to another task, or
            do not fit its records; the message says what came and what was wanted.
    """
    name = f"client {task.client_id}"
    if len(data) > max_bytes:
        raise PayloadError(f"{name}: the reply has {len(data)} bytes; at most {max_bytes} were expected")
    tensors, head = _open(data, "reply", _ReplyHead, name)
    for key in ("run_id", "client_id", "server_round"):
        got = getattr(head, key)
        wanted = getattr(task, key)
        if got != wanted:
            raise PayloadError(f"{name}: the reply is for {key} {got!r}; asked was {wanted!r}")
    kind = kind_of(head.answer)
    if kind != task.kind and not (kind == "missing" and task.kind != "describe"):
        raise PayloadError(f"{name}: the reply is for kind {kind!r}; asked was {task.kind!r}")
    if isinstance(head.answer, Description):
        check_free_form(head.answer.adapter_config, f"{name}: its adapter_config")
    return Reply(**{key: getattr(head, key) for key in Reply.HEAD}, tensors=tensors)


class _ProtocolOnly(msgspec.Struct):
    """Only the protocol's number, of a message of any version."""

    protocol: int


def _open(data: bytes, key: str, kind: Any, name: str) -> tuple[dict[str, Tensor], Any]:
    tensors, metadata = read_safetensors(data, name)
    text = metadata.get(key)
    if not isinstance(text, str) or len(metadata) != 1:
        raise PayloadError(f"{name}: the bytes hold no {key}")
    version = parse_json(text, _ProtocolOnly, name)
    if version.protocol != PROTOCOL:
        raise PayloadError(
            f"{name}: protocol version {min(abs(version.protocol), MAX_COUNT)}; wanted {PROTOCOL}. Use one fedmomentum "
            "everywhere"
        )
    return tensors, parse_json(text, kind, name)
