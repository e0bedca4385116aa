"""A real link on loopback, and nodes that talk to it from this process."""

from __future__ import annotations

import contextlib
import datetime
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import httpx

from fedmomentum.flower.certificates import make_server_keys
from fedmomentum.flower.fleet_client import FleetClient
from fedmomentum.flower.keys import admit_node, load_private_key, make_node_key
from fedmomentum.flower.payloads import pack_payload, unpack_payload
from fedmomentum.flower.superlink import SuperLink

# after fedmomentum.flower, which sets what flwr reads when it is imported
from flwr.app import Message, MessageType  # isort: skip
from flwr.common.constant import SUPERLINK_NODE_ID  # isort: skip
from flwr.supercore.date import now  # isort: skip
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message  # isort: skip
from flwr.supercore.task_identity import TaskIdentity  # isort: skip

HOSTS = ("127.0.0.1", "localhost", "fed.example.org")


def make_keys(folder: Path, *nodes: str) -> Path:
    """Keys of a server, and those of some nodes that it admits: `folder/north.key` and so on."""
    keys = folder / "keys"
    make_server_keys(keys, HOSTS)
    for name in nodes:
        _, public = make_node_key(name, folder)
        admit_node(public, keys)
    return keys


def running(keys: Path) -> SuperLink:
    """A link on a free port of loopback; a context manager."""
    return SuperLink(keys, "127.0.0.1", 0)


def connect(
    port: int, keys: Path, name: str, *, host: str = "127.0.0.1", ca: Path | None = None
) -> FleetClient:
    """A node's connection; a context manager."""
    return FleetClient(
        f"{host}:{port}",
        (ca or keys / "ca.pem").read_bytes(),
        load_private_key(keys.parent / f"{name}.key"),
    )


@contextlib.contextmanager
def as_node() -> Iterator[None]:
    """Flower keeps one identity a process; here it is the server's, and lent to nodes for a moment."""
    kept = TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id
    try:
        yield
    finally:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = kept


def ask(link: SuperLink, name: str, payload: bytes) -> str:
    """Put a payload up for a node; the message's name."""
    run = link.grid.run
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = (
        run.run_id,
        SUPERLINK_NODE_ID,
        run.primary_task_id,
    )
    message = Message(pack_payload(payload, 60.0), link.online()[name].node_id, MessageType.TRAIN)
    (message_id,) = link.grid.push_messages([message])
    assert message_id
    return message_id


def fetch(connection: FleetClient) -> Message | None:
    with as_node():
        return connection.pull()


def answer(connection: FleetClient, message: Message, payload: bytes) -> None:
    with as_node():
        connection.push(Message(pack_payload(payload), reply_to=message))


def payload_of(message: Message) -> bytes:
    return unpack_payload(message.content)[0]


def round_trip(
    link: SuperLink, connection: FleetClient, name: str, down: bytes, up: bytes
) -> tuple[bytes, bytes]:
    """A request and its reply over the wire, as each end received them."""
    message_id = ask(link, name, down)
    message = fetch(connection)
    assert message is not None
    answer(connection, message, up)
    (reply,) = link.grid.pull_messages([message_id])
    return payload_of(message), payload_of(reply)


class Stranger:
    """Requests made by hand, signed or not."""

    def __init__(self, port: int, keys: Path) -> None:
        import ssl

        context = ssl.create_default_context(cafile=keys / "ca.pem")
        self._keys, self.client = (
            keys,
            httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context),
        )

    def post(
        self, path: str, request: object = b"", *, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        content = request if isinstance(request, bytes) else request.SerializeToString()  # type: ignore[attr-defined]
        media = {"content-type": "application/protobuf", "accept": "application/protobuf"}
        return self.client.post(
            f"/v1/fleet/{path}", content=content, headers=media | (headers or {})
        )

    def signature(
        self, name: str, *, signer: str | None = None, age: float = 0.0
    ) -> dict[str, str]:
        """The headers of node `name`, by the private key of `signer`, made `age` seconds ago."""
        key = load_private_key(self._keys.parent / f"{name}.key")
        signing = load_private_key(self._keys.parent / f"{signer or name}.key")
        timestamp = (now() - datetime.timedelta(seconds=age)).isoformat()
        return {
            "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
            "flwr-timestamp": timestamp,
            "flwr-signature": b64encode(sign_message(signing, timestamp.encode())).decode(),
        }

    def close(self) -> None:
        self.client.close()
