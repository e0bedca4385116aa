"""What the steps of a round pass to one another: its requests, updates and their aggregate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmomentum.aggregation.weights import capped_weights
from fedmomentum.objectives.choice import make_objective
from fedmomentum.protocol.adapter_terms import ClientLora
from fedmomentum.protocol.messages import EvaluateRequest, TrainRequest
from fedmomentum.protocol.private_messages import PrivateTerms
from fedmomentum.utils.seeding import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from fedmomentum.aggregation.aggregate import AggregationResult
    from fedmomentum.config.schema import Config
    from fedmomentum.config.training import LocalTraining
    from fedmomentum.formats.manifest import Manifest
    from fedmomentum.formats.round_record import ScreeningRecord
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.server.replies import Replies
    from fedmomentum.server.round_sums import SummedRound


@dataclass(frozen=True)
class UploadedMoments:
    """The optimizer moments that one client sent.

    Attributes:
        tensors: The checked tensors, read from disk on access.
        num_steps: The client's number of steps in the round.
        learning_rate_sum: The sum of the learning rates of these steps.
    """

    tensors: Mapping[str, Tensor]
    num_steps: int
    learning_rate_sum: float


@dataclass(frozen=True)
class TrainedRound:
    """The usable updates of a round's clients.

    Attributes:
        replies: The outcome of the request to train.
        updates: Client to its update, sorted by name; read from disk on access.
        ranks: Client to the rank at which it trained.
        learning_rate: The round's.
        factors: The factors that were trained, `BA`, `B` or `A`.
        screening: How far each client went.
        moments: Client to the optimizer moments that it sent; empty if none are shared.
        summed: The outcome of the masked sums, if the updates are stand-ins for the clients'.
    """

    replies: Replies
    updates: Mapping[str, Adapter]
    ranks: Mapping[str, int]
    learning_rate: float
    factors: str
    screening: Mapping[str, ScreeningRecord]
    moments: Mapping[str, UploadedMoments]
    summed: SummedRound | None = None

    @property
    def accepted(self) -> list[str]:
        """The clients whose updates are used, sorted."""
        return list(self.updates) if self.summed is None else self.summed.clients

    @property
    def num_examples(self) -> dict[str, int]:
        """Client to its number of training examples; empty if the server does not know them."""
        if self.summed is not None:
            return {}
        return {client: self.replies.replies[client].num_examples for client in self.updates}

    def weights(self, max_weight: float) -> dict[str, float]:
        """Return the weights of the updates, capped at `max_weight`."""
        if self.summed is not None:
            return self.summed.weights
        return capped_weights(self.num_examples, max_weight)


@dataclass(frozen=True)
class AggregatedRound:
    """The aggregate of a round's updates.

    Attributes:
        weights: Client to the weight that the method used; they sum to 1.
        result: Adapter, residual and carried part of the sum.
    """

    weights: dict[str, float]
    result: AggregationResult


def train_request(
    config: Config,
    server_round: int,
    client: str,
    hyperparameters: LocalTraining,
    lora: ClientLora,
    manifest: Manifest,
    moments: str | None = None,
) -> TrainRequest:
    """Return what a client is asked to train in a round.

    Args:
        config: The run's settings.
        server_round: The round.
        client: The client.
        hyperparameters: The hyperparameters of the round.
        lora: What the client trains.
        manifest: The global model.
        moments: Hash of the optimizer's moments to start with; None for zeros.
    """
    dp = config.privacy.dp
    return TrainRequest(
        manifest=manifest,
        lora=lora,
        chat_date=config.model.chat_date,
        objective=make_objective(config.training, manifest.base.labels).settings,
        learning_rate=hyperparameters.learning_rate,
        local_steps=hyperparameters.local_steps,
        local_epochs=hyperparameters.local_epochs,
        batch_size=hyperparameters.batch_size,
        arguments=dict(hyperparameters.arguments),
        seed=derive_seed(config.run.seed, "batches", server_round, client),
        probe_seed=probe_seed(config, server_round),
        uplink_dtype=config.federation.uplink_dtype,  # type: ignore[arg-type]
        optimizer_state=config.training.optimizer_state,  # type: ignore[arg-type]
        moments=moments,
        private=None if dp is None else PrivateTerms.of(dp, config.federation.num_rounds),
    )


def evaluate_request(
    config: Config,
    lora: ClientLora,
    manifest: Manifest,
    num_examples: int,
    seed: int | None,
    means: str | None = None,
) -> EvaluateRequest:
    """Return what a client is asked to evaluate in a round.

    Args:
        config: The run's settings.
        lora: What the client trains.
        manifest: The global model.
        num_examples: The maximum number of examples.
        seed: The seed of the probes; None for no probes.
        means: Hash of the outcome of the round's first sum, if the client keeps it.
    """
    return EvaluateRequest(
        manifest=manifest,
        lora=lora,
        chat_date=config.model.chat_date,
        objective=make_objective(config.training, manifest.base.labels).settings,
        num_examples=num_examples,
        num_compared=config.evaluation.num_examples,
        batch_size=config.evaluation.batch_size,
        probe_seed=seed,
        is_secure=config.privacy.secure_aggregation,
        means=means,
    )


def probe_seed(config: Config, server_round: int) -> int | None:
    """Return the seed of a round's probes, used in its training and the evaluation that follows.

    None if the run measures none, as with masked sums, since probes reveal single updates.
    """
    if not config.evaluation.probes or config.privacy.secure_aggregation:
        return None
    return derive_seed(config.run.seed, "probe", server_round)
