"""`Server`: the training round, shared by all transports."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import torch

from fedmomentum.aggregation.aggregate import AggregationResult, RoundContext, aggregate_updates
from fedmomentum.errors import LostRoundError
from fedmomentum.formats.round_record import Diagnostics, RoundRecord
from fedmomentum.formats.withheld import withheld_by
from fedmomentum.protocol.messages import Reply
from fedmomentum.server.callbacks import Callback, CallbackList
from fedmomentum.server.client_updates import UpdateReader, next_rank
from fedmomentum.server.delivery import consolidate_if_due
from fedmomentum.server.diagnostics import round_diagnostics
from fedmomentum.server.exchange import Exchange, sent_manifest
from fedmomentum.server.moments import SharedOptimizer
from fedmomentum.server.recording import base_record, round_record, unchanged_record
from fedmomentum.server.replies import Replies
from fedmomentum.server.reply_checks import check_aggregate, check_evaluation, check_ready
from fedmomentum.server.round_data import (
    AggregatedRound,
    TrainedRound,
    evaluate_request,
    probe_seed,
    train_request,
)
from fedmomentum.server.round_metrics import PhaseTimer
from fedmomentum.server.round_steps import RoundSteps
from fedmomentum.server.scoring import ExpectedProbes, RoundEvaluation, expected_probes, pool_scores
from fedmomentum.server.screening import Screening
from fedmomentum.server.selection import (
    check_quorum,
    evaluating_clients,
    num_eval_examples,
    sample_clients,
)
from fedmomentum.server.update_collector import UpdateCollector

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config
    from fedmomentum.config.training import LocalTraining
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.protocol.messages import TrainRequest
    from fedmomentum.protocol.transport import Transport
    from fedmomentum.server.checkpoint import RunDirectory
    from fedmomentum.server.round_sums import SummedRound
    from fedmomentum.server.state import ServerState


LOG = logging.getLogger("fedmomentum")


class Server:
    """Runs the rounds of a federation; each is committed to the run's directory before the next.

    Args:
        transport: Reaches the clients.
        method: Combines their adapters.
        model: The model to start from; round 0 of a fresh run evaluates the base model first.
        state: What the server remembers, from `RunDirectory.resume` or fresh.
        config: The run's settings.
        directory: Takes checkpoints and metrics.
        callbacks: Notified of each event.
        steps: Which optional steps each round runs.

    Attributes:
        model: The global model after the last round.
        state: What the server remembers after that round.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        method: Method,
        model: GlobalModel,
        state: ServerState,
        config: Config,
        directory: RunDirectory,
        callbacks: Iterable[Callback] = (),
        steps: RoundSteps = RoundSteps(),  # noqa: B008 (frozen)
    ) -> None:
        self.model = model
        self.state = state
        self._transport = transport
        self._method = method
        self._config = config
        self._directory = directory
        self._callbacks = CallbackList(callbacks)
        self._steps = steps
        self._secure = steps.secure
        self._exchange = Exchange(transport, config, directory, samples_adapter=method.fresh)
        self._optimizer = SharedOptimizer.of(config, method, directory)

    def run(self) -> GlobalModel:
        """Run the remaining rounds, and return the final global model.

        Raises:
            QuorumError: If too few clients gave a usable update; all earlier rounds are saved.
        """
        if not self._directory.records:
            self.evaluate_base_model()
        num_rounds = self._config.federation.num_rounds
        for server_round in range(self.model.server_round + 1, num_rounds + 1):
            self.run_round(server_round)
        return self.model

    def run_round(self, server_round: int) -> RoundRecord:
        """Run one round: sample, train, screen, aggregate, advance, evaluate, commit.

        Raises:
            QuorumError: If too few clients gave a usable update.
        """
        # Sample the clients, and bring their base models up to date.
        timer = PhaseTimer()
        clients = self._sample_clients(server_round)
        self._callbacks.on_round_begin(server_round, clients)
        with timer.phase("merge"):
            self._consolidate_if_due(clients)
        model = self.model
        # Local training; the updates that come back are validated and screened.
        try:
            trained = self._train(server_round, clients)
        except LostRoundError as error:
            return self._commit_unchanged(clients, error)
        with timer.phase("aggregate"):
            combined = self._aggregate(server_round, trained)
        # The aggregate becomes the model that is evaluated now and trained in the next round.
        eval_clients = evaluating_clients(
            self._config, server_round, trained.accepted, self._known(self._transport.connected())
        )
        with timer.phase("merge"):
            self._advance(combined.result)
            self._advance_moments(model, trained, combined.weights)
            self._consolidate_if_due(eval_clients)
        # Measure the round while its updates are still on disk.
        diagnostics = self._diagnose(model, trained, combined.weights)
        self.state = self.state.after_round(model, self.model)
        self._directory.updates.clear()
        expected = None
        if eval_clients:
            expected = self._expected_probes(server_round, model, trained, combined.weights)
        # Score held-out examples, and record the round.
        evaluated = self._evaluate(server_round, eval_clients, expected, trained.summed)
        record = round_record(self.model, clients, trained, combined, evaluated)
        seconds = timer.total(trained.replies, evaluated.replies)
        record = msgspec.structs.replace(record, diagnostics=diagnostics, seconds=seconds)
        return self._commit(record)

    def _commit_unchanged(self, clients: list[str], error: LostRoundError) -> RoundRecord:
        """Commit a round that changes nothing, because its sums are lost and cannot be redone."""
        LOG.warning("round %d changes nothing: %s", self.model.server_round + 1, error)
        before = self.model
        self.model = before.unchanged()
        self.state = self.state.after_round(before, self.model)
        return self._commit(unchanged_record(self.model, clients, error))

    def evaluate_base_model(self) -> RoundRecord:
        """Run round 0: evaluate the base model without training."""
        self._callbacks.on_round_begin(0, [])
        every = self._config.evaluation.every
        clients = self._known(self._transport.clients()) if every else []
        evaluated = self._evaluate(0, clients, None)
        record = base_record(self.model, evaluated)
        seconds = PhaseTimer().total(Replies(), evaluated.replies)
        record = msgspec.structs.replace(record, seconds=seconds)
        return self._commit(record)

    # ── sampling and sending ──

    def _known(self, client_ids: Sequence[str]) -> Sequence[str]:
        """Return the clients that can take part: all; with secure sums, those on the roster."""
        return client_ids if self._secure is None else self._secure.known(client_ids)

    def _sample_clients(self, server_round: int) -> list[str]:
        client_ids = self._known(self._transport.clients())
        fraction = self._config.federation.client_fraction
        return sample_clients(self._config.run.seed, server_round, client_ids, fraction)

    def _consolidate_if_due(self, clients: Sequence[str]) -> None:
        self.model, self.state = consolidate_if_due(
            self.model, self.state, clients, self._directory
        )

    # ── training ──

    def _train(self, server_round: int, clients: Sequence[str]) -> TrainedRound:
        """Have the clients train, and return the usable updates or their stand-ins.

        Raises:
            QuorumError: If there are too few.
        """
        num_rounds = self._config.federation.num_rounds
        hyperparameters = self._config.training.hyperparameters(server_round, num_rounds)
        reader = UpdateReader(self.model, self.state, self._method, self._config, server_round)
        moments = self.state.moments
        manifest = sent_manifest(self.model)
        requests = {}
        for client in clients:
            lora = reader.lora(client)
            requests[client] = train_request(
                self._config, server_round, client, hyperparameters, lora, manifest, moments
            )
        if self._secure is None:
            return self._train_openly(server_round, requests, reader, hyperparameters)
        trained, self.state = self._secure.train(
            self._exchange, self.model, self.state, server_round, requests, self._optimizer
        )
        if trained.summed is not None and trained.summed.means is not None:
            # Clients need it again for their next task.
            means = trained.summed.means
            self._directory.put({means.name: means.data})
        return trained

    def _train_openly(
        self,
        server_round: int,
        requests: Mapping[str, TrainRequest],
        reader: UpdateReader,
        hyperparameters: LocalTraining,
    ) -> TrainedRound:
        """Have the clients train and send their updates; return the usable ones.

        Raises:
            QuorumError: If there are too few.
        """
        screening = None
        if self._steps.screening:
            rate = hyperparameters.learning_rate
            screening = Screening(self._config, self._method, server_round, rate)
        store = self._directory.updates
        collector = UpdateCollector(reader, store, screening, self._optimizer, self.state.moments)
        ranks = {client: reader.rank(client) for client in requests}

        replies, self.state = self._exchange.ask(
            self.model, self.state, requests, server_round, collector.accept
        )
        updates = collector.updates
        screened = screening.reject_outliers(updates, replies.failures) if screening else {}
        for client, reason in replies.failures.items():
            LOG.warning("round %d: %s is left out: %s", server_round, client, reason)
        fraction = self._config.federation.min_valid_fraction
        check_quorum(server_round, len(updates), len(requests), fraction, replies.failures)
        if self._method.prunes:
            next_ranks = {client: next_rank(replies.replies[client]) for client in updates}
            self.state = replace(self.state, ranks={**self.state.ranks, **next_ranks})
        return TrainedRound(
            replies=replies,
            updates=dict(sorted(updates.items())),
            ranks=ranks,
            learning_rate=hyperparameters.learning_rate,
            factors=self._method.trained_factors(server_round),
            screening=screened,
            moments=collector.moments,
        )

    # ── aggregating ──

    def _aggregate(self, server_round: int, trained: TrainedRound) -> AggregatedRound:
        """Combine the updates module by module with the run's method."""
        max_weight = self._config.federation.max_client_weight
        weights = trained.weights(max_weight)
        result = aggregate_updates(
            [trained.updates[client] for client in weights],
            list(weights.values()),
            self._method,
            RoundContext.of_round(
                server_round,
                self.model.adapter,
                self.model.carried,
                seed=self._config.run.seed,
                max_weight=max_weight,
            ),
            on_module=self._callbacks.on_aggregate,
        )
        if self._steps.update_filter is not None:
            result = self._steps.update_filter.on_server(result, server_round)
        if trained.summed is not None:
            # The stand-ins are float64 so that they lose nothing of the sums.
            result = result.to(torch.float32)
        check_aggregate(result, server_round)
        return AggregatedRound(dict(zip(weights, result.weights.tolist(), strict=True)), result)

    def _advance(self, result: AggregationResult) -> None:
        """Make the result the global model: train its adapter next, merge its residual."""
        self.model = self.model.advance(result, repr(self._method), exact=self._method.exact)

    def _advance_moments(
        self, before: GlobalModel, trained: TrainedRound, weights: Mapping[str, float]
    ) -> None:
        """Set the optimizer moments that the next round starts with, if clients share them."""
        if self._optimizer is None:
            return
        stored = self._optimizer.advance(
            self.state.moments, before.adapter, trained, weights, self.model.adapter
        )
        self._directory.put({stored.name: stored.data})
        self.state = replace(self.state, moments=stored.name)

    def _diagnose(
        self, model: GlobalModel, trained: TrainedRound, weights: Mapping[str, float]
    ) -> Diagnostics | None:
        """Measure how the round moved the model, using only the factors."""
        if not self._steps.diagnostics:
            return None
        return round_diagnostics(
            model.adapter,
            [trained.updates[client] for client in weights],
            list(weights.values()),
            self.model.adapter,
            self.model.merged_last(),
            self._directory.last_update(model, self.state),
        )

    # ── evaluating ──

    def _expected_probes(
        self,
        server_round: int,
        model: GlobalModel,
        trained: TrainedRound,
        weights: Mapping[str, float],
    ) -> ExpectedProbes | None:
        """Return what evaluating clients must measure; None without probes or one shared model."""
        seed = probe_seed(self._config, server_round)
        if self._method.personal_factors or seed is None:
            return None
        return expected_probes(trained.replies.replies, weights, model, self.model, seed)

    def _evaluate(
        self,
        server_round: int,
        clients: Sequence[str],
        expected: ExpectedProbes | None,
        summed: SummedRound | None = None,
    ) -> RoundEvaluation:
        """Ask the clients to evaluate the global model on their held-out examples."""
        if not clients:
            return RoundEvaluation()
        # An unchanged base model is not probed: there is nothing to compare with.
        is_probed = self.model.server_round > 0 or bool(self.model.base_update)
        num_examples = num_eval_examples(self._config, server_round)
        reader = UpdateReader(self.model, self.state, self._method, self._config, server_round)
        manifest = sent_manifest(self.model)
        seed = probe_seed(self._config, server_round) if is_probed else None
        num_modules = len(self.model.adapter.modules) if seed is not None else 0
        requests = {}
        for client in clients:
            means = None if summed is None else summed.kept_by(client)
            requests[client] = evaluate_request(
                self._config, reader.lora(client), manifest, num_examples, seed, means
            )
        self._callbacks.on_evaluate(list(clients))
        of_pairs = self._config.training.objective == "dpo"
        labels = self.model.base.labels

        def accept(reply: Reply) -> None:
            if self._secure is not None:
                check_ready(reply)
                return
            check_evaluation(reply, num_examples, num_modules, of_pairs=of_pairs, labels=labels)

        replies, self.state = self._exchange.ask(
            self.model, self.state, requests, server_round, accept
        )
        for client, reason in replies.failures.items():
            LOG.warning("round %d: %s gave no evaluation: %s", server_round, client, reason)
        if self._secure is not None:
            request = requests[clients[0]]
            run_id = self.state.run_id
            return self._secure.scores(run_id, summed, server_round, replies, request, labels)
        return pool_scores(replies, expected)

    # ── recording ──

    def _commit(self, record: RoundRecord) -> RoundRecord:
        """Mark the best round so far, make the round durable, and tell the callbacks."""
        is_private = self._config.privacy.dp is not None
        withheld = withheld_by(secure=self._secure is not None, private=is_private)
        record = msgspec.structs.replace(record, withheld=withheld)
        compared = None if record.evaluation is None else record.evaluation.compared
        if compared is not None and compared.num_tokens and record.round > 0:
            best_loss = self.state.best_loss
            if best_loss is None or compared.loss < best_loss:
                record = msgspec.structs.replace(record, is_best=True)
                self.state = replace(self.state, best_round=record.round, best_loss=compared.loss)
        self._directory.commit(self.model, self.state, record)
        if self._secure is not None:
            self._secure.clear()
        self._callbacks.on_round_end(record)
        return record
