"""Translates Flower's run config and node config into our settings.

Flower's values are numbers, booleans and strings under flat names. Names with a dot are keys of
docs/configuration.md, such as `training.local-steps`; lists are strings, `'["q_proj", "v_proj"]'`.
The other names, defined below, exist only for the Flower apps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from fedmomentum.config.toml import from_dict, resolve_paths
from fedmomentum.config.toml_values import parse_value
from fedmomentum.errors import ConfigError
from fedmomentum.utils.names import check_client_name, directory_name
from fedmomentum.utils.schema import Schema, validation_message
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config

T = TypeVar("T", bound=Schema)
Flat = Mapping[str, Any]
"""Flower's run config or node config."""

DATA_LOCATIONS = ("source", "client-files", "client-column", "split", "test-source", "test-split")
"""Keys of `[data]` that locate data; for a named node, only its own settings apply."""
OWN_PRIVACY = ("budget", "ledger", "public-units", "max-rows")
"""Keys of `[privacy.dp]` that are a client's own; the same holds for them."""
NEEDS_OWN_LISTENER = {
    "secure-aggregation": "clients know one another by the keys that a server of ours admits",
    "roster": "it lists those keys",
}
"""Keys of `[privacy]` that only `fedmomentum serve` and `join` support, and why."""
PathText = Annotated[str, Meta(min_length=1, max_length=4096)]


class RunSettings(Schema, frozen=True, rename="kebab"):
    """The run config keys without a section.

    Attributes:
        out: The run's directory, on the machine of the SuperLink.
        num_clients: How many clients to wait for at the start, up to `federation.join-timeout`.
        resume: Whether to continue the run in `out`.
    """

    out: PathText
    num_clients: Annotated[int, Meta(ge=1, le=1_000_000)]
    resume: bool = False


class NodeSettings(Schema, frozen=True, rename="kebab"):
    """The node config keys without a section.

    Attributes:
        name: The client's name.
        data: The file with the client's data, as an alternative to keys of `[data]`.
        store: The directory for what the server sends.
        keep_warm: How many seconds the process with the base model outlives its last task.
        partition_id: Which client of the run's `[data]` this node plays, as an alternative to a
            name.
        num_partitions: Set by Flower's simulation engine; ignored, since the data determines it.
    """

    name: str | None = None
    data: PathText | None = None
    store: PathText | None = None
    keep_warm: Annotated[float, Meta(ge=0, le=1e9)] = 600.0
    partition_id: Annotated[int, Meta(ge=0)] | None = None
    num_partitions: int | None = None


@dataclass(frozen=True)
class AppNode:
    """A node of a Flower app: which client it plays, with its settings.

    Attributes:
        config: The client's configuration.
        name: The client's name; None if `partition_id` selects it.
        partition_id: Index of the client in the run's data, sorted by name.
        keep_warm: How many seconds the process with the base model outlives its last task.
    """

    config: Config
    name: str | None
    partition_id: int
    keep_warm: float
    _store: str | None

    def store(self, name: str) -> Path:
        """Return the directory for what the server sends, with the same default as `join`."""
        path = self._store or str(Path("nodes") / directory_name(name))
        return Path(path).resolve()


def read_run(run_config: Flat) -> tuple[RunSettings, Config]:
    """Return the server's settings from the run config.

    Raises:
        ConfigError: If a key is unknown, a value has the wrong type or is out of range, or a
            setting needs our own server.
    """
    own, table = _divide(run_config, "the run config")
    settings = _parse(own, RunSettings, "the run config")
    _refuse_listeners(table)
    return settings, resolve_paths(from_dict(table), Path.cwd())


def read_node(run_config: Flat, node_config: Flat) -> AppNode:
    """Return a node's settings: the run's, overridden by the node's own.

    Raises:
        ConfigError: If a key is unknown, a value has the wrong type or is out of range, a setting
            needs our own server, or the node has no name or no data.
    """
    _, run_table = _divide(run_config, "the run config")
    own, node_table = _divide(node_config, "the node config")
    settings = _parse(own, NodeSettings, "the node config")
    table = copy.deepcopy(run_table)
    if settings.name is not None:
        check_client_name(settings.name, "the node config's name")
        # The server must not say where data is on this machine.
        for key in DATA_LOCATIONS:
            table.get("data", {}).pop(key, None)
        # Nor may it say how much privacy this node may spend, or where that is recorded.
        private = table.get("privacy", {}).get("dp", {})
        for key in OWN_PRIVACY:
            private.pop(key, None)
        _merge(table, node_table)
        _name_data(table, settings)
    else:
        _require_partition(settings)
        _merge(table, node_table)
    _refuse_listeners(table)
    config = resolve_paths(from_dict(table), Path.cwd())
    partition_id = settings.partition_id or 0
    return AppNode(config, settings.name, partition_id, settings.keep_warm, settings.store)


def _name_data(table: dict[str, Any], settings: NodeSettings) -> None:
    """Add the location of the node's own data to the table.

    Raises:
        ConfigError: If there is none, or it is given twice.
    """
    data = table.setdefault("data", {})
    has_keys = bool(data.get("source") or data.get("client-files"))
    if settings.data is None and not has_keys:
        raise ConfigError(
            f"the node config names no data of {settings.name}; start the SuperNode with "
            f'--node-config \'name="{settings.name}" data="FILE"\''
        )
    if settings.data is not None:
        if has_keys:
            raise ConfigError(
                "the node config has data as well as data.source or data.client-files; leave one "
                "out"
            )
        data["client-files"] = {settings.name: settings.data}


def _require_partition(settings: NodeSettings) -> None:
    if settings.partition_id is None:
        raise ConfigError(
            "the node config has no name; start the SuperNode with --node-config "
            '\'name="north" data="FILE"\', or with partition-id=0, =1, ... if it shall play a '
            "client of the run's own [data]"
        )
    if settings.data is not None:
        raise ConfigError(
            "the node config has data and no name; add name, or leave data out: with partition-id "
            "the run's [data] counts"
        )


# ── flat names ──


def _divide(flat: Flat, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a flat config into the keys without a section and the tables of the sections.

    Raises:
        ConfigError: If a key is both a value and a table.
    """
    own = {}
    table: dict[str, Any] = {}
    for key, value in flat.items():
        parts = _parts(key)
        if len(parts) == 1:
            own[key] = value
            continue
        holder = table
        for part in parts[:-1]:
            inner = holder.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{what}: {printable(key)} contradicts {printable(part)}")
            holder = inner
        if isinstance(holder.get(parts[-1]), dict):
            raise ConfigError(f"{what}: {printable(key)} contradicts the keys below it")
        holder[parts[-1]] = _as_list(value)
    return own, table


def _parts(key: str) -> list[str]:
    """Split a key at its dots; the rest after `data.client-files.` is one name, dots included."""
    prefix = "data.client-files."
    if key.startswith(prefix):
        return ["data", "client-files", key.removeprefix(prefix)]
    return key.split(".")


def _as_list(value: Any) -> Any:
    """Parse a list from TOML text; return other values unchanged."""
    if not isinstance(value, str) or not value.startswith("["):
        return value
    parsed = parse_value(value)
    return parsed if isinstance(parsed, list) else value


def _merge(table: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Merge `other` into `table`, recursively."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value


def _parse(own: Mapping[str, Any], kind: type[T], what: str) -> T:
    try:
        return msgspec.convert(own, kind)
    except msgspec.ValidationError as error:
        known = ", ".join(field.encode_name for field in msgspec.structs.fields(kind))
        raise ConfigError(
            f"{what}: {validation_message(error, own)}. Keys without a section are {known}; all "
            "others are section.key of docs/configuration.md"
        ) from error


def _refuse_listeners(table: Mapping[str, Any]) -> None:
    """Reject settings that Flower's SuperLink cannot support.

    Raises:
        ConfigError: If there is one.
    """
    privacy = table.get("privacy", {})
    for key, why in NEEDS_OWN_LISTENER.items():
        if isinstance(privacy, dict) and privacy.get(key):
            raise ConfigError(
                f"privacy.{key} needs a server and nodes of ours: {why}, and Flower's SuperLink "
                "keeps its nodes' keys to itself. Use fedmomentum serve and join, or leave it out"
            )
