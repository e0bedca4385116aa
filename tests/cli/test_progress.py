"""What the terminal shows during a run and at its end."""

import io
from types import SimpleNamespace

from rich.console import Console

from fedmomentum.cli.progress import RunView
from fedmomentum.cli.tables import summary_table
from fedmomentum.formats.round_record import EvaluationRecord, RoundRecord
from fedmomentum.formats.scores import Score


def evaluated(server_round, exact):
    """A record in which category i has `exact[i]` of 10 examples right."""
    scores = {f"c{i:02}": Score(10.0, 10, 10, n) for i, n in enumerate(exact)}
    size = 10 * len(exact)
    total = Score(float(size), size, size, sum(exact))
    evaluation = EvaluationRecord(total=total, by_category=scores, by_client={"a": total})
    return RoundRecord(round=server_round, evaluation=evaluation)


def shown(gains):
    rows = [evaluated(0, [0] * len(gains)), evaluated(1, gains)]
    return list(summary_table(SimpleNamespace(rounds=rows)).columns[0].cells)


def test_of_many_categories_the_losers_and_the_winners_are_shown():
    names = [str(cell) for cell in shown([n % 10 for n in range(40)])]
    assert len(names) == 1 + 13 + 1
    losers, omitted, winners = names[1:7], names[7], names[8:14]
    assert {int(name[1:]) % 10 for name in losers} == {0, 1} and "28 more" in omitted
    assert {int(name[1:]) % 10 for name in winners} == {8, 9}


def test_few_categories_are_all_shown_in_their_order():
    assert [str(cell) for cell in shown([5, 1, 9])] == ["all", "c00", "c01", "c02", "a"]


def test_clients_that_train_at_the_same_time_share_a_bar():
    view = RunView(Console(file=io.StringIO()), 2)

    def bar():
        task = view._progress.tasks[view._step_bar]
        return task.description.strip(), task.completed, task.total

    view.on_step("north", 1, 4, 0.5)
    assert bar() == ("north", 1, 4)
    view.on_step("south", 2, 6, 0.5)
    assert bar() == ("north, south", 3, 10)
    view.on_step("north", 4, 4, 0.5)
    assert bar() == ("north, south", 6, 10)
    view.on_step("south", 3, 6, 0.5)
    assert bar() == ("south", 3, 6)
    view.on_round_begin(2, ["north", "south"])  # south has failed
    view.on_step("north", 1, 4, 0.5)
    assert bar() == ("north", 1, 4)
