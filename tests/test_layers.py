"""The folder tree is the architecture: who may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedmomentum

ROOT = Path(fedmomentum.__file__).parent
THIRD_PARTY = {
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "flwr",
    "numpy",
    "typer",
    "rich",
    "matplotlib",
    "jinja2",
    "reasoning_gym",
    "gguf",
    "huggingface_hub",
    "safetensors",
    "psutil",
    "msgspec",
    "re2",
    "uvicorn",
    "fastapi",
    "starlette",
    "httpx",
    "cryptography",
    "markupsafe",
    "pyarrow",
    "openpyxl",
    "ray",
    "lm_eval",
    "yaml",
    "bitsandbytes",
    "torchao",
    "opacus",
}
"""Libraries besides torch that are imported by the packages named in LAYERS only."""
LAYERS: list[
    dict[str, set[str]]
] = [  # a package imports from packages in lower layers; not from its own layer
    {
        "linalg": set(),
        "utils": {
            "msgspec",
            "numpy",
            "safetensors",
            "rich",
            "transformers",
            "datasets",
            "bitsandbytes",
            "huggingface_hub",
        },
    },
    {
        "config": set(),
        "formats": {"msgspec"},
        "lora": {"peft", "safetensors", "msgspec", "re2", "transformers"},
        "secure_sum": {"msgspec", "numpy", "cryptography"},
        "web": {"uvicorn"},
    },
    {
        "aggregation": set(),
        "base_model": {"transformers", "safetensors", "gguf", "torchao"},
        "data": {
            "msgspec",
            "numpy",
            "transformers",
            "datasets",
            "pyarrow",
            "openpyxl",
            "reasoning_gym",
            "jinja2",
        },
        "objectives": set(),
        "privacy": {"msgspec", "numpy", "opacus"},
        "protocol": {"msgspec", "numpy"},
        "results": {"msgspec"},
    },
    {
        "evaluation": {"transformers"},
        "global_model": {"msgspec", "safetensors", "transformers"},
        "report": {"matplotlib", "jinja2", "numpy", "markupsafe"},
        "training": {"transformers", "numpy", "msgspec", "accelerate", "opacus"},
    },
    {"client": {"msgspec", "numpy"}, "server": {"msgspec", "safetensors"}},
    {"run": {"msgspec", "accelerate"}},
    {
        "flower": THIRD_PARTY,
        "dashboard": {"starlette"},
        "benchmark": {"lm_eval", "yaml", "jinja2", "datasets", "transformers", "msgspec"},
    },
    {"cli": {"typer", "rich", "msgspec"}},
]
LOOSE_FILES = {"__init__", "__main__", "errors"}


def imports(path: Path) -> set[str]:
    """Top names of all imports of a file, those within functions and for type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def packages() -> dict[str, list[Path]]:
    """Every package with its files; loose files are left out."""
    found: dict[str, list[Path]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part not in LOOSE_FILES:
            found.setdefault(part, []).append(path)
    return found


def test_the_layers_name_every_package():
    assert sorted(packages()) == sorted(name for layer in LAYERS for name in layer)
    assert {path.stem for path in ROOT.glob("*.py")} == LOOSE_FILES
    assert len(LAYERS) <= 8


@pytest.mark.parametrize("package", [name for layer in LAYERS for name in layer])
def test_a_package_imports_from_lower_layers_and_its_own_libraries_only(package):
    number = next(k for k, layer in enumerate(LAYERS) if package in layer)
    below = {package, "errors"} | {name for layer in LAYERS[:number] for name in layer}
    for path in packages()[package]:
        for name in imports(path):
            if name.startswith("fedmomentum."):
                assert name.split(".")[1] in below, f"{path.relative_to(ROOT)} imports {name}"
        libraries = {name.split(".")[0] for name in imports(path)} & THIRD_PARTY
        assert libraries <= LAYERS[number][package], path


def test_no_import_cycle_within_a_package():
    """Modules import one another in one direction only, imports within functions included."""
    graph = {}
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        graph[module] = {name for name in imports(path) if name.startswith("fedmomentum.")}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' -> '.join((*trail, module))}"
        if module in done or module not in graph:
            return
        for other in sorted(graph[module]):
            visit(other, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_only_three_files_import_peft():
    for path in ROOT.rglob("*.py"):
        if path.name not in ("peft_folder.py", "peft_model.py", "peft_names.py"):
            assert not {name.split(".")[0] for name in imports(path)} & {"peft"}, path


def test_only_flower_imports_flwr():
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "flower":
            tops = {name.split(".")[0] for name in imports(path)}
            assert not tops & {"flwr", "fastapi", "httpx"}, path
            assert path.parent.name == "web" or "uvicorn" not in tops, path
            assert path.parent.name == "dashboard" or "starlette" not in tops, path
            assert path.parent.name == "secure_sum" or "cryptography" not in tops, path


def test_public_names_are_the_hand_listed_ones():
    assert sorted(fedmomentum.__all__) == [
        "Adapter",
        "AggregationContext",
        "AggregationResult",
        "Callback",
        "ClientUpdates",
        "Config",
        "FedIT",
        "FedMomentum",
        "FederatedTrainer",
        "GlobalModel",
        "LowRank",
        "METHODS",
        "Method",
        "ModuleAggregate",
        "RoundRecord",
        "RunResults",
        "TrainReport",
        "aggregate_adapters",
        "evaluate",
        "generate",
        "load_config",
        "read_adapter",
        "write_adapter",
    ]
    for name in set(fedmomentum.__all__) - {"METHODS"}:
        assert getattr(fedmomentum, name).__name__ == name and getattr(fedmomentum, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'lowrnk'"):
        _ = fedmomentum.lowrnk
    assert (ROOT / "py.typed").is_file()


def test_importing_is_light_and_changes_nothing():
    code = (
        "import os, sys; before = dict(os.environ); import fedmomentum, fedmomentum.cli.main;"
        "assert dict(os.environ) == before;"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "from fedmomentum import LowRank, FedMomentum, aggregate_adapters, read_adapter;"
        "import fedmomentum.cli.inspection, fedmomentum.run.saved_model;"
        "heavy = {'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules); assert "
        "not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_nothing_is_pickled():
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert not {
            n
            for n in imports(path)
            if n.split(".")[0] in ("pickle", "cloudpickle", "dill", "shelve")
        }, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "save"), ("torch", "load")}, (
                    path
                )


def test_remote_code_is_refused_wherever_transformers_would_ask():
    """Left out, the setting makes transformers ask on a terminal; so it is given wherever something is loaded."""
    calls = 0
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            is_load = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_load and node.func.attr == "from_pretrained":
                if (
                    ast.unparse(node.func.value) == "PeftModel"
                ):  # loads tensors onto a model that is there
                    continue
                assert "trust_remote_code" in {k.arg for k in node.keywords}, path
                calls += 1
    assert calls >= 4
