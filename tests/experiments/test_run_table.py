"""Experiments that keep one line per run: rates are chosen by the rule, and no run is repeated."""

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.runs import tiny_config

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def script(monkeypatch):
    """Import a script of the Banking77 experiments by its name."""
    monkeypatch.setattr(sys, "path", [str(EXPERIMENTS / "banking77"), str(EXPERIMENTS), *sys.path])
    return importlib.import_module


def test_a_line_is_on_disk_at_once_and_is_found_by_its_values(script, tmp_path):
    run_table = script("run_table")
    file = tmp_path / "results" / "runs.csv"
    table = run_table.RunTable(file, ("method", "seed", "score"))
    assert table.find({"method": "fedit"}) is None
    for seed in (0, 1):
        table.add({"method": "fedit", "seed": str(seed), "score": f"0.{seed}"})
    reloaded = run_table.RunTable(file, ("method", "seed", "score"))
    assert reloaded.rows == table.rows == run_table.read_rows(file)
    assert reloaded.find({"method": "fedit", "seed": "1"}) == table.rows[1]
    assert reloaded.find({"method": "fedit", "seed": "2"}) is None


@pytest.mark.parametrize(
    ("scores", "best", "tried"),
    [
        ({1: 0.1, 2: 0.5, 3: 0.4, 4: 0.9, 5: 0.0}, 2, {1, 2, 3}),  # a peak is not climbed past
        ({1: 0.1, 2: 0.5, 3: 0.6, 4: 0.7, 5: 0.2}, 4, {1, 2, 3, 4, 5}),  # the grid grows upwards
        ({1: 0.5, 2: 0.5, 3: 0.4, 4: 0.0, 5: 0.0}, 1, {1, 2, 3}),  # of equals the lowest
        ({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5}, 5, {1, 2, 3, 4, 5}),  # the end of the grid
    ],
)
def test_the_rule_for_learning_rates(script, scores, best, tried):
    tuned_comparison = script("tuned_comparison")
    grid = tuned_comparison.Grid((1, 2, 3, 4, 5), (0, 3))
    assert tuned_comparison.search_rates(grid, scores.__getitem__) == (
        best,
        {rate: scores[rate] for rate in tried},
    )
    # By the loss it is the lowest score.
    by_loss = replace(grid, score="loss")
    assert tuned_comparison.search_rates(by_loss, lambda rate: -scores[rate])[0] == best


def test_a_method_is_tuned_and_scored_and_nothing_runs_again(script, monkeypatch, tmp_path, capsys):
    methods, tuned_comparison = script("methods"), script("tuned_comparison")
    monkeypatch.setattr(methods.moments, "GRID", tuned_comparison.Grid((1e-3, 3e-3), (0, 2)))
    monkeypatch.setattr(methods, "TUNING_SEEDS", (5,))
    config = tiny_config(tmp_path)

    def run_all():
        table = methods.RunTable(tmp_path / "methods.csv", methods.COLUMNS)
        trials = methods.Trials(config, table, tmp_path / "runs")
        rate = trials.best_rate("fedit")
        return trials.run("score", "fedit", 1, rate), table.rows

    row, rows = run_all()
    assert [line["kind"] for line in rows] == ["tune", "tune", "score"]
    best = max(rows[:2], key=lambda line: (float(line["exact_match"]), -float(line["rate"])))
    assert row["rate"] == best["rate"]
    for name in ("loss", "bytes", "client_drift", "update_norm", "update_cosine"):
        assert math.isfinite(float(row[name])), name
    assert not list((tmp_path / "runs").glob("*/*/metrics.jsonl"))  # only the lines are kept
    capsys.readouterr()
    assert run_all() == (row, rows)
    assert not capsys.readouterr().out


def test_a_run_that_diverges_counts_as_the_worst(script, tmp_path):
    methods = script("methods")
    config = tiny_config(tmp_path)
    table = methods.RunTable(tmp_path / "methods.csv", methods.COLUMNS)
    trials = methods.Trials(config, table, tmp_path / "runs")
    row = trials.run("tune", "fedit", 5, 1e30)
    assert (row["exact_match"], row["loss"]) == ("0", "inf")


def test_accuracies_against_epsilon_are_those_of_the_scores(script):
    figures = script("private_figures")
    rows = []
    for kind, method, epsilon, seed, accuracy in (
        ("tune", "fedsvd", "4", 100, 0.9),
        ("score", "fedsvd", "inf", 0, 0.7),
        ("score", "fedsvd", "inf", 1, 0.7),
        ("score", "fedsvd", "2", 0, 0.5),
        ("score", "fedsvd", "2", 1, 0.6),
        ("score", "fedmomentum", "2", 0, 0.4),
        ("score", "fedmomentum", "2", 1, 0.5),
        ("score", "fedmomentum", "inf", 0, 0.8),
        ("score", "fedmomentum", "inf", 1, 0.8),
    ):
        row = dict(kind=kind, method=method, epsilon=epsilon, seed=str(seed))
        rows.append(row | {"rate": "0.01", "accuracy": str(accuracy), "loss": "1.0"})
    assert figures.tables(rows).splitlines() == [
        "| accuracy, % | ε = 2 | no privacy |",
        "|---|---|---|",
        "| FedSVD | 55.0 ± 7.1 | 70.0 ± 0.0 |",
        "| FedMomentum | 45.0 ± 7.1 | 80.0 ± 0.0 |",
        "",
        "| to FedMomentum, points | ε = 2 | no privacy |",
        "|---|---|---|",
        "| FedSVD | +10.0 [+10.0, +10.0] | -10.0 [-10.0, -10.0] |",
    ]
