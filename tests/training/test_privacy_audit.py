"""An audit in one run: how well canaries are told apart from what was left out bounds epsilon from below.

Steinke, Nasr and Jagielski, Privacy Auditing with One (1) Training Run, NeurIPS 2023. Each canary is trained on
with probability one half; an observer of the model guesses which were. With (epsilon, delta) the number of right
guesses is bounded, so that many of them disprove an epsilon.
"""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom
from torch import nn

from fedmomentum.config.training import LocalTraining
from fedmomentum.data.tokenized import TokenizedExamples
from fedmomentum.objectives.classification import SequenceClassification
from fedmomentum.privacy.accountant import epsilon_of
from fedmomentum.privacy.ledger import Budget, Ledger
from fedmomentum.privacy.mechanism import Mechanism, PrivateSettings, group_units
from fedmomentum.training import private_trainer
from fedmomentum.training.trainer import train

DELTA = 1e-5
CONFIDENCE = 0.999


class OneTokenModel(nn.Module):
    """A column of weights for each token, so that every canary has a gradient of its own: the strongest ones."""

    def __init__(self, num_tokens):
        super().__init__()
        self.table = nn.Linear(num_tokens, 2, bias=False)
        nn.init.zeros_(self.table.weight)

    def forward(self, input_ids, attention_mask=None):
        first = F.one_hot(input_ids[:, 0], self.table.in_features).float()
        return SimpleNamespace(logits=self.table(first))


def p_value(num_canaries, num_guesses, num_right, epsilon):
    """How likely so many right guesses are at most, if training is (epsilon, DELTA)-private (their theorem 5.2)."""
    rate = 1 / (1 + torch.exp(torch.tensor(-float(epsilon))).item())
    tail = binom.sf(num_right - 1, num_guesses, rate)
    masses = binom.pmf(range(num_right - 1, -1, -1), num_guesses, rate).cumsum()
    alpha = max(mass / (index + 1) for index, mass in enumerate(masses))
    return min(tail + 2 * num_canaries * DELTA * alpha, 1.0)


def lower_bound(num_canaries, num_guesses, num_right):
    """The largest epsilon that the guesses disprove; 0 if none."""
    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        if p_value(num_canaries, num_guesses, num_right, middle) <= 1 - CONFIDENCE:
            low = middle
        else:
            high = middle
    return low


def audit(tmp_path, num_canaries, mechanism, guessed=0.2):
    """Train on about half of the canaries, guess; return the ledger's epsilon and the audit's."""
    chosen = [canary for canary in range(num_canaries) if random.SystemRandom().random() < 0.5]
    rows = TokenizedExamples(
        tuple((canary, 1) for canary in chosen),
        (1,) * len(chosen),
        ("",) * len(chosen),
        (False,) * len(chosen),
        0,
    )
    model = OneTokenModel(num_canaries)
    settings = PrivateSettings(
        mechanism, group_units(rows.units), max_rows=max(1, round(mechanism.expected_batch))
    )
    ledger = Ledger(tmp_path / "site.json", "site", "example", Budget(None, DELTA))
    ledger.begin(num_canaries)
    with ledger.training("0" * 64, "run", 1, mechanism, "0" * 64) as training:
        train(
            model,
            rows,
            LocalTraining(0.1, 8, local_steps=1, arguments={"optim": "sgd"}),
            pad_token_id=0,
            seed=0,
            objective=SequenceClassification(("a", "b")),
            private=settings,
        )
        training.finish(b"")
    # The tokens whose weights moved most towards the label are guessed to be in, those against it out.
    scores = (model.table.weight[1] - model.table.weight[0]).detach()
    order = scores.argsort(descending=True).tolist()
    count = round(guessed * num_canaries / 2)
    guesses = [(canary, True) for canary in order[:count]]
    guesses += [(canary, False) for canary in order[-count:]]
    inside = set(chosen)
    num_right = sum((canary in inside) == is_in for canary, is_in in guesses)
    return epsilon_of(ledger.read().history, DELTA), lower_bound(num_canaries, 2 * count, num_right)


def test_bound_is_that_of_the_theorem():
    """Nothing is learned from chance; 100 right guesses of 100 disprove what half of them would be rarer than."""
    assert lower_bound(1000, 100, 50) == 0.0
    # Without delta's share: rate ** 100 = 0.001.
    wanted = torch.logit(torch.tensor(0.001 ** (1 / 100))).item()
    assert 0.9 * wanted < lower_bound(100, 100, 100) < wanted


def test_audit_stays_below_the_ledger_and_rises_above_without_noise(tmp_path, monkeypatch):
    mechanism = Mechanism(3.0, 0.5, 4, 0.5, 150.0)
    ledger_epsilon, audited = audit(tmp_path / "noise", 600, mechanism)
    assert 1.0 < ledger_epsilon < 3.0
    assert audited < ledger_epsilon
    with monkeypatch.context() as patch:
        patch.setattr(private_trainer, "normals", lambda shape: torch.zeros(shape).double())
        same_epsilon, audited = audit(tmp_path / "none", 600, mechanism)
    assert same_epsilon == ledger_epsilon
    assert audited > ledger_epsilon


@pytest.mark.long
@pytest.mark.parametrize(
    ("mechanism", "least"),
    [
        (Mechanism(1.2, 1.0, 3, 0.5, 2000.0), 0.15),  # what is found is a good part of it
        (Mechanism(0.8, 0.2, 10, 0.5, 400.0), 0.0),
        (Mechanism(2.0, 0.5, 20, 0.1, 1000.0), 0.0),
    ],
)
def test_audit_of_thousands_of_canaries(tmp_path, mechanism, least):
    ledger_epsilon, audited = audit(tmp_path, 4000, mechanism, guessed=0.1)
    assert least * ledger_epsilon <= audited < ledger_epsilon
