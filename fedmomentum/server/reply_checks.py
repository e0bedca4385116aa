"""Checks of a client's reply beyond its schema: tensors, magnitudes, totals."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmomentum.errors import AdapterError, FedMomentumError, PayloadError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.probes import NUM_PROBES
from fedmomentum.lora.adapter import Adapter, to_tensors
from fedmomentum.protocol.messages import (
    BASE_PROBES,
    EFFECTIVE_PROBES,
    SECONDS,
    EvaluateResult,
    Reply,
    TrainResult,
)
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.aggregation.aggregate import AggregationResult
    from fedmomentum.formats.scores import Score
    from fedmomentum.linalg.matrix import Matrix


MAX_LOSS = 1e6
"""The largest accepted loss, in nats per token. A uniform guess over a million words costs 14."""
MAX_ROUNDING = 1e6
"""The largest accepted rounding error of an update, relative to its norm. It exceeds 1 only where
the update is far smaller than what it was added to."""
MAX_EXAMPLE_TOKENS = 10**8
"""The most accepted tokens of a held-out example: far more than any model's context. Summed over
as many clients and examples as there can be, counts stay exact."""
MAX_ELEMENT = 1e4
"""The largest number accepted in a factor or a tensor trained in full. Weights of language models
are below 100, factors of trained adapters below 10; products of a thousand of the largest numbers
are far below the maximum of float32."""
MAX_PROBE = 1e12
"""The largest probe: a bilinear form of Gaussian vectors has about the matrix's Frobenius norm."""
MAX_SECONDS = 1e9
"""The longest accepted time: thirty years."""
DIVERGED = "Its training diverged: lower the learning rate, or set max_grad_norm"
"""The usual cause of numbers that are too large, and what to do."""


def check_measurements(tensors: Mapping[str, Tensor], num_modules: int, name: str) -> None:
    """Check a reply's probes and times.

    Args:
        tensors: The reply's tensors.
        num_modules: Number of probed modules; 0 if no probes were requested.
        name: The client, for the message.

    Raises:
        PayloadError: If one of them is missing, was not requested, or has a wrong dtype, shape or
            range.
    """
    wanted: dict[str, tuple[tuple[int, ...], float]] = {SECONDS: ((2,), MAX_SECONDS)}
    for key in (BASE_PROBES, EFFECTIVE_PROBES):
        if num_modules:
            wanted[key] = ((num_modules, NUM_PROBES), MAX_PROBE)
        elif key in tensors:
            raise PayloadError(f"{name}: tensor {key} was not requested")
    for key, (shape, largest) in wanted.items():
        values = tensors.get(key)
        size = " x ".join(map(str, shape))
        if values is None or values.dtype != torch.float64 or tuple(values.shape) != shape:
            got = "missing" if values is None else f"{values.dtype} {tuple(values.shape)}"
            raise PayloadError(f"{name}: {key} is {got}; wanted {size} numbers in float64")
        # Not `values.abs() > largest`, which would let NaN through.
        if not bool((values.abs() <= largest).all()):
            cause = f" {DIVERGED}" if key == EFFECTIVE_PROBES else ""
            raise PayloadError(
                f"{name}: {key} holds NaN, Inf or a number beyond {largest:g}; wanted {size} "
                f"numbers.{cause}"
            )
    if bool((tensors[SECONDS] < 0).any()):
        raise PayloadError(f"{name}: {SECONDS} holds a time below 0")


def check_training(result: TrainResult, name: str) -> None:
    """Check the figures that a client reports of its training.

    Raises:
        PayloadError: If a loss is beyond `MAX_LOSS`, or the rounding error beyond `MAX_ROUNDING`.
    """
    if result.rounding > MAX_ROUNDING:
        raise PayloadError(
            f"{name}: its rounding error is {result.rounding:g} of the update; wanted at most "
            f"{MAX_ROUNDING:g}"
        )
    for key in ("loss", "first_loss", "last_loss"):
        value = getattr(result, key)
        if value is not None and abs(value) > MAX_LOSS:
            raise PayloadError(
                f"{name}: its {key} is {value:g}; wanted at most {MAX_LOSS:g} nats a token. "
                f"{DIVERGED}"
            )


def check_magnitude(update: Adapter) -> None:
    """Refuse an adapter with implausibly large numbers, which would swamp all other updates.

    Raises:
        AdapterError: If a number exceeds `MAX_ELEMENT`; the message names client and tensor.
    """
    for key, tensor in to_tensors(update).items():
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not largest <= MAX_ELEMENT:
            raise AdapterError(
                f"{update.name}: tensor {key} holds a number of size {largest:.3g}; at most "
                f"{MAX_ELEMENT:g} is accepted. {DIVERGED}"
            )


def check_evaluation(
    reply: Reply,
    num_examples: int,
    num_modules: int,
    *,
    of_pairs: bool = False,
    labels: Collection[str] = (),
) -> None:
    """Check an evaluation: that its scores are plausible and consistent, and its probes valid.

    Args:
        reply: The client's reply to an `EvaluateRequest`.
        num_examples: The maximum number of examples requested.
        num_modules: Number of probed modules; 0 if no probes were requested.
        of_pairs: Whether the run compares pairs of answers.
        labels: The labels of a classifier.

    Raises:
        PayloadError: If the figures do not add up, or the probes are invalid.
    """
    name = f"client {reply.client_id}"
    result = reply.answer
    assert isinstance(result, EvaluateResult)  # the answer to a request to evaluate
    # The tensors: only what was requested.
    check_measurements(reply.tensors, num_modules, name)
    if extra := sorted(reply.tensors.keys() - {SECONDS, BASE_PROBES, EFFECTIVE_PROBES}):
        raise PayloadError(f"{name}: tensor {extra[0]!r} was not requested")
    share = result.applied_share
    if share is not None and abs(share) > MAX_LOSS:
        raise PayloadError(f"{name}: its applied_share is {share:g}; wanted a fraction")
    total, compared = result.total, result.compared
    # A client without held-out examples sends no scores at all.
    if total is None or compared is None:
        if total is not None or compared is not None or result.by_category:
            raise PayloadError(
                f"{name}: its evaluation has some of total, compared and by_category; wanted all "
                "or none"
            )
        return
    # Each score by itself, then the scores against one another and against the request.
    for score in (total, compared, *result.by_category.values()):
        _check_score(score, name)
        _check_margin(score, name, of_pairs=of_pairs)
    for score in (total, compared):
        _check_labels(score, labels, name)
    if total.num_examples != reply.num_examples:
        raise PayloadError(
            f"{name}: a score over {total.num_examples} of {reply.num_examples} examples"
        )
    if total.num_examples > num_examples:
        raise PayloadError(
            f"{name}: a score over {total.num_examples} examples; at most {num_examples} were "
            "requested"
        )
    _check_categories(result, total, name)
    for key in ("num_examples", "num_exact", "num_tokens"):
        if getattr(compared, key) > getattr(total, key):
            raise PayloadError(
                f"{name}: {key} is {getattr(compared, key)} in the compared examples and "
                f"{getattr(total, key)} in all"
            )


def _check_categories(result: EvaluateResult, total: Score, name: str) -> None:
    """Refuse categories without examples, of which there could be any number, and other sums."""
    empty = sorted(key for key, score in result.by_category.items() if not score.num_examples)
    if empty:
        raise PayloadError(f"{name}: its category {printable(empty[0], 80)} has no examples")
    if sum(score.num_examples for score in result.by_category.values()) != total.num_examples:
        raise PayloadError(f"{name}: the categories of its evaluation do not add up to its total")


def _check_score(score: Score, name: str) -> None:
    """Refuse a score whose counts or likelihood are impossible."""
    if score.num_exact > score.num_examples:
        raise PayloadError(
            f"{name}: {score.num_exact} exact matches of {score.num_examples} examples"
        )
    if score.num_examples > score.num_tokens:
        raise PayloadError(
            f"{name}: {score.num_tokens} tokens in {score.num_examples} examples; each has one at "
            "least"
        )
    if score.num_tokens > MAX_EXAMPLE_TOKENS * score.num_examples:
        raise PayloadError(
            f"{name}: {score.num_tokens} tokens in {score.num_examples} examples; each has "
            f"{MAX_EXAMPLE_TOKENS} at most"
        )
    if score.nll > MAX_LOSS * score.num_tokens:
        raise PayloadError(
            f"{name}: nll is {score.nll:g} over {score.num_tokens} tokens; that is no likelihood"
        )


def _check_margin(score: Score, name: str, *, of_pairs: bool) -> None:
    """Refuse a score of pairs in a run without pairs, or the reverse, and impossible margins."""
    if not score.num_examples:
        return
    if score.is_of_pairs != of_pairs:
        got, wanted = ("a", "none") if score.is_of_pairs else ("no", "one")
        raise PayloadError(f"{name}: its score has {got} margin between answers; wanted {wanted}")
    if score.margin is None:
        return
    if score.num_tokens != score.num_examples:
        raise PayloadError(
            f"{name}: {score.num_tokens} targets in {score.num_examples} pairs; each has one"
        )
    if abs(score.margin) > MAX_LOSS * score.num_examples:
        raise PayloadError(
            f"{name}: the margins of {score.num_examples} pairs sum to {score.margin:g}; no "
            "likelihoods differ so much"
        )


def _check_labels(score: Score, labels: Collection[str], name: str) -> None:
    """Refuse counts by label that are missing, not requested, or of unknown labels."""
    if bool(score.by_label) != bool(labels and score.num_examples):
        wanted = "counts for each label" if labels else "none: this run trains no classifier"
        raise PayloadError(
            f"{name}: its score has {len(score.by_label)} counts by label; wanted {wanted}"
        )
    unknown = sorted(score.by_label.keys() - set(labels))
    if unknown:
        raise PayloadError(
            f"{name}: its score counts the label {unknown[0]!r}, which is none of the run's "
            f"{len(labels)} labels"
        )


def check_aggregate(result: AggregationResult, server_round: int) -> None:
    """Refuse an aggregate with a non-finite number, before any of it is kept.

    Raises:
        FedMomentumError: If there is one; the message names the module or tensor.
    """
    for module, matrix in result.adapter.modules.items():
        for part in (matrix, result.residual.get(module), result.carried.get(module)):
            if part is not None and not is_finite(part):
                raise FedMomentumError(
                    f"round {server_round}: the sum of module {module} holds NaN or Inf, though "
                    "every update was finite; nothing of this round is kept. Lower "
                    "federation.outlier-norm-ratio or the learning rate, and resume"
                )
    for key, tensor in result.adapter.saved.items():
        if not bool(torch.isfinite(tensor).all()):
            raise FedMomentumError(
                f"round {server_round}: the mean of {key} holds NaN or Inf; nothing is kept"
            )


def is_finite(matrix: Matrix) -> bool:
    """Return whether a matrix, factored or dense, has finite elements and a finite norm."""
    tensors = (matrix.B, matrix.A) if isinstance(matrix, LowRank) else (matrix,)
    sizes = [float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors]
    # The product of the norms bounds the product's elements: if it is below the maximum of float32,
    # all of them are finite.
    return math.isfinite(math.prod(sizes)) and math.prod(sizes) < torch.finfo(torch.float32).max


def check_ready(reply: Reply) -> None:
    """Refuse a reply with tensors that should have stayed with the client.

    Raises:
        PayloadError: If it holds a tensor.
    """
    if reply.tensors:
        raise PayloadError(
            f"client {reply.client_id}: tensor {min(reply.tensors)[:200]!r} was not requested; "
            "updates are summed under masks"
        )
