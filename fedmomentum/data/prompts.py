"""Prompts of examples: which are the same, which are trained on, and which clients share."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import takewhile

from fedmomentum.data.examples import Example, TextPair

LOG = logging.getLogger("fedmomentum")

ClientExamples = dict[str, list[Example]]
"""The examples of each client, by its id."""
PromptKey = Callable[[Example], str]
"""Maps an example to a text; examples with equal texts must not be split between train and test."""


def trained_prompts(clients: ClientExamples, key: PromptKey) -> set[str]:
    """Return the keys of all prompts that any client trains on."""
    prompts: set[str] = set()
    for examples in clients.values():
        prompts.update(key(example) for example in examples)
    return prompts


def prompt_key(example: Example, loss_on: str) -> str:
    """Return a text that two examples share if and only if their prompts are the same.

    When all turns of a chat are learned, prompts of any two turns can only be equal if the prompts
    of the chats' first turns are, so those are compared. A text without a prompt is its own key.
    """
    prompt = example.prompt
    if prompt is None:
        return example.completion
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, TextPair):
        return json.dumps(prompt)
    messages = list(prompt)
    if loss_on == "all-assistant":
        messages = list(takewhile(lambda message: message["role"] != "assistant", messages))
    return json.dumps(messages, sort_keys=True)


def warn_of_shared_prompts(train: ClientExamples, test: ClientExamples, key: PromptKey) -> None:
    """Warn of held-out examples whose prompts other clients train on.

    Clients with separate files hold out examples without seeing each other's, here as over a
    network, so only the person who has all files can remove what they share.
    """
    trained = trained_prompts(train, key)
    num_shared = {}
    for client, examples in test.items():
        shared = sum(key(example) in trained for example in examples)
        if shared:
            num_shared[client] = f"{shared} of {client}'s {len(examples)}"
    if num_shared:
        LOG.warning(
            "clients train on prompts that others hold out: %s. Scores on these are not scores on "
            "unseen examples. Remove rows that several clients' files share, or give a "
            "data.test-source",
            ", ".join(num_shared.values()),
        )
