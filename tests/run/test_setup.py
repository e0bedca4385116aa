"""What a run sets up in its process."""

import os

import torch

from fedmomentum.config.schema import RunConfig
from fedmomentum.run.setup import set_up_process


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
