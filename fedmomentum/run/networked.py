"""A run with remote clients: the same rounds over any transport."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.config.toml import to_toml
from fedmomentum.errors import ConfigError
from fedmomentum.lora.half_precision import wire_dtype
from fedmomentum.run.environment import process_environment
from fedmomentum.run.method import make_method
from fedmomentum.run.origin import check_data
from fedmomentum.run.plan import served_plan
from fedmomentum.run.privacy_checks import check_num_clients, check_privacy
from fedmomentum.run.private_checks import check_private_run, choose_private_dtype
from fedmomentum.run.secure_run import secure_steps
from fedmomentum.run.setup import (
    check_run_directory,
    read_start_adapter,
    refuse_devices,
    set_up_process,
    with_start_adapter,
)
from fedmomentum.run.task import check_task, require_labels
from fedmomentum.run.tracking import TrackerCallback, check_trackers
from fedmomentum.run.training_checks import check_sampling, choose_optimizer_state
from fedmomentum.server.callbacks import Callback, CallbackList
from fedmomentum.server.checkpoint import RunDirectory
from fedmomentum.server.handshake import handshake
from fedmomentum.server.kept_sums import KEPT_SUMS, KeptSums
from fedmomentum.server.round_steps import RoundSteps
from fedmomentum.server.server import Server
from fedmomentum.server.state import ServerState
from fedmomentum.training.arguments import check_arguments
from fedmomentum.training.optimizer import check_can_be_made

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config
    from fedmomentum.formats.manifest import Fingerprint
    from fedmomentum.formats.plan import Plan
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.protocol.messages import Description
    from fedmomentum.protocol.transport import Transport
    from fedmomentum.secure_sum.roster import Roster


def run_federation(
    transport: Transport,
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    server_round: int | None = None,
    callbacks: Iterable[Callback] = (),
    data: Mapping[str, Fingerprint] | None = None,
    roster: Roster | None = None,
) -> GlobalModel:
    """Run a federation with remote clients; this process needs neither data nor base model.

    Args:
        transport: Reaches the clients.
        config: The run's settings; `[data]` is ignored unless `data` is given.
        out: The run's directory.
        resume: Continue the run in `out`; without it, `out` must be new or empty.
        server_round: Resume from this round instead of the last one; later rounds are redone.
        callbacks: Receive the plan and progress, called in this order.
        data: Fingerprints of the clients' data, if this process knows it.
        roster: The clients' public keys, if their updates are summed under masks.

    Raises:
        ConfigError: If settings contradict each other, or `out` holds a run with other settings.
        DataError: If the data is not what the run began with.
        ModelError: If `out` is in use or holds something else.
        QuorumError: See `Server.run` and `handshake`.
    """
    method = make_method(config)
    config = _checked_settings(config, method)
    _check_roster(config, roster, server_round)
    check_run_directory(config, out, resume, server_round, data_counts=data is not None)
    start_adapter = None if resume else read_start_adapter(config)
    set_up_process(config.run)
    # Check everything before any client is asked for anything.
    callback_list = CallbackList(callbacks)
    directory = RunDirectory(out, keep=config.run.keep_checkpoints)
    try:
        resumed = directory.resume(server_round) if resume else None
        # A resumed run knows its model; a new one asks the clients for it.
        if resumed is not None:
            model, state = resumed
            if data is not None:
                check_data(out, data, server_round)
            directory.describe(to_toml(config), state.run_id, data=data)
        else:
            state = ServerState(secrets.token_hex(16))
            check_num_clients(config, len(transport.clients()))
            started = handshake(transport, config, state.run_id, method)
            model = started.model.with_wire_dtype(wire_dtype(config.federation.downlink_dtype))
            model = with_start_adapter(start_adapter, config, method, model)
            plan = served_plan(config, model, method, started.descriptions)
            callback_list.on_plan(plan)
            _describe(directory, config, state.run_id, plan, model, started.descriptions, data)
        with TrackerCallback(config.run.report_to, directory, state.run_id) as trackers:
            steps = RoundSteps()
            if roster is not None:
                kept = KeptSums(out / KEPT_SUMS, state.run_id)
                steps = secure_steps(transport, config, method, roster, kept)
            server = Server(
                transport,
                method=method,
                model=model,
                state=state,
                config=config,
                directory=directory,
                callbacks=[callback_list, trackers],
                steps=steps,
            )
            return server.run()
    finally:
        directory.close()


def _checked_settings(config: Config, method: Method) -> Config:
    """Return the settings with automatic choices filled in.

    Raises:
        ConfigError: If settings contradict each other, or cannot be used over a network.
    """
    refuse_devices(config)
    check_arguments(config.training.arguments)
    check_can_be_made(config.training, config.federation.num_rounds, schedule_only=True)
    check_sampling(config.training)
    config = choose_private_dtype(choose_optimizer_state(config, method))
    check_task(config)
    check_privacy(config, method)
    check_private_run(config)
    require_labels(config.model)
    check_trackers(config.run.report_to)
    return config


def _check_roster(config: Config, roster: Roster | None, server_round: int | None) -> None:
    """Refuse secure aggregation without a roster of keys, or with rounds to be redone.

    Raises:
        ConfigError: If either is requested.
    """
    is_secure = config.privacy.secure_aggregation
    if is_secure and roster is None:
        raise ConfigError(
            "privacy.secure-aggregation needs clients with keys of their own: run all in one "
            "process (fedmomentum run), or over a network (fedmomentum serve)"
        )
    if is_secure and server_round is not None:
        raise ConfigError(
            "--round has rounds done again, and with privacy.secure-aggregation clients open the "
            "sums of a round once: the difference of two would show the values of single clients. "
            "Resume without it"
        )


def _describe(
    directory: RunDirectory,
    config: Config,
    run_id: str,
    plan: Plan,
    model: GlobalModel,
    clients: Mapping[str, Description],
    data: Mapping[str, Fingerprint] | None,
) -> None:
    """Write the run's description into its directory, including the clients' own facts."""
    partition = {}
    environments = {}
    for name, client in clients.items():
        # With secure sums, clients do not reveal how many examples they have.
        if not config.privacy.secure_aggregation:
            partition[name] = {"train": {"": client.num_train}, "test": {"": client.num_test}}
        environments[name] = f"{client.threads} threads, {client.dtype}, {client.versions}"
    directory.describe(
        to_toml(config),
        run_id,
        plan=asdict(plan),
        partition=partition,
        environment={
            **process_environment(),
            "base_sha256": model.base.sha256,
            "tokenizer_sha256": model.base.tokenizer_sha256,
            "clients": environments,
        },
        data=data,
    )
