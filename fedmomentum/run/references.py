"""The baselines of a comparison: one model on the pooled data, and one model per client."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedmomentum.config.schema import EvaluationConfig
from fedmomentum.data.tokenized import TokenizedClient, TokenizedExamples
from fedmomentum.run.plan import make_plan

if TYPE_CHECKING:
    from fedmomentum.run.prepared_run import PreparedRun


REFERENCES = ("centralized", "local")
POOLED = "everyone"
"""The name of the only client of `centralized`."""


def make_reference(run: PreparedRun, only: str | None) -> None:
    """Turn a prepared run, in place, into that of a single client, scored on everyone's examples.

    Args:
        run: A run prepared with the federation's clients and settings.
        only: The client that trains alone, on its own data; None: one client with all data.

    The client's held-out examples are first those that all clients use in intermediate evaluations,
    then the additional ones of the first and last evaluation; an example's category is the client
    it comes from. Passes over pooled data are shortened to the mean client's number of steps.
    """
    assert run.local is not None, "a reference trains in this process"
    config, federated = run.config, run.clients
    settings = config.evaluation
    between, ends = settings.num_examples, max(settings.num_examples, settings.final_num_examples)
    # The same held-out examples, in the order in which federated evaluations use them.
    test = TokenizedExamples.concatenate(
        [_part(client.test, 0, between, client.client_id) for client in federated]
        + [_part(client.test, between, ends, client.client_id) for client in federated]
    )
    # One client's data, or everyone's.
    trained = [client for client in federated if only in (None, client.client_id)]
    client = replace(
        trained[0],
        client_id=only or POOLED,
        model=run.local,
        train=TokenizedExamples.concatenate([c.train for c in trained]),
        test=test,
    )
    evaluation = EvaluationConfig(
        settings.every,
        max(1, sum(min(between, len(client.test)) for client in federated)),
        max(1, len(test)),
        settings.batch_size,
    )
    # A pass over pooled data takes as many steps as the mean client's pass.
    training = config.training
    if training.local_epochs is not None:
        training = replace(training, local_epochs=training.local_epochs / len(trained))
    # The prepared run becomes that of the single client.
    run.config = replace(config, evaluation=evaluation, training=training)
    run.clients = [client]
    run.partition = {
        client.client_id: {"train": _counts(client.train), "test": _counts(client.test)}
    }
    examples = TokenizedClient(client.client_id, client.train, client.test)
    run.plan = make_plan(run.config, run.outline, [examples], run.method)


def _part(examples: TokenizedExamples, start: int, end: int, category: str) -> TokenizedExamples:
    part = examples[start:end]
    return replace(part, categories=(category,) * len(part), num_lost=0)


def _counts(examples: TokenizedExamples) -> dict[str, int]:
    return {
        category: examples.categories.count(category)
        for category in sorted(set(examples.categories))
    }
