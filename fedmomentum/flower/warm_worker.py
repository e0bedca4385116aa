"""A worker that outlives the process that uses it, for nodes that Flower runs.

Flower starts a new process for each message, and loading a base model takes longer than answering a
message. So a ClientApp's first process starts a worker in its own session, and later ones find it
through a file in the node's store. It listens on a Unix socket in a directory that only this user
can enter. It exits when the SuperNode does, when it has had no task for a while, or when a
ClientApp connects with a different configuration.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from fedmomentum.run.worker import WorkerExit, describe_exit, receive_frame, wait_for_exit
from fedmomentum.utils.io import write_atomically

ADDRESS_FILE = "worker.address"
"""The file in a node's store with the path of the worker's socket."""
SOCKET = "socket"
"""The socket's name in its directory."""
PREFIX = "fedmomentum-worker-"
"""The prefix of the directory's name."""


class WarmProcess:
    """The ClientApp's side of a warm worker; to `Worker`, it is a process like any other.

    Args:
        store: The node's store.
        keep_warm: How many seconds the worker outlives its last task.
    """

    def __init__(self, store: Path, keep_warm: float) -> None:
        self._store = store
        self._keep_warm = keep_warm
        self._setup = b""
        self._pipe: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None  # if started by this process
        self._was_heard = False

    @property
    def is_running(self) -> bool:
        """Whether there is a connection to a worker."""
        return self._pipe is not None

    def start(self, setup: bytes) -> None:
        """Connect to the worker in the store or start one, which loads in the background.

        A worker that was started with a different configuration exits, and `receive` starts a new
        one.
        """
        self._setup = setup
        self._was_heard = False
        self._process = None
        self._greet(self._connect() or self._spawn())

    def _greet(self, pipe: Connection) -> None:
        self._pipe = pipe
        with contextlib.suppress(OSError):
            pipe.send_bytes(self._setup)

    def _connect(self) -> Connection | None:
        """Return a connection to the worker recorded in the store, if it is running."""
        try:
            address = (self._store / ADDRESS_FILE).read_text()
            return _connected(address)
        except (OSError, ValueError):
            return None

    def _spawn(self) -> Connection:
        """Start a worker and return a connection to it."""
        self._remove_stale_socket()
        # Paths of Unix sockets are limited to about 100 characters, so it cannot be in the store.
        directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        address = str(directory / SOCKET)
        # Let the worker import whatever this process can, such as the app's training function.
        search_path = os.pathsep.join(entry for entry in sys.path if entry)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            command = [sys.executable, "-m", "fedmomentum.flower.warm_process"]
            # It exits with this process's parent, which is Flower's long-lived process.
            command += [str(listener.fileno()), address, str(os.getppid()), str(self._keep_warm)]
            self._process = subprocess.Popen(
                command,
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": search_path},
            )
            pipe = _connected(address)
        write_atomically(self._store / ADDRESS_FILE, address.encode())
        return pipe

    def _remove_stale_socket(self) -> None:
        """Remove the socket of a killed worker; others remove theirs themselves."""
        with contextlib.suppress(OSError, ValueError):
            address = Path((self._store / ADDRESS_FILE).read_text())
            if address.name == SOCKET and address.parent.name.startswith(PREFIX):
                address.unlink()
                address.parent.rmdir()

    def send(self, frame: bytes) -> None:
        """Send a frame.

        Raises:
            WorkerExit: If the worker has ended.
        """
        if self._pipe is None:
            raise WorkerExit("before it was started")
        try:
            self._pipe.send_bytes(frame)
        except OSError as error:
            raise self._ended() from error

    def receive(self, seconds: float) -> tuple[bytes, bytes] | None:
        """Return the next frame's letter and body; None if none arrives in time.

        Raises:
            WorkerExit: If the worker has ended.
        """
        if self._pipe is None:
            raise WorkerExit("before it was started")
        try:
            frame = receive_frame(self._pipe, seconds)
        except (EOFError, OSError) as error:
            # A worker that exits silently was about to exit, or has a different configuration.
            if self._was_heard or self._process is not None:
                raise self._ended() from error
            self._pipe.close()
            self._greet(self._spawn())
            return None
        self._was_heard = self._was_heard or frame is not None
        return frame

    def _ended(self) -> WorkerExit:
        """Return how the worker ended, as far as this process can tell."""
        code = wait_for_exit(self._process)
        self.stop()
        return describe_exit(code)

    def stop(self) -> None:
        """Close the connection: a busy worker exits, and an idle one waits for the next."""
        if self._pipe is not None:
            self._pipe.close()
        self._pipe = None


def _connected(address: str) -> Connection:
    with socket.socket(socket.AF_UNIX) as own:
        own.connect(address)
        return Connection(own.detach())
