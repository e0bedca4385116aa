"""From a configuration to its method, data, tokenized examples, and a checked output directory."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.config.toml import LOCATIONS, MAY_CHANGE, changed_keys
from fedmomentum.data.client_data import load_clients
from fedmomentum.data.tokenized import TokenizedClient
from fedmomentum.errors import AdapterError, ConfigError, ModelError
from fedmomentum.formats.directories import read_manifest, retained_rounds, round_file
from fedmomentum.formats.run_files import RUN_LOG, SERVER_LOG
from fedmomentum.formats.status_file import STATUS_FILE
from fedmomentum.global_model.base_loading import base_of_adapter
from fedmomentum.global_model.client_state import ClientStateFiles
from fedmomentum.global_model.local_moments import LocalMoments
from fedmomentum.global_model.personal import personal_states
from fedmomentum.global_model.start_adapter import add_start_adapter
from fedmomentum.lora.base_names import base_and_revision
from fedmomentum.lora.hub_adapter import find_adapter
from fedmomentum.lora.peft_folder import read_adapter
from fedmomentum.run.client_examples import tokenize_clients
from fedmomentum.run.method import make_method
from fedmomentum.run.origin import check_data, fingerprints, refuse_missing, with_moved_paths
from fedmomentum.run.outline import ModelOutline, outline_model
from fedmomentum.run.privacy_checks import check_num_clients, check_privacy
from fedmomentum.run.private_checks import check_private_run, choose_private_dtype
from fedmomentum.run.task import check_task, find_labels
from fedmomentum.run.tracking import check_trackers
from fedmomentum.run.training_checks import check_dropout, check_sampling, choose_optimizer_state
from fedmomentum.server.saved_run import committed_records, saved_method, saved_settings
from fedmomentum.training.arguments import check_arguments
from fedmomentum.training.optimizer import check_can_be_made
from fedmomentum.utils.plugins import import_object
from fedmomentum.utils.process import available_cpus
from fedmomentum.utils.seeding import derive_seed

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config, RunConfig
    from fedmomentum.data.examples import ClientData
    from fedmomentum.formats.manifest import Fingerprint
    from fedmomentum.formats.round_record import RoundRecord
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.server.callbacks import Callback
    from fedmomentum.training.function import TrainingFunction

LOG = logging.getLogger("fedmomentum")


@dataclass(frozen=True)
class RunOutline:
    """Everything about a run on this machine, before the weights of its model are loaded.

    Attributes:
        config: The run's settings.
        method: Combines the clients' adapters.
        function: The user's own training function, if any.
        model: The shapes of the model.
        examples: The clients' examples as tokens.
        client_data: The same examples as text.
        data: The fingerprints of both.
        start_adapter: The adapter that `lora.start-from` names, if any.
    """

    config: Config
    method: Method
    function: TrainingFunction | None
    model: ModelOutline
    examples: list[TokenizedClient]
    client_data: list[ClientData]
    data: dict[str, Fingerprint]
    start_adapter: Adapter | None = None


def check_made_from(
    out: Path, server_round: int, outline: RunOutline, identity: BaseIdentity
) -> None:
    """Refuse to continue from a round with another base, other data, or missing personal factors.

    Raises:
        DataError: If the data differs.
        ModelError: If the base differs, a client's own factors or moments are missing or damaged,
            or the checkpoint is damaged.
    """
    if server_round not in retained_rounds(out):
        return  # `RunDirectory.resume` reports this
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
    """Check the settings, read the data, and outline the model without loading its weights."""
    # Cheap checks come first, so that nothing is loaded for a configuration that cannot run.
    method = make_method(config)
    check_arguments(config.training.arguments)
    check_can_be_made(config.training, config.federation.num_rounds)
    check_sampling(config.training)
    config = choose_private_dtype(choose_optimizer_state(config, method))
    check_task(config)
    check_privacy(config, method)
    check_private_run(config)
    check_dropout(config)
    check_trackers(config.run.report_to)
    function = training_function(config)
    if resume:
        config = with_moved_paths(config, out)
        refuse_missing(config)
    if resume or not is_plan:
        check_run_directory(config, out, resume, server_round)
    start_adapter = None if resume else read_start_adapter(config)
    set_up_process(config.run)
    # Data before the model: mistakes are more frequent there, and it is quicker to read.
    callbacks.on_message("Reading the data")
    client_data = load_data(config)
    check_num_clients(config, len(client_data))
    labels = find_labels(config.model, client_data)
    model = outline_model(config, labels, is_plan=is_plan)
    examples = tokenize_clients(config, client_data, model.base, model.tokenizer, labels)
    _refuse_unknown_clients(config, [one.client_id for one in examples])
    tokens = {client.client_id: (client.train, client.test) for client in examples}
    data = fingerprints(client_data, tokens)
    return RunOutline(config, method, function, model, examples, client_data, data, start_adapter)


def set_up_process(run: RunConfig) -> None:
    """Set torch's number of threads (0: one per available core) and deterministic kernels.

    GPU operations without a deterministic kernel then raise an error that names them.
    """
    torch.set_num_threads(run.threads if run.threads > 0 else available_cpus())
    if run.deterministic:
        # Read when cuBLAS is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(run.deterministic)


def _last_trained(records: Sequence[RoundRecord]) -> dict[str, int]:
    """Return the last round in which each client's update was accepted."""
    last_rounds = {}
    for record in records:
        for client in record.accepted:
            last_rounds[client] = record.round
    return last_rounds


def _refuse_unknown_clients(config: Config, names: Sequence[str]) -> None:
    """Refuse settings for clients that do not exist."""
    unknown_clients = sorted(set(config.lora.clients) - set(names))
    if unknown_clients:
        raise ConfigError(
            f"lora.clients names {unknown_clients[0]}, which is no client; there are "
            f"{', '.join(names)}"
        )


def refuse_devices(config: Config) -> None:
    """Refuse `run.devices` if clients are not processes of this run.

    Raises:
        ConfigError: If it is set.
    """
    if config.run.devices:
        raise ConfigError(
            f"run.devices is for fedmomentum run and compare; got {config.run.devices}. Over a "
            "network each client has one device, model.device of its own settings: leave "
            "run.devices out, and start one fedmomentum join for each client"
        )


def read_start_adapter(config: Config) -> Adapter | None:
    """Read the adapter that `lora.start-from` names, if any.

    Clients receive it like any global model, so only the server reads the directory. The first
    checkpoint names its factors by their hash; a resumed run does not read it again.

    Raises:
        AdapterError: If it cannot be read; the message names the setting.
    """
    if config.lora.start_from is None:
        return None
    start_adapter = read_adapter(config.lora.start_from, name="the adapter of lora.start-from")
    own_name = base_and_revision(start_adapter)[0]
    names = {config.model.name, os.path.realpath(config.model.name)}
    # A base that is identified by its content is checked when the run's base is at hand.
    is_identified = (
        base_of_adapter(find_adapter(config.lora.start_from), start_adapter).sha256 is not None
    )
    if own_name and own_name not in names and not is_identified:
        LOG.warning(
            "lora.start-from names the base model %s, and model.name is %s; only if these are one "
            "model does the adapter mean what it was trained for",
            own_name,
            config.model.name,
        )
    return start_adapter


def with_start_adapter(
    start_adapter: Adapter | None, config: Config, method: Method, model: GlobalModel
) -> GlobalModel:
    """Return the model of round 0 with the adapter of `lora.start-from` added, if there is one.

    Raises:
        AdapterError: If it does not fit the run, or was trained on another base model.
    """
    if start_adapter is None or config.lora.start_from is None:
        return model
    _check_start_base(
        base_of_adapter(find_adapter(config.lora.start_from), start_adapter), model.base
    )
    return add_start_adapter(
        model,
        start_adapter,
        is_merged=method.fresh or method.reads_base,
        is_mixed=config.lora.is_mixed or method.prunes,
    )


def _check_start_base(recorded: BaseIdentity, base: BaseIdentity) -> None:
    """Refuse an adapter to start from that records another base model than the run's.

    If only the quantization differs, training can still start from the adapter. A warning says so.

    Raises:
        AdapterError: If the weights of the two base models differ.
    """
    if recorded.sha256 and recorded.quantization != base.quantization:
        LOG.warning(
            "the adapter of lora.start-from was trained with %s, and the run has %s; the "
            "model of round 0 differs from the one that the adapter was trained for",
            recorded.quantization or "no quantization",
            base.quantization or "no quantization",
        )
    try:
        replace(recorded, quantization=base.quantization).check(base)
    except ModelError as error:
        raise AdapterError(
            f"the adapter of lora.start-from does not belong to model.name: {error}"
        ) from error


def training_function(config: Config) -> TrainingFunction | None:
    """Return the user's `module:function`; None for the built-in trainer."""
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
            file.name not in (".lock", "rounds", SERVER_LOG, RUN_LOG, STATUS_FILE)
            for file in out.iterdir()
        ):
            raise ModelError(f"{out} is not empty and holds no run; choose another --out")
        return
    began = saved_settings(out, server_round)
    if began is None:
        return
    dp = config.privacy.dp
    if server_round is not None and dp is not None and dp.epsilon is not None:
        raise ConfigError(
            "--round has rounds done again, and each training reveals something more: with "
            "privacy.dp.epsilon the noise was chosen so that the run's rounds, each done once, "
            f"reveal no more than epsilon {dp.epsilon:g}. Resume without it"
        )
    # Paths may change, since the content at them is compared.
    if data_counts:
        changed = changed_settings(began, config, MAY_CHANGE)
    else:
        keys = [key for key in changed_keys(began, config) if key not in MAY_CHANGE]
        changed = [key for key in keys if not key.startswith("data.")]
    changed = check_method(config, out, changed, server_round)
    # The noise was chosen for the rounds that the run began with.
    is_longer = config.federation.num_rounds > began.federation.num_rounds
    if is_longer and dp is not None and dp.epsilon is not None:
        changed.append("federation.num-rounds (the noise was chosen for privacy.dp.epsilon)")
    if changed:
        raise ConfigError(
            f"{out} was made with other settings; these differ: {', '.join(changed)}. Resume with "
            f"its own settings, {out / 'config.toml'} as the run wrote it (its checkpoints hold "
            "them too), or start over in another --out"
        )


def check_method(
    config: Config, out: Path, changed: list[str], server_round: int | None = None
) -> list[str]:
    """Return the changed keys without the method's settings if they stand for the run's method.

    A configuration leaves defaults out, and those of another release may differ. Then the run can
    be continued with its settings given in full.

    Args:
        config: The settings to continue the run with.
        out: The run's directory.
        changed: The keys that differ from the run's own settings.
        server_round: A kept round; by default the last one.

    Raises:
        ConfigError: If the same settings stand for another method now.
    """
    saved = saved_method(out, server_round)
    built = repr(make_method(config))
    if saved == built:
        return [key for key in changed if key != "method.settings"]
    if saved is not None and not {"method.name", "method.settings"}.intersection(changed):
        raise ConfigError(
            f"{out} was made with {saved}, and its settings stand for {built} now: the defaults "
            "have changed since. Give those of the run in [method.settings], and resume"
        )
    return changed


def changed_settings(saved: Config, config: Config, may_change: Collection[str]) -> list[str]:
    """Return the keys of the settings that differ, except paths and those that may change.

    The content at the paths is compared elsewhere; which clients have files is compared here.
    """
    allowed = {*may_change, *LOCATIONS}
    changed = [key for key in changed_keys(saved, config) if key not in allowed]
    if saved.data.client_files.keys() != config.data.client_files.keys():
        changed.append("data.client-files")
    return changed


def load_data(config: Config) -> list[ClientData]:
    """Load every client's examples, as specified by `[data]`.

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
