"""What an export says about itself, without details that should not leave this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.errors import DataError, ModelError
from fedmomentum.global_model.card import CardFacts
from fedmomentum.lora.base_names import public_base
from fedmomentum.results.run_results import RunResults
from fedmomentum.results.summary import scored
from fedmomentum.utils.hub import split_revision

if TYPE_CHECKING:
    from fedmomentum.formats.scores import Score
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.run.saved_model import Result


def card_facts(result: Result, data: str = "", location: str = "") -> CardFacts:
    """Return the facts for a result's model card that the model itself does not hold.

    Scores are those of the exported round, pooled over clients so that no client names are
    published. An export never fails because of its card: without readable records it has no scores.

    Args:
        result: What is exported.
        data: The user's description of the clients' data.
        location: Where the export can be loaded from; empty for its directory.
    """
    facts = CardFacts(data=data, location=location)
    if result.config is None:
        return facts
    try:
        records = RunResults.load(result.path)
    except (DataError, ModelError):
        return facts
    server_round = result.model.server_round
    evaluations = {record.round: record.evaluation for record in records.rounds}
    scores: list[Score | None] = []
    for number in (0, server_round):
        evaluation = evaluations.get(number)
        score = None
        if evaluation is not None and result.client:
            score = evaluation.by_client.get(result.client)
        elif evaluation is not None:
            score = evaluation.total
        scores.append(scored(score))
    lines = []
    for line in records.benchmarks.lines if records.benchmarks is not None else []:
        if (line.model.round, line.model.client) == (server_round, result.client):
            lines.append(line)
    return replace(facts, scores=(scores[0], scores[1]), benchmarks=lines)


def with_public_base(model: GlobalModel, base: str) -> GlobalModel:
    """Return a model that names its base so that others can find it, or not at all.

    The path of a directory is private, and useless on another machine.

    Args:
        model: The model.
        base: The user's name for the base; the content of a hub name is checked before it is
            written. If empty or a directory, the model's own name is used.
    """
    name, revision = split_revision(base)
    if not base or Path(base).is_dir():
        name = model.base.name
    if name == model.base.name and revision is None:
        revision = model.base.revision
    name, revision = public_base(name, revision)
    return replace(model, base=replace(model.base, name=name, revision=revision))
