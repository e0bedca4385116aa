"""Withheld are fields that rows have, and every one of them has a description."""

import msgspec

from fedmomentum.formats.round_record import EvaluationRecord, RoundRecord
from fedmomentum.formats.withheld import (
    NOISED_ONLY,
    NOISELESS_PHRASES,
    PHRASES,
    SUMS_ONLY,
    describe_withheld,
    withheld_by,
)


def test_every_withheld_field_is_a_field_of_a_row():
    for field in {**PHRASES, **NOISELESS_PHRASES}:
        name, _, part = field.partition(".")
        assert name in RoundRecord.__struct_fields__
        assert not part or part in EvaluationRecord.__struct_fields__
    assert SUMS_ONLY.fields == list(PHRASES)
    assert NOISED_ONLY.fields == list(NOISELESS_PHRASES)


def test_a_field_without_a_description_is_named():
    changed = msgspec.structs.replace(SUMS_ONLY, fields=["weights", "new_field"])
    assert describe_withheld(changed) == "Left out on purpose: the clients' weights; new_field."


def test_both_kinds_of_privacy_withhold_together():
    assert withheld_by(secure=False, private=False) is None
    assert withheld_by(secure=True, private=False) == SUMS_ONLY
    assert withheld_by(secure=False, private=True) == NOISED_ONLY
    both = withheld_by(secure=True, private=True)
    assert both.fields == [*SUMS_ONLY.fields, *NOISED_ONLY.fields]
    assert both.reason == f"{SUMS_ONLY.reason}; {NOISED_ONLY.reason}"
    assert "no round is the best" in describe_withheld(both)
