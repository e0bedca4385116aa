"""One client's data and model, from its own configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fedmomentum.base_model.library_errors import translate_out_of_memory
from fedmomentum.client.local_model import LocalModel
from fedmomentum.errors import ConfigError
from fedmomentum.formats.manifest import as_manifest
from fedmomentum.protocol.adapter_terms import ClientLora
from fedmomentum.protocol.codec import encode_task
from fedmomentum.protocol.messages import Task
from fedmomentum.run.client_examples import tokenize_clients
from fedmomentum.run.local_clients import make_clients
from fedmomentum.run.method import make_method
from fedmomentum.run.privacy_checks import check_privacy
from fedmomentum.run.private_checks import check_private_client, choose_private_dtype
from fedmomentum.run.setup import (
    load_data,
    refuse_devices,
    set_up_process,
    training_function,
)
from fedmomentum.run.task import check_task, require_labels
from fedmomentum.run.training_checks import check_dropout, check_sampling, choose_optimizer_state
from fedmomentum.server.callbacks import Callback
from fedmomentum.server.round_data import train_request
from fedmomentum.training.arguments import check_arguments
from fedmomentum.training.optimizer import check_can_be_made
from fedmomentum.utils.seeding import derive_seed

if TYPE_CHECKING:
    from fedmomentum.client.client import Client
    from fedmomentum.config.schema import Config


def client_names(config: Config) -> list[str]:
    """Return the names of the clients among which the configuration divides the data, sorted."""
    return sorted(config.data.client_files) or [client.client_id for client in load_data(config)]


def prepare_client(
    config: Config,
    client_id: str,
    store: Path,
    *,
    local: LocalModel | None = None,
    callbacks: Callback = Callback(),  # noqa: B008 (it does nothing)
) -> Client:
    """Read one client's own data and load its model, for a run over a network.

    Args:
        config: The client's own configuration; `[model]`, `[lora]`, `[data]`, `[training]` and
            `[run]` matter here.
        client_id: The client. With several `data.client-files`, only its own is read; a source that
            is divided among clients is read in full to take this client's share.
        store: Directory for the objects that it is sent; created if it does not exist.
        local: The model, if this process has already loaded it.
        callbacks: Receive training steps, and short messages on progress.

    Raises:
        ConfigError: If settings contradict each other, or name no data for this client.
        DataError: If data cannot be used.
        ModelError: If the base model cannot be loaded.
    """
    # Check the settings before anything is read or loaded.
    refuse_devices(config)
    check_arguments(config.training.arguments)
    check_can_be_made(config.training, config.federation.num_rounds)
    check_sampling(config.training)
    check_task(config)
    config = choose_private_dtype(config)
    check_privacy(config, make_method(config))
    check_private_client(config)
    require_labels(config.model)
    check_dropout(config)
    function = training_function(config)
    set_up_process(config.run)
    # Read only this client's data.
    if (files := config.data.client_files) and client_id in files:
        config = replace(
            config, data=replace(config.data, client_files={client_id: files[client_id]})
        )
    elif files:
        raise ConfigError(
            f"data.client-files names {', '.join(sorted(files))}; this client is {client_id}"
        )
    callbacks.on_message("Reading the data")
    data = {client.client_id: client for client in load_data(config)}
    if client_id not in data:
        raise ConfigError(
            f"the data is divided among {', '.join(data)}; this client is {client_id}"
        )
    # Load the model, with this client's adapter.
    if local is None:
        callbacks.on_message(f"Loading {config.model.name}")
        client_lora = config.lora.for_client(client_id)
        seed = derive_seed(config.run.seed, "adapter")
        with translate_out_of_memory(f"{config.model.name} with its adapter does not fit"):
            local = LocalModel(config.model, config.lora, seed=seed, client_lora=client_lora)
    examples = tokenize_clients(
        config,
        [data[client_id]],
        local.peft.get_base_model(),
        local.tokenizer,
        local.identity.labels,
    )
    (client,) = make_clients(config, examples, local, store, function, callbacks.on_step)
    client.store.is_private = True
    return client


def smoke_test_task(config: Config, client: Client) -> bytes:
    """Return a task that trains the base model for one step, like a task of the first round."""
    config = choose_optimizer_state(config, client.method)
    local = client.model
    model = local.initial_global_model(client.method)
    lora = ClientLora.of(local.client_lora, local.is_mixed or client.method.prunes)
    manifest = as_manifest(model.manifest(), "the base model")
    hyperparameters = config.training.hyperparameters(1, config.federation.num_rounds)
    request = train_request(config, 1, client.client_id, hyperparameters, lora, manifest)
    one_step = msgspec.structs.replace(request, local_steps=1, local_epochs=None)
    terms = request.private
    if terms is not None and terms.epsilon is None and terms.noise_multiplier is None:
        # The server will choose the noise; nothing leaves this machine, so any value will do.
        terms = msgspec.structs.replace(terms, noise_multiplier=1.0)
        one_step = msgspec.structs.replace(one_step, private=terms)
    return encode_task(Task("smoke-test", client.client_id, 1, one_step, model.objects()))
