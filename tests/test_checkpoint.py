"""A crash at any moment loses no finished round: every step of the writer, before and after."""

import json
import os

import pytest

from fedmomentum import files
from fedmomentum.errors import ModelError
from fedmomentum.folders import kept_rounds, round_file
from fedmomentum.global_model import GlobalModel
from fedmomentum.run import prepare
from tests.runs import chain, nudge, objects, start, timeless, tiny_config


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
            if self.steps == self.at and name == "write":  # half of it reached the disk
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
def whole(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    start(config, out)
    return out


def test_every_crash_point_of_the_writer(config, whole, tmp_path, monkeypatch):
    """One prepared run serves all: its clients and model keep nothing that the folder does not say."""
    run = prepare(config, tmp_path / "prepared")
    run.close()
    for client in run.clients:
        client.function = nudge
    from fedmomentum.checkpoint import RunFolder, ServerState

    def attempt(out):
        run.folder = RunFolder(out, keep=config.run.keep_rounds)
        for client in run.clients:
            client.store = out
        run.local._blobs.clear()
        resumed = run.folder.resume()
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
    wanted = chain(whole), timeless(whole), objects(whole)
    assert (chain(tmp_path / "count"), timeless(tmp_path / "count"), objects(tmp_path / "count")) == wanted
    for at in range(1, total.steps + 1):
        for after in (False, True):
            out = tmp_path / f"crash-{at}-{after}"
            monkeypatch.setattr(files, "os", CrashingOs(at, after))
            with pytest.raises(Crash):
                attempt(out)
            monkeypatch.setattr(files, "os", os)
            rounds = kept_rounds(out)
            for server_round in rounds:  # whatever is committed is whole
                GlobalModel.load(out, server_round)
            attempt(out)
            assert (chain(out), timeless(out), objects(out)) == wanted, (at, after)
            assert not list(out.rglob("*.tmp"))


def test_crashes_while_old_rounds_are_deleted(config, whole, tmp_path, monkeypatch):
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
        assert (chain(out), timeless(out), objects(out)) == (chain(whole), timeless(whole), objects(whole))


def test_the_last_rounds_and_the_best_are_kept_and_nothing_else(whole):

    best = json.loads((whole / "rounds" / "0002.json").read_text())["run"]["best_round"]
    assert kept_rounds(whole) == sorted({1, 2, best})
    assert GlobalModel.load(whole, "best").server_round == best
    assert GlobalModel.load(whole).server_round == 2
    named, models = set(), set()
    for server_round in kept_rounds(whole):
        models |= set(GlobalModel.load(whole, server_round).objects())
        named |= json.loads(round_file(whole, server_round).read_text())["sizes"].keys()
    assert {f"{name}.safetensors" for name in named} == objects(whole)
    start = set(json.loads(round_file(whole, 1).read_text())["run"]["started_from"])
    assert named - models == start - models  # so that the older round can be gone on from too
    with pytest.raises(ModelError, match=r"keeps the rounds .* round 1 is not|keeps the rounds"):
        GlobalModel.load(whole, 99)


def test_a_damaged_metrics_file_is_refused_rather_than_continued(config, tmp_path):
    out = tmp_path / "run"
    start(config, out)
    rows = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([rows[0], *rows[2:]]) + "\n")
    with pytest.raises(ModelError, match="metrics.jsonl has 2 rows, and 3 were committed"):
        prepare(config, out, resume=True)
