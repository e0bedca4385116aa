"""Compare methods on the same data: paired runs, one per method and seed, and two references.

For a given seed, every method has the same partition, participants, batches and initial adapter.
The references take as many optimizer steps as a client that participates in every round, and keep
their optimizer state: `centralized` is one client with all data, `local` is each client alone with
its own data. Both are scored on the same examples as a federated run: those that all clients hold
out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmomentum.base_model.hub import resolve_base
from fedmomentum.base_model.identity import BaseIdentity, identify
from fedmomentum.base_model.quantization import ON_LOADING
from fedmomentum.config.privacy import PrivacyConfig
from fedmomentum.config.schema import Config
from fedmomentum.config.toml import (
    apply_overrides,
    load_config,
    to_toml,
)
from fedmomentum.errors import ConfigError
from fedmomentum.formats.directories import find_manifest, read_manifest, retained_rounds
from fedmomentum.results.comparison import (
    COMPARISON,
    FORMAT,
    FORMAT_VERSION,
    Comparison,
    read_comparison,
)
from fedmomentum.results.method_summary import csv_rows, summary_tables
from fedmomentum.run.client_setup import client_names
from fedmomentum.run.federated_trainer import FederatedTrainer
from fedmomentum.run.method import make_method
from fedmomentum.run.method_variants import MethodVariant
from fedmomentum.run.origin import check_data, fingerprints
from fedmomentum.run.privacy_checks import check_privacy
from fedmomentum.run.references import make_reference
from fedmomentum.run.setup import (
    changed_settings,
    check_method,
    load_data,
)
from fedmomentum.run.training_checks import check_sampling, choose_optimizer_state
from fedmomentum.server.saved_run import saved_settings
from fedmomentum.utils.io import write_atomically, write_json
from fedmomentum.utils.names import directory_name
from fedmomentum.utils.records import with_checksum

if TYPE_CHECKING:
    from fedmomentum.formats.manifest import Fingerprint
    from fedmomentum.server.callbacks import Callback


_PER_RUN = {"method.name", "method.settings", "run.seed", "federation.num-rounds"}
_OF_THE_MACHINE = {"model.device", "run.devices"}
_CHANGED_BY_REFERENCES = {
    "evaluation.num-examples",
    "evaluation.final-num-examples",
    "training.local-epochs",
}


@dataclass(frozen=True)
class PlannedRun:
    """One run of the comparison.

    Attributes:
        variant: The method or reference to run.
        seed: The seed of the run.
        directory: The directory of the run.
        config: The settings of the run.
        only: The client that trains alone, for the reference `local`.
    """

    variant: MethodVariant
    seed: int
    directory: Path
    config: Config
    only: str | None = None

    @property
    def title(self) -> str:
        """Label, client and seed, for the progress display."""
        return f"{self.variant.label}{f' ({self.only})' if self.only else ''}, seed {self.seed}"

    @property
    def is_reference(self) -> bool:
        """Whether it is the run of a reference instead of a method."""
        return self.variant.kind != "federated"

    def is_finished(self) -> bool:
        """Return whether its last round is committed.

        Raises:
            ConfigError: If the directory holds a run with other settings, with a method that
                these settings no longer stand for, or with more rounds than configured.
            ModelError: If its last checkpoint is damaged.
        """
        if not _has_begun(self.directory):
            return False
        # A reference changes some settings of its run, and has no method of its own.
        if self.is_reference:
            _check_same(self.directory, self.config, _CHANGED_BY_REFERENCES)
        else:
            _check_same(self.directory, self.config, has_method=True)
        num_finished = max(retained_rounds(self.directory), default=-1)
        num_rounds = self.config.federation.num_rounds
        if num_finished > num_rounds:
            raise ConfigError(
                f"{self.directory} has {num_finished} rounds and {num_rounds} are requested; "
                "choose another --out"
            )
        return num_finished == num_rounds


# ── planning ──────────────────────────────────────────────────────────────────────────────────────


def plan_runs(
    config: Config, variants: Sequence[MethodVariant], seeds: Sequence[int], out: Path
) -> list[PlannedRun]:
    """Return the runs of a comparison, ordered by seed so that methods can be compared early.

    Raises:
        ConfigError: If the run has no evaluations, or `out` holds a comparison with other settings.
        DataError: If the data cannot be used; it is read here for the client names of `local`.
    """
    if not config.evaluation.every:
        raise ConfigError(
            "evaluation.every must be 1 or more: methods are compared by their held-out scores"
        )
    if retained_rounds(out):
        raise ConfigError(
            f"{out} holds a run; give the comparison a directory of its own with --out"
        )
    if (out / "config.toml").is_file():
        _check_same(out, config, _PER_RUN)
    planned_runs: list[PlannedRun] = []
    # Ordered by seed: after the first one, every method has a result.
    for seed in seeds:
        for variant in variants:
            run_config = replace(apply_overrides(config, variant.overrides), method=variant.method)
            run_config = replace(run_config, run=replace(run_config.run, seed=seed))
            directory = out / variant.directory / f"seed-{seed}"
            planned_runs += _runs_of_variant(variant, seed, directory, run_config)
    _check_content(planned_runs)
    return planned_runs


def optimizer_states(planned_runs: Sequence[PlannedRun]) -> dict[str, str]:
    """Return each federated variant's `training.optimizer-state`, by label."""
    states = {}
    for planned_run in planned_runs:
        if planned_run.variant.kind == "federated":
            states[planned_run.variant.label] = planned_run.config.training.optimizer_state
    return states


def _runs_of_variant(
    variant: MethodVariant, seed: int, directory: Path, config: Config
) -> list[PlannedRun]:
    """Return one run, or for the reference `local`, one run per client."""
    is_reference = variant.kind != "federated"
    if is_reference:  # a single client has no one to keep anything from
        config = replace(config, privacy=PrivacyConfig())
    if variant.kind == "centralized":
        check_sampling(config.training, is_pooled=True)
        config = replace(config, lora=replace(config.lora, clients={}))
    if variant.kind != "local":
        method = make_method(config)
        config = choose_optimizer_state(config, method, is_reference=is_reference)
        check_privacy(config, method)
        return [PlannedRun(variant, seed, directory, config)]
    runs = []
    for client_id in client_names(config):
        client_config = replace(config, lora=config.lora.for_client(client_id))
        client_config = choose_optimizer_state(
            client_config, make_method(client_config), is_reference=True
        )
        client_directory = directory / directory_name(client_id)
        runs.append(PlannedRun(variant, seed, client_directory, client_config, only=client_id))
    return runs


def _check_content(planned_runs: Sequence[PlannedRun]) -> None:
    """Refuse to continue a comparison with data or a base model that its runs did not have.

    Paths may change between calls, so the content is compared.

    Raises:
        DataError: If a run has other data.
        ModelError: If a run has another base model.
    """
    started = [run for run in planned_runs if retained_rounds(run.directory)]
    data: dict[int, dict[str, Fingerprint]] = {}
    for run in started:
        model = run.config.model
        base = read_manifest(find_manifest(run.directory, "last")).base
        made_with = BaseIdentity.of(base)
        made_with.check(
            identify(
                model.name,
                resolve_base(model.name, model.revision),
                model.revision,
                ON_LOADING.get(model.quantization),
            )
        )
        if run.seed not in data:  # methods share the data of a seed
            data[run.seed] = fingerprints(load_data(run.config))
        check_data(run.directory, data[run.seed])


def _has_begun(directory: Path) -> bool:
    """Return whether a directory holds a run."""
    return (directory / "config.toml").is_file() or bool(retained_rounds(directory))


def _saved(directory: Path) -> Config:
    """Return the settings of the run or comparison in a directory."""
    return saved_settings(directory) or load_config(directory / "config.toml")


def _check_same(
    directory: Path,
    config: Config,
    may_differ: Collection[str] = (),
    *,
    has_method: bool = False,
) -> None:
    """Refuse a directory with other settings, apart from trackers, paths and added rounds.

    `_check_content` and `FederatedTrainer.prepare` compare the content at the paths.

    Args:
        directory: The directory of a run or of the comparison.
        config: The settings to continue it with.
        may_differ: Keys that may differ.
        has_method: Whether the directory holds a run of the method in `config`. Then the methods
            are compared with all of their settings: a default may have changed since.

    Raises:
        ConfigError: If a setting outside `may_differ`, or the method, differs.
    """
    may_change = {*may_differ, *_OF_THE_MACHINE, "federation.num-rounds", "run.report-to"}
    changed = changed_settings(_saved(directory), config, may_change)
    if has_method:
        changed = check_method(config, directory, changed)
    if changed:
        raise ConfigError(
            f"{directory} was made with other settings; these differ: {', '.join(changed)}. "
            f"Compare with its own, {directory / 'config.toml'}, or in another --out"
        )


# ── running ───────────────────────────────────────────────────────────────────────────────────────


def execute_run(planned_run: PlannedRun, *, callbacks: Iterable[Callback] = ()) -> None:
    """Start one run, or continue it where it stopped.

    Raises:
        FedMomentumError: See `FederatedTrainer`.
    """
    resume = _has_begun(planned_run.directory)
    # Check that the settings are the comparison's, before preparing a reference changes some.
    planned_run.is_finished()
    is_reference = planned_run.is_reference
    planned = _on_one_device(planned_run.config) if is_reference else planned_run.config
    config = planned
    if resume and is_reference:
        # A reference saved its own settings, but paths and devices are the current ones.
        saved = _saved(planned_run.directory)
        run = replace(saved.run, devices=planned.run.devices)
        config = replace(saved, model=planned.model, data=planned.data, run=run)
    trainer = FederatedTrainer(config, planned_run.directory, resume=resume, callbacks=callbacks)
    prepared = trainer.prepare()
    try:
        prepared.config = planned
        if is_reference:
            make_reference(prepared, planned_run.only)
            if resume:
                _check_same(planned_run.directory, prepared.config)
        trainer.train()
    finally:
        trainer.close()


def _on_one_device(config: Config) -> Config:
    """Return the settings of a reference, which is a single client on a single device."""
    devices = config.run.devices
    if not devices:
        return config
    model = replace(config.model, device=devices[0])
    return replace(config, model=model, run=replace(config.run, devices=[]))


# ── the result ────────────────────────────────────────────────────────────────────────────────────


def start_comparison(config: Config, out: Path) -> None:
    """Save the settings that all runs share, so that later calls with others are refused."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "config.toml", to_toml(config).encode())


def write_comparison(
    out: Path, planned_runs: Sequence[PlannedRun], *, baseline: str, target: float, command: str
) -> Comparison:
    """Write comparison.json and comparison.csv from the directories of the finished runs."""
    table: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "baseline": baseline,
        "target": target,
        "command": command,
        "cells": _table_cells(out, planned_runs),
        "summary": [],
    }
    write_json(out / COMPARISON, with_checksum(table))
    comparison = read_comparison(out)
    write_json(out / COMPARISON, with_checksum(table | {"summary": summary_tables(comparison)}))
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(csv_rows(comparison))
    write_atomically(out / "comparison.csv", buffer.getvalue().encode())
    return comparison


def _table_cells(out: Path, planned_runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """Return one entry per method and seed, with the methods in the order given."""
    labels = list(dict.fromkeys(run.variant.label for run in planned_runs))
    groups: dict[tuple[str, int], list[PlannedRun]] = {}
    for run in sorted(planned_runs, key=lambda run: labels.index(run.variant.label)):
        groups.setdefault((run.variant.label, run.seed), []).append(run)
    cells = []
    for (label, seed), runs in groups.items():
        cells.append(
            {
                "method": label,
                "kind": runs[0].variant.kind,
                "seed": seed,
                "folders": [str(run.directory.relative_to(out)) for run in runs],
            }
        )
    return cells
