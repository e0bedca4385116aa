"""The parent's side of a worker: a process that keeps a base model and data loaded between tasks.

Parent and worker exchange frames (see `worker_process.Frame`) over a socket pair that no other
process can open. The worker ends when its parent does, even if that is killed, because the socket
closes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

EXIT_SECONDS = 5.0
"""How long a worker may take to exit after its socket has closed."""
MAX_POLL_SECONDS = 3600.0
"""The longest single wait for a frame; `poll` does not accept infinity."""


class WorkerExit(Exception):
    """The worker has ended or was never started; the text says how, as in `by signal SIGKILL`."""


def receive_frame(pipe: Connection, seconds: float) -> tuple[bytes, bytes] | None:
    """Return the next frame's letter and body; None if none arrives in time.

    Raises:
        OSError: If the connection is broken.
        EOFError: If the other side has closed it.
    """
    if not pipe.poll(min(max(seconds, 0), MAX_POLL_SECONDS)):
        return None
    frame = pipe.recv_bytes()
    return frame[:1], frame[1:]


def wait_for_exit(process: subprocess.Popen[bytes] | None) -> int | None:
    """Return the exit code of a process that is about to exit; None if it is not known."""
    if process is None:
        return None
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(EXIT_SECONDS)
    return process.poll()


def describe_exit(code: int | None) -> WorkerExit:
    """Describe how a worker ended, from its exit code."""
    if code is None:
        return WorkerExit("without a word; its own log may say more")
    if code < 0:
        return WorkerExit(f"by signal {signal.Signals(-code).name}")
    return WorkerExit(f"with exit code {code}")


class WorkerProcess:
    """A worker's process, and the frames to and from it.

    Args:
        module: The module that the process runs; it calls `worker_process.serve`.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    @property
    def is_running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pipe(self) -> Connection:
        """The connection, for `multiprocessing.connection.wait`.

        Raises:
            WorkerExit: If there is no process.
        """
        if self._pipe is None:
            raise WorkerExit("before it was started")
        return self._pipe

    def start(self, setup: bytes) -> None:
        """Start the process, which must not be running, and send its first frame, so that it loads.

        If it ends before it has received the frame, the next `send` or `receive` raises.
        """
        # Only these two processes can reach a socket pair.
        own_socket, worker_socket = socket.socketpair()
        descriptor = worker_socket.fileno()
        # Let the worker import what this process can, such as the user's training function.
        search_path = os.pathsep.join(entry for entry in sys.path if entry)
        # Use a separate session: Ctrl-C on the terminal is for the parent, which ends the worker.
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module, str(descriptor)],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": search_path},
        )
        worker_socket.close()
        self._pipe = Connection(own_socket.detach())
        with contextlib.suppress(OSError):
            self._pipe.send_bytes(setup)

    def send(self, frame: bytes) -> None:
        """Send a frame.

        Raises:
            WorkerExit: If the process has ended.
        """
        try:
            self.pipe.send_bytes(frame)
        except OSError as error:
            raise self._ended() from error

    def receive(self, seconds: float) -> tuple[bytes, bytes] | None:
        """Return the next frame's letter and body; None if none arrives in time.

        Raises:
            WorkerExit: If the process has ended.
        """
        try:
            return receive_frame(self.pipe, seconds)
        except (EOFError, OSError) as error:
            raise self._ended() from error

    def _ended(self) -> WorkerExit:
        """Return how the process ended, and clean up after it."""
        code = wait_for_exit(self._process)
        self.stop()
        return describe_exit(code)

    def finish(self, seconds: float) -> None:
        """Close the socket, give the process some time to exit by itself, then kill it."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        try:
            if self._process is not None:
                self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.stop()

    def stop(self) -> None:
        """Kill the process and all that it has started."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None
        self._pipe = None
