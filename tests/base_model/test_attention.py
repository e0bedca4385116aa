"""How attention is computed, where the user chooses."""

import pytest
import torch

from fedmomentum.base_model.attention import set_attention
from fedmomentum.base_model.loading import load_base
from fedmomentum.errors import ModelError
from tests.tiny import tiny_llama


def test_attention_is_computed_as_configured(tmp_path):
    """Both ways give the same logits, so that one is really another way."""
    directory = tiny_llama(tmp_path)
    model = load_base(directory, torch.float32, torch.device("cpu"))
    tokens = torch.arange(10)[None] + 5
    before = model.config._attn_implementation
    set_attention(model, "auto")
    assert model.config._attn_implementation == before
    logits = {}
    for attention in ("eager", "sdpa"):
        set_attention(model, attention)
        assert model.config._attn_implementation == attention
        logits[attention] = model(tokens).logits
    assert torch.allclose(logits["eager"], logits["sdpa"], rtol=1e-4, atol=1e-6)


def test_flash_attention_on_a_cpu_is_refused(tmp_path):
    model = load_base(tiny_llama(tmp_path), torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ModelError, match="flash_attention_2.*needs a GPU and 16 bits; this is cpu"):
        set_attention(model, "flash_attention_2")
