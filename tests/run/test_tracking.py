"""Rows in trackers: what TensorBoard reads back is what `metrics.jsonl` says, once a round, whatever happens."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from accelerate import tracking as accelerate_tracking
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedmomentum.errors import ConfigError
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.compare import execute_run, plan_runs
from fedmomentum.run.method_variants import parse_methods
from fedmomentum.run.networked import run_federation
from fedmomentum.run.tracking import numbers_of
from tests.runs import prepare, start, timeless, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def config_of(folder, *trackers, **federation):
    config = tiny_config(folder, federation={"num_rounds": 2, **federation})
    return replace(config, run=replace(config.run, report_to=list(trackers)))


def read_back(out) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(out / "trackers" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def wanted(out) -> dict[str, list[tuple[int, float]]]:
    """Every number of `metrics.jsonl`, in TensorBoard's float32."""
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in numbers_of(row).items():
            found.setdefault(name, []).append(
                (row["round"], torch.tensor(value, dtype=torch.float32).item())
            )
    return found


def test_tensorboard_holds_every_number_of_the_rows_after_a_kill_and_a_resume_too(folder, tmp_path):
    out, config = tmp_path / "run", config_of(folder, "tensorboard", num_rounds=3)

    def stop(event, facts):
        if event == "row" and facts["round"] == 1:  # committed, and not yet reported
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(config, out, observer=stop)
    assert json.loads((out / "trackers" / "reported.json").read_text())["rounds"] == {
        "tensorboard": 0
    }
    start(config, out, resume=True)
    got = read_back(out)
    assert got == wanted(out)
    assert [step for step, _ in got["evaluation/total/loss"]] == [0, 1, 2, 3]
    for name in (
        "train_loss",
        "evaluation/total/exact_match",
        "evaluation/by_category/ab/exact_match",
        "retained_energy",
        "residual_rank",
        "residual_norm",
        "exactness_error",
        "applied_share",
        "diagnostics/update_cosine",
        "uplink_bytes/site0",
        "downlink_bytes/site0",
        "seconds/train",
        "clients/site0/loss",
        "evaluation/total/perplexity",
    ):
        assert name in got, name
    start(config, out, resume=True)
    assert read_back(out) == wanted(out)


def test_reporting_changes_no_bit_and_can_begin_with_a_resume(folder, tmp_path):
    start(config_of(folder), tmp_path / "without")
    assert not (tmp_path / "without" / "trackers").exists()
    start(config_of(folder, "tensorboard"), tmp_path / "with")
    assert timeless(tmp_path / "with") == timeless(tmp_path / "without")
    start(config_of(folder, num_rounds=1), tmp_path / "later")
    start(config_of(folder, "tensorboard"), tmp_path / "later", resume=True)
    assert read_back(tmp_path / "later") == wanted(tmp_path / "later")


def test_served_runs_and_cells_of_a_comparison_report_to_trackers_too(folder, tmp_path):
    config = config_of(folder, "tensorboard")
    parties = {
        name: prepare_client(config_of(folder), name, tmp_path / name)
        for name in config.data.client_files
    }
    steps = {name: client.handle for name, client in parties.items()}
    run_federation(InProcessTransport(steps), config, tmp_path / "served")
    (cell,) = plan_runs(config, parse_methods("fedit", config), [1], tmp_path / "compared")
    execute_run(cell)
    for out in (tmp_path / "served", cell.directory):
        assert read_back(out) == wanted(out)


class Failing(GeneralTracker):
    """Takes one row, then loses its network."""

    name = "failing"
    requires_logging_directory = False
    num_logged = 0

    def __init__(self, run_name):
        super().__init__()

    tracker = None

    def log(self, values, step=None, **_):
        Failing.num_logged += 1
        if step == 1:
            raise ConnectionError("no route to host")


def test_a_tracker_that_fails_is_dropped_with_one_warning(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "failing", Failing)
    monkeypatch.setattr(
        accelerate_tracking,
        "_available_trackers",
        [*accelerate_tracking._available_trackers, "failing"],
    )
    with caplog.at_level(logging.WARNING, "fedmomentum"):
        start(config_of(folder, "failing", "tensorboard"), tmp_path / "run")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "failing is not reported to from here on: ConnectionError: no route to host"
    ]
    assert Failing.num_logged == 2 and read_back(tmp_path / "run") == wanted(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", "run.report-to names 'tensorbord'; known: .*tensorboard"),
        (
            "mlflow",
            "run.report-to names mlflow, which is not installed; install it: pip install mlflow",
        ),
    ],
)
def test_an_unavailable_tracker_is_refused_before_anything_is_loaded(folder, tmp_path, name, words):
    config = config_of(folder, name)
    missing = replace(config, model=replace(config.model, name="/no/model"))
    with pytest.raises(ConfigError, match=words):
        prepare(missing, tmp_path / "run")
    with pytest.raises(ConfigError, match=words):
        run_federation(InProcessTransport({}), missing, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_are_valid_for_every_tracker():
    row = {
        "round": 3,
        "is_best": True,
        "train_loss": None,
        "evaluation": {"by_category": {"R&D (all)": {"loss": 2}}},
    }
    assert numbers_of(row) == {"evaluation/by_category/R_D _all_/loss": 2}
