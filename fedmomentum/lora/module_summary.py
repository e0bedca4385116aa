"""Human-readable summaries of module paths, grouped over layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from fedmomentum.lora.module_names import EMBEDDING, split_expert


def summarize(modules: Iterable[str]) -> list[str]:
    """Summarize module paths over layers, with counts.

    For example, `model.layers.*.self_attn: 16 q_proj, 16 v_proj`.
    """
    counts: dict[str, Counter[str]] = {}
    for module in modules:
        # The experts of a parameter are counted like layers.
        path = split_expert(module)[0].removesuffix(EMBEDDING)
        owner, _, name = path.rpartition(".")
        pattern = re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", owner)
        counts.setdefault(pattern, Counter())[name] += 1
    lines = []
    for owner, names in counts.items():
        listed = ", ".join(f"{number} {name}" for name, number in names.items())
        lines.append(f"{owner}: {listed}" if owner else listed)
    return lines


def summarize_left_out(left_out: Mapping[str, str]) -> list[str]:
    """Summarize the modules that are not adapted, by reason."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in left_out.items():
        by_reason.setdefault(reason, []).append(path)
    lines = []
    for reason, paths in by_reason.items():
        lines.append(f"{'; '.join(summarize(paths))} ({reason})")
    return lines
