"""What a private run withholds, and why: for its metrics, its report and its live page.

With secure aggregation, the server only has sums over the clients, and anything about a single one
stays with that client. With differential privacy, nothing is revealed without noise. The rows of
metrics.jsonl say so, instead of looking as if something had gone wrong.
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
    "diagnostics": "how the model moved, which needs single updates",
}
"""Each field that secure aggregation withholds, with a description in words."""
NOISELESS_PHRASES = {
    "train_loss": "losses and numbers of targets in training",
    "evaluation": "all held-out scores, so that no round is the best",
}
"""The same for differential privacy."""
SUMS_ONLY = Withheld(
    reason="secure aggregation: the server has sums over the clients, and nothing of a single one",
    fields=list(PHRASES),
)
"""What every row of a run with secure aggregation withholds."""


NOISED_ONLY = Withheld(
    reason="differential privacy: nothing is revealed of the examples without noise",
    fields=list(NOISELESS_PHRASES),
)
"""What every row of a run with differential privacy withholds."""


def withheld_by(*, secure: bool, private: bool) -> Withheld | None:
    """Return what a run withholds; None if nothing.

    Args:
        secure: Whether the server only has sums.
        private: Whether training is differentially private.
    """
    kinds = [kind for kind, counts in ((SUMS_ONLY, secure), (NOISED_ONLY, private)) if counts]
    if not kinds:
        return None
    reason = "; ".join(kind.reason for kind in kinds)
    return Withheld(reason=reason, fields=[field for kind in kinds for field in kind.fields])


def describe_withheld(withheld: Withheld) -> str:
    """Return a sentence that says what is withheld."""
    phrases = {**PHRASES, **NOISELESS_PHRASES}
    names = [phrases.get(field, field) for field in withheld.fields]
    return f"Left out on purpose: {'; '.join(names)}."
