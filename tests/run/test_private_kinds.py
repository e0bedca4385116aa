"""Every kind of training and every method with differential privacy: it runs, and each training is in a ledger."""

from dataclasses import replace

import pytest

from fedmomentum.aggregation.registry import METHODS
from fedmomentum.privacy.ledger import read_ledger
from tests.run.test_secure_kinds import KINDS, NEED_UPDATES, SECURE, config_of
from tests.runs import start
from tests.server.test_secure_round import rows

DP = {"noise-multiplier": 0.8, "max-grad-norm": 0.7, "delta": 1e-3}


def cases():
    """Kinds, methods and secure aggregation; most are tried by `make test-long`."""
    pairs = [("classification", method, False) for method in sorted(METHODS)]
    pairs += [(kind, "fedmomentum", False) for kind in KINDS if kind != "found-labels"]
    # Secure sums of noisy moments are refused.
    pairs += [(kind, "fedsvd", True) for kind in KINDS if kind not in ("found-labels", "moments")]
    pairs += [("dpo", method, True) for method in sorted(METHODS.keys() - NEED_UPDATES)]
    quick = {("dpo", "fedsvd", True)}
    return [
        pytest.param(*pair, marks=[] if pair in quick else [pytest.mark.long])
        for pair in dict.fromkeys(pairs)
    ]


@pytest.mark.parametrize(("kind", "method", "is_secure"), cases())
def test_a_private_run_of_any_kind_and_method(tmp_path, kind, method, is_secure):
    privacy = {"dp": DP, **(SECURE if is_secure else {})}
    config = config_of(tmp_path, kind, method, privacy=privacy)
    out = tmp_path / "out"
    start(config, out, function=None)
    clients = sorted(config.data.client_files)
    for row in rows(out):
        assert row.failures == {} and row.evaluation is None and row.train_loss is None
        assert row.round == 0 or row.accepted == clients
    for client in clients:
        trainings = read_ledger(out / "privacy" / f"{client}.json").trainings
        assert [(one.server_round, one.state) for one in trainings] == [
            (1, "replied"),
            (2, "replied"),
        ]


def test_shared_moments_are_not_refused_because_of_noise(tmp_path):
    """Clipping bounds plain gradients; here noise comes after it."""
    dp = {**DP, "noise-multiplier": 1e4}
    config = config_of(tmp_path, "completion", "fedmomentum", privacy={"dp": dp})
    training = replace(config.training, optimizer_state="shared", learning_rate=1e-6)
    config = replace(config, training=training)
    start(config, tmp_path / "out", function=None)
    for row in rows(tmp_path / "out")[1:]:
        assert row.failures == {} and len(row.accepted) == 3
