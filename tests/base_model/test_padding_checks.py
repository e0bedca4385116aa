"""A model whose loss would depend on the padding of its batch is refused by name."""

import pytest
import torch

from fedmomentum.base_model.classifier import set_pad_token
from fedmomentum.base_model.loading import load_base, load_tokenizer
from fedmomentum.base_model.padding_checks import (
    refuse_padding_dependence,
    refuse_padding_dependent_classifier,
)
from fedmomentum.client.loaded_base import LoadedBase
from fedmomentum.config.schema import CLASSIFICATION, ModelConfig
from fedmomentum.errors import ModelError
from tests.classifier_families import write_base
from tests.classifiers import LABELS, tiny_base
from tests.families import make_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma", "bart"])
def test_a_model_that_reads_padding_is_refused_when_it_is_loaded(family, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is padded.*share a batch"):
        load_base(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba", "qwen3_next", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_masks_padding_is_accepted(family, dtype, tmp_path):
    refuse_padding_dependence(tmp_path, make_model(family).to(dtype))


# ── classifiers ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["fnet", "xlnet"])
def test_a_classifier_that_reads_padding_is_refused_when_it_is_loaded(family, tmp_path):
    write_base(family, tmp_path)
    config = ModelConfig(str(tmp_path), task=CLASSIFICATION, dtype="float32", device="cpu")
    with pytest.raises(ModelError, match="is padded.*share a batch"):
        LoadedBase.from_config(config, LABELS)


@pytest.mark.parametrize("kind", ["bert", "deberta", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_classifier_that_masks_padding_is_accepted(kind, dtype, tmp_path):
    directory = tiny_base(tmp_path, kind)
    model = load_base(directory, dtype, CPU, labels=LABELS)
    set_pad_token(model, load_tokenizer(directory))
    refuse_padding_dependent_classifier(directory, model)
