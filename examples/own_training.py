"""A client's training in plain torch, instead of the trainer that comes with the package.

Run, from this folder: fedmomentum run your.toml training.function=own_training:train
"""

import torch
import torch.nn.functional as F

from fedmomentum.data.batches import IGNORED, completion_batch, model_inputs, next_token_pairs
from fedmomentum.training import TrainReport


def train(model, examples, *, pad_token_id, learning_rate, local_steps, batch_size, seed, on_step, **_):
    """Plain SGD on random batches; `model` is changed in place, only where it is trainable."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    losses, num_tokens = [], 0
    for step in range(1, local_steps + 1):
        rows = torch.randint(len(examples), (batch_size,), generator=generator).tolist()
        ids, prompts = [examples.input_ids[i] for i in rows], [examples.num_prompt_tokens[i] for i in rows]
        batch = {k: v.to(model.device) for k, v in completion_batch(ids, prompts, pad_token_id).items()}
        logits, labels = next_token_pairs(model(**model_inputs(model, batch)).logits, batch["labels"])
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        num_tokens += int((labels != IGNORED).sum())
        on_step(step, local_steps, losses[-1])
    return TrainReport(sum(losses) / len(losses), losses[0], losses[-1], len(losses), num_tokens)
