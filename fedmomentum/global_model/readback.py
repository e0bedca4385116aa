"""Check that an export reproduces the run's model: load it with stock libraries, compare logits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmomentum.base_model.library_errors import translate_library_errors
from fedmomentum.base_model.load_checks import max_positions, vocabulary_size
from fedmomentum.errors import ModelError
from fedmomentum.utils.modules import compute_logits

# Enough for attention to matter, and few enough for any model's context.
NUM_TOKENS = 16
# The largest difference of an export's logits in each dtype from the run's, relative to their norm.
#
# In float32, only the order of sums differs. In 16 bits the weights themselves are rounded, and
# this bounds the effect of that; a separate check with float32's tolerance ensures that nothing but
# rounding happened.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
# Lower bound on the norm that differences are divided by, in case all logits are zero.
SMALLEST_NORM = 1e-12


def probe_tokens(model: Any) -> Tensor:
    """Return one fixed row of tokens that the model can embed."""
    positions, _ = max_positions(model)
    num_tokens = min(NUM_TOKENS, positions or NUM_TOKENS)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary_size(model) or 2, (1, num_tokens), generator=generator)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """Return the model's logits in float64 on the CPU, minus their mean over the vocabulary.

    Adding a constant to all logits of a position does not change any probability.
    """
    with translate_library_errors("the model cannot compute", {}), torch.no_grad():
        logits = compute_logits(model, tokens).double().cpu()
    if logits.shape[-1] == 1:
        return logits
    return logits - logits.mean(dim=-1, keepdim=True)


def check_logits(logits: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> float:
    """Refuse logits that differ from the expected ones by more than the dtype's tolerance.

    Args:
        logits: The logits of the exported model.
        expected: The logits of the run's model.
        dtype: The dtype that determines the tolerance.
        what: The beginning of the message.

    Returns:
        The difference, as a fraction of the expected logits' norm.

    Raises:
        ModelError: If they differ, or are not finite.
    """
    if logits.shape != expected.shape:
        raise ModelError(
            f"{what}: its logits have shape {tuple(logits.shape)}, those of the run "
            f"{tuple(expected.shape)}"
        )
    difference = float((logits - expected).norm() / expected.norm().clamp(min=SMALLEST_NORM))
    if not difference <= TOLERANCES[dtype]:  # also if it is NaN
        raise ModelError(
            f"{what}: on {expected.shape[1]} tokens its logits differ from those of the run's "
            f"model by {difference:.3g} of their norm; at most {TOLERANCES[dtype]:g} is expected "
            f"for {str(dtype).removeprefix('torch.')}. Nothing was exported"
        )
    return difference


# ── complete or absent ────────────────────────────────────────────────────────────────────────────


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `out` if the block succeeds.

    Otherwise it is removed, so an interrupted export leaves nothing under the requested name.
    """
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.incomplete")
    if target.is_dir() and not os.access(target.parent, os.W_OK):
        temporary = target / temporary.name
    shutil.rmtree(temporary, ignore_errors=True)  # left by an export that was killed
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, target: Path) -> None:
    """Rename a directory, replacing an empty one; if that fails, move its entries one by one."""
    try:
        temporary.replace(target)
    except OSError:
        if not target.is_dir():
            raise
        others = [file.name for file in target.iterdir() if file != temporary]
        if others:
            raise ModelError(
                f"{target} was empty when the export began and now holds {others[0]}; nothing was "
                "exported"
            ) from None
        # Move the configuration last: without it, a directory is not a model or adapter.
        files = sorted(temporary.iterdir(), key=lambda file: file.name.endswith("config.json"))
        for file in files:
            shutil.move(file, target / file.name)
    sync_tree(target)


def sync_tree(directory: Path) -> None:
    """Flush a directory, all its files and its parent's entry to disk."""
    for path in [*directory.rglob("*"), directory, directory.parent]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
