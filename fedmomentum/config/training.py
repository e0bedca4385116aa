"""The section [training], and the hyperparameters that it gives a client for one round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmomentum.config.fields import option, require, require_at_least, require_choice

DEFAULT_LOCAL_STEPS = 10
"""Steps a round where a configuration gives neither steps nor epochs."""
LEARNING_RATE_SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZER_STATES = ("auto", "fresh", "shared", "shared-full", "local")
OBJECTIVES = ("sft", "dpo")
LOSS_ON = ("last", "all-assistant")


@dataclass(frozen=True)
class LocalTraining:
    """The hyperparameters of one client's local training in one round.

    `TrainingConfig.hyperparameters` makes it; it travels to the client in its training task, and
    `fedmomentum.training.trainer.train` builds the optimizer from it.

    Attributes:
        learning_rate: Learning rate of the optimizer, above 0.
        batch_size: Examples in a batch.
        local_steps: Number of optimizer steps; exactly one of this and `local_epochs` is given.
        local_epochs: Number of passes over the examples; fractions are allowed, and the result is
            rounded up to whole steps.
        arguments: Further fields of `transformers.TrainingArguments`, out of
            `fedmomentum.training.arguments.ALLOWED_ARGUMENTS`.
    """

    learning_rate: float
    batch_size: int
    local_steps: int | None = None
    local_epochs: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingConfig:
    """What each client does in a round."""

    objective: str = option(
        "sft",
        "what is learned: sft (the answers), or dpo (to prefer chosen answers to rejected ones, "
        "from rows of prompt, chosen, rejected)",
    )
    loss_on: str = option(
        "last",
        "sft: which turns of a chat are learned: last, or all-assistant (every turn of the "
        "assistant)",
    )
    dpo_beta: float = option(
        0.1, "dpo: weight of log-probabilities in rewards; if large, stays close to the base model"
    )
    local_steps: int | None = option(
        None, "optimizer steps per round; give this or local-epochs (default: 10 steps)"
    )
    local_epochs: float | None = option(None, "passes over the client's data per round")
    batch_size: int = option(8, "examples per step")
    learning_rate: float = option(1e-3, "learning rate of the first round")
    learning_rate_schedule: str = option(
        "constant", "over the rounds: constant, or linear or cosine (down to a tenth)"
    )
    optimizer_state: str = option(
        "auto",
        "what the optimizer starts a round with: fresh (nothing), shared (the mean of the clients' "
        "moments, sent as means over rows and columns), shared-full (the same, sent in full), "
        "local (each client's own moments), auto (shared if the method is made for it, else fresh)",
    )
    function: str | None = option(
        None, "your own training function, module:function; see docs/training.md"
    )
    arguments: dict[str, Any] = option(
        {}, "additional fields of transformers.TrainingArguments, e.g. weight_decay = 0.01"
    )

    def __post_init__(self) -> None:
        # A frozen dataclass has no other way to fill in a default that depends on another field.
        if self.local_steps is None and self.local_epochs is None:
            object.__setattr__(self, "local_steps", DEFAULT_LOCAL_STEPS)
        require(
            self.local_steps is None or self.local_epochs is None,
            "training.local-steps",
            self.local_steps,
            "left out where local-epochs is given",
        )
        if self.local_steps is not None:
            require_at_least("training.local-steps", self.local_steps, 1)
        if self.local_epochs is not None:
            require(self.local_epochs > 0, "training.local-epochs", self.local_epochs, "above 0")
        require_at_least("training.batch-size", self.batch_size, 1)
        require(self.learning_rate > 0, "training.learning-rate", self.learning_rate, "above 0")
        require_choice("training.optimizer-state", self.optimizer_state, OPTIMIZER_STATES)
        require_choice(
            "training.learning-rate-schedule",
            self.learning_rate_schedule,
            LEARNING_RATE_SCHEDULES,
        )
        self._check_objective()

    def _check_objective(self) -> None:
        """Refuse settings that contradict the objective."""
        require_choice("training.objective", self.objective, OBJECTIVES)
        require_choice("training.loss-on", self.loss_on, LOSS_ON)
        require(self.dpo_beta > 0, "training.dpo-beta", self.dpo_beta, "above 0")
        if self.objective == "sft":
            return
        require(
            self.loss_on == "last",
            "training.loss-on",
            self.loss_on,
            'last with objective = "dpo", which compares two last answers',
        )
        require(
            self.function is None,
            "training.function",
            self.function,
            'left out with objective = "dpo", whose loss the function would not know of',
        )
        smoothing = self.arguments.get("label_smoothing_factor", 0)
        require(
            not smoothing,
            "training.arguments.label_smoothing_factor",
            smoothing,
            'left out with objective = "dpo": it smooths the labels of tokens',
        )

    @property
    def shares_moments(self) -> bool:
        """Whether all clients start a round from the same moments of the optimizer."""
        return self.optimizer_state in ("shared", "shared-full")

    def learning_rate_at(self, server_round: int, num_rounds: int) -> float:
        """Return the learning rate of a round: constant, or decaying to a tenth in the last round.

        With p = (server_round - 1) / (num_rounds - 1): ``linear`` multiplies the first round's by
        1 - 0.9 p, ``cosine`` by 0.1 + 0.45 (1 + cos(pi p)).
        """
        # From 0 in the first round to 1 in the last.
        progress = (server_round - 1) / max(1, num_rounds - 1)
        if self.learning_rate_schedule == "linear":
            return self.learning_rate * (1 - 0.9 * progress)
        if self.learning_rate_schedule == "cosine":
            return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        return self.learning_rate

    def hyperparameters(self, server_round: int, num_rounds: int) -> LocalTraining:
        """Return the hyperparameters of every client's local training in a round."""
        return LocalTraining(
            learning_rate=self.learning_rate_at(server_round, num_rounds),
            batch_size=self.batch_size,
            local_steps=self.local_steps,
            local_epochs=self.local_epochs,
            arguments=self.arguments,
        )
