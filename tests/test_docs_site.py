"""The site holds every page, and its menu leads to each."""

import sys
from pathlib import Path

import pytest
import yaml

import fedmomentum

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import docs_site
    finally:
        sys.path.pop(0)
    docs_site.STAGE = tmp_path_factory.mktemp("site")
    docs_site.main()
    return docs_site.STAGE


def menu(entries):
    for entry in entries:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from menu(value)


def test_the_menu_leads_to_every_page(staged):
    pages = {str(file.relative_to(staged)) for file in staged.rglob("*.md")}
    assert sorted(menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == sorted(pages)
    named = {str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md")}
    assert named < pages


def test_files_that_pages_show_and_link_to_exist(staged):
    assert (staged / "docs" / "report.png").read_bytes() == (
        ROOT / "docs" / "report.png"
    ).read_bytes()
    assert (staged / "examples" / "own_training.py").is_file()
    # there are no directories to look into, and the home page has another name
    text = (staged / "docs" / "appendix" / "results.md").read_text()
    assert "banking77/results)" not in text and "differences.svg)" in text
    assert "../index.md#combining-adapters" in (staged / "docs" / "combining.md").read_text()


def test_the_page_of_the_interface_has_every_public_name(staged):
    text = (staged / "api.md").read_text()
    for name in fedmomentum.__all__:
        assert text.count(f".{name}\n") == 1
