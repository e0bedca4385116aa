"""`--dashboard`: the page for watching a run, and the files that local runs write for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fedmomentum.cli.options import DASHBOARD_ADDRESS, OUT, require_extra
from fedmomentum.errors import ConfigError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from fedmomentum.config.schema import Config
    from fedmomentum.server.callbacks import Callback

Address = tuple[str, int]


def dashboard_address(wanted: bool, address: str) -> Address | None:
    """Return the address at which to serve the page; None for no page.

    Raises:
        ConfigError: If the address is invalid or given without a page, or a package is missing.
    """
    if not wanted:
        if address:
            raise ConfigError("--dashboard-address says where the page is; add --dashboard")
        return None
    for package in ("uvicorn", "starlette"):
        require_extra(package, "dashboard", "--dashboard serves a web page")
    # Parse it as the network location of a URL.
    try:
        parts = urlsplit(f"//{address or DASHBOARD_ADDRESS}")
        host = parts.hostname
        port = parts.port
    except ValueError:
        host = None
        port = None
    is_plain = host is not None and port is not None and "@" not in parts.netloc
    if not is_plain or parts.path or parts.query or parts.fragment:
        raise ConfigError(
            f"--dashboard-address must be HOST:PORT, such as {DASHBOARD_ADDRESS} or "
            f"[::1]:9444; got {address!r}"
        )
    assert host is not None and port is not None
    return host, port


@contextmanager
def page(address: Address | None, out: Path, log: str) -> Iterator[None]:
    """Serve the page within the block and print its address; do nothing without an address.

    Args:
        address: Where to serve it.
        out: The run's directory.
        log: The log file in it.

    Raises:
        ConfigError: If the page cannot be served there.
    """
    if address is None:
        yield
        return
    from fedmomentum.dashboard.dashboard import Dashboard

    with Dashboard(out, log, *address) as dashboard:
        OUT.print(f"Dashboard: {dashboard.url}", markup=False, highlight=False, soft_wrap=True)
        yield


@contextmanager
def local_page(address: Address | None, out: Path, settings: Config) -> Iterator[list[Callback]]:
    """Serve the page of a local run within the block; see `page`.

    Yields:
        Callbacks that write the data shown on the page.
    """
    if address is None:
        yield []
        return
    from fedmomentum.formats.run_files import RUN_LOG
    from fedmomentum.formats.withheld import withheld_by
    from fedmomentum.server.status import StatusWriter
    from fedmomentum.utils.terminal import log_file

    withheld = withheld_by(
        secure=settings.privacy.secure_aggregation, private=settings.privacy.dp is not None
    )
    num_rounds = settings.federation.num_rounds
    # The page starts first and ends last, so that it shows the end of the run.
    with page(address, out, RUN_LOG):
        out.mkdir(parents=True, exist_ok=True)
        # Neither creates a file before the run itself is accepted.
        log: AbstractContextManager[object] = log_file(out / RUN_LOG, delay=True)
        status = StatusWriter(out, num_rounds, networked=False, withheld=withheld)
        with log, status:
            yield [status]
