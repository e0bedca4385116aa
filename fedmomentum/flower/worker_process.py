"""The worker's own process: load model and data, answer tasks, report progress."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.config.toml import load_config
from fedmomentum.errors import FedMomentumError, public_text
from fedmomentum.flower.node_callback import WorkerInfo
from fedmomentum.server.callbacks import Callback
from fedmomentum.utils.terminal import LineFormatter

if TYPE_CHECKING:
    from fedmomentum.client.client import Client

LOG = logging.getLogger("fedmomentum")
LOAD_FAILED = 2
"""Exit code if model or data cannot be loaded."""


class Frame:
    """First letters of the frames between node and worker; the rest of a frame is its body."""

    # to the worker
    RUN = b"I"  # the run that the next tasks belong to
    TASK = b"T"  # an encoded task
    SMOKE_TEST = b"C"  # do one step of training, as a task would
    # from the worker
    MESSAGE = b"S"  # a line about what it is doing
    WARNING = b"W"
    STEP = b"P"  # a training step, JSON
    READY = b"Y"  # model and data are loaded, JSON
    REPLY = b"R"  # the reply to a task or a smoke test
    ERROR = b"E"  # why there is none, in full and in words that may leave the machine, JSON


def main() -> None:
    """Load model and data, report it, and answer tasks until the node ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the node, which ends this process
    handler = logging.StreamHandler()
    # names in a task and the text of an error may hold control characters
    handler.setFormatter(LineFormatter("%(message)s"))
    LOG.addHandler(handler)
    # the first frame is the setup
    pipe = Connection(int(sys.argv[1]))
    setup = json.loads(pipe.recv_bytes())
    inbox = _Inbox(pipe)
    try:
        answer = _load(setup, inbox.send)
    except Exception as error:
        inbox.send(Frame.ERROR, _describe_error(error))
        sys.exit(LOAD_FAILED)
    # tasks, one after the other
    while True:
        try:
            reply = answer(inbox.next_frame())
        except Exception as error:
            # whatever a task causes, the worker is there for the next one
            inbox.send(Frame.ERROR, _describe_error(error))
        else:
            if reply is not None:
                inbox.send(Frame.REPLY, reply)


class _Inbox:
    """Frames as they arrive, and the way back.

    They are read in a thread of their own, so that this process ends with the node at once,
    whatever it is doing.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._send_lock = threading.Lock()
        self._frames: list[bytes] = []
        self._has_frames = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                frame = self._pipe.recv_bytes()
            except (EOFError, OSError):
                os._exit(0)
            with self._has_frames:
                self._frames.append(frame)
                self._has_frames.notify()

    def next_frame(self) -> bytes:
        with self._has_frames:
            self._has_frames.wait_for(lambda: bool(self._frames))
            return self._frames.pop(0)

    def send(self, letter: bytes, body: bytes) -> None:
        with self._send_lock:
            try:
                self._pipe.send_bytes(letter + body)
            except OSError:
                os._exit(0)


class _Reporter(Callback):
    """Sends progress to the node."""

    def __init__(self, send: Callable[[bytes, bytes], None]) -> None:
        self._send = send

    def on_message(self, text: str) -> None:
        self._send(Frame.MESSAGE, text.encode())

    def on_step(self, client: str, step: int, num_steps: int, loss: float) -> None:
        progress = {"step": step, "num_steps": num_steps, "loss": loss}
        self._send(Frame.STEP, json.dumps(progress).encode())


def _load(
    setup: Mapping[str, str], send: Callable[[bytes, bytes], None]
) -> Callable[[bytes], bytes | None]:
    """Load model and data.

    Args:
        setup: The configuration as TOML, the client's name, its store, and the file of its key.
        send: Sends a frame to the node: its letter and its body.

    Returns:
        A function from a frame to the bytes of the reply, or None if the frame has none.
    """
    # heavy imports, in the worker only
    from fedmomentum.data.split import compare_split
    from fedmomentum.flower.parties import node_party
    from fedmomentum.run.client_setup import prepare_client, rehearsal
    from fedmomentum.utils.process import quiet_libraries

    store = Path(setup["store"])
    config_file = store / "config.toml"
    config_file.write_text(setup["config"])
    config = load_config(config_file)
    with quiet_libraries():
        client = prepare_client(config, setup["client_id"], store, callbacks=_Reporter(send))
    if "key" in setup:
        client.party = node_party(config, setup["client_id"], Path(setup["key"]), store)
    info = WorkerInfo(
        num_train=len(client.train),
        num_test=len(client.test),
        num_parameters=client.model.num_parameters,
        dtype=str(client.model.dtype).removeprefix("torch."),
        base_sha256=client.model.identity.sha256,
    )
    send(Frame.READY, json.dumps(asdict(info)).encode())

    def check_split(run_id: str) -> None:
        warning = compare_split(store, run_id, client.train, client.test, seed=config.run.seed)
        if warning:
            send(Frame.WARNING, warning.encode())

    def answer(frame: bytes) -> bytes | None:
        letter = frame[:1]
        body = frame[1:]
        if letter == Frame.RUN:
            check_split(body.decode())
            return None
        with quiet_libraries():
            if letter == Frame.SMOKE_TEST:
                return _rehearse(client, rehearsal(config, client))
            return client.handle(body)

    return answer


def _rehearse(client: Client, task: bytes) -> bytes:
    """Do a step of training whose reply stays here, so that nothing is summed up or spent."""
    party = client.party
    client.party = None
    try:
        return client.handle(task, is_rehearsal=True)
    finally:
        client.party = party


def _describe_error(error: Exception) -> bytes:
    """Return an error in two versions: what may leave the machine, and in full.

    An unexpected error is also logged here, with its traceback.
    """
    if not isinstance(error, FedMomentumError):
        LOG.exception("the worker failed")
    versions = {"text": public_text(error), "detail": f"{type(error).__name__}: {error}"}
    return json.dumps(versions).encode()


if __name__ == "__main__":
    main()
