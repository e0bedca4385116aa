"""A round's row of metrics, assembled from the results of its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fedmomentum.formats.round_record import RoundRecord
from fedmomentum.lora.half_precision import rounding_error
from fedmomentum.server.round_metrics import (
    client_trainings,
    energies,
    joined_failures,
    mean_loss,
    sum_by_client,
    uplink_rounding,
)

if TYPE_CHECKING:
    from fedmomentum.errors import LostRoundError
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.server.round_data import AggregatedRound, TrainedRound
    from fedmomentum.server.scoring import RoundEvaluation

LOST_SUMS = "the sums of its round were lost, because too few clients were left to open them"
"""Why the update of a client that did its part is missing."""


def round_record(
    model: GlobalModel,
    clients: list[str],
    trained: TrainedRound,
    combined: AggregatedRound,
    evaluated: RoundEvaluation,
) -> RoundRecord:
    """Return a round's row of metrics, except for times and diagnostics.

    Figures on single clients are left out if the server only has sums over them.

    Args:
        model: The resulting model.
        clients: The clients that were asked to train.
        trained: Their usable updates.
        combined: The aggregate of the updates.
        evaluated: The clients' scores.
    """
    # The figures on single clients, or those that the sums of a secure round give.
    training = trained.replies
    weights = combined.weights if trained.summed is None else {}
    trainings = client_trainings(training.replies, weights, trained.ranks)
    # The figures on the aggregation, including the rounding of the adapter for clients.
    sum_energies = energies(combined.result, model)
    is_float32 = model.adapter_dtype == torch.float32
    rounding = 0.0 if is_float32 else rounding_error(combined.result.adapter, model.adapter)
    train_loss = None if trained.summed is None else trained.summed.train_loss
    uplink = None if trained.summed is None else trained.summed.rounding
    if weights:
        train_loss = mean_loss(trainings, weights)
        uplink = uplink_rounding(training.replies, weights)
    return RoundRecord(
        round=model.server_round,
        participants=clients,
        accepted=trained.accepted,
        failures=joined_failures(training.failures, evaluated.replies.failures),
        weights=weights,
        num_examples=trained.num_examples,
        learning_rate=trained.learning_rate,
        train_loss=train_loss,
        clients=trainings,
        screening=dict(trained.screening),
        evaluation=evaluated.scores,
        retained_energy=sum_energies.retained_energy,
        residual_rank=sum_energies.residual_rank,
        residual_norm=sum_energies.residual_norm,
        carried_norm=sum_energies.carried_norm,
        fallbacks=sum_energies.fallbacks,
        exactness_error=evaluated.exactness_error,
        applied_share=evaluated.applied_share,
        uplink_rounding=uplink,
        downlink_rounding=rounding,
        version=model.version,
        uplink_bytes=sum_by_client(training.uplink_bytes, evaluated.replies.uplink_bytes),
        downlink_bytes=sum_by_client(training.downlink_bytes, evaluated.replies.downlink_bytes),
    )


def base_record(model: GlobalModel, evaluated: RoundEvaluation) -> RoundRecord:
    """Return the row of round 0, except for times.

    Args:
        model: The model, which is the base model.
        evaluated: The clients' scores.
    """
    replies = evaluated.replies
    return RoundRecord(
        round=0,
        failures=dict(sorted(replies.failures.items())),
        evaluation=evaluated.scores,
        exactness_error=evaluated.exactness_error,
        applied_share=evaluated.applied_share,
        version=model.version,
        uplink_bytes=sum_by_client(replies.uplink_bytes, {}),
        downlink_bytes=sum_by_client(replies.downlink_bytes, {}),
    )


def unchanged_record(model: GlobalModel, clients: list[str], error: LostRoundError) -> RoundRecord:
    """Return the row of a round that changes nothing, because its sums are lost.

    Args:
        model: The model, as it was before.
        clients: The clients that were asked to train.
        error: Says which clients did not open the sums, and what was sent.
    """
    failures = dict.fromkeys(clients, LOST_SUMS) | error.failures
    return RoundRecord(
        round=model.server_round,
        participants=clients,
        failures=dict(sorted(failures.items())),
        version=model.version,
        uplink_bytes=dict(sorted(error.uplink_bytes.items())),
        downlink_bytes=dict(sorted(error.downlink_bytes.items())),
    )
