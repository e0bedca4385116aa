"""All derived seeds: one per purpose, the same on every machine.

The formulas only differ for historical reasons. Changing a formula would change every result, so
they are kept as they are.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *names: object) -> int:
    """Return the seed for one purpose: the first 4 bytes of SHA-256("seed/name/name...")."""
    text = "/".join(map(str, (seed, *names)))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4])


def module_seed(seed: int, server_round: int, module: str) -> int:
    """Return the seed of a method's generator, one per module and round, whatever their order.

    It is the first 7 bytes of SHA-256("seed/round/module").
    """
    digest = hashlib.sha256(f"{seed}/{server_round}/{module}".encode()).digest()
    return int.from_bytes(digest[:7])


def data_seed(seed: int, purpose: int) -> int:
    """Return the seed for one purpose in the data, by NumPy's `SeedSequence([seed, purpose])`."""
    return int(np.random.SeedSequence([seed, purpose]).generate_state(1)[0])


def task_seed(seed: int, task: str) -> int:
    """Return the seed of a built-in task, by NumPy's `SeedSequence([seed, *bytes of the name])`.

    It has 31 bits, because some generators add to it and pass the sum to NumPy's 32-bit seeding.
    """
    return int(np.random.SeedSequence([seed, *task.encode()]).generate_state(1)[0] >> 1)
