"""`fedmomentum files`: example configurations, systemd units and an nginx configuration."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from fedmomentum.cli.options import OUT
from fedmomentum.errors import ConfigError

ROOT = Path(__file__).parents[1]
SHIPPED: Mapping[str, str] = {
    "configs/default.toml": "the demonstration: four clients on this machine, some three minutes",
    "configs/job.toml": "an example job for a federation over a network",
    "deploy/fedmomentum-serve.service": "systemd unit of a server",
    "deploy/fedmomentum-join.service": "systemd unit of a client",
    "deploy/nginx.conf": "nginx in front of a server",
}
"""Path of each file within the package -> its description."""


def files(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="which to copy [default: all]", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="directory to copy to [default: only list them]", show_default=False
        ),
    ] = None,
) -> None:
    """List or copy the files that come with the package: example configurations, service units."""
    if out is not None:
        for target in copy_package_files(out, names or []):
            OUT.print(str(target), markup=False, soft_wrap=True)
        return
    if names:
        raise ConfigError("give the directory to copy to: --out DIR")
    for name, description in SHIPPED.items():
        OUT.print(f"{ROOT / name}  {description}", markup=False, soft_wrap=True)


def copy_package_files(directory: Path, names: list[str]) -> list[Path]:
    """Copy files that come with the package.

    Args:
        directory: The directory to copy into; created if it does not exist.
        names: The files, by name or as listed by `fedmomentum files`; all if empty.

    Returns:
        The copies.

    Raises:
        ConfigError: If there is no such file, or a copy would replace an existing one.
    """
    by_name = {Path(path).name: path for path in SHIPPED} | {path: path for path in SHIPPED}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        known = ", ".join(Path(path).name for path in SHIPPED)
        raise ConfigError(f"no file {unknown[0]!r} comes with fedmomentum; there are {known}")
    chosen = dict.fromkeys(by_name[name] for name in names or SHIPPED)
    targets = [directory / Path(path).name for path in chosen]
    for target in targets:
        if target.exists():
            raise ConfigError(f"{target} is there already; remove it, or choose another --out")
    directory.mkdir(parents=True, exist_ok=True)
    for path, target in zip(chosen, targets, strict=True):
        shutil.copyfile(ROOT / path, target)
    return targets
