"""Whole runs that adapt experts, an embedding and a head: exact, resumable, exported to stock libraries."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedmomentum.base_model.quantization import ON_LOADING
from fedmomentum.errors import AdapterError, ConfigError
from fedmomentum.formats.adapter_base import write_adapter_base
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.start_adapter import add_start_adapter
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.module_names import split_expert
from fedmomentum.lora.peft_folder import read_adapter, write_adapter
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.aggregate import aggregate_directories
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from tests.runs import chain, nudge, prepare, start, timeless, tiny_config
from tests.tiny import tiny_llama, tiny_moe

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    tiny_moe(folder / "base", "qwen3")
    return folder


def config_of(folder, **sections):
    lora = {
        "rank": 3,
        "target-modules": ["q_proj", "lm_head", "embed_tokens"],
        "target-parameters": [*EXPERTS, "mlp.gate_proj.weight"],
    }
    return tiny_config(
        folder,
        num_clients=2,
        **{
            "lora": {**lora, **sections.pop("lora", {})},
            "federation": {"num_rounds": 2, **sections.pop("federation", {})},
            **sections,
        },
    )


UNEQUAL = {
    "clients": {
        "site0": {"rank": 1, "lora-alpha": 5.0},
        "site1": {"target-modules": ["lm_head"], "target-parameters": EXPERTS[1:]},
    }
}


def logits(model, seed=0):
    ids = torch.randint(4, 100, (3, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_exports_equal(run, model, out):
    base = run.local.directory
    export_merged(model, out / "merged", base_directory=base)
    export_adapter(model, out / "adapter", base_directory=base)
    run.local.load_global_model(model)
    wanted = logits(run.local.peft.eval())
    stock = AutoModelForCausalLM.from_pretrained(base)
    assert (wanted - logits(stock)).abs().max() > 1e-2
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    adapted = PeftModel.from_pretrained(stock, out / "adapter")
    for other in (merged, adapted, adapted.merge_and_unload()):
        assert (logits(other) - wanted).abs().max() < 1e-4


def test_a_run_of_unequal_ranks_is_exact_and_its_exports_are_the_model(folder, tmp_path):
    config = config_of(folder, lora=UNEQUAL)
    run = start(config, tmp_path / "run")
    rows = timeless(tmp_path / "run")
    assert len(rows) == 3 and all(row["exactness_error"] < 1e-4 for row in rows[1:])
    assert all(row["applied_share"] > 0.999 and not row["failures"] for row in rows[1:])
    model = GlobalModel.load(tmp_path / "run")
    names = {split_expert(name)[0].split(".")[-1] for name in model.adapter.modules}
    assert names == {
        *("q_proj", "gate_proj", "lm_head", "embed_tokens[embedding]", "gate_up_proj", "down_proj")
    }
    # One residual an expert: what its own truncation left.
    merged = {name for stored in model.base_update for name in stored.matrices}
    assert "model.layers.0.mlp.experts.down_proj[3]" in merged
    assert_exports_equal(run, model, tmp_path)

    # Interrupted after the first round and resumed: the same bits; over a network too.
    once = replace(config, federation=replace(config.federation, num_rounds=1))
    start(once, tmp_path / "again")
    start(config, tmp_path / "again", resume=True)
    assert chain(tmp_path / "again")["0002.json"] == chain(tmp_path / "run")["0002.json"]
    steps = {}
    for name in config.data.client_files:
        client = prepare_client(config, name, tmp_path / name)
        client.training_function = nudge
        steps[name] = client.handle
    run_federation(InProcessTransport(steps), config, tmp_path / "over")
    assert chain(tmp_path / "over") == chain(tmp_path / "run")


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_other_stored_forms_and_sixteen_bits(family, tmp_path):
    tiny_moe(tmp_path / "base", family)
    lora = {"target-modules": ["lm_head"], "target-parameters": EXPERTS}
    for dtype in ("float32", "bfloat16"):
        config = config_of(tmp_path, lora=lora, model={"dtype": dtype})
        run = start(config, tmp_path / dtype)
        for row in timeless(tmp_path / dtype)[1:]:
            assert row["exactness_error"] < 1e-4 and row["applied_share"] > 0.999
    run = prepare(config_of(tmp_path, lora=lora), tmp_path / "unused")
    assert_exports_equal(run, GlobalModel.load(tmp_path / "float32"), tmp_path)
    run.close()


@pytest.mark.parametrize("state", ["local", "shared", "shared-full"])
def test_the_moments_of_every_expert_are_carried(folder, tmp_path, state):
    """Real training; a run that is resumed has the moments of one that was not."""
    config = config_of(
        folder,
        lora={"target-modules": []},
        training={"optimizer-state": state, "local-steps": 1},
        method={"settings": {"split": "procrustes"}},
        evaluation={"every": 0},
    )
    start(config, tmp_path / "run", function=None)
    once = replace(config, federation=replace(config.federation, num_rounds=1))
    start(once, tmp_path / "again", function=None)
    start(config, tmp_path / "again", function=None, resume=True)
    assert chain(tmp_path / "again") == chain(tmp_path / "run")
    fresh = replace(config, training=replace(config.training, optimizer_state="fresh"))
    start(fresh, tmp_path / "fresh", function=None)
    others = [chain(tmp_path / name)["0002.json"]["adapter"] for name in ("run", "fresh")]
    assert others[0] != others[1]


def test_offline_aggregation_of_adapters_with_experts_exports_the_mean(folder, tmp_path):
    run = start(config_of(folder, federation={"num_rounds": 1}), tmp_path / "run")
    adapter = run.model.adapter
    other = replace(
        adapter, modules={name: matrix.scaled(-0.5) for name, matrix in adapter.modules.items()}
    )
    for name, one in (("one", adapter), ("two", other)):
        write_adapter(one, tmp_path / name)
    found = aggregate_directories(
        [tmp_path / "one", tmp_path / "two"], run.method, weights=[3, 1], rank=3
    )
    for name, matrix in adapter.modules.items():
        effective = found.model.effective(name).dense()
        expected = 0.625 * adapter.scalings[name] * matrix.to(torch.float64).dense()
        assert torch.allclose(effective, expected, atol=1e-6 * float(expected.norm())), name
    found.model.save(tmp_path / "mean")
    assert_exports_equal(run, GlobalModel.load(tmp_path / "mean"), tmp_path)


# ── lora.start-from ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def given(folder, tmp_path_factory):
    """An adapter of rank 4 over all targets."""
    out = tmp_path_factory.mktemp("given")
    run = start(config_of(folder, lora={"rank": 4, "lora-alpha": 10.0}), out / "run")
    write_adapter(run.model.adapter, out / "adapter")
    return out / "adapter"


@pytest.mark.parametrize("rank", [4, 6])
def test_clients_of_lower_rank_train_the_leading_directions_of_the_adapter(
    folder, given, tmp_path, rank
):
    """The given adapter's components are in no order: as trained, the first are not the largest."""
    run = prepare(config_of(folder, lora={"rank": rank}), tmp_path / "run")
    run.close()
    adapter = read_adapter(given)
    order = [3, 1, 2, 0]
    sizes = torch.tensor([0.1, 0.4, 1.0, 3.0])
    modules = {}
    for module, matrix in adapter.modules.items():
        canonical = matrix.canonical()
        modules[module] = LowRank((canonical.B * sizes)[:, order], canonical.A[order])
    model = add_start_adapter(
        run.model, replace(adapter, modules=modules), is_merged=False, is_mixed=True
    )
    for module, matrix in model.adapter.modules.items():
        ratio = adapter.scalings[module] / model.adapter.scalings[module]
        product = ratio * modules[module].dense()
        assert torch.allclose(matrix.dense(), product, atol=1e-6 * float(product.norm()))
        U, S, Vh = torch.linalg.svd(product, full_matrices=False)
        best = (U[:, :1] * S[:1]) @ Vh[:1]
        first = matrix.split_rank(1)[0].dense()
        assert torch.allclose(first, best, atol=1e-5 * float(product.norm())), module


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_a_run_begins_with_the_adapter_whatever_its_rank(folder, given, tmp_path, rank):
    lora = {"rank": rank, "lora-alpha": 7.0, "start-from": str(given)}
    config = config_of(folder, lora=lora)
    run = prepare(config, tmp_path / "run")
    adapter = read_adapter(given)
    for name in run.model.adapter.modules:
        expected = adapter.effective(name).dense()
        found = run.model.effective(name)
        found = found if isinstance(found, torch.Tensor) else found.dense()
        assert torch.allclose(found, expected, atol=2e-7 * float(expected.norm())), name
        factors = run.model.adapter.modules[name]
        assert factors.rank == rank and int(torch.linalg.matrix_rank(factors.A.double())) == rank
    assert bool(run.model.base_update) == (rank < 4)
    wanted = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.local.directory), given)
    )
    run.local.load_global_model(run.model)
    assert (logits(run.local.peft.eval()) - wanted).abs().max() < 1e-4
    run.close()


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("flora", "float32"),
        ("frlora", "float32"),
        ("ffalora", "float32"),
        ("fedmomentum", "float16"),
    ],
)
def test_every_kind_of_method_keeps_the_full_adapter(folder, given, tmp_path, method, dtype):
    config = config_of(
        folder,
        lora={"rank": 4, "lora-alpha": 10.0, "start-from": str(given)},
        method={"name": method},
        federation={"downlink-dtype": dtype, "num_rounds": 1},
    )
    run = prepare(config, tmp_path / "run")
    adapter = read_adapter(given)
    for name in run.model.adapter.modules:
        expected = adapter.effective(name).dense()
        found = run.model.effective(name)
        found = found if isinstance(found, torch.Tensor) else found.dense()
        assert torch.allclose(found, expected, atol=1e-6 * float(expected.norm())), name
    for client in run.clients:
        client.training_function = nudge
    run.start()
    run.close()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert not row["failures"] and (not run.method.exact or row["exactness_error"] < 1e-4)


def test_a_run_that_began_with_an_adapter_is_resumed_without_it(folder, given, tmp_path):
    lora = {"start-from": str(tmp_path / "given")}
    write_adapter(read_adapter(given), tmp_path / "given")
    config = config_of(folder, lora=lora)
    start(config, tmp_path / "run")
    steps = {}
    for name in config.data.client_files:
        client = prepare_client(config, name, tmp_path / name)
        client.training_function = nudge
        steps[name] = client.handle
    run_federation(InProcessTransport(steps), config, tmp_path / "over")
    once = replace(config, federation=replace(config.federation, num_rounds=1))
    start(once, tmp_path / "again")
    for file in (tmp_path / "given").iterdir():
        file.unlink()
    start(config, tmp_path / "again", resume=True)
    assert chain(tmp_path / "run") == chain(tmp_path / "over")
    assert chain(tmp_path / "again")["0002.json"] == chain(tmp_path / "run")["0002.json"]
    moved = config_of(folder, lora={"start-from": str(given)})
    with pytest.raises(ConfigError, match=r"lora\.start-from"):
        start(moved, tmp_path / "again", resume=True)


def test_a_start_adapter_of_another_base_is_refused(folder, given, tmp_path, caplog):
    """Its directory records the hash of the base, as exports do; its name says less."""
    run = start(config_of(folder, federation={"num_rounds": 1}), tmp_path / "run")
    config = config_of(folder, lora={"rank": 4, "start-from": str(tmp_path / "given")})
    adapter = read_adapter(given)
    named = {**adapter.config, "base_model_name_or_path": "org/renamed"}
    write_adapter(replace(adapter, config=named), tmp_path / "given")

    base = run.model.base.record()
    write_adapter_base({**base, "sha256": "ab" * 32}, tmp_path / "given")
    with pytest.raises(AdapterError, match=r"start-from does not belong to model\.name: .*differs"):
        prepare(config, tmp_path / "refused")

    # The hash decides, not the name; another quantization is another start, with a warning.
    write_adapter_base(base, tmp_path / "given")
    prepare(config, tmp_path / "same").close()
    assert "start-from" not in caplog.text
    quantized = {**base, "quantization": ON_LOADING["nf4"].record()}
    write_adapter_base(quantized, tmp_path / "given")
    prepare(config, tmp_path / "quantized").close()
    assert "was trained with" in caplog.text and "the run has no quantization" in caplog.text


def test_a_start_adapter_is_read_before_data_and_model(folder, tmp_path):
    config = config_of(folder, lora={"start-from": str(tmp_path / "nowhere")})
    # Neither of these exists: whatever is read first is what the error names.
    config = replace(
        config,
        model=replace(config.model, name=str(tmp_path / "no-model")),
        data=replace(config.data, client_files={"alice": str(tmp_path / "no-data.jsonl")}),
    )
    with pytest.raises(AdapterError, match=r"lora\.start-from"):
        prepare(config, tmp_path / "run")
    with pytest.raises(AdapterError, match=r"lora\.start-from"):
        run_federation(InProcessTransport({}), config, tmp_path / "served")


def test_adapters_that_do_not_fit_the_run_are_refused_by_name(folder, given, tmp_path):
    cases = [
        (
            {"target-modules": ["q_proj"], "start-from": str(given)},
            "adapts .* which this run does not",
        ),
        (
            {"start-from": str(tmp_path / "nowhere")},
            r"^the adapter of lora\.start-from: .*nowhere does not exist; wanted",
        ),
    ]
    for lora, message in cases:
        with pytest.raises(AdapterError, match=message):
            prepare(config_of(folder, lora=lora), tmp_path / "run")
    adapter = read_adapter(given)
    write_adapter(
        replace(adapter, modules={n: m for n, m in adapter.modules.items() if "head" in n}),
        tmp_path / "head",
    )
    config = tiny_config(
        tmp_path / "llama" if (tmp_path / "llama").mkdir() is None else tmp_path,
        lora={"target-modules": ["lm_head"], "start-from": str(tmp_path / "head")},
    )
    tiny_llama(tmp_path / "other")
    prepare(config, tmp_path / "fits").close()
    file = tmp_path / "head" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(AdapterError, match="pissa.*changes the base"):
        prepare(config, tmp_path / "pissa")
    for harmless in ("eva", "orthogonal"):
        table = {**json.loads(file.read_text()), "init_lora_weights": harmless}
        file.write_text(json.dumps(table))
        prepare(config, tmp_path / harmless).close()
