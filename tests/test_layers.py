"""The folder tree is the architecture: who may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedmomentum

ROOT = Path(fedmomentum.__file__).parent
THIRD_PARTY = {
    "transformers", "trl", "peft", "datasets", "accelerate", "flwr", "numpy", "typer", "rich", "matplotlib", "jinja2",
    "reasoning_gym", "gguf", "huggingface_hub", "safetensors", "psutil", "msgspec", "re2",
}  # fmt: skip
ALLOWED = {  # the maths: torch alone
    "lowrank.py": set(), "sums.py": set(), "leading.py": set(), "deflation.py": set(),
    "by_iteration.py": set(), "by_gram.py": set(), "moves.py": set(), "aggregation": set(), "diagnostics.py": set(),
    "adapter.py": set(), "errors.py": set(), "plugins.py": set(), "memory.py": set(), "chat_date.py": set(),
    "wire.py": set(), "enrolment.py": set(), "checks.py": set(), "screening.py": set(),
    # one third-party library a file
    "schema.py": {"msgspec"}, "manifest.py": {"msgspec"}, "records.py": {"msgspec"}, "run_files.py": {"msgspec"},
    "folders.py": {"msgspec"}, "objects.py": set(), "terminal.py": {"rich"}, "personal.py": {"msgspec"},
    "names.py": set(),
    "origin.py": set(), "results.py": set(),
    "files.py": {"safetensors"}, "spool.py": {"safetensors"}, "identity.py": {"safetensors", "huggingface_hub"},
    "adapter_config.py": {"msgspec"}, "patterns.py": {"re2"},
    "peft_io.py": {"peft", "safetensors"}, "peft_live.py": {"peft"}, "stored.py": {"safetensors"},
    "precision.py": set(), "loaded.py": {"transformers"}, "tuned.py": {"transformers"}, "readback.py": set(),
    "messages.py": {"msgspec"}, "consolidation.py": {"msgspec"},
    "global_model.py": set(), "transport.py": set(), "checkpoint.py": {"msgspec"},
    "rounds.py": {"msgspec"}, "config.py": set(),
    "client.py": {"msgspec"}, "run.py": {"msgspec"}, "export.py": set(),
    "base.py": {"transformers", "safetensors"},
    "compare.py": {"rich"}, "training_arguments.py": {"transformers", "msgspec"},
    "training.py": {"transformers", "numpy"}, "evaluation.py": {"transformers"},
    "tracking.py": {"accelerate"}, "report": {"matplotlib", "jinja2", "numpy"},
}  # fmt: skip
LAYERS = [  # a file imports from its own line or from lines above
    {"errors", "lowrank"},
    {"plugins", "memory", "schema", "chat_date", "shipped"},
    {"names", "manifest", "records", "patterns"},
    {"folders", "run_files", "adapter_config"},
    {"sums"},
    {"deflation", "moves"},
    {"by_iteration", "by_gram"},
    {"leading"},
    {"adapter", "diagnostics", "aggregation", "files", "wire", "spool", "stored", "precision", "terminal", "objects"},
    {"embedded", "data"},
    {"identity", "loaded"},
    {"global_model", "peft_io", "config"},
    {"peft_live", "readback"},
    {"base", "transport", "training_arguments", "training", "evaluation", "consolidation", "personal", "origin"},
    {"tuned", "messages"},
    {"export", "checks"},
    {"client", "checkpoint", "screening", "results"},
    {"rounds", "enrolment", "tracking"},
    {"run", "report"},
    {"live", "use", "inspection", "compare"},
    {"flower"},
    {"cli"},
    {"__main__"},
]


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


def files(part: str) -> list[Path]:
    target = ROOT / part
    return [target] if target.suffix else sorted(target.rglob("*.py"))


@pytest.mark.parametrize("part", ALLOWED)
def test_third_party_imports(part):
    for path in files(part):
        tops = {name.split(".")[0] for name in imports(path)}
        assert tops & THIRD_PARTY <= ALLOWED[part], path


def test_only_two_files_import_peft():
    for path in ROOT.rglob("*.py"):
        if path.name not in ("peft_io.py", "peft_live.py"):
            assert not {name.split(".")[0] for name in imports(path)} & {"peft"}, path


def test_only_flower_imports_flwr():
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "flower":
            tops = {name.split(".")[0] for name in imports(path)}
            assert not tops & {"flwr", "uvicorn", "fastapi", "starlette", "httpx", "cryptography"}, path


def test_arrows_point_down():
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for name in imports(path):
            if name.startswith("fedmomentum."):
                other = name.split(".")[1]
                assert level[other] <= level[part], f"{path.relative_to(ROOT)} imports {name}"


def test_public_names_are_the_hand_listed_ones():
    assert sorted(fedmomentum.__all__) == [
        "Adapter", "AdapterAggregate", "Aggregate", "FedIT", "FedMomentum", "GlobalModel", "LowRank",
        "aggregate_adapters", "read_adapter", "write_adapter",
    ]  # fmt: skip
    for name in fedmomentum.__all__:
        assert getattr(fedmomentum, name).__name__ == name and getattr(fedmomentum, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'lowrnk'"):
        _ = fedmomentum.lowrnk
    assert (ROOT / "py.typed").is_file()


def test_importing_is_light_and_changes_nothing():
    code = (
        "import os, sys; before = dict(os.environ); import fedmomentum, fedmomentum.cli;"
        "assert dict(os.environ) == before;"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "from fedmomentum import LowRank, FedMomentum, aggregate_adapters, read_adapter; import fedmomentum.inspection;"
        "heavy = {'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_nothing_is_pickled():
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert not {n for n in imports(path) if n.split(".")[0] in ("pickle", "cloudpickle", "dill", "shelve")}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "save"), ("torch", "load")}, path


def test_remote_code_is_refused_wherever_transformers_would_ask():
    """Left out, the setting makes transformers ask on a terminal; so it is given wherever something is loaded."""
    calls = 0
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            is_load = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_load and node.func.attr == "from_pretrained":
                if ast.unparse(node.func.value) == "PeftModel":  # loads tensors onto a model that is there
                    continue
                assert "trust_remote_code" in {k.arg for k in node.keywords}, path
                calls += 1
    assert calls >= 4
