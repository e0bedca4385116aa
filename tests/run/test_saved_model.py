"""Runs without one global model: there is no global model to export or use, but each client's own."""

import json
import shutil
from dataclasses import dataclass, replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedmomentum.aggregation import FedSALoRA
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.data.tokenization import tokenize
from fedmomentum.evaluation.teacher_forcing import evaluate
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.personal import personal_states
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.client_examples import held_out_order
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from fedmomentum.run.setup import load_data
from fedmomentum.utils.names import directory_name
from tests.runs import nudge, start, timeless, tiny_config

NAMES = ("north", "north-2", "a/../b")


def personal_config(folder, **method):
    config = tiny_config(
        folder,
        method={"name": "fedsalora", **method},
        federation={"num_rounds": 3},
        run={"keep_checkpoints": 3},
    )
    files = dict(zip(NAMES, config.data.client_files.values(), strict=True))
    return replace(config, data=replace(config.data, client_files=files))


def push(model, examples, *, learning_rate, **settings):
    """`nudge` by steps that a score shows."""
    return nudge(model, examples, learning_rate=20 * learning_rate, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("personal")


@pytest.fixture(scope="module")
def finished(folder):
    """A FedSA-LoRA run of three clients."""
    start(personal_config(folder), folder / "run", function=push)
    return folder / "run"


def loss_of(path, config, client, adapter=None):
    """The loss on a client's held-out examples, by stock transformers and PEFT."""
    (party,) = [party for party in load_data(config) if party.client_id == client]
    model = AutoModelForCausalLM.from_pretrained(path)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    from fedmomentum.base_model.loading import load_tokenizer

    tokens = tokenize(
        held_out_order(config, party),
        load_tokenizer(path),
        max_length=128,
        max_truncated_fraction=0,
        owner=client,
    )
    return evaluate(model, tokens[:4], pad_token_id=0).total.loss


def test_a_run_without_a_global_model_names_its_clients(finished, tmp_path, call):
    for command in (
        ["export", finished, "--to", "merged", "--out", tmp_path / "out"],
        ["export", finished, "--to", "adapter", "--out", tmp_path / "out"],
        ["evaluate", finished],
        ["generate", finished, "--prompt", "0 ab 1"],
    ):
        code, printed, err = call(*command)
        assert (
            code == 2
            and "leaves the factors B with each client: there is no one global model" in err
        )
        assert "those of a/../b, north, north-2 are here" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("client", NAMES)
def test_a_clients_model_is_the_one_that_the_run_evaluated(
    folder, finished, tmp_path, call, client
):
    config = personal_config(folder)
    last = timeless(finished)[-1]["evaluation"]["by_client"][client]["loss"]
    code, printed, err = call(
        "export", finished, "--client", client, "--to", "merged", "--out", tmp_path / "merged"
    )
    assert code == 0 and f"round 3 of {finished}, client {client} -> " in printed, err
    assert (
        call(
            "export", finished, "--client", client, "--to", "adapter", "--out", tmp_path / "adapter"
        )[0]
        == 0
    )
    assert (
        f"FedSALoRA(), the model of client {client}"
        in (tmp_path / "merged" / "README.md").read_text()
    )
    assert loss_of(tmp_path / "merged", config, client) == pytest.approx(last, rel=1e-5)
    assert loss_of(folder / "base", config, client, tmp_path / "adapter") == pytest.approx(
        last, rel=1e-5
    )
    assert abs(loss_of(folder / "base", config, client) - last) > 1e-3 * last
    others = [name for name in NAMES if name != client]
    assert all(
        abs(timeless(finished)[-1]["evaluation"]["by_client"][o]["loss"] - last) > 1e-6
        for o in others
    )
    code, printed, err = call("evaluate", finished, "--client", client)
    shown = f"{last:.3f}"
    assert code == 0 and shown in printed and f"client {client}" in printed, (shown, printed, err)
    code, printed, _ = call(
        "generate", finished, "--client", client, "--prompt", "0 ab 1", "--max-new-tokens", "3"
    )
    assert code == 0 and "tuned" in printed


def test_the_round_is_respected(folder, finished, tmp_path, call):
    config = personal_config(folder)
    for server_round in (1, 2):
        out = tmp_path / str(server_round)
        wanted = [
            "export",
            finished,
            "--client",
            "north",
            "--to",
            "merged",
            "--round",
            server_round,
            "--out",
            out,
        ]
        assert call(*wanted)[0] == 0
        row = timeless(finished)[server_round]["evaluation"]["by_client"]["north"]
        (party,) = [party for party in load_data(config) if party.client_id == "north"]
        from fedmomentum.base_model.loading import load_tokenizer

        tokens = tokenize(
            held_out_order(config, party),
            load_tokenizer(out),
            max_length=128,
            max_truncated_fraction=0,
            owner="north",
        )
        model = AutoModelForCausalLM.from_pretrained(out)
        got = evaluate(model, tokens[: row["num_examples"]], pad_token_id=0).total
        assert got.loss == pytest.approx(row["loss"], rel=1e-5)
    code, _, err = call(
        "export",
        finished,
        "--client",
        "north",
        "--to",
        "merged",
        "--round",
        0,
        "--out",
        tmp_path / "0",
    )
    assert code == 2 and "keeps the rounds [1, 2, 3]" in err


def test_wrong_choices_are_refused(folder, finished, tmp_path, call):
    start(tiny_config(folder, federation={"num_rounds": 1}), tmp_path / "plain")
    for words, message in (
        (
            ["evaluate", finished, "--client", "south"],
            "has no client 'south'; its clients are a/../b, north, north-2",
        ),
        (["evaluate", finished, "--store", tmp_path], "name the client by --client"),
        (
            ["evaluate", finished, "--client", "north", "--store", tmp_path],
            "holds no factors of client north in this run; give the store of its node, such as "
            "nodes/north",
        ),
        (
            ["evaluate", tmp_path / "plain", "--client", "site0"],
            "has one global model; leave out --client site0",
        ),
    ):
        code, _, err = call(*words)
        assert code == 2 and message in err.replace("\n", " "), err


def test_inspect_says_whose_factors_are_here(finished, tmp_path, call):
    code, printed, _ = call("inspect", finished)
    assert code == 0 and "B stays with each client; there is no one global model" in printed
    assert all(f"  {name}" in printed for name in NAMES) and "after the rounds 1, 2, 3" in printed
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    run_id = json.loads((copy / "rounds" / "0003.json").read_text())["run"]["run_id"]
    for file in personal_states(copy, run_id).files("north").values():
        file.unlink()
    code, printed, _ = call("inspect", copy)
    assert (
        code == 0
        and "not here" in printed
        and printed.index("not here") < printed.rindex("north\n".strip())
    )
    code, _, err = call("evaluate", copy, "--client", "north")
    assert code == 2 and "client north: its own factors are not in" in err and "--store" in err


def test_a_model_of_a_served_run_is_assembled_at_the_site(folder, finished, tmp_path, call):
    """The coordinator has the shared part only; each client's own factors are in its store."""
    config = personal_config(folder)
    steps = {}
    for name in NAMES:
        client = prepare_client(config, name, tmp_path / "nodes" / directory_name(name))
        client.training_function = push
        steps[name] = client.handle
    run_federation(InProcessTransport(steps), config, tmp_path / "served")
    code, _, err = call("evaluate", tmp_path / "served")
    assert (
        code == 2
        and "none are here, each client has its own (--store); its clients are a/../b, north" in err
    )
    for name in ("north-2", "a/../b"):
        words = ["export", tmp_path / "served", "--client", name, "--to", "merged"]
        code, _, err = call(*words, "--out", tmp_path / "never")
        assert code == 2 and "give it by --store" in err
        store, out = (
            tmp_path / "nodes" / directory_name(name),
            tmp_path / f"out-{directory_name(name)}",
        )
        code, _, err = call(*words, "--store", store, "--out", out)
        last = timeless(tmp_path / "served")[-1]["evaluation"]["by_client"][name]["loss"]
        assert code == 0 and loss_of(out, config, name) == pytest.approx(last, rel=1e-5), err
    # a store that lacks the last training is an older copy
    (kept,) = (tmp_path / "nodes" / "north" / "personal").iterdir()
    (kept / "north" / "0003.safetensors").unlink()
    code, _, err = call(
        "evaluate",
        tmp_path / "served",
        "--client",
        "north",
        "--store",
        tmp_path / "nodes" / "north",
    )
    assert code == 2 and "trained in round 3 too; the store is an older copy" in err


@dataclass(frozen=True)
class PersonalA(FedSALoRA):
    """A custom method: B is shared, A stays with each client."""

    shared_factors = "B"

    def sent_factors(self, server_round):
        return "B"


def test_a_custom_personal_method(folder, tmp_path, call, monkeypatch):
    monkeypatch.setitem(METHODS, "personal-a", PersonalA)
    config = personal_config(folder, name="personal-a")
    start(config, tmp_path / "run", function=push)
    assert GlobalModel.load(tmp_path / "run").personal == "A"
    code, _, err = call("export", tmp_path / "run", "--to", "merged", "--out", tmp_path / "out")
    assert code == 2 and "PersonalA()" in err and "leaves the factors A with each client" in err
    monkeypatch.delitem(METHODS, "personal-a")  # it need not be installed to export a model
    code, _, err = call(
        "export", tmp_path / "run", "--client", "north", "--to", "merged", "--out", tmp_path / "out"
    )
    last = timeless(tmp_path / "run")[-1]["evaluation"]["by_client"]["north"]["loss"]
    assert code == 0 and loss_of(tmp_path / "out", config, "north") == pytest.approx(
        last, rel=1e-5
    ), err


def test_a_client_with_its_own_scaling_and_modules(folder, tmp_path, call):
    config = personal_config(folder)
    lora = replace(
        config.lora, clients={"north": {"lora-alpha": 3.0, "target-modules": ["q_proj"]}}
    )
    config = replace(config, lora=lora)
    start(config, tmp_path / "run", function=push)
    for name in NAMES:
        out = tmp_path / directory_name(name)
        assert (
            call("export", tmp_path / "run", "--client", name, "--to", "merged", "--out", out)[0]
            == 0
        )
        last = timeless(tmp_path / "run")[-1]["evaluation"]["by_client"][name]["loss"]
        assert loss_of(out, config, name) == pytest.approx(last, rel=1e-5)
    base, tuned = (
        AutoModelForCausalLM.from_pretrained(p).state_dict()
        for p in (folder / "base", tmp_path / "north")
    )
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert moved and all("q_proj" in name for name in moved)


def test_offline_the_combination_is_one_model(finished, tmp_path, call):
    """Where every B is at hand, the result has their mean, and is a model."""
    paths = [tmp_path / directory_name(name) for name in NAMES]
    for name, path in zip(NAMES, paths, strict=True):
        assert call("export", finished, "--client", name, "--to", "adapter", "--out", path)[0] == 0
    code, _, err = call("aggregate", *paths, "--method", "fedsalora", "--out", tmp_path / "global")
    assert code == 0, err
    assert GlobalModel.load(tmp_path / "global").personal == ""
    assert (
        call("export", tmp_path / "global", "--to", "merged", "--out", tmp_path / "merged")[0] == 0
    )
