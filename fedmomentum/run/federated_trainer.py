"""`FederatedTrainer`: a whole federation in this process, from configuration to global model."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.base_model.loading import pick_merged_dtype
from fedmomentum.client.loaded_base import identify_base
from fedmomentum.config.toml import to_toml
from fedmomentum.data.client_data import partition_table
from fedmomentum.errors import ConfigError
from fedmomentum.formats.directories import retained_rounds
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.global_model.start import check_fits
from fedmomentum.global_model.states import client_states
from fedmomentum.lora.half_precision import wire_dtype
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.environment import environment, warn_of_another_environment
from fedmomentum.run.plan import make_plan
from fedmomentum.run.saved_model import find_base, open_result
from fedmomentum.run.secure_run import parties_of_this_process, secure_steps
from fedmomentum.run.setup import (
    LoadedRun,
    RunOutline,
    check_made_from,
    load_run,
    outline_run,
    with_start_adapter,
)
from fedmomentum.run.tracking import TrackerCallback
from fedmomentum.server.callbacks import Callback, CallbackList
from fedmomentum.server.checkpoint import RunDirectory
from fedmomentum.server.round_steps import RoundSteps
from fedmomentum.server.server import Server
from fedmomentum.server.state import ServerState

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.aggregation.update_filter import UpdateFilter
    from fedmomentum.client.client import Client
    from fedmomentum.client.local_model import LocalModel
    from fedmomentum.config.schema import Config
    from fedmomentum.formats.manifest import Fingerprint
    from fedmomentum.formats.plan import Plan
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.run.client_examples import TokenizedClient
    from fedmomentum.run.outline import ModelOutline


OnPlan = Callable[["Plan", Sequence["TokenizedClient"]], None]
"""Called with a run's plan and its clients' examples."""


@dataclass
class PreparedRun:
    """A run that is ready to train: everything is loaded and checked, nothing is trained yet.

    Attributes:
        config: The run's settings.
        outline: The shapes of the model, from which the plan was made.
        method: Combines the clients' adapters.
        directory: The run's directory, locked by this process.
        local: The base model with a live adapter, shared by all clients that train alike.
        clients: The clients with their tokenized data.
        model: The global model to start from.
        state: What the server remembers.
        plan: What the run will cost.
        partition: Client to `train` and `test`, to category, to number of examples.
        data: Client to the fingerprint of its data.
    """

    config: Config
    outline: ModelOutline
    method: Method
    directory: RunDirectory
    local: LocalModel
    clients: list[Client]
    model: GlobalModel
    state: ServerState
    plan: Plan
    partition: dict[str, dict[str, dict[str, int]]]
    data: dict[str, Fingerprint]


def _partition(
    outline: RunOutline, clients: Sequence[Client]
) -> dict[str, dict[str, dict[str, int]]]:
    """Count each client's examples by category; with privacy only what the public knows."""
    if outline.config.privacy.dp is None:
        return partition_table(outline.parties)
    partition = {}
    for client in clients:
        partition[client.client_id] = {"train": {"": client.num_examples}, "test": {"": 0}}
    return partition


class FederatedTrainer:
    """Fine-tunes a base model on the data of all clients, which train in turn in this process.

    Args:
        config: The run: base model, LoRA, data, training, federation, method. See `load_config`.
        directory: Where checkpoints and metrics go [default: `runs/run-<date>-<time>`].
        resume: Continue what is in `directory`; without it, `directory` must be new or empty.
        server_round: With `resume`: continue from this round instead of the last one; the rounds
            after it are done again.
        callbacks: Receive progress, in this order.
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

        The base model's directory needs no weights for it, and this machine not the device.

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
        """Read the data, load the model and open the directory; `train` does it where it was not.

        Args:
            on_plan: Receives the plan and the clients' examples before any weight is loaded.

        Raises:
            ConfigError: If settings contradict each other, or the directory has other settings.
            DataError: If data cannot be used, or is other data than the run began with.
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
        loaded = load_run(outline, self.directory, self._callbacks)
        directory = RunDirectory(self.directory, keep=config.run.keep_checkpoints)
        try:
            model, state = self._start(directory, loaded)
        except BaseException:
            directory.close()
            raise
        self.prepared = PreparedRun(
            config=config,
            outline=outline.model,
            method=outline.method,
            directory=directory,
            local=loaded.local,
            clients=loaded.clients,
            model=model,
            state=state,
            plan=plan,
            partition=_partition(outline, loaded.clients),
            data=outline.data,
        )
        return self.prepared

    def train(self) -> GlobalModel:
        """Run the rounds that are left, and return the global model after the last.

        Every round is saved before the next begins; a run that was stopped is continued with
        `resume=True`, to the bits of one that was not.

        Raises:
            QuorumError: If too few clients gave a usable update.
            FedMomentumError: See `prepare`.
        """
        run = self.prepared or self.prepare()
        try:
            self._describe(run)
            for client in run.clients:
                client.update_filter = self._update_filter
            transport = InProcessTransport(
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
            dtype: Of the weights on disk: float32, bfloat16 or float16.

        Returns:
            The fraction of the change that arrived in the weights: 1 in float32.

        Raises:
            ModelError: If there is no finished round, or what was written is not the run's model.
        """
        result = open_result(self.directory)
        chosen = pick_merged_dtype(dtype)
        return export_merged(
            result.model, Path(out), base_directory=find_base(result, ""), dtype=chosen
        )

    def export_adapter(self, out: Path | str) -> None:
        """Write the model of the last round as one plain PEFT adapter, and read it back.

        Args:
            out: A new or empty directory.

        Raises:
            ModelError: If there is no finished round, or what was written is not the run's model.
        """
        result = open_result(self.directory)
        export_adapter(result.model, Path(out), base_directory=find_base(result, ""))

    def close(self) -> None:
        """Release the run's directory, so that other processes can open it."""
        if self.prepared is not None:
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

    def _start(self, directory: RunDirectory, loaded: LoadedRun) -> tuple[GlobalModel, ServerState]:
        """Return the model and state to start from: fresh ones, or those of a checkpoint."""
        if self._resume and self._server_round is not None:
            # What comes after that round is about to be deleted: check before.
            check_made_from(
                self.directory, self._server_round, loaded.outline, loaded.local.identity
            )
        resumed = directory.resume(self._server_round) if self._resume else None
        if resumed is None:
            return _initial_model(loaded), ServerState(secrets.token_hex(16))
        model, state = resumed
        check_made_from(self.directory, model.server_round, loaded.outline, loaded.local.identity)
        for states in client_states(self.directory, state.run_id):
            states.discard_after(model.server_round)
        return model, state

    def _describe(self, run: PreparedRun) -> None:
        """Write what the run is into its directory."""
        current_environment = environment(run.local)
        if run.directory.records:
            warn_of_another_environment(current_environment, self.directory)
        run.directory.describe(
            to_toml(run.config),
            run.state.run_id,
            plan=asdict(run.plan),
            partition=run.partition,
            environment=current_environment,
            data=run.data,
        )


def _initial_model(loaded: LoadedRun) -> GlobalModel:
    """Return the model of round 0."""
    outline = loaded.outline
    dtype = wire_dtype(outline.config.federation.downlink_dtype)
    model = loaded.local.initial_global_model(outline.method).with_wire_dtype(dtype)
    return with_start_adapter(outline.start_adapter, outline.method, model)
