"""A download from the hub holds the weights once, in the form that transformers reads."""

from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from fedmomentum.base_model.hub import resolve_base, resolve_given_base
from fedmomentum.errors import ModelError

REPOSITORY = [
    ".gitattributes",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "consolidated.safetensors",
    "consolidated-00001-of-00002.safetensors",
    "generation_config.json",
    "metal/model.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.fp16.safetensors",
    "model.safetensors.index.json",
    "modeling_own.py",
    "onnx/config.json",
    "original/consolidated.00.pth",
    "original/model-00001-of-00001.safetensors",
    "original/tokenizer.model",
    "params.json",
    "pytorch_model.bin",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]


def test_weights_are_downloaded_once(monkeypatch, tmp_path):
    downloaded: list[str] = []

    def fake_download(name, *, revision, allow_patterns, ignore_patterns):
        assert (name, revision) == ("lab/model", "v2")
        downloaded.extend(
            filter_repo_objects(
                REPOSITORY, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_download)
    assert resolve_base("lab/model", "v2") == Path(tmp_path)
    assert downloaded == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "params.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_a_revision_is_a_part_of_the_name_on_the_command_line_and_a_key_in_a_configuration(hub):
    repository = hub.add("lab/model", {"config.json": b"1", "model.safetensors": b"1"})
    repository.refs["v1"] = repository.refs["main"]
    repository.commit({"config.json": b"2", "model.safetensors": b"2"})
    for text, revision, expected in (
        ("lab/model", None, b"2"),
        ("lab/model", "v1", b"1"),
        ("lab/model@v1", None, b"1"),
        ("lab/model@v1", "main", b"1"),
    ):
        directory = resolve_given_base(text, revision)
        assert (directory / "model.safetensors").read_bytes() == expected, (text, revision)
    with pytest.raises(ModelError, match=r"'lab/model@v1': the revision .*model\.revision"):
        resolve_base("lab/model@v1")
    with pytest.raises(ModelError, match=r"base model 'lab/model' .*has no revision 'v9'; give a"):
        resolve_given_base("lab/model@v9")
    with pytest.raises(
        ModelError, match=r"neither a directory nor .* no repository lab/none.*path"
    ):
        resolve_base("lab/none")
