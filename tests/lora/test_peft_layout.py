"""The algebra treats experts and embeddings as stock PEFT does, or they are refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedmomentum.aggregation.aggregate import aggregate_adapters
from fedmomentum.errors import AdapterError
from fedmomentum.lora.linear_modules import find_linear_modules
from fedmomentum.lora.live_layers import lora_layers
from fedmomentum.lora.module_names import split_expert, weight_path
from fedmomentum.lora.peft_folder import read_adapter, write_adapter
from fedmomentum.lora.peft_layout import with_equal_experts
from fedmomentum.lora.peft_model import attach_adapter, copy_adapter, load_adapter
from fedmomentum.lora.targets import choose_targets
from tests.tiny import tiny_llama, tiny_moe

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
FAMILIES = ("qwen3", "mixtral", "gpt-oss")


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    return tiny_moe(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return tiny_moe(tmp_path_factory.mktemp("base") / "mixtral", "mixtral")


def load(base):
    return AutoModelForCausalLM.from_pretrained(base)


def attach(model, modules, parameters=(), rank=2, **settings):
    linear = find_linear_modules(model)
    targets = choose_targets(linear, modules, rank=rank, parameters=parameters)
    return attach_adapter(model, rank=rank, lora_alpha=7, target_modules=targets, **settings)


def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def stock(base, out, seed=0, **settings):
    """Save what stock PEFT makes of random factors; return the folder."""
    config = LoraConfig(
        **{
            "r": 3,
            "lora_alpha": 7,
            "target_modules": ["q_proj"],
            "target_parameters": PARAMETERS,
            "rank_pattern": {"experts.gate_up_proj": 6},
            **settings,
        }
    )
    randomize(get_peft_model(load(base), config), seed).save_pretrained(out)
    return out


def merged_changes(base, folder):
    """Every parameter's change by stock PEFT's merge, in float64."""
    before = {name: tensor.double() for name, tensor in load(base).named_parameters()}
    merged = PeftModel.from_pretrained(load(base).double(), folder, autocast_adapter_dtype=False)
    merged = merged.double().merge_and_unload()
    return {name: tensor - before[name] for name, tensor in merged.named_parameters()}


def as_changes(adapter, is_transposed):
    """Every adapted parameter's change by our reading of an adapter."""
    changes = {}
    for name in adapter.modules:
        _, expert = split_expert(name)
        change = adapter.effective(name).dense()
        if expert is None:
            changes[weight_path(name)] = change
        else:
            change = change.mT if is_transposed else change
            changes.setdefault(weight_path(name), []).append((expert, change))
    for path, parts in changes.items():
        if isinstance(parts, list):
            changes[path] = torch.stack([change for _, change in sorted(parts, key=lambda p: p[0])])
    return changes


def in_float64(adapter):
    modules = {name: matrix.to(torch.float64) for name, matrix in adapter.modules.items()}
    return replace(adapter, modules=modules)


def assert_equal_changes(found, expected):
    for path, change in expected.items():
        if path in found:
            assert torch.allclose(found[path], change, atol=1e-10), path
        else:
            assert not change.any(), path
    assert found.keys() <= expected.keys()


def test_every_expert_is_the_slice_that_stock_peft_merges(base, tmp_path):
    folder = stock(base, tmp_path / "adapter", alpha_pattern={"experts.down_proj": 11})
    adapter = read_adapter(folder)
    experts = [name for name in adapter.modules if split_expert(name)[1] is not None]
    assert len(experts) == 8 and {adapter.modules[name].rank for name in experts} == {3, 6}
    assert {adapter.scalings[name] for name in experts} == {7 / 6, 11 / 3}
    changes = as_changes(adapter, is_transposed="gpt-oss" in str(base))
    assert_equal_changes(changes, merged_changes(base, folder))


def test_what_is_written_is_what_stock_peft_reads(base, tmp_path):
    adapter = read_adapter(stock(base, tmp_path / "adapter"))
    write_adapter(adapter, tmp_path / "written")
    assert read_adapter(tmp_path / "written").digest() == adapter.digest()
    changes = as_changes(adapter, is_transposed="gpt-oss" in str(base))
    assert_equal_changes(changes, merged_changes(base, tmp_path / "written"))


def test_aggregation_gives_the_exact_mean_of_two_folders_of_unequal_ranks(base, tmp_path):
    first = stock(base, tmp_path / "first", seed=1)
    second = stock(base, tmp_path / "second", seed=2, r=2, rank_pattern={}, use_rslora=True)
    adapters = [in_float64(read_adapter(folder)) for folder in (first, second)]
    result = aggregate_adapters(adapters, [3, 1], rank=4)
    assert {matrix.rank for matrix in result.adapter.modules.values()} == {4}
    changes = [merged_changes(base, folder) for folder in (first, second)]
    expected = {path: 0.75 * changes[0][path] + 0.25 * changes[1][path] for path in changes[0]}
    modules = dict(result.adapter.modules)
    for name, matrix in result.residual.items():
        modules[name] = modules[name].concatenate(matrix.scaled(1 / result.adapter.scalings[name]))
    total = replace(result.adapter, modules=modules)
    found = as_changes(total, is_transposed="gpt-oss" in str(base))
    for path, change in found.items():
        assert float((change - expected[path]).norm()) <= 1e-10 * float(expected[path].norm()), path
    # Every expert has a truncation of its own: the best of its rank.
    for name in result.adapter.modules:
        if split_expert(name)[1] is None:
            continue
        dense = total.effective(name).dense()
        kept = torch.linalg.svdvals(result.adapter.effective(name).dense())[:4]
        assert torch.allclose(kept, torch.linalg.svdvals(dense)[:4], rtol=1e-4), name


def test_experts_of_unequal_rank_and_scaling_are_padded_and_stay_the_same(mixtral, tmp_path):
    adapter = read_adapter(stock(mixtral, tmp_path / "adapter"))
    name = next(name for name in adapter.modules if name.endswith("down_proj[2]"))
    uneven = replace(
        adapter,
        modules={**adapter.modules, name: adapter.modules[name].concatenate(adapter.modules[name])},
        scalings={**adapter.scalings, name: 0.5},
    )
    equal = with_equal_experts(uneven)
    for module in uneven.modules:
        assert torch.allclose(equal.effective(module).dense(), uneven.effective(module).dense())
    write_adapter(uneven, tmp_path / "written")
    changes = merged_changes(mixtral, tmp_path / "written")
    assert_equal_changes(as_changes(equal, is_transposed=False), changes)


def test_embeddings_and_an_untied_head_are_read_and_written_as_peft_does(tmp_path):
    base = tiny_llama(tmp_path / "llama")
    folder = stock(
        base,
        tmp_path / "adapter",
        target_modules=["embed_tokens", "lm_head", "q_proj"],
        target_parameters=None,
        rank_pattern={"lm_head": 5},
    )
    assert any("base_layer" in key for key in load_file(folder / "adapter_model.safetensors"))
    adapter = read_adapter(folder)
    assert "model.embed_tokens[embedding]" in adapter.modules and "lm_head" in adapter.modules
    write_adapter(adapter, tmp_path / "written")
    for directory in (folder, tmp_path / "written"):
        assert_equal_changes(as_changes(adapter, False), merged_changes(base, directory))


def test_live_factors_are_those_of_the_file_and_can_be_set(base, tmp_path):
    live = attach(load(base), ["q_proj", "lm_head", "embed_tokens"], PARAMETERS, rank=3)
    fresh = copy_adapter(live)
    # Every factor starts as LoRA's do: B adds nothing, and the rows of A are independent.
    for matrix in fresh.modules.values():
        assert not matrix.B.any() and int(torch.linalg.matrix_rank(matrix.A)) == 3
    randomize(live, 3).save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert copy_adapter(live).digest() == adapter.digest()
    for name, layer in lora_layers(live).items():
        assert torch.equal(layer.detached().dense(), adapter.modules[name].dense())
    load_adapter(live, fresh)
    assert copy_adapter(live).digest() == fresh.digest()


def test_linear_modules_that_peft_takes_for_experts_are_adapted_by_their_weights(tmp_path):
    base = tiny_moe(tmp_path / "qwen2", "qwen2")
    names = ["gate_proj", "up_proj", "down_proj"]
    for modules in (names, r".*(q|gate|up|down)_proj"):
        with pytest.raises(
            AdapterError, match="shared_expert.*target-parameters|experts by target-parameters"
        ):
            attach(load(base), modules)
    live = attach(load(base), ["q_proj"], [f"shared_expert.{name}.weight" for name in names])
    shared = {f"model.layers.0.mlp.shared_expert.{name}" for name in names}
    assert copy_adapter(live).modules.keys() == {"model.layers.0.self_attn.q_proj", *shared}
    randomize(live, 4)
    adapter = copy_adapter(live)
    write_adapter(adapter, tmp_path / "written")
    changes = merged_changes(base, tmp_path / "written")
    assert_equal_changes(as_changes(adapter, False), changes)


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0", "0.22.0", "1.0", "x", 3])
def test_another_layout_is_refused_by_its_version(mixtral, tmp_path, version):
    folder = stock(mixtral, tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_version": version}))
    with pytest.raises(AdapterError, match="peft_version"):
        read_adapter(folder)
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_version": "0.19.1"}))
    read_adapter(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_parameters": None}, "cannot be determined"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "cannot be determined"),
        ({"target_parameters": [*PARAMETERS, "experts.up_proj"]}, "cannot be determined"),
        ({"target_parameters": [*PARAMETERS, "other.down_proj"]}, "other.down_proj"),
        ({"rank_pattern": {"experts.gate_up_proj": 5}}, "does not divide it"),
        ({"target_parameters": [f"e.p{i}" for i in range(20)]}, "at most 16"),
    ],
)
def test_stacks_that_the_configuration_does_not_explain_are_refused(
    mixtral, tmp_path, change, message
):
    folder = stock(mixtral, tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)


def test_a_missing_expert_and_models_with_other_experts_are_refused(mixtral, tmp_path):
    adapter = read_adapter(stock(mixtral, tmp_path / "adapter"))
    gone = {name: matrix for name, matrix in adapter.modules.items() if "down_proj[1]" not in name}
    with pytest.raises(AdapterError, match="expert 1 of .*down_proj is missing"):
        write_adapter(replace(adapter, modules=gone), tmp_path / "written")
    fewer = {name: matrix for name, matrix in adapter.modules.items() if "[3]" not in name}
    with pytest.raises(AdapterError, match="4 experts .* 3"):
        aggregate_adapters([adapter, replace(adapter, modules=fewer, name="other")])


def test_targets_that_cannot_be_adapted_are_refused_by_name(base):
    cases = [
        (["experts.gate_up_pro"], 0.0, "gate_up_pro is no parameter .*did you mean"),
        (PARAMETERS, 0.1, "dropout 0.1 is not possible"),
        (["experts.down_proj", "input_layernorm.weight"], 0.0, "input_layernorm|1 dim"),
    ]
    if "gpt-oss" in str(base):
        cases.append((["down_proj_bias"], 0.0, "down_proj_bias is"))
    for parameters, dropout, message in cases:
        with pytest.raises(AdapterError, match=message):
            attach(load(base), None, parameters, dropout=dropout)
    with pytest.raises(AdapterError, match="rank 30 exceeds the smaller side 24"):
        attach(load(base), None, PARAMETERS, rank=30)


def test_a_table_that_is_linear_and_embedding_is_refused(tmp_path):
    base = tiny_llama(tmp_path / "llama")
    folder = stock(
        base, tmp_path / "a", target_modules=["embed_tokens"], target_parameters=None, r=3
    )
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.model.embed_tokens"
    tensors[f"{prefix}.lora_A.weight"] = torch.randn(3, 32)
    tensors[f"{prefix}.lora_B.weight"] = torch.randn(100, 3)
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="embed_tokens is adapted twice"):
        read_adapter(folder)
