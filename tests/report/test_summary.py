"""The numbers of the final table."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmomentum.report import Measure, summarise, wilson_interval
from fedmomentum.report.summary import natural_order
from tests.report.folders import row, score

# Newcombe, Statistics in Medicine 17 (1998), 857-872, Table I, method 3; the last two follow from z²/(n + z²) by hand.
PUBLISHED = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (0, 10, 0.0, 3.8415 / 13.8415),
    (10, 10, 10 / 13.8415, 1.0),
]


@pytest.mark.parametrize(("num_exact", "num_examples", "low", "high"), PUBLISHED)
def test_wilson_interval_published(num_exact, num_examples, low, high):
    assert wilson_interval(num_exact, num_examples) == pytest.approx((low, high), abs=5e-5)


@given(num_examples=st.integers(1, 10**6), data=st.data())
def test_wilson_interval_ends_where_the_share_is_196_errors_away(num_examples, data):
    num_exact = data.draw(st.integers(0, num_examples))
    low, high = wilson_interval(num_exact, num_examples)
    share = num_exact / num_examples
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for end in (low, high):
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / num_examples), abs=1e-7)


def test_wilson_interval_of_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_summarise_takes_the_first_and_the_last_evaluated_round():
    rows = [row(r, ["client-10", "client-2"], ["b", "a"]) for r in range(4)]
    rows[3]["evaluation"] = None
    rows[0]["evaluation"]["total"] = score(15, 148, 2.5)
    rows[2]["evaluation"]["total"] = score(81, 263, 1.25)
    summary = summarise(rows)
    assert [(line.group, line.name) for line in summary] == [
        ("total", "all"),
        ("category", "a"),
        ("category", "b"),
        ("client", "client-2"),
        ("client", "client-10"),
    ]
    total = summary[0]
    assert total.untouched == Measure(148, 15, 2.5) and total.federated == Measure(263, 81, 1.25)
    assert total.federated.interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert total.change == pytest.approx(81 / 263 - 15 / 148)
    for line, key in ((summary[1], "by_category"), (summary[3], "by_client")):
        for measure, server_round in ((line.untouched, 0), (line.federated, 2)):
            wanted = rows[server_round]["evaluation"][key][line.name]
            assert (measure.num_exact, measure.loss) == (wanted["num_exact"], wanted["loss"])


def test_summarise_leaves_open_what_was_not_evaluated():
    rows = [row(0, ["a"], ["x"]), row(1, ["b"], ["x"])]
    rows[1]["evaluation"]["by_category"]["x"] = score(0, 0, math.nan)
    by_name = {line.name: line for line in summarise(rows)}
    assert by_name["a"].untouched and not by_name["a"].federated
    assert by_name["b"].federated and not by_name["b"].untouched
    assert by_name["x"].federated is None and by_name["x"].change is None

    rows[0]["evaluation"] = rows[1]["evaluation"] = None
    assert [(line.untouched, line.federated) for line in summarise(rows)] == [(None, None)]
    assert summarise(rows[:1])[0].federated is None


def test_natural_order():
    names = ["client-10", "client-2", "10", "9", "", "client"]
    assert sorted(names, key=natural_order) == ["", "9", "10", "client", "client-2", "client-10"]
