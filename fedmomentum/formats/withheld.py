"""What a run with secure aggregation does not tell, and why: for its rows, its plan and its report.

The server has sums over the clients. Whatever speaks of a single one stays with that client, and
the rows of metrics.jsonl say so instead of looking as if something had gone wrong.
"""

from __future__ import annotations

from fedmomentum.formats.round_record import Withheld

PHRASES = {
    "weights": "the clients' weights",
    "num_examples": "their numbers of examples",
    "clients": "how each one's training went",
    "screening": "how far each one moved",
    "evaluation.by_client": "scores by client",
    "evaluation.by_category": "scores by category, whose names come from the data",
    "exactness_error": "exactness measured on single clients",
    "applied_share": "what of the merged part is applied on single clients",
    "uplink_rounding": "rounding of single updates",
    "diagnostics": "how the model moved, which needs single updates",
}
"""A field that can be withheld to what it is, in words."""
SUMS_ONLY = Withheld(
    reason="secure aggregation: the server has sums over the clients, and nothing of a single one",
    fields=list(PHRASES),
)
"""What every row of such a run withholds."""


def describe_withheld(withheld: Withheld) -> str:
    """Return a sentence that says what is withheld."""
    names = [PHRASES.get(field, field) for field in withheld.fields]
    return f"Left out on purpose: {'; '.join(names)}."
