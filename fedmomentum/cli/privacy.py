"""`fedmomentum privacy plan` and `fedmomentum privacy ledger`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from fedmomentum.cli.columns import name_column
from fedmomentum.cli.options import OUT, ConfigFile, Overrides
from fedmomentum.errors import ConfigError, PrivacyError
from fedmomentum.results.formatting import number
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.config.privacy import DPConfig
    from fedmomentum.config.schema import Config
    from fedmomentum.privacy.ledger import LedgerRecord, Training

TYPICAL_EPSILONS = (1.0, 2.0, 4.0, 8.0)
"""Epsilons that a plan shows if the settings specify neither epsilon nor noise."""

privacy_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Differential privacy: plans and ledgers."
)


@privacy_app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    units: Annotated[
        list[int] | None,
        typer.Option(
            "--units",
            help="number of units (examples, patients) of a client; repeatable [default: those of "
            "the job's data]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show the noise that a job's epsilon requires at each client, or the epsilon of its noise."""
    from fedmomentum.config.privacy import DPConfig
    from fedmomentum.config.toml import load_config
    from fedmomentum.run.private_checks import check_private_training

    job = load_config(config, overrides or ())
    check_private_training(job)
    dp = job.privacy.dp or DPConfig()
    OUT.print(_plan_table(job, dp, _units_by_client(job, dp, units)))
    OUT.print(
        f"epsilon bounds what all rounds reveal of one {dp.unit_column or 'example'} to anyone who "
        f"sees everything that a client sends, at delta {dp.delta:g}, if the number of units is "
        "public. It adds up over runs on the same data: see `fedmomentum privacy ledger`.",
        markup=False,
    )


def _units_by_client(job: Config, dp: DPConfig, units: Sequence[int] | None) -> dict[str, int]:
    """Return each client's public number of units."""
    from fedmomentum.privacy.ledger import round_down
    from fedmomentum.privacy.mechanism import group_units
    from fedmomentum.run.setup import load_data

    if units:
        if min(units) < 1:
            raise ConfigError(f"--units must be at least 1; got {min(units)}")
        return {f"{count} units": count for count in units}
    # Held-out examples are not trained on and do not count.
    result = {}
    for client in load_data(job):
        groups = group_units([example.unit for example in client.train])
        result[client.client_id] = dp.public_units or round_down(len(groups))
    return result


def _plan_table(job: Config, dp: DPConfig, units: Mapping[str, int]) -> Table:
    """Return a plan's table, with one row per client and epsilon."""
    from dataclasses import replace

    from fedmomentum.client.private_party import round_mechanism
    from fedmomentum.privacy.accountant import Steps, epsilon_of
    from fedmomentum.protocol.private_messages import PrivateTerms

    right = [
        Column(name, justify="right")
        for name in ("public units", "sample rate", "steps a round", "rounds", "noise", "epsilon")
    ]
    table = Table(name_column("client"), *right)
    num_rounds = job.federation.num_rounds
    hyperparameters = job.training.hyperparameters(1, num_rounds)
    # Without epsilon or noise, there is nothing to compute from, so show typical epsilons.
    is_open = dp.epsilon is None and dp.noise_multiplier is None
    variants = [dp]
    if is_open:
        variants = [replace(dp, epsilon=epsilon) for epsilon in TYPICAL_EPSILONS]
    for client, count in units.items():
        for variant in variants:
            terms = PrivateTerms.of(variant, num_rounds)
            steps = round_mechanism(terms, hyperparameters, count)
            total = Steps(steps.noise_multiplier, steps.sample_rate, steps.num_steps * num_rounds)
            table.add_row(
                printable(client),
                str(count),
                f"{steps.sample_rate:.3g}",
                str(steps.num_steps),
                str(num_rounds),
                number(steps.noise_multiplier),
                number(epsilon_of([total], dp.delta)),
            )
    return table


@privacy_app.command()
def ledger(
    file: Annotated[
        Path,
        typer.Argument(help="a client's ledger, or a directory of ledgers", show_default=False),
    ],
    delta: Annotated[
        float, typer.Option("--delta", help="the delta of (epsilon, delta)-differential privacy")
    ] = 1e-5,
) -> None:
    """Show how much privacy the trainings on a client's data have spent, and in which runs."""
    from fedmomentum.privacy.ledger import read_ledger

    if not 0 < delta < 1:
        raise ConfigError(f"--delta must be between 0 and 1; got {delta:g}")
    files = sorted(file.glob("*.json")) if file.is_dir() else [file]
    if not files:
        raise PrivacyError(f"{file} holds no ledger; give the directory of a client's CLIENT.json")
    for one in files:
        try:
            record = read_ledger(one)
        except FileNotFoundError:
            raise PrivacyError(f"there is no ledger {one}") from None
        _print_ledger(record, delta)


def _print_ledger(record: LedgerRecord, delta: float) -> None:
    """Print a ledger: its runs and their total spending."""
    from fedmomentum.privacy.accountant import epsilon_of

    columns = ("rounds", "steps", "rate", "noise", "epsilon so far", "unsent")
    right = [Column(name, justify="right") for name in columns]
    table = Table("run", "from", "data", *right)
    # Epsilon accumulates over the rows: each shows what had been spent when its run ended.
    history = []
    for trainings in _by_run(record.trainings):
        history += [training.steps for training in trainings]
        first = trainings[0]
        num_open = sum(training.state != "replied" for training in trainings)
        table.add_row(
            printable(first.run_id[:8]),
            first.began[:10],
            first.data[:8],
            str(len({training.server_round for training in trainings})),
            str(sum(training.num_steps for training in trainings)),
            f"{first.sample_rate:.3g}",
            number(first.noise_multiplier),
            number(epsilon_of(history, delta)),
            str(num_open),
        )
    OUT.print(
        f"{record.party}: one {record.unit} is protected, {record.public_units} taken for public",
        markup=False,
    )
    OUT.print(table)
    OUT.print(
        f"spent: epsilon {number(epsilon_of(history, delta))} at delta {delta:g}, over all "
        f"{len(record.trainings)} trainings; neighbors differ by one {record.unit} more or less",
        markup=False,
    )


def _by_run(trainings: Sequence[Training]) -> Iterator[list[Training]]:
    """Yield groups of consecutive trainings of one run with the same mechanism and data."""
    group: list[Training] = []
    for training in trainings:
        if group and _kind(group[-1]) != _kind(training):
            yield group
            group = []
        group.append(training)
    if group:
        yield group


def _kind(training: Training) -> tuple[str, str, float, float, float]:
    return (
        training.run_id,
        training.data,
        training.sample_rate,
        training.noise_multiplier,
        training.max_grad_norm,
    )
