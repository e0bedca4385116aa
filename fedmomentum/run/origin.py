"""What a run was made from: fingerprints of the clients' data, and where its directory was.

A run may only continue with the data that it began with. File names cannot ensure that: a project
may move, and a file may change. So the content is compared, and paths may differ.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmomentum.errors import ConfigError, DataError, ModelError
from fedmomentum.formats.directories import read_manifest, retained_rounds, round_file
from fedmomentum.formats.manifest import Fingerprint
from fedmomentum.formats.run_files import DATA, OriginFile
from fedmomentum.utils.hub import split_revision
from fedmomentum.utils.records import read_record
from fedmomentum.utils.text import first_few, printable

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config
    from fedmomentum.data.examples import ClientData, Example
    from fedmomentum.data.tokenized import TokenizedExamples


def fingerprints(
    clients: Sequence[ClientData], tokens: Mapping[str, Sequence[TokenizedExamples]] | None = None
) -> dict[str, Fingerprint]:
    """Return the fingerprint of each client's data, including the order of its examples.

    Args:
        clients: The clients' examples.
        tokens: Client to its examples as tokens, if available.
    """
    found = {}
    for client in clients:
        parts = tokens[client.client_id] if tokens is not None else None
        found[client.client_id] = Fingerprint(
            train=_hash(map(_text, client.train)),
            held_out=_hash(map(_text, client.test)),
            tokens=None if parts is None else _hash(_tokens(parts)),
        )
    return found


def _text(example: Example) -> str:
    parts: list[Any] = [example.prompt, example.completion, example.category, example.scoring]
    if example.rejected is not None:
        parts.append(example.rejected)
    if example.learned_turns is not None:
        parts.append({"learned turns": example.learned_turns})
    return json.dumps(parts)


def _tokens(parts: Sequence[TokenizedExamples]) -> Iterator[str]:
    for number, part in enumerate(parts):
        for index in range(len(part)):
            example = part.example(index)
            text = f"{number} {example.num_prompt_tokens} {example.input_ids}"
            # Only if present: most examples have neither.
            yield text + "".join(
                f" {more}" for more in (example.gaps, example.rejected_ids) if more
            )


def _hash(items: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()


def read_origin(directory: Path) -> OriginFile | None:
    """Return what a run's directory says about its data; None if it says nothing.

    Raises:
        ModelError: If the file is damaged.
    """
    try:
        return read_record(directory / DATA, OriginFile)
    except FileNotFoundError:
        return None
    except ModelError as error:
        raise ModelError(
            f"{error}. Restore it from a copy; or delete it, and say by --base and --data where "
            "things are"
        ) from error


def _began_with(directory: Path, server_round: int | None) -> Mapping[str, Fingerprint] | None:
    """Return the fingerprints of the data that a run began with, from a checkpoint or data.json."""
    rounds = retained_rounds(directory)
    if rounds:
        run = read_manifest(
            round_file(directory, rounds[-1] if server_round is None else server_round)
        ).run
        return run.data if run else None
    origin = read_origin(directory)
    return origin.clients if origin else None


def check_data(
    directory: Path, now: Mapping[str, Fingerprint], server_round: int | None = None
) -> None:
    """Refuse to continue a run on data other than what it began with.

    Args:
        directory: The run's directory; if it says nothing about its data, any data is accepted.
        now: The fingerprints of the current data.
        server_round: The checkpoint to compare with; by default the last.

    Raises:
        DataError: If a client's data differs; the message names clients and parts.
        ModelError: If the record in the directory is damaged.
    """
    began = _began_with(directory, server_round)
    if began is None:
        return
    different = []
    other_tokens = []
    # Compare text first: if only the tokens differ, the cause is the tokenizer.
    for client in sorted(began.keys() | now.keys()):
        name = printable(client, 80)
        if client not in now or client not in began:
            different.append(
                f"{name} ({'has no data now' if client in began else 'had no data then'})"
            )
            continue
        parts = []
        if began[client].train != now[client].train:
            parts.append("training examples")
        if began[client].held_out != now[client].held_out:
            parts.append("held-out examples")
        if parts:
            different.append(f"{name} ({' and '.join(parts)})")
        elif (
            began[client].tokens
            and now[client].tokens
            and began[client].tokens != now[client].tokens
        ):
            other_tokens.append(name)
    if different:
        raise DataError(
            f"{directory} was made with other data; it differs for {first_few(different)}. Give "
            "the data that the run began with, or start over in another --out"
        )
    if other_tokens:
        raise DataError(
            f"{directory}: the texts are those that the run began with, but they give other tokens "
            f"for {first_few(other_tokens)}: the base model's tokenizer or chat template is "
            "another one now. Give the base model that the run began with, or start over in "
            "another --out"
        )


# ── moved projects ────────────────────────────────────────────────────────────────────────────────


def moved_path(path: str, origin: OriginFile, directory: Path) -> str:
    """Return the current location of a path that may have moved with the run's directory.

    Args:
        path: The path in the run's configuration.
        origin: Where the run's directory was.
        directory: Where it is now.

    Returns:
        The same relative path from the new directory, if `path` is absolute and no longer exists,
        and that one does; else `path` unchanged.
    """
    if not path or not os.path.isabs(path) or os.path.exists(path):
        return path
    # Apply the old relative path to the new directory.
    candidate = os.path.normpath(directory.resolve() / os.path.relpath(path, origin.directory))
    return candidate if os.path.exists(candidate) else path


def with_moved_paths(config: Config, directory: Path) -> Config:
    """Return a run's configuration with its paths updated, if the project moved as a whole.

    Paths that still exist are kept. Files that are found are not trusted: the content of base model
    and data is compared with what the run was made from.

    Raises:
        ModelError: If the record in the run's directory is damaged.
    """
    origin = read_origin(directory)
    if origin is None:
        return config

    def current(path: str) -> str:
        return moved_path(path, origin, directory)

    data = config.data
    data = replace(
        data,
        source=current(data.source),
        test_source=current(data.test_source) if data.test_source else data.test_source,
        client_files={client: current(file) for client, file in data.client_files.items()},
    )
    return replace(config, data=data, model=replace(config.model, name=current(config.model.name)))


def refuse_missing(config: Config) -> None:
    """Refuse paths that do not exist, and say how to replace them; hub names are not checked.

    Raises:
        DataError: See `refuse_missing_data`.
        ModelError: If the base model's directory is not where the configuration says.
    """
    refuse_missing_data(config)
    if _is_missing(config.model.name):
        raise ModelError(
            f"there is no {config.model.name}. If the base model is somewhere else now, give "
            "--base DIR"
        )


def refuse_missing_data(config: Config) -> None:
    """Refuse data paths that do not exist, and say how to replace them.

    Raises:
        DataError: If a client's file, the source or the test source is not where the configuration
            says.
    """
    data = config.data
    for client, file in data.client_files.items():
        if _is_missing(file):
            raise DataError(
                f"client {printable(client, 80)}: there is no {file}. If it is somewhere else now, "
                "give --data NAME=FILE for it"
            )
    if _is_missing(data.source):
        raise DataError(
            f"there is no {data.source}. If the data is somewhere else now, give --data FILE"
        )
    if data.test_source and _is_missing(data.test_source):
        raise DataError(
            f"there is no {data.test_source}. If it is somewhere else now, give "
            "data.test-source=FILE"
        )


def _is_missing(path: str) -> bool:
    return os.path.isabs(path) and not os.path.exists(path)


def with_given_locations(config: Config, base: str, data: Sequence[str]) -> Config:
    """Return the configuration with base model and data at the locations that the user gives.

    Args:
        config: A configuration.
        base: A directory, the bundled model's name, or a name on the hub, optionally with a
            revision (`NAME@REVISION`); empty for the configuration's own.
        data: `NAME=FILE` for a client's file; or one `FILE` if all clients share one source.

    Raises:
        ConfigError: If a client is unknown or missing, or more than one shared source is given.
    """
    if base:
        name, revision = split_revision(base)
        model = replace(config.model, name=_absolute(name))
        # A different name has its own revision, or none.
        if revision is not None or model.name != config.model.name:
            model = replace(model, revision=revision)
        config = replace(config, model=model)
    if not data:
        return config
    if not config.data.client_files:
        if len(data) > 1:
            raise ConfigError(
                f"all clients share one source; --data can be given once, got {' and '.join(data)}"
            )
        return replace(config, data=replace(config.data, source=_absolute(data[0])))
    files = dict(config.data.client_files)
    for item in data:
        # A name may contain "=", too.
        ends = [
            end for end, character in enumerate(item) if character == "=" and item[:end] in files
        ]
        if not ends:
            raise ConfigError(
                "--data must be NAME=FILE with the name of a client, one of "
                f"{first_few(sorted(files))}; got {item!r}"
            )
        files[item[: ends[0]]] = _absolute(item[ends[0] + 1 :])
    return replace(config, data=replace(config.data, client_files=files))


def _absolute(path: str) -> str:
    return os.path.abspath(path) if os.path.exists(path) else path
