"""What the CPU's tests prove, on a GPU: same bits, the same from worker processes, nothing merged that is lost.

And every kind of training gives what it gives on a CPU.

Skipped where torch sees no GPU.
"""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fedmomentum.base_model.loading import load_base
from fedmomentum.config.toml import apply_overrides
from fedmomentum.errors import ModelError
from fedmomentum.global_model.export import export_adapter, export_merged
from tests.run.test_private_kinds import DP
from tests.run.test_secure_kinds import KINDS, config_of
from tests.runs import objects, prepare, start, timeless, tiny_config
from tests.secure_runs import dense_model
from tests.server.test_secure_round import distance, rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

HELD = {
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32"},
    "nf4": {"dtype": "bfloat16", "quantization": "nf4"},
}


@pytest.fixture(autouse=True)
def restore_switches():
    """`run.deterministic` is a switch of the process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def gpu_config(folder, held, **run):
    if "quantization" in HELD[held]:
        pytest.importorskip("bitsandbytes")
    return tiny_config(
        folder,
        model={"device": "cuda", **HELD[held]},
        lora={"target_modules": "all-linear"},
        run={"deterministic": True, **run},
    )


def train(config, out, **settings):
    run = prepare(config, out, **settings)
    try:
        return run.start()
    finally:
        run.close()


@pytest.mark.parametrize("held", HELD)
def test_a_run_is_reproducible_to_the_bit_also_when_resumed(tmp_path, held):
    config = gpu_config(tmp_path, held)
    first, again, halved = (tmp_path / name for name in ("first", "again", "halved"))
    train(config, first)
    train(config, again)
    train(apply_overrides(config, ["federation.num-rounds=2"]), halved)
    train(config, halved, resume=True)
    assert objects(first) == objects(again) == objects(halved)
    assert timeless(first) == timeless(again)
    rows = [row for row in timeless(first) if row["round"]]
    assert all(row["applied_share"] >= 0.99 for row in rows)
    assert all(row["exactness_error"] < (1e-5 if held == "float32" else 0.05) for row in rows)


def test_two_worker_processes_on_a_gpu_give_the_bits_of_one(tmp_path):
    alone = gpu_config(tmp_path, "bfloat16")
    shared = apply_overrides(alone, ['run.devices=["cuda:0", "cuda:0"]', "model.device=auto"])
    train(alone, tmp_path / "alone")
    train(shared, tmp_path / "shared")
    assert objects(tmp_path / "alone") == objects(tmp_path / "shared")
    assert timeless(tmp_path / "alone") == timeless(tmp_path / "shared")


@pytest.mark.parametrize("held", HELD)
def test_exports_are_the_same_bytes_as_those_made_beside_a_cpu(tmp_path, held):
    config = gpu_config(tmp_path, held)
    model, base = train(config, tmp_path / "run"), tmp_path / "base"
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        export_adapter(model, out / "adapter", base_directory=base, device=torch.device(device))
        export_merged(model, out / "merged", base_directory=base, device=torch.device(device))
    for kind in ("adapter", "merged"):
        on_cpu, on_gpu = (tmp_path / device / kind for device in ("cpu", "cuda"))
        names = [file.name for file in sorted(on_cpu.iterdir())]
        assert names == [file.name for file in sorted(on_gpu.iterdir())]
        for name in names:
            assert (on_cpu / name).read_bytes() == (on_gpu / name).read_bytes(), name


def without_dropout(base):
    """Set the rates of dropout in a model's configuration, where it has any, to zero."""
    file = base / "config.json"
    settings = json.loads(file.read_text())
    rates = {name: 0.0 for name in settings if "dropout" in name}
    file.write_text(json.dumps(settings | rates))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_gpu_is_that_on_a_cpu(tmp_path, kind):
    """In float32, and without dropout, whose masks each device draws in its own way."""
    config = config_of(tmp_path, kind, "fedmomentum", run={"deterministic": True, "threads": 1})
    without_dropout(Path(config.model.name))
    on_cpu = start(config, tmp_path / "cpu", function=None)
    config = apply_overrides(config, ["model.device=cuda"])
    on_gpu = start(config, tmp_path / "gpu", function=None)
    assert distance(dense_model(on_gpu.model), dense_model(on_cpu.model)) < 0.01
    pairs = list(zip(rows(tmp_path / "gpu"), rows(tmp_path / "cpu"), strict=True))
    for ours, wanted in pairs[1:]:
        assert ours.accepted == wanted.accepted and ours.failures == {}
        assert ours.train_loss == pytest.approx(wanted.train_loss, rel=1e-3)


def test_gradient_checkpointing_on_a_gpu_changes_no_more_than_rounding(tmp_path):
    config = gpu_config(tmp_path, "float32")
    plain = start(config, tmp_path / "plain", function=None)
    config = apply_overrides(config, ["training.arguments.gradient_checkpointing=true"])
    checkpointed = start(config, tmp_path / "checkpointed", function=None)
    assert distance(dense_model(checkpointed.model), dense_model(plain.model)) < 1e-3


@pytest.mark.parametrize("kind", ["completion", "dpo", "classification"])
def test_a_private_run_on_a_gpu_accepts_every_reply(tmp_path, kind):
    """Which examples are drawn and the noise differ from run to run, so no bits can be compared."""
    pytest.importorskip("opacus")
    config = config_of(tmp_path, kind, "fedmomentum", privacy={"dp": DP})
    config = apply_overrides(config, ["model.device=cuda"])
    start(config, tmp_path / "out", function=None)
    for row in rows(tmp_path / "out")[1:]:
        assert row.failures == {} and row.accepted == sorted(config.data.client_files)


def test_a_gpu_without_free_memory_is_named(tmp_path):
    tiny_config(tmp_path)
    torch.cuda.set_per_process_memory_fraction(1e-7)
    fillers = []
    try:
        # Blocks that earlier tests left free in the process would hold a tiny model.
        with suppress(torch.OutOfMemoryError):
            while True:
                fillers.append(torch.empty(512, dtype=torch.uint8, device="cuda"))
        with pytest.raises(ModelError, match="memory"):
            load_base(tmp_path / "base", None, torch.device("cuda"))
    finally:
        fillers.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
