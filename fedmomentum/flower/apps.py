"""The two Flower apps, both thin: the round is `run_rounds`, a client's answer is `client_step`."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedmomentum.flower.transport import packed, unpacked


def server_app(run: Callable[[Grid], None]) -> ServerApp:
    """A ServerApp whose main function is `run`, given Flower's grid."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(grid)

    return app


def client_app(answer: Callable[[bytes, float, Context], bytes]) -> ClientApp:
    """A ClientApp that answers each message with `answer(payload, seconds, context)`.

    `seconds` is how long the server will wait for it.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(packed(answer(*unpacked(message.content), context)), reply_to=message)

    return app
