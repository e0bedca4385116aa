"""What a run sets up in its process."""

import os

import pytest
import torch

from fedmomentum.config.schema import RunConfig
from fedmomentum.errors import ConfigError
from fedmomentum.run.setup import set_up_process
from tests.runs import patch_default_split, start, tiny_config


def test_deterministic_kernels_are_used_only_on_request(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    threads = torch.get_num_threads()
    try:
        set_up_process(RunConfig(threads=threads))
        assert not torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        set_up_process(RunConfig(threads=threads, deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        set_up_process(RunConfig(threads=threads))
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def test_a_run_from_before_a_default_changed_resumes_with_its_settings_in_full(
    tmp_path, monkeypatch
):
    """The configuration says nothing of the split: then it was procrustes, now it is balanced."""
    config = tiny_config(tmp_path, federation={"num_rounds": 1})
    with monkeypatch.context() as patch:
        patch_default_split(patch, "procrustes")
        start(config, tmp_path / "run", function=None)

    longer = tiny_config(tmp_path, federation={"num_rounds": 2})
    with pytest.raises(ConfigError, match=r"made with .*procrustes.* stand for .*balanced.* now"):
        start(longer, tmp_path / "run", function=None, resume=True)
    method = {"settings": {"split": "singular"}}
    other = tiny_config(tmp_path, federation={"num_rounds": 2}, method=method)
    with pytest.raises(ConfigError, match=r"other settings; these differ: method.settings"):
        start(other, tmp_path / "run", function=None, resume=True)
    method = {"settings": {"split": "procrustes"}}
    same = tiny_config(tmp_path, federation={"num_rounds": 2}, method=method)
    resumed = start(same, tmp_path / "run", function=None, resume=True)
    assert resumed.model.server_round == 2 and "procrustes" in resumed.model.method
    # And from then on its own configuration says so.
    assert "procrustes" in (tmp_path / "run" / "config.toml").read_text()
