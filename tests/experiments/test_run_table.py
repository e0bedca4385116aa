"""Experiments that keep one line per run: rates are chosen by the rule, and no run is repeated."""

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedmomentum.config.toml import apply_overrides
from fedmomentum.run.method import make_method
from fedmomentum.run.method_variants import parse_methods
from fedmomentum.run.training_checks import choose_optimizer_state
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
    trials, tuned_comparison = script("trials"), script("tuned_comparison")
    monkeypatch.setattr(trials.moments, "GRID", tuned_comparison.Grid((1e-3, 3e-3), (0, 2)))
    monkeypatch.setattr(trials, "TUNING_SEEDS", (5,))
    config = tiny_config(tmp_path)

    def run_all():
        file = tmp_path / "methods.csv"
        trials.tune_and_score(config, ["fedit"], [1], tmp_path / "runs", file)
        rows = script("run_table").read_rows(file)
        return rows[-1], rows

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
    trials = script("trials")
    config = tiny_config(tmp_path)
    table = script("run_table").RunTable(tmp_path / "methods.csv", trials.COLUMNS)
    row = trials.Trials(config, table, tmp_path / "runs").run("tune", "fedit", 5, 1e30)
    assert (row["exact_match"], row["loss"]) == ("0", "inf")


def test_every_variant_is_accepted(script, tmp_path):
    """What would be refused is found here, and not after hours."""
    variants = (
        *script("methods").VARIANTS,
        *script("moments").METHODS,
        *script("cells").METHODS,
        *script("ablations").ABLATIONS,
    )
    tuned_comparison = script("tuned_comparison")
    labels = [tuned_comparison.labeled(variant, 0.01) for variant in dict.fromkeys(variants)]
    for variant in parse_methods(",".join(labels), tiny_config(tmp_path)):
        config = apply_overrides(tiny_config(tmp_path), variant.overrides)
        config = replace(config, method=variant.method)
        choose_optimizer_state(config, make_method(config))
        assert config.training.learning_rate == 0.01


def test_a_harder_setting_changes_what_it_says(script, tmp_path):
    experiment, cells = script("experiment"), script("cells")
    for base_setting, changes in cells.CELLS.values():
        config = experiment.settings(base_setting, tmp_path)
        for change in changes:
            assert apply_overrides(config, [change]) != config


def test_a_variant_counts_when_all_of_its_seeds_are_there(script, tmp_path):
    trials, run_table = script("trials"), script("run_table")
    assert trials.committed_scores("methods-few", (1, 2), tmp_path) == {}
    table = run_table.RunTable(tmp_path / "methods-few.csv", ("kind", "method", "seed", "loss"))
    for kind, method, seed in (
        ("tune", "fedit", 100),
        ("score", "fedit", 1),
        ("score", "flora", 1),
        ("score", "flora", 2),
        ("tune", "rolora", 1),
        ("tune", "rolora", 2),
    ):
        table.add({"kind": kind, "method": method, "seed": str(seed), "loss": f"0.{seed}"})
    (method, by_seed), *others = trials.committed_scores("methods-few", (1, 2), tmp_path).items()
    assert not others and method == "flora"
    assert {seed: row["loss"] for seed, row in by_seed.items()} == {1: "0.1", 2: "0.2"}


@pytest.mark.parametrize("name", ["ablations", "cells", "methods"])
def test_what_is_committed_is_listed(script, monkeypatch, name):
    figures, trials = script(f"{name}_figures"), script("trials")
    methods = {"ablations": "ABLATIONS", "cells": "METHODS", "methods": "VARIANTS"}[name]
    rows = {}
    default = script("methods_figures").DEFAULT  # in the ablations, and in the table of methods
    for method in {*getattr(script(name), methods), default}:
        row = dict.fromkeys(trials.COLUMNS, "0.25")
        rows[method] = {seed: row for seed in range(8, 24)}
    monkeypatch.setattr(figures, "committed_scores", lambda name, seeds: rows)
    monkeypatch.setattr(figures, "difference", lambda table, method, baseline: mean_of_two)
    mean_of_two = script("figures").mean_of([0.0, 0.02])
    listed = figures.tables()
    assert listed.count("25.0 ± 0.0") >= len(rows) and "+1.0 [" in listed


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


def test_a_committed_run_is_repeated_and_compared(script, monkeypatch, tmp_path, capsys):
    trials, run_table = script("trials"), script("run_table")
    config = tiny_config(tmp_path)
    file = tmp_path / "methods-few.csv"
    table = run_table.RunTable(file, trials.COLUMNS)
    row = trials.Trials(config, table, tmp_path / "runs").run("score", "fedit", 1, 0.01)

    def repeat(out):
        capsys.readouterr()
        return trials.reproduce(config, "fedit", 1, tmp_path / out, file)

    assert repeat("same") == 0
    assert f"loss: committed {row['loss']}, here {row['loss']}" in capsys.readouterr().out
    table.rows[0]["loss"] = "9.5"
    table.add({**row, "seed": "2"})
    assert repeat("other") == 1
    assert "loss: committed 9.5" in capsys.readouterr().out

    # A run of another table, with other settings, goes into the same directory.
    other_table = file.with_name("methods-many.csv")
    other_table.write_bytes(file.read_bytes())
    other_config = apply_overrides(config, ["training.local-steps=1"])
    assert trials.reproduce(other_config, "fedit", 1, tmp_path / "same", other_table) == 1
    assert repeat("same") == 1  # the run that was made first; the table has changed since

    with pytest.raises(SystemExit, match="no committed run of fedit with seed 3"):
        trials.reproduce(config, "fedit", 3, tmp_path / "none", file)


@pytest.mark.parametrize("text", ["few", "few:8", "few:fedit", "few:fedit:x"])
def test_a_run_is_named_by_setting_method_and_seed(script, text):
    tuned_comparison = script("tuned_comparison")
    assert tuned_comparison.parse_run("2:fedmomentum:split=balanced:7") == (
        "2",
        "fedmomentum:split=balanced",
        7,
    )
    with pytest.raises(SystemExit, match="SETTING:METHOD:SEED"):
        tuned_comparison.parse_run(text)


def test_a_setting_that_does_not_exist_is_named_with_those_that_do(script):
    with pytest.raises(SystemExit, match="no setting fow; there are few, many"):
        script("tuned_comparison").parse_run("fow:fedit:8", ("few", "many"))
