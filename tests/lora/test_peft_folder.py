"""Ours against stock PEFT: mixed ranks, alphas, rsLoRA, patterns, Conv1D, heads; and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedmomentum import FedIT, FedMomentum, GlobalModel, aggregate_adapters
from fedmomentum.base_model.identity import BaseIdentity, identify
from fedmomentum.errors import AdapterError, ModelError
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.linalg.spectral import relative_error
from fedmomentum.lora.adapter import from_tensors, to_tensors
from fedmomentum.lora.peft_config import DEFAULTS, HARMLESS_FIELDS
from fedmomentum.lora.peft_folder import read_adapter, write_adapter
from fedmomentum.lora.peft_model import attach_adapter, copy_adapter, load_adapter
from tests.tiny import tiny_gpt2, tiny_llama

LLAMA_CONFIGS = [
    dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    dict(r=8, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    dict(
        r=2,
        lora_alpha=3,
        rank_pattern={"layers.1.self_attn.q_proj": 6, "v_proj": 1},
        alpha_pattern={"q_proj": 5},
        target_modules=["q_proj", "v_proj"],
    ),
]
GPT2_CONFIGS = [
    dict(r=4, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True),
    dict(r=3, lora_alpha=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
]


def stock_adapters(folder, configs, base, auto=AutoModelForCausalLM):
    """Adapters made, filled and saved by stock PEFT; and their merged weights by stock PEFT."""
    paths, merged = [], []
    for i, settings in enumerate(configs):
        torch.manual_seed(i)
        model = get_peft_model(auto.from_pretrained(base), LoraConfig(**settings))
        for name, tensor in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                tensor.data.normal_(0, 0.1)
        paths.append(folder / f"adapter{i}")
        model.save_pretrained(paths[-1])
        merged.append(model.merge_and_unload().state_dict())
    return paths, merged


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def stock(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = (tiny_llama if request.param == "llama" else tiny_gpt2)(folder / "base")
    configs = LLAMA_CONFIGS if request.param == "llama" else GPT2_CONFIGS
    paths, merged = stock_adapters(folder, configs, base)
    return base, paths, merged


def test_the_table_of_defaults_is_pefts():
    """Every field that a configuration may leave out: what we take it for is what PEFT takes it for."""
    full_config = LoraConfig()
    harmless = HARMLESS_FIELDS | {"init_lora_weights"}
    peft_defaults = {
        name: getattr(full_config, name)
        for name in LoraConfig.__dataclass_fields__
        if name not in harmless
    }
    assert {name: value for name, value in peft_defaults.items() if value} == DEFAULTS


def global_model(base, aggregate, method=None):
    return GlobalModel(
        base=identify(str(base), base),
        adapter=aggregate.adapter,
        base_update=(StoredObject.of(aggregate.residual),) if aggregate.residual else (),
        method=repr(method or FedMomentum()),
    )


@pytest.mark.parametrize("method", [FedMomentum(), FedMomentum(split="aligned")], ids=repr)
def test_aggregate_equals_the_weighted_mean_of_stock_merges(stock, method, tmp_path):
    base, paths, merged = stock
    weights = [3, 1, 2][: len(paths)]
    aggregate = aggregate_adapters([read_adapter(p) for p in paths], weights, method, rank=3)
    model = global_model(base, aggregate, method)
    export_merged(model, tmp_path / "merged", base_directory=base)
    export_adapter(model, tmp_path / "adapter", base_directory=base)
    pristine = AutoModelForCausalLM.from_pretrained(base).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    assert set(plain.peft_config["default"].to_dict()["rank_pattern"]) <= set(model.adapter.modules)
    by_peft = plain.merge_and_unload().state_dict()
    changed = 0
    for key, start in pristine.items():
        wanted = sum(w * m[key].double() for w, m in zip(weights, merged, strict=True)) / sum(
            weights
        )
        size = (wanted - start.double()).norm()
        for got in (ours[key], by_peft[key]):
            if size == 0:
                assert torch.equal(got, start), key
            else:
                assert (got.double() - wanted).norm() / size < 1e-5, key
        changed += bool(size > 0)
    assert changed == len(model.adapter.modules)


def test_order_of_folders_does_not_change_a_bit(stock):
    _, paths, _ = stock
    adapters = [read_adapter(p) for p in paths]
    one = aggregate_adapters(adapters, [3, 1, 2][: len(paths)], rank=3)
    two = aggregate_adapters(adapters[::-1], [3, 1, 2][: len(paths)][::-1], rank=3)
    for key, tensor in to_tensors(one.adapter).items():
        assert torch.equal(tensor, to_tensors(two.adapter)[key])


def test_a_folder_round_trips(stock, tmp_path):
    _, paths, _ = stock
    for number, path in enumerate(paths):
        adapter = read_adapter(path)
        write_adapter(adapter, tmp_path / str(number))
        reloaded = read_adapter(tmp_path / str(number))
        assert (
            reloaded.scalings == pytest.approx(adapter.scalings)
            and reloaded.modules.keys() == adapter.modules.keys()
        )
        for key, tensor in to_tensors(adapter).items():
            assert torch.equal(tensor, to_tensors(reloaded)[key])


@pytest.mark.parametrize("saved", [(), ("lm_head",)])
def test_live_model_and_folder_agree(tmp_path, saved):
    base = tiny_llama(tmp_path / "base")

    def attached(seed):
        return attach_adapter(
            AutoModelForCausalLM.from_pretrained(base),
            rank=4,
            lora_alpha=6,
            target_modules=["q_proj"],
            seed=seed,
            modules_to_save=saved,
        )

    model = attached(3)
    for tensor in model.parameters():
        if tensor.requires_grad:
            tensor.data.normal_()
    live = copy_adapter(model)
    model.save_pretrained(tmp_path / "saved")
    read = read_adapter(tmp_path / "saved")
    assert live.scalings == read.scalings == dict.fromkeys(live.modules, 1.5)
    assert live.digest() == read.digest()
    assert set(live.saved) == {f"{name}.weight" for name in saved}
    other = attached(4)
    assert copy_adapter(other).digest() != live.digest()
    load_adapter(other, live)
    assert copy_adapter(other).digest() == live.digest()
    assert copy_adapter(attached(4)).digest() == copy_adapter(attached(4)).digest()
    with pytest.raises(AdapterError, match="is in one of them only"):
        load_adapter(
            other, replace(live, saved={**live.saved, "model.norm.weight": torch.ones(32)})
        )


def test_classification_heads_are_averaged_saved_and_exported(tmp_path):
    base = tiny_llama(tmp_path / "base")

    def auto(path):
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)

    auto.from_pretrained = auto
    configs = [dict(r=4, lora_alpha=8, task_type="SEQ_CLS", target_modules=["q_proj"])] * 2
    paths, merged = stock_adapters(tmp_path, configs, base, auto)
    adapters = [read_adapter(p) for p in paths]
    aggregate = aggregate_adapters(adapters, [1, 3])
    wanted = 0.25 * merged[0]["score.weight"] + 0.75 * merged[1]["score.weight"]
    assert torch.allclose(aggregate.adapter.saved["score.weight"], wanted, atol=1e-7)
    model = global_model(base, aggregate)
    model.save(tmp_path / "global")
    export_merged(GlobalModel.load(tmp_path / "global"), tmp_path / "merged", base_directory=base)
    exported = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", num_labels=3
    ).state_dict()
    assert torch.equal(exported["score.weight"], aggregate.adapter.saved["score.weight"])
    key = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(exported[key], 0.25 * merged[0][key] + 0.75 * merged[1][key], atol=1e-6)
    headless = adapters[0].__class__(
        adapters[0].modules, adapters[0].scalings, {}, adapters[0].config, "bare"
    )
    with pytest.raises(AdapterError, match="modules_to_save must be the same"):
        aggregate_adapters([headless, adapters[1]])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["experts"]),
        ("use_qalora", True),
        ("peft_type", "IA3"),
        ("a_field_of_tomorrow", 3),
    ],
)
def test_fields_not_known_to_be_harmless_are_refused_by_name(stock, tmp_path, field, value):
    _, paths, _ = stock
    config = json.loads((paths[0] / "adapter_config.json").read_text())
    config[field] = value
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (paths[0] / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(AdapterError, match=field):
        read_adapter(tmp_path)


def test_tied_embeddings_and_heads_are_refused_by_name(tmp_path):
    base = tiny_gpt2(tmp_path / "gpt2")
    for name, other in (("lm_head", "transformer.wte"), ("wte", "lm_head")):
        with pytest.raises(AdapterError, match=f"{name} shares its weight with {other}"):
            attach_adapter(
                AutoModelForCausalLM.from_pretrained(base),
                rank=2,
                lora_alpha=2,
                target_modules=[name],
            )


def test_broken_folders_are_refused_by_name(stock, tmp_path):
    _, paths, _ = stock
    with pytest.raises(AdapterError, match="no adapter_config.json"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes((paths[0] / "adapter_config.json").read_bytes())
    with pytest.raises(AdapterError, match="no adapter_model.safetensors"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(AdapterError, match="pickle"):
        read_adapter(tmp_path)
    content = (paths[0] / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(content[:100])
    with pytest.raises(AdapterError, match="cannot be read.*damaged or incomplete: copy"):
        read_adapter(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "adapter_model.safetensors").write_text(pointer)
    with pytest.raises(AdapterError, match="a pointer of Git LFS.*run `git lfs pull`"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    config = json.loads((paths[0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 7}))
    with pytest.raises(AdapterError, match="has rank 4 and the configuration says 7"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        read_adapter(tmp_path)


def test_other_folders_and_files_are_refused_with_what_they_are(stock, tmp_path):
    base, paths, _ = stock
    with pytest.raises(
        AdapterError, match="config.json is not a directory; wanted a directory written by"
    ):
        read_adapter(paths[0] / "adapter_config.json")
    with pytest.raises(AdapterError, match="It holds a model, not an adapter"):
        read_adapter(base)
    (tmp_path / "several" / "tuned").mkdir(parents=True)
    (tmp_path / "several" / "tuned" / "adapter_config.json").touch()
    with pytest.raises(AdapterError, match=r"subdirectories; give one of them: tuned$"):
        read_adapter(tmp_path / "several")
    GlobalModel(BaseIdentity("somewhere"), read_adapter(paths[0])).save(tmp_path / "global")
    with pytest.raises(AdapterError, match="`fedmomentum export DIRECTORY --to adapter`"):
        read_adapter(tmp_path / "global")


def test_adapters_that_do_not_fit_together_are_refused(stock):
    base, paths, _ = stock
    adapters = [read_adapter(p) for p in paths]
    other = adapters[0].__class__(
        adapters[0].modules,
        adapters[0].scalings,
        {},
        {**adapters[0].config, "base_model_name_or_path": "else"},
        "b",
    )
    with pytest.raises(AdapterError, match="different base models"):
        aggregate_adapters([adapters[0], other])
    with pytest.raises(
        AdapterError, match="rank must be from 1 to .*, the full rank of the largest module"
    ):
        aggregate_adapters(adapters, rank=1000)
    with pytest.raises(AdapterError, match="positive numbers"):
        aggregate_adapters(adapters, [-1] * len(adapters))
    with pytest.raises(AdapterError, match="module .* FedIT averages factors"):
        aggregate_adapters(adapters, method=FedIT())
    with pytest.raises(AdapterError, match="no adapters"):
        aggregate_adapters([])


def test_tensors_from_the_wire_are_refused_by_name(stock):
    _, paths, _ = stock
    like = read_adapter(paths[0])
    tensors = to_tensors(like)
    key = sorted(tensors)[0]
    assert from_tensors(tensors, like=like, name="client 3").digest() == like.digest()
    for broken, message in [
        ({k: t for k, t in tensors.items() if k != key}, "missing"),
        ({**tensors, "base_model.model.evil": torch.zeros(1)}, "unknown"),
        ({**tensors, key: tensors[key][:1]}, "shape"),
        ({**tensors, key: tensors[key].double()}, "dtype"),
        ({**tensors, key: tensors[key] * float("inf")}, "NaN or Inf"),
    ]:
        with pytest.raises(AdapterError, match=f"client 3: tensor .*{message}"):
            from_tensors(broken, like=like, name="client 3")


def test_another_base_is_refused_at_export(stock, tmp_path):
    base, paths, _ = stock
    model = global_model(base, aggregate_adapters([read_adapter(paths[0])]))
    other = tiny_llama(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match="base model differs"):
        export_merged(model, tmp_path / "out", base_directory=other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ModelError, match="not empty"):
        export_adapter(model, tmp_path / "full")
    unknown = GlobalModel(BaseIdentity("somewhere"), model.adapter)
    unknown.base.check(model.base)  # an unknown hash fits any


def test_a_base_of_another_size_is_refused_as_another_base(tmp_path):
    paths, _ = stock_adapters(tmp_path, LLAMA_CONFIGS[:1], tiny_llama(tmp_path / "base"))
    model = GlobalModel(BaseIdentity("somewhere"), read_adapter(paths[0]))
    wide = tiny_llama(tmp_path / "wide", width=64)
    with pytest.raises(AdapterError, match="is 32 x 32, the model's 64 x 64; this is not the base"):
        export_merged(model, tmp_path / "out", base_directory=wide)


def test_a_single_adapter_is_returned_unchanged(stock):
    _, paths, _ = stock
    for path in paths:
        adapter = read_adapter(path)
        result = aggregate_adapters([adapter])
        for module in adapter.modules:
            total = result.adapter.effective(module)
            assert relative_error(total, adapter.effective(module)) < 1e-5
