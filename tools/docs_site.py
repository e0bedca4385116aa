"""Stage the pages of the documentation's site, where mkdocs.yml expects them.

    python tools/docs_site.py && mkdocs build --strict

The site has the tree of the repository, with README.md as its home page, so every link that works
in the repository works on the site. Of other files, those are staged that a page links to. The page
of the Python interface is made from the names that the package exports.
"""

import re
import shutil
from pathlib import Path

import fedmomentum

ROOT = Path(__file__).parents[1]
STAGE = ROOT / "build" / "site-source"
HOME = "README.md"
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def main() -> None:
    """Stage pages, what they link to, and the page of the Python interface."""
    shutil.rmtree(STAGE, ignore_errors=True)
    pages = [ROOT / HOME, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    pages += sorted((ROOT / "docs").rglob("*.md"))
    staged: set[Path] = set()
    while pages:
        page = pages.pop()
        if page in staged:
            continue
        staged.add(page)
        text = page.read_text()
        for link in LINK.finditer(text):
            target = linked_file(page, link[1])
            if target is None:
                continue
            if target.suffix == ".md":
                pages.append(target)
            else:
                stage(target, target.read_bytes())
        stage(page, adapted(page, text).encode())
    stage(ROOT / "api.md", api_page().encode())


def linked_file(page: Path, target: str) -> Path | None:
    """Return the file in the repository that a link leads to; None if it leads elsewhere."""
    if target.startswith(("https://", "http://", "mailto:")):
        return None
    file = (page.parent / target).resolve()
    return file if file.is_file() else None


def stage(file: Path, data: bytes) -> None:
    """Write a file of the repository into the stage, README.md as the home page."""
    name = file.relative_to(ROOT)
    target = STAGE / ("index.md" if str(name) == HOME else name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def adapted(page: Path, text: str) -> str:
    """Return a page's text with the links that are others on the site.

    A site has no directories to look into, so links to them become plain text; the home page has
    another name.
    """

    def replaced(match: re.Match[str]) -> str:
        target = (page.parent / match[2]).resolve()
        if target.is_dir():
            return match[1]
        if target == ROOT / HOME:
            return f"[{match[1]}]({match[2].removesuffix(HOME)}index.md{match[3] or ''})"
        return match[0]

    return re.sub(r"\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)", replaced, text)


def api_page() -> str:
    """Return the page of the Python interface: one entry for each public name."""
    lines = [
        "# Python",
        "",
        "What `import fedmomentum` gives. Everything else may change without notice.",
    ]
    for name in sorted(fedmomentum.__all__):
        module = getattr(fedmomentum, "_MODULES")[name]  # noqa: B009 (the table of lazy imports)
        lines += ["", f"::: {module}.{name}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
