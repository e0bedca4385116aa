"""`python benchmarks` runs every script, and reports which targets were met and what failed."""

import contextlib
import gc
import importlib
import importlib.util
import io
import json
import math
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaModel

from fedmomentum.aggregation.registry import METHODS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
WRITES = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {folder!r})
from common import Target, write_json
targets = [Target.at_least("speed", 2, 3.0), Target.at_most("error", 1, float("nan"))]
write_json(sys.argv[2], targets=targets, rows=[7])
"""


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("benchmarks_main", BENCHMARKS / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("common", None)


def test_every_benchmark_is_run_and_writes_the_requested_files(runner):
    helpers = {
        "__main__",
        "common",
        "plots",
        "gpu_aggregation",
        "gpu_merged",
        "gpu_models",
        "gpu_plan",
        "gpu_rounds",
        "gpu_tables",
        "gpu_training",
    }
    assert {file.stem for file in BENCHMARKS.glob("*.py")} - helpers == set(runner.SCRIPTS)
    for script in runner.SCRIPTS.values():
        text = script.read_text()
        assert '"--json"' in text and ("print_targets(" in text or "finish(" in text), script


def test_one_that_fails_is_named_and_the_others_run(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(
        runner, "machine_limits", lambda: sys.modules["common"].Limits(1.0, 1.0, 1.0, 1.0)
    )
    scripts = {
        "broken": tmp_path / "broken.py",
        "silent": tmp_path / "silent.py",
        "good": tmp_path / "good.py",
    }
    scripts["broken"].write_text("raise SystemExit(3)")
    scripts["silent"].write_text("")
    scripts["good"].write_text(WRITES.format(folder=str(BENCHMARKS)))
    console = Console(record=True, width=150)
    assert runner.run_all(scripts, tmp_path / "bench", console) == ["broken", "silent"]
    output = console.export_text()
    assert (
        "broken failed" in output and "silent failed" in output and "1 of 2 targets met" in output
    )
    written = json.loads((tmp_path / "bench" / "all.json").read_text())
    assert [(t["benchmark"], t["name"], t["met"]) for t in written["targets"]] == [
        ("good", "speed", True),
        ("good", "error", False),
    ]
    assert written["failed"] == ["broken", "silent"] and written["benchmarks"]["good"]["rows"] == [
        7
    ]
    assert written["limits"]["float32"] > 0 and written["seconds"].keys() == scripts.keys()


def test_the_gpu_is_measured_where_there_is_one(runner, monkeypatch):
    others = [name for name in runner.NAMES if name != "gpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.default_names() == others
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runner.default_names() == [*others, "gpu"]


@pytest.fixture(scope="module")
def gpu_trial(tmp_path_factory):
    """What `gpu.py --tiny` writes and prints on this machine's CPU, and what it renders of that.

    In this process: to import the libraries once more would take longer than all of its parts.
    """
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    threads = torch.get_num_threads()
    patched = pytest.MonkeyPatch.context()
    with patched as patch, warnings.catch_warnings(), torch.random.fork_rng([]):
        patch.setenv("COLUMNS", "150")
        patch.setenv("FEDMOMENTUM_CACHE", "")  # the script sets it; afterwards it is as it was
        patch.syspath_prepend(BENCHMARKS)
        torch.set_num_threads(1)
        gpu = importlib.import_module("gpu")

        def run(*options: str) -> str:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                assert gpu.main(options) == 0
            return printed.getvalue()

        try:
            printed = run("--tiny", "--device", "cpu", "--json", str(file))
            return json.loads(file.read_text()), printed, run("--render", str(file))
        finally:
            gc.unfreeze()
            torch.set_num_threads(threads)
            forget_scripts()


def forget_scripts() -> None:
    """Make scripts of the folder be imported again."""
    for name, module in list(sys.modules.items()):
        if str(BENCHMARKS) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


def test_the_gpu_benchmark_runs_on_a_cpu_and_reports_what_is_valid_there(gpu_trial):
    measured, _, _ = gpu_trial
    held = {(row["dtype"], row["holding"]) for row in measured["rounds"]["rows"]}
    assert held == {("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "as-loaded")}
    assert measured["failed"] == {} and measured["skipped"] == {} and measured["tiny"]
    assert measured["environment"]["device"]["name"] == "cpu"
    for row in measured["rounds"]["rows"]:
        # something was trained and merged, and all of it arrives: in probes, in forwards and in
        # both exports
        in_float32 = row["holding"] == "float32"
        assert row["exactness_error"] < (1e-6 if in_float32 else 0.05)
        assert row["applied_share"] == pytest.approx(1, abs=1e-4 if in_float32 else 0.01)
        assert row["forward_share"] == pytest.approx(
            1, abs=1e-5 if row["dtype"] == "float32" else 0.02
        )
        assert (
            row["change"] > 0.01 and max(row["merged_difference"], row["adapter_difference"]) < 1e-5
        )
        assert row["live_difference"] < (1e-5 if row["dtype"] == "float32" else 0.05)
    shares = {
        (row["products"], row["residuals"]): row["share"] for row in measured["residuals"]["rows"]
    }
    assert all(shares["float32", count] == pytest.approx(1, abs=1e-3) for count in (1, 10, 50))
    assert shares["bfloat16 autocast", 1] < 0.5  # 16 bits let no more of one residual through
    assert shares["a branch added to bfloat16 outputs", 1] < 0.5  # in outputs as little
    beside = [shares["as loaded, with a branch", count] for count in (1, 10, 50)]
    assert beside == pytest.approx([1, 1, 1], abs=0.01)
    (size,) = measured["training"]
    assert [row["ratio"] for row in size["speed"]][0] == 1 and all(
        row["tokens_per_second"] > 0 for row in size["speed"]
    )
    assert size["client"]["rest"] is None  # a CPU's memory is not counted
    layer = 2 * (2 * 64 * 64 + 2 * 32 * 64) // 2 + 3 * 64 * 128
    assert (
        size["adapted"] == 2 * layer
        and size["parameters"] == 2 * (layer + 2 * 64) + 64 + 2 * 128 * 64
    )
    for task in (size["round"]["train_task"], size["round"]["evaluate_task"]):
        assert (
            0 < task["probes_share"] < 1
            and task["merging"] + task["training"] + task["probes"] < task["whole"]
        )


@pytest.mark.long
def test_the_gpu_benchmark_trains_a_4_bit_base_beside_qlora(importing, tmp_path):
    """The same codes and factors on both sides; what is merged lies beside the codes."""
    training, models = importing("gpu_training"), importing("gpu_models")
    size, device = models.TINY_SIZES["tiny-nf4"], torch.device("cpu")
    numbers, targets = training.measure_size(size, tmp_path, device, models.Budget(1000))
    assert numbers["size"] == "tiny, nf4" and numbers["planned"]["rest"] > 0
    assert all(row["tokens_per_second"] > 0 for row in numbers["speed"])
    assert numbers["round"]["evaluate_task"] is not None and targets
    plain = training.plain_peft(size, tmp_path, device)
    kinds = {type(module).__name__ for module in plain.modules()}
    assert "Linear4bit" in kinds


def test_the_gpu_benchmark_trains_with_gradient_checkpointing_on_both_sides(
    importing, tmp_path, monkeypatch
):
    training, models = importing("gpu_training"), importing("gpu_models")
    checkpointed = []
    forward = LlamaModel.forward

    def watched(self, *args, **kwargs):
        if self.training and torch.is_grad_enabled():
            checkpointed.append(self.layers[0].gradient_checkpointing)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    size, device = models.TINY_SIZES["tiny-long"], torch.device("cpu")
    numbers, _ = training.measure_size(size, tmp_path, device, models.Budget(1000))
    assert numbers["training"]["is_checkpointed"] and numbers["planned"]["training"] > 0
    assert len(checkpointed) > size.steps * size.repeats * len(numbers["speed"])
    assert all(checkpointed)


def test_the_gpu_benchmarks_aggregation_is_exact_and_scaled_by_the_modules_of_a_model(gpu_trial):
    measured = gpu_trial[0]["aggregation"]
    assert {row["path"] for row in measured["modules"]} <= {
        "iterated",
        "gram32",
        "gram64",
        "dense",
        "svd",
    }
    assert all(row["error"] < 1e-6 for row in measured["modules"])
    for row in measured["rounds"]:
        own_shapes = [
            one
            for one in measured["modules"]
            if (one["rank"], one["input"]) == (row["rank"], row["input"])
        ]
        assert sum(one["count"] for one in own_shapes) == 7
        for side in ("device", "cpu", "published"):
            assert row[side] == pytest.approx(
                32 * sum(one["count"] * one[side] for one in own_shapes)
            )
        assert row["whole"] > 0


def test_the_gpu_benchmark_renders_its_file_as_it_printed_it(gpu_trial):
    measured, printed, rendered = gpu_trial
    assert rendered.strip() in printed
    for row in measured["rounds"]["rows"]:
        assert (
            f"| {row['exactness_error']:.1e} | {row['applied_share']:.5f} | "
            f"{row['forward_share']:.5f} |" in rendered
        )
    for row in measured["training"][0]["speed"]:
        assert (
            f"| {row['side']} | {row['tokens_per_second']:.0f} | {row['ratio']:.3f} |" in rendered
        )
    for table in re.findall(r"(?:^\|.*\n)+", rendered, re.MULTILINE):
        assert len({line.count(" | ") for line in table.splitlines()}) == 1, table


@pytest.fixture
def importing(monkeypatch):
    """Import scripts of the folder by their names, for one test."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    forget_scripts()


def test_what_the_gpu_benchmark_leaves_out_or_fails_in_is_named(importing, monkeypatch, tmp_path):
    gpu, models = importing("gpu"), importing("gpu_models")
    asked = []

    def measure_size(size, folder, device, budget):
        asked.append(size.name)
        if size.name == "broken":
            raise RuntimeError("out of memory\nand so on")
        return {"size": size.name, "round": {"evaluate_task": None}}, []

    monkeypatch.setattr(gpu, "measure_size", measure_size)
    expected = {"good": 20.0, "broken": 30.0, "large": 5000.0}
    sizes = [replace(models.TINY, name=name, seconds=seconds) for name, seconds in expected.items()]
    report = gpu.Report(torch.device("cpu"), tmp_path / "gpu.json", tiny=True)
    gpu.run_sizes(torch.device("cpu"), sizes, models.Budget(1000), 60.0, report)
    report.keep()
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert asked == ["good", "broken"] and [one["size"] for one in written["training"]] == ["good"]
    assert written["failed"] == {"training, broken": "RuntimeError: out of memory"}
    (reason,) = written["skipped"].values()
    # as the first took no time, a size is expected to take eight tenths of its usual time, and 60 s
    # are reserved
    left = re.fullmatch(r"it would take about 4000 s, and (\d+) s were left for it", reason)
    assert left and 800 < int(left[1]) <= 940
    text = importing("gpu_tables").tables(written | {"training": []})
    assert f"Not measured: training, large: {reason}." in text
    assert "Failed: training, broken: RuntimeError: out of memory." in text


def test_what_the_gpu_benchmark_shares(importing):
    models, tables = importing("gpu_models"), importing("gpu_tables")
    with models.watch_memory(torch.device("cpu")) as grown:
        pass
    assert math.isnan(grown.peak) and tables.gibibytes(grown.peak) == tables.gibibytes(None) == "–"
    assert tables.gibibytes(3 * 2**29) == "1.50"
    sizes = [round(size.parameters() / 1e9, 2) for size in models.SIZES.values()]
    # as they are, in 4 bits, and the largest once more with long rows
    assert sizes == [*2 * [1.24, 3.21, 8.03], 8.03]
    before = torch.get_float32_matmul_precision()
    with models.float32_products("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


# ── the others, as far as they run in seconds ──


def test_the_timed_functions_of_a_job_exist_in_the_package_and_are_restored(importing):
    client = importing("client")
    stopwatch = client.Stopwatch(iter(range(100)).__next__)
    for purpose, functions in client.WATCHED.items():
        for function in functions:
            owners = client._owners(function)
            assert owners, function
            with stopwatch.watch(purpose, function):
                for owner in owners:
                    assert getattr(owner, function.__name__) is not function
            for owner in owners:
                assert getattr(owner, function.__name__) is function
    with pytest.raises(LookupError, match="no module or class of the package has"):
        stopwatch.watch("nothing", lambda: None).__enter__()


def test_nested_calls_of_watched_functions_are_counted_separately(importing):
    client = importing("client")
    ticks = iter([0, 10, 13, 20])  # outer begins, inner begins, inner ends, outer ends
    stopwatch = client.Stopwatch(ticks.__next__)
    stopwatch.num_calls = {"inner": 0, "outer": 0}
    inner = stopwatch._timed("inside", named("inner", lambda: 1))
    outer = stopwatch._timed("outside", named("outer", lambda: inner() + 1))
    assert outer() == 2
    assert stopwatch.seconds == {"inside": 3, "outside": 17}
    assert stopwatch.num_calls == {"inner": 1, "outer": 1}


def named(name, function):
    function.__qualname__ = name
    return function


@pytest.mark.parametrize("name", METHODS)
def test_encoded_bytes_are_close_to_the_counted_for_every_method(importing, name):
    up, down = importing("wire").encoded_over_counted(METHODS[name]())
    assert 1 < up < 1.05 and 1 < down < 1.05


def test_a_round_of_the_scale_benchmark_is_measured_in_all_its_parts(
    importing, monkeypatch, tmp_path
):
    scale = importing("scale")
    monkeypatch.setattr(scale, "LAYER", {"q_proj": (24, 16), "down_proj": (16, 32)})
    row = scale.one(5, 4, tmp_path / "updates")
    assert row["clients"] == 5 and 0 < row["kept_energy"] < 1 and row["client_drift"] > 0
    assert {f"{part} seconds" for part in ("draw and spool", "combine", "diagnostics")} < row.keys()


def test_the_rounds_of_the_catching_up_benchmark_are_exact(importing, monkeypatch, tmp_path):
    catching_up = importing("catching_up")
    monkeypatch.setattr(catching_up, "SIZE", 48)
    monkeypatch.setattr(catching_up, "RANK", 2)
    rows, costs = catching_up.rounds_of(40, tmp_path, newcomers=False)
    assert len(rows) == 40 and len(costs) == 20 and sum(row["ties"] > 0 for row in rows) > 1
    assert max(row["error"] for row in rows) < 1e-6
    assert max(row["live error"] for row in rows) < 1e-6
    assert sum(row["snapshots"] for row in rows) == 0  # made by the client, not downloaded
