"""Selects the objective for a configuration and base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedmomentum.objectives.classification import SequenceClassification
from fedmomentum.objectives.objective import CausalLM, Objective
from fedmomentum.objectives.preference import DPO

if TYPE_CHECKING:
    from fedmomentum.config.training import TrainingConfig


def make_objective(training: TrainingConfig, labels: Sequence[str] = ()) -> Objective:
    """Return the objective of a run.

    Args:
        training: The [training] section of the configuration.
        labels: The labels of the base model, if it is a classifier.
    """
    if labels:
        return SequenceClassification(tuple(labels))
    if training.objective == "dpo":
        return DPO(beta=training.dpo_beta)
    return CausalLM(loss_on=training.loss_on)
