"""The two Flower apps, both thin: the server runs the rounds, a client answers one message."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedmomentum.flower.transport import pack_payload, unpack_payload


def server_app(run: Callable[[Grid], None]) -> ServerApp:
    """Return a ServerApp whose main function calls `run` with Flower's grid."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(grid)

    return app


def client_app(answer: Callable[[bytes, float, Context], bytes]) -> ClientApp:
    """Return a ClientApp that answers each message with `answer(payload, timeout, context)`.

    Args:
        answer: Returns the reply's payload; `timeout` is how long the server will wait for it.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        payload, timeout = unpack_payload(message.content)
        return Message(pack_payload(answer(payload, timeout, context)), reply_to=message)

    return app
