"""Compare methods on the same data: paired runs, a directory a method and seed, and two references.

A seed gives every method the same partition, participants, batches and initial adapter. The
references take as many optimiser steps as a client that is in every round, with a fresh optimiser
every round as clients have: `centralised` is one client with everybody's data, `local` is each
client alone with its own. Both are scored on the held-out examples of all clients, the very items
on which a federated run is scored.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmomentum.base_model.hub import resolve_base
from fedmomentum.base_model.identity import BaseIdentity, identify
from fedmomentum.config.schema import Config, MethodConfig
from fedmomentum.config.toml import (
    apply_overrides,
    load_config,
    parse_value,
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
from fedmomentum.run.client_setup import party_names
from fedmomentum.run.federated_trainer import FederatedTrainer
from fedmomentum.run.origin import check_data, fingerprints
from fedmomentum.run.references import REFERENCES, make_reference
from fedmomentum.run.setup import changed_settings, load_data, make_method
from fedmomentum.server.saved_run import saved_settings
from fedmomentum.utils.io import write_atomically, write_json
from fedmomentum.utils.names import directory_name, readable_name
from fedmomentum.utils.records import with_checksum

if TYPE_CHECKING:
    from fedmomentum.formats.manifest import Fingerprint
    from fedmomentum.server.callbacks import Callback


_PER_CELL = {"method.name", "method.settings", "run.seed", "federation.num-rounds"}
_OWN = ("training.", "lora.", "federation.")
"""Sections that a method may set for itself; what pairs and scores the runs is common to all."""
_BY_REFERENCES = {
    "evaluation.num-examples",
    "evaluation.final-num-examples",
    "training.local-epochs",
}


@dataclass(frozen=True)
class Entry:
    """One thing to compare.

    Attributes:
        label: as the user wrote it: `fedit`, `fedmomentum:split=singular`, `local`.
        method: the method it runs, with its settings. One client's average is that client, so
            references run FedIT.
        overrides: settings of the run that only this one has, as `section.key=value`.
    """

    label: str
    method: MethodConfig
    overrides: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`federated`, `centralised` or `local`."""
        name = self.label.partition(":")[0]
        return name if name in REFERENCES else "federated"

    @property
    def directory(self) -> str:
        """The label as the name of a directory."""
        return readable_name(self.label)


@dataclass(frozen=True)
class Cell:
    """One run to make: what, with which seed, where; `only` trains alone, for `local`."""

    entry: Entry
    seed: int
    directory: Path
    config: Config
    only: str | None = None

    @property
    def title(self) -> str:
        """What it is called while it runs."""
        return f"{self.entry.label}{f' ({self.only})' if self.only else ''}, seed {self.seed}"

    def is_finished(self) -> bool:
        """Whether its last round is committed.

        Raises:
            ConfigError: If the directory holds a run of other settings, or more rounds than are
                asked for.
            ModelError: its last checkpoint is damaged.
        """
        if not _begun(self.directory):
            return False
        _check_same(
            self.directory, self.config, _BY_REFERENCES if self.entry.kind != "federated" else set()
        )
        done, asked = (
            max(retained_rounds(self.directory), default=-1),
            self.config.federation.num_rounds,
        )
        if done > asked:
            raise ConfigError(
                f"{self.directory} has {done} rounds and {asked} are asked for; choose another "
                "--out"
            )
        return done == asked


# ── what is asked ─────────────────────────────────────────────────────────────────────────────────


def parse_methods(text: str, config: Config) -> list[Entry]:
    """Parse `name` or `name:key=value;key=value`, separated by commas.

    `[method.settings]` applies to the method that `[method]` names.

    A name is one of the table, `module:Class` of the user's own, or a reference's. A key with a
    point in it, `training.learning-rate`, is a setting of the run instead of the method's, for this
    one alone.

    Raises:
        ConfigError: none, one twice, an unknown method or setting, a method's setting given to a
            reference, or a setting that must be the same for all.
    """
    entries: list[Entry] = []
    for label in filter(None, (part.strip() for part in text.split(","))):
        # A user method has a colon in its name: only what has "=" after it are settings.
        name, _, rest = (
            label.rpartition(":") if "=" in label.rpartition(":")[2] else (label, "", "")
        )
        settings = dict(config.method.settings) if name == config.method.name else {}
        overrides = []
        # Keys with a point belong to the run, the others to the method.
        for pair in filter(None, (part.strip() for part in rest.split(";"))):
            key, equals, value = pair.partition("=")
            if not equals:
                raise ConfigError(
                    f"{pair!r} in {label!r} is no setting; write name:key=value;key=value"
                )
            if "." in key:
                overrides.append(pair)
            else:
                settings[key.strip()] = parse_value(value.strip())
        if name in REFERENCES and settings:
            raise ConfigError(f"{name} has no settings of its own; got {label!r}")
        method = MethodConfig("fedit" if name in REFERENCES else name, settings)
        # What pairs and scores the runs must be the same for all methods.
        for override in overrides:
            if not override.startswith(_OWN) or override.startswith("federation.num-rounds"):
                raise ConfigError(
                    f"{override!r} in {label!r}: only {', '.join(_OWN)} can differ between methods"
                )
        try:
            own = replace(apply_overrides(config, overrides), method=method)
            if name not in REFERENCES:
                make_method(own)
        except ConfigError as error:
            raise ConfigError(
                f"--methods {label}: {error}; and the references {', '.join(REFERENCES)}"
            ) from error
        entries.append(Entry(label, method, tuple(overrides)))
    # Two labels must not share a directory, on file systems that ignore case either.
    directories = [entry.directory.lower() for entry in entries]
    if not entries or len(set(directories)) < len(directories):
        raise ConfigError(
            f"--methods must name methods, each once, e.g. fedmomentum,fedit,local; got {text!r}"
        )
    return entries


def parse_seeds(text: str) -> list[int]:
    """Whole numbers from 0, with commas between.

    Raises:
        ConfigError: anything else, or one twice.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"--seeds must be whole numbers from 0, each once, e.g. 0,1,2; got {text!r}"
        )
    return seeds


def plan_cells(
    config: Config, entries: Sequence[Entry], seeds: Sequence[int], out: Path
) -> list[Cell]:
    """Return the runs to make, seed by seed, so that methods can be compared early.

    Raises:
        ConfigError: without evaluations there is nothing to compare; `out` is a comparison of other
            settings.
        DataError: data that cannot be used (it is read here to name the clients of `local`).
    """
    if not config.evaluation.every:
        raise ConfigError(
            "evaluation.every must be 1 or more: methods are compared by their held-out scores"
        )
    if (out / "config.toml").is_file():
        _check_same(out, config, _PER_CELL)
    cells = []
    # Seed by seed: after the first seed every method has a result.
    for seed in seeds:
        for entry in entries:
            own = replace(apply_overrides(config, entry.overrides), method=entry.method)
            own = replace(own, run=replace(own.run, seed=seed))
            directory = out / entry.directory / f"seed-{seed}"
            # A reference "local" is one run a client; "centralised" is one run on all data.
            if entry.kind == "local":
                cells += [
                    Cell(
                        entry,
                        seed,
                        directory / directory_name(only),
                        replace(own, lora=own.lora.for_client(only)),
                        only,
                    )
                    for only in party_names(own)
                ]
            elif entry.kind == "centralised":
                cells.append(
                    Cell(entry, seed, directory, replace(own, lora=replace(own.lora, clients={})))
                )
            else:
                cells.append(Cell(entry, seed, directory, own))
    _check_content(cells)
    return cells


def _check_content(cells: Sequence[Cell]) -> None:
    """Refuse to continue a comparison with other data or another base model than its runs had.

    Settings that say where something is may have changed, and what is there as well; both show only
    here.

    Raises:
        DataError: If a run has other data.
        ModelError: If a run has another base model.
    """
    # Runs that have begun keep the base model and the data that they began with.
    begun = [cell for cell in cells if retained_rounds(cell.directory)]
    data: dict[int, dict[str, Fingerprint]] = {}
    for cell in begun:
        model = cell.config.model
        base = read_manifest(find_manifest(cell.directory, "last")).base
        made_with = BaseIdentity(base.name, base.revision, base.sha256, base.tokenizer_sha256)
        made_with.check(
            identify(model.name, resolve_base(model.name, model.revision), model.revision)
        )
        if cell.seed not in data:  # a seed divides the data; the methods share it
            data[cell.seed] = fingerprints(load_data(cell.config))
        check_data(cell.directory, data[cell.seed])


def _begun(directory: Path) -> bool:
    """Whether there is a run."""
    return (directory / "config.toml").is_file() or bool(retained_rounds(directory))


def _saved(directory: Path) -> Config:
    """Return the settings of the run, or of the comparison, in a directory."""
    return saved_settings(directory) or load_config(directory / "config.toml")


def _check_same(directory: Path, config: Config, may_differ: set[str]) -> None:
    """Refuse a directory with other settings; trackers and paths may change, rounds be added.

    Raises:
        ConfigError: If they are. What lies at the paths is for `_check_content` and `prepare` to
            compare.
    """
    may_change = {*may_differ, "federation.num-rounds", "run.report-to"}
    changed = changed_settings(_saved(directory), config, may_change)
    if changed:
        raise ConfigError(
            f"{directory} was made with other settings; these differ: {', '.join(changed)}. "
            f"Compare with its own, {directory / 'config.toml'}, or in another --out"
        )


# ── running ───────────────────────────────────────────────────────────────────────────────────────


def run_cell(
    cell: Cell,
    *,
    callbacks: Iterable[Callback] = (),
) -> None:
    """Make one run, or continue it where it stopped.

    Raises:
        FedMomentumError: See `FederatedTrainer`.
    """
    resume = _begun(cell.directory)
    # Checks that the settings are ours; those that a reference changes are compared below.
    cell.is_finished()
    began = cell.config
    if resume:
        # A reference has settings of its own; the comparison's say where things are now.
        began = replace(_saved(cell.directory), model=cell.config.model, data=cell.config.data)
    trainer = FederatedTrainer(began, cell.directory, resume=resume, callbacks=callbacks)
    run = trainer.prepare()
    try:
        run.config = cell.config
        if cell.entry.kind != "federated":
            make_reference(run, cell.only)
        if resume:
            _check_same(cell.directory, run.config, set())
        trainer.train()
    finally:
        trainer.close()


# ── the result ────────────────────────────────────────────────────────────────────────────────────


def start_comparison(config: Config, out: Path) -> None:
    """Keep the settings that all cells share, so that a later call with others is refused."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "config.toml", to_toml(config).encode())


def write_comparison(
    out: Path, cells: Sequence[Cell], *, baseline: str, target: float, command: str
) -> Comparison:
    """Write comparison.json and comparison.csv from the directories of the finished cells."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in sorted(
        cells, key=lambda cell: [c.entry.label for c in cells].index(cell.entry.label)
    ):
        groups.setdefault((cell.entry.label, cell.seed), []).append(cell)
    table: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "baseline": baseline,
        "target": target,
        "command": command,
        "cells": [
            {
                "method": label,
                "kind": own[0].entry.kind,
                "seed": seed,
                "folders": [str(cell.directory.relative_to(out)) for cell in own],
            }
            for (label, seed), own in groups.items()
        ],
        "summary": [],
    }
    write_json(out / COMPARISON, with_checksum(table))
    comparison = read_comparison(out)
    write_json(out / COMPARISON, with_checksum(table | {"summary": summary_tables(comparison)}))
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(csv_rows(comparison))
    write_atomically(out / "comparison.csv", buffer.getvalue().encode())
    return comparison
