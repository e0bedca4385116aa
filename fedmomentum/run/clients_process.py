"""The process of a `run.devices` worker, which runs some of the clients on one device."""

from __future__ import annotations

import json
import logging
import tomllib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fedmomentum.config.toml import from_dict
from fedmomentum.data.tokenized import TokenizedClient
from fedmomentum.run.worker_process import Answer, Frame, Reporter, Send, describe_error, serve
from fedmomentum.utils.terminal import LineFormatter

LOG = logging.getLogger("fedmomentum")


@dataclass(frozen=True)
class ClientsSetup:
    """The first frame to the process, as MessagePack.

    Attributes:
        config: The run's settings as TOML, with the worker's device and number of threads.
        labels: A classifier's labels.
        directory: The run's directory.
        clients: The clients to run, with their examples.
    """

    config: str
    labels: tuple[str, ...]
    directory: str
    clients: tuple[TokenizedClient, ...]


def main() -> None:
    """Load the model, report that it is ready, and do tasks until the run's process ends."""
    serve(_load)


def encode_client_task(client: str, payload: bytes) -> bytes:
    """Return the frame of a client's task; a NUL, which no name contains, ends the name."""
    return Frame.TASK + client.encode() + b"\0" + payload


class _WarningFrames(logging.Handler):
    """Forwards warnings that are logged here to the run's process, which shows them."""

    def __init__(self, send: Send) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(LineFormatter("%(message)s"))
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(Frame.WARNING, self.format(record).encode())


def _load(body: bytes, send: Send) -> Answer:
    """Load the model of the clients; see `worker_process.serve`."""
    LOG.addHandler(_WarningFrames(send))
    LOG.propagate = False
    # Heavy imports that only the worker needs.
    from fedmomentum.run.environment import environment
    from fedmomentum.run.local_clients import load_local_clients
    from fedmomentum.run.setup import set_up_process, training_function
    from fedmomentum.utils.process import quiet_libraries

    setup = msgspec.msgpack.decode(body, type=ClientsSetup)
    config = from_dict(tomllib.loads(setup.config))
    set_up_process(config.run)
    with quiet_libraries():
        loaded = load_local_clients(
            config,
            setup.clients,
            setup.labels,
            Path(setup.directory),
            function=training_function(config),
            callbacks=Reporter(send),
        )
    clients_by_name = {client.client_id: client for client in loaded.clients}
    send(Frame.READY, json.dumps(environment(loaded.local)).encode())

    def answer(frame: bytes) -> bytes | None:
        name, _, payload = frame[1:].partition(b"\0")
        try:
            with quiet_libraries():
                return clients_by_name[name.decode()].handle(payload)
        except Exception as error:  # counts as the client's failure, as in a single process
            send(Frame.ERROR, describe_error(error))
            return None

    return answer


if __name__ == "__main__":
    main()
