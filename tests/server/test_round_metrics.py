"""The times in a round's record."""

from types import SimpleNamespace

import pytest
import torch

from fedmomentum.formats.round_record import RoundRecord
from fedmomentum.protocol.messages import SECONDS
from fedmomentum.results.summary import total_seconds
from fedmomentum.server.replies import Replies
from fedmomentum.server.round_metrics import PhaseTimer


def replies(num_clients, loading, wait):
    """Clients that load and work at the same time."""
    times = {SECONDS: torch.tensor([loading, 1.0], dtype=torch.float64)}
    found = {f"c{i}": SimpleNamespace(tensors=times) for i in range(num_clients)}
    return Replies(replies=found, encode_seconds=0.5, wait_seconds=wait)


def test_the_phases_add_up_to_the_round_when_clients_load_at_the_same_time():
    """20 clients load for 3 s each, but the server waits for 13 s in all."""
    seconds = PhaseTimer().total(replies(20, 3.0, 13.0), replies(20, 1.0, 5.0))
    assert (seconds.train, seconds.evaluate, seconds.encode) == (13.0, 5.0, 1.0)
    assert seconds.loading == pytest.approx(80.0)
    assert total_seconds(RoundRecord(round=1, seconds=seconds)) == pytest.approx(19.0)
