"""A run's configuration: a TOML file that fits on a screen. Every key, its default and what it means are here.

Keys are kebab-case in the file and on the command line (`key=value`), snake_case in code; they are converted here
and nowhere else. `docs/configuration.md` is made from these classes.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from fedmomentum.chat_date import DEFAULT_DATE, parse_date
from fedmomentum.errors import ConfigError
from fedmomentum.names import check_client_name
from fedmomentum.schema import check_free_form, printable


def _option(default: Any, doc: str) -> Any:
    """A key with its default and its documentation."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


def _need(good: bool, key: str, value: Any, wanted: str) -> None:
    if not good:
        raise ConfigError(f"{printable(key)} must be {wanted}; got {_shown(value)}")


def _shown(value: Any) -> str:
    """A value as a message shows it: on one line, and not in full where it is long."""
    return printable(repr(value), 200)


@dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    name: str = _option(
        "smollm2-135m-instruct", "the embedded model, a model folder, or a name on the Hugging Face hub"
    )
    revision: str | None = _option(None, "hub revision (commit, tag or branch)")
    dtype: str = _option("auto", "auto (bfloat16 where the processor has it, else float32), float32, bfloat16, float16")
    device: str = _option("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    chat_date: str = _option(
        DEFAULT_DATE, "the date (YYYY-MM-DD) that chat templates take for today's, in training, evaluation and "
                      "generation alike; the same for all clients. The default is what Llama's templates show without "
                      "a clock"
    )  # fmt: skip

    def __post_init__(self) -> None:
        parse_date(self.chat_date)


OWN_KEYS = ("rank", "lora-alpha", "target-modules")
"""What a client may have of its own in `[lora.clients.NAME]`."""


@dataclass(frozen=True)
class LoraConfig:
    """The adapter every client trains."""

    rank: int = _option(8, "rank of the global adapter; it never changes")
    lora_alpha: float = _option(16.0, "numerator of the scaling: lora-alpha / rank")
    target_modules: list[str] = _option([], "names of the adapted linear modules; empty: PEFT's choice for the model")
    dropout: float = _option(0.0, "LoRA dropout in local training")
    use_rslora: bool = _option(False, "scale by lora-alpha / sqrt(rank)")
    modules_to_save: list[str] = _option(
        [], "modules trained in full, in float32, and averaged by weight; names as above"
    )
    clients: dict[str, Any] = _option(
        {}, "clients that train less: `[lora.clients.NAME]` with a rank up to lora.rank, a lora-alpha, target-modules"
    )

    def __post_init__(self) -> None:
        _need(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        _need(self.lora_alpha > 0, "lora.lora-alpha", self.lora_alpha, "above 0")
        _need(0 <= self.dropout < 1, "lora.dropout", self.dropout, "in [0, 1)")
        for client, own in self.clients.items():
            check_client_name(client, "lora.clients")
            _need(isinstance(own, dict), f"lora.clients.{client}", own, "a table")
            for key in own:
                _need(key in OWN_KEYS, f"lora.clients.{client}.{key}", own[key], f"one of {', '.join(OWN_KEYS)}")
            self.of(client)

    def of(self, client: str) -> LoraConfig:
        """What this client trains; it downloads the whole adapter all the same."""
        own = self.clients.get(client, {})
        rank, alpha = own.get("rank", self.rank), own.get("lora-alpha", self.lora_alpha)
        modules = own.get("target-modules", self.target_modules)
        _need(type(rank) is int and 1 <= rank <= self.rank, f"lora.clients.{client}.rank", rank,
              f"a whole number from 1 to lora.rank, {self.rank}")  # fmt: skip
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        _need(number and alpha > 0, f"lora.clients.{client}.lora-alpha", alpha, "a number above 0")
        names = isinstance(modules, list) and all(isinstance(name, str) for name in modules)
        _need(names, f"lora.clients.{client}.target-modules", modules, "a list of names")
        return dataclasses.replace(self, rank=rank, lora_alpha=float(alpha), target_modules=modules, clients={})

    def at_rank(self, rank: int) -> LoraConfig:
        """The same at another rank, in the same scaling."""
        if rank == self.rank:
            return self
        share = rank / self.rank
        return dataclasses.replace(
            self, rank=rank, lora_alpha=self.lora_alpha * (math.sqrt(share) if self.use_rslora else share)
        )

    @property
    def is_mixed(self) -> bool:
        """Whether clients have different ranks."""
        return any(self.of(client).rank != self.rank for client in self.clients)

    @property
    def scaling(self) -> float:
        """`lora_alpha / rank`, or over its root with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True)
class DataConfig:
    """Whose data is where, and how much is held out."""

    source: str = _option("", "one source for all clients: a JSONL, JSON, CSV or Parquet file, a folder saved by "
                              "datasets, a hub name, or reasoning-gym (the built-in tasks)")  # fmt: skip
    client_files: dict[str, str] = _option({}, "one file a client instead: client name = file")
    client_column: str | None = _option(None, "column of the source that names each row's client")
    split: str = _option("train", "split of a source that has several")
    tasks: list[str] = _option([], "built-in tasks to mix; empty: all")
    num_examples: int = _option(2000, "training examples over all clients (built-in tasks)")
    num_test_examples: int = _option(400, "held-out examples over all clients (built-in tasks)")
    num_clients: int = _option(4, "clients to divide a source among")
    partition: str = _option("iid", "how to divide: iid, dirichlet, categories, sizes")
    category_column: str | None = _option(None, "column to divide and report by")
    concentration: float = _option(0.5, "of the Dirichlet partition: small is skewed, large is even")
    min_examples: int = _option(8, "fewest examples of a client")
    categories_per_client: int = _option(2, "for the partition categories")
    sizes: list[float] = _option([], "for the partition sizes: one number a client, in proportion")
    test_source: str | None = _option(None, "a held-out source, shared out over the clients")
    test_split: str = _option("test", "split of the held-out source")
    test_fraction: float = _option(0.1, "share of its own examples that each client holds out")
    max_length: int = _option(512, "longest example in tokens; longer ones are cut")
    max_lost_share: float = _option(0.02, "refused where a larger share of examples loses its whole answer to the cut")

    def __post_init__(self) -> None:
        _need(
            not (self.source and self.client_files), "data.source", self.source, "left out where client-files is given"
        )
        for client in self.client_files:
            check_client_name(client, "data.client-files")
        _need(self.partition in ("iid", "dirichlet", "categories", "sizes"), "data.partition", self.partition,
              "iid, dirichlet, categories or sizes")  # fmt: skip
        _need(self.num_clients >= 1, "data.num-clients", self.num_clients, "at least 1")
        _need(self.concentration > 0, "data.concentration", self.concentration, "above 0")
        _need(0 <= self.test_fraction < 1, "data.test-fraction", self.test_fraction, "in [0, 1)")
        _need(0 <= self.max_lost_share <= 1, "data.max-lost-share", self.max_lost_share, "in [0, 1]")
        _need(self.max_length >= 2, "data.max-length", self.max_length, "at least 2")


@dataclass(frozen=True)
class TrainingConfig:
    """What each client does in a round. The optimiser starts afresh every round."""

    local_steps: int | None = _option(None, "optimiser steps a round; this or local-epochs (default: 10 steps)")
    local_epochs: float | None = _option(None, "passes over the client's data a round")
    batch_size: int = _option(8, "examples in a step")
    learning_rate: float = _option(1e-3, "of the first round")
    learning_rate_schedule: str = _option("constant", "over the rounds: constant, linear or cosine (to a tenth)")
    function: str | None = _option(None, "your own training function, module:function; see docs/training.md")
    arguments: dict[str, Any] = _option(
        {}, "further fields of transformers.TrainingArguments, e.g. weight_decay = 0.01"
    )

    def __post_init__(self) -> None:
        if self.local_steps is None and self.local_epochs is None:
            object.__setattr__(self, "local_steps", 10)
        _need(self.local_steps is None or self.local_epochs is None, "training.local-steps", self.local_steps,
              "left out where local-epochs is given")  # fmt: skip
        _need(self.local_steps is None or self.local_steps >= 1, "training.local-steps", self.local_steps, "at least 1")
        _need(self.local_epochs is None or self.local_epochs > 0, "training.local-epochs", self.local_epochs, "above 0")
        _need(self.batch_size >= 1, "training.batch-size", self.batch_size, "at least 1")
        _need(self.learning_rate > 0, "training.learning-rate", self.learning_rate, "above 0")
        _need(self.learning_rate_schedule in ("constant", "linear", "cosine"), "training.learning-rate-schedule",
              self.learning_rate_schedule, "constant, linear or cosine")  # fmt: skip

    def rate(self, server_round: int, num_rounds: int) -> float:
        """The learning rate of a round: constant, or falling to a tenth in the last round."""
        progress = (server_round - 1) / max(1, num_rounds - 1)
        if self.learning_rate_schedule == "linear":
            return self.learning_rate * (1 - 0.9 * progress)
        if self.learning_rate_schedule == "cosine":
            return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        return self.learning_rate


@dataclass(frozen=True)
class MethodConfig:
    """How the server combines the adapters."""

    name: str = _option("fedmomentum", "see `fedmomentum methods`; or module:Class of your own")
    settings: dict[str, Any] = _option({}, 'the method\'s own, e.g. split = "aligned", energy = 0.999 (fedmomentum)')

    def __post_init__(self) -> None:
        _check_free(self.settings, "method.settings")


@dataclass(frozen=True)
class FederationConfig:
    """The rounds."""

    num_rounds: int = _option(5, "rounds")
    participation: float = _option(1.0, "share of the clients drawn each round, in (0, 1]")
    quorum: float = _option(0.5, "share of the drawn clients that must answer well, else the run stops")
    max_client_share: float = _option(0.9, "largest weight of one client where there are several")
    max_norm_ratio: float = _option(
        20.0,
        "how many times further than the others, for the same work, a client may move the model; one that goes "
        "further, and further than its own steps can take it, is left out of the round",
    )
    uplink_dtype: str = _option("float32", "of the factors that clients send: float32, float16 or bfloat16")
    downlink_dtype: str = _option(
        "float32", "of the adapter's factors that clients are sent; what rounding takes goes into the residual"
    )
    round_seconds: float = _option(3600.0, "over a network: how long clients have for one answer")
    join_seconds: float = _option(
        600.0,
        "over a network: how long a start waits for all registered clients (a resumed one: a minute), and a round for "
        "the quorum of them",
    )

    def __post_init__(self) -> None:
        _need(self.num_rounds >= 1, "federation.num-rounds", self.num_rounds, "at least 1")
        _need(0 < self.participation <= 1, "federation.participation", self.participation, "in (0, 1]")
        _need(0 < self.quorum <= 1, "federation.quorum", self.quorum, "in (0, 1]")
        _need(0 < self.max_client_share <= 1, "federation.max-client-share", self.max_client_share, "in (0, 1]")
        _need(self.max_norm_ratio > 1, "federation.max-norm-ratio", self.max_norm_ratio, "above 1")
        for key in ("uplink_dtype", "downlink_dtype"):
            _need(getattr(self, key) in ("float32", "float16", "bfloat16"), f"federation.{key.replace('_', '-')}",
                  getattr(self, key), "float32, float16 or bfloat16")  # fmt: skip
        _need(self.round_seconds > 0, "federation.round-seconds", self.round_seconds, "above 0")
        _need(self.join_seconds >= 0, "federation.join-seconds", self.join_seconds, "0 or more")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation: loss, perplexity and greedy exact match, global and per client."""

    every: int = _option(1, "evaluate every so many rounds (and before the first and after the last); 0: never")
    num_examples: int = _option(16, "held-out examples of each of the round's clients, between the ends")
    final_num_examples: int = _option(
        100, "held-out examples of every client, before the first and after the last round"
    )
    batch_size: int = _option(32, "examples in a forward pass")

    def __post_init__(self) -> None:
        _need(self.every >= 0, "evaluation.every", self.every, "0 or more")
        _need(self.num_examples >= 1, "evaluation.num-examples", self.num_examples, "at least 1")
        _need(self.final_num_examples >= 1, "evaluation.final-num-examples", self.final_num_examples, "at least 1")
        _need(self.batch_size >= 1, "evaluation.batch-size", self.batch_size, "at least 1")


@dataclass(frozen=True)
class RunConfig:
    """The process."""

    seed: int = _option(0, "of everything that is drawn: data, participants, initialisation, batches")
    threads: int = _option(0, "CPU threads; 0: all cores. Part of the result: other counts give other last bits")
    keep_rounds: int = _option(3, "checkpoints kept, besides the best")
    report_to: list[str] = _option(
        [], 'trackers that are told of every round, e.g. ["tensorboard"]; see docs/metrics.md. Empty: none'
    )

    def __post_init__(self) -> None:
        _need(0 <= self.seed < 2**63, "run.seed", self.seed, "from 0 to 2**63 - 1")
        _need(0 <= self.threads <= 4096, "run.threads", self.threads, "from 0 to 4096")
        _need(self.keep_rounds >= 1, "run.keep-rounds", self.keep_rounds, "at least 1")


@dataclass(frozen=True)
class Config:
    """A whole run. Made by `load_config` or `from_dict`."""

    model: ModelConfig
    lora: LoraConfig
    data: DataConfig
    training: TrainingConfig
    method: MethodConfig
    federation: FederationConfig
    evaluation: EvaluationConfig
    run: RunConfig


SECTIONS: dict[str, type] = get_type_hints(Config)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and `section.key=value` overrides; paths in it are relative to the file.

    Raises:
        ConfigError: no such file, not TOML, an unknown key (with the nearest known one), or a bad value.
    """
    path = Path(path)
    try:
        # A pipe or a device in place of a file would never end; one that the user's shell made is meant.
        if path.exists() and not path.is_file() and not str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/")):
            raise ConfigError(f"{path} is no regular file")
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration file {path}") from error
    except (OSError, ValueError, RecursionError) as error:  # no file, not UTF-8, a number of thousands of digits
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    for override in overrides:
        _override(table, override)
    return _with_paths(from_dict(table), path.parent)


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with `section.key=value` overrides.

    Raises:
        ConfigError: an unknown key, or a bad value.
    """
    table = to_dict(config)
    for override in overrides:
        _override(table, override)
    return from_dict(table)


def parse_value(text: str) -> Any:
    """Return a value given on the command line: TOML, or the text itself where it is no TOML (`method.name=fedit`)."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if table.keys() == {"value"} else text


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or len(names) < 2:
        raise ConfigError(f"{override!r} is no setting; write section.key=value, e.g. federation.num-rounds=3")
    value = parse_value(text)
    for name in names[:-1]:
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {name} is no section")
        table = inner
    table[names[-1]] = value


def from_dict(table: Mapping[str, Any]) -> Config:
    """A configuration from TOML tables; see `load_config`."""
    _known(table, SECTIONS, "section")
    return Config(**{name: _section(kind, name, table.get(name, {})) for name, kind in SECTIONS.items()})


def _section(kind: type, section: str, table: Any) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{section} must be a table, [{section}]; got {_shown(table)}")
    hints = get_type_hints(kind)
    _known(table, [name.replace("_", "-") for name in hints], f"key in [{section}]")
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        values[name] = _typed(value, hints[name], f"{section}.{key}")
    return kind(**values)


def _known(table: Mapping[str, Any], known: Any, what: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key.replace("_", "-"), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown {what}: {printable(str(key), 100)}; {hint}")


def _typed(value: Any, hint: Any, key: str) -> Any:
    """The value, checked against the annotation; an int is taken for a float."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        origin = get_origin(kind) or kind
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            _check_free(value, key)
            return float(value)
        if origin is list and isinstance(value, (list, tuple)):
            return [_typed(item, get_args(kind)[0], key) for item in value]
        if origin is dict and isinstance(value, Mapping) and get_args(kind)[1] is not Any:
            return {name: _typed(item, get_args(kind)[1], f"{key}.{name}") for name, item in value.items()}
        if isinstance(value, origin) and not (isinstance(value, bool) and origin is not bool):
            _check_free(value, key)
            return value
    names = " or ".join(getattr(k, "__name__", str(k)) for k in kinds if k is not type(None))
    raise ConfigError(f"{printable(key)} must be of type {names}; got {_shown(value)}")


def _check_free(value: Any, key: str) -> None:
    """Refuse numbers that are not finite or do not fit 64 bits, at any depth.

    Raises:
        ConfigError: If there is one; or if tables are nested deeper than any setting is.
    """
    check_free_form(value, key, ConfigError)
    inner: list[tuple[str, Any]] = [(key, value)]
    while inner:
        name, item = inner.pop()
        if isinstance(item, Mapping):
            inner.extend((f"{name}.{part}", held) for part, held in item.items())
        elif isinstance(item, (list, tuple)):
            inner.extend((name, held) for held in item)
        elif isinstance(item, float):
            _need(math.isfinite(item), name, item, "a finite number")
        elif isinstance(item, int):
            _need(-(2**63) <= item < 2**63, name, "a number of more than 64 bits", "a whole number of at most 64 bits")


def _with_paths(config: Config, folder: Path) -> Config:
    """Relative paths that exist beside the configuration file are meant from there; saved, they are absolute."""

    def placed(name: str) -> str:
        return str((folder / name).resolve()) if name and (folder / name).exists() else name

    data, model = config.data, config.model
    data = dataclasses.replace(
        data,
        source=placed(data.source),
        test_source=placed(data.test_source) if data.test_source else None,
        client_files={client: placed(file) for client, file in data.client_files.items()},
    )
    return dataclasses.replace(config, data=data, model=dataclasses.replace(model, name=placed(model.name)))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Every key with its value, kebab-case; None left out, as TOML has none."""
    result: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        values = dataclasses.asdict(getattr(config, section))
        result[section] = {key.replace("_", "-"): value for key, value in values.items() if value is not None}
    return result


def to_toml(config: Config) -> str:
    """The configuration as a TOML file that `load_config` reads back to an equal one."""
    lines = []
    for section, values in to_dict(config).items():
        tables = {key: value for key, value in values.items() if isinstance(value, dict)}
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items() if key not in tables]
        for key, table in tables.items():
            if table:
                lines += [f"[{section}.{key}]", *(f"{_quoted(k)} = {_toml(v)}" for k, v in table.items())]
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c for c in escaped) + '"'


LOCATIONS = frozenset({"model.name", "model.revision", "data.source", "data.test-source", "data.client-files"})
"""Settings that say where something is: another value is the same run if the content is."""
MAY_CHANGE = frozenset({
    "federation.num-rounds", "federation.quorum", "federation.round-seconds", "federation.join-seconds",
    "run.keep-rounds", "run.report-to",
    "model.name", "model.revision",  # the base model is compared by content
})  # fmt: skip
"""Settings that a resumed run may change: none of the rounds that are done depends on them."""


def altered_settings(text: str, committed: str) -> list[str]:
    """Return the keys of a run's config.toml that are not as its checkpoint has them.

    Those of `MAY_CHANGE` and `LOCATIONS` are left aside.

    Args:
        text: config.toml, every key written out.
        committed: the settings in the checkpoint, likewise.

    Raises:
        ConfigError: If either is not TOML.
    """
    try:
        now, before = _flat(tomllib.loads(text)), _flat(tomllib.loads(committed))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"not TOML: {error}") from error
    keys = sorted((now.keys() | before.keys()) - MAY_CHANGE - LOCATIONS)
    return [key for key in keys if repr(now.get(key)) != repr(before.get(key))]


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """`section.key` to value; a table that is none is kept under its own name."""
    found: dict[str, Any] = {}
    for section, values in table.items():
        if isinstance(values, Mapping):
            found |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            found[section] = values
    return found


def differences(old: Config, new: Config) -> list[str]:
    """The keys that differ, as `section.key`."""
    before, after = to_dict(old), to_dict(new)
    return [
        f"{section}.{key}"
        for section in SECTIONS
        for key in sorted(before[section].keys() | after[section].keys())
        if before[section].get(key) != after[section].get(key)
    ]


def reference() -> str:
    """`docs/configuration.md`, from the classes."""
    lines = [
        "# Configuration",
        "",
        "A run is one TOML file; `fedmomentum run CONFIG.toml section.key=value ...` overrides keys. Unknown keys are",
        "refused. Every key with its default (made by `python -m fedmomentum.config`):",
        "",
    ]
    for section, kind in SECTIONS.items():
        lines += [
            f"## [{section}]",
            "",
            str(kind.__doc__).splitlines()[0],
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        for item in dataclasses.fields(kind):
            made: Any = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
            default = "" if made is None else f"`{_toml(made)}`"
            lines.append(f"| `{item.name.replace('_', '-')}` | {default} | {item.metadata['doc']} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference(), end="")
