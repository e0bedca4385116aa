"""The worker's own side: load, answer frames one after the other, report progress."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from fedmomentum.errors import FedMomentumError, failure_text, public_text
from fedmomentum.server.callbacks import Callback
from fedmomentum.utils.process import quiet_advice, tune_malloc

LOG = logging.getLogger("fedmomentum")
LOAD_FAILED = 2
"""Exit code if model or data cannot be loaded."""

Send = Callable[[bytes, bytes], None]
"""Sends a frame to the parent: its letter and its body."""
Answer = Callable[[bytes], "bytes | None"]
"""Maps a frame to the bytes of its reply; None if it has none."""


class Frame:
    """First letters of the frames between parent and worker; the rest of a frame is its body."""

    # To the worker.
    RUN = b"I"  # the run that the next tasks belong to
    TASK = b"T"  # an encoded task
    SMOKE_TEST = b"C"  # do one step of training, as a task would
    # From the worker.
    MESSAGE = b"S"  # a line about what it is doing
    WARNING = b"W"
    STEP = b"P"  # a client's training step, JSON
    READY = b"Y"  # model and data are loaded, JSON
    REPLY = b"R"  # the reply to a task or a smoke test
    ERROR = b"E"  # why there is none, in full and in words that may leave the machine, JSON


def serve(load: Callable[[bytes, Send], Answer]) -> None:
    """Load, then answer frames until the parent ends; the command line names the pipe.

    Args:
        load: Takes the first frame and a function that sends frames; returns the function that
            answers all further frames. It sends `Frame.READY` itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    # The command line does the same for its own process, before any heavy import.
    tune_malloc()
    quiet_advice()
    pipe = Connection(int(sys.argv[1]))
    setup = pipe.recv_bytes()
    inbox = Inbox(pipe)
    try:
        answer = load(setup, inbox.send)
    except Exception as error:
        inbox.send(Frame.ERROR, logged_error(error))
        sys.exit(LOAD_FAILED)
    answer_frames(inbox, answer)


def answer_frames(inbox: Inbox, answer: Answer) -> None:
    """Answer frames, one after the other, until the pipe has closed."""
    while (frame := inbox.next_frame()) is not None:
        try:
            reply = answer(frame)
        except Exception as error:
            # Whatever a task raises, the worker stays available for the next one.
            inbox.send(Frame.ERROR, logged_error(error))
        else:
            if reply is not None:
                inbox.send(Frame.REPLY, reply)


def _exit_now() -> None:
    os._exit(0)


class Inbox:
    """Receives frames as they arrive, and sends replies.

    A separate thread reads them, so that this process ends as soon as its parent does, whatever it
    is doing.

    Args:
        pipe: The connection.
        on_close: Called when the other side has closed it; ends this process or returns.
    """

    def __init__(self, pipe: Connection, on_close: Callable[[], None] = _exit_now) -> None:
        self._pipe = pipe
        self._on_close = on_close
        self._send_lock = threading.Lock()
        self._frames: list[bytes | None] = []
        self._has_frames = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """Queue frames until the pipe closes; runs in its own thread."""
        while True:
            frame: bytes | None = None
            try:
                frame = self._pipe.recv_bytes()
            except (EOFError, OSError):
                self._on_close()
            with self._has_frames:
                self._frames.append(frame)
                self._has_frames.notify()
            if frame is None:
                return

    def next_frame(self) -> bytes | None:
        """Wait for the next frame and return it; None once the pipe has closed."""
        with self._has_frames:
            self._has_frames.wait_for(lambda: bool(self._frames))
            return self._frames.pop(0)

    def send(self, letter: bytes, body: bytes) -> None:
        """Send a frame."""
        with self._send_lock:
            try:
                self._pipe.send_bytes(letter + body)
            except OSError:
                self._on_close()


class Reporter(Callback):
    """Sends progress to the parent."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def on_message(self, text: str) -> None:
        """Send a line about what the worker is doing."""
        self._send(Frame.MESSAGE, text.encode())

    def on_step(self, client: str, step: int, num_steps: int, loss: float) -> None:
        """Send a client's training step."""
        progress = {"client": client, "step": step, "num_steps": num_steps, "loss": loss}
        self._send(Frame.STEP, json.dumps(progress).encode())


def describe_error(error: Exception) -> bytes:
    """Return the body of an error's frame: a text that may leave the machine, and the full one."""
    versions = {"text": public_text(error), "detail": failure_text(error)}
    return json.dumps(versions).encode()


def logged_error(error: Exception) -> bytes:
    """Return an error's frame body; an unexpected error is logged here, with its traceback."""
    if not isinstance(error, FedMomentumError):
        LOG.exception("the worker failed")
    return describe_error(error)
