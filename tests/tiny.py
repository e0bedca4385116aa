"""Tiny, deterministic, randomly initialized models in real transformers folders: no test needs a network."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SPECIAL_TOKENS = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>")
PAD_TOKEN_ID, UNK_TOKEN_ID, START_TOKEN_ID, END_TOKEN_ID = range(4)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a character: newline and printable ASCII, after four special tokens (100 in all)."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    wrapped.chat_template = chat_template
    return wrapped


def tiny_llama(
    folder: Path, *, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE, width: int = 32
) -> Path:
    """Write a two-layer Llama (grouped queries, untied head) with its tokenizer; return the folder.

    4-bit weights are in blocks of 64, and so need a width of as many.
    """
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        pad_token_id=PAD_TOKEN_ID,
        bos_token_id=START_TOKEN_ID,
        eos_token_id=END_TOKEN_ID,
    )
    return _write(LlamaForCausalLM, config, folder, seed, chat_template)


def tiny_gpt2(folder: Path, *, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write a two-layer GPT-2 (hidden 32, absolute positions, Conv1D weights, tied head); return the folder."""
    config = GPT2Config(
        vocab_size=100,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        initializer_range=0.1,
        pad_token_id=PAD_TOKEN_ID,
        bos_token_id=START_TOKEN_ID,
        eos_token_id=END_TOKEN_ID,
    )
    return _write(GPT2LMHeadModel, config, folder, seed, chat_template)


def tiny_moe(folder: Path, family: str, *, seed: int = 0) -> Path:
    """Write a small mixture of four experts with its tokenizer; return the folder.

    `qwen3` has a dense second layer and stores every expert by itself, as `mixtral` does under other names;
    `qwen2` has shared experts; `gpt-oss` stores stacks, transposed.
    """
    shared = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "pad_token_id": PAD_TOKEN_ID,
        "bos_token_id": START_TOKEN_ID,
        "eos_token_id": END_TOKEN_ID,
    }
    qwen = {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    if family == "qwen3":
        config = Qwen3MoeConfig(
            **shared, **qwen, num_experts=4, head_dim=8, num_hidden_layers=2, mlp_only_layers=[1]
        )
        return _write(Qwen3MoeForCausalLM, config, folder, seed, CHAT_TEMPLATE)
    if family == "qwen2":
        config = Qwen2MoeConfig(
            **shared,
            **qwen,
            num_experts=4,
            num_hidden_layers=1,
            decoder_sparse_step=1,
            shared_expert_intermediate_size=40,
        )
        return _write(Qwen2MoeForCausalLM, config, folder, seed, CHAT_TEMPLATE)
    mixture = {"intermediate_size": 24, "num_local_experts": 4, "num_hidden_layers": 1}
    if family == "mixtral":
        config = MixtralConfig(**shared, **mixture)
        return _write(MixtralForCausalLM, config, folder, seed, CHAT_TEMPLATE)
    config = GptOssConfig(**shared, **mixture, head_dim=8, num_experts_per_tok=2)
    return _write(GptOssForCausalLM, config, folder, seed, CHAT_TEMPLATE)


def _write(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    folder: Path,
    seed: int,
    chat_template: str | None,
) -> Path:
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder
