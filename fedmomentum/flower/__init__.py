"""Federations over a network, on Flower: the only package that imports flwr.

::

    server                                        each client
    serve.py      the run over a transport        join.py          fetches tasks, sends replies
    transport.py  FlowerTransport over a Grid     worker.py        a process with model and data
    superlink.py  Flower's fleet service  <-TLS-> fleet_client.py

No code travels: a node runs what is installed on it, and answers tasks. Flower's control service,
which takes commands without a login, is not started at all.
"""

import os

# neither telemetry nor a check for updates; flwr reads these when it is imported
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
