"""How nodes of the fault suite train: as `nudge` does, after following `steer.json` in their working folder."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from fedmomentum.training import TrainReport
from tests.runs import nudge

STEER = Path("steer.json")


def train(model, examples, *, seed, **settings) -> TrainReport:
    """The seed tells which round of which client this is; the orders are by seed."""
    order = _order(seed)
    if order == "raise":
        raise OSError("the disk /srv/hospital/patients.csv is full")
    if order == "exit":
        os._exit(7)
    if order == "hold":
        Path(f"held-{seed}").touch()
        while _order(seed) == "hold":
            time.sleep(0.05)
    return nudge(model, examples, seed=seed, **settings)


def _order(seed: int) -> str:
    return json.loads(STEER.read_text()).get(str(seed), "") if STEER.is_file() else ""
