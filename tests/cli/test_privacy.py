"""`fedmomentum privacy`: what noise an epsilon takes, and what a ledger says is spent."""

import pytest

from fedmomentum.config.toml import to_toml
from fedmomentum.privacy.accountant import Steps, epsilon_of, noise_for
from fedmomentum.privacy.ledger import Budget, Ledger
from fedmomentum.privacy.mechanism import Mechanism
from fedmomentum.results.formatting import number
from tests.runs import tiny_config

DELTA = 1e-3


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("privacy")
    file = folder / "job.toml"
    config = tiny_config(folder, num_clients=2, privacy={"dp": {"delta": DELTA}})
    file.write_text(to_toml(config))
    return file


def test_plan_shows_the_noise_of_the_jobs_clients(job, call):
    code, printed, err = call("privacy", "plan", job, "privacy.dp.epsilon=3")
    assert code == 0, err
    # 12 and 24 examples, of which a quarter is held out: 9 and 18; 2 steps of 4 in each of 3 rounds.
    for client, units in (("site0", 9), ("site1", 18)):
        (row,) = [line for line in printed.splitlines() if client in line]
        noise = noise_for(3.0, DELTA, 4 / units, 6)
        assert str(units) in row and number(noise) in row
        assert number(epsilon_of([Steps(noise, 4 / units, 6)], DELTA)) in row


def test_plan_shows_the_epsilon_of_noise_and_typical_ones_without_either(job, call):
    words = ("privacy", "plan", job, "--units", "40")
    code, printed, _ = call(*words, "privacy.dp.noise-multiplier=1.5")
    assert code == 0
    assert number(epsilon_of([Steps(1.5, 0.1, 6)], DELTA)) in printed
    code, printed, _ = call(*words)
    assert code == 0 and printed.count("40 units") == 4
    code, _, err = call(*words, "privacy.dp.delta=0.1")
    assert code == 2 and "no less than 1 / 40 units" in err
    code, _, err = call("privacy", "plan", job, "--units", "0")
    assert code == 2 and "--units must be at least 1" in err
    code, _, err = call(*words, "training.function=a:b")
    assert code == 2 and "training.function cannot be used" in err


def test_ledger_shows_runs_and_their_sum(tmp_path, call):
    ledger = Ledger(tmp_path / "north.json", "north", "patient", Budget(None, DELTA))
    ledger.begin(80)
    mechanism = Mechanism(1.0, 0.1, 10, 1.0, 8.0)
    for index, run in enumerate(("first", "first", "second")):
        task = f"{index}" * 64
        with ledger.training(task, run, index, mechanism, "d" * 64) as training:
            training.finish(b"reply")
    for path in (ledger.file, tmp_path):
        code, printed, _ = call("privacy", "ledger", path, "--delta", str(DELTA))
        assert code == 0
        assert "one patient is protected, 80 taken for public" in printed
        for run, steps in (("first", 20), ("second", 30)):
            (row,) = [line for line in printed.splitlines() if run in line]
            assert number(epsilon_of([Steps(1.0, 0.1, steps)], DELTA)) in row
        total = number(epsilon_of([Steps(1.0, 0.1, 30)], DELTA))
        assert f"spent: epsilon {total} at delta 0.001" in printed


def test_mistakes_exit_with_code_2(tmp_path, call):
    for path, message in (
        (tmp_path / "none.json", "there is no ledger"),
        (tmp_path, "holds no ledger"),
    ):
        code, _, err = call("privacy", "ledger", path)
        assert code == 2 and message in err
    (tmp_path / "north.json").write_text("{}")
    code, _, err = call("privacy", "ledger", tmp_path / "north.json")
    assert code == 2 and "north.json" in err
    code, _, err = call("privacy", "ledger", tmp_path, "--delta", "2")
    assert code == 2 and "--delta must be between 0 and 1" in err
