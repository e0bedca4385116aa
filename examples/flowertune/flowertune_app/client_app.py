"""The ClientApp: a round of local training. Two lines are not FlowerTune's, both marked."""

from __future__ import annotations

from typing import cast

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from fedmomentum.flower import apply_base_residual
from flowertune_app.dataset import batches, load_rows
from flowertune_app.models import get_model

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this client's rows, and reply with the PEFT state dict."""
    run_config = context.run_config
    partition = int(context.node_config["partition-id"])
    texts = load_rows(run_config, partition, int(context.node_config["num-partitions"]))

    model = get_model(run_config)
    receipt = apply_base_residual(model, message.content)  # 1: what earlier rounds left
    arrays = message.content.array_records["arrays"]
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())

    # plain training; a Trainer of transformers or TRL fits here
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=float(run_config["train.learning-rate"]))
    server_round = cast(int, message.content.config_records["config"]["server-round"])
    num_steps = int(run_config["train.steps"])
    total_loss = 0.0
    model.train()
    for batch in batches(texts, run_config, num_steps, seed=1000 * server_round + partition):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total_loss += loss.item()

    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord(
                {"train_loss": total_loss / num_steps, "num-examples": len(texts)}
            ),
            "receipt": receipt,  # 2: the server does not count a reply without it
        }
    )
    return Message(content, reply_to=message)
