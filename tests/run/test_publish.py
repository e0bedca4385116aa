"""A result is uploaded to the hub and read back unchanged by its name; the upload reveals no more than it should."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedmomentum.base_model.hub import resolve_base
from fedmomentum.run.hub_model import fetch
from fedmomentum.run.publish import card_facts, with_public_base
from fedmomentum.run.saved_model import find_base, open_result
from tests.hub_double import TOKEN
from tests.runs import start, timeless, tiny_config

GITATTRIBUTES = ".gitattributes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("publish")


@pytest.fixture(scope="module")
def finished(folder):
    """A run of three clients, whose names and paths are private."""
    start(tiny_config(folder, federation={"num_rounds": 2}), folder / "run")
    return folder / "run"


def content(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def uploaded(hub, name):
    files = dict(hub.repositories[name].files)
    del files[GITATTRIBUTES]
    return files


def card_of(files):
    """The card's metadata and its text."""
    _, metadata, text = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_an_adapter_goes_to_the_hub_and_is_the_same_by_name(hub, folder, finished, tmp_path, call):
    hub.add("org/base", content(folder / "base"))
    out = tmp_path / "out"
    words = ("--push-to-hub", "alice/office", "--data-description", "Questions on *forms*.")
    code, output, err = call(
        "export", finished, "--to", "adapter", "--out", out, "--base", "org/base@main", *words
    )
    assert code == 0, err
    assert (
        f"{out} -> alice/office on the hub, private: {hub.endpoint}/alice/office/commit/" in output
    )
    assert TOKEN not in output + err and "note:" not in output
    repository = hub.repositories["alice/office"]
    files = uploaded(hub, "alice/office")
    assert repository.private and files == content(out)

    # Nothing of this machine, and nobody's name, is in what was uploaded.
    private_text = re.compile(rb"/tmp|" + str(folder).encode() + rb"|site[012]")
    for name, data in files.items():
        assert not private_text.search(data), name
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert json.loads(files["adapter_config.json"])["revision"] == "main"

    # By its name it is the run's model, base included, here and for stock PEFT.
    by_name, local = open_result("alice/office@main"), open_result(out)
    assert by_name.model.adapter.digest() == local.model.adapter.digest()
    assert by_name.model.base == local.model.base
    assert content(find_base(by_name)) == content(folder / "base")
    stock = AutoPeftModelForCausalLM.from_pretrained("alice/office").state_dict()
    for module, matrix in local.model.adapter.modules.items():
        factor = stock[f"base_model.model.{module}.lora_A.default.weight"]
        assert torch.equal(factor, matrix.A)
    data = str(folder / "site0.jsonl")
    results = {}
    for name in ("alice/office", out, finished):
        words = ("--base", folder / "base", "--dtype", "float32")
        code, output, err = call("evaluate", name, "--data", data, *words)
        assert code == 0, err
        results[name] = output.partition(": ")[2]
    assert results["alice/office"] == results[out] == results[finished]
    for command in (("inspect",), ("generate", "--prompt", "0 ab 0", "--max-new-tokens", "2")):
        code, output, err = call(command[0], "alice/office@main", *command[1:])
        assert code == 0, err

    # What a benchmark needs is here before it goes offline.
    directory, named = fetch("alice/office@main", "")
    assert (directory, named) == (by_name.path, "")
    _, named = fetch("alice/office@main", "org/base@main")
    assert content(Path(named)) == content(folder / "base")

    # Two names are combined as two directories are.
    adapters = []
    for number, (first, second) in enumerate((("alice/office@main", out), (out, "alice/office"))):
        to = tmp_path / str(number)
        words = ("--weights", "3,1", "--to", "adapter", "--out", to)
        code, output, err = call("aggregate", first, second, *words)
        assert code == 0, err
        adapters.append(load_file(to / "adapter_model.safetensors"))
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


def test_the_card_has_method_rounds_data_and_scores_with_intervals(
    hub, folder, finished, tmp_path, call
):
    words = ("--to", "merged", "--out", tmp_path / "out", "--data-description", "Forms of *two* k.")
    code, _, err = call("export", finished, *words)
    assert code == 0, err
    assert not hub.requests  # a local export stays private
    metadata, text = card_of(content(tmp_path / "out"))
    assert metadata["library_name"] == "transformers" and "base_model" not in metadata
    assert "\n## Data\n\nForms of *two* k.\n" in text
    assert "| method | `FedMomentum(" in text and "| rounds | 2 |" in text
    facts = card_facts(open_result(finished))
    first, *_, last = timeless(finished)
    for name, score, row in zip(
        ("base model", "this model"), facts.scores, (first, last), strict=True
    ):
        total = row["evaluation"]["total"]
        assert (score.num_examples, score.nll) == (total["num_examples"], total["nll"])
        low, high = score.interval
        shown = f"{100 * score.exact_match:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        assert f"| {name} | {shown} | {score.loss:.3f} | {score.num_examples} |" in text
    # Only of the round that is exported: the same numbers would be another model's.
    earlier = card_facts(open_result(finished, server_round="1"))
    assert earlier.scores[1].nll != facts.scores[1].nll
    # Without records that can be read there is a card without scores, and an export all the same.
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy" / "metrics.jsonl").write_text("{")
    assert card_facts(open_result(tmp_path / "copy")).scores == (None, None)


def test_a_merged_model_goes_to_the_hub_and_is_a_base_by_name(
    hub, folder, finished, tmp_path, call
):
    out = tmp_path / "out"
    code, output, err = call(
        "export", finished, "--to", "merged", "--out", out, "--push-to-hub", "office", "--public"
    )
    assert code == 0, err
    assert "-> alice/office on the hub, public:" in output
    assert "note: the base model is a directory here" in output and "--base OWNER/NAME" in output
    assert not hub.repositories["alice/office"].private
    files = uploaded(hub, "alice/office")
    assert files == content(out)
    for name, data in files.items():
        assert not re.search(rb"/tmp|" + str(folder).encode() + rb"|site[012]", data), name
    metadata, text = card_of(files)
    assert "base_model" not in metadata and "| base model | not published |" in text
    assert "from_pretrained('alice/office')" in text
    directory = resolve_base("alice/office", "main")
    assert fetch("alice/office@main", "") == (directory, "")
    expected = AutoModelForCausalLM.from_pretrained(out).state_dict()
    found = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_refusal_or_failure_is_one_message_and_loses_nothing(
    hub, folder, finished, tmp_path, call, monkeypatch
):
    out = tmp_path / "out"
    words = ("export", finished, "--to", "adapter", "--out", out)
    code, _, err = call(*words, "--public")
    assert code == 2 and "--public is for --push-to-hub NAME" in err
    monkeypatch.setenv("HF_TOKEN", "")
    code, _, err = call(*words, "--push-to-hub", "office")
    assert code == 2 and "needs a login to the hub" in err and not out.exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail("POST", "/commit/", 500)
    code, output, err = call(*words, "--push-to-hub", "office")
    assert code == 2 and "the upload to alice/office failed: the hub replied 500" in err
    assert "Traceback" not in err and TOKEN not in err + output
    assert f"hf upload alice/office {out} . --private" in err
    adapter = open_result(out).model.adapter
    run = open_result(finished).model
    for module in adapter.modules:
        difference = adapter.effective(module).dense() - run.effective(module).dense()
        assert float(difference.norm()) < 1e-5
    for name in ("org/none", "org/none@v1"):
        code, _, err = call("evaluate", name, "--data", folder / "site0.jsonl")
        assert code == 2 and f"there is no directory {name}, and the hub has no repository" in err
    code, _, err = call("aggregate", "org/none", out, "--out", tmp_path / "both")
    assert code == 2 and "the hub has no repository org/none" in err


def test_a_base_is_named_by_its_public_name(finished):
    model = open_result(finished).model
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = f"/home/a/hub/models--org--base/snapshots/{commit}"
    cases = {
        (model.base.name, ""): ("", None),
        (model.base.name, "org/base"): ("org/base", None),
        (model.base.name, "org/base@v2"): ("org/base", "v2"),
        (model.base.name, str(finished)): ("", None),
        ("org/own", ""): ("org/own", "v1"),
        ("org/own", "org/own"): ("org/own", "v1"),
        ("org/own", "org/own@v3"): ("org/own", "v3"),
        ("org/own", str(finished)): ("org/own", "v1"),
        (cached, ""): ("org/base", commit),
        ("smollm2-135m-instruct", ""): ("smollm2-135m-instruct", None),
    }
    for (name, given), expected in cases.items():
        revision = "v1" if name == "org/own" else None
        named = replace(model, base=replace(model.base, name=name, revision=revision))
        base = with_public_base(named, given).base
        assert (base.name, base.revision) == expected, (name, given)
        assert base.sha256 == model.base.sha256
