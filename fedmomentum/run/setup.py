"""From a configuration to its method, data, tokenized examples, and a checked output directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedmomentum.aggregation.registry import build_method
from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.base_model.library_errors import translate_out_of_memory
from fedmomentum.client.loaded_base import LoadedBase
from fedmomentum.client.local_model import LocalModel
from fedmomentum.client.private_party import PrivateParty
from fedmomentum.client.store import ClientStore
from fedmomentum.config.toml import LOCATIONS, MAY_CHANGE, changed_keys
from fedmomentum.data.client_data import load_clients
from fedmomentum.data.tokenized import EMPTY_EXAMPLES
from fedmomentum.errors import AdapterError, ConfigError, ModelError
from fedmomentum.formats.directories import read_manifest, retained_rounds, round_file
from fedmomentum.global_model.client_state import ClientStateFiles
from fedmomentum.global_model.local_moments import LocalMoments
from fedmomentum.global_model.personal import personal_states
from fedmomentum.global_model.start import start_from
from fedmomentum.lora.peft_folder import read_adapter
from fedmomentum.objectives.choice import make_objective
from fedmomentum.run.client_examples import TokenizedClient, tokenize_parties
from fedmomentum.run.origin import check_data, fingerprints, follow, refuse_missing
from fedmomentum.run.outline import ModelOutline, outline_model
from fedmomentum.run.privacy_checks import check_num_clients, check_privacy
from fedmomentum.run.private_checks import check_private_run, choose_private_dtype
from fedmomentum.run.task import check_task, find_labels
from fedmomentum.run.tracking import check_trackers
from fedmomentum.run.training_checks import check_dropout, choose_optimizer_state
from fedmomentum.server.saved_run import committed_records, saved_settings
from fedmomentum.training.arguments import check_arguments
from fedmomentum.utils.plugins import import_object
from fedmomentum.utils.seeding import derive_seed

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.client.client import Client
    from fedmomentum.config.schema import Config, LoraConfig, RunConfig
    from fedmomentum.data.examples import ClientData
    from fedmomentum.formats.manifest import Fingerprint
    from fedmomentum.formats.round_record import RoundRecord
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.global_model.objects import StoredObject
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.server.callbacks import Callback
    from fedmomentum.training.function import TrainingFunction


@dataclass(frozen=True)
class RunOutline:
    """What a run on this machine is made of, before the weights of its model are loaded.

    Attributes:
        config: The run's settings.
        method: Combines the clients' adapters.
        function: Trains a client's model, where the user gives one.
        model: The shapes of the model.
        examples: The clients' examples as tokens.
        parties: The same as texts.
        data: The fingerprints of both.
        start_adapter: What `lora.start-from` names.
    """

    config: Config
    method: Method
    function: TrainingFunction | None
    model: ModelOutline
    examples: list[TokenizedClient]
    parties: list[ClientData]
    data: dict[str, Fingerprint]
    start_adapter: Adapter | None = None


@dataclass(frozen=True)
class LoadedRun:
    """What a run on this machine is made of, before its directory is opened."""

    outline: RunOutline
    local: LocalModel
    clients: list[Client]


def check_made_from(
    out: Path, server_round: int, outline: RunOutline, identity: BaseIdentity
) -> None:
    """Refuse to continue from a round with another base, other data, or missing personal factors.

    Raises:
        DataError: If the data is other data.
        ModelError: If the base is another, a client's own factors are missing or damaged, or the
            checkpoint is.
    """
    if server_round not in retained_rounds(out):
        return  # for `RunDirectory.resume` to say
    manifest = read_manifest(round_file(out, server_round))
    BaseIdentity.of(manifest.base).check(identity)
    check_data(out, outline.data, server_round)
    has_moments = outline.config.training.optimizer_state == "local"
    has_factors = bool(outline.method.personal_factors)
    if manifest.run is None or not (has_moments or has_factors):
        return
    last_trained = _last_trained(committed_records(out, server_round))
    if has_factors:
        personal_states(out, manifest.run.run_id).check(last_trained)
    if has_moments:
        ClientStateFiles(out, manifest.run.run_id, LocalMoments).check(last_trained)


def outline_run(
    config: Config,
    out: Path,
    *,
    resume: bool,
    server_round: int | None = None,
    is_plan: bool = False,
    callbacks: Callback,
) -> RunOutline:
    """Check the settings, read the data, and outline the model: all but its weights."""
    # Cheap checks come first: nothing is loaded for a configuration that cannot run.
    method = make_method(config)
    check_arguments(config.training.arguments)
    config = choose_private_dtype(choose_optimizer_state(config, method))
    check_task(config)
    check_privacy(config, method)
    check_private_run(config)
    check_dropout(config)
    check_trackers(config.run.report_to)
    function = training_function(config)
    if resume:
        config = follow(config, out)
        refuse_missing(config)
    if resume or not is_plan:
        check_run_directory(config, out, resume, server_round)
    start_adapter = None if resume else read_start_adapter(config)
    set_up_process(config.run)
    # Data before the model: its mistakes are more frequent, and it is quicker to read.
    callbacks.on_message("Reading the data")
    parties = load_data(config)
    check_num_clients(config, len(parties))
    labels = find_labels(config.model, parties)
    model = outline_model(config, labels, is_plan=is_plan)
    examples = tokenize_parties(config, parties, model.base, model.tokenizer, labels)
    data = fingerprints(parties, {one.client_id: (one.train, one.test) for one in examples})
    return RunOutline(config, method, function, model, examples, parties, data, start_adapter)


def load_run(outline: RunOutline, out: Path, callbacks: Callback) -> LoadedRun:
    """Load the model of a run, and make its clients; see `prepare`."""
    config = outline.config
    callbacks.on_message(f"Loading {config.model.name}")
    labels = outline.model.labels
    base = outline.model.loaded
    if base is None:
        base = LoadedBase.from_config(config.model, labels, config.lora.modules_to_save)
    with translate_out_of_memory(f"{config.model.name} with its adapter does not fit"):
        # Clients that train less have models of their own, which share the base model's weights.
        local = LocalModel(
            config.model,
            config.lora,
            seed=derive_seed(config.run.seed, "adapter"),
            loaded=base,
            takes_loaded=not config.lora.clients,
        )
    clients = make_clients(
        config, outline.examples, local, out, outline.function, callbacks.on_step
    )
    local_models = _own_models(config, local, base, [client.client_id for client in clients])
    for client in clients:
        client.model = local_models[client.client_id]
    return LoadedRun(outline, local, clients)


def set_up_process(run: RunConfig) -> None:
    """Have torch use so many threads, 0 as many as there are cores; and deterministic kernels.

    Operations of a GPU that have none raise an error then, which names them.
    """
    torch.set_num_threads(run.threads if run.threads > 0 else os.cpu_count() or 1)
    if run.deterministic:
        # Read when cuBLAS is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(run.deterministic)


def _last_trained(records: Sequence[RoundRecord]) -> dict[str, int]:
    """Return each client whose training counted, with the last round in which it did."""
    last_rounds = {}
    for record in records:
        for client in record.accepted:
            last_rounds[client] = record.round
    return last_rounds


def _own_models(
    config: Config, local: LocalModel, loaded: LoadedBase, names: Sequence[str]
) -> dict[str, LocalModel]:
    """Return each client's model: one for all, unless some train less; all on one base model."""
    lora = config.lora
    unknown_clients = sorted(set(lora.clients) - set(names))
    if unknown_clients:
        raise ConfigError(
            f"lora.clients names {unknown_clients[0]}, which is no client; there are "
            f"{', '.join(names)}"
        )
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


def make_method(config: Config) -> Method:
    """Build the method of the configuration.

    Raises:
        ConfigError: If a name or setting is unknown, or the method refuses a value.
    """
    method = build_method(
        config.method.name, {k.replace("-", "_"): v for k, v in config.method.settings.items()}
    )
    if config.lora.is_mixed and not method.unequal_ranks:
        raise ConfigError(
            f"{method.title} needs every client at one rank; lora.clients gives several"
        )
    if method.reads_base and config.federation.downlink_dtype != "float32":
        raise ConfigError(
            f"{method.title} starts from the base's own directions; they need downlink-dtype "
            "float32"
        )
    return method


def read_start_adapter(config: Config) -> Adapter | None:
    """Read the adapter that `lora.start-from` names, if it names one.

    Clients are sent it like any global model, so only the server reads the directory. The first
    checkpoint names its factors by their hash; a resumed run does not read it again.

    Raises:
        AdapterError: If it cannot be read; the message names the setting.
    """
    if config.lora.start_from is None:
        return None
    return read_adapter(config.lora.start_from, name="the adapter of lora.start-from")


def with_start_adapter(given: Adapter | None, method: Method, model: GlobalModel) -> GlobalModel:
    """Return the model of round 0 with the given adapter, if there is one.

    Raises:
        AdapterError: If it does not fit the run.
    """
    if given is None:
        return model
    return start_from(model, given, is_merged=method.fresh or method.reads_base)


def training_function(config: Config) -> TrainingFunction | None:
    """Return the user's `module:function`; None for our trainer."""
    if config.training.function is None:
        return None
    function: TrainingFunction = import_object(config.training.function, "training.function")
    return function


def check_run_directory(
    config: Config,
    out: Path,
    resume: bool,
    server_round: int | None = None,
    *,
    data_counts: bool = True,
) -> None:
    """Refuse a used directory for a new run, and other settings for a resumed one."""
    if not resume:
        if (out / "config.toml").is_file() or retained_rounds(out):
            raise ModelError(
                f"{out} holds a run already; continue it with --resume, or choose another --out"
            )
        if out.is_dir() and any(
            file.name not in (".lock", "rounds", "server.log", "status.json")
            for file in out.iterdir()
        ):
            raise ModelError(f"{out} is not empty and holds no run; choose another --out")
        return
    began = saved_settings(out, server_round)
    if began is None:
        return
    # Paths may change, since the content they lead to is compared.
    if data_counts:
        changed = changed_settings(began, config, MAY_CHANGE)
    else:
        keys = [key for key in changed_keys(began, config) if key not in MAY_CHANGE]
        changed = [key for key in keys if not key.startswith("data.")]
    # The noise was chosen for the rounds that the run began with.
    dp = config.privacy.dp
    is_longer = config.federation.num_rounds > began.federation.num_rounds
    if is_longer and dp is not None and dp.epsilon is not None:
        changed.append("federation.num-rounds (the noise was chosen for privacy.dp.epsilon)")
    if changed:
        raise ConfigError(
            f"{out} was made with other settings; these differ: {', '.join(changed)}. Resume with "
            f"its own settings, {out / 'config.toml'} as the run wrote it (its checkpoints hold "
            "them too), or start over in another --out"
        )


def changed_settings(saved: Config, config: Config, may_change: Collection[str]) -> list[str]:
    """Return the keys of the settings that differ, except those that may change and paths.

    The content that paths lead to is compared elsewhere; which clients have files is compared here.
    """
    allowed = {*may_change, *LOCATIONS}
    changed = [key for key in changed_keys(saved, config) if key not in allowed]
    if saved.data.client_files.keys() != config.data.client_files.keys():
        changed.append("data.client-files")
    return changed


def load_data(config: Config) -> list[ClientData]:
    """Load every client's examples, as `[data]` names them.

    Raises:
        ConfigError: If no data is named.
        DataError: If data cannot be used.
    """
    dp = config.privacy.dp
    return load_clients(
        config.data,
        derive_seed(config.run.seed, "data"),
        loss_on=config.training.loss_on,
        task=config.model.task,
        unit_column=None if dp is None else dp.unit_column,
    )


def make_clients(
    config: Config,
    examples: Sequence[TokenizedClient],
    local: LocalModel,
    out: Path,
    function: TrainingFunction | None,
    on_step: Callable[[str, int, int, float], None] | None,
) -> list[Client]:
    """Return the clients with their examples, on one model and with one cache of objects."""
    # Imported where there are clients: who only reads a result has none.
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
                # Scores have no noise: with privacy nothing is scored.
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
