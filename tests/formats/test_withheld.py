"""What is withheld are fields that rows have, and every one of them has words."""

import msgspec

from fedmomentum.formats.round_record import EvaluationRecord, RoundRecord
from fedmomentum.formats.withheld import PHRASES, SUMS_ONLY, describe_withheld


def test_every_withheld_field_is_a_field_of_a_row():
    for field in PHRASES:
        name, _, part = field.partition(".")
        assert name in RoundRecord.__struct_fields__
        assert not part or part in EvaluationRecord.__struct_fields__
    assert SUMS_ONLY.fields == list(PHRASES)


def test_a_field_without_words_is_named():
    changed = msgspec.structs.replace(SUMS_ONLY, fields=["weights", "new_field"])
    assert describe_withheld(changed) == "Left out on purpose: the clients' weights; new_field."
