"""Many clients, few of them at a time, very low ranks and extremely skewed data: the laws still hold.

Every client keeps its own store, so that clients that missed rounds have to catch up.
"""

import json
import statistics

import pytest

from fedmomentum.aggregation.registry import METHODS
from fedmomentum.client.client import Client
from fedmomentum.protocol.codec import decode_reply, decode_task
from tests.runs import nudge, prepare, timeless, tiny_config

ROUNDS, CATEGORIES = 4, 60
NAMES = ("fedmomentum", "fedit", "flora", "ffalora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base, and one source of 1200 examples in 60 categories."""
    folder = tmp_path_factory.mktemp("data")
    tiny_config(folder)
    rows = [
        {
            "question": f"say {i}",
            "answer": "ab cd ef gh".split()[i % 4],
            "kind": f"k{i % CATEGORIES:02d}",
        }
        for i in range(20 * CATEGORIES)
    ]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(folder, name, num_clients, rank, **data):
    skewed = {
        "client_files": {},
        "source": str(folder / "all.jsonl"),
        "num_clients": num_clients,
        "partition": "dirichlet",
        "concentration": 0.05,
        "min_examples": 1,
        **data,
    }
    return tiny_config(
        folder,
        data=skewed,
        lora={"rank": rank, "lora-alpha": 3.0 * rank},
        method={"name": name},
        federation={"num_rounds": ROUNDS, "client-fraction": 0.1},
        evaluation={"every": 2, "num_examples": 1, "final_num_examples": 1},
    )


def run_and_record(config, out, monkeypatch, function):
    """The run, its rows, and with which version each client ended the last evaluation."""
    versions = {}

    handle = Client.handle

    def step(client, payload):
        task, answer = decode_task(payload), handle(client, payload)
        if task.server_round == ROUNDS and task.kind == "evaluate":
            versions[client.client_id] = decode_reply(answer, task, 2**40).version
        return answer

    monkeypatch.setattr(Client, "handle", step)
    run = prepare(config, out)
    try:
        for client in run.clients:
            client.training_function = function or client.training_function
            client.store.directory = out / "stores" / client.client_id
            client.store.is_private = True
        run.model = run.start(lambda event, facts: None)
    finally:
        run.close()
    return run, timeless(out), versions


CASES = [
    ("fedmomentum", 30, 1, None),  # really trained
    *((name, 30, rank, nudge) for name, rank in zip(NAMES, (2, 1, 2, 1), strict=True)),
    *(
        pytest.param(name, 100, rank, nudge, marks=pytest.mark.long)
        for name, rank in zip(NAMES, (1, 2, 1, 2), strict=True)
    ),
]


@pytest.mark.parametrize(("name", "num_clients", "rank", "function"), CASES)
def test_a_tenth_of_many_clients_with_skewed_labels(
    folder, tmp_path, monkeypatch, name, num_clients, rank, function
):
    config = config_of(folder, name, num_clients, rank)
    run, rows, versions = run_and_record(config, tmp_path / "run", monkeypatch, function)
    sizes = [sum(parts["train"].values()) for parts in run.partition.values()]
    assert (
        len(sizes) == num_clients
        and min(sizes) < 6
        and max(sizes) > 3 * statistics.median(sizes) / 2
    )
    assert (
        statistics.median(len(parts["train"]) for parts in run.partition.values()) < CATEGORIES / 6
    )
    asked = set()
    for row in rows[1:]:
        assert row["failures"] == {} and row["accepted"] == row["participants"]
        assert len(row["participants"]) == num_clients // 10 and sum(
            row["weights"].values()
        ) == pytest.approx(1)
        asked |= set(row["participants"])
        if row["evaluation"] and METHODS[name]().exact:
            assert row["exactness_error"] < 1e-5
            assert row["applied_share"] is None or row["applied_share"] > 0.999
    assert (
        len(asked) < num_clients / 2
    )  # the others have missed every round, and come to the same version at the end
    assert rows[-1]["evaluation"]["by_client"].keys() <= versions.keys()
    assert versions == dict.fromkeys(run.partition, run.model.version)
    names = {blob.name for blob in run.model.base_update}
    assert bool(names) is (name in ("fedmomentum", "flora"))
    for client in run.clients:
        assert names <= {file.stem for file in (client.store.directory / "objects").iterdir()}
    assert {matrix.rank for matrix in run.model.adapter.modules.values()} == {rank}
