"""Two thin Flower apps: the server runs the rounds, a client answers one message."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedmomentum.errors import public_text
from fedmomentum.flower.payloads import pack_payload, unpack_payload
from fedmomentum.flower.worker import WorkerError
from fedmomentum.utils.text import printable

LOG = logging.getLogger("fedmomentum")
APP_RAISED_CODE = 2
"""Flower's error code for an app that raised."""
MAX_REASON = 1000
"""The most characters sent to the server about a failed task."""


def server_app(run: Callable[[Grid, Context], None]) -> ServerApp:
    """Return a ServerApp whose main function calls `run` with Flower's grid and context."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(grid, context)

    return app


def client_app(
    answer: Callable[[bytes, float, Context], bytes],
    name: Callable[[Context], str] | None = None,
) -> ClientApp:
    """Return a ClientApp that answers each message with `answer(payload, timeout, context)`.

    Args:
        answer: Returns the reply's payload; `timeout` is how long the server will wait for it.
        name: Returns the client's name, for servers that can only learn it from the client. This
            is for nodes run by Flower, where exceptions are turned into our own error replies,
            since Flower would send the server the entire text.
    """
    app = ClientApp(mods=[] if name is None else [_answer_errors])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        payload, timeout = unpack_payload(message.content)
        return Message(pack_payload(answer(payload, timeout, context)), reply_to=message)

    if name is not None:

        @app.query()
        def query(message: Message, context: Context) -> Message:
            return Message(pack_payload(name(context).encode()), reply_to=message)

    return app


def _answer_errors(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    try:
        return call_next(message, context)
    except Exception as error:
        LOG.error("%s: %s", type(error).__name__, getattr(error, "detail", error))
        return error_reply(message, error)


def error_reply(message: Message, error: Exception) -> Message:
    """Return a reply with what the server may learn of an error; the log has the rest."""
    text = str(error) if isinstance(error, WorkerError) else public_text(error)
    return Message(Error(APP_RAISED_CODE, printable(text, MAX_REASON)), reply_to=message)
