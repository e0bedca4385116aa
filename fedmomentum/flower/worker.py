"""A node's worker: a separate process that keeps the base model and data loaded."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.config.toml import to_toml
from fedmomentum.flower.node_callback import NodeCallback, WorkerInfo
from fedmomentum.run.worker import WorkerExit, WorkerProcess
from fedmomentum.run.worker_process import Frame

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config
    from fedmomentum.flower.warm_worker import WarmProcess


class WorkerError(Exception):
    """The worker could not reply. The text may leave the machine; `detail` may not.

    Args:
        text: What the server may learn.
        detail: The full text, for the node's operator; by default, the same.
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
        process: The process; by default, a new one that ends with this one.
    """

    def __init__(
        self,
        config: Config,
        client_id: str,
        store: Path,
        callback: NodeCallback | None = None,
        key: Path | None = None,
        process: WorkerProcess | WarmProcess | None = None,
    ) -> None:
        self._config = config
        self._client_id = client_id
        self._store = store
        self._callback = callback or NodeCallback()
        self._key = key
        self._process = process or WorkerProcess("fedmomentum.flower.worker_process")
        self._info: WorkerInfo | None = None
        self._run_id: str | None = None
        self._sent_run_id: str | None = None  # the one sent to the current process

    def start(self) -> None:
        """Start the process unless it is running; loading happens in the background."""
        if self._process.is_running:
            return
        self.stop()
        self._store.mkdir(parents=True, exist_ok=True)
        self._store.chmod(0o700)  # keep what the server sends private on this machine
        self._sent_run_id = None
        # the first frame says whose data and which model to load
        setup = {
            "config": to_toml(self._config),
            "client_id": self._client_id,
            "store": str(self._store),
        }
        if self._key is not None:
            setup["key"] = str(self._key)
        self._process.start(json.dumps(setup).encode())

    def wait_until_ready(self) -> WorkerInfo:
        """Wait until model and data are loaded, and describe them.

        Raises:
            WorkerError: If they cannot be loaded.
        """
        self.start()
        if self._info is None:
            self._receive(Frame.READY, float("inf"))
        assert self._info is not None
        return self._info

    def run_smoke_test(self, timeout: float) -> bytes:
        """Do one training step, as a task would, and return the reply.

        Raises:
            WorkerError: See `run_task`.
        """
        return self._request(Frame.SMOKE_TEST, timeout)

    def set_run(self, run_id: str) -> None:
        """Set the run of subsequent tasks; the worker checks its examples against that run's."""
        self._run_id = run_id

    def run_task(self, payload: bytes, timeout: float) -> bytes:
        """Run a task and return the reply.

        Args:
            payload: The encoded task.
            timeout: How many seconds it may take.

        Raises:
            WorkerError: If the worker refused it, died, or took too long; in the latter two cases,
                a new worker is started.
        """
        return self._request(Frame.TASK + payload, timeout)

    def _request(self, frame: bytes, timeout: float) -> bytes:
        """Send a frame once the worker is ready, and return the body of its reply."""
        end = time.monotonic() + timeout
        self.start()
        if self._info is None:
            self._receive(Frame.READY, end)
        try:
            if self._run_id is not None and self._run_id != self._sent_run_id:
                self._process.send(Frame.RUN + self._run_id.encode(errors="replace"))
                self._sent_run_id = self._run_id
            self._process.send(frame)
        except WorkerExit as error:
            raise self._exited(error) from error
        return self._receive(Frame.REPLY, end)

    def _receive(self, expected: bytes, end: float) -> bytes:
        """Return the body of the next frame of the expected kind, reporting the frames before it.

        Raises:
            WorkerError: If the worker reports an error, exits, or sends no such frame in time.
        """
        while True:
            letter, body = self._next_frame(end)
            # an error takes the place of the expected frame
            if letter == Frame.ERROR:
                error = json.loads(body)
                raise WorkerError(error["text"], error["detail"])
            self._report(letter, body)
            if letter == expected:
                return body

    def _next_frame(self, end: float) -> tuple[bytes, bytes]:
        """Return the next frame; if none arrives in time, restart the worker."""
        try:
            while True:
                remaining = end - time.monotonic()
                frame = self._process.receive(remaining)
                if frame is not None:
                    return frame
                if remaining <= 0:
                    break
        except WorkerExit as error:
            raise self._exited(error) from error
        # out of time: kill the process with its task, and get ready for the next one
        self.stop()
        self.start()
        raise WorkerError("took longer than the round allows; its worker was ended")

    def _report(self, letter: bytes, body: bytes) -> None:
        """Forward a frame that is not a reply to the callback."""
        if letter == Frame.MESSAGE:
            self._callback.on_message(body.decode())
        elif letter == Frame.WARNING:
            self._callback.on_warning(body.decode())
        elif letter == Frame.STEP:
            progress = json.loads(body)
            self._callback.on_step(progress["step"], progress["num_steps"], progress["loss"])
        elif letter == Frame.READY:
            self._info = WorkerInfo(**json.loads(body))
            self._callback.on_ready(self._info)

    def _exited(self, error: WorkerExit) -> WorkerError:
        """Return how the worker ended; start another one if this one had loaded successfully."""
        was_ready = self._info is not None
        self.stop()
        if was_ready:
            self.start()
        when = "" if was_ready else " while it was loading"
        return WorkerError(f"its worker ended {error}{when}")

    def stop(self) -> None:
        """End the process and everything that it has started."""
        self._process.stop()
        self._info = None
