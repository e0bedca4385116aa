"""The process of a node's worker, which plays one client with the node's own configuration."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.config.toml import load_config
from fedmomentum.flower.node_callback import WorkerInfo
from fedmomentum.run.worker_process import Answer, Frame, Reporter, Send, serve
from fedmomentum.utils.terminal import LineFormatter

if TYPE_CHECKING:
    from fedmomentum.client.client import Client

LOG = logging.getLogger("fedmomentum")


def main() -> None:
    """Load the model and data, report them, and answer tasks until the node ends."""
    handler = logging.StreamHandler()
    # Names in tasks and error texts may contain control characters.
    handler.setFormatter(LineFormatter("%(message)s"))
    LOG.addHandler(handler)
    serve(lambda setup, send: load(json.loads(setup), send))


def load(setup: Mapping[str, str], send: Send) -> Answer:
    """Load the model and data.

    Args:
        setup: The configuration as TOML, the client's name, its store, and its key file.
        send: Sends a frame to the node.

    Returns:
        A function that answers the node's frames.
    """
    # Heavy imports, only in the worker.
    from fedmomentum.data.split import compare_split
    from fedmomentum.flower.parties import node_party
    from fedmomentum.run.client_setup import prepare_client, smoke_test_task
    from fedmomentum.utils.process import quiet_libraries

    # Load this client's model and data.
    store = Path(setup["store"])
    config_file = store / "config.toml"
    config_file.write_text(setup["config"])
    config = load_config(config_file)
    with quiet_libraries():
        client = prepare_client(config, setup["client_id"], store, callbacks=Reporter(send))
    if "key" in setup:
        client.party = node_party(config, setup["client_id"], Path(setup["key"]), store)
    # Report to the node that this process is ready.
    info = WorkerInfo(
        num_train=len(client.train),
        num_test=len(client.test),
        num_parameters=client.model.num_parameters,
        dtype=str(client.model.dtype).removeprefix("torch."),
        base_sha256=client.model.identity.sha256,
    )
    send(Frame.READY, json.dumps(asdict(info)).encode())

    def check_split(run_id: str) -> None:
        warning = compare_split(store, run_id, client.train, client.test, seed=config.run.seed)
        if warning:
            send(Frame.WARNING, warning.encode())

    def answer(frame: bytes) -> bytes | None:
        letter = frame[:1]
        body = frame[1:]
        if letter == Frame.RUN:
            check_split(body.decode())
            return None
        with quiet_libraries():
            if letter == Frame.SMOKE_TEST:
                return _run_smoke_test(client, smoke_test_task(config, client))
            return client.handle(body)

    return answer


def _run_smoke_test(client: Client, task: bytes) -> bytes:
    """Do a training step whose reply stays here, so that nothing is summed or spent."""
    party = client.party
    client.party = None
    try:
        return client.handle(task, is_smoke_test=True)
    finally:
        client.party = party


if __name__ == "__main__":
    main()
