"""Commands that run federations on this machine: `run`, `compare`, `simulate`; and `report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from fedmomentum.cli.options import (
    ERR,
    OUT,
    BaseOption,
    ConfigFile,
    DashboardAddressOption,
    DashboardOption,
    DataOption,
    Overrides,
    ResumeOption,
    ResumeRoundOption,
    RunDirectoryOption,
    check_output_directory,
    check_resume_round,
    check_target,
    print_uncut,
    require_flower,
    shell_command,
    warn_if_nothing_to_resume,
)
from fedmomentum.cli.run_end import print_how_to_continue, print_result, write_partial_report
from fedmomentum.errors import ConfigError, FedMomentumError

if TYPE_CHECKING:
    from fedmomentum.run.compare import PlannedRun

DEFAULT_TARGET = 0.5


def run(
    config: ConfigFile,
    overrides: Overrides = None,
    out: RunDirectoryOption = None,
    resume: ResumeOption = False,
    server_round: ResumeRoundOption = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="print the plan and exit; nothing is written")
    ] = False,
    base: BaseOption = "",
    data: DataOption = None,
    dashboard: DashboardOption = False,
    dashboard_at: DashboardAddressOption = "",
) -> None:
    """Run a federation on this machine: clients train in turn, the server aggregates exactly."""
    from fedmomentum.cli.dashboard import dashboard_address, local_page
    from fedmomentum.cli.progress import RunView
    from fedmomentum.config.toml import load_config
    from fedmomentum.run.federated_trainer import FederatedTrainer
    from fedmomentum.run.origin import with_given_locations
    from fedmomentum.utils.process import quiet_libraries

    settings = with_given_locations(load_config(config, overrides or []), base, data or [])
    out = out if out is not None else Path("runs") / config.stem
    check_resume_round(server_round, resume)
    address = dashboard_address(dashboard, dashboard_at)
    # print what the run would cost without writing anything
    if plan_only:
        with quiet_libraries(), RunView(OUT, settings.federation.num_rounds) as view:
            trainer = FederatedTrainer(settings, out, resume=resume, server_round=server_round)
            plan, clients = trainer.plan()
            view.show_plan(plan, clients, out)
        return
    check_output_directory(out)
    warn_if_nothing_to_resume(out, resume)
    with (
        local_page(address, out, settings) as watchers,
        quiet_libraries(),
        RunView(OUT, settings.federation.num_rounds) as view,
    ):
        trainer = FederatedTrainer(
            settings, out, resume=resume, server_round=server_round, callbacks=[view, *watchers]
        )
        # print what the run will cost, load everything, then train
        prepared = trainer.prepare(lambda plan, examples: view.show_plan(plan, examples, out))
        try:
            trainer.train()
        except BaseException as error:
            write_partial_report(out)
            view.stop()
            records = prepared.directory.records
            print_how_to_continue(error, out, records[-1].round if records else None, "run")
            raise
        finally:
            trainer.close()
    print_result(out)


def simulate(
    config: ConfigFile,
    overrides: Overrides = None,
    out: RunDirectoryOption = None,
    resume: ResumeOption = False,
    server_round: ResumeRoundOption = None,
    base: BaseOption = "",
    data: DataOption = None,
) -> None:
    """Run a federation in Flower's simulation engine (Ray); on one machine, `run` is lighter."""
    from fedmomentum.cli.progress import RunView
    from fedmomentum.config.toml import load_config
    from fedmomentum.run.origin import with_given_locations

    settings = with_given_locations(load_config(config, overrides or []), base, data or [])
    out = out if out is not None else Path("runs") / config.stem
    check_resume_round(server_round, resume)
    check_output_directory(out)
    warn_if_nothing_to_resume(out, resume)
    require_flower()
    from fedmomentum.cli.network_views import ServerView
    from fedmomentum.flower.simulation import simulate as run_simulation
    from fedmomentum.formats.directories import retained_rounds

    with RunView(OUT, settings.federation.num_rounds) as run_view:
        view = ServerView(OUT, run_view, out)
        try:
            run_simulation(
                settings, out, resume=resume, server_round=server_round, callbacks=[view]
            )
        except BaseException as error:
            run_view.stop()
            print_how_to_continue(error, out, max(retained_rounds(out), default=None), "simulate")
            raise
    print_result(out)


# ── comparisons and reports ──


def compare(
    config: ConfigFile,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="separated by commas, with settings as name:key=value;key=value",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    seeds: Annotated[str, typer.Option("--seeds", help="integers separated by commas")] = "0,1,2",
    baseline: Annotated[
        str, typer.Option("--baseline", help="method to compare with [default: the first]")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="directory [default: runs/compare-<name of the file>]"),
    ] = None,
    target: Annotated[
        float, typer.Option("--target", help="count rounds, bytes and time up to this exact match")
    ] = DEFAULT_TARGET,
    base: BaseOption = "",
    data: DataOption = None,
) -> None:
    """Compare methods on the same data over several seeds; run again to continue."""
    from fedmomentum.cli.tables import comparison_tables, gap_lines
    from fedmomentum.config.toml import load_config
    from fedmomentum.report import write_comparison_page
    from fedmomentum.run import compare as comparing
    from fedmomentum.run.method_variants import parse_methods, parse_seeds
    from fedmomentum.run.origin import with_given_locations
    from fedmomentum.utils.process import quiet_libraries

    settings = with_given_locations(load_config(config, overrides or []), base, data or [])
    out = out if out is not None else Path("runs") / f"compare-{config.stem}"
    check_output_directory(out)
    # the methods to compare, and the baseline
    variants = parse_methods(methods, settings)
    baseline = baseline or variants[0].label
    if baseline not in [variant.label for variant in variants]:
        raise ConfigError(f"--baseline must be one of the methods, {methods}; got {baseline!r}")
    check_target(target)
    command = shell_command("fedmomentum", *sys.argv[1:])
    with quiet_libraries():
        # finished runs are not repeated
        planned_runs = comparing.plan_runs(settings, variants, parse_seeds(seeds), out)
        _print_unlike_optimizers(comparing.optimizer_states(planned_runs))
        remaining = [run for run in planned_runs if not run.is_finished()]
        comparing.start_comparison(settings, out)
        num_finished = len(planned_runs) - len(remaining)
        for number, planned_run in enumerate(remaining, start=num_finished + 1):
            title = f"[bold]Run {number} of {len(planned_runs)}:[/] "
            OUT.print(title, Text(planned_run.title), sep="", soft_wrap=True)
            _execute(planned_run, command)
    # write numbers, tables and the page
    comparison = comparing.write_comparison(
        out, planned_runs, baseline=baseline, target=target, command=command
    )
    for table in comparison_tables(comparison):
        print_uncut(table)
    for line in gap_lines(comparison):
        OUT.print(line, soft_wrap=True)
    page = write_comparison_page([out])
    OUT.print(
        f"\nThe numbers are in {out / 'comparison.json'} and {out / 'comparison.csv'}, the page "
        f"in {page}",
        markup=False,
        soft_wrap=True,
    )


def _print_unlike_optimizers(states: dict[str, str]) -> None:
    """Print a note if methods differ in their optimizers' state at the start of a round."""
    if len(set(states.values())) < 2:
        return
    listed = ", ".join(f"{label}: {state}" for label, state in states.items())
    OUT.print(
        f"The methods' optimizers do not start their rounds alike ({listed}). To compare the "
        "aggregation alone, give one training.optimizer-state for all, such as "
        "training.optimizer-state=fresh.",
        markup=False,
        soft_wrap=True,
    )


def _execute(planned_run: PlannedRun, command: str) -> None:
    """Run one method with one seed; if stopped, print the command to continue."""
    from fedmomentum.cli.progress import RunView
    from fedmomentum.run import compare as comparing

    with RunView(OUT, planned_run.config.federation.num_rounds) as view:
        try:
            comparing.execute_run(planned_run, callbacks=[view])
        except BaseException as error:
            view.stop()
            if isinstance(error, (KeyboardInterrupt, FedMomentumError)):
                ERR.print(
                    f"Stopped in {planned_run.title}; every finished round is saved. Continue "
                    f"with:\n  {command}",
                    markup=False,
                )
            raise


def report(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="a run, a comparison, or several runs", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="directory for comparison.html [default: the comparison's; for several runs, the "
            "current one]",
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            "--target",
            help=f"several runs: count rounds up to this exact match [default: {DEFAULT_TARGET:g}]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Rewrite report.html of a run, or comparison.html of a comparison or of several runs."""
    from fedmomentum.report import write_comparison_page, write_report
    from fedmomentum.results.comparison import COMPARISON

    if target is not None:
        check_target(target)
    is_comparison = (directories[0] / COMPARISON).is_file()
    if len(directories) == 1 and target is not None:
        advice = (
            "a comparison keeps the target that it was made with; run compare again with --target"
            if is_comparison
            else "give several runs, or leave it out"
        )
        raise ConfigError(f"--target is for the report of several runs; {advice}")
    if len(directories) == 1 and not is_comparison:
        if out is not None:
            raise ConfigError(
                f"--out is for comparison.html; the report of a run is written to "
                f"{directories[0] / 'report.html'}: leave --out out, and copy that file"
            )
        page = write_report(directories[0])
    else:
        target = DEFAULT_TARGET if target is None else target
        page = write_comparison_page(directories, out=out, target=target)
    OUT.print(str(page), markup=False, soft_wrap=True)
