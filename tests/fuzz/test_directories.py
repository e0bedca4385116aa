"""Mutated run directories, global models and adapters: refused by name, or read to the identical result.

`FUZZ_TRIALS` says how many of each; `make test-fuzz` asks for 20,000.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import pytest
import torch
from rich.console import Console

from fedmomentum.aggregation.aggregate import aggregate_adapters
from fedmomentum.cli.inspection import summarize
from fedmomentum.errors import ConfigError, DataError, FedMomentumError
from fedmomentum.formats.status_file import read_status
from fedmomentum.global_model import model as global_model
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import Adapter
from fedmomentum.lora.peft_folder import read_adapter
from fedmomentum.results.comparison import read_comparison
from fedmomentum.results.run_results import RunResults
from fedmomentum.results.summary import summarize_run
from fedmomentum.run.environment import warn_of_another_environment
from fedmomentum.run.origin import check_data, read_origin
from fedmomentum.run.setup import check_run_directory
from fedmomentum.run.tracking import _last_reported
from fedmomentum.server.checkpoint import RunDirectory
from fedmomentum.server.status import StatusWriter
from fedmomentum.utils.tensors import safetensors_bytes
from tests.fuzz.mutate import NUM_TRIALS, Budget, copy_by_links, mutate_directory, replace_file
from tests.runs import start, tiny_config

MAX_WAIT = 20
"""Seconds after which a reader counts as waiting forever, on a machine that is busy with other things."""


@contextmanager
def watchdog():
    """Fail where something waits forever, for example on a pipe; processor time does not show that."""

    def late(signum, frame):
        raise AssertionError(f"still not done after {MAX_WAIT} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, MAX_WAIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def shown(tables) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def weights(model: GlobalModel) -> dict[str, torch.Tensor]:
    found = {}
    for module in model.adapter.modules:
        total = model.effective(module)
        found[module] = total.dense() if isinstance(total, LowRank) else total
    return found | dict(model.adapter.saved)


def same(one, other) -> bool:
    """Equality that looks into tensors."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[k], other[k]) for k in one)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class Tried:
    """Readers, each with what it makes of the undamaged directory; counts what they make of mutated ones."""

    def __init__(self, readers, whole):
        self.readers = readers
        self.wanted = {name: reader(whole) for name, reader in readers.items()}
        self.counts = {"refused": 0, "the same": 0}

    def __call__(self, folder, what):
        refused = False
        for name, reader in self.readers.items():
            with watchdog(), Budget() as spent:
                try:
                    got = reader(folder)
                except FedMomentumError as error:
                    refused = True
                    text = str(error)
                    assert text and "\n" not in text.replace("\n  ", "") and len(text) < 5000, (
                        what,
                        name,
                        text,
                    )
                    continue
                except BaseException as error:
                    raise AssertionError(
                        f"{what}, {name}: {type(error).__name__}: {error}"
                    ) from error
            spent.check(f"{what}, {name}")
            assert same(got, self.wanted[name]), f"{what}: {name} took it, and gave something else"
        self.counts["refused" if refused else "the same"] += 1


# ── runs ──


def state_of(folder):
    """What a resumed run starts from."""
    opened = RunDirectory(folder, keep=9)
    try:
        resumed = opened.resume()
        if resumed is None:
            return None
        model, state = resumed
        update = opened.last_update(model, state)
        moved = {
            module: matrix.dense() if isinstance(matrix, LowRank) else matrix
            for module, matrix in update.items()
        }
        return model.manifest(), weights(model), repr(state), opened.records, moved, opened._data
    finally:
        opened.close()


def result_of(server_round):
    def reader(folder):
        model = GlobalModel.load(folder, server_round)
        return model.version, model.server_round, weights(model)

    return reader


def run_of(folder):
    run = RunResults.load(folder)
    return run.rounds, run.plan, run.partition, run.environment, summarize_run(run.rounds)


def run_readers(config, whole):
    data = read_origin(whole).clients
    other = {
        client: msgspec.structs.replace(one, held_out="0" * 64) for client, one in data.items()
    }
    lower = replace(config, training=replace(config.training, learning_rate=0.5))

    def environment(folder):
        warn_of_another_environment({}, folder)

    def other_data(folder):
        """Other data than the run's is never taken, whatever was done to the directory."""
        try:
            check_data(folder, other)
        except DataError:
            return "refused"
        raise AssertionError("other data was taken")

    def other_settings(folder):
        """Nor are other settings."""
        try:
            check_run_directory(lower, folder, resume=True)
        except ConfigError:
            return "refused"
        raise AssertionError("other settings were taken")

    return {
        "resume": state_of,
        "settings": lambda folder: check_run_directory(config, folder, resume=True),
        "last": result_of("last"),
        "best": result_of("best"),
        "round 2": result_of(2),
        # which older checkpoints exist may differ
        "inspect": lambda folder: re.sub("rounds kept.*", "", shown(summarize(folder))),
        "report": run_of,
        "status": read_status,
        "environment": environment,
        "data": lambda folder: check_data(folder, data),
        "other data": other_data,
        "other settings": other_settings,
        # without the file, all rounds are reported to trackers again, and a warning says so
        "reported": lambda folder: (
            _last_reported(folder / "trackers" / "reported.json", RUN_ID) or {"tensorboard": 3}
        ),
    }


RUN_ID = "f" * 32


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run with every file that a run can have, and another of other settings; and the configuration."""
    from fedmomentum.run import federated_trainer as run_module

    folder = tmp_path_factory.mktemp("runs")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for number, run_id in enumerate((RUN_ID, "e" * 32)):
            patch.setattr(run_module.secrets, "token_hex", lambda size, run_id=run_id: run_id)
            config = tiny_config(
                folder,
                federation={"num_rounds": 3},
                evaluation={"num_examples": 1, "final_num_examples": 2},
                run={"keep_checkpoints": 2, "report_to": ["tensorboard"], "seed": number},
            )
            out = folder / f"run-{number}"
            status = StatusWriter(out, 3)
            start(config, out, callbacks=[status])
            status.close()
            found.append((config, out))
            for log in (out / "trackers").rglob("events*"):
                log.unlink()  # TensorBoard's own; the package does not read it
    return found


def test_mutated_run_directories_are_refused_or_read_as_meant(runs, tmp_path):
    (config, whole), (_, other) = runs
    tried = Tried(run_readers(config, whole), whole)
    assert tried.wanted["resume"] is not None and tried.wanted["reported"] == {"tensorboard": 3}
    started = time.perf_counter()
    for trial in range(NUM_TRIALS):
        draw = random.Random(trial)
        folder = tmp_path / f"run{trial}"
        copy_by_links(whole, folder)
        change = mutate_directory(folder, draw, others=other)
        if change.startswith("status.json of another"):
            continue  # nothing ties it to the run, and nothing depends on it
        tried(folder, f"trial {trial}: {change}")
        shutil.rmtree(folder)
        for target in tmp_path.glob("*-target*"):
            target.unlink()
    print(f"\n{NUM_TRIALS} run directories, {tried.counts}, {time.perf_counter() - started:.0f} s")
    assert tried.counts["refused"] > 0.5 * NUM_TRIALS


# ── global models ──


def global_model_of(seed: int) -> GlobalModel:
    shapes = {"model.layers.0.q_proj": (12, 8), "model.layers.1.v_proj": (6, 8)}
    adapters = [small_adapter(shapes, seed=10 * seed + i) for i in range(3)]
    result = aggregate_adapters(adapters, rank=2)
    return GlobalModel(
        global_model.BaseIdentity("base", sha256="ab" * 32),
        result.adapter,
        (global_model.StoredObject.of(result.residual),),
        server_round=1,
        method="FedMomentum()",
    )


def small_adapter(shapes, *, seed: int, rank: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def random_factor(*shape):
        return torch.randn(shape, generator=generator)

    modules = {
        module: LowRank(random_factor(out_size, rank), random_factor(rank, in_size))
        for module, (out_size, in_size) in shapes.items()
    }
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "base_model_name_or_path": "base",
    }
    return Adapter(modules, dict.fromkeys(modules, 2.0), {}, config, f"adapter {seed}")


def test_mutated_global_models_are_refused_or_read_as_meant(tmp_path):
    model_folder, other = tmp_path / "whole", tmp_path / "other"
    global_model_of(0).save(model_folder)
    global_model_of(1).save(other)
    tried = Tried(
        {"load": result_of("last"), "inspect": lambda folder: shown(summarize(folder))},
        model_folder,
    )
    for trial in range(NUM_TRIALS):
        draw = random.Random(trial)
        folder = tmp_path / f"model{trial}"
        copy_by_links(model_folder, folder)
        change = mutate_directory(folder, draw, others=other)
        tried(folder, f"trial {trial}: {change}")
        shutil.rmtree(folder)
    print(f"\n{NUM_TRIALS} global models, {tried.counts}")
    assert tried.counts["refused"] > 0.8 * NUM_TRIALS


# ── comparisons ──


def test_mutated_comparisons_are_refused_or_read_as_meant(runs, tmp_path):
    """The file itself: its runs are tried above."""
    from fedmomentum.utils.io import write_json
    from fedmomentum.utils.records import with_checksum

    comparison_folder = tmp_path / "whole"
    comparison_folder.mkdir()
    cells = []
    for seed, (_, out) in enumerate(runs):
        copy_by_links(out, comparison_folder / f"seed-{seed}")
        cells.append(
            {
                "method": "fedmomentum",
                "kind": "federated",
                "seed": seed,
                "folders": [f"seed-{seed}"],
            }
        )
    table = {
        "format": "fedmomentum comparison",
        "format_version": 3,
        "baseline": "fedmomentum",
        "target": 0.5,
        "command": None,
        "cells": cells,
        "summary": [],
    }
    write_json(comparison_folder / "comparison.json", with_checksum(table))

    def reader(folder):
        comparison = read_comparison(folder)
        return [
            (cell.method, cell.seed, cell.points, cell.exact_match, cell.loss)
            for cell in comparison.method_runs
        ]

    tried = Tried({"report": reader}, comparison_folder)
    for trial in range(NUM_TRIALS // 5):
        draw = random.Random(trial)
        folder = tmp_path / "comparison"
        copy_by_links(comparison_folder, folder)
        change = "comparison.json: " + mutate_file(folder / "comparison.json", draw)
        tried(folder, f"trial {trial}: {change}")
        shutil.rmtree(folder)
    print(f"\n{NUM_TRIALS // 5} comparisons, {tried.counts}")


def mutate_file(file, draw) -> str:
    from tests.fuzz.mutate import mutate_content

    return mutate_content(file, draw)


# ── adapters ──

PATTERNS = {
    "rank_pattern": {"model.layers.1.v_proj": 3},
    "alpha_pattern": {r".*\.layers\.[01]\.v_proj": 9, "q_proj": 5},
}


def write_peft(folder, seed: int) -> None:
    """A directory as PEFT writes it, with patterns and a module that is saved in full."""
    shapes = {"model.layers.0.q_proj": (12, 8), "model.layers.1.v_proj": (6, 8)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out_size, in_size) in shapes.items():
        rank = PATTERNS["rank_pattern"].get(module, 2)
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(
            rank, in_size, generator=generator
        )
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(
            out_size, rank, generator=generator
        )
    tensors["base_model.model.score.weight"] = torch.randn(3, 8, generator=generator)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "base",
        "revision": None,
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["score"],
        "init_lora_weights": True,
        "inference_mode": True,
        "layers_to_transform": None,
        "loftq_config": {},
        "use_dora": False,
        **PATTERNS,
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors, ("format", "pt")))


ODD_PATTERNS = (
    "(a+)+b",
    "(.*)*",
    "(.*.*.*)*x",
    "(a|a)*$",
    "[",
    "(?<=x)y",
    r"(\w+\s?)*$",
    "(" * 500 + ")" * 500,
    "(?i)q",
    r"\1",
    "a{1,1000}{1,1000}",
    "^(([a-z])+.)+[A-Z]([a-z])+$",
    "(.+.+)+y",
    "(?:(?:(?:x?){100}){100}){100}",
    ".*" * 400,
    "{,3}",
    "(?>a)",
)


def test_mutated_adapters_are_refused_or_read_as_peft_reads_them(tmp_path):
    """An adapter has no checksum: what is taken must be an adapter that PEFT would read in the same sense.

    So a mutation that is accepted is compared to an independent reading of what the mutated files
    say.
    """
    adapter_folder, other = tmp_path / "whole", tmp_path / "other"
    write_peft(adapter_folder, 0)
    write_peft(other, 1)
    companion = read_adapter(other)
    counts = {"refused": 0, "taken": 0, "the same": 0}
    wanted = read_adapter(adapter_folder).digest()
    for trial in range(NUM_TRIALS):
        draw = random.Random(trial)
        folder = tmp_path / f"adapter{trial}"
        copy_by_links(adapter_folder, folder)
        if draw.random() < 0.15:
            change = odd_pattern(folder, draw)
        else:
            change = mutate_directory(folder, draw, others=other)
        what = f"trial {trial}: {change}"
        with watchdog(), Budget() as spent:
            try:
                adapter = read_adapter(folder)
                shown(summarize(folder))
                counts["the same" if adapter.digest() == wanted else "taken"] += 1
            except FedMomentumError as error:
                assert str(error), what
                adapter = None
                counts["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        spent.check(what)
        if adapter is not None:
            check_reading(adapter, folder, what)
            check_aggregate(adapter, companion, what)
        shutil.rmtree(folder)
        for target in tmp_path.glob("*-target*"):
            target.unlink()
    print(f"\n{NUM_TRIALS} adapters, {counts}")
    assert counts["refused"] > 0.3 * NUM_TRIALS


def odd_pattern(folder, draw) -> str:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    field, key = draw.choice(("rank_pattern", "alpha_pattern")), draw.choice(ODD_PATTERNS)
    config[field] = {key: draw.choice((2, 3, 0, -1, "2", 1e300, True)), **config[field]}
    replace_file(file, json.dumps(config).encode())
    return f"{field} has {key[:40]!r}"


def check_reading(adapter, folder, what) -> None:
    """What was read is what the files say, by PEFT's own rule, where its engine comes to an end."""
    import regex
    from safetensors.torch import load_file

    def looked_up(table, module, default):
        for key, value in (table or {}).items():
            if regex.match(rf"(.*\.)?({key})$", module, timeout=0.2):
                return value
        return (table or {}).get(module, default)

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for module, matrix in adapter.modules.items():
        for side, factor in (("A", matrix.A), ("B", matrix.B)):
            assert torch.equal(factor, tensors[f"base_model.model.{module}.lora_{side}.weight"]), (
                what
            )
        try:
            rank = looked_up(config.get("rank_pattern"), module, config.get("r", 8))
            alpha = looked_up(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        except TimeoutError:
            continue
        assert matrix.rank == rank, what
        scaling = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        assert adapter.scalings[module] == pytest.approx(scaling, rel=1e-12), what
        assert all(bool(torch.isfinite(factor).all()) for factor in (matrix.A, matrix.B)), what


def check_aggregate(adapter, companion, what) -> None:
    """Combined with another, it is refused by name, or the result is finite."""
    with watchdog(), Budget() as spent:
        try:
            result = aggregate_adapters([adapter, companion])
        except FedMomentumError as error:
            assert str(error), what
            return
        except BaseException as error:
            raise AssertionError(f"{what}, combined: {type(error).__name__}: {error}") from error
    spent.check(f"{what}, combined")
    for module, matrix in result.adapter.modules.items():
        assert bool(torch.isfinite(result.adapter.effective(module).dense()).all()), what
        assert bool(torch.isfinite(matrix.B).all() and torch.isfinite(matrix.A).all()), what
    for tensor in result.adapter.saved.values():
        assert bool(torch.isfinite(tensor).all()), what
