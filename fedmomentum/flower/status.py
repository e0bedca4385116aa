"""`status.json` in a served run's folder: who is connected, who was asked, until when; written as things happen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmomentum.errors import ModelError
from fedmomentum.files import write_json
from fedmomentum.records import checksummed
from fedmomentum.run_files import StatusFile, read_facts

FILE = "status.json"
FRESH_SECONDS = 30.0
"""A server that has not written for longer than this is busy aggregating, or gone."""


class Status:
    """What `fedmomentum status` shows. Takes the events of the round and of the transport; decides nothing.

    Args:
        out: the run's folder.
        num_rounds: of the run.
    """

    def __init__(self, out: Path, num_rounds: int) -> None:
        self._file = out / FILE
        self._state: dict[str, Any] = {
            "phase": "waiting", "round": None, "num_rounds": num_rounds, "version": None, "waiting_for": [],
            "waits_until": None, "clients": {},
        }  # fmt: skip
        self._written = 0.0

    def observe(self, event: str, facts: Mapping[str, Any]) -> None:
        """Note an event."""
        state, clients = self._state, self._state["clients"]
        calm = event in ("aggregate", "nodes")  # these come often
        if event == "nodes":
            for name in {*facts["registered"], *clients}:
                known = self._client(name)
                calm = calm and known["connected"] == (name in facts["online"])
                known["connected"] = name in facts["online"]
        elif event == "waiting":
            state |= {"waiting_for": list(facts["for"]), "waits_until": time.time() + facts["seconds"]}
        elif event in ("round", "evaluate", "aggregate"):
            state |= {"phase": {"round": "training", "evaluate": "evaluating", "aggregate": "aggregating"}[event],
                      "waiting_for": [], "waits_until": None}  # fmt: skip
            if event == "round":
                state["round"] = facts["round"]
        elif event == "sent":
            client = self._client(facts["client"])
            client |= {"state": "asked", "until": time.time() + facts["seconds"], "reason": None}
            client["down_bytes"] += facts["bytes"]
        elif event == "answered":
            client = self._client(facts["client"])
            client |= {"state": "answered", "until": None, "reason": None}
            client["up_bytes"] += facts["bytes"]
        elif event == "failed":
            self._client(facts["client"]).update(state="failed", until=None, reason=facts["reason"])
        elif event == "row":
            state["version"] = facts["version"]
            for name in facts["accepted"]:
                self._client(name)["rounds"] += 1
        if not calm or time.time() > self._written + 1:
            self._write()

    def _client(self, name: str) -> dict[str, Any]:
        fresh = {"connected": False, "state": "idle", "until": None, "reason": None, "up_bytes": 0, "down_bytes": 0,
                 "rounds": 0}  # fmt: skip
        found: dict[str, Any] = self._state["clients"].setdefault(name, fresh)
        return found

    def _write(self) -> None:
        if self._file.parent.is_dir():
            self._written = time.time()
            write_json(self._file, checksummed({**self._state, "written": self._written}))

    def close(self) -> None:
        """The server ends: nobody is connected to it any more, and nobody is at work for it."""
        self._state |= {"phase": "ended", "waiting_for": [], "waits_until": None}
        for client in self._state["clients"].values():
            client["connected"] = False
            client["until"] = None
            if client["state"] == "asked":
                client["state"] = "idle"
        self._write()


def read_status(out: Path) -> dict[str, Any]:
    """The status of a run.

    Raises:
        ModelError: nothing of the kind there.
    """
    try:
        status, _ = read_facts(out / FILE, StatusFile)
    except FileNotFoundError as error:
        raise ModelError(f"{out} has no {FILE}; give the folder of a run that `fedmomentum serve` made") from error
    except ModelError as error:
        raise ModelError(f"{error}. A server that runs writes it again with its next event") from error
    return status
