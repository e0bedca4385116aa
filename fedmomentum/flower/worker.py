"""A node's worker: a separate process that keeps base model and data loaded between messages.

Node and worker are connected by a socket pair that no other process can open, and exchange frames
(see `Frame`). The worker ends when the node does, even if the node is killed: the socket closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.config.toml import to_toml
from fedmomentum.flower.node_callback import NodeCallback, WorkerInfo
from fedmomentum.flower.worker_process import Frame

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config


EXIT_SECONDS = 5.0
"""How long a worker whose socket has closed may take to exit."""
MAX_POLL_SECONDS = 3600.0
"""The longest single wait for a frame; `poll` does not accept an infinite one."""


class WorkerError(Exception):
    """The worker has no reply. The text may leave the machine; `detail` may not.

    Args:
        text: What the server may learn.
        detail: The full text, for the node's operator; by default the same.
    """

    def __init__(self, text: str, detail: str | None = None) -> None:
        super().__init__(text)
        self.detail = text if detail is None else detail


class Worker:
    """The node's side of its worker.

    Args:
        config: The client's configuration.
        client_id: The client's name.
        store: Directory for the objects that the server sends.
        callback: Receives what the worker reports.
        key: The node's private key, which signs what it adds to secure sums.
    """

    def __init__(
        self,
        config: Config,
        client_id: str,
        store: Path,
        callback: NodeCallback | None = None,
        key: Path | None = None,
    ) -> None:
        self._config = config
        self._client_id = client_id
        self._store = store
        self._callback = callback or NodeCallback()
        self._key = key
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._info: WorkerInfo | None = None
        self._run_id: str | None = None
        self._sent_run_id: str | None = None  # the one that the current process was sent

    def start(self) -> None:
        """Start the process unless it is running; it loads in the background."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        # a socket pair is reachable by these two processes only
        node_socket, worker_socket = socket.socketpair()
        descriptor = worker_socket.fileno()
        command = [sys.executable, "-m", "fedmomentum.flower.worker_process", str(descriptor)]
        self._store.mkdir(parents=True, exist_ok=True)
        self._store.chmod(0o700)  # what the server sends is for nobody else on this machine
        self._process = subprocess.Popen(
            command, pass_fds=[descriptor], stdin=subprocess.DEVNULL, start_new_session=True
        )
        worker_socket.close()
        self._pipe = Connection(node_socket.detach())
        self._sent_run_id = None
        # the first frame: whose data and which model
        setup = {
            "config": to_toml(self._config),
            "client_id": self._client_id,
            "store": str(self._store),
        }
        if self._key is not None:
            setup["key"] = str(self._key)
        self._pipe.send_bytes(json.dumps(setup).encode())

    def wait_until_ready(self) -> WorkerInfo:
        """Wait until model and data are loaded; return what they are.

        Raises:
            WorkerError: If they cannot be loaded.
        """
        self.start()
        if self._info is None:
            self._receive(Frame.READY, float("inf"))
        assert self._info is not None
        return self._info

    def run_smoke_test(self, timeout: float) -> bytes:
        """Do one step of training, as a task would; return the reply.

        Raises:
            WorkerError: See `run_task`.
        """
        return self._request(Frame.SMOKE_TEST, timeout)

    def set_run(self, run_id: str) -> None:
        """Set the run of the following tasks; the worker checks its examples against that run's."""
        self._run_id = run_id

    def run_task(self, payload: bytes, timeout: float) -> bytes:
        """Return the reply to a task.

        Args:
            payload: The encoded task.
            timeout: How many seconds it may take.

        Raises:
            WorkerError: If the worker refused it, died, or took too long; in the latter two cases a
                new one is started.
        """
        return self._request(Frame.TASK + payload, timeout)

    def _request(self, frame: bytes, timeout: float) -> bytes:
        end = time.monotonic() + timeout
        self.start()
        if self._info is None:
            self._receive(Frame.READY, end)
        assert self._pipe is not None
        try:
            if self._run_id is not None and self._run_id != self._sent_run_id:
                self._pipe.send_bytes(Frame.RUN + self._run_id.encode(errors="replace"))
                self._sent_run_id = self._run_id
            self._pipe.send_bytes(frame)
        except OSError as error:
            raise self._exited() from error
        return self._receive(Frame.REPLY, end)

    def _receive(self, expected: bytes, end: float) -> bytes:
        """Return the body of the next frame of a kind; report the frames before it.

        Raises:
            WorkerError: If the worker reports an error, exits, or does not send one in time.
        """
        while True:
            frame = self._next_frame(end)
            letter = frame[:1]
            body = frame[1:]
            # an error takes the place of the frame that was expected
            if letter == Frame.ERROR:
                error = json.loads(body)
                raise WorkerError(error["text"], error["detail"])
            self._report(letter, body)
            if letter == expected:
                return body

    def _next_frame(self, end: float) -> bytes:
        assert self._pipe is not None
        try:
            while True:
                remaining = end - time.monotonic()
                if self._pipe.poll(min(max(remaining, 0), MAX_POLL_SECONDS)):
                    return self._pipe.recv_bytes()
                if remaining <= 0:
                    break
        except (EOFError, OSError) as error:
            raise self._exited() from error
        # out of time: end the task with its process, and be ready for the next one
        self.stop()
        self.start()
        raise WorkerError("took longer than the round allows; its worker was ended")

    def _report(self, letter: bytes, body: bytes) -> None:
        """Pass a frame that is not a reply on to the callback."""
        if letter == Frame.MESSAGE:
            self._callback.on_message(body.decode())
        elif letter == Frame.WARNING:
            self._callback.on_warning(body.decode())
        elif letter == Frame.STEP:
            self._callback.on_step(**json.loads(body))
        elif letter == Frame.READY:
            self._info = WorkerInfo(**json.loads(body))
            self._callback.on_ready(self._info)

    def _exited(self) -> WorkerError:
        """Return how the worker ended; start another one if it had been able to load."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_SECONDS)
        code = self._process.poll()
        was_ready = self._info is not None
        self.stop()
        if was_ready:
            self.start()
        how = f"with exit code {code}"
        if code is not None and code < 0:
            how = f"by signal {signal.Signals(-code).name}"
        when = "" if was_ready else " while it was loading"
        return WorkerError(f"its worker ended {how}{when}")

    def stop(self) -> None:
        """End the process and all that it has started."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None
        self._pipe = None
        self._info = None
