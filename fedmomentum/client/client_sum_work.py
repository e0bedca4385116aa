"""`ClientSumWork`: a client's work in rounds whose updates are summed under masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedmomentum.client.secure_work import (
    SecureParty,
    SecureWork,
    keeping_reasons,
    layout_of,
    moment_values,
    save_cross_terms,
    settled_feedback,
)
from fedmomentum.client.work import ClientWork, WorkResult, train_result_of
from fedmomentum.errors import ConfigError, SecureSumError
from fedmomentum.global_model.mean_changes import read_means
from fedmomentum.protocol.messages import EvaluateRequest, EvaluateResult, Task, TrainRequest
from fedmomentum.protocol.score_sums import ScoreSums
from fedmomentum.protocol.secure_messages import (
    SUM_MESSAGE,
    WITHHELD_COUNT,
    Ready,
    SumAnswer,
    SumRequest,
    message_tensors,
)
from fedmomentum.protocol.sum_work import evaluation_work, training_work
from fedmomentum.secure_sum.messages import MIN_PARTIES

if TYPE_CHECKING:
    from fedmomentum.aggregation.moments import Moments
    from fedmomentum.client.store import ClientStore
    from fedmomentum.global_model.model import GlobalModel


@dataclass(kw_only=True)
class ClientSumWork(ClientWork):
    """A client's work in rounds with secure aggregation: its results are summed, but never sent.

    Attributes:
        store: Its objects and its state from earlier rounds.
        party: What it needs to take part in masked sums. A client with a party takes part only in
            runs with secure aggregation; a client without, only in runs without.
    """

    store: ClientStore
    party: SecureParty | None = None
    _round: SecureWork | None = field(init=False, repr=False, default=None)

    def check_privacy(self, *, is_secure: bool) -> None:
        """Check that the run uses secure aggregation if, and only if, it is configured here.

        Raises:
            ConfigError: If the two differ.
        """
        if self.party is not None and not is_secure:
            raise ConfigError(
                f"client {self.client_id} takes part in runs with secure aggregation only "
                "([privacy] secure-aggregation = true), and this one has none"
            )
        if self.party is None and is_secure:
            raise ConfigError(
                "the run has secure aggregation; [privacy] here does not. Set "
                "secure-aggregation = true, and the roster"
            )

    def has_round(self, task: Task) -> bool:
        """Return whether this client's work in a task's round is still in memory."""
        return self._round is not None and self._round.is_of(task.run_id, task.server_round)

    def _round_work(self, task: Task) -> SecureWork:
        """Return this client's work in a task's round, starting a new one if needed."""
        assert self.party is not None  # `check_privacy`
        if self._round is None or not self._round.is_of(task.run_id, task.server_round):
            self._round = SecureWork(self.party, task.run_id, task.server_round)
        return self._round

    def train_for_sums(
        self,
        task: Task,
        request: TrainRequest,
        global_model: GlobalModel,
        moments: Mapping[str, Moments] | None,
    ) -> WorkResult:
        """Train, keep the update for the round's sums, and save its cross terms to disk.

        Raises:
            ModelError: If the feedback from earlier rounds is missing or damaged.
            SecureSumError: If this client cannot take part; the reason stays with the client.
        """
        terms = request.secure
        assert terms is not None
        store = self.store
        work = self._round_work(task)
        factors = self.method.uploaded_factors(task.server_round)
        work.layout = layout_of(terms, global_model.adapter, factors)
        feedback = settled_feedback(
            store, self.client_id, task.run_id, task.server_round, terms.outcome
        )
        with keeping_reasons(self.client_id):
            trained = self.train_adapter(request, task.server_round, moments)
            work.changes = work.layout.changes(trained.adapter, self.num_examples, feedback)
            work.moments = moment_values(request, work.layout, work.changes, trained)
        work.training = train_result_of(trained.report, is_private=self.private is not None)
        work.training_work = training_work(request)
        save_cross_terms(store, self.client_id, work)
        return WorkResult(Ready(), WITHHELD_COUNT, {}, trained.moments)

    def evaluate_for_sums(
        self, task: Task, request: EvaluateRequest, global_model: GlobalModel
    ) -> WorkResult:
        """Score the loaded model, and keep the scores for the round's sums."""
        with keeping_reasons(self.client_id):
            result = self.run_evaluation(request, global_model)
        assert isinstance(result.answer, EvaluateResult)
        work = self._round_work(task)
        work.evaluation = result.answer
        work.evaluation_work = evaluation_work(request)
        # Any number of parties will do: it affects only bounds, which the plan sets, not values.
        work.scores = ScoreSums(
            num_parties=MIN_PARTIES,
            of_pairs=self.objective.compares_pairs,
            labels=global_model.base.labels,
        )
        return WorkResult(Ready(), WITHHELD_COUNT, {})

    def answer_sum(self, task: Task, request: SumRequest) -> WorkResult:
        """Answer a message of one of the round's sums.

        Raises:
            SecureSumError: If a rule is violated, or this client has nothing from that round.
        """
        self.check_privacy(is_secure=True)
        work = self._round
        if work is None or not work.is_of(task.run_id, task.server_round):
            raise SecureSumError(
                f"client {self.client_id} has nothing of round {task.server_round}: it was started "
                "again since, or has taken part in a later one. It takes part in the next round"
            )
        # Keep the first sum's outcome, because the next task refers to it again.
        means = None
        if request.means is not None:
            self.store.keep({request.means: task.objects.get(request.means, b"")})
            stored = self.store.read(request.means)
            means = read_means(stored, "the outcome of the first sum")
        message = task.objects.get(SUM_MESSAGE, b"")
        with keeping_reasons(self.client_id):
            answer = work.answer(request, message, means)
        return WorkResult(SumAnswer(), WITHHELD_COUNT, message_tensors(answer))
