"""A client's part in rounds whose updates are summed under masks.

The trained update stays with the client; the server asks for sums, message by message. Everything
but the feedback is only in memory: a restarted client has dropped out of the round's sums, and
takes part again in the next round.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedmomentum.aggregation.adapter_sums import AdapterSums, ClientChanges, Values
from fedmomentum.aggregation.moment_sums import (
    ClientMoments,
    MomentLimits,
    MomentSums,
)
from fedmomentum.aggregation.product_from_sums import MeanChanges
from fedmomentum.errors import DataError, ModelError, SecureSumError
from fedmomentum.global_model.cross_terms import CrossTerms
from fedmomentum.global_model.mean_changes import read_means
from fedmomentum.global_model.shared_moments import encode_means
from fedmomentum.protocol.score_sums import ScoreSums, loss_values
from fedmomentum.protocol.secure_messages import FIRST_SUM, SCORE_SUM, SecureTerms
from fedmomentum.protocol.sum_work import projection_work
from fedmomentum.secure_sum.messages import SumPlan, decode_message

if TYPE_CHECKING:
    from fedmomentum.client.store import ClientStore
    from fedmomentum.client.work import TrainedAdapter
    from fedmomentum.formats.manifest import RoundOutcome
    from fedmomentum.linalg.matrix import Matrix
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.protocol.messages import EvaluateResult, TrainRequest, TrainResult
    from fedmomentum.protocol.secure_messages import SumRequest
    from fedmomentum.secure_sum.journal import PartyJournal
    from fedmomentum.secure_sum.party import Identity, SumParty


LOG = logging.getLogger("fedmomentum")


@dataclass(frozen=True)
class SecureParty:
    """What a client needs to take part in sums.

    Attributes:
        identity: Its own identity, and the other parties that it accepts.
        journal: Where it records what it opens.
    """

    identity: Identity
    journal: PartyJournal


@dataclass
class SecureWork:
    """What a client computed in one round, and the sum that is in progress.

    Attributes:
        party: What it needs to take part.
        run_id: The run's id in messages.
        server_round: The round.
        layout: The layout of the sums of updates; None if the client did not train.
        changes: Its changes since the start of the round.
        moments: Its optimizer's moments for the sum; empty if they are not shared.
        training: The report of its training.
        training_work: The hash of what it was asked to train; None if it did not train.
        evaluation: Its scores.
        evaluation_work: The hash of what it was asked to score; None if it scored nothing.
        scores: The layout of the sum of scores.
    """

    party: SecureParty
    run_id: str
    server_round: int
    layout: AdapterSums | None = None
    changes: ClientChanges | None = None
    moments: Values = field(default_factory=dict)
    training: TrainResult | None = None
    training_work: str | None = None
    evaluation: EvaluateResult | None = None
    evaluation_work: str | None = None
    scores: ScoreSums | None = None
    _position: tuple[int, int] = field(init=False, repr=False, default=(0, 0))
    _sum: SumParty | None = field(init=False, repr=False, default=None)

    def is_of(self, run_id: str, server_round: int) -> bool:
        """Return whether this work belongs to the given round."""
        return (self.run_id, self.server_round) == (run_id, server_round)

    def answer(self, request: SumRequest, message: bytes, means: MeanChanges | None) -> bytes:
        """Answer a message of a sum.

        Args:
            request: Which sum.
            message: The server's message.
            means: The outcome of the first sum; given with the first message of the second sum.

        Raises:
            SecureSumError: If a rule is violated, or the client has nothing to add to the sum.
            DataError: If its own values cannot be summed.
        """
        position = (request.number, request.attempt)
        if self._sum is None or position != self._position:
            self._check_plan(request, message)
            # Compute values only after the plan proves to be for this very sum.
            values = self._values(request.number, means)
            # Import this only in clients that take part in sums.
            from fedmomentum.secure_sum.party import SumParty

            party = SumParty(self.party.identity, self.party.journal, values)
            reply = party.answer(message)
            self._sum = party
            self._position = position
            return reply
        return self._sum.answer(message)

    def _check_plan(self, request: SumRequest, message: bytes) -> None:
        """Check that a sum's first message is its plan, for the work that this client did.

        What a party has opened is recorded by run, round and sum, so these must be correct. If the
        server had others do different work, their values would not hide this client's.

        Raises:
            SecureSumError: If it is not.
        """
        try:
            plan = decode_message(message, SumPlan, "the server")
        except SecureSumError as error:
            raise SecureSumError(
                f"round {self.server_round}: this client does not take part in attempt "
                f"{request.attempt} at sum {request.number}, as it was not there at its beginning"
            ) from error
        wanted = (self.run_id, self.server_round, request.number, request.attempt)
        if (plan.run_id, *plan.position) != wanted:
            raise SecureSumError(
                f"a plan of {plan.title} came with attempt {request.attempt} at sum "
                f"{request.number} of round {self.server_round}"
            )
        work = self._work(request)
        if work is not None and plan.work != work:
            raise SecureSumError(
                f"{plan.title} is over other work than this client was asked to do; it takes no "
                "part, because values of different work do not hide one another. An honest server "
                "asks all clients of a round for the same"
            )

    def _work(self, request: SumRequest) -> str | None:
        """Return the hash of what this client did for a sum; None if it did nothing."""
        if request.number == FIRST_SUM:
            return self.training_work
        if request.number == SCORE_SUM:
            return self.evaluation_work
        if self.training_work is None or request.means is None:
            return None
        return projection_work(self.training_work, request.means)

    def _values(self, number: int, means: MeanChanges | None) -> Mapping[str, NDArray[np.float64]]:
        """Return the client's values in a sum, by block."""
        if number == SCORE_SUM:
            if self.evaluation is None or self.scores is None:
                raise SecureSumError(f"round {self.server_round}: this client has no scores of it")
            return self.scores.values(self.evaluation)
        layout = self.layout
        changes = self.changes
        if layout is None or changes is None or self.training is None:
            raise SecureSumError(f"round {self.server_round}: this client has not trained in it")
        if number == FIRST_SUM:
            values = _arrays(layout.first_values(changes))
            loss = self.training.loss
            losses = loss_values(loss, changes.num_examples, layout.max_examples)
            return {**values, **_arrays(self.moments), **losses}
        if means is None:
            raise SecureSumError(f"round {self.server_round}: sum {number} came without the means")
        self._check_means(means)
        return _arrays(layout.second_values(changes, means))

    def _check_means(self, means: MeanChanges) -> None:
        """Check that the outcome of the first sum matches the shapes of this client's values.

        Raises:
            SecureSumError: If it does not.
        """
        assert self.layout is not None
        for module, matrix in self.layout.start.modules.items():
            mean = means.modules.get(module)
            width = self.layout.width(module)
            if mean is None or (mean.b.shape, mean.a.shape, mean.Q.shape[1]) != (
                matrix.B.shape,
                matrix.A.shape,
                width,
            ):
                raise SecureSumError(
                    f"round {self.server_round}: the outcome of the first sum is not that of this "
                    f"client's {module}"
                )


def _arrays(values: Values) -> dict[str, NDArray[np.float64]]:
    return {block: tensor.numpy() for block, tensor in values.items()}


def layout_of(terms: SecureTerms, start: Adapter, factors: str) -> AdapterSums:
    """Return the layout of a round's sums.

    Args:
        terms: The terms shared by all clients of the round.
        start: The adapter that they start from.
        factors: The factors that are summed.
    """
    return AdapterSums(
        start=start,
        factors=factors,
        sketch_ranks=terms.sketch_ranks,
        num_parties=terms.num_parties,
        max_examples=terms.max_examples,
        max_change=terms.max_change,
        expected_examples=terms.expected_examples,
        seed=terms.seed,
    )


def moment_values(
    request: TrainRequest, layout: AdapterSums, changes: ClientChanges, trained: TrainedAdapter
) -> Values:
    """Return a client's optimizer moments for the first sum; empty if they are not shared.

    Args:
        request: What it was asked to train.
        layout: The layout of the sums.
        changes: Its changes.
        trained: What it trained.

    Raises:
        DataError: If they exceed the public limits, or the number of steps is wrong.
    """
    assert request.secure is not None
    terms = request.secure.moments
    if terms is None:
        return {}
    sums = MomentSums.of(
        layout.start,
        layout.factors,
        request.hyperparameters,
        num_parties=layout.num_parties,
        max_examples=layout.max_examples,
        limits=MomentLimits(**msgspec.structs.asdict(terms)),
    )
    # Round as in runs whose clients send their moments, so that both give the same result.
    report = trained.report
    own = ClientMoments(
        encode_means(trained.moments), report.num_steps, report.learning_rate_sum or 0.0
    )
    return sums.values(changes.num_examples, own)


def settled_feedback(
    store: ClientStore, client: str, run_id: str, server_round: int, outcome: RoundOutcome | None
) -> dict[str, Matrix]:
    """Return the part of a client's cross terms that the global model lacks before a round.

    The client's newest file contains what it kept before its last round, and its changes in that
    round. The outcome tells whether the model includes that round.

    Args:
        store: The client's files.
        client: The client.
        run_id: The run's id in messages.
        server_round: The round that begins.
        outcome: The outcome of the last round whose sums include the client's cross terms; None if
            there is no such round.

    Raises:
        ModelError: If the file of that round is missing or damaged.
        PayloadError: If the outcome's means are damaged.
    """
    state = store.load_state(CrossTerms, run_id, client, server_round - 1)
    if outcome is not None and (state is None or state.server_round < outcome.server_round):
        raise ModelError(
            f"client {client}: its cross terms after round {outcome.server_round} are missing; "
            "restore its store from a copy. The global model counts on them"
        )
    if state is None:
        return {}
    # Later rounds include nothing of this client, so what it kept before them still holds.
    if outcome is None or state.server_round != outcome.server_round:
        return state.settled(None, in_second_sum=False)
    name = f"the outcome of round {outcome.server_round}"
    means = read_means(store.read(outcome.means), name)
    return state.settled(means, in_second_sum=outcome.in_second_sum)


def save_cross_terms(store: ClientStore, client: str, work: SecureWork) -> None:
    """Save what a client keeps of a round, before it sends anything."""
    layout = work.layout
    changes = work.changes
    assert layout is not None and changes is not None
    if not layout.has_second_sum:
        return
    store.save_state(
        CrossTerms(
            client=client,
            run_id=work.run_id,
            server_round=work.server_round,
            num_examples=changes.num_examples,
            changes=changes.modules,
            feedback_limits={module: layout.feedback_limit(module) for module in changes.modules},
        )
    )


@contextmanager
def keeping_reasons(client: str) -> Iterator[None]:
    """Log errors in a client's own data and values locally; the server learns only of a failure.

    Args:
        client: The client.

    Raises:
        SecureSumError: If the block fails; unless it violates a rule of the sums, the message does
            not say why.
    """
    try:
        yield
    except SecureSumError:
        raise
    except Exception as error:
        LOG.error("%s takes no part in the round's sums: %s", client, error)
        if not isinstance(error, DataError):
            LOG.debug("%s failed", client, exc_info=error)
        raise SecureSumError(
            f"client {client} takes no part in the round's sums; its own log says why"
        ) from None
