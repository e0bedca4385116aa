"""The end of a run names every absent client: how often, with how much data, and why."""

from rich.console import Console

from fedmomentum.cli.tables import MAX_ABSENCES, absence_lines
from fedmomentum.report import write_report
from fedmomentum.results.participation import find_absences
from fedmomentum.results.run_results import RunResults
from tests.report.folders import records, row, write_run

CLIENTS = ["north", "south", "west"]
TOO_LARGE = "its update has norm 9, ... (federation.outlier-norm-ratio)"
PARTITION = {
    "north": {"train": {"a": 90, "b": 6}, "test": {"a": 50}},
    "south": {"train": {"a": 3}},
    "west": {"train": {"b": 1}},
}


def rows(*failures):
    return [
        row(0, CLIENTS, ["a"]),
        *(row(i, CLIENTS, ["a"], failures=f) for i, f in enumerate(failures, start=1)),
    ]


def test_the_most_absent_clients_come_first_with_the_last_reason():
    found = find_absences(
        records(
            rows(
                {"north": TOO_LARGE, "south": "no answer"},
                {"north": TOO_LARGE},
                {"north": "its disk is full"},
            )
        ),
        PARTITION,
    )
    north, south = found
    assert (north.client, north.num_sampled, north.num_missing, north.num_too_large) == (
        "north",
        3,
        3,
        2,
    )
    assert (
        north.data_fraction == 0.96
        and north.is_total
        and (north.last_round, north.reason) == (3, "its disk is full")
    )
    assert north.headline == (
        "north (96.0\u00a0% of all training examples) was left out of 3 of 3 rounds, 2 times for "
        "the size of its "
        "update: nothing of its data is in the model"
    )
    assert (south.num_missing, south.num_too_large, south.is_total, south.last_round) == (
        1,
        0,
        False,
        1,
    )
    assert (
        south.headline
        == "south (3.0\u00a0% of all training examples) was left out of 1 of 3 rounds"
    )


def test_no_client_is_named_where_all_took_part_or_only_an_evaluation_failed():
    every = rows({}, {})
    every[2]["failures"] = {"north": "evaluation: no answer"}
    assert find_absences(records(every), PARTITION) == []


def test_rounds_for_which_a_client_was_not_drawn_do_not_count():
    drawn = rows({"north": TOO_LARGE}, {})
    drawn[2]["participants"] = drawn[2]["accepted"] = ["south", "west"]
    (north,) = find_absences(records(drawn), {})
    assert (north.num_sampled, north.num_missing, north.data_fraction) == (1, 1, None)
    assert north.headline.startswith("north was left out of 1 of 1 round, once for the size")


def test_terminal_and_page_report_absences(tmp_path):
    folder = write_run(
        tmp_path / "run", rows({"north": TOO_LARGE}, {"north": TOO_LARGE}), clients=CLIENTS
    )
    console = Console(record=True, width=400)
    for line in absence_lines(RunResults.load(folder)):
        console.print(line)
    output = console.export_text()
    page = write_report(folder).read_text()
    for text in (output, page):
        assert "was left out of 2 of 2 rounds, 2 times for the size of its update" in text.replace(
            "&#39;", "'"
        )
        assert TOO_LARGE in text


def test_of_many_the_terminal_names_those_missing_most(tmp_path):
    names = [f"site{i}" for i in range(40)]
    every = [row(i, names, ["a"], failures=dict.fromkeys(names[1:], "gone")) for i in range(3)]
    lines = absence_lines(RunResults.load(write_run(tmp_path / "run", every, clients=names)))
    assert len(lines) == MAX_ABSENCES + 1
    assert lines[-1].plain == f"... and {39 - MAX_ABSENCES} more clients, in the report"


def test_a_page_without_absences_has_no_warning(tmp_path):
    assert (
        "Not all clients"
        not in write_report(write_run(tmp_path / "run", rows({}), clients=CLIENTS)).read_text()
    )
