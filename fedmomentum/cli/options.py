"""Shared parts of the commands: consoles, options, and checks of arguments."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.measure import Measurement
from rich.table import Table

from fedmomentum.errors import ConfigError
from fedmomentum.utils.terminal import SafeConsole

OUT = SafeConsole(highlight=False, soft_wrap=False)
ERR = SafeConsole(stderr=True, highlight=False, soft_wrap=True)

MAX_TABLE_WIDTH = 1000
DASHBOARD_ADDRESS = "127.0.0.1:9444"

# ── arguments ──

ConfigFile = Annotated[
    Path, typer.Argument(help="TOML file; see docs/configuration.md", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...",
        help="override keys; an empty VALUE removes a key from the configuration",
        show_default=False,
    ),
]
ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|ADAPTER",
        help="run, global model or PEFT adapter; or an adapter's hub name, OWNER/NAME[@REVISION]",
        show_default=False,
    ),
]

# ── options of a run ──

RunDirectoryOption = Annotated[
    Path | None,
    typer.Option("--out", help="the run's directory [default: runs/<name of the file>]"),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="continue the run in --out where it stopped")
]
ResumeRoundOption = Annotated[
    int | None,
    typer.Option(
        "--round",
        help="with --resume: continue from this checkpoint instead of the last; later rounds are "
        "repeated",
        show_default=False,
    ),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="[NAME=]FILE",
        help="where a client's file, or the source, is now; repeatable",
    ),
]

DashboardOption = Annotated[
    bool, typer.Option("--dashboard", help="serve a read-only page to watch the run on")
]
DashboardAddressOption = Annotated[
    str,
    typer.Option(
        "--dashboard-address",
        help="HOST:PORT of that page; port 0 takes any free one. On an address other than this "
        f"machine's own, the page asks for a token [default: {DASHBOARD_ADDRESS}]",
        show_default=False,
    ),
]

# ── options of a model ──

OutOption = Annotated[Path, typer.Option("--out", help="directory to write", show_default=False)]
BaseOption = Annotated[
    str,
    typer.Option(
        "--base",
        help="base model, if it is no longer where the run found it: a directory or a hub name, "
        "NAME[@REVISION]",
    ),
]
RoundOption = Annotated[str, typer.Option("--round", help="a number, last or best")]
ClientOption = Annotated[
    str,
    typer.Option("--client", help="whose model to use, if the method leaves factors at clients"),
]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store", help="that client's own store (see join) [default: the run's directory]"
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto, float32, bfloat16 or float16 [default: the run's]",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cpu, cuda, cuda:1, ... [default: the run's]", show_default=False
    ),
]


# ── checks ──


def print_full_width(table: Table) -> None:
    """Print a table with all of its columns, wider than the terminal if need be.

    Rich leaves out the columns that do not fit, and a pipe or file counts as 80 characters wide.
    """
    wide = SafeConsole(highlight=False, width=MAX_TABLE_WIDTH)
    wide.width = max(OUT.width, Measurement.get(wide, wide.options, table).maximum)
    wide.print(table)


def print_uncut(table: Table) -> None:
    """Print a table in the terminal's width, or wider if its numbers do not fit there.

    Rich cuts off what does not fit, numbers included. Only columns of names are folded.
    """
    wide = SafeConsole(highlight=False, width=MAX_TABLE_WIDTH)
    names = [column for column in table.columns if column.overflow == "fold"]
    # The least width is that of the table with its names folded as narrowly as they may be.
    for column in names:
        column.max_width = column.min_width
    least = Measurement.get(wide, wide.options, table).maximum
    for column in names:
        column.max_width = None
    wide.width = max(OUT.width, least)
    wide.print(table)


def shell_command(*words: object) -> str:
    """Return a command in a form that can be pasted into a shell."""
    return shlex.join(str(word) for word in words)


def check_resume_round(server_round: int | None, resume: bool) -> None:
    """Reject `--round` without `--resume`, and negative rounds.

    Raises:
        ConfigError: In either case.
    """
    if server_round is not None and (not resume or server_round < 0):
        raise ConfigError(
            f"--round needs --resume, and must be a round, 0 or more; got {server_round}"
        )


def check_output_directory(out: Path) -> None:
    """Reject a directory that cannot be created, before anything is loaded.

    Raises:
        ConfigError: If there is a file in its place, or its parent is not writable.
    """
    existing = out
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"--out {out}: {existing} is not a directory; choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--out {out}: {existing} is not writable; grant access, or choose another --out"
        )


def warn_if_nothing_to_resume(out: Path, resume: bool) -> None:
    """Print a note that a new run starts if `--out` holds none, as a mistyped directory does."""
    if resume and not (out / "config.toml").is_file():
        ERR.print(f"{out} holds no run to resume; a new one starts there")


def check_target(target: float) -> None:
    """Reject an exact match target that is not a fraction.

    Raises:
        ConfigError: If it is not.
    """
    if not 0 <= target <= 1:
        raise ConfigError(f"--target must be a fraction from 0 to 1; got {target:g}")


def require_flower() -> None:
    """Raise an error if Flower is missing.

    Raises:
        ConfigError: If it is not installed.
    """
    require_extra("flwr", "flower", "federations over a network need Flower")


def require_extra(package: str, extra: str, need: str) -> None:
    """Raise an error if a package that belongs to an extra is missing.

    Args:
        package: The package's import name.
        extra: The extra's name.
        need: What needs it, as the beginning of the message.

    Raises:
        ConfigError: If it is not installed.
    """
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ConfigError(f"{need}; install it with: pip install 'fedmomentum[{extra}]'")
