"""The command line: parses arguments, calls commands, prints results."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated

import typer
import typer.core

from fedmomentum.cli import adapters, benchmark, demo, files, models, network, privacy, run
from fedmomentum.cli.data import data, init
from fedmomentum.cli.options import ERR, OUT
from fedmomentum.errors import FedMomentumError
from fedmomentum.utils.process import INTERRUPTION, tune_malloc, wait_briefly

LOG = logging.getLogger("fedmomentum")

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
STRICT_HANDLERS = ("strict", "surrogateescape")
"""Python's default handlers for characters that cannot be encoded; a user's own choice is kept."""

# Help is plain text. If rich is installed, typer would still escape the brackets of defaults.
typer.core.HAS_RICH = False

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Exact federated LoRA fine-tuning: FedMomentum.",
)
COMMANDS = (
    demo.demo,
    init,
    data,
    run.run,
    adapters.aggregate,
    models.export,
    models.inspect,
    models.evaluate,
    models.generate,
    benchmark.benchmark,
    run.compare,
    run.report,
    adapters.methods,
    models.models,
    files.files,
    network.serve,
    network.join,
    network.status,
    run.simulate,
)
"""The commands, in the order of `fedmomentum --help`."""


def main() -> None:
    """Run the command line.

    A user's mistake gives one message and exit code 2, Ctrl-C gives exit code 130. `--debug` shows
    the traceback instead, and those of failures that do not end the command.
    """
    # Accepted anywhere on the command line, with every command.
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    _replace_unencodable()
    INTERRUPTION.listen()
    tune_malloc()
    wait_briefly()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # if unset, tokenizers warn whenever a process is started
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with _debug_records() if debug else nullcontext():
        _run(arguments, debug)


def _run(arguments: list[str], debug: bool) -> None:
    """Run a command; end the process with a message for an error that the user can fix."""
    # End errors with a message and an exit code rather than a traceback.
    try:
        app(arguments, standalone_mode=True)
    except BaseException as error:
        # typer turns Ctrl-C into an exit, and a library may catch it and fail in another way
        if INTERRUPTION.came and not debug:
            ERR.print("fedmomentum: interrupted", markup=False)
            sys.exit(EXIT_INTERRUPTED)
        if isinstance(error, BrokenPipeError):
            sys.exit(EXIT_BROKEN_PIPE)
        message = None if debug else _user_message(error)
        if message is None:
            raise
        ERR.print(f"fedmomentum: {message}", markup=False)
        sys.exit(EXIT_MISTAKE)


def _replace_unencodable() -> None:
    """Print "?" for characters that the encoding of the output does not have, such as latin-1's.

    Otherwise a single one, such as a dash, would end the command.
    """
    for stream in (sys.stdout, sys.stderr):
        # A test or another program may have put an object of another kind in its place.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in STRICT_HANDLERS:
            stream.reconfigure(errors="replace")


@contextmanager
def _debug_records() -> Iterator[None]:
    """Show the package's log records of level DEBUG, which contain tracebacks."""
    last_resort = logging.lastResort  # shows records while no view does
    level, last_level = LOG.level, last_resort.level if last_resort else logging.WARNING
    LOG.setLevel(logging.DEBUG)
    if last_resort:
        last_resort.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        LOG.setLevel(level)
        if last_resort:
            last_resort.setLevel(last_level)


def _user_message(error: BaseException) -> str | None:
    """Return the message for a user's mistake or a lack of resources; None for a bug."""
    if isinstance(error, FedMomentumError):
        return str(error)
    if isinstance(error, OSError):
        # such as a full disk or a read-only directory
        if error.strerror is None:
            return str(error) or type(error).__name__
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}. Make room or grant access, and try again"
    if _is_out_of_memory(error):
        return (
            "out of memory. Use a machine or device with more, smaller batches, or a smaller dtype"
        )
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out on any device, without importing torch for other errors."""
    if isinstance(error, MemoryError) or "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from fedmomentum.base_model.library_errors import is_out_of_memory

    return is_out_of_memory(error)


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        OUT.print(f"fedmomentum {version('fedmomentum')}", markup=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="print the version and exit", is_eager=True, callback=_show_version
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="show tracebacks; every command accepts it")
    ] = False,
) -> None:
    pass  # `main` has removed `--debug`


for command in COMMANDS:
    app.command()(command)
app.add_typer(network.keys_app, name="keys")
app.add_typer(privacy.privacy_app, name="privacy")
