"""Whether what was exported is the run's model: loaded from its directory by stock libraries, its answers compared."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmomentum.errors import ModelError
from fedmomentum.loaded import answers, max_positions, told_by_name, vocabulary_size

NUM_TOKENS = 16
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Largest difference of the logits of an export in that dtype from the run's, as a fraction of their norm.

In float32 only the order of sums differs. In 16 bits the weights themselves are rounded, and this is a bound on what
that may do to the model; that nothing but rounding happened is checked to float32's tolerance.
"""


def probe_tokens(model: Any) -> Tensor:
    """Return a few tokens that the model can embed, always the same: one row."""
    positions, _ = max_positions(model)
    size = min(NUM_TOKENS, positions or NUM_TOKENS)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary_size(model) or 2, (1, size), generator=generator)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """Return the model's answers to the tokens, in float64 on the CPU, less their mean over the vocabulary.

    A constant added to all logits of a place changes nothing that is made of them.
    """
    with told_by_name("the model cannot compute", {}), torch.no_grad():
        logits = answers(model, tokens).double().cpu()
    return logits - logits.mean(dim=-1, keepdim=True) if logits.shape[-1] > 1 else logits


def check_logits(got: Tensor, wanted: Tensor, dtype: torch.dtype, what: str) -> float:
    """Refuse answers that differ from the wanted ones by more than the dtype's tolerance.

    Args:
        got: What the exported model answers.
        wanted: What the run's model answers.
        dtype: Decides the tolerance.
        what: How to begin the message.

    Returns:
        The difference, as a fraction of the wanted logits' norm.

    Raises:
        ModelError: If they differ, or are not finite.
    """
    if got.shape != wanted.shape:
        raise ModelError(f"{what}: its logits are of shape {tuple(got.shape)}, those of the run {tuple(wanted.shape)}")
    difference = float((got - wanted).norm() / wanted.norm().clamp(min=1e-12))
    if not difference <= TOLERANCES[dtype]:  # also where it is NaN
        raise ModelError(
            f"{what}: on {wanted.shape[1]} tokens its logits differ from those of the run's model by {difference:.3g} "
            f"of their norm; at most {TOLERANCES[dtype]:g} is right for {str(dtype).removeprefix('torch.')}. Nothing "
            "was exported"
        )
    return difference


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Give a directory beside `out` to write in, which becomes `out` when the block ends well, and is removed if not.

    So an interrupted export leaves nothing under the name that was asked for.
    """
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.incomplete")
    if target.is_dir() and not os.access(target.parent, os.W_OK):
        aside = target / aside.name
    shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
    aside.mkdir()
    try:
        yield aside
        sync_tree(aside)
        _move(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move(aside: Path, target: Path) -> None:
    """Rename a directory, over an empty one if there is one; entry by entry where that is a mount point."""
    try:
        aside.replace(target)
    except OSError:
        if not target.is_dir():
            raise
        if others := [file.name for file in target.iterdir() if file != aside]:
            raise ModelError(
                f"{target} was empty when the export began and now holds {others[0]}; nothing was exported"
            ) from None
        # A directory without its configuration is no model and no adapter: that comes last.
        for file in sorted(aside.iterdir(), key=lambda file: file.name.endswith("config.json")):
            shutil.move(file, target / file.name)
    sync_tree(target)


def sync_tree(folder: Path) -> None:
    """Have the disk hold a directory's files before it goes by its name."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
