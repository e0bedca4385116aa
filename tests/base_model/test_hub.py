"""A download from the hub holds the weights once, in the form that transformers reads."""

from pathlib import Path

from huggingface_hub.utils import filter_repo_objects

from fedmomentum.base_model.hub import resolve_base

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
