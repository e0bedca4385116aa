"""`fedmomentum`, but a server that stops where FAULTS_STALL says, so that a kill can hit exactly that moment.

FAULTS_STALL is `aggregate`, `commit` or `sum-NUMBER-STEP`, a round and a file, with colons between.
The file is created when that point is reached: `aggregate`, the clients have answered and nothing is
combined; `commit`, objects and metrics of the round are on disk and its manifest, which makes it
count, is not; `sum-NUMBER-STEP`, the messages of that step of a sum under masks have not been sent.
It continues once the file is removed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from fedmomentum.cli.main import main
from fedmomentum.server import checkpoint
from fedmomentum.server import server as rounds
from fedmomentum.server.sum_exchange import SumExchange


def stalling(where: str, server_round: int, file: Path) -> None:
    """Make this process stop there."""
    aggregate_updates, write_json = rounds.aggregate_updates, checkpoint.write_json
    run_step = SumExchange._run_step

    def stall() -> None:
        file.touch()
        while file.exists():
            time.sleep(0.05)

    def our_aggregate_updates(adapters, weights, method, context, *args, **settings):
        if where == "aggregate" and context.server_round == server_round:
            stall()
        return aggregate_updates(adapters, weights, method, context, *args, **settings)

    def our_write_json(path, value):
        if where == "commit" and path.name == f"{server_round:04d}.json":
            stall()
        write_json(path, value)

    def our_run_step(self, server, step, plan, kept, means):
        if (where, server_round) == (f"sum-{plan.number}-{step}", plan.server_round):
            stall()
        return run_step(self, server, step, plan, kept, means)

    SumExchange._run_step = our_run_step
    rounds.aggregate_updates = our_aggregate_updates
    checkpoint.write_json = our_write_json


if __name__ == "__main__":
    WHERE, ROUND, FILE = os.environ["FAULTS_STALL"].split(":")
    stalling(WHERE, int(ROUND), Path(FILE))
    main()
