"""The base model that an adapter names, and whether several adapters name the same one."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.errors import AdapterError
from fedmomentum.utils.hub import is_repository_name
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.lora.adapter import Adapter

DEFAULT_REVISION = "main"
# Where the hub's client caches a model; the path contains its name and commit.
_CACHED = re.compile(r"(?:^|/)models--([^/]+)/snapshots/([^/]+)/?$")


def base_and_revision(adapter: Adapter) -> tuple[str, str]:
    """Return the base model that an adapter names, and its revision; empty if it names none.

    A path in the hub's cache is mapped to the hub's name, paths to the same directory are made
    equal, and a directory has no revision.
    """
    name = str(adapter.config.get("base_model_name_or_path") or "")
    revision = str(adapter.config.get("revision") or "")
    cached = _CACHED.search(name)
    if cached is not None:
        return cached[1].replace("--", "/"), revision or cached[2]
    if name and Path(name).is_dir():
        return os.path.realpath(name), ""
    return name.rstrip("/"), revision or (DEFAULT_REVISION if name else "")


def public_base(name: str, revision: str | None) -> tuple[str, str | None]:
    """Return a base model's public name and revision; a local directory has no name."""
    cached = _CACHED.search(name)
    if cached is not None:
        return cached[1].replace("--", "/"), revision or cached[2]
    return (name, revision) if is_repository_name(name) else ("", None)


def check_same_base(adapters: Sequence[Adapter]) -> None:
    """Reject adapters that name different base models, or different revisions of one.

    Raises:
        AdapterError: If they differ; the message lists what each one names.
    """
    named = [base_and_revision(adapter) for adapter in adapters]
    if len({base for base, _ in named}) > 1:
        listed = ", ".join(
            f"{adapter.name}: {printable(base) or 'none'}"
            for adapter, (base, _) in zip(adapters, named, strict=True)
        )
        raise AdapterError(
            f"the adapters were trained on different base models ({listed}); they cannot be "
            "combined. If these are names of one model, give the one to use: --base NAME"
        )
    if len({revision for _, revision in named}) > 1:
        listed = ", ".join(
            f"{adapter.name}: {printable(revision)}"
            for adapter, (_, revision) in zip(adapters, named, strict=True)
        )
        raise AdapterError(
            f"the adapters were trained on different revisions of {printable(named[0][0])} "
            f"({listed}). If their weights are the same, give the one to use: --base "
            f"{printable(named[0][0])}@REVISION"
        )


def with_base(adapter: Adapter, base: str, revision: str) -> Adapter:
    """Return the adapter with another base model or revision; empty arguments change nothing."""
    config = dict(adapter.config)
    if base and base != config.get("base_model_name_or_path"):
        own_name, own_revision = base_and_revision(adapter)
        config["base_model_name_or_path"] = base
        # A path in the hub's cache may be a revision of the same model.
        config["revision"] = (own_revision or None) if own_name == base else None
    if revision:
        config["revision"] = revision
    return replace(adapter, config=config)
