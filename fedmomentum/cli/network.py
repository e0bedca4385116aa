"""Commands for a federation over a network: `keys`, `serve`, `join`, `status`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fedmomentum.cli.columns import name_column
from fedmomentum.cli.options import (
    ERR,
    OUT,
    DashboardAddressOption,
    DashboardOption,
    Overrides,
    ResumeOption,
    ResumeRoundOption,
    RunDirectoryOption,
    check_output_directory,
    check_resume_round,
    require_flower,
)
from fedmomentum.cli.run_end import (
    print_how_to_continue,
    print_served_result,
    write_partial_report,
)
from fedmomentum.errors import ConfigError
from fedmomentum.utils.process import INTERRUPTION

if TYPE_CHECKING:
    from fedmomentum.flower.join import CheckResult


REFRESH_SECONDS = 2
"""How often `status --watch` reads the file, which is written about every second."""
MAX_PORT = 2**16 - 1

KeysOption = Annotated[Path, typer.Option("--keys", help="directory of the server's keys")]

# ── keys ──

keys_app = typer.Typer(
    no_args_is_help=True, help="Create the keys of server and nodes, and admit nodes."
)


@keys_app.callback()
def _keys() -> None:
    require_flower()


@keys_app.command("server")
def keys_server(
    host: Annotated[
        list[str],
        typer.Option(help="name or address that nodes will use; repeatable", show_default=False),
    ],
    keys: KeysOption = Path("keys"),
) -> None:
    """Create a private authority and the server's certificate; rerun to renew the certificate."""
    from fedmomentum.flower.certificates import make_server_keys

    make_server_keys(keys, host)
    OUT.print(
        f"The server's keys are in {keys}. Send {keys / 'ca.pem'} to every client, where it is "
        "stored as ca.pem; keep the rest private. The certificate is valid for two years",
        markup=False,
        soft_wrap=True,
    )


@keys_app.command("node")
def keys_node(
    name: Annotated[str, typer.Argument(show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="directory to write")] = Path("."),
) -> None:
    """Create a node's key pair, on the node's own machine."""
    from fedmomentum.flower.keys import make_node_key

    private_file, public_file = make_node_key(name, out)
    OUT.print(
        f"Send {public_file} to the server's operator. {private_file} is private and stays here",
        markup=False,
        soft_wrap=True,
    )


@keys_app.command("admit")
def keys_admit(
    public_files: Annotated[list[Path], typer.Argument(metavar="NAME.pub...", show_default=False)],
    keys: KeysOption = Path("keys"),
) -> None:
    """Admit nodes by public key, even while a server runs; delete a node's file to revoke it."""
    from fedmomentum.flower.keys import admit_node

    for file in public_files:
        OUT.print(f"{admit_node(file, keys)} is admitted", markup=False)


@keys_app.command("roster")
def keys_roster(
    public_files: Annotated[list[Path], typer.Argument(metavar="NAME.pub...", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="file to write [default: none is written]")
    ] = None,
) -> None:
    """Join the sites' public keys into a roster for secure aggregation, and print its fingerprint.

    Every site makes its own, from files that it got from the other sites and not through the
    server; then all compare fingerprints, which are equal if the keys are.
    """
    from fedmomentum.flower.parties import make_roster, spoken_fingerprint

    roster = make_roster(public_files, out)
    OUT.print(f"Parties: {', '.join(roster.keys)}", markup=False, soft_wrap=True)
    OUT.print(f"Fingerprint: {spoken_fingerprint(roster)}", markup=False, soft_wrap=True)
    if out is not None:
        OUT.print(
            f"The roster is in {out}. Have every other site read you its fingerprint, and set "
            f'[privacy] roster = "{out}"',
            markup=False,
            soft_wrap=True,
        )


# ── server and nodes ──


def serve(
    config: Annotated[
        Path, typer.Argument(help="TOML file; its [data] is not used", show_default=False)
    ],
    overrides: Overrides = None,
    out: RunDirectoryOption = None,
    keys: KeysOption = Path("keys"),
    host: Annotated[str, typer.Option(help="address to listen on")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="port to listen on")] = 9443,
    resume: ResumeOption = False,
    server_round: ResumeRoundOption = None,
    dashboard: DashboardOption = False,
    dashboard_at: DashboardAddressOption = "",
) -> None:
    """Run the server of a federation: wait for the admitted nodes, then run the rounds."""
    from fedmomentum.cli.dashboard import dashboard_address, page
    from fedmomentum.cli.progress import RunView
    from fedmomentum.config.toml import load_config

    settings = load_config(config, overrides or [])
    out = out if out is not None else Path("runs") / config.stem
    if not 0 <= port <= MAX_PORT:
        raise ConfigError(f"--port must be from 0 (any free port) to {MAX_PORT}; got {port}")
    check_resume_round(server_round, resume)
    check_output_directory(out)
    address = dashboard_address(dashboard, dashboard_at)
    require_flower()
    # imported after the check, since these import Flower
    from fedmomentum.cli.network_views import ServerView
    from fedmomentum.flower.serve import serve as serve_run
    from fedmomentum.formats.directories import retained_rounds
    from fedmomentum.formats.run_files import SERVER_LOG

    # even if started in the background by a script, where SIGINT is ignored
    INTERRUPTION.listen(although_ignored=True)
    with (
        page(address, out, SERVER_LOG),
        RunView(OUT, settings.federation.num_rounds) as run_view,
    ):
        try:
            serve_run(
                settings,
                keys,
                out,
                host=host,
                port=port,
                resume=resume,
                server_round=server_round,
                callbacks=[ServerView(OUT, run_view, out)],
            )
        except BaseException as error:
            if retained_rounds(out):
                write_partial_report(out)
            run_view.stop()
            last_round = max(retained_rounds(out), default=None)
            options = ("--keys", keys, "--host", host, "--port", port)
            print_how_to_continue(error, out, last_round, "serve", *options)
            raise
    print_served_result(out)


def join(
    config: Annotated[
        Path,
        typer.Argument(help="TOML file: the run's, with this client's data", show_default=False),
    ],
    server: Annotated[
        str, typer.Option("--server", help="HOST:PORT, or https://HOST:PORT", show_default=False)
    ],
    key: Annotated[Path, typer.Option("--key", help="this node's private key", show_default=False)],
    overrides: Overrides = None,
    ca: Annotated[
        Path, typer.Option("--ca", help="the server's certificate authority, its keys/ca.pem")
    ] = Path("ca.pem"),
    name: Annotated[
        str, typer.Option("--name", help="[default: the key file's name]", show_default=False)
    ] = "",
    store: Annotated[
        Path | None,
        typer.Option("--store", help="directory for what the server sends [default: nodes/<name>]"),
    ] = None,
    check_only: Annotated[
        bool, typer.Option("--check", help="check that everything is in order and exit")
    ] = False,
) -> None:
    """Take part with this machine's data until Ctrl-C; only adapters, counts and scores leave."""
    import threading

    from fedmomentum.config.toml import load_config

    settings = load_config(config, overrides or [])
    require_flower()
    # imported after the check, since these import Flower
    from fedmomentum.cli.network_views import NodeView
    from fedmomentum.flower.join import NodeIdentity, preflight_check
    from fedmomentum.flower.join import join as join_run
    from fedmomentum.flower.worker import WorkerError
    from fedmomentum.utils.names import directory_name

    INTERRUPTION.listen(although_ignored=True)
    name = name or key.stem
    store = store if store is not None else Path("nodes") / directory_name(name)
    identity = NodeIdentity(server=server, authority=ca, key=key, store=store, name=name)
    with NodeView(OUT) as view:
        if check_only:
            results = preflight_check(settings, identity, view)
        else:
            try:
                join_run(settings, identity, threading.Event(), view)
            except WorkerError as error:
                raise ConfigError(f"this node cannot take part: {error.detail}") from error
            except KeyboardInterrupt:
                ERR.print(
                    "This node has left; its store stays here, and it may join again",
                    markup=False,
                )
                raise
            return
    OUT.print(_check_table(results))
    if any(result.problem for result in results):
        sys.exit(2)


def _check_table(results: list[CheckResult]) -> Table:
    table = Table("", name_column("checked"), "what is wrong", box=None)
    for result in results:
        verdict = Text("no", style="red") if result.problem else Text("ok", style="green")
        table.add_row(verdict, result.name, Text(result.problem))
    return table


def status(
    run_directory: Annotated[
        Path, typer.Argument(metavar="RUN", help="directory of a served run", show_default=False)
    ],
    watch: Annotated[
        bool, typer.Option("--watch", help="update every two seconds, until Ctrl-C")
    ] = False,
) -> None:
    """Show a served run: who is connected, who is training, time left, and how much was sent."""
    from rich.live import Live

    from fedmomentum.cli.network_views import status_table
    from fedmomentum.formats.status_file import read_status

    if not watch:
        OUT.print(status_table(read_status(run_directory), time.time()))
        return
    with Live(console=OUT, auto_refresh=False) as live:
        while True:
            live.update(status_table(read_status(run_directory), time.time()), refresh=True)
            time.sleep(REFRESH_SECONDS)
