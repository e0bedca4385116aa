"""Score programs that a model writes: the function that task files may name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmomentum.benchmark.sandbox import run_program

COLUMNS = ("prompt", "test", "entry_point")
"""What a row of such a task holds: the start of the program, `check(candidate)`, and the name."""


def pass_at_1(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Return 1 if the program passes its tests in the sandbox, else 0.

    Args:
        document: A row with `COLUMNS`, as HumanEval has them.
        answers: What the model wrote after the prompt, as the only item.
    """
    program = f"{document['prompt']}{answers[0]}\n{document['test']}\n"
    return {"pass_at_1": float(run_program(f"{program}check({document['entry_point']})\n"))}
