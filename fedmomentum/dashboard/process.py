"""The process that serves the page, which starts before the run and ends with it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import quote

from fedmomentum.dashboard.access import TOKEN, Access
from fedmomentum.dashboard.feed import LEAVE_SECONDS
from fedmomentum.dashboard.site import LIMITS, Site
from fedmomentum.errors import FedMomentumError
from fedmomentum.report.live_page import LivePage
from fedmomentum.run.worker_process import Frame, describe_error
from fedmomentum.utils.schema import Schema, parse_json
from fedmomentum.web.listener import Listener

NICENESS = 10
"""How far this process's priority is below the run's."""
REPORT_SECONDS = 30.0
"""How long creating the report may take when the run ends, if there are viewers."""


class Setup(Schema, frozen=True, kw_only=True):
    """The first frame to the process, as JSON.

    Attributes:
        directory: The run's directory.
        log: The log file in it.
        host: The name or address to listen on.
        port: The port; 0 for any free one.
    """

    directory: str
    log: str
    host: str
    port: int


def main() -> None:
    """Open the port, report the page's URL, and serve the page until the run's process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this process
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    pipe = Connection(int(sys.argv[1]))
    setup = parse_json(pipe.recv_bytes(), Setup, "the dashboard's setup")
    # Keep errors with individual viewers off the terminal, which shows the run.
    logging.getLogger().addHandler(logging.NullHandler())
    site = Site(LivePage(Path(setup.directory), setup.log, since=time.time()))
    try:
        with Listener(site, setup.host, setup.port, limits=LIMITS) as listener:
            site.access = Access(setup.host, listener.addresses(), listener.port)
            url = page_url(site.access.host, listener.port, site.access.token)
            pipe.send_bytes(Frame.READY + json.dumps({"url": url}).encode())
            # Nothing else is ever received; the pipe closes when the run's process ends.
            with contextlib.suppress(EOFError, OSError):
                pipe.recv_bytes()
            with contextlib.suppress(TimeoutError):
                listener.call(site.feed.end(), REPORT_SECONDS + LEAVE_SECONDS)
    except FedMomentumError as error:
        pipe.send_bytes(Frame.ERROR + describe_error(error))


def page_url(host: str, port: int, token: str | None) -> str:
    """Return the URL to open; a wildcard address is shown as this machine's host name."""
    if host in ("", "0.0.0.0", "::"):
        host = os.uname().nodename
    shown = f"[{host}]" if ":" in host else host
    query = "" if token is None else f"?{TOKEN}={quote(token)}"
    return f"http://{shown}:{port}/{query}"


if __name__ == "__main__":
    main()
