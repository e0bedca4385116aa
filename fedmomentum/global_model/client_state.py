"""State that a client carries from round to round: its interface and its files.

A kind of state, such as a client's own factors, implements `ClientState`. It is written after each
time the client trains, in the run's directory or in the client's private store::

    <kind>/<run>/<client>/0003.safetensors

`names.directory_name` makes both directory names, and every file names its client, run and round,
so that no client is ever given another's state. Earlier rounds are kept as long as the run's
checkpoints, so that a repeated round starts from the same state as before.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar, Generic, Protocol, Self, TypeVar

from fedmomentum.errors import FedMomentumError, ModelError
from fedmomentum.utils.io import write_atomically
from fedmomentum.utils.names import directory_name

_FILE = re.compile(r"(\d{4,})\.safetensors")


class ClientState(Protocol):
    """State that one client carries from round to round."""

    KIND: ClassVar[str]
    """The name of the directory for its files."""
    TITLE: ClassVar[str]
    """What messages call it, such as `own factors`."""

    @property
    def client(self) -> str:
        """The client's name."""

    @property
    def run_id(self) -> str:
        """The run's identifier on the wire."""

    @property
    def server_round(self) -> int:
        """The round of training after which it was saved."""

    def encode(self) -> bytes:
        """Return the bytes of its file."""

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read and check a file.

        Raises:
            ModelError: If it is missing or damaged.
        """

    @classmethod
    def read_client(cls, file: Path) -> str:
        """Return the client that a file names, without reading all of it.

        Raises:
            FedMomentumError: If the file is damaged.
        """


S = TypeVar("S", bound=ClientState)


class ClientStateFiles(Generic[S]):
    """The files of one kind of client state in one run.

    Args:
        store: The run's directory, or a client's private store.
        run_id: The run on the wire.
        state_type: The kind of state.
    """

    def __init__(self, store: Path, run_id: str, state_type: type[S]) -> None:
        self.run_id = run_id
        self.root = store / state_type.KIND
        self._state_type = state_type
        self._directory = self.root / directory_name(run_id)

    # ── one client ──

    def files(self, client: str) -> dict[int, Path]:
        """Return the files of one client by round, ascending."""
        return _files_by_round(self._directory / directory_name(client))

    def save(self, state: S) -> None:
        """Write a client's state; a repeated round replaces its file."""
        directory = self._directory / directory_name(state.client)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / f"{state.server_round:04d}.safetensors", state.encode())

    def load(self, client: str, last_round: int) -> S | None:
        """Return a client's state as it was after a round.

        Args:
            client: The client.
            last_round: The round; the newest state from this or an earlier round is returned.

        Returns:
            The state; None if none was saved up to that round.

        Raises:
            ModelError: If the file is damaged, or belongs to another client, run or round.
        """
        files = self.files(client)
        rounds = [server_round for server_round in files if server_round <= last_round]
        if not rounds:
            return None
        server_round = max(rounds)
        file = files[server_round]
        state = self._state_type.read(file)
        if (state.client, state.run_id, state.server_round) != (client, self.run_id, server_round):
            raise ModelError(
                f"client {client}: {file} holds the {state.TITLE} of {state.client} after round "
                f"{state.server_round}; restore the file from a copy"
            )
        return state

    def retain_newest(self, client: str, count: int) -> None:
        """Delete all but the newest `count` files of a client."""
        for file in list(self.files(client).values())[:-count]:
            file.unlink(missing_ok=True)

    # ── all clients ──

    def clients(self) -> dict[str, list[int]]:
        """Return the clients with saved state, sorted, each with the rounds that are kept.

        A damaged file does not hide the others; a client whose files are all damaged is left out.
        """
        rounds_by_client = {}
        for directory in self._client_directories():
            files = _files_by_round(directory)
            for file in files.values():
                try:
                    rounds_by_client[self._state_type.read_client(file)] = list(files)
                except FedMomentumError:
                    continue
                break
        return dict(sorted(rounds_by_client.items()))

    def check(self, last_trained: Mapping[str, int]) -> None:
        """Refuse to resume a run if a client's state is missing or damaged.

        Args:
            last_trained: Client to the last round in which its update was accepted.

        Raises:
            ModelError: If a client's state after that round is missing or damaged.
        """
        title = self._state_type.TITLE
        for client, server_round in sorted(last_trained.items()):
            if server_round not in self.files(client):
                raise ModelError(
                    f"client {client}: its {title} after round {server_round} are missing from "
                    f"{self.root}; restore them from a copy. Without them this client cannot "
                    "continue where it stopped"
                )
            self.load(client, server_round)

    def discard_after(self, last_round: int) -> None:
        """Delete the state of later rounds, which will be repeated.

        A client that does not take part in the repeated round must not find the old state.
        """
        for directory in self._client_directories():
            for server_round, file in _files_by_round(directory).items():
                if server_round > last_round:
                    file.unlink(missing_ok=True)

    def prune(self, retained_rounds: Collection[int]) -> None:
        """Delete what no retained round needs: each needs every client's newest state by then.

        Args:
            retained_rounds: The rounds whose checkpoints are kept.
        """
        newest_round = max(retained_rounds)
        for directory in self._client_directories():
            files = _files_by_round(directory)
            needed = set()
            for retained in retained_rounds:
                earlier = [server_round for server_round in files if server_round <= retained]
                needed.add(max(earlier, default=None))
            for server_round, file in files.items():
                if server_round < newest_round and server_round not in needed:
                    file.unlink(missing_ok=True)

    def _client_directories(self) -> list[Path]:
        if not self._directory.is_dir():
            return []
        return sorted(path for path in self._directory.iterdir() if path.is_dir())


def _files_by_round(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    files = {}
    for file in directory.iterdir():
        matched = _FILE.fullmatch(file.name)
        if matched:
            files[int(matched[1])] = file
    return dict(sorted(files.items()))
