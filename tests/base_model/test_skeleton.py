"""Models without memory: a failure in one is raised, and torch logs nothing beside it."""

import logging
from contextlib import AbstractContextManager
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fedmomentum.base_model.skeleton import load_skeleton
from tests.tiny import tiny_llama


def fail_within(mode: AbstractContextManager[object]) -> int:
    """Run in a mode what cannot be run without memory; return how many lines torch logs."""
    handler = BufferingHandler(capacity=100)
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    storage = torch.ones(3).untyped_storage()
    try:
        with pytest.raises(RuntimeError), mode:
            torch.empty(0).set_(storage)
    finally:
        logger.removeHandler(handler)
    return len(handler.buffer)


def test_a_failure_is_raised_and_not_logged(tmp_path: Path) -> None:
    skeleton = load_skeleton(tiny_llama(tmp_path))
    assert fail_within(skeleton.active()) == 0
    # Outside, torch logs as it always does.
    assert fail_within(FakeTensorMode()) == 1


def test_new_tensors_have_no_memory_within_the_block_only(tmp_path: Path) -> None:
    skeleton = load_skeleton(tiny_llama(tmp_path))
    with skeleton.active():
        assert type(torch.ones(2)) is not torch.Tensor
    assert type(torch.ones(2)) is torch.Tensor
