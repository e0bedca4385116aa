"""`FedMomentumStrategy`: exact LoRA aggregation for Flower apps that send PEFT state dicts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from fedmomentum.aggregation.method import Method
from fedmomentum.aggregation.registry import build_method
from fedmomentum.errors import ConfigError, QuorumError
from fedmomentum.flower.peft_arrays import RESIDUAL_KEY, STATE_KEY, digest
from fedmomentum.flower.peft_replies import Replies, common_metrics, read_replies
from fedmomentum.flower.strategy_state import StrategyState
from fedmomentum.lora.adapter_config import json_value
from fedmomentum.lora.peft_config import check_config

if TYPE_CHECKING:
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.lora.peft_model import LoraConfig


LOG = logging.getLogger("flwr")
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
"""An evaluation on the server: round and arrays to metrics."""


class FedMomentumStrategy(FedAvg):
    """Aggregates products `B A` exactly, where FedAvg averages the factors.

    The arrays are the PEFT state dict that FedAvg would send, with the same names and dtypes. What
    an adapter of that rank cannot hold is the base residual: train and evaluate messages hold it
    in a second `ArrayRecord`, summed over all rounds, and clients add it to their base weights with
    `apply_base_residual`. A reply that does not confirm this does not count.

    Args:
        lora_config: The configuration of the clients' adapter, which determines its scaling: a PEFT
            `LoraConfig` or its fields.
        method: A method, or the name of one with default settings. If clients do not call
            `apply_base_residual`, use a method that leaves no residual:
            `FedMomentum(residual="carried")` adds it to the next round's sum, and `flexlora` drops
            it and reports its norm.
        base_model: The base model's directory or Hub name, for exports; by default that of
            `lora_config`.
        min_valid_fraction: The fraction of the sampled nodes that must reply with a valid update;
            otherwise the run stops.
        save_to: A directory to which the global model is written after every round.
        seed: The seed for methods that sample random numbers.
        **options: FedAvg's arguments.

    Raises:
        ConfigError: If the method needs more from clients than PEFT state dicts, or a setting is
            out of range.
        AdapterError: If the configuration means anything but `W + scaling * B A`.
    """

    def __init__(
        self,
        lora_config: LoraConfig | Mapping[str, Any],
        method: Method | str = "fedmomentum",
        *,
        base_model: str = "",
        min_valid_fraction: float = 0.5,
        save_to: Path | str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 < min_valid_fraction <= 1:
            raise ConfigError(f"min_valid_fraction must be in (0, 1]; got {min_valid_fraction!r}")
        live: Any = lora_config  # PEFT's classes are not typed
        fields = lora_config if isinstance(lora_config, Mapping) else live.to_dict()
        self.config: Mapping[str, Any] = json_value(fields)
        check_config(self.config, "lora_config")
        self.method = build_method(method, {}) if isinstance(method, str) else method
        _check_method(self.method)
        self.base_model = base_model
        self.min_valid_fraction = min_valid_fraction
        self.save_to = save_to
        self.seed = seed
        self.state: StrategyState | None = None
        self._arrays_digest = ""
        self._sent: list[Metadata] = []
        self._has_given_residual = False

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the rounds as FedAvg does.

        `evaluate_fn` gets only the adapter's arrays. The model of a round is that adapter on the
        base with `residual_content` applied; a warning is logged if `evaluate_fn` leaves it out.
        """
        return super().start(
            grid,
            initial_arrays,
            num_rounds,
            timeout,
            train_config,
            evaluate_config,
            None if evaluate_fn is None else self._watched(evaluate_fn),
        )

    def _watched(self, evaluate_fn: EvaluateFn) -> EvaluateFn:
        """Return the function with a warning if it does not ask for the base residual."""

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            self._has_given_residual = False
            metrics = evaluate_fn(server_round, arrays)
            has_residual = self.state is not None and bool(self.state.residual)
            if has_residual and not self._has_given_residual:
                LOG.warning(
                    "evaluate_fn scored round %d without the base residual, which is another model "
                    "than the clients'. Call apply_base_residual(model, "
                    "strategy.residual_content()) in it",
                    server_round,
                )
            return metrics

        return evaluate

    # ── sending ──

    def summary(self) -> None:
        """Log the strategy's settings."""
        super().summary()
        LOG.info("\t└──> Aggregation: %r", self.method)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return FedAvg's messages with the base residual in them.

        Raises:
            ConfigError: If the arrays are not those of the previous round.
            AdapterError: If the first arrays are not the configured adapter.
        """
        self._follow(arrays)
        return self._with_residual(super().configure_train(server_round, arrays, config, grid))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return FedAvg's messages with the base residual in them; see `configure_train`."""
        self._follow(arrays)
        return self._with_residual(super().configure_evaluate(server_round, arrays, config, grid))

    def _follow(self, arrays: ArrayRecord) -> None:
        """Start with the first arrays; after that, accept only the state's own."""
        found = digest(arrays)
        if self.state is None:
            self._set_state(StrategyState.of(arrays, self.config))
            self._arrays_digest = found
        elif found != self._arrays_digest:
            raise ConfigError(
                "these arrays are not those that the strategy returned last, whose base residual "
                "it holds; use a new strategy for a new run, and load() to continue one"
            )

    def _set_state(self, state: StrategyState) -> ArrayRecord:
        """Adopt a state and return its arrays."""
        arrays = state.arrays()
        self.state = state
        self._arrays_digest = digest(arrays)
        return arrays

    def _with_residual(self, messages: Iterable[Message]) -> list[Message]:
        residual = _residual_content(self._require_state())
        messages = list(messages)
        for message in messages:
            message.content.update(residual)
        # the grid will write message ids into these
        self._sent = [message.metadata for message in messages]
        return messages

    # ── receiving ──

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next adapter's arrays and the metrics of the round.

        The metrics are FedAvg's averages of those that all replies have, and the strategy's own:
        `accepted-nodes`, `rejected-nodes`, and Frobenius norms over all modules: of the next
        adapter, of what is added to the base in this round (`residual-norm`), of what is carried
        over to the next sum (`carried-norm`), and of what is lost (`dropped-norm`).

        Raises:
            QuorumError: If too few replies are valid; the message gives each node's reason.
            ConfigError: If there is a base residual and no client applies it.
            AdapterError: If the method rejects the adapters.
        """
        state = self._require_state()
        if self.fraction_train == 0:
            return None, None
        found = self._read(replies, is_train=True)
        num_nodes = len(found.accepted) + len(found.rejected)
        if len(found.accepted) < max(1, self.min_valid_fraction * num_nodes):
            raise QuorumError(
                f"round {server_round}: {len(found.accepted)} of {num_nodes} nodes replied with a "
                f"valid update, fewer than min_valid_fraction {self.min_valid_fraction:g}. "
                f"{found.describe_rejected() or 'No node was asked'}"
            )
        adapters = [reply.adapter for reply in found.accepted if reply.adapter is not None]
        weights = [reply.weight for reply in found.accepted]
        next_state, measures = state.advance(adapters, weights, self.method, self.seed)
        # detect clients that will not apply the residual before the first one is sent
        if next_state.residual and all(reply.applied is None for reply in found.accepted):
            raise ConfigError(
                f"round {server_round}: {self.method!r} leaves a base residual, and no client "
                "confirms that it applies one. Call apply_base_residual(model, message.content) in "
                "the ClientApp and put what it returns into the reply; or take a method without, "
                'such as FedMomentum(residual="carried")'
            )
        if self.save_to is not None:
            self._model(next_state).save(self.save_to)
        arrays = self._set_state(next_state)
        metrics = self.train_metrics_aggr_fn(common_metrics(found.accepted), self.weighted_by_key)
        metrics["accepted-nodes"] = len(found.accepted)
        metrics["rejected-nodes"] = len(found.rejected)
        metrics.update(measures)
        return arrays, metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the average of the metrics that all valid replies have."""
        if not self._sent:
            return None
        found = self._read(replies, is_train=False)
        if not found.accepted:
            return None
        records = common_metrics(found.accepted)
        return self.evaluate_metrics_aggr_fn(records, self.weighted_by_key)

    def _read(self, messages: Iterable[Message], *, is_train: bool) -> Replies:
        """Read the replies and log the rejected nodes."""
        state = self._require_state()
        found = read_replies(
            messages,
            self._sent,
            self.weighted_by_key,
            residual=digest(state.residual_arrays()) if state.residual else None,
            form=state.form if is_train else None,
        )
        self._sent = []
        kind = "train" if is_train else "evaluate"
        LOG.info("aggregate_%s: %d replies count", kind, len(found.accepted))
        for node_id, reason in sorted(found.rejected.items()):
            LOG.warning("\t> node %d does not count: %s", node_id, reason)
        return found

    # ── the global model ──

    def residual_content(self) -> RecordDict:
        """Return the base residual that belongs to the last arrays, as messages to clients hold it.

        Give it to `apply_base_residual`. Before the first round it is empty, and changes nothing.
        """
        self._has_given_residual = True
        return RecordDict() if self.state is None else _residual_content(self.state)

    def save(self, directory: Path | str) -> None:
        """Write the global model for `fedmomentum export`, `inspect` and the other commands.

        The saved model is in float32.

        Raises:
            ConfigError: If no round has begun.
        """
        self._model(self._require_state()).save(directory)

    def load(self, directory: Path | str, initial_arrays: ArrayRecord) -> ArrayRecord:
        """Continue from a saved global model.

        Args:
            directory: A directory written by `save`.
            initial_arrays: A state dict of the same adapter, which gives the form of its arrays.

        Returns:
            The arrays to start with. Flower counts rounds from 1 again; the method does not.

        Raises:
            ModelError: If the directory does not hold a global model of this adapter and method.
        """
        form = StrategyState.of(initial_arrays, self.config).form
        return self._set_state(StrategyState.load(directory, form, self.method))

    def _model(self, state: StrategyState) -> GlobalModel:
        return state.to_model(self.method, self.base_model)

    def _require_state(self) -> StrategyState:
        if self.state is None:
            raise ConfigError("the strategy has no arrays yet; call start(), or load()")
        return self.state


def _residual_content(state: StrategyState) -> RecordDict:
    """Return a state's base residual, if there is one, and which it is, as messages hold them."""
    record = state.residual_arrays()
    which = ConfigRecord({"round": state.server_round, "sha256": digest(record)})
    content = RecordDict({STATE_KEY: which})
    if record:
        content[RESIDUAL_KEY] = record
    return content


def _check_method(method: Method) -> None:
    """Reject a method that needs clients to do more than train and send both factors.

    Raises:
        ConfigError: If it does; the message says what it needs.
    """
    needs = ""
    if method.personal_factors:
        needs = f"factors {method.personal_factors} that stay with each client"
    elif method.reads_base:
        needs = "the base weights on the server"
    elif method.prunes:
        needs = "clients whose ranks change"
    elif type(method).penalty is not Method.penalty:
        needs = "a term in the clients' loss"
    elif any(method.trained_factors(number) != "BA" for number in (1, 2)):
        needs = "clients that train one factor at a time"
    if needs:
        raise ConfigError(
            f"{method.title or method!r} needs {needs}, which an app with PEFT state dicts does "
            "not give; use `fedmomentum run` or `serve` for it"
        )
