"""An adapter by its name on the hub is the adapter that was uploaded, and nothing else is read."""

import pytest
import torch
from safetensors.torch import save_file

from fedmomentum.errors import AdapterError, HubError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import Adapter, to_tensors
from fedmomentum.lora.hub_adapter import find_adapter
from fedmomentum.lora.peft_folder import read_adapter, write_adapter
from tests.hub_double import OWNER

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter of scaling 2.5, with a tokenizer's template beside it."""
    path = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(0)
    matrix = LowRank(*(torch.randn(size, generator=generator) for size in ((6, 2), (2, 8))))
    config = {"base_model_name_or_path": "org/base", "revision": "v3", "task_type": "CAUSAL_LM"}
    write_adapter(Adapter({MODULE: matrix}, {MODULE: 2.5}, {}, config, "a"), path)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_it_is_the_same_by_name_by_revision_and_from_the_cache(hub, folder, monkeypatch):
    from huggingface_hub import constants

    repository = hub.add(f"{OWNER}/adapter", files_of(folder), private=True)
    repository.refs["v1"] = repository.refs["main"]
    repository.commit({"README.md": b"emptied"})
    local = read_adapter(folder)
    found = read_adapter(f"{OWNER}/adapter@v1")
    assert found.name == f"{OWNER}/adapter@v1" and found.scalings == {MODULE: 2.5}
    assert found.config == local.config and found.digest() == local.digest()
    for name, tensor in to_tensors(local).items():
        assert torch.equal(to_tensors(found)[name], tensor)
    assert (find_adapter(f"{OWNER}/adapter@v1") / "chat_template.jinja").is_file()
    with pytest.raises(AdapterError, match=r"adapter on the hub has no adapter_config.json, but R"):
        read_adapter(f"{OWNER}/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_adapter(f"{OWNER}/adapter@v1").digest() == local.digest()


def test_no_pickle_no_code_and_no_other_weights_are_downloaded(hub, folder):
    extra = {
        "adapter_model.bin": b"pickle",
        "optimizer.pt": b"pickle",
        "custom_generate.py": b"code",
        "model.safetensors": b"a base",
        "checkpoint-10/adapter_model.safetensors": b"older",
        "README.md": b"",
    }
    hub.add("org/adapter", {**files_of(folder), **extra})
    directory = find_adapter("org/adapter")
    there = sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
    assert there == ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"]
    assert not [request for request in hub.requests if request.path.rpartition("/")[2] in extra]


def test_a_repository_without_an_adapter_is_refused_with_what_it_holds(hub, folder):
    files = files_of(folder)
    config = {"adapter_config.json": files["adapter_config.json"]}
    hub.add("org/pickled", {**config, "adapter_model.bin": b"x"})
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": b"x"})
    hub.add("org/half", config)
    hub.add("org/empty", {".gitattributes": b""})
    cases = {
        "org/pickled": "org/pickled on the hub: the weights are in adapter_model.bin, a pickle",
        "org/model": "no adapter_config.json, but .*; it is a model, not an adapter. Give the rep",
        "org/half": "org/half on the hub has no adapter_model.safetensors, but adapter_config.json",
        "org/empty": "org/empty on the hub has no adapter_config.json, but .gitattributes",
    }
    for name, expected in cases.items():
        with pytest.raises(AdapterError, match=expected):
            read_adapter(name)
    with pytest.raises(HubError, match=r"^there is no directory org/none, and the hub has no repo"):
        read_adapter("org/none")
    with pytest.raises(HubError, match=r"^the adapter of x: there is no directory org/none, and"):
        read_adapter("org/none", name="the adapter of x")


def test_weights_from_the_hub_are_checked_like_local_ones(hub, folder):
    files = files_of(folder)
    hub.add("org/cut", {**files, "adapter_model.safetensors": b"cut"})
    with pytest.raises(AdapterError, match=r"^org/cut: adapter_model.safetensors cannot be read"):
        read_adapter("org/cut")
    save_file({"x": torch.zeros(2)}, folder / "other.safetensors")
    data = (folder / "other.safetensors").read_bytes()
    (folder / "other.safetensors").unlink()
    hub.add("org/other", {**files, "adapter_model.safetensors": data})
    with pytest.raises(AdapterError, match=r"^org/other: tensor x of shape \(2,\) is neither"):
        read_adapter("org/other")
