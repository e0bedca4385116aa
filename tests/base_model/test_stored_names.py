"""Stored names are found as transformers finds them."""

import pytest
import torch
from safetensors import safe_open

from fedmomentum.base_model.loading import load_base
from fedmomentum.base_model.stored_names import find_stored_names
from fedmomentum.base_model.weights import Float32Weights
from fedmomentum.errors import ModelError
from tests.families import make_model

MODULE = "model.language_model.layers.1.self_attn.q_proj"
STORED = "language_model.model.layers.1.self_attn.q_proj.weight"


def test_an_image_text_checkpoint_names_its_language_model_otherwise(tmp_path):
    make_model("gemma3").save_pretrained(tmp_path)
    model = load_base(tmp_path, torch.float32, torch.device("cpu"))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = list(file.keys())
        weight = file.get_tensor(STORED)
    assert find_stored_names(model, stored, [f"{MODULE}.weight"]) == {f"{MODULE}.weight": STORED}
    layers = {MODULE: model.get_submodule(MODULE)}
    weights = Float32Weights(layers, tmp_path, model=model)
    assert torch.equal(weights.pretrained(MODULE), weight)


def test_tensors_that_transformers_merges_have_no_stored_name(tmp_path):
    make_model("qwen3_moe").save_pretrained(tmp_path)
    model = load_base(tmp_path, torch.float32, torch.device("cpu"))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = list(file.keys())
    parameter = "model.layers.0.mlp.experts.gate_up_proj"
    query = "model.layers.0.self_attn.q_proj.weight"
    assert find_stored_names(model, stored, [parameter, query]) == {query: query}


def test_a_checkpoint_whose_tensors_are_split_is_refused_with_advice_that_works(tmp_path):
    """HRM's checkpoints hold the gate and up projections in one tensor, its model in two."""
    path = "model.H_module.layers.0.mlp.gate_proj"
    family = make_model("hrm_text")

    def read(folder, **arguments):
        family.save_pretrained(folder, **arguments)
        model = load_base(folder, torch.float32, torch.device("cpu"))
        return Float32Weights({path: model.get_submodule(path)}, folder, model=model)

    with pytest.raises(ModelError, match=f"no tensor for {path}.weight.*original_format"):
        read(tmp_path / "original")
    weights = read(tmp_path / "split", save_original_format=False)
    assert torch.equal(weights.pretrained(path), family.get_submodule(path).weight)
