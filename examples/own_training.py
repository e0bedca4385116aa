"""A client's training in plain torch, instead of the trainer that comes with the package.

Run, from this directory: fedmomentum run your.toml training.function=own_training:train
"""

from collections.abc import Callable
from typing import Any

import torch

from fedmomentum.data import TokenizedExamples
from fedmomentum.objectives.objective import CAUSAL_LM
from fedmomentum.training import TrainReport


def train(
    model: torch.nn.Module,
    examples: TokenizedExamples,
    *,
    pad_token_id: int,
    learning_rate: float,
    local_steps: int,
    batch_size: int,
    seed: int,
    on_step: Callable[[int, int, float], None],
    **_: Any,
) -> TrainReport:
    """Take plain SGD steps on random batches; the trainable parameters change in place."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    device = trainable[0].device
    losses: list[float] = []
    num_tokens = 0
    for step in range(1, local_steps + 1):
        rows = torch.randint(len(examples), (batch_size,), generator=generator).tolist()
        batch = CAUSAL_LM.collate([examples.example(row) for row in rows], pad_token_id)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}

        # The mean negative log-likelihood of a completion token.
        batch_loss = CAUSAL_LM.loss(CAUSAL_LM.predict(model, batch))
        loss = batch_loss.nll / batch_loss.num_targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        losses.append(loss.item())
        num_tokens += batch_loss.num_targets
        on_step(step, local_steps, losses[-1])
    mean_loss = sum(losses) / len(losses)
    return TrainReport(mean_loss, losses[0], losses[-1], len(losses), num_tokens)
