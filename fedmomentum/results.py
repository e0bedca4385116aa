"""What a user points at: a run, a global model, a PEFT adapter, or one client's model where there is no global one.

`export`, `evaluate`, `generate` and `inspect` all come through here, so that none takes the shared part of a run for
a whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmomentum.aggregation import Method, build_method
from fedmomentum.checkpoint import committed_rows, saved_settings
from fedmomentum.config import Config
from fedmomentum.errors import ConfigError, FedMomentumError, ModelError
from fedmomentum.folders import ADAPTER_CONFIG, find_manifest, is_adapter, kept_rounds, read_manifest
from fedmomentum.global_model import GlobalModel
from fedmomentum.identity import BaseIdentity, resolve_base
from fedmomentum.manifest import RunState
from fedmomentum.names import directory_name
from fedmomentum.origin import moved_path, read_origin
from fedmomentum.peft_io import read_adapter
from fedmomentum.personal import PersonalFactors, clients_with_factors, load_personal, personal_files, personal_model
from fedmomentum.schema import printable


@dataclass(frozen=True, eq=False)
class Result:
    """A model that can be exported and used.

    Attributes:
        path: What the user named.
        model: The model; with a client, the client's own.
        config: The run's settings; None for what is no run.
        client: Whose model it is; empty where there is one for all.
    """

    path: Path
    model: GlobalModel
    config: Config | None = None
    client: str = ""

    @property
    def title(self) -> str:
        """What to call it: `round 3 of runs/office, client north`."""
        if (self.path / ADAPTER_CONFIG).is_file():
            return str(self.path)
        whose = f", client {self.client}" if self.client else ""
        return f"round {self.model.server_round} of {self.path}{whose}"


def open_result(path: Path, *, server_round: str = "last", client: str = "", store: Path | None = None) -> Result:
    """Read what a user points at.

    Args:
        path: The directory of a run, a global model or a PEFT adapter.
        server_round: Of a run: a number, `last` or `best`.
        client: Of a run whose method leaves factors with each client: whose model.
        store: Where that client's own factors are, if not in the run's directory: the store of its node.

    Raises:
        ModelError: If there is no such thing, or the client's own factors are missing, damaged or too old.
        AdapterError: If the adapter cannot be read.
        ConfigError: If a client is named where there is one model for all, or none where there is one for each.
    """
    if store is not None and not client:
        raise ConfigError("--store is where a client's own factors are; name the client by --client")
    if is_adapter(path):
        _refuse_choices(path, "a PEFT adapter", server_round, client)
        adapter = read_adapter(path)
        name = str(adapter.config.get("base_model_name_or_path") or "")
        return Result(path, GlobalModel(BaseIdentity(name, adapter.config.get("revision")), adapter))
    file = find_manifest(path, server_round)
    model = GlobalModel.load(path, server_round)
    if not kept_rounds(path):
        _refuse_choices(path, "a global model", server_round, client)
        return Result(path, model)
    config = saved_settings(path, model.server_round)
    if not model.personal:
        if client:
            raise ConfigError(
                f"{path} was made by {model.method}, which has one global model; leave out --client {client}"
            )
        return Result(path, model, config)
    run = checkpoint_state(file)
    factors = _factors(path, model, run, client, store)
    method = _method(config) if factors.mixed else None
    return Result(path, personal_model(model, factors, method), config, client)


def whose_factors(path: Path, run: RunState) -> dict[str, list[int]]:
    """Return the clients of a run whose own factors are in its directory, each with the rounds that are kept."""
    found: dict[str, list[int]] = {}
    for store in _stores(path):
        found |= clients_with_factors(store, run.run_id)
    return dict(sorted(found.items()))


def example_client(path: Path) -> str | None:
    """Return a client to name in a command, where a run has a model for each client; None where it has one for all."""
    file = find_manifest(path, "last")
    manifest = read_manifest(file)
    if not manifest.personal:
        return None
    run = checkpoint_state(file)
    return next(iter([*whose_factors(path, run), *sorted(run.held)]), "NAME")


def checkpoint_state(file: Path) -> RunState:
    """Return the server's state in a run's checkpoint.

    Raises:
        ModelError: If the file is damaged, or no run's.
    """
    run = read_manifest(file).run
    if run is None:
        raise ModelError(f"{file} is of a global model alone: the clients' own factors belong to a run")
    return run


def _refuse_choices(path: Path, kind: str, server_round: str, client: str) -> None:
    if client:
        raise ConfigError(f"{path} is {kind}, the same for all clients; leave out --client")
    if server_round != "last":
        raise ConfigError(f"{path} is {kind}, which has no rounds; leave out --round")


def _method(config: Config | None) -> Method | None:
    if config is None:
        return None
    return build_method(config.method.name, {k.replace("-", "_"): v for k, v in config.method.settings.items()})


def _stores(path: Path) -> list[Path]:
    """Where a run on this machine keeps personal factors: in its directory, or (simulated) in its clients'."""
    clients = path / "clients"
    return [path, *(sorted(clients.iterdir()) if clients.is_dir() else [])]


def _factors(path: Path, model: GlobalModel, run: RunState, client: str, store: Path | None) -> PersonalFactors:
    """The own factors of a client, as of the model's round."""
    here = whose_factors(path, run)
    known = sorted({*run.held, *here})
    if not client:
        which = (
            f"those of {_listed(list(here))} are here"
            if here
            else (f"none are here, each client has its own (--store); its clients are {_listed(known)}")
        )
        raise ConfigError(
            f"{path} was made by {model.method}, which leaves the factors {model.personal} with each client: there is "
            f"no one global model. Name a client by --client; {which}"
        )
    stores = [store] if store is not None else [path, path / "clients" / directory_name(client)]
    for place in stores:
        factors = load_personal(place, run.run_id, client, model.server_round)
        if factors is not None:
            _refuse_stale(path, factors, model.server_round)
            return factors
    kept = [trained for place in stores for trained in personal_files(place, run.run_id, client)]
    if kept:
        raise ModelError(
            f"client {client}: its own factors after round {model.server_round} are no longer kept; there are those "
            f"after the rounds {_listed(kept)}. Give a later --round"
        )
    if store is not None:
        raise ModelError(
            f"{store} holds no factors of client {printable(client)} in this run; give the store of its node, such as "
            f"nodes/{directory_name(client)}"
        )
    if client in known:
        raise ModelError(
            f"client {client}: its own factors are not in {path}. They are in the client's own store: give it by "
            "--store; or the client had not trained by then"
        )
    raise ConfigError(f"{path} has no client {printable(client)!r}; its clients are {_listed(known)}")


def _refuse_stale(path: Path, factors: PersonalFactors, server_round: int) -> None:
    """Refuse a store that lacks a later training of the client, one that counted in the run.

    Raises:
        ModelError: If it does, or the rows of metrics are not those that were committed.
    """
    for row in committed_rows(path, server_round):
        trained = row["round"] if factors.client in row["accepted"] else 0
        if factors.server_round < trained <= server_round:
            raise ModelError(
                f"client {factors.client}: the newest of its own factors up to round {server_round} are those after "
                f"round {factors.server_round}, but it trained in round {trained} too; the store is an older copy"
            )


def _listed(items: Sequence[Any], most: int = 20) -> str:
    shown = ", ".join(printable(str(item), 80) for item in items[:most])
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown or "none"


# ── the base model ───────────────────────────────────────────────────────────────────────────────────────────────


def base_folder(result: Result, base: str = "") -> Path:
    """Find the base model of a result.

    A run that was moved together with its base is followed: the base is looked for where it lies as seen from the
    run's directory. Whether it is the right one is for `BaseIdentity.check` to say.

    Args:
        result: What needs its base.
        base: The user's own word on where it is.

    Raises:
        ModelError: If it cannot be found.
    """
    identity = result.model.base
    if base:
        return resolve_base(base, identity.revision if base == identity.name else None)
    names = [identity.name]
    if result.config is not None:
        names.append(result.config.model.name)
        origin = read_origin(result.path)
        if origin is not None:
            names += [moved_path(name, origin, result.path) for name in names]
    for name in names:
        if name and Path(name).is_dir():
            return Path(name)
    if not identity.name or identity.name == "unknown":
        raise ModelError(f"{result.path} does not say which base model it is for; give --base")
    try:
        return resolve_base(identity.name, identity.revision)
    except FedMomentumError as error:
        raise ModelError(f"{error}. If the base model is somewhere else now, give --base") from error
