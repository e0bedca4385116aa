"""Installs packages into this process's environment with pip or uv."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence

from fedmomentum.errors import ConfigError


def install_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that installs packages into this process's environment.

    Args:
        arguments: Requirements, and options common to pip and uv, such as `--no-deps`.

    Raises:
        ConfigError: If this environment has no pip, and uv is not installed.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", *arguments]
    # environments created by uv have no pip
    uv = shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--python", sys.executable, *arguments]
    raise ConfigError(
        f"neither pip nor uv is installed beside {sys.executable}; run `python -m ensurepip` with "
        "it, and try again"
    )


def install(arguments: Sequence[str]) -> None:
    """Install packages; the installer prints to this process's output.

    Raises:
        ConfigError: If there is no installer, or it fails.
    """
    command = install_command(arguments)
    if subprocess.run(command).returncode != 0:
        raise ConfigError(
            "the installation failed (see above). If a package index could not be reached, try "
            "again with a network; if a package could not be built, install a C compiler"
        )
    importlib.invalidate_caches()
