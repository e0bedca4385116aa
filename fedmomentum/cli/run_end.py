"""Output at the end of a run: its result and how to use it, or how to continue it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.cli.options import ERR, OUT, print_uncut, shell_command
from fedmomentum.errors import FedMomentumError

if TYPE_CHECKING:
    from fedmomentum.results.run_results import RunResults


def print_how_to_continue(
    error: BaseException, out: Path, last_round: int | None, command: str, *options: object
) -> None:
    """Print what an interrupted run has saved, and the command to continue it.

    Prints nothing if the error is a bug in the package.

    Args:
        error: The error that ended the run.
        out: The run's directory.
        last_round: The last saved round, if any.
        command: The command that started the run, such as `run`.
        options: Additional options of that command.
    """
    if not isinstance(error, (KeyboardInterrupt, FedMomentumError, OSError)):
        return
    if not (out / "config.toml").is_file():
        ERR.print("The run had not begun", markup=False)
        return
    saved = "no round is finished yet"
    if last_round is not None:
        saved = f"everything up to round {last_round} is saved"
    words = [command, out / "config.toml", "--out", out, *options, "--resume"]
    continuation = shell_command("fedmomentum", *words)
    ERR.print(f"Stopped; {saved}. Continue with:\n  {continuation}", markup=False)


def write_partial_report(out: Path) -> None:
    """Write the report of a run that ended early, without hiding the error that ended it."""
    from fedmomentum.report import write_report

    try:
        write_report(out)
    except Exception as error:
        ERR.print(f"no report was written: {error}", markup=False)


def print_result(out: Path) -> None:
    """Write the report of a finished run, and print its summary and commands for using it."""
    page = _print_summary(out)
    OUT.print(
        f"\nThe result is in {out}, its report in {page}. Next:", markup=False, soft_wrap=True
    )
    for title, command in _next_commands(out):
        OUT.print(f"  {title + ':':<24}{command}", markup=False, soft_wrap=True)


def print_served_result(out: Path) -> None:
    """Write the report of a served run, and print its summary and how to use it.

    The base model is on the clients' machines and may not be here, so the commands have a
    placeholder for its directory.
    """
    from fedmomentum.run.saved_model import example_client
    from fedmomentum.utils.names import directory_name

    page = _print_summary(out)
    run = shlex.quote(str(out))
    client = example_client(out)
    options = ""
    place = "where it is, for example on a client's machine,"
    if client is not None:
        store = shlex.quote(f"nodes/{directory_name(client)}")
        options = f" --client {shlex.quote(client)} --store {store}"
        place = (
            "each client has its own model, made of this and of what is in its store; on its "
            "machine"
        )
    export = f"  fedmomentum export {run}{options} --base BASE-DIRECTORY"
    lines = [
        f"The result is in {out}, its report in {page}. The base model is not needed until the "
        "result is used:",
        f"{place} copy {out} there and run",
        f"{export} --to merged --out {shlex.quote(f'{out}-merged')}",
        f"{export} --to adapter --out {shlex.quote(f'{out}-adapter')}",
        "BASE-DIRECTORY is that of the clients' base model; omit --base where job.toml names it.",
        "The clients stay connected; end them with Ctrl-C there.",
    ]
    for line in lines:
        OUT.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_summary(out: Path) -> Path:
    """Write a run's report and print its summary table; return the report's path."""
    from fedmomentum.cli.tables import absence_lines, summary_table
    from fedmomentum.formats.withheld import describe_withheld
    from fedmomentum.report import write_report
    from fedmomentum.results.run_results import RunResults

    page = write_report(out)
    results = RunResults.load(out)
    # A table without any scores would look as if something had gone wrong.
    if any(record.evaluation is not None for record in results.rounds):
        print_uncut(summary_table(results))
    else:
        OUT.print(f"No scores: {_why_no_scores(results, out)}", markup=False, soft_wrap=True)
    withheld = results.rounds[-1].withheld
    if withheld is not None:
        reason = withheld.reason[:1].upper() + withheld.reason[1:]
        OUT.print(f"{reason}. {describe_withheld(withheld)}", markup=False, soft_wrap=True)
    for line in absence_lines(results):
        OUT.print(line, soft_wrap=True)
    return page


def _why_no_scores(results: RunResults, out: Path) -> str:
    """Explain why no round of a run has an evaluation."""
    withheld = results.rounds[-1].withheld
    if withheld is not None and "evaluation" in withheld.fields:
        command = shell_command("fedmomentum", "evaluate", out)
        return (
            "differential privacy withholds those on held-out examples. Score the model on data "
            f"that needs no protection: {command} --data FILE"
        )
    return "no round has an evaluation; evaluation.every says which should have one"


def _next_commands(out: Path) -> list[tuple[str, str]]:
    """Return what can be done with a finished run, as pairs of a title and a command."""
    from fedmomentum.formats.directories import find_manifest, read_manifest
    from fedmomentum.run.saved_model import example_client

    client = example_client(out)
    is_classifier = bool(read_manifest(find_manifest(out, "last")).base.labels)
    model = [out] if client is None else [out, "--client", client]
    title = "the merged model" if client is None else "the model of a client"

    def export(kind: str) -> str:
        words = [*model, "--to", kind, "--out", f"{out}-{kind}"]
        return shell_command("fedmomentum", "export", *words)

    use = shell_command("fedmomentum", "generate", *model) + ' --prompt "..."'
    if is_classifier:
        use = shell_command("fedmomentum", "evaluate", *model) + " --data FILE"
    return [
        (title, export("merged")),
        ("one plain PEFT adapter", export("adapter")),
        ("try it", use),
    ]
