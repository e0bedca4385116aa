"""Cells and their summary on made-up rows, against numbers computed by hand."""

import json
import math

import pytest

from fedmomentum.errors import ConfigError, DataError, ModelError
from fedmomentum.results.comparison import Comparison, compare_runs, read_comparison
from fedmomentum.results.method_run import make_method_run
from fedmomentum.results.method_summary import csv_rows, summarize_methods, summary_tables
from fedmomentum.results.run_results import RunResults
from tests.report.folders import row, score, write_record, write_run

CLIENTS = ["client-0", "client-1"]


def write_method(
    folder,
    levels,
    *,
    final=None,
    clients=CLIENTS,
    seed=0,
    method="fedmomentum",
    settings="",
    own=None,
):
    """A run of exact match levels[t] / 10 on ten compared items; 100 bytes and 2 s a round."""
    rows = []
    for t, level in enumerate(levels):
        one = row(t, clients, ["a"])
        one["evaluation"] |= {
            "total": score((final if final is not None else level) * 4, 40, 2 - level / 10),
            "compared": score(level, 10, 2 - level / 10),
        }
        if own:
            one["evaluation"] |= own
        one["uplink_bytes"], one["downlink_bytes"], one["seconds"] = (
            {"x": 40},
            {"x": 60},
            {"train": 1.5, "merge": 0.5},
        )
        one["diagnostics"] = (
            None
            if t == 0
            else {
                "update_cosine": 0.5 if t > 1 else None,
                "subspace_angle": {"A": 10.0 + t, "B": 20.0 + t},
            }
        )
        rows.append(one)
    write_run(folder, rows, clients)
    (folder / "config.toml").write_text(
        f'[method]\nname = "{method}"\n[method.settings]\n{settings}\n[run]\nseed = {seed}\n'
    )
    return folder


def cells(tmp_path):
    """Two methods, three seeds each; the last exact matches differ by 0.1, 0.2 and 0.6."""
    found = []
    for method, last_matches in (("one", (2, 3, 1)), ("two", (3, 5, 7))):
        for seed, last in enumerate(last_matches):
            folder = write_method(
                tmp_path / method / f"seed-{seed}", [0, 5 if method == "two" else 1, last]
            )
            found.append(make_method_run(method, seed, [RunResults.load(folder)]))
    return tuple(found)


def test_means_and_spreads_equal_those_computed_by_hand(tmp_path):
    one, two = summarize_methods(Comparison("x", cells(tmp_path), "one", 0.5))
    assert (one.method, two.method, two.seeds) == ("one", "two", (0, 1, 2))
    assert one.exact_match.mean == pytest.approx(0.2) and one.exact_match.spread == pytest.approx(
        0.1
    )
    assert two.exact_match.mean == pytest.approx(0.5) and two.exact_match.spread == pytest.approx(
        0.2
    )
    assert one.exact_match_difference is None and one.loss_difference is None
    difference = two.exact_match_difference
    spread = math.sqrt(0.07)  # (0.04 + 0.01 + 0.09) / 2
    half = 4.302652729911275 * spread / math.sqrt(3)
    assert (difference.mean, difference.spread, difference.count) == (
        pytest.approx(0.3),
        pytest.approx(spread),
        3,
    )
    assert (difference.low, difference.high) == pytest.approx((0.3 - half, 0.3 + half))
    assert two.loss_difference.mean == pytest.approx(-0.3)
    assert two.best_exact_match.mean == pytest.approx((0.5 + 0.5 + 0.7) / 3)
    assert two.best_loss.mean == pytest.approx((1.5 + 1.5 + 1.3) / 3)
    assert one.best_exact_match.mean == pytest.approx((0.2 + 0.3 + 0.1) / 3)
    assert (one.reached, one.rounds_to_target) == (0, None)
    assert (two.reached, two.rounds_to_target.mean, two.rounds_to_target.spread) == (3, 1.0, 0.0)
    assert two.bytes_to_target.mean == 200 and two.seconds_to_target.mean == 4


def test_pairs_share_a_seed_and_missing_ones_are_not_numbers(tmp_path):
    all_cells = cells(tmp_path)
    comparison = Comparison("x", (all_cells[1], *all_cells[3:]), "one", 0.5)
    two = summarize_methods(comparison)[1]
    assert (
        two.exact_match_difference.count == 1
        and two.exact_match_difference.mean == pytest.approx(0.2)
    )
    assert two.exact_match_difference.low is None
    assert json.loads(json.dumps(summary_tables(comparison)))[1]["reached"] == 3
    header, *lines = csv_rows(comparison)
    assert len(lines) == 4 and dict(zip(header, lines[1], strict=True)) == {
        "method": "two",
        "seed": 0,
        "exact_match": 0.3,
        "loss": pytest.approx(1.7),
        "items": 40,
        "best_exact_match": 0.5,
        "best_loss": 1.5,
        "rounds": 2,
        "bytes": 300,
        "seconds": 6.0,
        "rounds_to_target": 1,
        "bytes_to_target": 200,
        "seconds_to_target": 4.0,
    }


def test_a_cell_of_local_training_is_the_mean_over_clients_and_sends_nothing(tmp_path):
    runs = []
    for k, client in enumerate(CLIENTS):
        groups = {
            "by_category": {c: score(2 + 2 * k + j, 10, 1.0 + k) for j, c in enumerate(CLIENTS)}
        }
        runs.append(
            RunResults.load(
                write_method(tmp_path / client, [0, 2 + 4 * k], clients=[client], own=groups)
            )
        )
    cell = make_method_run("local", 0, runs, kind="local")
    assert (
        cell.exact_match == pytest.approx(0.4)
        and cell.loss == pytest.approx(1.6)
        and cell.num_examples == 40
    )
    assert cell.by_client == {
        "client-0": (0.2, 1.0),
        "client-1": (0.5, 2.0),
    }  # own model, own items
    assert [point.exact_match for point in cell.points] == [0, pytest.approx(0.4)]
    assert cell.points[1].num_bytes is None and cell.points[1].seconds == 8
    pooled = make_method_run("centralized", 0, runs[:1], kind="centralized")
    assert (
        pooled.by_client == {"client-0": (0.2, 1.0), "client-1": (0.3, 1.0)}
        and pooled.points[0].num_bytes is None
    )


def test_points_include_the_diagnostics(tmp_path):
    cell = make_method_run("m", 0, [RunResults.load(write_method(tmp_path / "run", [0, 1, 2]))])
    assert [point.update_cosine for point in cell.points] == [None, None, 0.5]
    assert [(point.angle_a, point.angle_b) for point in cell.points] == [
        (None, None),
        (11, 21),
        (12, 22),
    ]
    assert cell.points[2].retained_energy == cell.runs[0].rounds[2].retained_energy


def test_runs_without_an_evaluation_have_no_score(tmp_path):
    folder = write_method(tmp_path / "run", [0, 1])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"evaluation": None} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    comparison = compare_runs([folder], 0.5)
    (one,) = summarize_methods(comparison)
    assert one.exact_match is None and one.best_loss is None and one.reached == 0
    assert comparison.method_runs[0].by_client == {}


def test_runs_are_named_by_method_where_seeds_tell_them_apart(tmp_path):
    folders = [
        write_method(tmp_path / "a", [0, 1], seed=1),
        write_method(tmp_path / "b", [0, 1], method="fedit"),
        write_method(tmp_path / "c", [0, 2]),
        write_method(tmp_path / "d", [0, 2], settings='split = "singular"'),
    ]
    comparison = compare_runs(folders, 0.5)
    assert [(cell.method, cell.seed) for cell in comparison.method_runs] == [
        ("fedmomentum", 0),
        ("fedmomentum", 1),
        ("fedit", 0),
        ("fedmomentum:split=singular", 0),
    ]
    assert comparison.baseline == "fedmomentum"
    same = compare_runs([folders[0], write_method(tmp_path / "e", [0, 1], seed=1)], 0.5)
    assert [cell.method for cell in same.method_runs] == [str(tmp_path / "a"), str(tmp_path / "e")]


def test_runs_of_one_method_with_other_settings_are_not_its_seeds(tmp_path):
    folders = [
        write_method(tmp_path / "a", [0, 1], method="fedit"),
        write_method(tmp_path / "b", [0, 1], method="fedit", seed=1),
    ]
    for folder, rate in zip(folders, ("0.017", "1.7"), strict=True):
        file = folder / "config.toml"
        file.write_text(f"{file.read_text()}[training]\nlearning-rate = {rate}\n")
    assert compare_runs(folders, 0.5).methods == [
        "fedit:training.learning-rate=0.017",
        "fedit:training.learning-rate=1.7",
    ]


def test_runs_whose_defaults_were_others_are_not_seeds_of_one_method(tmp_path):
    folders = [write_method(tmp_path / "a", [0, 1]), write_method(tmp_path / "b", [0, 1], seed=1)]
    plan = folders[1] / "plan.json"
    write_record(plan, json.loads(plan.read_text()) | {"method": "FedMomentum(split='procrustes')"})
    assert compare_runs(folders, 0.5).methods == [
        "fedmomentum:as FedMomentum(split='balanced', energy=1.0)",
        "fedmomentum:as FedMomentum(split='procrustes')",
    ]


def test_a_run_counts_once(tmp_path):
    folder = write_method(tmp_path / "a", [0, 1])
    with pytest.raises(ConfigError, match=r"a is given 2 times; a run counts once"):
        compare_runs([folder, tmp_path / "x" / ".." / "a"], 0.5)


def test_a_folder_without_a_comparison_or_a_damaged_one_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"holds no comparison\.json"):
        read_comparison(tmp_path)
    for text in (
        "{",
        "[]",
        '{"format": "x", "format_version": 3}',
        '{"format": "fedmomentum comparison"}',
        '{"format": "fedmomentum comparison", "format_version": 1}',
    ):
        (tmp_path / "comparison.json").write_text(text)
        with pytest.raises(DataError, match=r"comparison\.json"):
            read_comparison(tmp_path)
