"""The messages of rounds whose updates are summed under masks.

A reply in such a round reveals nothing about its client: the results stay there, and the server
asks for sums of them. The parties' messages in a sum, `fedmomentum.secure_sum.messages`, are sent
as bytes.
"""

from __future__ import annotations

from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor

from fedmomentum.errors import PayloadError
from fedmomentum.formats.manifest import RoundOutcome
from fedmomentum.protocol.adapter_terms import Positive
from fedmomentum.utils.schema import Count, Hash, PositiveCount, Schema, Seed
from fedmomentum.utils.tensors import bytes_to_tensor

SUM_MESSAGE = "message"
"""The object in a task, and the tensor in a reply, that holds a message of a sum."""
WITHHELD_COUNT = 1
"""The number of examples in a reply if the server may not know the real one."""
WITHHELD_SPLIT = "0" * 64
"""The hash of the examples in such a reply; with the real one, guesses could be verified."""

FIRST_SUM = 1
SECOND_SUM = 2
SCORE_SUM = 3


class MomentTerms(Schema, frozen=True, kw_only=True):
    """Public limits on a client's optimizer figures, if moments are summed.

    Attributes:
        second_total: The largest sum of all second moments after the round.
        learning_rate_sum: The largest sum of the learning rates of a round's steps.
    """

    second_total: Positive
    learning_rate_sum: Positive


class SecureTerms(Schema, frozen=True, kw_only=True):
    """The terms that a round's clients must share for their values to be summable.

    Attributes:
        num_parties: The number of clients that are asked to train.
        max_examples: The largest number of examples of a client.
        max_change: The largest change of any number in its adapter.
        sketch_ranks: The width of the sketches of the cross terms, in ranks; 0 for none.
        expected_examples: The approximate number of examples of all clients in the round.
        seed: The seed of the sketches.
        moments: Limits on the optimizer moments; None if they are not shared.
        outcome: The outcome of the client's last round with cross terms; None before the first.
    """

    num_parties: PositiveCount
    max_examples: PositiveCount
    max_change: Positive
    sketch_ranks: Count
    expected_examples: PositiveCount
    seed: Seed
    moments: MomentTerms | None = None
    outcome: RoundOutcome | None = None


class SumRequest(Schema, tag_field="kind", tag="sum", frozen=True, kw_only=True):
    """Answer the next message of a sum, which is the object `SUM_MESSAGE` of the task.

    Attributes:
        number: Which of the round's sums it is: `FIRST_SUM`, `SECOND_SUM` or `SCORE_SUM`.
        attempt: Which attempt at this sum it is, from 1.
        means: Hash of the first sum's outcome; only with the first message of the second sum.
    """

    number: Annotated[int, Meta(ge=FIRST_SUM, le=SCORE_SUM)]
    attempt: PositiveCount
    means: Hash | None = None


class Ready(Schema, tag_field="kind", tag="ready", frozen=True, kw_only=True):
    """The client did what was asked, and keeps the result for the round's sums."""


class SumAnswer(Schema, tag_field="kind", tag="sum", frozen=True, kw_only=True):
    """The client's message in a sum, which is in the tensor `SUM_MESSAGE`."""


def message_tensors(message: bytes) -> dict[str, Tensor]:
    """Return the tensors of a reply that carries a message of a sum."""
    return {SUM_MESSAGE: bytes_to_tensor(message)}


def message_of(tensors: dict[str, Tensor], name: str) -> bytes:
    """Return the message of a sum from a reply's tensors.

    Args:
        tensors: The tensors.
        name: What messages call the sender.

    Raises:
        PayloadError: If they are anything else.
    """
    tensor = tensors.get(SUM_MESSAGE)
    if len(tensors) != 1 or tensor is None or tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise PayloadError(
            f"{name}: its reply holds {len(tensors)} tensors; wanted one, {SUM_MESSAGE!r}, of bytes"
        )
    return tensor.numpy().tobytes()
