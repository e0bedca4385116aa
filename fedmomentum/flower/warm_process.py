"""The process of a warm worker, which serves one ClientApp after another; see `warm_worker`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from fedmomentum.flower import worker_process
from fedmomentum.run.worker_process import (
    LOAD_FAILED,
    Answer,
    Frame,
    Inbox,
    answer_frames,
    logged_error,
)
from fedmomentum.utils.process import quiet_advice, tune_malloc
from fedmomentum.utils.terminal import LineFormatter

LOG = logging.getLogger("fedmomentum")
CHECK_SECONDS = 1.0
"""How often to check whether it is time to exit."""


def main() -> None:
    """Serve ClientApps until the SuperNode exits, or none has connected for a while."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tune_malloc()
    quiet_advice()
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    descriptor, address, parent, keep_warm = sys.argv[1:]
    listener = socket.socket(fileno=int(descriptor))
    worker = WarmWorker(listener, Path(address).parent, int(parent), float(keep_warm))
    try:
        worker.run()
    finally:
        worker.clean_up()


class WarmWorker:
    """Serves ClientApps that all have the same configuration.

    Args:
        listener: Accepts their connections.
        directory: The directory of its socket, which is removed on exit.
        parent: The process to exit with; 1 or less for none.
        keep_warm: How many seconds it outlives its last task.
    """

    def __init__(
        self, listener: socket.socket, directory: Path, parent: int, keep_warm: float
    ) -> None:
        self._listener = listener
        self._directory = directory
        self._parent = _Parent(parent)
        self._keep_warm = keep_warm
        self._setup: bytes | None = None
        self._answer: Answer | None = None
        self._ready = b""
        self._inbox: Inbox
        self._is_busy = False
        self._run_id = ""

    def run(self) -> None:
        """Serve one ClientApp after another."""
        while True:
            pipe = self._next_connection()
            if pipe is None or not self._serve(pipe):
                return

    def clean_up(self) -> None:
        """Remove the socket and its directory."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _next_connection(self) -> Connection | None:
        """Return the next ClientApp's connection; None when it is time to exit."""
        # The first ClientApp is already connected, so even `keep_warm = 0` does not miss it.
        self._listener.settimeout(CHECK_SECONDS)
        end = time.monotonic() + max(self._keep_warm, CHECK_SECONDS if self._setup is None else 0)
        while True:
            try:
                accepted, _ = self._listener.accept()
            except TimeoutError:
                if time.monotonic() > end or self._parent.check():
                    return None
                continue
            accepted.setblocking(True)
            return Connection(accepted.detach())

    def _serve(self, pipe: Connection) -> bool:
        """Serve a ClientApp; return whether others with the same configuration may follow."""
        try:
            setup = pipe.recv_bytes()
        except (EOFError, OSError):
            return True
        if self._setup not in (None, setup):
            return False
        self._setup = setup
        self._inbox = Inbox(pipe, self._on_close)
        if self._answer is None:
            try:
                self._answer = worker_process.load(json.loads(setup), self._send)
            except Exception as error:
                self._send(Frame.ERROR, logged_error(error))
                self.clean_up()
                sys.exit(LOAD_FAILED)
            LOG.info("the base model is loaded; it stays for later messages")
        else:
            self._send(Frame.READY, self._ready)
        answer_frames(self._inbox, self._do)
        pipe.close()
        return self._keep_warm > 0

    def _send(self, letter: bytes, body: bytes) -> None:
        if letter == Frame.READY:
            self._ready = body
        self._inbox.send(letter, body)

    def _on_close(self) -> None:
        """Kill this process and its children if the ClientApp left in the middle of a task."""
        if self._is_busy:
            self.clean_up()
            os.killpg(0, signal.SIGKILL)

    def _do(self, frame: bytes) -> bytes | None:
        """Handle a frame."""
        # Imported late, once the model is loaded anyway.
        from fedmomentum.protocol.codec import decode_task

        assert self._answer is not None  # frames come after `Frame.READY`
        self._is_busy = True
        try:
            if frame[:1] != Frame.TASK:
                return self._answer(frame)
            task = decode_task(frame[1:])
            if task.run_id != self._run_id:
                # Compare the examples with those that the run began with.
                self._answer(Frame.RUN + task.run_id.encode(errors="replace"))
                self._run_id = task.run_id
            started = time.monotonic()
            reply = self._answer(frame)
            seconds = time.monotonic() - started
            LOG.info("round %d: %s took %.1f s", task.server_round, task.kind, seconds)
            return reply
        finally:
            self._is_busy = False


class _Parent:
    """Checks whether a non-child process has ended; a zombie counts as ended."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._handle = -1
        self.has_ended = False
        if pid <= 1:
            return
        try:
            # Linux: the handle is readable as soon as the process has ended.
            self._handle = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else -1
        except ProcessLookupError:
            self.has_ended = True

    def check(self) -> bool:
        """Return whether it has ended."""
        if self.has_ended or self._pid <= 1:
            return self.has_ended
        if self._handle >= 0:
            readable, _, _ = select.select([self._handle], [], [], 0)
            self.has_ended = bool(readable)
            return self.has_ended
        with contextlib.suppress(PermissionError):
            try:
                os.kill(self._pid, 0)
            except ProcessLookupError:
                self.has_ended = True
        return self.has_ended


if __name__ == "__main__":
    main()
