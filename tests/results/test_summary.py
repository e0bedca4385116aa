"""The numbers of the final table."""

import pytest

from fedmomentum.results.summary import natural_order, summarize_run
from tests.report.folders import records, row, score


def test_summarize_run_takes_the_first_and_the_last_evaluated_round():
    rows = [row(r, ["client-10", "client-2"], ["b", "a"]) for r in range(4)]
    rows[3]["evaluation"] = None
    rows[0]["evaluation"]["total"] = score(15, 148, 2.5)
    rows[2]["evaluation"]["total"] = score(81, 263, 1.25)
    summary = summarize_run(records(rows))
    assert [(line.group, line.name) for line in summary] == [
        ("total", "all"),
        ("category", "a"),
        ("category", "b"),
        ("client", "client-2"),
        ("client", "client-10"),
    ]
    total = summary[0]
    first, last = total.base, total.federated
    assert (first.num_examples, first.num_exact, first.loss) == (148, 15, 2.5)
    assert (last.num_examples, last.num_exact, last.loss) == (263, 81, 1.25)
    assert last.exact_match == 81 / 263
    assert last.interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert total.change == pytest.approx(81 / 263 - 15 / 148)
    for line, key in ((summary[1], "by_category"), (summary[3], "by_client")):
        for measure, server_round in ((line.base, 0), (line.federated, 2)):
            wanted = rows[server_round]["evaluation"][key][line.name]
            assert (measure.num_exact, measure.loss) == (wanted["num_exact"], wanted["loss"])


def test_summarize_run_leaves_open_what_was_not_evaluated():
    rows = [row(0, ["a"], ["x"]), row(1, ["b"], ["x"])]
    rows[1]["evaluation"]["by_category"]["x"] = score(0, 0, 0.0)
    by_name = {line.name: line for line in summarize_run(records(rows))}
    assert by_name["a"].base and not by_name["a"].federated
    assert by_name["b"].federated and not by_name["b"].base
    assert by_name["x"].federated is None and by_name["x"].change is None

    rows[0]["evaluation"] = rows[1]["evaluation"] = None
    assert [(line.base, line.federated) for line in summarize_run(records(rows))] == [(None, None)]
    assert summarize_run(records(rows[:1]))[0].federated is None


def test_data_without_categories_has_no_row_for_them():
    groups = [line.group for line in summarize_run(records([row(0, ["a"], [""])]))]
    assert groups == ["total", "client"]
    mixed = [line.group for line in summarize_run(records([row(0, ["a"], ["", "x"])]))]
    assert mixed == ["total", "category", "category", "client"]


def test_natural_order_puts_2_before_10():
    names = ["client-10", "client-2", "10", "9", "", "client"]
    assert sorted(names, key=natural_order) == ["", "9", "10", "client", "client-2", "client-10"]
