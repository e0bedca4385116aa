"""Measure how easily the code can be skimmed: `python tools/measures.py [path ...]`.

Prints, for the package or the given paths: tokens a code line, comment lines, comprehensions,
conditional expressions and packed assignments in 1,000 code lines, the longest function, and the
longest chain of imports.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fedmomentum"
LAYOUT = {
    tokenize.NEWLINE,
    tokenize.NL,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of all lines that belong to a string standing alone."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def num_statements(function: ast.AST) -> int:
    """Count the statements of a function, docstring and nested functions included."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1


class Measures:
    """Sums over files."""

    def __init__(self) -> None:
        self.num_files = 0
        self.code_lines = 0
        self.comment_lines = 0
        self.tokens = 0
        self.counts = {"comprehensions": 0, "conditional expressions": 0, "packed assignments": 0}
        self.longest_function = (0, "")
        self.longest_file = (0, "")

    def add(self, path: Path) -> None:
        """Measure one file."""
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        docstrings = docstring_lines(tree)
        code: set[int] = set()
        comments: set[int] = set()

        # Lines and tokens: docstrings and comments are not code.
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                comments.add(token.start[0])
            elif token.type not in LAYOUT and token.start[0] not in docstrings:
                code.update(range(token.start[0], token.end[0] + 1))
                self.tokens += 1
        self.num_files += 1
        self.code_lines += len(code)
        self.comment_lines += len(comments)
        self.longest_file = max(self.longest_file, (len(source.splitlines()), path.name))

        # Shapes of statements.
        for node in ast.walk(tree):
            if isinstance(node, COMPREHENSIONS):
                self.counts["comprehensions"] += 1
            elif isinstance(node, ast.IfExp):
                self.counts["conditional expressions"] += 1
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                self.counts["packed assignments"] += isinstance(node.value, ast.Tuple)
            elif isinstance(node, FUNCTIONS):
                size = (num_statements(node), f"{path.name}:{node.name}")
                self.longest_function = max(self.longest_function, size)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield each measure's name and value."""
        yield "files", f"{self.num_files}"
        yield "code lines", f"{self.code_lines}"
        yield "tokens a code line", f"{self.tokens / self.code_lines:.2f}"
        yield "comment lines, %", f"{100 * self.comment_lines / self.code_lines:.1f}"
        for name, count in self.counts.items():
            yield f"{name} in 1,000 lines", f"{1000 * count / self.code_lines:.1f}"
        yield "longest function, statements", "{} ({})".format(*self.longest_function)
        yield "longest file, lines", "{} ({})".format(*self.longest_file)


def import_chain() -> list[str]:
    """Return the longest chain of modules in which each imports the next at its top."""
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        imported = (
            node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)
        )
        graph[module] = {node.module for node in imported if node.module is not None}
    longest: dict[str, list[str]] = {}

    def visit(module: str) -> list[str]:
        if module not in longest:
            longest[module] = [module]  # a circle, if there were one, would end here
            chains = [visit(other) for other in sorted(graph[module] & graph.keys())]
            longest[module] = [module, *max(chains, key=len, default=[])]
        return longest[module]

    return max((visit(module) for module in sorted(graph)), key=len)


def measure(paths: list[Path]) -> Measures:
    """Measure all Python files of the given files and directories."""
    measures = Measures()
    for path in paths:
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            if file.stat().st_size:
                measures.add(file)
    return measures


if __name__ == "__main__":
    chosen = [Path(argument) for argument in sys.argv[1:]] or [PACKAGE]
    for name, value in measure(chosen).rows():
        print(f"{name:<40} {value}")
    if not sys.argv[1:]:
        chain = import_chain()
        print(f"{'longest import chain, modules':<40} {len(chain)} ({' -> '.join(chain)})")
