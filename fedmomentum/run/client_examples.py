"""The clients' examples as tokens, checked against the model and the settings."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedmomentum.base_model.load_checks import check_max_length
from fedmomentum.data.tokenized import TokenizedClient
from fedmomentum.objectives.choice import make_objective
from fedmomentum.run.task import check_rows, make_parts
from fedmomentum.run.training_checks import check_pairs
from fedmomentum.training.arguments import check_num_examples
from fedmomentum.utils.seeding import derive_seed

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config
    from fedmomentum.data.examples import ClientData, Example


def held_out_order(config: Config, client: ClientData) -> list[Example]:
    """Return a client's held-out examples in the shuffled order that evaluations use."""
    test = list(client.test)
    random.Random(derive_seed(config.run.seed, "test order", client.client_id)).shuffle(test)
    return test


def tokenize_clients(
    config: Config,
    clients: Sequence[ClientData],
    base: Any,
    tokenizer: Any,
    labels: Sequence[str],
) -> list[TokenizedClient]:
    """Tokenize each client's examples once for the whole run; held-out ones are shuffled.

    Args:
        config: The configuration.
        clients: The clients' data.
        base: The base model, with or without allocated weights.
        tokenizer: Its tokenizer.
        labels: A classifier's labels.

    Raises:
        DataError: If examples cannot be used.
        ModelError: If the model does not embed a token.
        ConfigError: If a client has too few examples for the settings.
    """
    limits: dict[str, Any] = {
        "max_length": config.data.max_length,
        "max_truncated_fraction": config.data.max_truncated_fraction,
        "loss_on": config.training.loss_on,
    }
    check_max_length(base, config.data.max_length)
    objective = make_objective(config.training, labels)
    hyperparameters = config.training.hyperparameters(1, config.federation.num_rounds)
    examples_by_client = []
    for client in clients:
        held_out = f"{client.client_id} (held out)"
        parts = {client.client_id: list(client.train), held_out: held_out_order(config, client)}
        train, test = make_parts(parts, tokenizer, labels, **limits)
        # Check that each part suits the objective, and that the model embeds all of its tokens.
        for owner, rows in ((client.client_id, train), (held_out, test)):
            check_pairs(rows, objective, owner)
            check_rows(base, rows, labels, owner)
        check_num_examples(len(train), hyperparameters, client.client_id)
        examples_by_client.append(TokenizedClient(client.client_id, train, test))
    return examples_by_client
