"""`RoundRecord`: a row of metrics.jsonl, one field per metric, documented where it is defined.

The tables in docs/metrics.md are generated from the fields (`python tools/metrics_tables.py`).
Readers ignore unknown fields, so that an older release can read a newer one's rows.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from fedmomentum.formats.scores import Score
from fedmomentum.utils.schema import LARGEST, Count, Fraction

Number = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
Amount = Annotated[float, Meta(ge=0, le=LARGEST)]


EVALUATION_FAILED = "evaluation: "
"""What precedes the reason in `RoundRecord.failures` if a client's evaluation is missing."""


def doc(meaning: str, unit: str = "") -> Meta:
    """Return the documentation of a field: its meaning and unit."""
    return Meta(description=meaning, extra={"unit": unit})


class _Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table with declared fields; others are ignored."""


class ClientTraining(_Table, frozen=True, kw_only=True):
    """One client's local training in a round."""

    loss: Annotated[
        Number | None,
        doc(
            "mean over the completion tokens of all steps; `null` with `[privacy.dp]`, like the "
            "other losses and `num_tokens`: they have no noise",
            "nats per token",
        ),
    ]
    first_loss: Annotated[
        Number | None, doc("of the first step, before any change", "nats per token")
    ]
    last_loss: Annotated[Number | None, doc("of the last step", "nats per token")]
    num_steps: Annotated[Count | None, doc("optimizer steps", "count")] = None
    num_tokens: Annotated[Count | None, doc("completion tokens, repetitions included", "count")] = (
        None
    )
    rounding: Annotated[
        Amount | None,
        doc("what 16 bits took from its adapter; see `uplink_rounding`", "relative"),
    ] = None
    rank: Annotated[
        Count | None,
        doc("rank at which it trained: that of `[lora]`, or to which the method has pruned it"),
    ] = None


class ScreeningRecord(_Table, frozen=True, kw_only=True):
    """How far a client moved, including clients that were left out because of it."""

    norm: Annotated[
        Amount,
        doc(
            "of its update, what is trained in full included: ‖Δᵢ‖, or the distance of A alone "
            "where B stays with its client"
        ),
    ]
    ratio: Annotated[
        Amount | None,
        doc(
            "how many times further it went than the other clients did for the same work; `null` "
            "where no other moved"
        ),
    ] = None
    is_left_out: Annotated[bool, doc("whether it was left out for that", "bool")] = False


class EvaluationRecord(_Table, frozen=True, kw_only=True):
    """The scores of a round on held-out examples."""

    total: Annotated[Score, doc("over all clients that answered")]
    compared: Annotated[
        Score | None,
        doc(
            "the same over the examples that each of these clients has in every evaluation; it "
            "decides which round is best"
        ),
    ] = None
    by_client: Annotated[dict[str, Score], doc("per client", "name to object")] = {}
    by_category: Annotated[
        dict[str, Score], doc("per category, over the clients", "name to object")
    ] = {}


class CosineRange(_Table, frozen=True, kw_only=True):
    """A cosine over the accepted clients."""

    min: Number | None = None
    mean: Number | None = None
    max: Number | None = None


class PerFactor(_Table, frozen=True, kw_only=True):
    """A number for each factor: A is `(rank, in)`, B is `(out, rank)`."""

    A: Number | None = None
    B: Number | None = None


class FactorNorms(_Table, frozen=True, kw_only=True):
    """The factors' norms before and after the aggregation."""

    before: PerFactor | None = None
    after: PerFactor | None = None


class Diagnostics(_Table, frozen=True, kw_only=True):
    """How a round moved the model."""

    update_norm: Annotated[Amount | None, doc("‖G‖")] = None
    update_cosine: Annotated[
        Number | None,
        doc(
            "⟨G, G₋₁⟩ / (‖G‖ ‖G₋₁‖), with G₋₁ the update of the round before. Near 1: the rounds "
            "move in one direction; below 0: this round takes back some of the last",
            "−1 to 1",
        ),
    ] = None
    client_cosine: Annotated[
        CosineRange | None,
        doc(
            "⟨Δᵢ, G⟩ / (‖Δᵢ‖ ‖G‖) over the accepted clients: `min`, `mean` (each client counts "
            "once) and `max`",
            "object",
        ),
    ] = None
    client_drift: Annotated[
        Amount | None,
        doc(
            "mean over the accepted clients of ‖Δᵢ − Δ̄‖ / ‖Δ̄‖: 0 where they agree; √(n − 1) "
            "where n equal ones have nothing in common",
            "relative",
        ),
    ] = None
    subspace_angle: Annotated[
        PerFactor | None,
        doc(
            "`A`: the mean principal angle between the row spaces of BA and B′A′, `B`: between "
            "their column spaces; over the directions that are not zero, mean over the angles of a "
            "module, then over modules",
            "degrees",
        ),
    ] = None
    factor_norms: Annotated[
        FactorNorms | None,
        doc(
            "`before`: Σ wᵢ ‖Aᵢ‖ and Σ wᵢ ‖Bᵢ‖ of what the clients sent, `after`: ‖A′‖ and ‖B′‖; "
            "without scaling. Shows how a split rescales the factors, which affects training with "
            "Adam",
            "object",
        ),
    ] = None


class PhaseSeconds(_Table, frozen=True, kw_only=True):
    """Wall time of the server in a round, by phase."""

    train: Annotated[
        Amount | None, doc("from sending the training tasks to the last reply", "s")
    ] = None
    encode: Annotated[Amount | None, doc("writing, reading and checking payloads", "s")] = None
    aggregate: Annotated[Amount | None, doc("the method over all modules", "s")] = None
    merge: Annotated[
        Amount | None,
        doc("making the next global model, and consolidating it where that is due", "s"),
    ] = None
    evaluate: Annotated[
        Amount | None, doc("from sending the evaluation tasks to the last reply", "s")
    ] = None
    loading: Annotated[
        Amount | None,
        doc(
            "the clients' loading of the global model with the snapshots that they make, as they "
            "report it, summed over the clients. It lies inside `train` and `evaluate`; the other "
            "five add up to the round",
            "s",
        ),
    ] = None


class Withheld(_Table, frozen=True, kw_only=True):
    """What a row intentionally leaves empty."""

    reason: Annotated[str, doc("why, in words")]
    fields: Annotated[list[str], doc("the fields, as `field` or `field.part`", "names")] = []


class RoundRecord(_Table, frozen=True, kw_only=True):
    """What a round did: who took part, how training went, what the model scores, what it cost."""

    round: Annotated[
        int,
        Meta(ge=0, le=2**31),
        doc("from 0; round 0 trains nothing and evaluates the base model"),
    ]
    participants: Annotated[list[str], doc("clients sampled for the round, sorted", "names")] = []
    accepted: Annotated[list[str], doc("those of them whose update was used", "names")] = []
    failures: Annotated[
        dict[str, str],
        doc(
            "why a client's update, or its evaluation (`evaluation: ...`), is missing",
            "name to text",
        ),
    ] = {}
    weights: Annotated[
        dict[str, Fraction],
        doc(
            "weight of each accepted client: its training examples over those of all accepted "
            "(with `hetlora`, the norm of its adapter, ‖sᵢBᵢAᵢ‖, over the sum of the norms), none "
            "above `federation.max-client-weight`; what is cut off goes to the others in "
            "proportion. They sum to 1",
            "name to fraction",
        ),
    ] = {}
    num_examples: Annotated[
        dict[str, Count], doc("training examples of each accepted client", "name to count")
    ] = {}
    learning_rate: Annotated[Amount | None, doc("of this round")] = None
    train_loss: Annotated[Number | None, doc("Σ wᵢ · `clients[i].loss`", "nats per token")] = None
    clients: Annotated[
        dict[str, ClientTraining],
        doc("each accepted client's own training, below", "name to object"),
    ] = {}
    screening: Annotated[
        dict[str, ScreeningRecord],
        doc("how far each client went whose update could be read, below", "name to object"),
    ] = {}
    evaluation: Annotated[
        EvaluationRecord | None, doc("scores on held-out examples, below", "object")
    ] = None
    retained_energy: Annotated[
        Number | None,
        doc(
            "‖adapter‖² / ‖Δ‖²: what stays in the adapter and is trained further. Where the "
            "residual is orthogonal to the adapter, as with FedMomentum, 1 − this is merged, "
            "carried or lost; the mean factors of FedEx-LoRA can exceed 1",
            "fraction",
        ),
    ] = None
    residual_rank: Annotated[
        Amount | None,
        doc("mean over modules of the rank of what was merged into the base this round", "rank"),
    ] = None
    residual_norm: Annotated[Amount | None, doc("‖residual‖ / ‖Δ‖", "fraction")] = None
    carried_norm: Annotated[
        Amount | None,
        doc(
            "‖carried‖ / ‖Δ‖: what is not in the model yet, because of `energy` below 1, "
            '`residual = "carried"` or `merge_every` above 1',
            "fraction",
        ),
    ] = None
    fallbacks: Annotated[
        Amount | UnsetType,
        doc(
            "modules in which the aligned split fell back to the rotated balanced one; only with "
            '`split = "aligned"`',
            "count",
        ),
    ] = UNSET
    exactness_error: Annotated[
        Amount | None,
        doc(
            "rms of uᵀ(W_got − W_wanted)x over rms of uᵀ(Σ wᵢ sᵢBᵢAᵢ)x; the largest over the "
            "clients. W_got is base + adapter as loaded; W_wanted is the weighted mean of what the "
            "accepted clients measured on their own trained weights, plus what was carried in, "
            "less what is carried on",
            "relative",
        ),
    ] = None
    applied_share: Annotated[
        Number | None,
        doc(
            "⟨got, wanted⟩ / ⟨wanted, wanted⟩ of everything merged into the base so far, M: got is "
            "f(x) − f₀(x) of the adapted layers' forward f and that of the pretrained ones, f₀, "
            "before outputs are rounded to 16 bits; wanted is M x; over all outputs, for a few "
            "random x; the smallest over the clients. 1 means that everything merged takes effect. "
            "`null` where nothing is merged, or nothing measured",
            "fraction",
        ),
    ] = None
    uplink_rounding: Annotated[
        Amount | None,
        doc(
            "‖s(BA − B′A′)‖ / ‖sBA‖, the clients' weighted mean: what `federation.uplink-dtype` "
            "took from their adapters; `exactness_error` includes it. With secure aggregation, "
            "what the integers took from the summed changes of the factors",
            "relative",
        ),
    ] = None
    downlink_rounding: Annotated[
        Amount | None,
        doc(
            "the same of the next adapter, for `federation.downlink-dtype`; an exact method has it "
            "in the residual, others lose it",
            "relative",
        ),
    ] = None
    diagnostics: Annotated[
        Diagnostics | None,
        doc(
            "how the round moved the model, [below](#how-the-model-moved); `null` in round 0",
            "object",
        ),
    ] = None
    is_best: Annotated[
        bool,
        doc(
            "the lowest loss on the compared examples (`evaluation.compared`) of all rounds so "
            "far, round 0 not counted",
            "bool",
        ),
    ] = False
    version: Annotated[
        str | None,
        doc(
            "of the base identity and the hashes of everything merged so far; the adapter is not "
            "in it",
            "SHA-256",
        ),
    ] = None
    uplink_bytes: Annotated[
        dict[str, Count],
        doc(
            "client to server, training and evaluation replies together, payload only; replies "
            "that were refused count",
            "name to bytes",
        ),
    ] = {}
    downlink_bytes: Annotated[
        dict[str, Count],
        doc(
            "server to client, training and evaluation tasks together, payload only",
            "name to bytes",
        ),
    ] = {}
    seconds: Annotated[PhaseSeconds, doc("wall time of the server, below", "object")] = (
        PhaseSeconds()
    )
    withheld: Annotated[
        Withheld | None,
        doc(
            "what is left empty on purpose, and why: with [secure aggregation](privacy.md) what "
            "describes individual clients, with [differential privacy](privacy.md) values to which "
            "no noise was added; "
            "`null` otherwise",
            "object",
        ),
    ] = None

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values; scores include figures derived from their sums."""
        row: dict[str, Any] = msgspec.to_builtins(self)
        if self.evaluation is not None:
            row["evaluation"] = _evaluation_to_json(self.evaluation)
        return row


def _evaluation_to_json(evaluation: EvaluationRecord) -> dict[str, Any]:
    compared = evaluation.compared
    return {
        "total": evaluation.total.to_json(),
        "compared": None if compared is None else compared.to_json(),
        "by_client": {name: score.to_json() for name, score in evaluation.by_client.items()},
        "by_category": {name: score.to_json() for name, score in evaluation.by_category.items()},
    }
