"""The package as users get it: installed from its source distribution, away from the checkout.

Needs a package index and some five minutes; `make test-long` runs it.
"""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_llama

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source distribution of what git has, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "checkout"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    build = "from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", f"import sys; {build}", folder],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (archive,) = folder.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, archive]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def fedmomentum(archives, tmp_path_factory):
    """The command of a fresh environment, as a function: `fedmomentum(*words, cwd=...)`."""
    _, wheel = archives
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "-q"]
    constraints = ["-c", ROOT / "constraints.txt"]
    # torch first: a constraint to a build for CPUs holds for what follows
    subprocess.run([*pip, *constraints, "torch"], check=True)
    subprocess.run([*pip, *constraints, wheel], check=True)
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "FEDMOMENTUM_CACHE": str(folder / "cache"),
        "COLUMNS": "200",
    }

    def run(*words, cwd):
        command = [folder / "venv/bin/fedmomentum", *map(str, words)]
        return subprocess.run(
            command, cwd=cwd, env=environment, check=True, capture_output=True, text=True
        ).stdout

    return run


def test_the_source_distribution_holds_the_package(archives):
    archive, wheel = archives
    sources = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    assert packaged <= sources
    listed = ["git", "ls-files", "fedmomentum"]
    tracked = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert packaged == set(tracked.split())


def test_the_demonstration_installs_what_it_needs_and_runs(fedmomentum, tmp_path):
    printed = fedmomentum("demo", "--yes", cwd=tmp_path)
    assert "93 MB" in printed and "The result is in runs/demo" in printed
    rounds = (tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in rounds] == [0, 1, 2, 3, 4, 5]


def test_adapters_are_combined_and_a_custom_file_is_trained_on(fedmomentum, tmp_path):
    # two adapters of stock PEFT, of unequal ranks and scalings
    for name, rank, alpha in [("north", 2, 8), ("south", 3, 3)]:
        torch.manual_seed(rank)
        base = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "base"))
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / name)
    words = ["aggregate", "north", "south", "--weights", "3,1", "--to", "adapter", "--out", "one"]
    fedmomentum(*words, cwd=tmp_path)
    combined = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert combined and all(tensor.isfinite().all() for tensor in combined.values())
    # the file of the README
    rows = [{"question": f"Which form is for case {i}?", "answer": f"T-{i}."} for i in range(40)]
    for client in ("north", "south"):
        text = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"{client}.jsonl").write_text(text)
    (tmp_path / "office.toml").write_text(
        '[model]\nname = "base"\n'
        '[data.client-files]\nnorth = "north.jsonl"\nsouth = "south.jsonl"\n'
        "[training]\nlocal-steps = 1\nbatch-size = 2\n[federation]\nnum-rounds = 1\n"
    )
    assert "The result is in runs/office" in fedmomentum("run", "office.toml", cwd=tmp_path)
