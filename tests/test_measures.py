"""The code can be skimmed: bounds on the measures of tools/measures.py, which a change must keep."""

import importlib
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("measures")


def test_the_package_can_be_skimmed(tool):
    measures = tool.measure([tool.PACKAGE])
    assert measures.tokens / measures.code_lines < 8.5
    assert measures.comment_lines / measures.code_lines >= 0.04
    assert measures.longest_function[0] <= 40, measures.longest_function
    assert measures.longest_file[0] <= 400, measures.longest_file


def test_the_longest_chain_of_imports_is_short(tool):
    chain = tool.import_chain()
    assert len(chain) <= 11, " -> ".join(chain)


def test_measures_count_what_they_claim(tool, tmp_path):
    file = tmp_path / "module.py"
    file.write_text('"""Doc."""\n\n# why\na, b = 1, 2\nc = [x for x in (1, 2)] if a else b\n')
    measures = tool.measure([file])
    assert (measures.code_lines, measures.comment_lines) == (2, 1)
    assert measures.tokens == 7 + 17
    assert set(measures.counts.values()) == {1}
