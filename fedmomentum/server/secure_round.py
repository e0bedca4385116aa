"""`SecureRounds`: rounds in which the server sees sums over the clients, but no single update.

The clients train and keep their updates. A first sum gives the mean of the factors and a sketch of
what else the mean product contains; for methods that depend on the product, a second sum gives that
part on the sketch's range. From both, the server builds adapters that stand in for the clients' own
and treats them the same way. Scores come from a third sum.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from fedmomentum.errors import LostRoundError, QuorumError
from fedmomentum.protocol.secure_messages import SecureTerms
from fedmomentum.protocol.sum_work import evaluation_work, training_work
from fedmomentum.server.change_bound import change_bound, moment_terms
from fedmomentum.server.kept_sums import KeptSums, TrainedParties
from fedmomentum.server.reply_checks import check_ready
from fedmomentum.server.round_data import TrainedRound
from fedmomentum.server.round_sums import RoundSums, SummedRound
from fedmomentum.server.scoring import RoundEvaluation
from fedmomentum.utils.seeding import derive_seed

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.aggregation.moments import Moments
    from fedmomentum.config.schema import Config
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.protocol.messages import EvaluateRequest, TrainRequest
    from fedmomentum.protocol.transport import Transport
    from fedmomentum.secure_sum.roster import Roster
    from fedmomentum.server.exchange import Exchange
    from fedmomentum.server.moments import SharedOptimizer
    from fedmomentum.server.replies import Replies
    from fedmomentum.server.state import ServerState


LOG = logging.getLogger("fedmomentum")


class SecureRounds:
    """The server's part in the sums of all rounds.

    Args:
        transport: Reaches the clients.
        roster: The public keys that the server has for the clients.
        method: Combines the stand-ins.
        config: The run's settings.
        kept: Stores replies until the round is committed; None where the clients end together with
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
        self._roster = roster
        self._method = method
        self._config = config
        self._kept = kept
        self._sums = RoundSums(transport, roster, method, config, kept)

        self._newcomers: set[str] = set()

    def known(self, clients: Sequence[str]) -> list[str]:
        """Return those of the given clients that were admitted before this server started.

        The others' keys are not on the roster: every client would refuse a sum with them.
        """
        newcomers = set(clients) - self._roster.keys.keys() - self._newcomers
        for client in sorted(newcomers):
            LOG.warning(
                "%s was admitted after this run began; it takes part once all sites have a roster "
                "with its key and the server was stopped and resumed",
                client,
            )
        self._newcomers |= newcomers
        return [client for client in clients if client in self._roster.keys]

    # ── training ──

    def train(
        self,
        exchange: Exchange,
        model: GlobalModel,
        state: ServerState,
        server_round: int,
        requests: Mapping[str, TrainRequest],
        optimizer: SharedOptimizer | None = None,
    ) -> tuple[TrainedRound, ServerState]:
        """Have the clients train, and sum their updates.

        If the server was killed during a round's sums, the round continues with them: the clients
        have already trained, and open each sum only once. If that fails, the round starts over,
        unless clients may have opened the first sum.

        Args:
            exchange: Asks the clients.
            model: The model that they start from.
            state: What the server remembers.
            server_round: The round.
            requests: Client to what it is asked to train.
            optimizer: Keeps the moments that the clients share; None if they share none.

        Returns:
            Stand-ins for the clients' updates, and the state with the sums' outcome.

        Raises:
            QuorumError: If too few clients took part; a resumed server asks them again.
            LostRoundError: If a resumed server cannot finish sums that clients may have opened.
        """
        terms = self._terms(model, state, server_round, len(requests), optimizer)
        sums = partial(self._sums.updates, model, state.run_id, server_round, terms)
        attempt = 1
        before = None if self._kept is None else self._kept.round(server_round)
        if before is not None:
            trained, replies = before
            try:
                summed = sums(trained, replies)
            except QuorumError as error:
                assert self._kept is not None
                if self._kept.is_opened(server_round):
                    raise LostRoundError(
                        str(error), replies.failures, replies.uplink_bytes, replies.downlink_bytes
                    ) from error
                LOG.warning("round %d starts over: %s", server_round, error)
                attempt = trained.attempt + 1
            else:
                return self._trained(summed, replies, server_round, state)

        # Each client learns the outcome of its last sums, and trains.
        asked = {}
        for client, request in requests.items():
            own_terms = msgspec.structs.replace(terms, outcome=state.outcomes.get(client))
            asked[client] = msgspec.structs.replace(request, secure=own_terms)
        replies, state = exchange.ask(model, state, asked, server_round, check_ready)
        for client, reason in replies.failures.items():
            LOG.warning("round %d: %s is left out: %s", server_round, client, reason)
        work = training_work(next(iter(asked.values())))
        trained = TrainedParties(attempt, sorted(replies.replies), work)
        self._sums.threshold(server_round, trained.parties, replies.failures)
        if self._kept is not None:
            self._kept.begin_round(server_round, trained, replies)
        summed = sums(trained, replies)
        return self._trained(summed, replies, server_round, state)

    def _trained(
        self,
        summed: SummedRound,
        replies: Replies,
        server_round: int,
        state: ServerState,
    ) -> tuple[TrainedRound, ServerState]:
        """Return the sums in the form of a round's updates, and the state with their outcome."""
        num_rounds = self._config.federation.num_rounds
        trained = TrainedRound(
            replies=replies,
            updates=summed.updates,
            ranks={},
            learning_rate=self._config.training.learning_rate_at(server_round, num_rounds),
            factors=self._method.trained_factors(server_round),
            screening={},
            moments={},
            summed=summed,
        )
        return trained, summed.apply_to(state)

    def clear(self) -> None:
        """Delete what was kept of a round, once it is committed."""
        if self._kept is not None:
            self._kept.clear()

    def _terms(
        self,
        model: GlobalModel,
        state: ServerState,
        server_round: int,
        num_clients: int,
        optimizer: SharedOptimizer | None,
    ) -> SecureTerms:
        """Return the terms that a round's clients must share for their values to be summable."""
        privacy = self._config.privacy
        # The state that the clients' optimizers start from limits how far they can move.
        start = model.adapter
        started: list[Moments] = []
        moments = None
        if optimizer is not None:
            started = list(optimizer.started(state.moments, start).moments.values())
            total = optimizer.second_total(state.moments, start)
            moments = moment_terms(self._config, server_round, total)
        # An estimate is enough: it only affects the choice of the sketches' range.
        expected = state.summed_examples or num_clients * privacy.max_examples
        return SecureTerms(
            num_parties=num_clients,
            max_examples=privacy.max_examples,
            max_change=change_bound(self._config, server_round, start, started),
            sketch_ranks=privacy.sketch_ranks if self._method.depends_on == "product" else 0,
            expected_examples=expected,
            seed=derive_seed(self._config.run.seed, "sketch", server_round),
            moments=moments,
        )

    # ── evaluating ──

    def scores(
        self,
        run_id: str,
        summed: SummedRound | None,
        server_round: int,
        replies: Replies,
        request: EvaluateRequest,
        labels: Sequence[str],
    ) -> RoundEvaluation:
        """Return the clients' pooled scores; see `RoundSums.scores`.

        `request` is what any of them was asked to evaluate.
        """
        work = evaluation_work(request)
        scores = self._sums.scores(run_id, summed, server_round, replies, work, labels)
        return RoundEvaluation(replies, scores)
