"""Runs on quantized bases: exact, resumable, exported as what they are, and one quantization for all parties."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    TorchAoConfig,
)

from fedmomentum import FedMomentum
from fedmomentum.base_model.loading import load_base
from fedmomentum.base_model.quantization import ON_LOADING
from fedmomentum.errors import AdapterError, ConfigError, ModelError, QuorumError
from fedmomentum.formats.adapter_base import BASE_FILE
from fedmomentum.global_model.base_loading import load_base_for
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.aggregate import aggregate_directories
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.evaluate import evaluate_on
from fedmomentum.run.inference import LoadSettings
from fedmomentum.run.networked import run_federation
from fedmomentum.run.saved_model import open_result
from fedmomentum.utils.quantized import dequantize, quantized_layers
from tests.classifiers import classifier_config
from tests.runs import Events, chain, nudge, objects, start, timeless, tiny_config
from tests.tiny import tiny_llama

KINDS = sorted(ON_LOADING)
CPU = torch.device("cpu")
IDS = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(3))


def config_of(folder, kind, *, rounds=3, dtype="float32", **model):
    """Two clients, scaling 3, all linear modules of the decoder."""
    if not (folder / "base").exists():
        tiny_llama(folder / "base", width=64)
    return tiny_config(
        folder,
        num_clients=2,
        model={"quantization": kind, "dtype": dtype, **model},
        lora={"target-modules": "all-linear"},
        federation={"num-rounds": rounds},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def finished(folder):
    """A run of each kind, started when it is first requested."""
    runs = {}

    def get(kind):
        if kind not in runs:
            start(config_of(folder, kind), folder / kind)
            runs[kind] = folder / kind
        return runs[kind]

    return get


def stock_base(folder, kind):
    """The base as stock transformers quantizes it."""
    if kind == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    elif kind == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=settings, device_map={"": "cpu"}
    )
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def quantized_directory(folder, out):
    """The base as a directory that is quantized already."""
    model = load_base(folder / "base", torch.float32, CPU, quantization=ON_LOADING["nf4"])
    model.save_pretrained(out)
    for file in [*(folder / "base").glob("*token*"), folder / "base" / "chat_template.jinja"]:
        (out / file.name).write_bytes(file.read_bytes())
    return out


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.double()


def distance(one, two):
    return float((one - two).norm() / two.norm())


def dense_logits(folder, kind, run):
    """What the global model computes, from the dequantized weights and the definition of the method alone."""
    model = GlobalModel.load(run)
    plain = load_base(folder / "base", torch.float32, CPU)
    for path, layer in quantized_layers(stock_base(folder, kind)):
        effective = model.effective(path)
        change = effective.dense() if isinstance(effective, LowRank) else effective
        weight = dequantize(layer).double() + change.double()
        plain.get_submodule(path).weight.data.copy_(weight)
    return logits(plain)


# ── exact, and resumable ──


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_exact_and_what_is_merged_arrives(finished, kind):
    rows = timeless(finished(kind))[1:]
    assert len(rows) == 3 and all(row["accepted"] == ["site0", "site1"] for row in rows)
    # The merged part is factors at first, and 8 bits of its own afterwards.
    assert [row["exactness_error"] for row in rows[:2]] == pytest.approx([0, 0], abs=1e-6)
    assert rows[2]["exactness_error"] < 2e-3
    for row in rows:
        assert row["applied_share"] == pytest.approx(1, abs=0.002)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_resumed_run_is_the_uninterrupted_one(folder, finished, tmp_path, kind):
    config = config_of(folder, kind)

    def stop(event, facts):
        if event == "aggregate" and len(list((tmp_path / "run" / "rounds").iterdir())) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(config, tmp_path / "run", observer=stop)
    start(config, tmp_path / "run", resume=True)
    assert chain(tmp_path / "run") == chain(finished(kind))
    assert objects(tmp_path / "run") == objects(finished(kind))


def test_a_run_trains_in_bfloat16(folder, tmp_path):
    """The real training loop, whose checks of quantized models our view of the model must pass."""
    run = start(
        config_of(folder, "nf4", rounds=2, dtype="bfloat16"), tmp_path / "run", function=None
    )
    losses = [row["train_loss"] for row in timeless(tmp_path / "run")[1:]]
    assert losses[1] < losses[0] - 0.3
    trained = [p for p in run.local.peft.parameters() if p.requires_grad]
    assert trained and all(parameter.dtype == torch.float32 for parameter in trained)


# ── what comes out ──


@pytest.mark.parametrize("kind", KINDS)
def test_every_export_gives_the_global_models_logits(folder, finished, tmp_path, kind, monkeypatch):
    run = finished(kind)
    model = GlobalModel.load(run)
    wanted = dense_logits(folder, kind, run)
    assert distance(logits(stock_base(folder, kind)), wanted) > 0.05

    # Merged: an ordinary directory, which says that it is not the quantized base's.
    fraction = export_merged(model, tmp_path / "merged", base_directory=folder / "base")
    assert fraction == pytest.approx(1, abs=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), wanted) < 1e-5
    assert not list(quantized_layers(merged))
    assert "dequantized weights" in (tmp_path / "merged" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    export_merged(model, tmp_path / "bf16", base_directory=folder / "base", dtype=torch.bfloat16)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    assert 1e-5 < distance(logits(merged), wanted) < 0.02

    # One plain adapter for the base as stock transformers quantizes it.
    export_adapter(model, tmp_path / "adapter", base_directory=folder / "base")
    adapted = PeftModel.from_pretrained(stock_base(folder, kind), tmp_path / "adapter")
    assert distance(logits(adapted), wanted) < (0.03 if kind == "int8" else 1e-5)
    monkeypatch.chdir(tmp_path)
    by_card = model_of_card(tmp_path / "adapter" / "README.md")
    assert torch.equal(logits(by_card), logits(adapted))


def model_of_card(card):
    """Run the code in a model card, as a user would."""
    code = re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    for layer in names["model"].modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return names["model"].eval()


def test_the_card_of_a_classifier_names_what_is_not_quantized(tmp_path, monkeypatch):
    config = classifier_config(
        tmp_path, model={"quantization": "int8"}, federation={"num-rounds": 1}
    )
    start(config, tmp_path / "run")
    model = GlobalModel.load(tmp_path / "run")
    export_adapter(model, tmp_path / "adapter", base_directory=Path(model.base.name))
    monkeypatch.chdir(tmp_path)
    by_card = model_of_card(tmp_path / "adapter" / "README.md")
    assert type(by_card.get_base_model()).__name__.endswith("ForSequenceClassification")
    own = load_base_for(model, Path(model.base.name), torch.float32, CPU)
    wanted = {path for path, _ in quantized_layers(own)}
    loaded = {
        path.removesuffix(".base_layer") for path, _ in quantized_layers(by_card.base_model.model)
    }
    assert loaded == wanted and wanted


# ── an exported adapter knows its base ──


def test_an_exported_adapter_is_used_on_the_base_as_it_was_quantized(folder, finished, tmp_path):
    run = finished("nf4")
    model = GlobalModel.load(run)
    export_adapter(model, tmp_path / "adapter", base_directory=folder / "base")
    result = open_result(tmp_path / "adapter")
    assert result.model.base == model.base and result.model.base.quantization is not None
    data = str(folder / "site0.jsonl")
    settings = LoadSettings(base=str(folder / "base"), dtype="float32")
    by_adapter = evaluate_on(result, data, settings)
    by_run = evaluate_on(open_result(run), data, settings)
    assert by_adapter.base.all.total.nll == by_run.base.all.total.nll
    assert by_adapter.tuned.all.total.nll == pytest.approx(by_run.tuned.all.total.nll, rel=1e-5)

    # Not on the weights as they are stored elsewhere, and not quantized again.
    export_merged(model, tmp_path / "merged", base_directory=folder / "base")
    for use in (
        lambda: evaluate_on(result, data, LoadSettings(base=str(tmp_path / "merged"))),
        lambda: export_merged(result.model, tmp_path / "x", base_directory=tmp_path / "merged"),
        lambda: export_adapter(result.model, tmp_path / "x", base_directory=tmp_path / "merged"),
    ):
        with pytest.raises(ModelError, match="the base model differs: wanted .*base"):
            use()
    assert not (tmp_path / "x").exists()


def test_adapters_of_bases_that_were_quantized_differently_are_not_aggregated(
    folder, finished, tmp_path
):
    for kind in ("nf4", "int8"):
        model = GlobalModel.load(finished(kind))
        export_adapter(model, tmp_path / kind, base_directory=folder / "base")
    with pytest.raises(AdapterError, match=r"nf4 and .*int8 do not fit together: .*differently"):
        aggregate_directories([tmp_path / "nf4", tmp_path / "int8"], FedMomentum())
    # Of a foreign adapter only the name of its base is known.
    shutil.copytree(tmp_path / "nf4", tmp_path / "foreign")
    (tmp_path / "foreign" / BASE_FILE).unlink()
    both = aggregate_directories([tmp_path / "foreign", tmp_path / "nf4"], FedMomentum()).model
    assert both.base == GlobalModel.load(finished("nf4")).base
    (tmp_path / "foreign" / BASE_FILE).write_text('{"format": "fedmomentum adapter base"}')
    with pytest.raises(AdapterError, match=f"{BASE_FILE}.*format_version"):
        open_result(tmp_path / "foreign")


@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_evaluating_a_run_gives_the_runs_own_numbers(finished, kind):
    comparison = evaluate_on(open_result(finished(kind)), None, LoadSettings())
    *_, last = timeless(finished(kind))
    assert comparison.tuned.all.total.nll == pytest.approx(last["evaluation"]["total"]["nll"])


def test_a_directory_that_is_quantized_already_is_trained_and_exported(folder, tmp_path):
    quantized_directory(folder, tmp_path / "base")
    start(config_of(folder, "none", name=str(tmp_path / "base"), rounds=2), tmp_path / "run")
    model = GlobalModel.load(tmp_path / "run")
    assert model.base.quantization is None
    export_merged(model, tmp_path / "merged", base_directory=tmp_path / "base")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert distance(merged, dense_logits(folder, "nf4", tmp_path / "run")) < 1e-5


def test_dense_merged_parts_are_exported_exactly(folder, tmp_path):
    """What a base holds in 8 bits is 0.8 % off, and no measure for an export."""
    config = config_of(folder, "nf4", rounds=2)
    config = replace(config, method=replace(config.method, name="frlora"))
    start(config, tmp_path / "run")
    model = GlobalModel.load(tmp_path / "run")
    difference = export_adapter(model, tmp_path / "adapter", base_directory=folder / "base")
    assert difference < 1e-5
    adapted = PeftModel.from_pretrained(stock_base(folder, "nf4"), tmp_path / "adapter")
    assert distance(logits(adapted), dense_logits(folder, "nf4", tmp_path / "run")) < 1e-5


def test_a_classifier_keeps_its_head_in_floating_point(tmp_path):
    """DistilBERT's has two layers, of which transformers alone would quantize one."""
    config = classifier_config(
        tmp_path, "distilbert", num_clients=2, model={"quantization": "int8"}
    )
    run = start(config, tmp_path / "run")
    quantized = [path for path, _ in quantized_layers(run.local.peft.get_base_model())]
    assert len(quantized) == 12 and not any("classifier" in path for path in quantized)
    model = GlobalModel.load(tmp_path / "run")
    base = tmp_path / "base-distilbert"
    assert export_adapter(model, tmp_path / "adapter", base_directory=base) < 1e-5
    assert export_merged(model, tmp_path / "merged", base_directory=base) == pytest.approx(1)


# ── one for all parties ──


def test_a_party_with_another_quantization_is_left_out_by_name(folder, tmp_path):
    config = config_of(folder, "nf4", rounds=1)
    clients = {}
    for name, kind in (("site0", "nf4"), ("site1", "int8")):
        own = replace(config, model=replace(config.model, quantization=kind))
        client = prepare_client(own, name, tmp_path / name)
        client.training_function = nudge
        clients[name] = client.handle
    failures = {}

    def record(event, facts):
        if event == "failed":
            failures[facts["client"]] = facts["reason"]

    transport = InProcessTransport(clients)
    server = replace(config, federation=replace(config.federation, min_valid_fraction=1.0))
    with pytest.raises(QuorumError, match="site1"):
        run_federation(transport, server, tmp_path / "run", callbacks=[Events(record)])
    other = replace(config, model=replace(config.model, quantization="none"))
    with pytest.raises(QuorumError, match=r"model.quantization is none\. Give both sides the same"):
        run_federation(transport, other, tmp_path / "other")


def test_a_run_is_not_resumed_or_used_with_another_quantization(folder, finished, tmp_path):
    run = finished("nf4")
    with pytest.raises(ConfigError, match="quantization"):
        start(config_of(folder, "int8"), run, resume=True)
    model = GlobalModel.load(run)
    plain = replace(model, base=replace(model.base, quantization=None))
    assert plain.version != model.version
    with pytest.raises(ModelError, match="quantized differently on loading: wanted nf4"):
        model.base.check(plain.base)


def test_quantized_weights_are_not_held_in_float32(folder, tmp_path):
    with pytest.raises(
        ConfigError, match="adapted-weights with model.quantization must be auto or"
    ):
        config_of(folder, "nf4", adapted_weights="float32")
    stored = quantized_directory(folder, tmp_path / "base")
    config = config_of(folder, "none", name=str(stored), adapted_weights="float32")
    with pytest.raises(
        ModelError, match="float32.* does not work with quantized weights; use as-loaded"
    ):
        start(config, tmp_path / "run")


def test_what_a_directory_stores_quantized_is_not_trained_in_full(folder, tmp_path):
    stored = quantized_directory(folder, tmp_path / "base")
    config = config_of(folder, "none", name=str(stored))
    lora = replace(config.lora, target_modules=["q_proj"], modules_to_save=["layers.1.mlp"])
    with pytest.raises(AdapterError, match=r"stored with model.layers.1.mlp.gate_proj quantized"):
        start(replace(config, lora=lora), tmp_path / "run")
