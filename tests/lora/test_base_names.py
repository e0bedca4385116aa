"""Adapters from other tools: one base under several names is asked for once, others are refused."""

import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedmomentum.aggregation.registry import build_method
from fedmomentum.errors import AdapterError, ConfigError
from fedmomentum.lora.base_names import base_and_revision, with_base
from fedmomentum.lora.peft_folder import read_adapter
from fedmomentum.run.aggregate import aggregate_directories
from tests.lora import adapter_cases
from tests.lora.adapter_cases import COMMIT, HUB_NAME, write_adapter
from tests.tiny import tiny_gpt2, tiny_llama


def test_adapters_of_other_tools_are_combined_need_an_option_or_are_refused():
    found = adapter_cases.results()
    for case, alone, helped in found:
        assert case.outcome in alone, (case.title, alone)
        if case.base:
            asked = f"--base {HUB_NAME}@REVISION" if "@" in case.base else "--base NAME"
            assert asked in alone and helped == "combined", (case.title, alone, helped)
    text = adapter_cases.PAGE.read_text()
    assert adapter_cases.MARKS[0] in text
    assert adapter_cases.page(text, found) == text, "run: python -m tests.lora.adapter_cases"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base"))


def test_names_of_one_base_are_the_same(base, tmp_path):
    adapter = read_adapter(write_adapter(base, tmp_path / "a", {}))
    assert base_and_revision(adapter) == (HUB_NAME, "main")
    os.symlink(base, tmp_path / "link")
    for name in (str(base), f"{base}/", str(tmp_path / "link"), os.path.relpath(base)):
        assert base_and_revision(with_base(adapter, name, "")) == (os.path.realpath(base), "")
    cached = f"/x/hub/models--org--model/snapshots/{COMMIT}"
    assert base_and_revision(with_base(adapter, cached, "")) == (HUB_NAME, COMMIT)
    cached_adapter = with_base(adapter, cached, "")
    assert base_and_revision(with_base(cached_adapter, HUB_NAME, "")) == (HUB_NAME, COMMIT)
    # another base has another revision
    named = with_base(with_base(adapter, "", COMMIT), "org/other", "")
    assert base_and_revision(named) == ("org/other", "main")


def test_the_named_base_is_recorded_in_the_result_and_must_fit(base, tmp_path):
    directories = [
        write_adapter(base, tmp_path / "a", {}),
        write_adapter(base, tmp_path / "b", {"base_model_name_or_path": "/elsewhere"}),
    ]
    method = build_method("fedmomentum", {})
    model = aggregate_directories(directories, method, base=str(base)).model
    assert model.base.name == str(base) and model.base.revision is None
    assert model.adapter.config["base_model_name_or_path"] == str(base)
    model = aggregate_directories(directories, method, base=f"{HUB_NAME}@{COMMIT}").model
    assert (model.base.name, model.base.revision) == (HUB_NAME, COMMIT)
    # The revision that the adapters name is kept.
    for number in ("a", "b"):
        named = {"base_model_name_or_path": HUB_NAME, "revision": COMMIT}
        write_adapter(base, tmp_path / f"{number}2", named)
    model = aggregate_directories([tmp_path / "a2", tmp_path / "b2"], method, base=HUB_NAME).model
    assert (model.base.name, model.base.revision) == (HUB_NAME, COMMIT)
    other = tiny_gpt2(tmp_path / "gpt2")
    with pytest.raises(
        AdapterError, match=r"a adapts model.layers.0.* of another model than --base"
    ):
        aggregate_directories(directories, method, base=str(other))
    narrow = tiny_llama(tmp_path / "wide", width=64)
    with pytest.raises(AdapterError, match="has as 64 x 64"):
        aggregate_directories(directories, method, base=str(narrow))


def test_a_base_with_a_tied_head_has_the_head_that_adapters_change(tmp_path):
    """transformers lists the shared weight under the name of the embeddings only."""
    base = tiny_gpt2(tmp_path / "gpt2")
    adapters = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["c_proj", "lm_head"], fan_in_fan_out=True)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(tmp_path / str(seed), save_embedding_layers=False)
        adapters.append(tmp_path / str(seed))
    method = build_method("fedmomentum", {})
    model = aggregate_directories(adapters, method, base=str(base)).model
    assert "lm_head" in model.adapter.modules


@pytest.mark.parametrize("typo", ["./typo", "/no/where", "../typo", "~/typo", "a/b/c", "FILE"])
def test_a_base_that_is_no_directory_is_refused(base, tmp_path, typo):
    """Else adapters of two bases would be combined: their own names are no longer compared."""
    (tmp_path / "file.jsonl").write_text("{}")
    typo = typo.replace("FILE", str(tmp_path / "file.jsonl"))
    folder = write_adapter(base, tmp_path / "a", {})
    other = write_adapter(base, tmp_path / "b", {"base_model_name_or_path": "/elsewhere"})
    with pytest.raises(ConfigError, match="does not exist|is no directory"):
        aggregate_directories([folder, other], build_method("fedmomentum", {}), base=typo)


def test_a_name_on_the_hub_is_not_checked_and_said_so(base, tmp_path, caplog):
    folder = write_adapter(base, tmp_path / "a", {})
    aggregate_directories([folder, folder], build_method("fedmomentum", {}), base="org/name")
    assert "org/name is no directory here, so whether the adapters fit it" in caplog.text


def test_an_unknown_field_is_refused_unless_it_is_empty(base, tmp_path):
    directory = write_adapter(base, tmp_path / "a", {"unsloth_tomorrow": None, "other": False})
    read_adapter(directory)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "unsloth_tomorrow": 2}))
    with pytest.raises(AdapterError, match="has unsloth_tomorrow = 2"):
        read_adapter(directory)
