"""Methods against each other on the same data: paired runs, one folder a method and seed, and two references.

A seed gives every method the same partition, participants, batches and initial adapter. The references take as many
optimiser steps as a client that is in every round, with a fresh optimiser every round as clients have:
`centralised` is one client with everybody's data, `local` is each client alone with its own. Both are scored on the
held-out examples of all clients, the very items on which a federated run is scored.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedmomentum.checkpoint import saved_settings
from fedmomentum.config import (
    LOCATIONS,
    Config,
    EvaluationConfig,
    MethodConfig,
    differences,
    load_config,
    overridden,
    parse_value,
    to_toml,
)
from fedmomentum.data.tokens import TokenisedExamples
from fedmomentum.errors import ConfigError
from fedmomentum.files import write_atomically, write_json
from fedmomentum.folders import find_manifest, kept_rounds, read_manifest
from fedmomentum.identity import BaseIdentity, identify, resolve_base
from fedmomentum.manifest import Fingerprint
from fedmomentum.names import directory_name, readable_name
from fedmomentum.origin import check_data, fingerprints
from fedmomentum.records import checksummed
from fedmomentum.report.cells import (
    COMPARISON,
    FORMAT,
    FORMAT_VERSION,
    Comparison,
    cell_rows,
    read_comparison,
    summarise_methods,
    summary_tables,
)
from fedmomentum.report.statistics import Mean
from fedmomentum.report.text import human_bytes, human_seconds
from fedmomentum.rounds import Observer
from fedmomentum.run import Run, load_data, make_method, make_plan, party_names, prepare

REFERENCES = ("centralised", "local")
POOLED = "everyone"
"""The one client of `centralised`."""
_PER_CELL = {"method.name", "method.settings", "run.seed", "federation.num-rounds"}
_OWN = ("training.", "lora.", "federation.")
"""Sections whose settings a method may have for itself; what pairs the runs and scores them is the same for all."""
_BY_REFERENCES = {"evaluation.num-examples", "evaluation.final-num-examples", "training.local-epochs"}


@dataclass(frozen=True)
class Entry:
    """One thing to compare.

    Attributes:
        label: as the user wrote it: `fedit`, `fedmomentum:split=singular`, `local`.
        method: the method it runs, with its settings. One client's average is that client, so references run FedIT.
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
    def folder(self) -> str:
        """The label as a folder's name."""
        return readable_name(self.label)


@dataclass(frozen=True)
class Cell:
    """One run to make: what, with which seed, where. `only` is the client that trains, alone, for `local`."""

    entry: Entry
    seed: int
    folder: Path
    config: Config
    only: str | None = None

    @property
    def title(self) -> str:
        """What it is called while it runs."""
        return f"{self.entry.label}{f' ({self.only})' if self.only else ''}, seed {self.seed}"

    def is_finished(self) -> bool:
        """Whether its last round is committed.

        Raises:
            ConfigError: the folder holds a run of other settings, or more rounds than are asked for.
            ModelError: its last checkpoint is damaged.
        """
        if not _begun(self.folder):
            return False
        _check_same(self.folder, self.config, _BY_REFERENCES if self.entry.kind != "federated" else set())
        done, asked = max(kept_rounds(self.folder), default=-1), self.config.federation.num_rounds
        if done > asked:
            raise ConfigError(f"{self.folder} has {done} rounds and {asked} are asked for; choose another --out")
        return done == asked


# ── what is asked ────────────────────────────────────────────────────────────────────────────────────────────────


def parse_methods(text: str, config: Config) -> list[Entry]:
    """`name` or `name:key=value;key=value`, with commas between. `[method.settings]` goes to the method it names.

    A name is one of the table, `module:Class` of the user's own, or a reference's. A key with a point in it,
    `training.learning-rate`, is a setting of the run instead of the method's, for this one alone.

    Raises:
        ConfigError: none, one twice, an unknown method or setting, a method's setting given to a reference, or a
            setting that must be the same for all.
    """
    entries: list[Entry] = []
    for label in filter(None, (part.strip() for part in text.split(","))):
        name, _, rest = label.rpartition(":") if "=" in label.rpartition(":")[2] else (label, "", "")
        settings = dict(config.method.settings) if name == config.method.name else {}
        overrides = []
        for pair in filter(None, (part.strip() for part in rest.split(";"))):
            key, equals, value = pair.partition("=")
            if not equals:
                raise ConfigError(f"{pair!r} in {label!r} is no setting; write name:key=value;key=value")
            if "." in key:
                overrides.append(pair)
            else:
                settings[key.strip()] = parse_value(value.strip())
        if name in REFERENCES and settings:
            raise ConfigError(f"{name} has no settings of its own; got {label!r}")
        method = MethodConfig("fedit" if name in REFERENCES else name, settings)
        for override in overrides:
            if not override.startswith(_OWN) or override.startswith("federation.num-rounds"):
                raise ConfigError(f"{override!r} in {label!r}: only {', '.join(_OWN)} can differ between methods")
        try:
            own = replace(overridden(config, overrides), method=method)
            if name not in REFERENCES:
                make_method(own)
        except ConfigError as error:
            raise ConfigError(f"--methods {label}: {error}; and the references {', '.join(REFERENCES)}") from error
        entries.append(Entry(label, method, tuple(overrides)))
    folders = [entry.folder for entry in entries]
    if not entries or len({folder.lower() for folder in folders}) < len(folders):
        raise ConfigError(f"--methods must name methods, each once, e.g. fedmomentum,fedit,local; got {text!r}")
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
        raise ConfigError(f"--seeds must be whole numbers from 0, each once, e.g. 0,1,2; got {text!r}")
    return seeds


def plan_cells(config: Config, entries: Sequence[Entry], seeds: Sequence[int], out: Path) -> list[Cell]:
    """The runs to make: seed by seed, so that what is compared is early side by side.

    Raises:
        ConfigError: without evaluations there is nothing to compare; `out` is a comparison of other settings.
        DataError: data that cannot be used (it is read here to name the clients of `local`).
    """
    if not config.evaluation.every:
        raise ConfigError("evaluation.every must be 1 or more: methods are compared by their held-out scores")
    if (out / "config.toml").is_file():
        _check_same(out, config, _PER_CELL)
    cells = []
    for seed in seeds:
        for entry in entries:
            own = replace(overridden(config, entry.overrides), method=entry.method)
            own = replace(own, run=replace(own.run, seed=seed))
            folder = out / entry.folder / f"seed-{seed}"
            if entry.kind == "local":
                cells += [
                    Cell(entry, seed, folder / directory_name(only), replace(own, lora=own.lora.of(only)), only)
                    for only in party_names(own)
                ]
            elif entry.kind == "centralised":
                cells.append(Cell(entry, seed, folder, replace(own, lora=replace(own.lora, clients={}))))
            else:
                cells.append(Cell(entry, seed, folder, own))
    _check_content(cells)
    return cells


def _check_content(cells: Sequence[Cell]) -> None:
    """Refuse to go on where runs of the comparison were made with other data or another base model than there is now.

    Settings that say where something is may have changed, and what is there as well; both show only here.

    Raises:
        DataError: If a run has other data.
        ModelError: If a run has another base model.
    """
    begun = [cell for cell in cells if kept_rounds(cell.folder)]
    data: dict[int, dict[str, Fingerprint]] = {}
    for cell in begun:
        model = cell.config.model
        base = read_manifest(find_manifest(cell.folder, "last")).base
        made_with = BaseIdentity(base.name, base.revision, base.sha256, base.tokenizer_sha256)
        made_with.check(identify(model.name, resolve_base(model.name, model.revision), model.revision))
        if cell.seed not in data:  # a seed divides the data; the methods share it
            data[cell.seed] = fingerprints(load_data(cell.config))
        check_data(cell.folder, data[cell.seed])


def _begun(folder: Path) -> bool:
    """Whether there is a run."""
    return (folder / "config.toml").is_file() or bool(kept_rounds(folder))


def _saved(folder: Path) -> Config:
    """The settings of the run, or of the comparison, in a folder."""
    return saved_settings(folder) or load_config(folder / "config.toml")


def _check_same(folder: Path, config: Config, may_differ: set[str]) -> None:
    """Refuse a folder whose settings are others; trackers and paths may change, rounds be added, not taken.

    Raises:
        ConfigError: If they are. What lies at the paths is for `_check_content` and `prepare` to compare.
    """
    saved = _saved(folder)
    may_differ = {*may_differ, "federation.num-rounds", "run.report-to", *LOCATIONS}
    changed = [key for key in differences(saved, config) if key not in may_differ]
    if saved.data.client_files.keys() != config.data.client_files.keys():
        changed.append("data.client-files")
    if changed:
        raise ConfigError(
            f"{folder} was made with other settings; these differ: {', '.join(changed)}. Compare with its own, "
            f"{folder / 'config.toml'}, or in another --out"
        )


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run_cell(
    cell: Cell,
    *,
    observer: Observer = lambda event, facts: None,
    on_step: Callable[[str, int, int, float], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Make one run, or go on with it where it stopped.

    Raises:
        FedMomentumError: see `prepare` and `run_rounds`.
    """
    resume = _begun(cell.folder)
    cell.is_finished()  # whether its settings are ours; those that a reference changes are compared below
    began = cell.config
    if resume:  # a reference has settings of its own; where things are now, the comparison's configuration says
        began = replace(_saved(cell.folder), model=cell.config.model, data=cell.config.data)
    run = prepare(began, cell.folder, resume=resume, on_step=on_step, say=say)
    try:
        run.config = cell.config
        if cell.entry.kind != "federated":
            make_reference(run, cell.only)
        if resume:
            _check_same(cell.folder, run.config, set())
        run.start(observer)
    finally:
        run.close()


def make_reference(run: Run, only: str | None) -> None:
    """Turn a run that is ready to start, in place, into that of one client which is scored on everybody's items.

    Args:
        run: with the federation's clients and settings.
        only: the client that trains alone, on its own data; None: one client with the data of all.

    The client holds out first what the others would be scored on between the ends, then what they would be scored on
    at the ends; an item's category is the client it comes from. Passes over pooled data are cut to the mean client's
    number of steps.
    """
    config, federated = run.config, run.clients
    settings = config.evaluation
    between, ends = settings.num_examples, max(settings.num_examples, settings.final_num_examples)
    test = _pooled(
        [_part(client.test, 0, between, client.client_id) for client in federated]
        + [_part(client.test, between, ends, client.client_id) for client in federated]
    )
    trained = [client for client in federated if only in (None, client.client_id)]
    client = replace(trained[0], client_id=only or POOLED, train=_pooled([c.train for c in trained]), test=test)
    evaluation = EvaluationConfig(
        settings.every,
        max(1, sum(min(between, len(client.test)) for client in federated)),
        max(1, len(test)),
        settings.batch_size,
    )
    training = config.training
    if training.local_epochs is not None:
        training = replace(training, local_epochs=training.local_epochs / len(trained))
    run.config = replace(config, evaluation=evaluation, training=training)
    run.clients, run.locals = [client], {client.client_id: run.local}
    run.partition = {client.client_id: {"train": _counts(client.train), "test": _counts(client.test)}}
    run.plan = make_plan(run.config, run.local, run.model, run.clients, run.method)


def _part(examples: TokenisedExamples, start: int, end: int, category: str) -> TokenisedExamples:
    kept = examples.input_ids[start:end]
    return TokenisedExamples(
        kept, examples.num_prompt_tokens[start:end], (category,) * len(kept), examples.is_truncated[start:end], 0
    )


def _pooled(parts: Sequence[TokenisedExamples]) -> TokenisedExamples:
    def joined(name: str) -> tuple[Any, ...]:
        return tuple(item for part in parts for item in getattr(part, name))

    return TokenisedExamples(
        joined("input_ids"), joined("num_prompt_tokens"), joined("categories"), joined("is_truncated"),
        sum(part.num_lost for part in parts),
    )  # fmt: skip


def _counts(examples: TokenisedExamples) -> dict[str, int]:
    return {category: examples.categories.count(category) for category in sorted(set(examples.categories))}


# ── the result ───────────────────────────────────────────────────────────────────────────────────────────────────


def start_comparison(config: Config, out: Path) -> None:
    """Keep the settings that all cells share, so that a later call with others is refused."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "config.toml", to_toml(config).encode())


def write_comparison(out: Path, cells: Sequence[Cell], *, baseline: str, target: float, command: str) -> Comparison:
    """Write comparison.json and comparison.csv over the cells, which are finished; both are made from their folders."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: [c.entry.label for c in cells].index(cell.entry.label)):
        groups.setdefault((cell.entry.label, cell.seed), []).append(cell)
    table: dict[str, Any] = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "baseline": baseline, "target": target, "command": command,
        "cells": [
            {"method": label, "kind": own[0].entry.kind, "seed": seed,
             "folders": [str(cell.folder.relative_to(out)) for cell in own]}
            for (label, seed), own in groups.items()
        ],
        "summary": [],
    }  # fmt: skip
    write_json(out / COMPARISON, checksummed(table))
    comparison = read_comparison(out)
    write_json(out / COMPARISON, checksummed(table | {"summary": summary_tables(comparison)}))
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(cell_rows(comparison))
    write_atomically(out / "comparison.csv", buffer.getvalue().encode())
    return comparison


def comparison_tables(comparison: Comparison) -> Iterator[Table]:
    """The result in the terminal: scores with the differences to the baseline, and what the target cost."""
    scores = Table(
        "", "exact match, last", "best", "loss, last", "best",
        title="Held-out examples of all clients: mean ± standard deviation over seeds",
        caption="best: of the rounds, on the items that every evaluation has", caption_justify="left",
    )  # fmt: skip
    differences_ = Table(
        "", "seeds", "exact match, points", "loss",
        title=Text(f"Difference to {comparison.baseline}, paired by seed, [95 % t-interval]"),
    )  # fmt: skip
    cost = Table("", "reached by", "rounds", "sent, both ways", "time", title=f"To {comparison.target:.0%} exact match")
    for one in summarise_methods(comparison):
        name = Text(one.method, style="bold" if one.method == comparison.baseline else "")
        scores.add_row(
            name, spread(one.exact_match, 100, 1), spread(one.best_exact_match, 100, 1), spread(one.loss, 1, 3),
            spread(one.best_loss, 1, 3),
        )  # fmt: skip
        if one.method != comparison.baseline:
            pairs = one.loss_difference.count if one.loss_difference else 0
            differences_.add_row(
                name, str(pairs), interval(one.exact_match_difference, 100, 1), interval(one.loss_difference, 1, 3)
            )
        cost.add_row(
            name, f"{one.reached} of {len(one.seeds)}", spread(one.rounds_to_target, 1, 1),
            human_bytes(one.bytes_to_target.mean) if one.bytes_to_target else "-",
            human_seconds(one.seconds_to_target.mean) if one.seconds_to_target else "-",
        )  # fmt: skip
    yield scores
    if len(comparison.methods) > 1:
        yield differences_
    yield cost


def spread(value: Mean | None, factor: float, digits: int) -> str:
    """`28.2 ± 0.6`."""
    if value is None:
        return "-"
    more = f" ± {factor * value.spread:.{digits}f}" if value.spread is not None else ""
    return f"{factor * value.mean:.{digits}f}{more}"


def interval(value: Mean | None, factor: float, digits: int) -> str:
    """`+1.3 [-2.1, +4.7]`."""
    if value is None:
        return "-"
    if value.low is None or value.high is None:
        return f"{factor * value.mean:+.{digits}f}"
    ends = f"{factor * value.low:+.{digits}f}, {factor * value.high:+.{digits}f}"
    return f"{factor * value.mean:+.{digits}f} [{ends}]"
