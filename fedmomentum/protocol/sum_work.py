"""What the clients of a masked sum did, as a hash in the plan that all of them sign.

A sum hides a client's values only among others of the same kind. If a server could have all clients
but one train at a learning rate of nearly zero, or start from another model, the sum would be that
one's own update (Pasquini et al., Eluding Secure Aggregation in Federated Learning via Model
Inconsistency, arXiv 2111.07380). So each client hashes what it was asked to do, and takes part only
in a sum whose plan has this hash. Keys and signatures depend on the plan, so clients that were sent
different plans have no sum together.

Left out is what differs between clients of an honest server: which objects they are sent, the order
of their batches, the outcome of their last sums.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from fedmomentum.protocol.messages import EvaluateRequest, ModelRequest, TrainRequest
from fedmomentum.utils.io import sha256

R = TypeVar("R", bound=ModelRequest)


def training_work(request: TrainRequest) -> str:
    """Return the hash of what is trained: the work of a round's first sum."""
    assert request.secure is not None
    terms = msgspec.structs.replace(request.secure, outcome=None)
    common = msgspec.structs.replace(_common_fields(request), seed=0, secure=terms)
    return _hash("train", common)


def projection_work(trained: str, means: str) -> str:
    """Return the hash of what cross terms are projected on: the work of a round's second sum.

    It depends on what was trained, too: a server could leave out the first sum, and make up its
    outcome.

    Args:
        trained: The work of the first sum.
        means: The hash of the first sum's outcome.
    """
    return sha256(f"project {trained} {means}".encode())


def evaluation_work(request: EvaluateRequest) -> str:
    """Return the hash of what is scored: the work of a round's sum of scores."""
    common = msgspec.structs.replace(_common_fields(request), means=None)
    return _hash("evaluate", common)


def _common_fields(request: R) -> R:
    # Objects have their hashes in the manifest; probes stay with the clients of a secure run.
    return msgspec.structs.replace(request, fresh=None, recipes=[], probe_seed=None)


def _hash(kind: str, request: ModelRequest) -> str:
    # Decode as a client does: JSON does not distinguish 1 and 1.0, the types do.
    received = msgspec.json.decode(msgspec.json.encode(request), type=type(request))
    return sha256(f"{kind} ".encode() + msgspec.json.encode(received, order="sorted"))
