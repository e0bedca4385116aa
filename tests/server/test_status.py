"""`StatusWriter`: it never disturbs the run, whatever happens to its file."""

import math

from fedmomentum.formats.status_file import STATUS_FILE, read_status
from fedmomentum.server.status import StatusWriter


def test_a_file_that_cannot_be_written_is_reported_once_and_the_run_continues(tmp_path, caplog):
    (tmp_path / STATUS_FILE).mkdir()
    status = StatusWriter(tmp_path, 3)
    status.on_round_begin(1, ["north"])
    status.on_round_begin(2, ["north"])
    assert caplog.text.count("cannot be written") == 1
    (tmp_path / STATUS_FILE).rmdir()
    status.on_round_begin(3, ["north"])
    assert read_status(tmp_path).round == 3


def test_a_loss_that_is_not_a_number_becomes_none(tmp_path):
    status = StatusWriter(tmp_path, 3, networked=False)
    status.on_step("north", 1, 2, math.nan)
    read = read_status(tmp_path).clients["north"]
    assert read.loss is None and (read.step, read.num_steps, read.state) == (1, 2, "asked")


def test_frequent_events_are_written_once_a_second(tmp_path):
    status = StatusWriter(tmp_path, 3, networked=False)
    for step in range(1, 2000):
        status.on_step("north", step, 10_000, 1.0)
    assert read_status(tmp_path).clients["north"].step < 1999
    status._written_at -= 2.0
    status.on_step("north", 2000, 10_000, 1.0)
    assert read_status(tmp_path).clients["north"].step == 2000


def test_a_new_round_clears_the_tasks_of_the_previous_one(tmp_path):
    status = StatusWriter(tmp_path, 3)
    status.on_task_sent("north", 10, 60.0)
    status.on_failure("south", "hung up")
    status.on_round_begin(2, ["north", "south"])
    read = read_status(tmp_path)
    assert [(one.state, one.until, one.reason) for one in read.clients.values()] == 2 * [
        ("idle", None, None)
    ]
    assert read.participants == ["north", "south"] and read.clients["north"].down_bytes == 10


def test_once_a_task_is_sent_no_client_is_waited_for(tmp_path):
    status = StatusWriter(tmp_path, 3)
    status.on_waiting(["south"], 60.0)
    assert read_status(tmp_path).waiting_for == ["south"]
    status.on_task_sent("north", 10, 60.0)
    assert read_status(tmp_path).waiting_for == [] and read_status(tmp_path).waits_until is None
