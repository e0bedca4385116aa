"""Matching `lora.target-modules` against a module's path, without the model, which servers lack."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

Span = tuple[int, int]
"""Start and end of a part of an expression."""
ALL_LINEAR = "all-linear"
ATTENTION = "attention"
# Common names of attention: in a part of the path, or of the projection itself.
_ATTENTION_PART = re.compile(r"(?!\w*norm)\w*(attn|attention|self_att)\w*")
_ATTENTION_NAME = re.compile(r"([qkvo]|qkv|kv|query|key|value)_proj|query_key_value|Wqkv")


def is_target(module: str, setting: Sequence[str] | str) -> bool:
    """Return whether a setting includes a module, judging by its path alone."""
    if not isinstance(setting, str):
        return any(is_called(module, name) for name in setting)
    if setting in ("", ALL_LINEAR):
        return True
    if setting == ATTENTION:
        *owners, name = module.split(".")
        has_part = any(_ATTENTION_PART.fullmatch(owner) for owner in owners)
        return has_part or bool(_ATTENTION_NAME.fullmatch(name))
    return re.fullmatch(setting, module) is not None


def is_called(path: str, name: str) -> bool:
    """Return whether a name in PEFT's lists refers to the module or parameter at this path."""
    return path == name or path.endswith(f".{name}")


# ── parts of an expression ────────────────────────────────────────────────────────────────────────


def alternatives(expression: str) -> Iterator[str]:
    """Yield the expression, and then a version for each branch of each `(a|b)`, with only that one.

    Otherwise a branch that matches nothing would go unnoticed next to one that matches.
    """
    yield expression
    groups = _groups(expression)
    for group in groups:
        branches = _branches(expression, group)
        for branch in branches if len(branches) > 1 else ():
            yield _with_branch(expression, groups, group, branch)


def _with_branch(expression: str, groups: Sequence[Span], group: Span, branch: Span) -> str:
    """Reduce a group to one of its branches, and each enclosing group to the branch around it."""
    start, end = group
    text = expression[branch[0] : branch[1]]
    around = [other for other in groups if other[0] < start and end < other[1]]
    for outer in [group, *sorted(around, key=lambda other: other[1] - other[0])]:
        if outer != group:
            first, last = next(
                span for span in _branches(expression, outer) if span[0] <= start <= span[1]
            )
            text = expression[first:start] + text + expression[end:last]
        # Only the first branch begins with the group's prefix, such as `?:`.
        kind = re.match(r"\?(:|P<\w+>)", expression[outer[0] : outer[1]])
        if kind and not text.startswith(kind[0]):
            text = kind[0] + text
        start, end = outer
    return expression[:start] + text + expression[end:]


def _groups(expression: str) -> list[Span]:
    """Return the span of each group's content, and the span of the whole expression.

    Lookaround groups are left out: their branches need not match.
    """
    found = [(0, len(expression))]
    openings: list[int] = []
    for at, character in _syntax(expression):
        if character == "(":
            openings.append(at + 1)
        elif character == ")" and openings:
            start = openings.pop()
            if not re.match(r"\?(<?[=!]|\(|#)", expression[start:at]):
                found.append((start, at))
    return found


def _branches(expression: str, group: Span) -> list[Span]:
    """Return the branches of a group, separated by its own `|`."""
    start, end = group
    cuts = [start - 1]
    depth = 0
    for at, character in _syntax(expression):
        if start <= at < end:
            depth += {"(": 1, ")": -1}.get(character, 0)
            if character == "|" and depth == 0:
                cuts.append(at)
    return [(cut + 1, next_cut) for cut, next_cut in zip(cuts, [*cuts[1:], end], strict=True)]


def _syntax(expression: str) -> Iterator[tuple[int, str]]:
    """Yield the parentheses and bars that are neither escaped nor in a character class."""
    is_class = False
    at = 0
    while at < len(expression):
        character = expression[at]
        if character == "\\":
            at += 1
        elif is_class:
            is_class = character != "]"
        elif character == "[":
            is_class = True
        elif character in "()|":
            yield at, character
        at += 1
