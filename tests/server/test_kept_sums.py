"""What a server keeps of a round's sums."""

import pytest

from fedmomentum.errors import ModelError
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.server.kept_sums import SIGNATURES, KeptSums, TrainedParties
from fedmomentum.server.replies import Replies

RUN = "f" * 32


def test_kept_sums_are_read_back_and_only_in_their_own_run(tmp_path):
    kept = KeptSums(tmp_path / "secure", RUN)
    assert kept.round(3) is None
    replies = Replies(failures={"west": "away"}, uplink_bytes={"east": 5}, downlink_bytes={})
    kept.begin_round(3, TrainedParties(2, ["east", "north"], "0" * 64), replies)
    reloaded = KeptSums(tmp_path / "secure", RUN)
    trained, noted = reloaded.round(3)
    assert (trained, noted) == (TrainedParties(2, ["east", "north"], "0" * 64), replies)
    assert KeptSums(tmp_path / "secure", "e" * 32).round(3) is None

    one = reloaded.sum(3, 1, 2)
    assert one.ended_with(0) is None and not one.replies(0, ["east"], 10)
    one.keep(0, "east", b"reply")
    one.end(0, ["east"])
    assert one.ended_with(0) == ["east"] and dict(one.replies(0, ["east"], 10)) == {
        "east": b"reply"
    }
    # A sum may have been opened from the end of its signatures on, in whatever attempt.
    assert not reloaded.is_opened(3)
    reloaded.sum(3, 1, 1).end(SIGNATURES, ["east"])
    assert reloaded.is_opened(3) and not reloaded.is_opened(2)
    reloaded.clear()
    assert not (tmp_path / "secure").exists()


def test_clients_are_sent_the_first_means_even_if_they_are_computed_again(tmp_path):
    one = KeptSums(tmp_path, RUN).sum(1, 1, 1)
    one.end(0, [])
    assert one.means(StoredObject(b"first")).data == b"first"
    assert one.means(StoredObject(b"other")).data == b"first"
    file = one.directory / "means"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="means was damaged or altered"):
        one.means(StoredObject(b"first"))
