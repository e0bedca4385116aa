"""`Dashboard`: the run's side of the page, which starts and ends the process that serves it."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

from fedmomentum.errors import ConfigError
from fedmomentum.run.worker import WorkerExit, WorkerProcess
from fedmomentum.run.worker_process import Frame

START_SECONDS = 60.0
"""How long the process may take to open its port."""
END_SECONDS = 45.0
"""How long the process may take to send the end to all viewers."""


class Dashboard:
    """Serves a page for watching a run, as a context manager.

    Args:
        directory: The run's directory, which may not exist yet.
        log: The log file in it.
        host: The name or address to listen on.
        port: The port; 0 for any free one.

    Attributes:
        url: The URL to open in a browser.
    """

    def __init__(self, directory: Path, log: str, host: str, port: int) -> None:
        self._setup = {"directory": str(directory), "log": log, "host": host, "port": port}
        self._process = WorkerProcess("fedmomentum.dashboard.process")
        self.url = ""

    def __enter__(self) -> Dashboard:
        """Start the process and wait until it serves the page.

        Raises:
            ConfigError: If it cannot; the message says why.
        """
        # Its first frame says that the page is available, or why not.
        self._process.start(json.dumps(self._setup).encode())
        try:
            frame = self._process.receive(START_SECONDS)
        except WorkerExit as error:
            raise ConfigError(f"the dashboard did not start: its process ended {error}") from error
        if frame is None:
            self._process.stop()
            raise ConfigError(f"the dashboard did not start within {START_SECONDS:.0f} s")
        letter, body = frame
        facts = json.loads(body)
        if letter == Frame.ERROR:
            self._process.stop()
            raise ConfigError(
                f"no dashboard: {facts['detail'].partition(': ')[2]}. Choose another "
                "--dashboard-address"
            )
        self.url = facts["url"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.finish(END_SECONDS)
