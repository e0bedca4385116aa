"""Scores programs written by a model: the function that task files may name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmomentum.benchmark.sandbox import run_program

COLUMNS = ("prompt", "test", "entry_point")
"""A row's columns: the start of the program, the tests `check(candidate)`, and the name to test."""


def pass_at_1(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Return 1 if the program passes its tests in the sandbox, otherwise 0.

    Args:
        document: A row with `COLUMNS`, as in HumanEval.
        answers: The model's continuation of the prompt, as the only item.
    """
    program = f"{document['prompt']}{answers[0]}\n{document['test']}\n"
    return {"pass_at_1": float(run_program(f"{program}check({document['entry_point']})\n"))}
