"""Open what a user points at: a run, a global model, a PEFT adapter, or one client's model.

`export`, `evaluate`, `generate` and `inspect` all use this module, so that none mistakes the shared
part of a run for a complete model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedmomentum.aggregation import Method
from fedmomentum.aggregation.client_adapters import client_start, with_fixed_residual
from fedmomentum.aggregation.registry import build_method
from fedmomentum.base_model.devices import pick_device
from fedmomentum.base_model.hub import resolve_base, resolve_given_base
from fedmomentum.errors import ConfigError, FedMomentumError, ModelError
from fedmomentum.formats.directories import (
    ADAPTER_CONFIG,
    find_manifest,
    is_adapter_directory,
    read_manifest,
    retained_rounds,
)
from fedmomentum.global_model.base_loading import base_of_adapter
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.personal import PersonalFactors, check_factor, personal_states
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.hub_adapter import find_adapter
from fedmomentum.lora.peft_folder import read_adapter
from fedmomentum.run.origin import moved_path, read_origin
from fedmomentum.server.saved_run import committed_records, saved_settings
from fedmomentum.utils.names import directory_name
from fedmomentum.utils.text import first_few, printable

if TYPE_CHECKING:
    import torch

    from fedmomentum.config.schema import Config
    from fedmomentum.formats.manifest import RunState


def personal_model(
    model: GlobalModel, factors: PersonalFactors, method: Method | None
) -> GlobalModel:
    """Return the model of one client: the global part with the client's own factors.

    Args:
        model: The run's global model after a round.
        factors: The client's own factors after that round.
        method: The run's method; only needed if the clients' ranks differ.

    Returns:
        The client's model as a global model, which can be exported and used like any other.

    Raises:
        ModelError: If the factors do not fit the global part.
    """
    name = f"client {factors.client}: its own factors after round {factors.server_round}"
    if factors.mixed and method is None:
        raise ModelError(
            f"{name} were trained at a rank of its own, and the run's method cannot be loaded"
        )
    # All factors must belong to modules that the run adapts.
    modules = {key.rpartition(".")[0] for key in factors.tensors}
    unknown = sorted(modules - model.adapter.modules.keys())
    if unknown:
        raise ModelError(
            f"{name} are of module {unknown[0]}, which the run's adapter does not have"
        )
    # What the client starts a round from: the global adapter at its rank and scaling, and the fixed
    # part.
    start, fixed = client_start(
        cast(Method, method),  # only used if ranks differ
        model.adapter,
        modules,
        rank=factors.rank,
        scaling=factors.scaling,
        is_mixed=factors.mixed,
    )
    # Each product combines the global factor and the client's own.
    parts = {}
    for module, matrix in start.modules.items():
        given = {"B": matrix.B, "A": matrix.A}
        for kind in model.personal:
            tensor = factors.tensors.get(f"{module}.{kind}")
            if tensor is None:
                raise ModelError(f"{name} lack {module}.{kind}")
            check_factor(tensor, tuple(given[kind].shape), f"{name}: {module}.{kind}")
            given[kind] = tensor
        parts[module] = LowRank(given["B"], given["A"])
    own = with_fixed_residual(
        replace(start, modules=parts, name=f"adapter of {factors.client}"), fixed
    )
    whose = re.sub(r"[`|<>]", "_", factors.client)  # it appears in a table of an export's README.md
    return replace(
        model, adapter=own, method=f"{model.method}, the model of client {whose}", personal=""
    )


@dataclass(frozen=True, eq=False)
class Result:
    """A model that can be exported and used.

    Attributes:
        path: Its directory.
        model: The model; with a client, the client's own.
        config: The run's settings; None if it is not a run.
        client: Whose model it is; empty if there is one for all.
        name: The hub name that the user gave, if it was not the directory.
    """

    path: Path
    model: GlobalModel
    config: Config | None = None
    client: str = ""
    name: str = ""

    @property
    def title(self) -> str:
        """What to call it: `round 3 of runs/office, client north`."""
        if (self.path / ADAPTER_CONFIG).is_file():
            return self.name or str(self.path)
        whose = f", client {self.client}" if self.client else ""
        return f"round {self.model.server_round} of {self.path}{whose}"


def open_result(
    path: Path, *, server_round: str = "last", client: str = "", store: Path | None = None
) -> Result:
    """Read what a user points at.

    Args:
        path: The directory of a run, a global model or a PEFT adapter; or the adapter's name on the
            hub, `OWNER/NAME` or `OWNER/NAME@REVISION`.
        server_round: For a run: a number, `last` or `best`.
        client: For a run whose method leaves factors with each client: whose model.
        store: Where that client's own factors are, if not in the run's directory: the store of its
            node.

    Raises:
        ModelError: If nothing is there, or the client's own factors are missing, damaged or too
            old.
        AdapterError: If the adapter cannot be read.
        HubError: If the hub does not provide it.
        ConfigError: If a client is named but there is one model for all, or none is named but each
            client has its own.
    """
    if store is not None and not client:
        raise ConfigError(
            "--store is where a client's own factors are; name the client by --client"
        )
    # An adapter directory, of this package or any other.
    name = str(path)
    path = find_adapter(path)
    if is_adapter_directory(path):
        _refuse_choices(name, "a PEFT adapter", server_round, client)
        adapter = read_adapter(path, name)
        return Result(path, GlobalModel(base_of_adapter(path, adapter), adapter), name=name)
    # A global model, or a round of a run.
    file = find_manifest(path, server_round)
    model = GlobalModel.load(path, server_round)
    if not retained_rounds(path):
        _refuse_choices(path, "a global model", server_round, client)
        return Result(path, model)
    config = saved_settings(path, model.server_round)
    if not model.personal:
        if client:
            raise ConfigError(
                f"{path} was made by {model.method}, which has one global model; leave out "
                f"--client {client}"
            )
        return Result(path, model, config)
    # One model for each client: join its personal factors with the global part.
    run = checkpoint_state(file)
    factors = _factors(path, model, run, client, store)
    method = _method(config) if factors.mixed else None
    return Result(path, personal_model(model, factors, method), config, client)


def whose_factors(path: Path, run: RunState) -> dict[str, list[int]]:
    """Return the clients with personal factors in a run's directory, each with its rounds."""
    found: dict[str, list[int]] = {}
    for store in _stores(path):
        found |= personal_states(store, run.run_id).clients()
    return dict(sorted(found.items()))


def example_client(path: Path) -> str | None:
    """Return a client to name in an example command; None if the run has one model for all."""
    file = find_manifest(path, "last")
    manifest = read_manifest(file)
    if not manifest.personal:
        return None
    run = checkpoint_state(file)
    return next(iter([*whose_factors(path, run), *sorted(run.held)]), "NAME")


def checkpoint_state(file: Path) -> RunState:
    """Return the server's state in a run's checkpoint.

    Raises:
        ModelError: If the file is damaged, or does not belong to a run.
    """
    run = read_manifest(file).run
    if run is None:
        raise ModelError(
            f"{file} is of a global model alone: the clients' own factors belong to a run"
        )
    return run


def _refuse_choices(path: Path | str, kind: str, server_round: str, client: str) -> None:
    if client:
        raise ConfigError(f"{path} is {kind}, the same for all clients; leave out --client")
    if server_round != "last":
        raise ConfigError(f"{path} is {kind}, which has no rounds; leave out --round")


def _method(config: Config | None) -> Method | None:
    if config is None:
        return None
    return build_method(
        config.method.name, {k.replace("-", "_"): v for k, v in config.method.settings.items()}
    )


def _stores(path: Path) -> list[Path]:
    """Return where a run on this machine keeps personal factors."""
    clients = path / "clients"
    return [path, *(sorted(clients.iterdir()) if clients.is_dir() else [])]


def _factors(
    path: Path, model: GlobalModel, run: RunState, client: str, store: Path | None
) -> PersonalFactors:
    """Return the personal factors of a client as of the model's round."""
    here = whose_factors(path, run)
    known = sorted({*run.held, *here})
    if not client:
        which = (
            f"those of {_listed(list(here))} are here"
            if here
            else (
                "none are here, each client has its own (--store); its clients are "
                f"{_listed(known)}"
            )
        )
        raise ConfigError(
            f"{path} was made by {model.method}, which leaves the factors {model.personal} with "
            f"each client: there is no one global model. Name a client by --client; {which}"
        )
    # Personal factors are in the run's directory, or in the store of the client's node.
    stores = [store] if store is not None else [path, path / "clients" / directory_name(client)]
    for place in stores:
        factors = personal_states(place, run.run_id).load(client, model.server_round)
        if factors is not None:
            _refuse_stale(path, factors, model.server_round)
            return factors
    # Nothing fits: say what is there instead.
    kept = [
        trained for place in stores for trained in personal_states(place, run.run_id).files(client)
    ]
    if kept:
        raise ModelError(
            f"client {client}: its own factors after round {model.server_round} are no longer "
            f"kept; there are those after the rounds {_listed(kept)}. Give a later --round"
        )
    if store is not None:
        raise ModelError(
            f"{store} holds no factors of client {printable(client)} in this run; give the store "
            f"of its node, such as nodes/{directory_name(client)}"
        )
    if client in known:
        raise ModelError(
            f"client {client}: its own factors are not in {path}. They are in the client's own "
            "store: give it by --store; or the client had not trained by then"
        )
    raise ConfigError(
        f"{path} has no client {printable(client)!r}; its clients are {_listed(known)}"
    )


def _refuse_stale(path: Path, factors: PersonalFactors, server_round: int) -> None:
    """Refuse factors that are older than the client's last training in the run.

    Raises:
        ModelError: If they are, or the rows of metrics are not those that were committed.
    """
    for record in committed_records(path, server_round):
        trained = record.round if factors.client in record.accepted else 0
        if factors.server_round < trained <= server_round:
            raise ModelError(
                f"client {factors.client}: the newest of its own factors up to round "
                f"{server_round} are those after round {factors.server_round}, but it trained in "
                f"round {trained} too; the store is an older copy"
            )


def _listed(items: Sequence[Any]) -> str:
    return first_few([printable(str(item), 80) for item in items], 20) or "none"


# ── the base model ────────────────────────────────────────────────────────────────────────────────


def find_base(result: Result, base: str = "") -> Path:
    """Find the base model of a result.

    If a run was moved together with its base, the base is looked for at the same path relative to
    the run's directory. `BaseIdentity.check` decides whether it is the right one.

    Args:
        result: The result.
        base: The location that the user gives; empty for none.

    Raises:
        ModelError: If it cannot be found.
    """
    identity = result.model.base
    if base:
        return resolve_given_base(base, identity.revision if base == identity.name else None)
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
        raise ModelError(
            f"{error}. If the base model is somewhere else now, give --base"
        ) from error


def choose_device(result: Result, device: str) -> torch.device:
    """Return the requested device, else that of the run, else the best one.

    Raises:
        ModelError: If this machine does not have it.
    """
    if not device:
        device = result.config.model.device if result.config is not None else "auto"
    try:
        return pick_device(device)
    except ModelError as error:
        raise ModelError(f"{error}. Give another by --device") from error
