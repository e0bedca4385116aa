"""A tiny, randomly initialized model of every family, made from its configuration class."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedmomentum.base_model.families import Family
from fedmomentum.errors import FedMomentumError
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.lora.linear_modules import LinearModules, find_linear_modules
from fedmomentum.lora.module_summary import summarize, summarize_left_out
from fedmomentum.lora.targets import choose_targets
from fedmomentum.objectives.objective import CAUSAL_LM
from fedmomentum.run.saved_model import open_result
from fedmomentum.training import TrainReport
from tests.runs import start, tiny_config
from tests.tiny import tiny_tokenizer

SIZES = {
    "vocab_size": 100,
    "vocab_size_per_layer_input": 100,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "shape_embed_dim": 32,
    "shape_vocab_size": 100,
    "pronunciation_embed_dim": 32,
    "pronunciation_vocab_size": 100,
    "emb_dim": 32,
    "word_embed_proj_dim": 32,
    "lru_width": 32,
    "out_hidden_size": 32,
    "dim_model": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "dim_ff": 48,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "depth": 1,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "rotary_dim": 4,
    "dim_head": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_topk": 2,
    "zero_expert_num": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "n_groups": 1,
    "chunk_size": 16,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "sliding_window": 64,
    "attention_window_size": 64,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
    "image_token_id": 90,
    "image_token_index": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "audio_token_id": 94,
    "boi_token_id": 95,
    "eoi_token_id": 96,
    "boa_token_id": 97,
    "eoa_token_id": 98,
    "patch_size": 4,
    "image_size": 8,
    "spatial_merge_size": 1,
    "mm_tokens_per_image": 4,
}
"""What a configuration is given of, where it has a parameter of that name."""
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 64,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": HYBRID,
    "bamba": {"attn_layer_indices": [1]},
    "gemma3": {
        "text_config": TEXT | {"model_type": "gemma3_text"},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "kimi_linear": HYBRID,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama4": {
        "text_config": TEXT
        | {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
        "vision_config": VISION
        | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
    "mamba2": {"expand": 2, "num_heads": 4, "head_dim": 16},
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16},
    },
    "mllama": {
        "text_config": TEXT | {"cross_attention_layers": [1]},
        "vision_config": VISION
        | {
            "attention_heads": 2,
            "num_global_layers": 1,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
    },
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "n_mamba_heads": 2,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
IMAGE_TEXT = ("gemma3", "gemma4", "llama4", "mistral3", "mllama", "qwen3_5", "qwen3_5_moe")
"""Families of which the whole image-text model is made, not its language model."""

ZERO_PADDING = ("youtu",)
"""Families whose class zeroes the padding token's embedding whenever it loads a checkpoint."""


def make_config(kind: type, name: str = "", settings: dict[str, Any] | None = None) -> Any:
    """A configuration of a class, and of those of its parts, as small as its parameters allow."""
    parameters = inspect.signature(kind.__init__).parameters
    names = {*parameters, *getattr(kind, "__dataclass_fields__", {})}
    values = {key: value for key, value in SIZES.items() if key in names}
    if "qk_rope_head_dim" in values:
        values |= {"head_dim": 8, "num_key_value_heads": 4}
    own = settings or OVERRIDES.get(name or getattr(kind, "model_type", ""), {})
    for part, part_kind in (getattr(kind, "sub_configs", None) or {}).items():
        if part in names and part not in own and hasattr(part_kind, "__init__"):
            if part_kind.__name__ != "AutoConfig":
                values[part] = make_config(part_kind).to_dict()
    return kind(**values | own)


def make_model(family: str) -> Any:
    """A model of a family with weights large enough for an adapter to matter."""
    config = make_config(CONFIG_MAPPING[family], family)
    is_image_text = family in IMAGE_TEXT
    auto_class = AutoModelForImageTextToText if is_image_text else AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(p.numel() for p in auto_class.from_config(config).parameters())
    assert size < TOO_LARGE, f"{family} is not tiny: {size:.0f} parameters"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class.from_config(config).eval()
        for name, parameter in model.named_parameters():
            # A vector of zeros, which is no bias, would leave unmoved what it multiplies.
            is_zero = not name.endswith("bias") and not parameter.any()
            if parameter.ndim > 1 or is_zero:
                torch.nn.init.normal_(parameter, std=0.1)
        if family in ZERO_PADDING:
            torch.nn.init.zeros_(model.get_input_embeddings().weight.data[config.pad_token_id])
    return model


# ── a run ──

NOT_TRIED = {
    "blt": "its byte patcher is large whatever the configuration",
    "cohere_compass_text": "its default configuration is incomplete",
    "dots3_note": "image and audio",
    "emu3": "images only with text",
    "fuyu": "images only with text",
    "gemma3n": "needs timm",
    "gemma4_assistant": "drafts for another model",
    "gemma4_unified": "large whatever the configuration",
    "gemma4_unified_assistant": "drafts for another model",
    "got_ocr2": "images only",
    "moshi": "audio",
    "moss_transcribe_diarize": "audio",
    "musicgen": "audio",
    "musicgen_melody": "audio",
    "phi4_multimodal": "image and audio",
    "qwen4_exp": "its default configuration is incomplete",
    "qwen4_exp_text": "its default configuration is incomplete",
    "reformer": "autograd has no record of its reversible layers",
}
"""Why no tiny model is made of a family."""
FAMILIES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *IMAGE_TEXT} - NOT_TRIED.keys())
RANK = 2
TOKENS = torch.tensor([[5, 9, 30, 41, 7, 12, 60, 33, 8, 21]])
# Of the logits' norm: how far both exports may be apart, and how far training moves them at least.
TOLERANCE = 1e-4
SMALLEST_CHANGE = 1e-5
TOO_LARGE = 3e6
"""Parameters of a model that would slow the tests down."""


@cache
def tokenizer() -> Any:
    return tiny_tokenizer()


def one_step(model, examples, *, learning_rate, on_step, **_) -> TrainReport:
    """Train by one large step of gradient descent; every factor must have a gradient."""
    batch = CAUSAL_LM.collate([examples.example(row) for row in range(4)], 0)
    return gradient_step(model, CAUSAL_LM, batch, size=50 * learning_rate, on_step=on_step)


def gradient_step(model, objective, batch, *, size, on_step) -> TrainReport:
    """Subtract `size` times the gradient from all trained parameters; each must have one."""
    loss = objective.loss(objective.predict(model, batch))
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(
        loss.optimized / loss.num_targets, list(factors.values()), allow_unused=True
    )
    assert all(gradient is not None for gradient in gradients)
    with torch.no_grad():
        for factor, gradient in zip(factors.values(), gradients, strict=True):
            factor -= size * gradient
    value = float(loss.nll.detach()) / loss.num_targets
    on_step(1, 1, value)
    return TrainReport(value, value, value, num_steps=1, num_tokens=loss.num_targets)


def run_family(family: str, folder: Path) -> Family:
    """Train and export a family's tiny model, check the exports, and record the result.

    Raises:
        AssertionError: If an export is another model than the other, or than it should be.
    """
    model = make_model(family)
    modules = find_linear_modules(model)
    base = folder / "base"
    model.save_pretrained(base)
    tokenizer().save_pretrained(base)
    adapted: list[str] = []
    left_out: list[str] = []
    refused = ""
    try:
        targets = choose_targets(modules, None, rank=RANK)
        adapted = summarize(targets.modules)
        left_out = summarize_left_out(choose_targets(modules, "all-linear", rank=RANK).left_out)
        _train_and_export(model, folder)
    except FedMomentumError as error:
        # A training that fails is a bug, not a refusal.
        assert "usable update" not in str(error), error
        refused = reason(error, base)
    return Family(
        family=family,
        kind=type(model).__name__,
        adapted=[] if refused else adapted,
        is_peft_default=not refused and _is_peft_default(modules, targets.names),
        left_out=[] if refused else left_out,
        refused=refused,
    )


def _is_peft_default(modules: LinearModules, names: tuple[str, ...]) -> bool:
    return modules.default is not None and (
        isinstance(modules.default, str) or list(names) == modules.default
    )


def reason(error: FedMomentumError, base: Path) -> str:
    """A refusal message without what differs from run to run."""
    text = str(error).replace(f" in {base}", "").replace(str(base), "its directory")
    return re.sub(r" \((by|they differ by) [^)]*\)", "", text)


def _train_and_export(model: Any, folder: Path) -> None:
    config = tiny_config(
        folder,
        num_clients=2,
        lora={"rank": RANK, "lora-alpha": 6.0, "target-modules": []},
        data={"max-length": 60},
        federation={"num-rounds": 2},
        evaluation={"every": 0},
    )
    start(config, folder / "run", function=one_step)
    result = open_result(folder / "run").model
    base = folder / "base"
    export_adapter(result, folder / "adapter", base_directory=base)
    export_merged(result, folder / "merged", base_directory=base)

    # Stock libraries alone, from here on.
    with torch.no_grad():
        stock = type(model).from_pretrained(base).eval()
        before = stock(input_ids=TOKENS).logits
        adapted = PeftModel.from_pretrained(stock, folder / "adapter").eval()
        by_adapter = adapted(input_ids=TOKENS).logits
        merged = type(model).from_pretrained(folder / "merged").eval()
        by_merged = merged(input_ids=TOKENS).logits
    norm = by_merged.norm()
    assert (by_adapter - by_merged).norm() < TOLERANCE * norm
    assert (by_merged - before).norm() > SMALLEST_CHANGE * norm

    # All that is not adapted is as it was: vision towers, experts, embeddings.
    weights = {f"{module}.weight" for module in result.adapter.modules}
    start_state = model.state_dict()
    final_state = merged.state_dict()
    assert start_state.keys() == final_state.keys()
    for name, tensor in start_state.items():
        assert name in weights or torch.equal(tensor, final_state[name]), name
