"""What a comparison lacks is said, and not covered by a number."""

import csv
import io
import json

import pytest

from fedmomentum.cli.tables import gap_lines
from fedmomentum.report import write_comparison_page
from fedmomentum.report.figures.method_scores import difference_plots
from fedmomentum.results.comparison import compare_runs
from fedmomentum.results.comparison_gaps import find_gaps
from fedmomentum.results.method_summary import csv_rows, summarize_methods
from tests.report.folders import row, score, write_record, write_run

CLIENTS = ["north", "south"]


def write_method(folder, method, *, seed=0, failures=None, num_scored=40, is_scored=True):
    """A run of three rounds whose last one may lack a client, examples, or all scores."""
    rows = []
    for t in range(4):
        is_last = t == 3
        one = row(t, CLIENTS, ["a"], failures=failures if is_last else None)
        num_examples = num_scored if is_last else 20
        one["evaluation"]["total"] = score(num_examples // 4, num_examples, 1.5 - 0.1 * t)
        one["evaluation"]["compared"] = score(5, 20, 1.5 - 0.1 * t)
        if is_last and not is_scored:
            one["evaluation"] = None
        rows.append(one)
    write_run(folder, rows, CLIENTS)
    (folder / "config.toml").write_text(f'[method]\nname = "{method}"\n[run]\nseed = {seed}\n')
    return folder


def compared(tmp_path, **options):
    one = write_method(tmp_path / "one", "fedit")
    return compare_runs([one, write_method(tmp_path / "two", "flora", **options)], 0.5)


def test_a_comparison_of_complete_runs_lacks_nothing(tmp_path):
    comparison = compared(tmp_path)
    assert find_gaps(comparison) == [] and gap_lines(comparison) == []
    assert summarize_methods(comparison)[1].loss_difference.count == 1


def test_a_client_whose_update_or_evaluation_is_missing_is_named(tmp_path):
    failures = {"north": "its update holds NaN", "south": "evaluation: no answer within 60 s"}
    gaps = find_gaps(compared(tmp_path, failures=failures))
    left_out = [gap for gap in gaps if "left out of 1 of 3 rounds" in gap]
    assert len(left_out) == 2 and all(gap.startswith("flora, seed 0: ") for gap in gaps)
    assert "flora, seed 0: south gave no evaluation after round 3" in gaps


def test_scores_over_other_examples_are_not_subtracted(tmp_path):
    comparison = compared(tmp_path, num_scored=24)
    flora = summarize_methods(comparison)[1]
    assert flora.loss is not None and flora.loss_difference is None
    assert flora.exact_match_difference is None
    assert find_gaps(comparison) == [
        "flora, seed 0: scored on 24 examples, and fedit on 40; the difference is left out"
    ]


def test_a_figure_shows_the_seeds_that_its_mean_is_over(tmp_path):
    """Of two seeds, one is scored on other examples; it is in neither the mean nor the figure."""
    folders = []
    for method, num_scored in (("fedit", 40), ("flora", 24)):
        folders.append(write_method(tmp_path / f"{method}-0", method, seed=0))
        folders.append(
            write_method(tmp_path / f"{method}-1", method, seed=1, num_scored=num_scored)
        )
    comparison = compare_runs(folders, 0.5)
    summaries = summarize_methods(comparison)
    plots = difference_plots(comparison, summaries)
    assert [plot.key for plot in plots] == ["exact-match-difference", "loss-difference"]
    for plot in plots:
        lines = list(csv.DictReader(io.StringIO(plot.csv)))
        assert [(line["method"], line["seed"]) for line in lines] == [
            ("flora", "0"),
            ("flora", "mean"),
        ]
    assert summaries[1].loss_difference.count == 1


def test_the_score_of_an_earlier_round_is_not_the_last(tmp_path):
    """All evaluations of the last round failed, as of a model that diverged."""
    comparison = compared(tmp_path, is_scored=False)
    flora = summarize_methods(comparison)[1]
    assert flora.exact_match is None and flora.loss is None
    assert comparison.method_runs[1].by_client == {}
    header, _, line = csv_rows(comparison)
    found = dict(zip(header, line, strict=True))
    assert (found["exact_match"], found["items"], found["rounds"]) == (None, None, 3)
    assert found["best_loss"] == pytest.approx(1.3)
    gap = "flora, seed 0: no score after the last round, so it is left out of the means"
    assert find_gaps(comparison) == [gap]


def test_rounds_that_were_scored_by_different_clients_are_not_alike(tmp_path):
    """As where the clients of a round are drawn."""
    comparison = compared(tmp_path)
    file = tmp_path / "two" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    del rows[1]["evaluation"]["by_client"]["south"]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    comparison = compare_runs([tmp_path / "one", tmp_path / "two"], 0.5)
    (gap,) = find_gaps(comparison)
    assert gap.startswith("flora: not all rounds were scored by the same clients")


def test_of_an_unfinished_run_the_last_score_is_shown_and_said_to_be_one(tmp_path):
    comparison = compared(tmp_path)
    plan = tmp_path / "two" / "plan.json"
    write_record(plan, json.loads(plan.read_text()) | {"num_rounds": 9})
    comparison = compare_runs([tmp_path / "one", tmp_path / "two"], 0.5)
    assert comparison.method_runs[1].loss == pytest.approx(1.2)
    assert find_gaps(comparison) == [
        "flora, seed 0: not finished, 3 of 9 rounds; its scores are not the last"
    ]


def test_the_page_and_the_terminal_list_them(tmp_path):
    """A few at once, the others behind."""
    folders = [write_method(tmp_path / "one", "fedit")]
    for seed in range(1, 15):
        folders.append(write_method(tmp_path / f"s{seed}", "flora", seed=seed, is_scored=False))
    page = write_comparison_page(folders, out=tmp_path / "out").read_text()
    assert page.count("no score after the last round") == 14 and "2 more</summary>" in page
    lines = gap_lines(compare_runs(folders, 0.5))
    assert len(lines) == 13 and lines[-1].plain == "... and 2 more, on the page"
