"""A run with differential privacy: what leaves a client, what is counted, and what comes again."""

import json

import pytest

from fedmomentum.cli.run_end import print_result
from fedmomentum.data.split import split_fingerprint
from fedmomentum.errors import ConfigError, ModelError, PrivacyError
from fedmomentum.formats.directories import round_file
from fedmomentum.privacy.ledger import read_ledger
from fedmomentum.protocol.codec import decode_reply, decode_task
from fedmomentum.run import setup
from fedmomentum.run.client_setup import prepare_client, smoke_test_task
from fedmomentum.run.private_checks import (
    check_private_client,
    check_private_run,
    choose_private_dtype,
    private_warnings,
)
from fedmomentum.run.saved_model import open_result
from fedmomentum.run.setup import make_method
from tests.runs import describe_task, prepare, start, tiny_config

DP = {"noise-multiplier": 0.8, "max-grad-norm": 0.7, "delta": 1e-3}


def private_config(folder, **sections):
    dp = {**DP, **sections.pop("dp", {})}
    sections = {
        "method": {"name": "fedsvd"},
        "federation": {"num-rounds": 2},
        "privacy": {"dp": {key: value for key, value in dp.items() if value is not None}},
        **sections,
    }
    return tiny_config(folder, num_clients=2, **sections)


class Stop(Exception):
    """The server dies."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose server died after the replies of round 2, and was resumed; what left the clients."""
    folder = tmp_path_factory.mktemp("private")
    config = private_config(folder)
    out = folder / "out"
    exchanged = []

    def start(resume, observer=None):
        run = prepare(config, out, resume=resume)
        for client in run.clients:
            watch(client)
        try:
            run.start(observer)
        finally:
            run.close()
        return run

    def watch(client):
        honest = client.handle

        def handle(payload):
            reply = honest(payload)
            exchanged.append((decode_task(payload), reply))
            return reply

        client.handle = handle

    def die(event, facts):
        if event == "aggregate" and sum(t.kind == "train" for t, _ in exchanged) == 4:
            raise Stop

    with pytest.raises(Stop):
        start(False, die)
    run = start(True)
    return config, out, run, exchanged


def test_nothing_without_noise_leaves_a_client(finished):
    config, _, run, exchanged = finished
    sizes = {client.client_id: len(client.train) for client in run.clients}
    assert sizes == {"site0": 9, "site1": 18}
    kinds = set()
    for task, payload in exchanged:
        reply = decode_reply(payload, task, 2**30)
        kinds.add(task.kind)
        client = run.clients[int(task.client_id[-1])]
        # Someone who guesses the data cannot check the guess.
        assert reply.split == "0" * 64
        assert split_fingerprint(client.train, client.test, task.run_id).encode() not in payload
        if task.kind == "train":
            answer = reply.answer
            assert (answer.loss, answer.first_loss, answer.last_loss) == (None, None, None)
            assert answer.num_tokens is None and answer.num_steps == 2
            assert task.request.private.noise_multiplier == 0.8
            assert not any("lora_A" in name for name in reply.tensors)
        else:
            assert reply.answer.total is None and reply.answer.by_category == {}
            assert reply.num_examples == 1
    assert kinds == {"train", "evaluate"}
    described = run.clients[1].describe(describe_task("site1").request)
    assert (described.answer.num_train, described.answer.num_test) == (18, 0)


def test_records_reveal_nothing_about_the_data(finished):
    _, out, _, _ = finished
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["train_loss"] is None and row["evaluation"] is None and not row["is_best"]
        assert row["withheld"]["reason"].startswith("differential privacy")
        assert "evaluation" in row["withheld"]["fields"]
        for training in row["clients"].values():
            assert training["loss"] is None and training["num_tokens"] is None
    partition = json.loads((out / "partition.json").read_text())
    assert partition["clients"]["site1"] == {"train": {"": 18}, "test": {"": 0}}
    plan = json.loads((out / "plan.json").read_text())
    assert any("no round is the best" in warning for warning in plan["warnings"])
    with pytest.raises(ModelError, match="best"):
        open_result(out, server_round="best")


def test_end_of_a_run_says_what_is_withheld_instead_of_an_empty_table(finished, tmp_path, capsys):
    config, out, _, _ = finished
    print_result(out)
    printed = capsys.readouterr().out
    assert "No scores: differential privacy withholds those on held-out examples" in printed
    assert f"fedmomentum evaluate {out} --data FILE" in printed
    assert "Left out on purpose: losses and numbers of targets in training; all held-out" in printed
    assert "Exact match" not in printed
    # Without privacy it is a setting.
    public = tiny_config(tmp_path, evaluation={"every": 0}, federation={"num-rounds": 1})
    start(public, tmp_path / "public")
    print_result(tmp_path / "public")
    printed = capsys.readouterr().out
    assert "No scores: no round has an evaluation" in printed and "Exact match" not in printed


def test_repeated_task_gets_the_stored_reply_and_is_not_counted_again(finished):
    _, out, _, exchanged = finished
    trainings = [(t.client_id, t.server_round, p) for t, p in exchanged if t.kind == "train"]
    # Round 2 was asked for twice, in two processes of the server.
    assert [(client, number) for client, number, _ in trainings] == [
        *[("site0", 1), ("site1", 1)],
        *[("site0", 2), ("site1", 2)] * 2,
    ]
    assert trainings[2][2] == trainings[4][2] and trainings[3][2] == trainings[5][2]
    for client, rate in (("site0", 4 / 9), ("site1", 4 / 18)):
        record = read_ledger(out / "privacy" / f"{client}.json")
        assert [one.server_round for one in record.trainings] == [1, 2]
        for one in record.trainings:
            assert (one.noise_multiplier, one.max_grad_norm, one.num_steps) == (0.8, 0.7, 2)
            assert one.sample_rate == pytest.approx(rate) and one.expected_batch == pytest.approx(4)
            assert one.state == "replied"
    assert round_file(out, 2).is_file()


def test_budget_ends_a_run_before_training(tmp_path):
    config = private_config(tmp_path, dp={"budget": 0.5, "ledger": str(tmp_path / "ledgers")})
    run = prepare(config, tmp_path / "out")
    try:
        (client, *_) = run.clients
        payload = smoke_test_task(config, client)
        # What stays here is not counted.
        before = read_all(tmp_path)
        client.handle(payload, is_smoke_test=True)
        assert read_all(tmp_path) == before
        with pytest.raises(PrivacyError, match=r"privacy budget of site0: 1 more steps .* is 0.5"):
            client.handle(payload)
        assert read_ledger(tmp_path / "ledgers" / "site0.json").trainings == []
        # A run without privacy gets nothing, and a client without it takes no part in a private one.
        public = smoke_test_task(
            tiny_config(tmp_path, num_clients=2, method={"name": "fedsvd"}), client
        )
        with pytest.raises(ConfigError, match="takes part in runs with differential privacy only"):
            client.handle(public)
        other = private_config(tmp_path, dp={"unit-column": "kind"})
        with pytest.raises(
            ConfigError, match=r"protects one kind; \[privacy.dp\] here protects one ex"
        ):
            client.handle(smoke_test_task(other, client))
        client.private = None
        with pytest.raises(ConfigError, match=r"Set \[privacy.dp\] with a budget"):
            client.handle(payload)
    finally:
        run.close()


def read_all(folder):
    files = (folder / "ledgers").glob("*.json") if (folder / "ledgers").is_dir() else ()
    return {file.name: len(read_ledger(file).trainings) for file in files}


def test_units_are_the_values_of_a_column_and_the_public_number_sets_the_rate(tmp_path):
    config = private_config(
        tmp_path,
        dp={"unit-column": "kind", "budget": 5.0, "public-units": 40, "noise-multiplier": None},
    )
    client = prepare_client(config, "site0", tmp_path / "store")
    assert len(set(client.train.units)) == 2
    payload = smoke_test_task(config, client)
    terms = decode_task(payload).request.private
    settings = client.private.settings(terms, decode_task(payload).request.hyperparameters)
    assert sorted(row for unit in settings.units for row in unit) == list(range(len(client.train)))
    assert len(settings.units) == 2
    mechanism = settings.mechanism
    assert mechanism.sample_rate == pytest.approx(4 / 40)
    assert mechanism.expected_batch == pytest.approx(4)
    assert client.num_examples == 40
    client.handle(payload, is_smoke_test=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"function": "a:b"}}, "training.function cannot be used"),
        ({"training": {"arguments": {"gradient_checkpointing": True}}}, "gradient_checkpointing"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype = bfloat16 cannot be used"),
        ({"model": {"tf32": True}}, "model.tf32 = True"),
        ({"model": {"quantization": "nf4"}}, "model.quantization = nf4"),
        ({"lora": {"target-parameters": ["down_proj"]}}, "lora.target-parameters"),
        ({"model": {"task": "sequence-classification"}}, "model.labels must be given"),
        ({"dp": {"noise-multiplier": None}}, "must name epsilon or noise-multiplier"),
        (
            {
                "privacy": {"secure-aggregation": True, "dp": DP},
                "training": {"arguments": {"optim": "sgd"}},
            },
            "privacy.max-change",
        ),
    ],
)
def test_settings_that_contradict_privacy_are_refused(tmp_path, sections, message):
    with pytest.raises(ConfigError, match=message):
        check_private_run(private_config(tmp_path, **sections))


def test_client_needs_a_budget_and_auto_means_float32(tmp_path):
    with pytest.raises(ConfigError, match="budget must be given at a client"):
        check_private_client(private_config(tmp_path))
    check_private_client(private_config(tmp_path, dp={"budget": 1.0}))
    config = private_config(tmp_path, model={"dtype": "auto"})
    assert choose_private_dtype(config).model.dtype == "float32"
    assert (
        choose_private_dtype(tiny_config(tmp_path, model={"dtype": "auto"})).model.dtype == "auto"
    )


@pytest.mark.parametrize(
    ("name", "warns"),
    [("fedmomentum", True), ("fedit", True), ("fedsvd", False), ("rolora", False)],
)
def test_plan_warns_of_noise_in_both_factors(tmp_path, name, warns):
    config = private_config(tmp_path, method={"name": name})
    warnings = private_warnings(config, make_method(config))
    assert any("noise of both multiplies" in warning for warning in warnings) == warns


def test_run_for_an_epsilon_cannot_be_made_longer(tmp_path, monkeypatch):
    """The noise of the rounds before would have been too little; a budget may change."""
    epsilon = {"noise-multiplier": None, "epsilon": 50.0}
    first_config = private_config(tmp_path, dp=epsilon)
    monkeypatch.setattr(setup, "saved_settings", lambda *_: first_config)
    longer = private_config(tmp_path, dp=epsilon, federation={"num-rounds": 3})
    with pytest.raises(ConfigError, match="noise was chosen for privacy.dp.epsilon"):
        setup.check_run_directory(longer, tmp_path, resume=True)
    setup.check_run_directory(first_config, tmp_path, resume=True)
    with pytest.raises(ConfigError, match="--round has rounds done again"):
        setup.check_run_directory(first_config, tmp_path, resume=True, server_round=1)
    richer = private_config(tmp_path, dp={**epsilon, "budget": 60.0, "ledger": "elsewhere"})
    setup.check_run_directory(richer, tmp_path, resume=True)
    noisier = private_config(tmp_path, dp={**epsilon, "max-grad-norm": 2.0})
    with pytest.raises(ConfigError, match="privacy.dp.max-grad-norm"):
        setup.check_run_directory(noisier, tmp_path, resume=True)
