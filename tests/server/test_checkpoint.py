"""A crash at any moment loses no finished round: every step of the writer, before and after."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from fedmomentum.config.toml import to_toml
from fedmomentum.errors import ConfigError, DataError, ModelError
from fedmomentum.formats.directories import retained_rounds, round_file
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import object_file
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.results.run_results import RunResults
from fedmomentum.server.checkpoint import RunDirectory
from fedmomentum.utils import io as files
from tests.runs import chain, nudge, objects, prepare, rewritten, start, timeless, tiny_config


class Crash(BaseException):
    """The process ends here; no handler of the package may catch it."""


class CrashingOs:
    """`os`, which ends the process before or after its n-th durable step."""

    def __init__(self, at: int, after: bool) -> None:
        self.steps, self.at, self.after = 0, at, after

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("open", "write", "fsync", "replace"):
            return real

        def step(*args, **kwargs):
            self.steps += 1
            if self.steps == self.at and not self.after:
                raise Crash
            if self.steps == self.at and name == "write":  # only half of it reached the disk
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise Crash
            result = real(*args, **kwargs)
            if self.steps == self.at:
                raise Crash
            return result

        return step


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(
        tmp_path_factory.mktemp("data"),
        federation={"num_rounds": 2},
        evaluation={"num_examples": 1, "final_num_examples": 1},
    )


@pytest.fixture(scope="module")
def finished_run(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    start(config, out)
    return out


@pytest.mark.parametrize(
    "moments",
    [
        # The two rounds take the same steps: of every other one, before or after it.
        "some",
        pytest.param("all", marks=pytest.mark.long),
    ],
)
def test_every_crash_point_of_the_writer(config, finished_run, tmp_path, monkeypatch, moments):
    """One prepared run serves all: its clients and model keep nothing that the folder does not say."""
    run = prepare(config, tmp_path / "prepared")
    run.close()
    for client in run.clients:
        client.training_function = nudge
    from fedmomentum.server.checkpoint import RunDirectory
    from fedmomentum.server.state import ServerState

    def attempt(out):
        run.directory = RunDirectory(out, keep=config.run.keep_checkpoints)
        for client in run.clients:
            client.store.directory = out
            client.store.cache.clear()
        resumed = run.directory.resume()
        run.model, run.state = resumed or (prepared_model, ServerState("0" * 32))
        try:
            return run.start(lambda event, facts: None)
        finally:
            run.close()

    prepared_model = run.model
    total = CrashingOs(at=-1, after=False)
    monkeypatch.setattr(files, "os", total)
    attempt(tmp_path / "count")
    assert total.steps > 50
    monkeypatch.setattr(files, "os", os)
    wanted = chain(finished_run), timeless(finished_run), objects(finished_run)
    assert (
        chain(tmp_path / "count"),
        timeless(tmp_path / "count"),
        objects(tmp_path / "count"),
    ) == wanted
    for at in range(1, total.steps + 1, 1 if moments == "all" else 2):
        for after in (False, True) if moments == "all" else (at % 4 == 1,):
            out = tmp_path / f"crash-{at}-{after}"
            monkeypatch.setattr(files, "os", CrashingOs(at, after))
            with pytest.raises(Crash):
                attempt(out)
            monkeypatch.setattr(files, "os", os)
            rounds = retained_rounds(out)
            for server_round in rounds:  # whatever is committed is whole
                GlobalModel.load(out, server_round)
            attempt(out)
            assert (chain(out), timeless(out), objects(out)) == wanted, (at, after)
            assert not list(out.rglob("*.tmp"))


def test_crashes_while_old_rounds_are_deleted(config, finished_run, tmp_path, monkeypatch):
    from pathlib import Path

    real = Path.unlink
    count = {"left": -1}

    def unlink(self, *args, **kwargs):
        if self.suffix in (".json", ".safetensors"):
            count["left"] -= 1
            if count["left"] == 0:
                raise Crash
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", unlink)
    for at in range(1, 8):
        out = tmp_path / f"unlink-{at}"
        count["left"] = at
        try:
            start(config, out)
        except Crash:
            count["left"] = -1
            start(config, out, resume=True)
        assert (chain(out), timeless(out), objects(out)) == (
            chain(finished_run),
            timeless(finished_run),
            objects(finished_run),
        )


def test_the_last_rounds_and_the_best_are_kept_and_nothing_else(finished_run):

    best = json.loads((finished_run / "rounds" / "0002.json").read_text())["run"]["best_round"]
    assert retained_rounds(finished_run) == sorted({1, 2, best})
    assert GlobalModel.load(finished_run, "best").server_round == best
    assert GlobalModel.load(finished_run).server_round == 2
    named, models = set(), set()
    for server_round in retained_rounds(finished_run):
        models |= set(GlobalModel.load(finished_run, server_round).objects())
        named |= json.loads(round_file(finished_run, server_round).read_text())["sizes"].keys()
    assert {f"{name}.safetensors" for name in named} == objects(finished_run)
    start = set(json.loads(round_file(finished_run, 1).read_text())["run"]["started_from"])
    assert named - models == start - models  # so that the older round can be resumed from too
    with pytest.raises(ModelError, match=r"keeps the rounds .* round 1 is not|keeps the rounds"):
        GlobalModel.load(finished_run, 99)


def test_a_damaged_metrics_file_is_refused_rather_than_continued(config, tmp_path):
    out = tmp_path / "run"
    start(config, out)
    rows = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([rows[0], *rows[2:]]) + "\n")
    with pytest.raises(ModelError, match="metrics.jsonl has 2 rows, and 3 were committed"):
        prepare(config, out, resume=True)


# ── damage ──


def copied(finished_run, out):
    shutil.copytree(finished_run, out)
    return out


def resumed(out, server_round=None):
    """What a run would resume from."""
    folder = RunDirectory(out, keep=9)
    try:
        return folder.resume(server_round), list(folder.records)
    finally:
        folder.close()


def refused(out, match):
    with pytest.raises(ModelError, match=match):
        resumed(out)


def test_a_damaged_last_round_is_refused_and_an_older_one_is_resumed_on_request(
    config, finished_run, tmp_path
):
    out = copied(finished_run, tmp_path / "run")
    file = round_file(out, 2)
    manifest = json.loads(file.read_text())
    scalings = {module: 2 * scaling for module, scaling in manifest["scalings"].items()}
    file.write_text(json.dumps({**manifest, "scalings": scalings}))
    refused(
        out,
        "0002.json was damaged or altered since it was written.*resume from round 1, which is "
        "whole, with --round",
    )
    for load in (
        lambda: GlobalModel.load(out),
        lambda: GlobalModel.load(out, "best"),
        lambda: RunResults.load(out),
    ):
        with pytest.raises(ModelError, match="0002.json was damaged or altered"):
            load()
    with pytest.raises(ModelError, match="or use round 1, which is undamaged: --round 1"):
        GlobalModel.load(out)
    assert GlobalModel.load(out, 1).version == GlobalModel.load(finished_run, 1).version
    with pytest.raises(ModelError, match="keeps the rounds .*; round 7 is not among them"):
        resumed(out, 7)
    # another run's settings, or data, delete nothing
    other = replace(config, training=replace(config.training, learning_rate=0.5))
    with pytest.raises(ConfigError, match="these differ: training.learning-rate"):
        prepare(other, out, resume=True, server_round=1)
    assert retained_rounds(out) == retained_rounds(finished_run)
    start(config, out, resume=True, server_round=1)
    assert (chain(out), timeless(out), objects(out)) == (
        chain(finished_run),
        timeless(finished_run),
        objects(finished_run),
    )


def test_a_missing_checkpoint_is_detected(config, finished_run, tmp_path):
    out = copied(finished_run, tmp_path / "run")
    round_file(out, 2).unlink()
    message = (
        "finished round 2, but .*0002.json is missing. Restore it from a copy, or give --round 1"
    )
    refused(out, message)
    for load in (lambda: GlobalModel.load(out), lambda: RunResults.load(out)):
        with pytest.raises(ModelError, match=message):
            load()
    assert GlobalModel.load(out, 1).server_round == 1
    (
        out / ".committed"
    ).unlink()  # a copy without hidden files: the run as it was just before the commit
    (model, _), _ = resumed(out)
    assert model.server_round == 1
    round_file(out, 1).unlink()
    kept = retained_rounds(out)
    if kept:
        round_file(out, kept[0]).unlink()
    refused(out, "metrics.jsonl has 3 rows, and there is no checkpoint")


def test_a_renamed_or_copied_checkpoint_is_not_another_rounds(finished_run, tmp_path):
    out = copied(finished_run, tmp_path / "run")
    shutil.copy(round_file(out, 2), round_file(out, 3))
    refused(out, "0003.json holds round 2, not the checkpoint of round 3")
    round_file(out, 3).unlink()
    shutil.copy(round_file(out, 1), out / "global_model.json")
    with pytest.raises(ModelError, match="holds a run .* and a global model"):
        GlobalModel.load(out)


@pytest.mark.parametrize("kind", ["started_from", "merged"])
def test_an_object_that_only_diagnostics_read_is_checked_too(finished_run, tmp_path, kind):
    out = copied(finished_run, tmp_path / "run")
    name = json.loads(round_file(out, 2).read_text())["run"][kind][0]
    file = object_file(out, name)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(out, f"{name}.safetensors does not match its hash")
    file.unlink()
    refused(out, "does not hold the object")


@pytest.mark.parametrize("server_round", [0, 1, 2])
def test_an_altered_row_is_refused(finished_run, tmp_path, server_round):
    out = copied(finished_run, tmp_path / "run")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows[server_round]["seconds"]["train"] += 1e-9
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(
        out,
        "metrics.jsonl was damaged or altered: its first 3 rows are not those that were committed",
    )
    with pytest.raises(DataError, match="metrics.jsonl was damaged or altered.*Restore"):
        RunResults.load(out)


def test_settings_are_the_checkpoints_whatever_config_toml_says(config, finished_run, tmp_path):
    out = copied(finished_run, tmp_path / "run")
    other = replace(config, training=replace(config.training, learning_rate=0.5))
    more = replace(config, federation=replace(config.federation, num_rounds=9))
    (out / "config.toml").unlink()
    with pytest.raises(ConfigError, match="these differ: training.learning-rate"):
        prepare(other, out, resume=True)
    with pytest.raises(ModelError, match="holds a run already"):
        prepare(config, out)
    (out / "config.toml").write_text(to_toml(other))
    with pytest.raises(ConfigError, match="these differ: training.learning-rate"):
        prepare(other, out, resume=True)
    with pytest.raises(DataError, match="config.toml was altered .*: training.learning-rate"):
        RunResults.load(out)
    (out / "config.toml").write_text("# a remark\n" + to_toml(more))  # rounds may be added
    assert RunResults.load(out).rounds
    start(config, out, resume=True)
    assert (out / "config.toml").read_text() == to_toml(config)


def test_data_is_compared_with_the_checkpoint_also_without_its_record(
    config, finished_run, tmp_path
):
    out = copied(finished_run, tmp_path / "run")
    (out / "data.json").unlink()
    file = tmp_path / "other.jsonl"
    file.write_text(Path(config.data.client_files["site1"]).read_text().replace("ab", "cd"))
    other = replace(
        config,
        data=replace(config.data, client_files={**config.data.client_files, "site1": str(file)}),
    )
    with pytest.raises(DataError, match="was made with other data; it differs for site1"):
        prepare(other, out, resume=True)


def test_another_environment_is_reported_and_a_damaged_record_of_it_refused(
    config, finished_run, tmp_path, caplog
):
    out = copied(finished_run, tmp_path / "run")
    rewritten(out / "environment.json", lambda table: table.update(threads=77))
    start(config, out, resume=True)
    assert "resumed in another environment (threads differ)" in caplog.text
    (out / "environment.json").unlink()
    start(config, out, resume=True)
    assert "environment.json is missing" in caplog.text
    (out / "environment.json").write_text("{}")
    with pytest.raises(ModelError, match="environment.json.*or delete it"):
        start(config, out, resume=True)


def test_records_of_another_run_are_refused(config, finished_run, tmp_path):
    start(config, tmp_path / "other")
    out = copied(finished_run, tmp_path / "run")
    shutil.copy(tmp_path / "other" / "plan.json", out / "plan.json")
    with pytest.raises(DataError, match="files of several runs"):
        RunResults.load(out)


def test_an_older_checkpoint_that_is_damaged_is_named_as_not_needed(finished_run, tmp_path):
    out = copied(finished_run, tmp_path / "run")
    round_file(out, 1).write_text("{}")
    refused(out, "0001.json .*is not a fedmomentum global model")
    manifest = json.loads(round_file(finished_run, 1).read_text())
    round_file(out, 1).write_text(json.dumps({**manifest, "method": "other"}))
    refused(
        out, "0001.json was damaged.*not needed to continue: restore it from a copy, or delete it"
    )
    round_file(out, 1).unlink()
    (model, _), _ = resumed(out)
    assert model.server_round == 2


@pytest.mark.parametrize("part", ["rounds", "objects", "updates", ".lock"])
def test_a_file_where_a_folder_should_be_and_the_other_way_round(finished_run, tmp_path, part):
    out = copied(finished_run, tmp_path / "run")
    if (out / part).is_dir():
        shutil.rmtree(out / part)
        (out / part).write_text("")
    elif part == ".lock":
        (out / part).unlink()
        (out / part).mkdir()
    else:
        (out / part).write_text("")
    with pytest.raises(ModelError, match=re.escape(part)):
        RunDirectory(out)


def test_nothing_that_is_not_finite_is_committed(finished_run, tmp_path):
    out = copied(finished_run, tmp_path / "run")
    folder = RunDirectory(out, keep=2)
    model, state = folder.resume()
    record = msgspec.structs.replace(folder.records[-1], round=3)
    before = sorted(path for path in out.rglob("*"))
    with pytest.raises(ModelError, match="the metrics of round 3 hold a number that is not finite"):
        broken_record = msgspec.structs.replace(record, train_loss=float("nan"))
        folder.commit(replace(model, server_round=3), state, broken_record)
    module, matrix = next(iter(model.adapter.modules.items()))
    broken = LowRank(matrix.B * float("inf"), matrix.A)
    adapter = replace(model.adapter, modules={**model.adapter.modules, module: broken})
    with pytest.raises(
        ModelError, match=f"round 3 is not committed: .*{module}.lora_B.weight holds NaN or Inf"
    ):
        folder.commit(replace(model, server_round=3, adapter=adapter), state, record)
    assert sorted(path for path in out.rglob("*")) == before
    folder.close()
