"""Parties and sums for tests."""

import hashlib
from functools import lru_cache

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from fedmomentum.secure_sum.fixed_point import largest_integer
from fedmomentum.secure_sum.journal import PartyJournal
from fedmomentum.secure_sum.messages import Block, SumPlan, min_threshold
from fedmomentum.secure_sum.party import Identity, SumParty
from fedmomentum.secure_sum.roster import Roster
from fedmomentum.secure_sum.server import SumServer


def sum_error(block: Block, num_parties: int, num_survivors: int) -> float:
    """The maximum error of an element of the decoded sum: half a step for each party included."""
    return 0.5 * num_survivors * block.bound / largest_integer(num_parties)


@lru_cache
def node_key(name):
    number = int.from_bytes(hashlib.sha384(name.encode()).digest()[:47])
    return ec.derive_private_key(number, ec.SECP384R1())


@lru_cache
def public_key(name):
    return node_key(name).public_key()


def names(n):
    return sorted(f"party {i:02}" for i in range(n))


def roster(parties):
    return Roster({party: public_key(party) for party in parties})


def identity(party, parties, **rest):
    return Identity(party, node_key(party), roster(parties), **rest)


def make_plan(n=4, **changes):
    parties = changes.pop("parties", names(n))
    fields = {
        "run_id": "run",
        "server_round": 3,
        "number": 1,
        "attempt": 1,
        "parties": parties,
        "threshold": min_threshold(len(parties)),
        "work": "0" * 64,
        "blocks": [Block(name="B", size=5, bound=0.5), Block(name="A", size=3, bound=20.0)],
    }
    return SumPlan(**(fields | changes))


def make_values(plan, seed=0):
    """Each party's values, within the bounds."""
    draw = np.random.default_rng(seed)
    return {
        party: {
            block.name: draw.uniform(-block.bound, block.bound, block.size) for block in plan.blocks
        }
        for party in plan.parties
    }


def make_parties(plan, values, folder, **rest):
    return {
        party: SumParty(
            identity(party, plan.parties, **rest), PartyJournal(folder / f"{party}.json"), own
        )
        for party, own in values.items()
    }


def plain_sum(values, parties):
    first = values[parties[0]]
    return {block: sum(values[party][block] for party in parties) for block in first}


def run_sum(server, parties, leaves=None, change=None, seen=None):
    """Run a sum to its end: a party answers nothing from the step on at which it leaves.

    `change(step, party, reply)` may replace a reply; `seen` collects all messages and replies.
    """
    step = 0
    while not server.finished:
        for party, message in server.messages().items():
            if seen is not None:
                seen.append((step, party, "to", message))
            if step < (leaves or {}).get(party, 99):
                reply = parties[party].answer(message)
                if change is not None:
                    reply = change(step, party, reply)
                if seen is not None:
                    seen.append((step, party, "from", reply))
                server.receive(party, reply)
        server.advance()
        step += 1
    return server.result


def until(step, plan, folder, seed=0):
    """A server and its parties, with all steps before `step` done."""
    parties = make_parties(plan, make_values(plan, seed), folder)
    server = SumServer(plan, roster(plan.parties))
    for _ in range(step):
        for party, message in server.messages().items():
            server.receive(party, parties[party].answer(message))
        server.advance()
    return server, parties
