"""A model whose loss would depend on the padding of its batch is refused by name."""

import pytest
import torch

from fedmomentum.base_model.loading import load_base
from fedmomentum.base_model.padding_checks import refuse_padding_dependence
from fedmomentum.errors import ModelError
from tests.families import make_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma", "bart"])
def test_a_model_that_reads_padding_is_refused_when_it_is_loaded(family, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is padded.*share a batch"):
        load_base(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba", "qwen3_next", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_masks_padding_is_not(family, dtype, tmp_path):
    refuse_padding_dependence(tmp_path, make_model(family).to(dtype))
