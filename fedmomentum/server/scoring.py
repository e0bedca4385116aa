"""Pool the clients' scores, and measure whether the round's sum reached their weights exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmomentum.formats.round_record import EvaluationRecord
from fedmomentum.formats.scores import NO_EXAMPLES, Score
from fedmomentum.linalg.probes import probe, probe_vectors, relative_rms
from fedmomentum.protocol.messages import BASE_PROBES, EFFECTIVE_PROBES, EvaluateResult, Reply
from fedmomentum.server.replies import Replies

if TYPE_CHECKING:
    from fedmomentum.global_model.model import GlobalModel


@dataclass(frozen=True)
class ExpectedProbes:
    """What the clients must measure if the aggregation was exact.

    Attributes:
        effective: `(modules, probes)`: u^T W x of the weights that an exact aggregation gives.
        change: `(modules, probes)`: The same for the clients' mean change, to scale errors by.
    """

    effective: Tensor
    change: Tensor


@dataclass(frozen=True)
class RoundEvaluation:
    """What the evaluating clients found together.

    Attributes:
        replies: The outcome of the request to evaluate.
        scores: Their scores; None if nobody has held-out examples.
        exactness_error: The largest relative error of the effective weights; see docs/metrics.md.
        applied_share: The smallest fraction of the merged part that is on the weights.
    """

    replies: Replies = field(default_factory=Replies)
    scores: EvaluationRecord | None = None
    exactness_error: float | None = None
    applied_share: float | None = None


def expected_probes(
    replies: Mapping[str, Reply],
    weights: Mapping[str, float],
    model: GlobalModel,
    next_model: GlobalModel,
    seed: int,
) -> ExpectedProbes:
    """Return the weighted mean of what the clients measured on their own trained weights.

    What the previous model carried is added, and what the next one carries is subtracted.

    Args:
        replies: Client to its reply to the request to train.
        weights: Client to its weight.
        model: The model that the clients trained.
        next_model: The model that came out.
        seed: Seed of the round's probe vectors.
    """
    num_modules = len(next_model.adapter.modules)
    shape = replies[next(iter(weights))].tensors[EFFECTIVE_PROBES].shape
    assert shape[0] == num_modules
    effective = torch.zeros(shape, dtype=torch.float64)
    base = torch.zeros(shape, dtype=torch.float64)
    for client, weight in weights.items():
        effective = effective + weight * replies[client].tensors[EFFECTIVE_PROBES]
        base = base + weight * replies[client].tensors[BASE_PROBES]
    change = effective - base
    # What was carried into the round belongs to the sum; what is carried on is not applied yet.
    for row, module in enumerate(sorted(next_model.adapter.modules)):
        for carrying_model, sign in ((model, 1.0), (next_model, -1.0)):
            if module not in carrying_model.carried:
                continue
            shape_of_module = next_model.adapter.modules[module].shape
            U, X = probe_vectors(module, shape_of_module, seed)
            effective[row] += sign * probe(carrying_model.carried[module], U, X)
    return ExpectedProbes(effective, change)


def pool_scores(replies: Replies, expected: ExpectedProbes | None) -> RoundEvaluation:
    """Add up the clients' scores, and compare their probes with those of an exact round.

    Args:
        replies: The outcome of the request to evaluate.
        expected: What the probes must be; None if there is no single model to compare with.
    """
    by_client: dict[str, Score] = {}
    by_category: dict[str, Score] = {}
    total = NO_EXAMPLES
    compared = NO_EXAMPLES
    errors = []
    shares = []
    for client, reply in sorted(replies.replies.items()):
        result = reply.answer
        assert isinstance(result, EvaluateResult)  # the codec checks that it answers the request
        if result.total is not None and result.compared is not None:
            by_client[client] = result.total
            total = total + result.total
            compared = compared + result.compared
            for name, score in result.by_category.items():
                by_category[name] = by_category.get(name, NO_EXAMPLES) + score
        if result.applied_share is not None:
            shares.append(result.applied_share)
        if expected is not None:
            difference = reply.tensors[EFFECTIVE_PROBES] - expected.effective
            errors.append(relative_rms({"": difference}, {"": expected.change}))

    scores = None
    if total.num_examples:
        scores = EvaluationRecord(
            total=total,
            compared=compared,
            by_client=by_client,
            by_category=dict(sorted(by_category.items())),
        )
    # Infinite if no change was expected but one was measured; JSON has no number for that.
    error = max(errors, default=math.inf)
    return RoundEvaluation(
        replies, scores, error if math.isfinite(error) else None, min(shares) if shares else None
    )
