"""All that target-modules asks for is adapted, or it is refused by name."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fedmomentum.errors import AdapterError
from fedmomentum.lora.linear_modules import (
    BYPASSED,
    EXPERT_NAME,
    FORBIDDEN,
    HEAD,
    NOT_LINEAR,
    RENAMED,
    ROUTER,
    UNUSED,
    find_linear_modules,
)
from fedmomentum.lora.module_summary import summarize, summarize_left_out
from fedmomentum.lora.peft_model import attach_adapter, copy_adapter, lora_layers
from fedmomentum.lora.target_names import alternatives
from fedmomentum.lora.targets import SMALL, choose_targets
from tests.families import make_model

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
MOE = SIZES | {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen3_moe():
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE))


def qwen2_moe():
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=8))


def mamba():
    return MambaForCausalLM(
        MambaConfig(vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=1)
    )


def bart():
    return BartForCausalLM(
        BartConfig(
            vocab_size=60,
            d_model=16,
            decoder_layers=1,
            decoder_ffn_dim=24,
            decoder_attention_heads=2,
        )
    )


def gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def chosen(model, setting, rank=2, saved=()):
    return choose_targets(find_linear_modules(model), setting, rank=rank, saved=saved)


def leaves(targets):
    return {path.rpartition(".")[2] for path in targets.modules}


PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("make", "setting", "expected"),
    [
        (llama, None, {"q_proj", "v_proj"}),
        (llama, [], {"q_proj", "v_proj"}),
        (llama, "all-linear", PROJECTIONS | MLP),
        (llama, "attention", PROJECTIONS),
        (llama, ["up_proj", "self_attn.q_proj"], {"up_proj", "q_proj"}),
        (llama, r".*\.(q|v)_proj", {"q_proj", "v_proj"}),
        (
            llama,
            r"model\.layers\.1\..*(up|down)_proj|.*\.0\..*k_proj",
            {"up_proj", "down_proj", "k_proj"},
        ),
        # an alternative that only excludes need not match
        (llama, r"(?!lm_head|nothing).*_proj", PROJECTIONS | MLP),
        (qwen3_moe, None, PROJECTIONS),
        (qwen3_moe, "all-linear", PROJECTIONS),
        (qwen2_moe, None, PROJECTIONS | MLP),
        (mamba, None, {"in_proj"}),
        (bart, "attention", {"q_proj", "k_proj", "v_proj", "out_proj"}),
    ],
)
def test_a_setting_adapts_what_it_names_and_peft_agrees(make, setting, expected):
    model = make()
    targets = chosen(model, setting)
    assert leaves(targets) == expected
    layers = lora_layers(
        attach_adapter(model, rank=2, lora_alpha=6, target_modules=targets, seed=1)
    )
    assert tuple(layers) == targets.modules
    assert not targets.left_out.keys() & layers.keys()


def test_modules_that_are_left_out_are_reported_with_the_reason():
    targets = chosen(qwen2_moe(), "all-linear")
    assert targets.left_out["lm_head"] == HEAD
    assert targets.left_out["model.layers.1.mlp.shared_expert_gate"] == ROUTER
    assert summarize_left_out(targets.left_out) == [
        "model.layers.*.mlp: 2 shared_expert_gate (routes tokens to experts)",
        "1 lm_head (the output head)",
        "model.layers.*.mlp.experts: 2 gate_up_proj, 2 down_proj (the experts of a layer, not in "
        "target-parameters)",
    ]
    experts = [f"model.layers.{n}.mlp.experts.down_proj[{e}]" for n in (0, 1) for e in range(4)]
    assert summarize(["model.embed_tokens[embedding]", *experts]) == [
        "model: 1 embed_tokens",
        "model.layers.*.mlp.experts: 8 down_proj",
    ]
    assert "model.layers.*.self_attn: 2 q_proj, 2 k_proj, 2 v_proj, 2 o_proj" in summarize(
        sorted(targets.modules, key=lambda path: "qkvo".find(path.rpartition(".")[2][0]))
    )
    unused = chosen(bart(), ["q_proj"]).left_out
    assert unused["model.decoder.layers.0.encoder_attn.q_proj"] == UNUSED
    small = chosen(llama(), "all-linear", rank=12)
    assert small.left_out["model.layers.0.self_attn.k_proj"] == SMALL


def test_a_mixer_is_adapted_where_its_forward_calls_the_module():
    """The kernels of Mamba take the weights of x_proj, and its forward that of dt_proj, as they are."""
    reasons = find_linear_modules(mamba()).reasons
    mixer = "backbone.layers.0.mixer."
    assert reasons[f"{mixer}dt_proj"] == reasons[f"{mixer}x_proj"] == BYPASSED
    assert reasons[f"{mixer}out_proj"] in (BYPASSED, FORBIDDEN)
    assert f"{mixer}in_proj" not in reasons


def test_names_that_peft_takes_for_the_experts_are_left_out_of_all_linear():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **(MOE | {"num_key_value_heads": 2, "head_dim": 4}),
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_nope_head_dim=4,
            qk_rope_head_dim=4,
            v_head_dim=4,
        )
    )
    targets = chosen(model, "all-linear")
    assert targets.left_out["model.layers.0.mlp.gate_proj"] == EXPERT_NAME
    assert leaves(targets) == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


def test_names_that_peft_would_not_find_again_in_an_adapter_are_left_out_and_refused_by_name():
    """A renaming of Laguna's checkpoints changes `shared_experts` too, so that PEFT drops these."""
    experts = "model.layers.1.mlp.shared_experts"
    modules = find_linear_modules(make_model("laguna"))
    renamed = {path for path, reason in modules.reasons.items() if reason == RENAMED}
    assert renamed == {f"{experts}.{name}_proj" for name in ("gate", "up", "down")}
    assert "model.layers.0.mlp.up_proj" in choose_targets(modules, None, rank=2).modules
    with pytest.raises(AdapterError, match="shared_experts.up_proj, which cannot be adapted: PEFT"):
        choose_targets(modules, ["shared_experts.up_proj"], rank=2)
    with pytest.raises(AdapterError, match="target-parameters: .*shared_experts.up_proj.weight"):
        choose_targets(modules, None, rank=2, parameters=["shared_experts.up_proj.weight"])


def test_a_linear_layer_that_takes_inputs_of_another_shape_is_left_out():
    """DeepSeek-V4 multiplies each group of heads by rows of its own of one weight."""
    reasons = find_linear_modules(make_model("deepseek_v4")).reasons
    assert reasons["model.layers.0.self_attn.o_a_proj"] == NOT_LINEAR
    assert "model.layers.0.self_attn.o_b_proj" not in reasons


def test_the_parts_of_a_router_are_left_out():
    """Zaya's router is a network of its own: `mlp.gate.router_mlp.fc1`."""
    reasons = find_linear_modules(make_model("zaya")).reasons
    routers = {path for path, reason in reasons.items() if reason == ROUTER}
    gate = "model.layers.0.mlp.gate"
    assert {f"{gate}.down_proj", f"{gate}.router_mlp.fc1", f"{gate}.router_mlp.out_proj"} < routers
    assert not any("self_attn" in path for path in routers)


@pytest.mark.parametrize(
    ("make", "setting", "words"),
    [
        (llama, ["q_proj", "q_prj"], "q_prj is no linear module of LlamaForCausalLM; did you mean"),
        (llama, "q_proj", r"matches the entire path of no linear module.*given as a list"),
        (llama, r".*(q_proj|w_proj)", r"\.\*\(w_proj\) matches the entire path of no"),
        (llama, r".*q_proj|.*z_proj", r"target-modules: \.\*z_proj"),
        (llama, r".*\.(?:self_attn\.(q|w)|mlp\.up)_proj", r"\(w\)"),
        (llama, ".*", "embed_tokens, a Embedding; only linear modules"),
        (
            gpt_oss,
            ["q_proj", "gate_up_proj"],
            r"experts.gate_up_proj, a parameter of shape \(4, 16",
        ),
        (gpt_oss, r".*\.(q_proj|experts\.down_proj)", "experts.down_proj, a parameter of shape"),
        (qwen3_moe, ["q_proj", "gate"], "mlp.gate, a Qwen3MoeTopKRouter"),
        (qwen3_moe, ["q_proj", "down_proj"], "experts.down_proj, a parameter"),
        (mamba, ["in_proj", "dt_proj"], "dt_proj, which cannot be adapted: .*without calling"),
        (
            bart,
            [r"encoder_attn.q_proj"],
            "encoder_attn.q_proj, where nothing would be trained: not used on text",
        ),
        (qwen2_moe, ["shared_expert_gate"], "rank 2 exceeds the smaller side 1"),
    ],
)
def test_a_setting_that_adapts_less_than_it_names_is_refused_by_name(make, setting, words):
    with pytest.raises(AdapterError, match=words):
        attach_adapter(make(), rank=2, lora_alpha=6, target_modules=setting)


def test_the_pass_over_the_model_changes_nothing():
    model = llama().train()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_linear_modules(model)
    assert all(module.training for module in model.modules())
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_configuration_of_a_mixture_of_experts_is_json():
    """PEFT makes sets of its fields there."""
    model = attach_adapter(qwen3_moe(), rank=2, lora_alpha=6, target_modules=None)
    config = copy_adapter(model).config
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["target_parameters"] is None
    assert not any(isinstance(value, set) for value in config.values())


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a", ["a"]),
        ("a|b", ["a|b", "a", "b"]),
        (r"x(a|b)\|[|(]", [r"x(a|b)\|[|(]", r"x(a)\|[|(]", r"x(b)\|[|(]"]),
        ("(?:a(b|c)|d)e", ["(?:a(b|c)|d)e", "(?:a(b|c))e", "(?:d)e", "(?:a(b))e", "(?:a(c))e"]),
        ("(?!a|b)c", ["(?!a|b)c"]),
    ],
)
def test_every_branch_of_an_expression_is_checked(expression, expected):
    assert sorted(alternatives(expression)) == sorted(expected)
