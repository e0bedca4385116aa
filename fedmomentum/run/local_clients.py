"""The clients of a run in this process, on one loaded base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.base_model.library_errors import translate_out_of_memory
from fedmomentum.client.loaded_base import LoadedBase
from fedmomentum.client.local_model import LocalModel
from fedmomentum.client.private_party import PrivateParty
from fedmomentum.client.store import ClientStore
from fedmomentum.data.tokenized import EMPTY_EXAMPLES
from fedmomentum.errors import AdapterError, ConfigError
from fedmomentum.objectives.choice import make_objective
from fedmomentum.run.method import make_method
from fedmomentum.utils.seeding import derive_seed

if TYPE_CHECKING:
    from fedmomentum.client.client import Client
    from fedmomentum.config.schema import Config, LoraConfig
    from fedmomentum.data.tokenized import TokenizedClient
    from fedmomentum.global_model.objects import StoredObject
    from fedmomentum.server.callbacks import Callback
    from fedmomentum.training.function import TrainingFunction


@dataclass(frozen=True)
class LocalClients:
    """A run's clients in this process.

    Attributes:
        local: The model of clients that train the whole adapter.
        clients: The clients; those that train less have their own models on the same base.
    """

    local: LocalModel
    clients: list[Client]


def load_local_clients(
    config: Config,
    examples: Sequence[TokenizedClient],
    labels: Sequence[str],
    out: Path,
    *,
    function: TrainingFunction | None,
    callbacks: Callback,
    base: LoadedBase | None = None,
) -> LocalClients:
    """Load a run's model, and create clients that share it.

    Args:
        config: The run's settings.
        examples: The clients to create, with their examples.
        labels: A classifier's labels.
        out: The run's directory.
        function: The user's own training function, if any.
        callbacks: Receive training steps.
        base: The base model, if it is already loaded.
    """
    if base is None:
        base = LoadedBase.from_config(config.model, labels, config.lora.modules_to_save)
    with translate_out_of_memory(f"{config.model.name} with its adapter does not fit"):
        # Clients that train less have their own models, which share the base model's weights.
        local = LocalModel(
            config.model,
            config.lora,
            seed=derive_seed(config.run.seed, "adapter"),
            loaded=base,
            takes_loaded=not config.lora.clients,
        )
    clients = make_clients(config, examples, local, out, function, callbacks.on_step)
    local_models = _own_models(config, local, base, [client.client_id for client in clients])
    for client in clients:
        client.model = local_models[client.client_id]
    return LocalClients(local, clients)


def make_clients(
    config: Config,
    examples: Sequence[TokenizedClient],
    local: LocalModel,
    out: Path,
    function: TrainingFunction | None,
    on_step: Callable[[str, int, int, float], None] | None,
) -> list[Client]:
    """Create the clients with their examples, sharing one model and one cache of objects."""
    # Imported only here: commands that merely read a result have no clients.
    from fedmomentum.client.client import Client

    objective = make_objective(config.training, local.identity.labels)
    cache: dict[str, StoredObject] = {}
    clients = []
    dp = config.privacy.dp
    for one in examples:
        private = None
        if dp is not None:
            ledgers = Path(dp.ledger) if dp.ledger else out / "privacy"
            private = PrivateParty(one.client_id, dp, one.train, ledgers)
        clients.append(
            Client(
                client_id=one.client_id,
                train=one.train,
                # Scores carry no noise, so with differential privacy nothing is scored.
                test=one.test if private is None else EMPTY_EXAMPLES,
                method=make_method(config),
                model=local,
                objective=objective,
                store=ClientStore(out, retained_rounds=config.run.keep_checkpoints, cache=cache),
                training_function=function,
                on_step=on_step,
                private=private,
            )
        )
    return clients


def _own_models(
    config: Config, local: LocalModel, loaded: LoadedBase, names: Sequence[str]
) -> dict[str, LocalModel]:
    """Return each client's model: shared unless some train less, and all on one base model."""
    lora = config.lora
    # Clients with equal settings share a model.
    models: list[tuple[LoraConfig, LocalModel]] = [(lora.for_client(""), local)]
    models_by_client = {}
    for name in names:
        client_lora = lora.for_client(name)
        model = next((model for other, model in models if other == client_lora), None)
        if model is None:
            seed = derive_seed(config.run.seed, "adapter")
            what = f"{config.model.name} with the adapter of {name} does not fit"
            try:
                with translate_out_of_memory(what):
                    model = LocalModel(
                        config.model,
                        lora,
                        seed=seed,
                        client_lora=client_lora,
                        loaded=loaded,
                    )
            except (AdapterError, ConfigError) as error:
                raise ConfigError(f"lora.clients.{name}: {error}") from error
            models.append((client_lora, model))
        models_by_client[name] = model
    return models_by_client
