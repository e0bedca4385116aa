"""Faults of runs whose updates are summed under masks: four clients, of whom three open a sum.

What is left must be the model, to the bit, of a run in one process in which the same clients gave no
answer in the same steps; with what they keep of their cross terms, which the second round returns.
"""

from __future__ import annotations

import re
from pathlib import Path

from fedmomentum.flower.keys import make_node_key
from tests.faults.cases import case
from tests.faults.harness import Asked, Federation, honest, place_of, until
from tests.secure_runs import PRIVACY

SECURE = {
    "privacy": PRIVACY,
    "federation": {"num_rounds": 2},
    "evaluation": {"every": 0},
}
CLIENTS = ("site0", "site1", "site2", "site3")


def start(fed: Federation, stall: str, node: str) -> Path:
    """Start a coordinator that stops at a place of round 1, a node, and three clients of our own."""
    for name in CLIENTS:
        fed.key(name)
    there = fed.folder / "stalled"
    fed.serve(stall=f"{stall}:1:{there}")
    fed.join(node)
    for name in CLIENTS:
        if name != node:
            fed.raw(name).start()
    return there


def killed_at(fed: Federation, place: str) -> None:
    """Kill a node by -9 before a step of a sum; it joins again at once, and has nothing of the round."""
    there = start(fed, place, "site1")
    until(there.exists, f"the coordinator at {place}")
    fed.nodes["site1"].kill()
    fed.join("site1")
    fed.nodes["site1"].wait_for_output("Connected to", times=2)
    there.unlink()


NOTHING = "site1 has nothing of round 1: it was started again since"


@case("a party is killed by -9 between the sums", **SECURE)
def party_killed_between_sums(fed: Federation) -> str:
    killed_at(fed, "sum-2-0")
    return fed.check(fails={("sum-2-0", 1, "site1")}, messages={(1, "site1"): NOTHING})


@case("a party is killed by -9 before it unmasks the first sum", **SECURE)
def party_killed_unmasking(fed: Federation) -> str:
    killed_at(fed, "sum-1-4")
    fails = {("sum-1-4", 1, "site1"), ("sum-2-0", 1, "site1")}
    seen = fed.check(fails=fails, messages={(1, "site1"): NOTHING})
    # Its values are in the sum: it had sent them, and the others opened its mask.
    assert fed.rows()[1]["accepted"] == list(CLIENTS)
    return seen


@case("a party is killed by -9 before it unmasks the second sum", **SECURE)
def party_killed_unmasking_again(fed: Federation) -> str:
    killed_at(fed, "sum-2-4")
    return fed.check(fails={("sum-2-4", 1, "site1")}, messages={(1, "site1"): NOTHING})


@case("a party is killed by -9 before it sends masked values", **SECURE)
def party_killed_masking(fed: Federation) -> str:
    killed_at(fed, "sum-1-2")
    seen = fed.check(fails={("sum-1-2", 1, "site1")}, messages={(1, "site1"): NOTHING})
    assert fed.rows()[1]["accepted"] == ["site0", "site2", "site3"]
    return seen


def server_killed_at(fed: Federation, place: str) -> str:
    """Kill the coordinator by -9 before a step of a sum; the one that resumes it asks nobody to train again."""
    there = start(fed, place, "site0")
    until(there.exists, f"the coordinator at {place}")
    fed.server.kill()
    there.unlink()
    fed.serve(resume=True)
    fed.check(forgets_held=True)
    text = fed.nodes["site0"].text()
    assert "Not connected: " in text and len(re.findall("Connected to ", text)) >= 2, text
    assert not (fed.out / "secure").exists()
    return "the node: Not connected"


@case("the coordinator of a secure run is killed by -9 while masked values come", **SECURE)
def secure_server_killed_masking(fed: Federation) -> str:
    return server_killed_at(fed, "sum-1-3")


@case("the coordinator of a secure run is killed by -9 between the sums", **SECURE)
def secure_server_killed_between_sums(fed: Federation) -> str:
    return server_killed_at(fed, "sum-2-0")


@case("the coordinator of a secure run is killed by -9 while a sum is opened", **SECURE)
def secure_server_killed_opening(fed: Federation) -> str:
    return server_killed_at(fed, "sum-1-4")


@case(
    "a party answers a step of a sum after the deadline",
    privacy=PRIVACY,
    federation={"num_rounds": 2, "round_timeout": 15.0},
    evaluation={"every": 0},
)
def slow_party(fed: Federation) -> str:
    def act(asked: Asked) -> None:
        if (place_of(asked.task), asked.task.server_round) == ("sum-1-2", 1):
            reply = asked.honest()
            fed.until_row(1)
            asked.answer(reply)
        else:
            honest(asked)

    for name in CLIENTS:
        fed.key(name)
    fed.serve()
    for name in CLIENTS[:3]:
        fed.raw(name).start()
    fed.raw("site3", act).start()
    seen = fed.check(
        fails={("sum-1-2", 1, "site3")},
        messages={(1, "site3"): "no answer within 15 s"},
        log=[r"site3 answered \d+ s too late; ignored"],
    )
    assert fed.rows()[2]["accepted"] == list(CLIENTS)
    return seen


@case("a party whose roster has another key for one of the others", **SECURE)
def another_roster(fed: Federation) -> str:
    """It vouches for no party that it does not know; the other three continue without it."""
    for name in CLIENTS:
        fed.key(name)
    make_node_key("site0", fed.folder / "forged")
    forged = fed.node_config(site0=fed.folder / "forged" / "site0.pub")
    fed.serve()
    fed.join("site1", config=forged)
    for name in ("site0", "site2", "site3"):
        fed.raw(name).start()
    reason = "of site0 was not signed by the key that the roster has for it"
    return fed.check(
        fails={("sum-1-1", server_round, "site1") for server_round in (1, 2)},
        messages={(server_round, "site1"): reason for server_round in (1, 2)},
    )
