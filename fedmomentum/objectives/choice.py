"""The objective that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmomentum.objectives.objective import CausalLM, Objective
from fedmomentum.objectives.preference import DPO

if TYPE_CHECKING:
    from fedmomentum.config.training import TrainingConfig


def make_objective(training: TrainingConfig) -> Objective:
    """Return what a run trains and scores on."""
    if training.objective == "dpo":
        return DPO(beta=training.dpo_beta)
    return CausalLM(loss_on=training.loss_on)
