"""The files that come with the package for people to copy: configurations, systemd units, an nginx configuration."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from fedmomentum.errors import ConfigError

ROOT = Path(__file__).parent
SHIPPED: Mapping[str, str] = {
    "configs/default.toml": "the demonstration: four clients on this machine, some three minutes",
    "configs/job.toml": "an example job for a federation over a network",
    "deploy/fedmomentum-serve.service": "systemd unit of a coordinator",
    "deploy/fedmomentum-join.service": "systemd unit of a site",
    "deploy/nginx.conf": "nginx in front of a coordinator",
}


def copy_shipped(out: Path, names: list[str]) -> list[Path]:
    """Copy files that come with the package.

    Args:
        out: Directory to copy into; made if it is not there.
        names: Which, by their file name or as `fedmomentum files` lists them; all if empty.

    Returns:
        The copies.

    Raises:
        ConfigError: If there is no such file, or a copy would replace one that is there.
    """
    by_name = {Path(name).name: name for name in SHIPPED} | {name: name for name in SHIPPED}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        known = ", ".join(Path(name).name for name in SHIPPED)
        raise ConfigError(f"no file {unknown[0]!r} comes with fedmomentum; there are {known}")
    chosen = list(dict.fromkeys(by_name[name] for name in names)) or list(SHIPPED)
    targets = [out / Path(name).name for name in chosen]
    for target in targets:
        if target.exists():
            raise ConfigError(f"{target} is there already; remove it, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    for name, target in zip(chosen, targets, strict=True):
        shutil.copyfile(ROOT / name, target)
    return targets
