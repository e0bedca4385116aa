"""Adapters that are combined outside of a run must fit the base model that is named for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedmomentum.errors import AdapterError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import Adapter
from fedmomentum.lora.peft_folder import read_adapter
from fedmomentum.run.aggregate import check_shapes
from tests.tiny import tiny_gpt2, tiny_llama, tiny_moe

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral", "gpt-oss"])
def base(request, tmp_path_factory):
    """Return the directory of a small model."""
    directory = tmp_path_factory.mktemp("base") / request.param
    makers = {"llama": tiny_llama, "gpt2": tiny_gpt2}
    if request.param in makers:
        return makers[request.param](directory)
    return tiny_moe(directory, request.param)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Return an adapter of linear modules, the embedding and any experts, made by stock PEFT."""
    is_mixture = base.name in ("mixtral", "gpt-oss")
    linear = ["c_attn", "c_fc", "wte"] if base.name == "gpt2" else ["q_proj", "embed_tokens"]
    config = LoraConfig(
        r=2,
        target_modules=linear,
        target_parameters=EXPERTS if is_mixture else None,
        fan_in_fan_out=base.name == "gpt2",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    directory = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(directory, save_embedding_layers=False)
    return read_adapter(directory)


def changed(adapter: Adapter, name: str, matrix: LowRank) -> Adapter:
    """Return the adapter with one other matrix."""
    return replace(adapter, modules={**adapter.modules, name: matrix}, name="site")


def test_an_adapter_fits_its_own_base(base, adapter):
    assert any(name.endswith("[embedding]") for name in adapter.modules)
    check_shapes([adapter], base)


def test_any_matrix_of_another_size_is_refused_with_both_sizes(base, adapter):
    """Also if the sides are exchanged."""
    for name, matrix in adapter.modules.items():
        rows, columns = matrix.shape
        sizes = [(rows + 1, columns), (rows, columns + 1)]
        if rows != columns:
            sizes.append((columns, rows))
        for size in sizes:
            other = LowRank(torch.zeros(size[0], 2), torch.zeros(2, size[1]))
            with pytest.raises(AdapterError) as caught:
                check_shapes([adapter, changed(adapter, name, other)], base)
            message = str(caught.value)
            assert f"site adapts {name} ({size[0]} x {size[1]})" in message
            assert f"{base} has as {rows} x {columns};" in message


def test_a_matrix_that_the_base_does_not_have_is_refused(base, adapter):
    first = next(iter(adapter.modules.values()))
    for name in ("other", "other[embedding]", "other[0]", "lm_head[0]"):
        with pytest.raises(AdapterError, match="site adapts .* does not have"):
            check_shapes([changed(adapter, name, first)], base)


@pytest.mark.parametrize("base", ["mixtral", "gpt-oss"], indirect=True)
def test_another_number_of_experts_is_refused(base, adapter):
    fewer = {name: matrix for name, matrix in adapter.modules.items() if "[3]" not in name}
    with pytest.raises(AdapterError, match="adapts 3 experts of .*, of which .* has 4"):
        check_shapes([replace(adapter, modules=fewer)], base)
    (last,) = (name for name in adapter.modules if name.endswith("down_proj[3]"))
    more = changed(adapter, last.replace("[3]", "[4]"), adapter.modules[last])
    with pytest.raises(AdapterError, match=r"down_proj\[4\] .* does not have"):
        check_shapes([more], base)
