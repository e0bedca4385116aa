"""The ServerApp: FedMomentumStrategy instead of FedAvg."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict

from fedmomentum.flower import FedMomentumStrategy
from flowertune_app.models import get_model, lora_config

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; the global model is saved after each."""
    run_config = context.run_config
    min_nodes = int(run_config["strategy.min-nodes"])
    strategy = FedMomentumStrategy(
        lora_config(run_config),
        method=str(run_config["strategy.method"]),
        base_model=str(run_config["model.name"]),
        save_to=str(run_config["save-to"]),
        fraction_train=float(run_config["strategy.fraction-train"]),
        fraction_evaluate=0.0,
        min_train_nodes=min_nodes,
        min_available_nodes=min_nodes,
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(get_model(run_config))),
        num_rounds=int(run_config["num-server-rounds"]),
    )
