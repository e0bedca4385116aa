"""What a run with secure aggregation does not tell, and why: for its rows, its plan and its report.

The server has sums over the clients. Whatever speaks of a single one stays with that client, and
the rows of metrics.jsonl say so instead of looking as if something had gone wrong.
"""

from __future__ import annotations

from fedmomentum.formats.round_record import Withheld

SUMS_ONLY = Withheld(
    reason="secure aggregation: the server has sums over the clients, and nothing of a single one",
    fields=[
        "weights",
        "num_examples",
        "clients",
        "screening",
        "evaluation.by_client",
        "evaluation.by_category",
        "exactness_error",
        "applied_share",
        "uplink_rounding",
        "diagnostics",
    ],
)
"""What every row of such a run withholds."""
