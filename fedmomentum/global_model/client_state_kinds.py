"""All kinds of state that clients carry from round to round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedmomentum.global_model.client_state import ClientStateFiles
from fedmomentum.global_model.cross_terms import CrossTerms
from fedmomentum.global_model.local_moments import LocalMoments
from fedmomentum.global_model.personal import PersonalFactors

STATE_TYPES: tuple[type[PersonalFactors] | type[LocalMoments] | type[CrossTerms], ...] = (
    PersonalFactors,
    LocalMoments,
    CrossTerms,
)


def client_states(store: Path, run_id: str) -> list[ClientStateFiles[Any]]:
    """Return the files of every kind of client state in one run.

    Args:
        store: The run's directory, or a client's private store.
        run_id: The run's identifier on the wire.
    """
    return [ClientStateFiles(store, run_id, state_type) for state_type in STATE_TYPES]
