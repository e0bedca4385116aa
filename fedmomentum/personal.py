"""The factors that a client keeps for itself: their files, and the model that they make with the global part.

Some methods share one factor and leave the other with each client (`Method.personal`). Such a run has no one global
model, but as many models as clients. A client's own factors are written after each of its trainings::

    personal/<run>/<client>/0003.safetensors

in the run's directory, or in the store of a node. Both directory names are made by `names.directory_name`, and every
file says whose it is, so that no client is ever given another's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, cast

import torch
from msgspec import Meta
from torch import Tensor

from fedmomentum.aggregation import Method
from fedmomentum.aggregation.whole import start_of, with_tails
from fedmomentum.errors import FedMomentumError, ModelError
from fedmomentum.files import read_metadata, read_safetensors, safetensors_bytes, sha256, write_atomically
from fedmomentum.global_model import GlobalModel
from fedmomentum.lowrank import LowRank
from fedmomentum.names import directory_name
from fedmomentum.schema import Count, Hash, Label, PositiveCount, Schema, parse_json

DIRECTORY = "personal"
_KEY = "personal"
"""The key of the one pair of metadata in a file."""
_FILE = re.compile(r"(\d{4,})\.safetensors")


class _Head(Schema, frozen=True):
    """What a file says of itself."""

    client: Label
    run_id: Label
    round: Count
    rank: PositiveCount
    scaling: Annotated[float, Meta(gt=0)]
    mixed: bool
    sha256: Hash | None = None


@dataclass(frozen=True, eq=False)
class PersonalFactors:
    """A client's own factors after a round.

    Attributes:
        client: The client's name.
        run_id: The run on the wire.
        server_round: The round of the training that left them.
        rank: The client's rank in that round.
        scaling: The client's `lora_alpha / rank`.
        mixed: Whether the clients' ranks differ, so that all start in one gauge (`start_of`).
        tensors: `<module>.B` or `<module>.A` to the factor, float32, for each module that the client adapts.
    """

    client: str
    run_id: str
    server_round: int
    rank: int
    scaling: float
    mixed: bool
    tensors: Mapping[str, Tensor]

    def _head(self) -> _Head:
        return _Head(
            client=self.client,
            run_id=self.run_id,
            round=self.server_round,
            rank=self.rank,
            scaling=self.scaling,
            mixed=self.mixed,
        )


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def personal_files(store: Path, run_id: str, client: str) -> dict[int, Path]:
    """Return the files of one client in one run: the round that left them, ascending, to the file."""
    return _files(_directory(store, run_id) / directory_name(client))


def save_personal(store: Path, factors: PersonalFactors) -> None:
    """Write a client's own factors; a round that is made again replaces its file."""
    folder = _directory(store, factors.run_id) / directory_name(factors.client)
    folder.mkdir(parents=True, exist_ok=True)
    head = _json(factors._head(), _digest(factors._head(), factors.tensors))
    data = safetensors_bytes(factors.tensors, (_KEY, head))
    write_atomically(folder / f"{factors.server_round:04d}.safetensors", data)


def load_personal(store: Path, run_id: str, client: str, last_round: int) -> PersonalFactors | None:
    """Return a client's own factors as they were after a round.

    Args:
        store: The run's directory, or a node's store.
        run_id: The run.
        client: The client.
        last_round: The newest factors that this or an earlier round left are wanted.

    Returns:
        The factors; None where there are none so old.

    Raises:
        ModelError: If the file is damaged, or belongs to another client, run or round.
    """
    files = personal_files(store, run_id, client)
    rounds = [server_round for server_round in files if server_round <= last_round]
    if not rounds:
        return None
    server_round = max(rounds)
    file = files[server_round]
    factors = _read(file)
    if (factors.client, factors.run_id, factors.server_round) != (client, run_id, server_round):
        raise ModelError(
            f"client {client}: {file} holds the factors of {factors.client} after round {factors.server_round}; "
            "restore the file from a copy"
        )
    return factors


def clients_with_factors(store: Path, run_id: str) -> dict[str, list[int]]:
    """Return the clients whose own factors are in a store, sorted, each with the rounds that are kept.

    A damaged file does not hide the others; a client whose every file is damaged is left out.
    """
    found = {}
    for folder in _folders(store, run_id):
        files = _files(folder)
        for file in files.values():
            try:
                found[_read_head(file).client] = list(files)
            except FedMomentumError:
                continue
            break
    return dict(sorted(found.items()))


def check_personal(store: Path, run_id: str, trained: Mapping[str, int]) -> None:
    """Refuse to go on with a run whose clients' own factors are not all there, each undamaged.

    Args:
        store: The run's directory.
        run_id: The run.
        trained: Client to the last round in which its training counted.

    Raises:
        ModelError: If a client's factors after that round are missing or damaged.
    """
    for client, server_round in sorted(trained.items()):
        if server_round not in personal_files(store, run_id, client):
            raise ModelError(
                f"client {client}: its own factors after round {server_round} are missing from {store / DIRECTORY}; "
                "restore them from a copy. Without them this client cannot go on where it was"
            )
        load_personal(store, run_id, client, server_round)


def drop_later(store: Path, run_id: str, last_round: int) -> None:
    """Delete what rounds after `last_round` left, which are made again: a client that sits one out must not find it."""
    for folder in _folders(store, run_id):
        for trained, file in _files(folder).items():
            if trained > last_round:
                file.unlink(missing_ok=True)


def prune_personal(store: Path, rounds: Collection[int], run_id: str) -> None:
    """Delete what no kept round of a run needs: for each of them a client's newest factors up to it are kept.

    Args:
        store: The run's directory.
        rounds: The rounds whose checkpoints are kept.
        run_id: The run.
    """
    newest = max(rounds)
    for folder in _folders(store, run_id):
        files = _files(folder)
        needed = set()
        for kept in rounds:
            needed.add(max((trained for trained in files if trained <= kept), default=None))
        for trained, file in files.items():
            if trained < newest and trained not in needed:
                file.unlink(missing_ok=True)


def keep_newest(store: Path, run_id: str, client: str, count: int) -> None:
    """Delete all but the newest `count` files of a client."""
    for file in list(personal_files(store, run_id, client).values())[:-count]:
        file.unlink(missing_ok=True)


def _directory(store: Path, run_id: str) -> Path:
    return store / DIRECTORY / directory_name(run_id)


def _folders(store: Path, run_id: str) -> list[Path]:
    directory = _directory(store, run_id)
    return sorted(folder for folder in directory.iterdir() if folder.is_dir()) if directory.is_dir() else []


def _files(folder: Path) -> dict[int, Path]:
    found = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        matched = _FILE.fullmatch(file.name)
        if matched:
            found[int(matched[1])] = file
    return dict(sorted(found.items()))


def _json(head: _Head, digest: str | None) -> str:
    fields = {name: getattr(head, name) for name in head.__struct_fields__}
    return json.dumps({**fields, "sha256": digest}, sort_keys=True)


def _digest(head: _Head, tensors: Mapping[str, Tensor]) -> str:
    """A hash over everything that a file says."""
    return sha256(_json(head, None).encode() + safetensors_bytes(tensors))


def _read_head(file: Path) -> _Head:
    try:
        if not file.is_file():
            raise ModelError(f"{file} is no regular file")
        metadata = read_metadata(file)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    return parse_json(str(metadata.get(_KEY, "")), _Head, str(file), ModelError)


def _read(file: Path) -> PersonalFactors:
    try:
        head = _read_head(file)
        tensors, _ = read_safetensors(file.read_bytes(), str(file))
        if _digest(head, tensors) != head.sha256:
            raise ModelError(f"{file} does not match its checksum")
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except FedMomentumError as error:
        raise ModelError(
            f"a client's own factors are damaged: {error}. Restore the file from a copy; without it this client cannot "
            "go on where it was"
        ) from error
    return PersonalFactors(head.client, head.run_id, head.round, head.rank, head.scaling, head.mixed, tensors)


# ── use ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def put_personal(factors: PersonalFactors, live: Mapping[str, Tensor], *, rank: int, scaling: float) -> None:
    """Copy a client's own factors into its live adapter: all of them, or none.

    Args:
        factors: What was saved.
        live: `<module>.B` or `<module>.A` to the live tensor, for each factor that stays with the client.
        rank: The client's rank now.
        scaling: Its scaling now.

    Raises:
        ModelError: If they are of other modules, shapes, rank or scaling than the live adapter, or not finite.
    """
    name = f"client {factors.client}: its own factors after round {factors.server_round}"
    if (factors.rank, factors.scaling) != (rank, scaling):
        raise ModelError(
            f"{name} have rank {factors.rank} and scaling {factors.scaling:g}; the adapter now has rank {rank} and "
            f"scaling {scaling:g}. Use the [lora] that they were trained with"
        )
    odd = sorted(factors.tensors.keys() ^ live.keys())
    if odd:
        raise ModelError(f"{name} and the adapter differ: {odd[0]} is in one of them only")
    for key, tensor in factors.tensors.items():
        _check_tensor(tensor, tuple(live[key].shape), f"{name}: {key}")
    with torch.no_grad():
        for key, tensor in factors.tensors.items():
            live[key].copy_(tensor)


def personal_model(model: GlobalModel, factors: PersonalFactors, method: Method | None) -> GlobalModel:
    """Return the model of one client: the global part with the client's own factors.

    Args:
        model: The run's global model after a round.
        factors: The client's own factors after that round.
        method: The run's method; needed only where the clients' ranks differ.

    Returns:
        A global model that is the client's; it may be exported and used as any other.

    Raises:
        ModelError: If the factors do not fit the global part.
    """
    name = f"client {factors.client}: its own factors after round {factors.server_round}"
    if factors.mixed and method is None:
        raise ModelError(f"{name} were trained at a rank of its own, and the run's method cannot be loaded")
    modules = {key.rpartition(".")[0] for key in factors.tensors}
    unknown = sorted(modules - model.adapter.modules.keys())
    if unknown:
        raise ModelError(f"{name} are of module {unknown[0]}, which the run's adapter does not have")
    # what the client starts a round from: the global adapter at its rank and scaling, and what lies beside its base
    start, beside = start_of(
        cast(Method, method),  # asked only where ranks differ
        model.adapter,
        modules,
        rank=factors.rank,
        scaling=factors.scaling,
        is_mixed=factors.mixed,
    )
    parts = {}
    for module, matrix in start.modules.items():
        given = {"B": matrix.B, "A": matrix.A}
        for kind in model.personal:
            tensor = factors.tensors.get(f"{module}.{kind}")
            if tensor is None:
                raise ModelError(f"{name} lack {module}.{kind}")
            _check_tensor(tensor, tuple(given[kind].shape), f"{name}: {module}.{kind}")
            given[kind] = tensor
        parts[module] = LowRank(given["B"], given["A"])
    own = with_tails(replace(start, modules=parts, name=f"adapter of {factors.client}"), beside)
    whose = re.sub(r"[`|<>]", "_", factors.client)  # it stands in a table of an export's README.md
    return replace(model, adapter=own, method=f"{model.method}, the model of client {whose}", personal="")


def _check_tensor(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        raise ModelError(f"{name} is {tuple(tensor.shape)} in {tensor.dtype}; wanted {shape} in torch.float32")
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError(f"{name} holds NaN or Inf")
