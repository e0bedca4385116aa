"""A bare AdamW loop as `[training] function`: for models whose step takes milliseconds.

Setting up the package's trainer costs as much as a few steps of such a model.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmomentum.aggregation.moments import Moments
from fedmomentum.training import TrainReport
from fedmomentum.training.function import OnStep, Penalty
from fedmomentum.training.optimizer_state import read_moments, set_moments, trained_parameters

BatchLoss = Callable[[list[int]], tuple[Tensor, int]]
"""Returns the mean loss of the examples with these indices, and how many targets it is over."""
StartOptimizer = Callable[[Optimizer, Mapping[str, nn.Parameter], Mapping[str, Moments]], None]
"""Makes an optimizer of named parameters continue from moments, as `set_moments` does."""


def train_plainly(
    model: nn.Module,
    batch_loss: BatchLoss,
    *,
    num_examples: int,
    learning_rate: float,
    local_steps: int,
    batch_size: int,
    seed: int,
    on_step: OnStep,
    penalty: Penalty | None = None,
    moments: Mapping[str, Moments] | None = None,
    start_optimizer: StartOptimizer = set_moments,
) -> TrainReport:
    """Train with AdamW on shuffled batches, gradients clipped to norm 1.

    Args:
        model: The model; its parameters that have `requires_grad` are trained.
        batch_loss: The loss of a batch.
        num_examples: Number of examples of the client.
        learning_rate: See `fedmomentum.training.function.TrainingKeywords`, as for all that follow.
        local_steps: Number of optimizer steps.
        batch_size: Examples in a batch.
        seed: Seed of the batches.
        on_step: Called after each step.
        penalty: Added to the loss of every step.
        moments: The moments that the optimizer starts from.
        start_optimizer: Gives them to it.
    """
    by_name = trained_parameters(model)
    parameters = list(by_name.values())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    if moments is not None:
        start_optimizer(optimizer, by_name, moments)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses: list[float] = []
    num_targets = 0
    for step in range(1, local_steps + 1):
        while len(order) < min(batch_size, num_examples):
            order += torch.randperm(num_examples, generator=generator).tolist()
        rows = order[:batch_size]
        order = order[batch_size:]
        loss, count = batch_loss(rows)
        total = loss + penalty() if penalty else loss
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        num_targets += count
        on_step(step, local_steps, losses[-1])
    return TrainReport(
        loss=sum(losses) / len(losses),
        first_loss=losses[0],
        last_loss=losses[-1],
        num_steps=len(losses),
        num_tokens=num_targets,
        moments=None if moments is None else read_moments(optimizer, by_name),
    )
