"""Federations over a network, on Flower: the only package that imports flwr.

::

    server                                        each client
    serve.py      the run over a transport        join.py          fetches tasks, sends replies
    transport.py  FlowerTransport over a Grid     worker.py        a process with model and data
    superlink.py  Flower's fleet service  <-TLS-> fleet_client.py

    on SuperLinks and SuperNodes that Flower runs:
    app_server.py, node_roster.py                 app_client.py, warm_worker.py

    in other people's Flower apps: strategy.py for a ServerApp, base_residual.py for its ClientApp

With `serve` and `join`, no code is transferred: a node runs its installed code to answer tasks.
Flower's control service, which accepts commands without a login, is never started.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmomentum.flower.app_client import make_client_app as make_client_app
    from fedmomentum.flower.app_server import make_server_app as make_server_app
    from fedmomentum.flower.base_residual import apply_base_residual as apply_base_residual
    from fedmomentum.flower.strategy import FedMomentumStrategy as FedMomentumStrategy

# no telemetry and no update check; flwr reads these variables when it is imported
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"


_MODULES = {
    "FedMomentumStrategy": "fedmomentum.flower.strategy",
    "apply_base_residual": "fedmomentum.flower.base_residual",
    "make_client_app": "fedmomentum.flower.app_client",
    "make_server_app": "fedmomentum.flower.app_server",
}
"""Public name -> the module that defines it, imported on first use."""
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fedmomentum.flower' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
