"""The types of the messages between server and clients.

A payload is a safetensors file: the tensors, and one JSON text in its metadata. Every transport
carries the same bytes. Nothing in a payload is trusted: the JSON is decoded directly into the types
below, and anything that does not fit is refused with an error that names client and field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta
from torch import Tensor

from fedmomentum.config.training import LocalTraining
from fedmomentum.formats.manifest import MAX_RECIPES, Manifest, Quantization, Recipe
from fedmomentum.formats.scores import Score
from fedmomentum.protocol.adapter_terms import (
    MAX_MODULES,
    ClientLora,
    DType,
    FreshAdapter,
    Positive,
)
from fedmomentum.protocol.private_messages import PrivateTerms
from fedmomentum.protocol.secure_messages import Ready, SecureTerms, SumAnswer, SumRequest
from fedmomentum.utils.chat_date import DEFAULT_DATE
from fedmomentum.utils.schema import (
    MAX_LABELS,
    Count,
    Hash,
    Label,
    ModulePath,
    PositiveCount,
    Schema,
    Seed,
    Size,
    Text,
)

PROTOCOL = 6
# The largest number of objects that a reply may name.
MAX_OBJECTS = 100_000
# The largest number of categories in a client's scores.
MAX_CATEGORIES = 10_000

# Tensors in a reply, `(num_modules, NUM_PROBES)` float64: probes of the client's live weights,
# without and with the adapter's product.
BASE_PROBES = "probe.base"
EFFECTIVE_PROBES = "probe.effective"
# Tensor in a reply, `(2,)` float64: seconds for loading the global model and for the work itself.
# It is a tensor so that a reply's size does not depend on the times.
SECONDS = "seconds"
MEASUREMENTS = (BASE_PROBES, EFFECTIVE_PROBES, SECONDS)
"""The small tensors in a reply, besides its factors."""
# The name prefix of a reply's tensors that describe optimizer moments.
OPTIMIZER = "optimizer."

# The version of a base, a SHA-256; empty if none was loaded.
Version = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]
OptimizerState = Literal["fresh", "shared", "shared-full", "local"]


# ── tasks ─────────────────────────────────────────────────────────────────────────────────────────


class DescribeRequest(Schema, tag_field="kind", tag="describe", frozen=True, kw_only=True):
    """Describe the client's base model, data and libraries.

    Attributes:
        adapter: Whether to send the initial adapter, too.
        is_secure: Whether the run uses masked sums, so that numbers of examples are withheld.
    """

    adapter: bool
    is_secure: bool = False


class ModelRequest(Schema, frozen=True, kw_only=True):
    """The common part of all requests that use a global model.

    Attributes:
        manifest: The global model to load (`GlobalModel.manifest`), by content hash.
        lora: The adapter that this client trains.
        chat_date: The date that chat templates use as today's; the client must use the same.
        objective: What is learned (`Objective.settings`); the client must have the same.
        fresh: How to initialize the adapter if it is not sent.
        recipes: How to make snapshots that are not sent, oldest first.
    """

    manifest: Manifest
    lora: ClientLora
    chat_date: Annotated[str, Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")] = DEFAULT_DATE
    objective: Text = "objective = sft, loss-on = last"
    fresh: FreshAdapter | None = None
    recipes: Annotated[list[Recipe], Meta(max_length=MAX_RECIPES)] = []

    @property
    def needed(self) -> frozenset[str]:
        """Hashes of the objects that the client needs for it."""
        return self.manifest.needed


class TrainRequest(ModelRequest, tag_field="kind", tag="train", frozen=True, kw_only=True):
    """Train the adapter on the client's data.

    Attributes:
        learning_rate: The optimizer's learning rate.
        local_steps: The number of optimizer steps; exactly one of this and `local_epochs` is given.
        local_epochs: The number of passes over the data.
        batch_size: The number of examples in a batch.
        arguments: Further fields of `transformers.TrainingArguments`.
        seed: The seed for the order of examples and for dropout.
        probe_seed: The seed for probing the trained weights; None for no probes.
        uplink_dtype: The dtype in which the factors are sent.
        optimizer_state: What the optimizer starts with, and which part of its final state is sent.
        moments: The moments to start with (`SharedMoments`), by content hash; None for zeros.
        secure: How the update is summed under masks; None if the reply contains it.
        private: The terms of differentially private training; None if it is not private.
    """

    learning_rate: Positive
    local_steps: PositiveCount | None
    local_epochs: Positive | None
    batch_size: PositiveCount
    arguments: dict[str, Any]
    seed: Seed
    probe_seed: Seed | None
    uplink_dtype: DType
    optimizer_state: OptimizerState
    moments: Hash | None = None
    secure: SecureTerms | None = None
    private: PrivateTerms | None = None

    @property
    def needed(self) -> frozenset[str]:
        """Hashes of the objects that the client needs for it."""
        needed = set(self.manifest.needed)
        if self.moments:
            needed.add(self.moments)
        if self.secure is not None and self.secure.outcome is not None:
            needed.add(self.secure.outcome.means)
        return frozenset(needed)

    @property
    def is_secure(self) -> bool:
        """Whether the result stays with the client, for the round's sums."""
        return self.secure is not None

    @property
    def hyperparameters(self) -> LocalTraining:
        """The hyperparameters of the local training."""
        return LocalTraining(
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            local_steps=self.local_steps,
            local_epochs=self.local_epochs,
            arguments=self.arguments,
        )


class EvaluateRequest(ModelRequest, tag_field="kind", tag="evaluate", frozen=True, kw_only=True):
    """Score the model on the client's held-out examples.

    Attributes:
        num_examples: The maximum number of examples.
        num_compared: How many of the first of them are shared by all evaluations of the run.
        batch_size: The number of examples in a batch.
        probe_seed: The seed for probing the loaded weights; None for no probes.
        is_secure: Whether the scores stay with the client, for the round's sums.
        means: Hash of the outcome of the round's first sum, which the client keeps; None if the
            client will not need it.
    """

    num_examples: Count
    num_compared: Count
    batch_size: PositiveCount
    probe_seed: Seed | None
    is_secure: bool = False
    means: Hash | None = None

    @property
    def needed(self) -> frozenset[str]:
        """Hashes of the objects that the client needs for it."""
        return self.manifest.needed | ({self.means} if self.means else set())


Request = DescribeRequest | TrainRequest | EvaluateRequest | SumRequest


@dataclass(frozen=True)
class Task:
    """What the server asks one client to do in one round.

    Attributes:
        run_id: The run; a reply names it, and is valid for no other.
        client_id: The client.
        server_round: The round, from 1; 0 before the first.
        request: What to do.
        objects: The bytes of the objects that the client does not have, by hash.
    """

    run_id: str
    client_id: str
    server_round: int
    request: Request
    objects: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of the request: `describe`, `train`, `evaluate` or `sum`."""
        return kind_of(self.request)

    @property
    def answer_kind(self) -> str:
        """The kind of the answer if the task can be done."""
        request = self.request
        if isinstance(request, TrainRequest | EvaluateRequest) and request.is_secure:
            return kind_of(Ready())
        return self.kind


# ── replies ───────────────────────────────────────────────────────────────────────────────────────


class Description(Schema, tag_field="kind", tag="describe", frozen=True, kw_only=True):
    """What a client has: the answer to a `DescribeRequest`.

    Attributes:
        sha256: The content hash of its base model.
        tokenizer_sha256: The content hash of its tokenizer and chat template.
        labels: The labels of its classifier, in the order of its head; empty without one.
        quantization: How it quantized the base model's weights on loading; None if it did not.
        num_parameters: The number of parameters of the base model.
        num_train: The number of training examples; 0 if sums are masked; the public number of units
            if training is differentially private.
        num_test: The number of held-out examples, under the same rules as `num_train`.
        threads: The number of CPU threads.
        dtype: The dtype of its base model in memory.
        versions: Package to version.
        adapter_config: The PEFT configuration of the initial adapter.
        scalings: Module to `lora_alpha / rank`.
        shapes: Module to `(out, in)`.
        saved_shapes: Tensor of `modules_to_save` to its shape.
    """

    sha256: Hash
    tokenizer_sha256: Hash
    labels: Annotated[tuple[Label, ...], Meta(max_length=MAX_LABELS)] = ()
    quantization: Quantization | None = None
    num_parameters: Count
    num_train: Count
    num_test: Count
    threads: Count
    dtype: Label
    versions: Annotated[dict[Label, Label], Meta(max_length=32)]
    adapter_config: dict[str, Any]
    scalings: Annotated[dict[ModulePath, Positive], Meta(max_length=MAX_MODULES)]
    shapes: Annotated[
        dict[ModulePath, tuple[PositiveCount, PositiveCount]], Meta(max_length=MAX_MODULES)
    ]
    saved_shapes: Annotated[
        dict[ModulePath, Annotated[list[PositiveCount], Meta(max_length=8)]],
        Meta(max_length=MAX_MODULES),
    ]


class TrainResult(Schema, tag_field="kind", tag="train", frozen=True, kw_only=True):
    """The outcome of local training.

    Attributes:
        loss: The mean loss per target (a completion token, or a pair of answers), in nats. None if
            training is differentially private, like the other losses, since they carry no noise.
        first_loss: The loss of the first step.
        last_loss: The loss of the last step.
        num_steps: The number of optimizer steps.
        num_tokens: The number of targets in the loss; None if the losses are.
        rounding: The rounding error of the update in the wire dtype, relative to its norm.
        next_rank: The rank at which the client continues, for methods that prune.
        learning_rate_sum: The sum of the learning rates of all steps; 0 if moments are not shared.
    """

    loss: float | None
    first_loss: float | None
    last_loss: float | None
    num_steps: Count
    num_tokens: Count | None
    rounding: Size
    next_rank: PositiveCount | None = None
    learning_rate_sum: Size = 0.0


class EvaluateResult(Schema, tag_field="kind", tag="evaluate", frozen=True, kw_only=True):
    """The scores of an evaluation.

    Attributes:
        applied_share: The fraction of the merged update that the live weights contain; None if it
            was not measured.
        compared: The score on the examples that all evaluations share; None if the client has no
            held-out examples.
        total: The score on all examples.
        by_category: The score on each category.
    """

    applied_share: float | None = None
    compared: Score | None = None
    total: Score | None = None
    by_category: Annotated[dict[Label, Score], Meta(max_length=MAX_CATEGORIES)] = {}


class MissingObjects(Schema, tag_field="kind", tag="missing", frozen=True, kw_only=True):
    """The task cannot be done because the client lacks objects that the server believed it had.

    Attributes:
        missing: Their hashes; the server sends the task again, together with them.
    """

    missing: Annotated[list[Hash], Meta(min_length=1, max_length=MAX_OBJECTS)]


Answer = Description | TrainResult | EvaluateResult | MissingObjects | Ready | SumAnswer


@dataclass(frozen=True)
class Reply:
    """A client's reply to a task.

    Attributes:
        run_id: The run of the task.
        client_id: The client.
        server_round: The round of the task.
        version: The version of the base that the client ended with; empty if it loaded none.
        holds: Hashes of the manifest's objects that the client now has.
        num_examples: The number of examples behind the answer, which is its weight. With masked
            sums it is withheld (`WITHHELD_COUNT`), and so is `split`.
        split: A hash of how the client's examples are split into training and held-out ones. It
            must not change during a run, or the model would be scored on training examples.
        answer: The outcome of the task.
        tensors: The trained or initial adapter, probes, seconds, and any shared optimizer moments.
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
    """The fields that are sent as JSON."""

    @property
    def kind(self) -> str:
        """The kind of the answer: `describe`, `train`, `evaluate`, `missing`, `ready` or `sum`."""
        return kind_of(self.answer)


def kind_of(message: Schema) -> str:
    """Return the tag of a request or an answer."""
    return str(type(message).__struct_config__.tag)


def train_result(reply: Reply) -> TrainResult:
    """Return the answer to a request to train."""
    assert isinstance(reply.answer, TrainResult)  # the codec checks that it answers the request
    return reply.answer
