"""Configuration files: load, override, check the types, write, compare."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import tomllib
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from fedmomentum.config.fields import check_numbers, describe_value
from fedmomentum.config.privacy import DPConfig
from fedmomentum.config.schema import Config
from fedmomentum.config.toml_values import format_value, parse_value, quote, split_setting
from fedmomentum.errors import ConfigError
from fedmomentum.utils.text import printable

SECTIONS: dict[str, type] = get_type_hints(Config)
"""Name of each section to its class."""
INNER_SECTIONS: dict[str, type] = {"privacy.dp": DPConfig}
"""Tables within a section whose keys are known, and compared one by one."""
RENAMED_KEYS = {
    "participation": "client-fraction",
    "quorum": "min-valid-fraction",
    "max-client-share": "max-client-weight",
    "max-norm-ratio": "outlier-norm-ratio",
    "max-lost-share": "max-truncated-fraction",
    "keep-rounds": "keep-checkpoints",
    "round-seconds": "round-timeout",
    "join-seconds": "join-timeout",
}
"""Former names of keys to their names of today: a former name is refused with the new one."""
LOCATIONS = frozenset(
    {
        "model.name",
        "model.revision",
        "data.source",
        "data.test-source",
        "data.client-files",
        "privacy.roster",
        "privacy.dp.ledger",
    }
)
"""Settings that say where something is: with another value it is the same run if the content is."""
MAY_CHANGE = frozenset(
    {
        "federation.num-rounds",
        "federation.min-valid-fraction",
        "federation.round-timeout",
        "federation.join-timeout",
        "evaluation.probes",
        "privacy.dp.budget",  # of what may be spent, not of how it is
        "privacy.trusts-server",  # what a client asks of others, no matter of the sums
        "run.keep-checkpoints",
        "run.report-to",
        "model.name",
        "model.revision",  # the base model is compared by content
        # of the machine, as environment.json says
        "model.adapted-weights",
        "model.device",
        "run.devices",
    }
)
"""Settings that a resumed run may change: no finished round depends on them."""
STREAMS = ("/dev/fd/", "/dev/stdin", "/proc/")
"""Where a shell puts what a user pipes in on purpose; any other device or pipe could never end."""
MIN_SIMILARITY = 0.5
"""A known key at least so similar to an unknown one is suggested instead."""


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and `section.key=value` overrides; relative paths are relative to the file.

    Args:
        path: The file.
        overrides: Settings that replace those of the file.

    Returns:
        The configuration.

    Raises:
        ConfigError: If there is no such file, it is not TOML, a key is unknown (the message names
            the nearest known one), or a value is out of range.
    """
    path = Path(path)
    try:
        is_stream = path.exists() and not path.is_file()
        if is_stream and not str(path).startswith(STREAMS):
            raise ConfigError(f"{path} is no regular file")
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration file {path}") from error
    # Unreadable, not UTF-8, not TOML, or a number of thousands of digits.
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    for override in overrides:
        _apply_override(table, override)
    return resolve_paths(from_dict(table), path.parent)


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Return the configuration with `section.key=value` overrides.

    Raises:
        ConfigError: If a key is unknown, or a value is out of range.
    """
    table = to_dict(config)
    for override in overrides:
        _apply_override(table, override)
    return from_dict(table)


def _apply_override(table: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in the tables of a configuration, in place.

    Without a value, `section.key=`, the key is left out, as if the file did not have it.
    """
    names, text = split_setting(override)
    if text is None or len(names) < 2:
        raise ConfigError(
            f"{override!r} is no setting; write section.key=value, e.g. federation.num-rounds=3"
        )
    if not text.strip():
        _unset(table, names, override)
        return
    # Descend to the table that holds the key, and create those that are missing.
    value = parse_value(text)
    for name in names[:-1]:
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {name} is no section")
        table = inner
    table[names[-1]] = value


def _unset(table: dict[str, Any], names: Sequence[str], override: str) -> None:
    """Leave out one key of the tables of a configuration, in place.

    Raises:
        ConfigError: If there is no such key: a typing error must not leave the other key as it is.
    """
    section, key, *inner = names
    _check_known({section: None}, SECTIONS, "section")
    known = [name.replace("_", "-") for name in get_type_hints(SECTIONS[section])]
    _check_known({key: None}, known, f"key in [{section}]")
    # Within free tables, such as method.settings, only what is there can be left out.
    holder = table.get(section, {})
    for name in (key, *inner)[:-1]:
        holder = holder.get(name, {}) if isinstance(holder, dict) else {}
    if not isinstance(holder, dict) or (inner and inner[-1] not in holder):
        raise ConfigError(f"{override!r}: there is no {'.'.join(names)} to leave out")
    holder.pop(names[-1], None)


def from_dict(table: Mapping[str, Any]) -> Config:
    """Return the configuration of TOML tables.

    Raises:
        ConfigError: If a section or key is unknown, or a value has another type or is out of range.
    """
    _check_known(table, SECTIONS, "section")
    sections = {}
    for name, kind in SECTIONS.items():
        sections[name] = _parse_section(kind, name, table.get(name, {}))
    return Config(**sections)


def _parse_section(kind: type, section: str, table: Any) -> Any:
    """Return one section, its keys and their types checked."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{section} must be a table, [{section}]; got {describe_value(table)}")
    # Keys are kebab-case in the file and snake_case in the class.
    hints = get_type_hints(kind)
    _check_known(table, [name.replace("_", "-") for name in hints], f"key in [{section}]")
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        values[name] = _check_type(value, hints[name], f"{section}.{key}")
    return kind(**values)


def _check_known(table: Mapping[str, Any], known: Collection[str], what: str) -> None:
    """Refuse a key that is not known, and suggest the one that was probably meant."""
    for key in table:
        if key in known:
            continue
        # A former name, a typing error, or neither.
        kebab_case = key.replace("_", "-")
        new_name = RENAMED_KEYS.get(kebab_case)
        similar = difflib.get_close_matches(kebab_case, known, n=1, cutoff=MIN_SIMILARITY)
        if new_name in known:
            hint = f"it is called {new_name} now"
        elif similar:
            hint = f"did you mean {similar[0]}?"
        else:
            hint = f"known: {', '.join(known)}"
        raise ConfigError(f"unknown {what}: {printable(str(key), 100)}; {hint}")


def _check_type(value: Any, hint: Any, key: str) -> Any:
    """Return a value that has the annotated type; an int is accepted for a float."""
    is_union = get_origin(hint) in (Union, types.UnionType)
    alternatives = get_args(hint) if is_union else (hint,)
    # The first alternative of a union that fits; containers are checked item by item.
    for alternative in alternatives:
        if isinstance(alternative, type) and dataclasses.is_dataclass(alternative):
            # A table within the section; None is not its type, and falls through.
            if isinstance(value, Mapping) or len(alternatives) == 1:
                return _parse_section(alternative, key, value)
            continue
        origin = get_origin(alternative) or alternative
        arguments = get_args(alternative)
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            check_numbers(value, key)
            return float(value)
        if origin is list and isinstance(value, (list, tuple)):
            return [_check_type(item, arguments[0], key) for item in value]
        if origin is dict and isinstance(value, Mapping) and arguments[1] is not Any:
            return {
                name: _check_type(item, arguments[1], f"{key}.{name}")
                for name, item in value.items()
            }
        # A bool is an int to Python, and never one to a user.
        if isinstance(value, origin) and (origin is bool or not isinstance(value, bool)):
            check_numbers(value, key)
            return value
    names = []
    for kind in alternatives:
        is_table = dataclasses.is_dataclass(kind)
        names.append("table" if is_table else getattr(kind, "__name__", str(kind)))
    wanted = " or ".join(name for name in names if name != "NoneType")
    shown = describe_value(value)
    if str in alternatives and isinstance(value, int) and not isinstance(value, bool):
        shown += f", a number; a text is put in quotes, on the command line '{key}=\"{value}\"'"
    raise ConfigError(f"{printable(key)} must be of type {wanted}; got {shown}")


def resolve_paths(config: Config, directory: Path) -> Config:
    """Return the configuration with the paths that exist relative to a directory made absolute."""

    def resolve(name: str) -> str:
        is_there = name and (directory / name).exists()
        return str((directory / name).resolve()) if is_there else name

    # Every key that may hold a path.
    data = config.data
    data = dataclasses.replace(
        data,
        source=resolve(data.source),
        test_source=resolve(data.test_source) if data.test_source else None,
        client_files={client: resolve(file) for client, file in data.client_files.items()},
    )
    model = dataclasses.replace(config.model, name=resolve(config.model.name))
    start_from = resolve(config.lora.start_from) if config.lora.start_from else None
    lora = dataclasses.replace(config.lora, start_from=start_from)
    roster = resolve(config.privacy.roster) if config.privacy.roster else None
    privacy = dataclasses.replace(config.privacy, roster=roster, dp=_resolved_dp(config, directory))
    return dataclasses.replace(config, data=data, model=model, lora=lora, privacy=privacy)


def _resolved_dp(config: Config, directory: Path) -> DPConfig | None:
    """Return `[privacy.dp]` with its ledger's path, which may not exist yet, made absolute."""
    dp = config.privacy.dp
    if dp is None or dp.ledger is None:
        return dp
    return dataclasses.replace(dp, ledger=str((directory / dp.ledger).resolve()))


# ── writing ───────────────────────────────────────────────────────────────────────────────────────


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return every key with its value, in kebab-case; None is left out, for TOML has none."""
    return {section: _section_table(getattr(config, section)) for section in SECTIONS}


def _section_table(section: Any) -> dict[str, Any]:
    """Return a section's keys and values; a section within it is a table."""
    table: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            table[field.name.replace("_", "-")] = _section_table(value)
        elif value is not None:
            table[field.name.replace("_", "-")] = copy.deepcopy(value)
    return table


def _compared_values(config: Config) -> dict[str, Any]:
    """Return `section.key` to value, and that of the keys of inner sections."""
    values: dict[str, Any] = {}
    for section, table in to_dict(config).items():
        for key, value in table.items():
            name = f"{section}.{key}"
            if name not in INNER_SECTIONS:
                values[name] = value
                continue
            values[name] = {}
            values |= {f"{name}.{inner}": item for inner, item in value.items()}
    return values


def to_toml(config: Config) -> str:
    """Return the configuration as a TOML file that `load_config` reads back to an equal one."""
    lines = []
    for section, values in to_dict(config).items():
        inner_tables = {key: value for key, value in values.items() if isinstance(value, dict)}
        lines.append(f"[{section}]")
        for key, value in values.items():
            if key not in inner_tables:
                lines.append(f"{key} = {format_value(value)}")
        # Tables come last: a plain key behind one would belong to it.
        for key, table in inner_tables.items():
            if table:
                lines.append(f"[{section}.{key}]")
                lines += [f"{quote(name)} = {format_value(item)}" for name, item in table.items()]
        lines.append("")
    return "\n".join(lines)


# ── comparing ─────────────────────────────────────────────────────────────────────────────────────


def changed_keys(old: Config, new: Config) -> list[str]:
    """Return the keys that differ, as `section.key`."""
    before = _compared_values(old)
    after = _compared_values(new)
    order = list(SECTIONS)
    keys = sorted(
        before.keys() | after.keys(), key=lambda key: (order.index(key.partition(".")[0]), key)
    )
    return [key for key in keys if before.get(key) != after.get(key)]


def altered_settings(text: str, committed: str) -> list[str]:
    """Return the keys of a run's config.toml that differ from those of its checkpoint.

    Those of `MAY_CHANGE` and `LOCATIONS` do not count.

    Args:
        text: The content of config.toml, every key written out.
        committed: The settings in the checkpoint, in the same form.

    Returns:
        The keys, as `section.key`.

    Raises:
        ConfigError: If either text is not TOML.
    """
    try:
        current = _flatten(tomllib.loads(text))
        original = _flatten(tomllib.loads(committed))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"not TOML: {error}") from error
    keys = sorted((current.keys() | original.keys()) - MAY_CHANGE - LOCATIONS)
    # By repr, because 1 == True == 1.0.
    return [key for key in keys if repr(current.get(key)) != repr(original.get(key))]


def _flatten(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return `section.key` to value; a key outside any section is kept under its own name."""
    flat: dict[str, Any] = {}
    for section, values in table.items():
        if not isinstance(values, Mapping):
            flat[section] = values
            continue
        for key, value in values.items():
            name = f"{section}.{key}"
            if name in INNER_SECTIONS and isinstance(value, Mapping):
                flat[name] = {}
                flat |= {f"{name}.{inner}": item for inner, item in value.items()}
            else:
                flat[name] = value
    return flat
