"""`RoundSums`: a round's masked sums, and the updates and scores that follow from them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from fedmomentum.aggregation.adapter_sums import AdapterSums
from fedmomentum.aggregation.moment_sums import (
    MeanMovement,
    MomentLimits,
    MomentSums,
    changes_by_factor,
)
from fedmomentum.errors import QuorumError, SecureSumError
from fedmomentum.formats.manifest import RoundOutcome
from fedmomentum.global_model.mean_changes import means_object, read_means
from fedmomentum.protocol.score_sums import ScoreSums, loss_blocks, mean_loss
from fedmomentum.protocol.secure_messages import FIRST_SUM, SCORE_SUM, SECOND_SUM, SecureTerms
from fedmomentum.protocol.sum_work import projection_work
from fedmomentum.secure_sum.messages import MIN_PARTIES, SumPlan, min_threshold
from fedmomentum.server.kept_sums import KeptSum, KeptSums, TrainedParties
from fedmomentum.server.selection import ROUNDING, sample_size
from fedmomentum.server.sum_exchange import SumExchange
from fedmomentum.utils.text import joined_reasons

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config
    from fedmomentum.formats.round_record import EvaluationRecord
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.global_model.objects import StoredObject
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.protocol.transport import Transport
    from fedmomentum.secure_sum.roster import Roster
    from fedmomentum.secure_sum.server import SumResult
    from fedmomentum.server.replies import Replies
    from fedmomentum.server.state import ServerState


LOG = logging.getLogger("fedmomentum")
WORTH_A_WARNING = 1e-3
"""Rounding error of a round's changes, relative to their norm, above which a warning is logged."""


@dataclass(frozen=True)
class SummedRound:
    """The results of summing a round's updates.

    Attributes:
        clients: The clients whose values are in the first sum, sorted.
        updates: Stand-ins for their updates, under made-up names.
        weights: The weights of the stand-ins, summing to 1.
        num_examples: The total number of examples of these clients.
        attempt: Which attempt at the round's sums this is.
        train_loss: Their mean training loss; None if one of them does not report its own.
        rounding: Error from rounding the changes to integers, relative to the norm of their sum.
        means: The outcome of the first sum, which they keep; None without a second sum.
        outcomes: Client to what it must learn with its next task; empty without a second sum.
        holders: The clients that already have the means.
        moments: `<module>.<factor>` to what their optimizers did; empty if moments are not shared.
    """

    clients: list[str]
    updates: dict[str, Adapter]
    weights: dict[str, float]
    num_examples: int
    attempt: int
    train_loss: float | None
    rounding: float
    means: StoredObject | None = None
    outcomes: Mapping[str, RoundOutcome] = field(default_factory=dict)
    holders: frozenset[str] = frozenset()
    moments: Mapping[str, MeanMovement] = field(default_factory=dict)

    def kept_by(self, client: str) -> str | None:
        """Return the hash of the means if a client keeps them until its next task."""
        if self.means is None or client not in self.clients:
            return None
        return self.means.name

    def apply_to(self, state: ServerState) -> ServerState:
        """Return the state with the outcomes, which take effect once the round is committed."""
        state = replace(
            state,
            outcomes={**state.outcomes, **self.outcomes},
            summed_examples=self.num_examples,
        )
        for client in sorted(self.holders):
            assert self.means is not None
            cached_objects = (*state.held.get(client, ()), self.means.name)
            state = state.with_cached_objects(client, cached_objects)
        return state


@dataclass(frozen=True)
class RoundSums:
    """Runs the sums of a round with its clients.

    Attributes:
        transport: Reaches the clients.
        roster: The public keys that the server has for them.
        method: Combines the stand-ins for their updates.
        config: The run's settings.
        kept: Stores replies until the round is committed; None to keep nothing.
    """

    transport: Transport
    roster: Roster
    method: Method
    config: Config
    kept: KeptSums | None

    def threshold(
        self, server_round: int, clients: Sequence[str], failures: Mapping[str, str]
    ) -> int:
        """Return how many of a sum's clients must agree to open it.

        It does not drop when clients are missing: clients refuse a sum that fewer of them can open
        than a round of their whole roster requires.

        Args:
            server_round: The round.
            clients: The clients of the sum.
            failures: Why others are missing.

        Raises:
            QuorumError: If there are too few clients.
        """
        privacy = self.config.privacy
        federation = self.config.federation
        num_sampled = sample_size(len(self.roster.keys), federation.client_fraction)
        # With fewer clients than the quorum, a sum is not opened at all.
        quorum = math.ceil(federation.min_valid_fraction * num_sampled - ROUNDING)
        # An evaluation may ask more clients than a round trains. The configured threshold is for a
        # training round; in a larger sum, the smallest share that clients accept must agree.
        of_a_round = privacy.threshold or min_threshold(num_sampled)
        trusts_server = of_a_round < min_threshold(num_sampled)
        least = min_threshold(len(clients), trusts_server=trusts_server)
        threshold = max(of_a_round, least, quorum, MIN_PARTIES)
        if len(clients) < threshold:
            reasons = joined_reasons(failures)
            raise QuorumError(
                f"round {server_round}: {len(clients)} clients are left for a sum, and {threshold} "
                f"are needed ({reasons or 'no others are connected'}). Rounds up to "
                f"{server_round - 1} are saved; fix the clients and resume"
            )
        return threshold

    def updates(
        self,
        model: GlobalModel,
        run_id: str,
        server_round: int,
        terms: SecureTerms,
        trained: TrainedParties,
        collected: Replies,
    ) -> SummedRound:
        """Sum the clients' updates.

        Args:
            model: The model that they started from.
            run_id: The run's identifier on the wire.
            server_round: The round.
            terms: What the clients know of the sums.
            trained: The clients that have trained.
            collected: Receives failures, byte counts and times.

        Raises:
            QuorumError: If too few clients took part in the first sum.
        """
        exchange = SumExchange(self.transport, self.roster, collected)
        layout = AdapterSums(
            start=model.adapter,
            factors=self.method.uploaded_factors(server_round),
            sketch_ranks=terms.sketch_ranks,
            num_parties=len(trained.parties),
            max_examples=terms.max_examples,
            max_change=terms.max_change,
            expected_examples=terms.expected_examples,
            seed=terms.seed,
        )
        first_plan = SumPlan(
            run_id=run_id,
            server_round=server_round,
            number=FIRST_SUM,
            attempt=trained.attempt,
            parties=trained.parties,
            threshold=self.threshold(server_round, trained.parties, collected.failures),
            work=trained.work,
            blocks=[*layout.first_blocks(), *loss_blocks(len(trained.parties))],
        )
        moment_sums = self._moment_sums(layout, terms, server_round)
        if moment_sums is not None:
            blocks = [*first_plan.blocks, *moment_sums.blocks()]
            first_plan = msgspec.structs.replace(first_plan, blocks=blocks)
        first = exchange.run(first_plan, self._kept_sum(first_plan))
        means = layout.mean_changes(_tensors(first))
        train_loss = mean_loss(first.values, means.num_examples, terms.max_examples)
        moments = {}
        if moment_sums is not None:
            changes = changes_by_factor(means)
            moments = moment_sums.means(_tensors(first), means.num_examples, changes)
        rounding = layout.rounding(_tensors(first), len(first.survivors))
        _warn_of_rounding(server_round, rounding)
        totals = None
        stored = None
        outcomes = {}
        if layout.has_second_sum:
            # The cross terms, on the range found by the sketch.
            stored = means_object(means)
            kept = self._kept_sum(first_plan)
            if kept is not None:
                stored = kept.means(stored)
                sent = read_means(stored, f"the outcome of sum {FIRST_SUM} of round {server_round}")
                means = replace(means, modules=sent.modules)
            second = self._second_sum(exchange, first_plan, first.survivors, layout, stored)
            totals = None if second is None else _tensors(second)
            in_second = [] if second is None else second.survivors
            for client in first.survivors:
                outcomes[client] = RoundOutcome(
                    server_round=server_round, means=stored.name, in_second_sum=client in in_second
                )

        updates, weights = _named(*layout.stand_ins(means, totals))
        return SummedRound(
            clients=first.survivors,
            updates=updates,
            weights=weights,
            num_examples=means.num_examples,
            attempt=trained.attempt,
            train_loss=train_loss,
            rounding=rounding,
            means=stored,
            outcomes=outcomes,
            holders=frozenset(exchange.holders),
            moments=moments,
        )

    def _moment_sums(
        self, layout: AdapterSums, terms: SecureTerms, server_round: int
    ) -> MomentSums | None:
        """Return the layout of the moments in the first sum; None if it has none."""
        if terms.moments is None:
            return None
        num_rounds = self.config.federation.num_rounds
        return MomentSums.of(
            layout.start,
            layout.factors,
            self.config.training.hyperparameters(server_round, num_rounds),
            num_parties=layout.num_parties,
            max_examples=layout.max_examples,
            limits=MomentLimits(**msgspec.structs.asdict(terms.moments)),
        )

    def _second_sum(
        self,
        exchange: SumExchange,
        first_plan: SumPlan,
        clients: Sequence[str],
        layout: AdapterSums,
        means: StoredObject,
    ) -> SumResult | None:
        """Sum the cross terms; None if too few clients take part, which then keep theirs."""
        server_round = first_plan.server_round
        try:
            plan = msgspec.structs.replace(
                first_plan,
                number=SECOND_SUM,
                parties=list(clients),
                threshold=self.threshold(server_round, clients, exchange.collected.failures),
                work=projection_work(first_plan.work, means.name),
                blocks=layout.second_blocks(),
            )
            return exchange.run(plan, self._kept_sum(plan), means)
        except QuorumError as error:
            LOG.warning(
                "round %d takes the mean of the factors alone, and the clients keep the rest for "
                "later rounds: %s",
                server_round,
                error,
            )
            return None

    def scores(
        self,
        run_id: str,
        summed: SummedRound | None,
        server_round: int,
        replies: Replies,
        work: str,
        labels: Sequence[str],
    ) -> EvaluationRecord | None:
        """Sum the scores of the clients that have evaluated; return None if that fails.

        Args:
            run_id: The run's identifier on the wire.
            summed: The round's sums of updates; None in round 0.
            server_round: The round.
            replies: The clients that evaluated; receives failures, byte counts and times.
            work: The hash of what they scored (`evaluation_work`).
            labels: A classifier's labels; empty for other models.
        """
        clients = sorted(replies.replies)
        of_pairs = self.config.training.objective == "dpo"
        sums = ScoreSums(len(clients), of_pairs=of_pairs, labels=labels)
        try:
            plan = SumPlan(
                run_id=run_id,
                server_round=server_round,
                number=SCORE_SUM,
                attempt=1 if summed is None else summed.attempt,
                parties=clients,
                threshold=self.threshold(server_round, clients, replies.failures),
                work=work,
                blocks=sums.blocks(),
            )
            result = SumExchange(self.transport, self.roster, replies).run(
                plan, self._kept_sum(plan)
            )
            return sums.record(result.values)
        except (QuorumError, SecureSumError) as error:
            LOG.warning("round %d has no scores: %s", server_round, error)
            return None

    def _kept_sum(self, plan: SumPlan) -> KeptSum | None:
        return None if self.kept is None else self.kept.sum(*plan.position)


def _warn_of_rounding(server_round: int, rounding: float) -> None:
    """Warn if the public bounds are so wide that the changes span only a few integer steps."""
    if rounding > WORTH_A_WARNING:
        LOG.warning(
            "round %d: the integers of secure sums took %.1e of the clients' changes, since their "
            "public bounds are wide. Lower privacy.max-examples to the number of the largest "
            "client's examples, or set privacy.max-change",
            server_round,
            rounding,
        )


def _named(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[dict[str, Adapter], dict[str, float]]:
    """Return the adapters and their weights, keyed by the adapters' names."""
    updates = {adapter.name: adapter for adapter in adapters}
    return updates, dict(zip(updates, weights, strict=True))


def _tensors(result: SumResult) -> dict[str, Tensor]:
    return {block: torch.from_numpy(total) for block, total in result.values.items()}
