"""`SecureRounds`: rounds of which the server sees sums over the clients, and no single update.

The clients train and keep their updates. One sum gives the mean of the factors and a sketch of what
the mean product has besides; a second one, for methods that depend on the product, that part on the
sketch's range. From both come adapters that stand in for the clients', and the method does with
them what it would do with the clients'. Scores come from a third sum.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from fedmomentum.aggregation.adapter_sums import AdapterSums
from fedmomentum.errors import PayloadError, QuorumError
from fedmomentum.formats.manifest import RoundOutcome
from fedmomentum.global_model.mean_moves import means_object
from fedmomentum.protocol.secure_messages import FIRST_SUM, SECOND_SUM, SecureTerms
from fedmomentum.secure_sum.messages import MIN_PARTIES, SumPlan, min_threshold
from fedmomentum.server.change_bound import change_bound
from fedmomentum.server.kept_sums import KeptSum, KeptSums, TrainedParties
from fedmomentum.server.round_parts import TrainedRound
from fedmomentum.server.selection import ROUNDING
from fedmomentum.server.sum_exchange import LostSumError, SumExchange
from fedmomentum.utils.seeding import derive_seed

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config
    from fedmomentum.config.training import LocalTraining
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.global_model.objects import StoredObject
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.protocol.messages import Reply, TrainRequest
    from fedmomentum.protocol.transport import Transport
    from fedmomentum.secure_sum.roster import Roster
    from fedmomentum.secure_sum.server import SumResult
    from fedmomentum.server.exchange import Exchange
    from fedmomentum.server.replies import Replies
    from fedmomentum.server.state import ServerState


LOG = logging.getLogger("fedmomentum")


@dataclass(frozen=True)
class SummedRound:
    """What the sums of a round's updates give.

    Attributes:
        clients: The clients whose values are in the first sum, sorted.
        updates: What stands in for their updates, by made-up names.
        weights: The weights of these, sum 1.
        num_examples: The number of examples of all of these clients.
        means: The outcome of the first sum, which they keep; None without a second sum.
        outcomes: Client to what it must learn with its next task; empty without a second sum.
        holders: The clients that have the means already.
    """

    clients: list[str]
    updates: dict[str, Adapter]
    weights: dict[str, float]
    num_examples: int
    means: StoredObject | None = None
    outcomes: Mapping[str, RoundOutcome] = field(default_factory=dict)
    holders: frozenset[str] = frozenset()

    def kept_by(self, client: str) -> str | None:
        """Return the hash of the means if a client keeps them until its next task."""
        if self.means is None or client not in self.clients:
            return None
        return self.means.name

    def recorded_in(self, state: ServerState) -> ServerState:
        """Return the state with the outcomes, which count once the round is committed."""
        state = replace(
            state,
            outcomes={**state.outcomes, **self.outcomes},
            summed_examples=self.num_examples,
        )
        for client in sorted(self.holders):
            assert self.means is not None
            state = state.holding(client, (*state.held.get(client, ()), self.means.name))
        return state


class SecureRounds:
    """The server's part in the sums of all rounds.

    Args:
        transport: Reaches the clients.
        roster: The public keys that the server has for the clients.
        method: Combines the stand-ins.
        config: The run's settings.
        kept: Where what came is kept until the round is committed; None where the clients end with
            the server, which then repeats the round.
    """

    def __init__(
        self,
        transport: Transport,
        roster: Roster,
        *,
        method: Method,
        config: Config,
        kept: KeptSums | None,
    ) -> None:
        self._transport = transport
        self._roster = roster
        self._method = method
        self._config = config
        self._kept = kept

    # ── training ──

    def train(
        self,
        exchange: Exchange,
        model: GlobalModel,
        state: ServerState,
        server_round: int,
        requests: Mapping[str, TrainRequest],
        hyperparameters: LocalTraining,
    ) -> tuple[TrainedRound, ServerState]:
        """Have the clients train, and sum up what they trained.

        A round whose sums had begun when the server was killed goes on with them: the clients have
        trained, and open every sum once. If it cannot, and nobody has opened the first sum yet, it
        begins anew.

        Args:
            exchange: Asks the clients.
            model: The model that they start from.
            state: What the server remembers.
            server_round: The round.
            requests: Client to what it is asked to train.
            hyperparameters: The round's.

        Returns:
            What stands in for the clients' updates, and the state with the sums' outcome.

        Raises:
            QuorumError: If too few clients took part.
        """
        terms = self._terms(model, state, server_round, len(requests))
        sums = partial(self._sum_updates, model, state.run_id, server_round, terms, len(requests))
        attempt = 1
        before = None if self._kept is None else self._kept.round(server_round)
        if before is not None:
            trained, replies = before
            try:
                summed = sums(trained, replies)
            except LostSumError:
                raise
            except QuorumError as error:
                LOG.warning("round %d begins anew: %s", server_round, error)
                attempt = trained.attempt + 1
            else:
                return self._trained(summed, replies, server_round, hyperparameters, state)

        # Every client learns what became of its last values, and trains.
        asked = {}
        for client, request in requests.items():
            own_terms = msgspec.structs.replace(terms, outcome=state.outcomes.get(client))
            asked[client] = msgspec.structs.replace(request, secure=own_terms)
        replies, state = exchange.ask(model, state, asked, server_round, check_ready)
        for client, reason in replies.failures.items():
            LOG.warning("round %d: %s is left out: %s", server_round, client, reason)
        trained = TrainedParties(attempt, sorted(replies.replies))
        self._threshold(server_round, trained.parties, replies.failures, len(requests))
        if self._kept is not None:
            self._kept.begin_round(server_round, trained, replies)
        summed = sums(trained, replies)
        return self._trained(summed, replies, server_round, hyperparameters, state)

    def _trained(
        self,
        summed: SummedRound,
        replies: Replies,
        server_round: int,
        hyperparameters: LocalTraining,
        state: ServerState,
    ) -> tuple[TrainedRound, ServerState]:
        """Return the sums in the form of a round's updates, and the state with their outcome."""
        trained = TrainedRound(
            replies=replies,
            updates=summed.updates,
            ranks={},
            learning_rate=hyperparameters.learning_rate,
            factors=self._method.trained_factors(server_round),
            screening={},
            moments={},
            summed=summed,
        )
        return trained, summed.recorded_in(state)

    def clear(self) -> None:
        """Delete what was kept of a round: it is committed."""
        if self._kept is not None:
            self._kept.clear()

    def _terms(
        self,
        model: GlobalModel,
        state: ServerState,
        server_round: int,
        num_clients: int,
    ) -> SecureTerms:
        """Return what the clients of a round have in common so that their values can be summed."""
        privacy = self._config.privacy
        # A guess is enough: only the choice of the sketches' range depends on it.
        expected = state.summed_examples or num_clients * privacy.max_examples
        return SecureTerms(
            num_parties=num_clients,
            max_examples=privacy.max_examples,
            max_change=change_bound(self._config, server_round, model.adapter),
            sketch_ranks=privacy.sketch_ranks if self._method.depends_on == "product" else 0,
            expected_examples=expected,
            seed=derive_seed(self._config.run.seed, "sketch", server_round),
        )

    def _threshold(
        self,
        server_round: int,
        clients: Sequence[str],
        failures: Mapping[str, str],
        num_asked: int = 0,
    ) -> int:
        """Return how many of a sum's clients must agree to open it.

        Args:
            server_round: The round.
            clients: The clients of the sum.
            failures: Why others are missing.
            num_asked: How many were asked to train, of whom a fraction is needed; 0 for no such
                rule.

        Raises:
            QuorumError: If the clients are too few.
        """
        # A sum that too few clients are left for is not opened at all.
        fraction = self._config.federation.min_valid_fraction
        quorum = math.ceil(fraction * num_asked - ROUNDING)
        configured = self._config.privacy.threshold or min_threshold(len(clients))
        threshold = max(configured, quorum, MIN_PARTIES)
        if len(clients) < threshold:
            reasons = "; ".join(f"{name}: {why}" for name, why in sorted(failures.items()))
            raise QuorumError(
                f"round {server_round}: {len(clients)} clients are left for the sum of updates, "
                f"and {threshold} are needed ({reasons}). Rounds up to {server_round - 1} are "
                "saved; mend the clients and resume"
            )
        return threshold

    # ── the sums ──

    def _sum_updates(
        self,
        model: GlobalModel,
        run_id: str,
        server_round: int,
        terms: SecureTerms,
        num_asked: int,
        trained: TrainedParties,
        collected: Replies,
    ) -> SummedRound:
        """Sum up what the clients trained.

        Args:
            model: The model that they started from.
            run_id: The run on the wire.
            server_round: The round.
            terms: What the clients were told of the sums.
            num_asked: How many clients were asked to train.
            trained: Those that did.
            collected: Gets failures, bytes and seconds.

        Raises:
            QuorumError: If too few clients took part in the first sum.
        """
        exchange = SumExchange(self._transport, self._roster, collected)
        layout = AdapterSums(
            start=model.adapter,
            factors=self._method.uploaded_factors(server_round),
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
            threshold=self._threshold(server_round, trained.parties, collected.failures, num_asked),
            blocks=layout.first_blocks(),
        )
        first = exchange.run(first_plan, self._kept_sum(first_plan))
        means = layout.mean_moves(_tensors(first))
        if not layout.has_second_sum:
            updates, weights = _named(*layout.stand_ins(means, None))
            return SummedRound(first.survivors, updates, weights, means.num_examples)

        # The cross terms, on the range that the sketch has found.
        stored = means_object(means)
        second = self._second_sum(exchange, first_plan, first.survivors, layout, stored)
        totals = None if second is None else _tensors(second)
        updates, weights = _named(*layout.stand_ins(means, totals))
        in_second = [] if second is None else second.survivors
        outcomes = {}
        for client in first.survivors:
            outcomes[client] = RoundOutcome(
                server_round=server_round, means=stored.name, in_second_sum=client in in_second
            )
        return SummedRound(
            first.survivors,
            updates,
            weights,
            means.num_examples,
            means=stored,
            outcomes=outcomes,
            holders=frozenset(exchange.holders),
        )

    def _second_sum(
        self,
        exchange: SumExchange,
        first_plan: SumPlan,
        clients: Sequence[str],
        layout: AdapterSums,
        means: StoredObject,
    ) -> SumResult | None:
        """Sum up the cross terms; None if too few clients take part, who then keep them."""
        server_round = first_plan.server_round
        try:
            plan = msgspec.structs.replace(
                first_plan,
                number=SECOND_SUM,
                parties=list(clients),
                threshold=self._threshold(server_round, clients, exchange.collected.failures),
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

    def _kept_sum(self, plan: SumPlan) -> KeptSum | None:
        return None if self._kept is None else self._kept.sum(*plan.position)


def check_ready(reply: Reply) -> None:
    """Refuse a reply that brings what should have stayed with its client.

    Raises:
        PayloadError: If it holds a tensor.
    """
    if reply.tensors:
        raise PayloadError(
            f"client {reply.client_id}: tensor {min(reply.tensors)[:200]!r} was not asked for; "
            "updates are summed under masks"
        )


def _named(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[dict[str, Adapter], dict[str, float]]:
    """Return adapters and their weights by the adapters' names."""
    updates = {adapter.name: adapter for adapter in adapters}
    return updates, dict(zip(updates, weights, strict=True))


def _tensors(result: SumResult) -> dict[str, Tensor]:
    return {block: torch.from_numpy(total) for block, total in result.values.items()}
