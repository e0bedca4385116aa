"""`python benchmarks` runs every script, and says of all of them what was met and what failed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
WRITES = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from common import Target, write_json
write_json(sys.argv[2], targets=[Target.at_least("speed", 2, 3.0), Target.at_most("error", 1, float("nan"))], rows=[7])
"""


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("benchmarks_main", BENCHMARKS / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("common", None)


def test_every_benchmark_is_run_and_writes_what_is_asked(runner):
    helpers = {"__main__", "common", "plots"}
    assert {file.stem for file in BENCHMARKS.glob("*.py")} - helpers == set(runner.SCRIPTS)
    for script in runner.SCRIPTS.values():
        text = script.read_text()
        assert '"--json"' in text and ("print_targets(" in text or "finish(" in text), script


def test_one_that_fails_is_named_and_the_others_run(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "machine_limits", lambda: sys.modules["common"].Limits(1.0, 1.0, 1.0, 1.0))
    scripts = {"broken": tmp_path / "broken.py", "silent": tmp_path / "silent.py", "good": tmp_path / "good.py"}
    scripts["broken"].write_text("raise SystemExit(3)")
    scripts["silent"].write_text("")
    scripts["good"].write_text(WRITES.format(folder=str(BENCHMARKS)))
    console = Console(record=True, width=150)
    assert runner.run_all(scripts, tmp_path / "bench", console) == ["broken", "silent"]
    told = console.export_text()
    assert "broken failed" in told and "silent failed" in told and "1 of 2 targets met" in told
    written = json.loads((tmp_path / "bench" / "all.json").read_text())
    assert [(t["benchmark"], t["name"], t["met"]) for t in written["targets"]] == [
        ("good", "speed", True), ("good", "error", False),
    ]  # fmt: skip
    assert written["failed"] == ["broken", "silent"] and written["benchmarks"]["good"]["rows"] == [7]
    assert written["limits"]["float32"] > 0 and written["seconds"].keys() == scripts.keys()
