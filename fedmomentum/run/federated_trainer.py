"""`FederatedTrainer`: a whole federation on this machine, from configuration to global model."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.base_model.loading import pick_merged_dtype
from fedmomentum.client.loaded_base import identify_base
from fedmomentum.config.toml import to_toml
from fedmomentum.errors import ConfigError
from fedmomentum.formats.directories import retained_rounds
from fedmomentum.global_model.client_state_kinds import client_states
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.global_model.start_adapter import check_fits
from fedmomentum.lora.half_precision import wire_dtype
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.devices import DeviceTransport
from fedmomentum.run.environment import environment, warn_of_another_environment
from fedmomentum.run.local_clients import LocalClients, load_local_clients
from fedmomentum.run.plan import make_plan
from fedmomentum.run.prepared_run import PreparedRun, known_partition
from fedmomentum.run.publish import card_facts
from fedmomentum.run.saved_model import choose_device, find_base, open_result
from fedmomentum.run.secure_run import parties_of_this_process, secure_steps
from fedmomentum.run.setup import (
    RunOutline,
    check_made_from,
    outline_run,
    with_start_adapter,
)
from fedmomentum.run.tracking import TrackerCallback
from fedmomentum.server.callbacks import Callback, CallbackList
from fedmomentum.server.checkpoint import RunDirectory
from fedmomentum.server.handshake import handshake
from fedmomentum.server.round_steps import RoundSteps
from fedmomentum.server.server import Server
from fedmomentum.server.state import ServerState

if TYPE_CHECKING:
    from fedmomentum.aggregation.update_filter import UpdateFilter
    from fedmomentum.config.schema import Config
    from fedmomentum.data.tokenized import TokenizedClient
    from fedmomentum.formats.plan import Plan
    from fedmomentum.global_model.model import GlobalModel


OnPlan = Callable[["Plan", Sequence["TokenizedClient"]], None]
"""Called with a run's plan and its clients' examples."""


class FederatedTrainer:
    """Fine-tunes a base model on the data of all clients, which train on this machine.

    They train in turn in this process or, with `run.devices`, in one process per device.

    Args:
        config: The run: base model, LoRA, data, training, federation, method. See `load_config`.
        directory: Where checkpoints and metrics go [default: `runs/run-<date>-<time>`].
        resume: Continue the run in `directory`; without it, `directory` must be new or empty.
        server_round: With `resume`: continue from this round instead of the last one; later rounds
            are redone.
        callbacks: Receive progress, called in this order.
        update_filter: Changes updates before they leave a client, and their aggregate.

    Attributes:
        directory: The run's directory.
        prepared: What `prepare` loaded; None before.

    Example:
        A run over the built-in example configuration, exported as an ordinary transformers model::

            trainer = FederatedTrainer(load_config("job.toml"))
            model = trainer.train()
            trainer.export_merged("merged")
    """

    def __init__(
        self,
        config: Config,
        directory: Path | str | None = None,
        *,
        resume: bool = False,
        server_round: int | None = None,
        callbacks: Iterable[Callback] = (),
        update_filter: UpdateFilter | None = None,
    ) -> None:
        if directory is None:
            directory = Path("runs") / time.strftime("run-%Y%m%d-%H%M%S")
        self.directory = Path(directory)
        self.prepared: PreparedRun | None = None
        if update_filter is not None and config.training.optimizer_state == "auto":
            # Moments would leave the client unfiltered; see `prepare`.
            config = replace(config, training=replace(config.training, optimizer_state="fresh"))
        self._config = config
        self._resume = resume
        self._server_round = server_round
        self._callbacks = CallbackList(callbacks)
        self._update_filter = update_filter

    def plan(self) -> tuple[Plan, list[TokenizedClient]]:
        """Estimate what the run will cost, without loading weights or touching its directory.

        This needs neither the base model's weights nor the device on this machine.

        Returns:
            The plan, and the clients' tokenized data.

        Raises:
            FedMomentumError: See `prepare`.
        """
        outline = self._make_outline(is_plan=True)
        config = outline.config
        rounds = retained_rounds(self.directory)
        if self._resume and rounds:
            resumed_round = rounds[-1] if self._server_round is None else self._server_round
            shapes = outline.model
            identity = identify_base(config.model, shapes.directory, shapes.labels)
            check_made_from(self.directory, resumed_round, outline, identity)
        elif outline.start_adapter is not None:
            check_fits(outline.model.adapter, outline.start_adapter)
        plan = make_plan(config, outline.model, outline.examples, outline.method)
        if not self._resume and (self.directory / "config.toml").is_file():
            warning = (
                f"{self.directory} holds a run already; without --resume, or another --out, this "
                "run would be refused"
            )
            plan = replace(plan, warnings=(*plan.warnings, warning))
        return plan, outline.examples

    def prepare(self, on_plan: OnPlan | None = None) -> PreparedRun:
        """Read the data, load the model and open the directory; `train` does so if needed.

        Args:
            on_plan: Receives the plan and the clients' examples before any weight is loaded.

        Raises:
            ConfigError: If settings contradict each other, or the directory has other settings.
            DataError: If data cannot be used, or is not the data that the run began with.
            ModelError: If the base model cannot be loaded, or the directory is in use or holds
                something else.
        """
        outline = self._make_outline()
        config = outline.config
        if self._update_filter is not None and config.training.optimizer_state != "fresh":
            raise ConfigError(
                "an update filter changes factors, and optimizer moments would leave the client "
                f"unfiltered; training.optimizer-state is {config.training.optimizer_state}"
                ", set it to fresh"
            )
        if self._update_filter is not None and config.privacy.secure_aggregation:
            raise ConfigError(
                "an update filter changes the sum after the fact, and with "
                "privacy.secure-aggregation what the clients keep of a round would no longer fit "
                "it; leave one of the two out"
            )
        plan = make_plan(config, outline.model, outline.examples, outline.method)
        if on_plan is not None:
            on_plan(plan, outline.examples)
        # The clients run in this process, or in one worker process per device.
        backend: LocalClients | DeviceTransport
        if config.run.devices:
            backend = self._make_workers(outline)
            facts = backend.start()
        else:
            backend = self._load_clients(outline)
            facts = environment(backend.local)
        directory = None
        try:
            directory = RunDirectory(self.directory, keep=config.run.keep_checkpoints)
            model, state = self._start(directory, outline, backend)
        except BaseException:
            if isinstance(backend, DeviceTransport):
                backend.close()
            if directory is not None:
                directory.close()
            raise
        clients = backend.clients if isinstance(backend, LocalClients) else []
        self.prepared = PreparedRun(
            config=config,
            outline=outline.model,
            method=outline.method,
            directory=directory,
            local=backend.local if isinstance(backend, LocalClients) else None,
            clients=clients,
            workers=backend if isinstance(backend, DeviceTransport) else None,
            environment=facts,
            model=model,
            state=state,
            plan=plan,
            partition=known_partition(outline, clients),
            data=outline.data,
        )
        return self.prepared

    def train(self) -> GlobalModel:
        """Run the remaining rounds, and return the final global model.

        Every round is saved before the next begins; continue a stopped run with `resume=True`. The
        result is bit-identical to that of an uninterrupted run.

        Raises:
            QuorumError: If too few clients gave a usable update.
            FedMomentumError: See `prepare`.
        """
        run = self.prepared or self.prepare()
        try:
            self._describe(run)
            for client in run.clients:
                client.update_filter = self._update_filter
            transport = run.workers or InProcessTransport(
                {client.client_id: client.handle for client in run.clients}
            )
            with (
                TrackerCallback(
                    run.config.run.report_to, run.directory, run.state.run_id
                ) as trackers,
                parties_of_this_process(run.config, run.clients) as roster,
            ):
                steps = RoundSteps(update_filter=self._update_filter)
                if roster is not None:
                    steps = secure_steps(transport, run.config, run.method, roster)
                server = Server(
                    transport,
                    method=run.method,
                    model=run.model,
                    state=run.state,
                    config=run.config,
                    directory=run.directory,
                    callbacks=[self._callbacks, trackers],
                    steps=steps,
                )
                run.model = server.run()
            return run.model
        finally:
            self.close()

    def export_merged(self, out: Path | str, *, dtype: str = "float32") -> float:
        """Write the last round's model as an ordinary transformers directory, and read it back.

        Args:
            out: A new or empty directory.
            dtype: The dtype of the weights on disk: float32, bfloat16 or float16.

        Returns:
            The fraction of the change that survives rounding to `dtype`: 1 in float32.

        Raises:
            ModelError: If there is no finished round, or what was written is not the run's model.
        """
        result = open_result(self.directory)
        chosen = pick_merged_dtype(dtype)
        return export_merged(
            result.model,
            Path(out),
            base_directory=find_base(result, ""),
            dtype=chosen,
            device=choose_device(result, ""),
            facts=card_facts(result),
        )

    def export_adapter(self, out: Path | str) -> None:
        """Write the model of the last round as one plain PEFT adapter, and read it back.

        Args:
            out: A new or empty directory.

        Raises:
            ModelError: If there is no finished round, or what was written is not the run's model.
        """
        result = open_result(self.directory)
        export_adapter(
            result.model,
            Path(out),
            base_directory=find_base(result, ""),
            device=choose_device(result, ""),
            facts=card_facts(result),
        )

    def close(self) -> None:
        """End the workers, and release the run's directory, so that others can open it."""
        if self.prepared is None:
            return
        if self.prepared.workers is not None:
            self.prepared.workers.close()
        self.prepared.directory.close()

    def _make_outline(self, *, is_plan: bool = False) -> RunOutline:
        return outline_run(
            self._config,
            self.directory,
            resume=self._resume,
            server_round=self._server_round,
            is_plan=is_plan,
            callbacks=self._callbacks,
        )

    def _load_clients(self, outline: RunOutline) -> LocalClients:
        """Load the run's model in this process, and create its clients."""
        self._callbacks.on_message(f"Loading {outline.config.model.name}")
        return load_local_clients(
            outline.config,
            outline.examples,
            outline.model.labels,
            self.directory,
            function=outline.function,
            callbacks=self._callbacks,
            base=outline.model.loaded,
        )

    def _make_workers(self, outline: RunOutline) -> DeviceTransport:
        """Return the workers of `run.devices`, which are not started yet."""
        config = outline.config
        if self._update_filter is not None:
            raise ConfigError(
                "an update filter is an object of this process, and run.devices has clients train "
                f"in others; leave run.devices out ({config.run.devices})"
            )
        self._callbacks.on_message(f"Loading {config.model.name}, {len(config.run.devices)} times")
        return DeviceTransport(
            config, outline.examples, outline.model.labels, self.directory, self._callbacks
        )

    def _start(
        self, directory: RunDirectory, outline: RunOutline, backend: LocalClients | DeviceTransport
    ) -> tuple[GlobalModel, ServerState]:
        """Return the model and state to start from: fresh ones, or those of a checkpoint."""
        if isinstance(backend, LocalClients):
            identity = backend.local.identity
        else:
            shapes = outline.model
            identity = identify_base(outline.config.model, shapes.directory, shapes.labels)
        if self._resume and self._server_round is not None:
            # Later rounds are about to be deleted: check first.
            check_made_from(self.directory, self._server_round, outline, identity)
        resumed = directory.resume(self._server_round) if self._resume else None
        if resumed is None:
            state = ServerState(secrets.token_hex(16))
            return _initial_model(outline, state.run_id, backend), state
        model, state = resumed
        check_made_from(self.directory, model.server_round, outline, identity)
        for states in client_states(self.directory, state.run_id):
            states.discard_after(model.server_round)
        return model, state

    def _describe(self, run: PreparedRun) -> None:
        """Write the run's description into its directory."""
        if run.directory.records:
            warn_of_another_environment(run.environment, self.directory)
        run.directory.describe(
            to_toml(run.config),
            run.state.run_id,
            plan=asdict(run.plan),
            partition=run.partition,
            environment=run.environment,
            data=run.data,
        )


def _initial_model(
    outline: RunOutline, run_id: str, backend: LocalClients | DeviceTransport
) -> GlobalModel:
    """Return the model of round 0, created by this process or by a worker."""
    config = outline.config
    if isinstance(backend, LocalClients):
        model = backend.local.initial_global_model(outline.method)
    else:
        # A classifier's labels may have been found in the data.
        labeled = replace(config.model, labels=list(outline.model.labels))
        agreed = handshake(backend, replace(config, model=labeled), run_id, outline.method)
        model = agreed.model
    model = model.with_wire_dtype(wire_dtype(config.federation.downlink_dtype))
    return with_start_adapter(outline.start_adapter, config, outline.method, model)
