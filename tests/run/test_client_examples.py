"""Whether a client's examples can be used does not depend on which of them are held out."""

import pytest
from transformers import AutoModelForCausalLM

from fedmomentum.config.toml import from_dict
from fedmomentum.data.examples import ClientData, Example
from fedmomentum.errors import DataError
from fedmomentum.run.client_examples import tokenize_clients
from tests.tiny import tiny_llama, tiny_tokenizer

SHORT = [Example(f"ab{number}", "c") for number in range(9)]
LONG = Example("abcdefgh", "c")


def tokenized(folder, train, test, fraction):
    limits = {"source": "d.jsonl", "max-length": 6, "max-truncated-fraction": fraction}
    config = from_dict({"model": {"name": str(folder)}, "data": limits})
    party = ClientData("north", tuple(train), tuple(test))
    base = AutoModelForCausalLM.from_pretrained(folder)
    (client,) = tokenize_clients(config, [party], base, tiny_tokenizer(), ())
    return client


def test_an_example_that_is_lost_counts_the_same_in_either_part(tmp_path):
    folder = tiny_llama(tmp_path / "base")
    for train, test in ((SHORT, [LONG]), ([*SHORT[1:], LONG], SHORT[:1])):
        client = tokenized(folder, train, test, 0.1)
        assert len(client.train) + len(client.test) == 9
        with pytest.raises(DataError, match="north: 1 of 10 examples lose"):
            tokenized(folder, train, test, 0.09)
