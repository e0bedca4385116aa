"""Real federations: the same round over a network, on Flower. The only part that imports flwr.

::

    coordinator                                        each party
    serve.py   run_over(transport, ...)                join.py    the node: connects, fetches tasks, sends replies
    apps.py    ServerApp                               apps.py    ClientApp
    transport.py  FlowerTransport over a Grid          worker.py  a process of its own with base model and data
    link.py    Flower's fleet service, TLS, keys <-->  connection.py

No code travels: a node runs what is installed on it, and answers tasks. Flower's control service, which takes
commands without a login, is not started at all.
"""

import os

# No telemetry and no look for updates; flwr reads these when it is imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
