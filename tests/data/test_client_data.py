import json
import logging
from collections import Counter

import pytest

from fedmomentum.config.data import PARTITIONS as PARTITION_NAMES
from fedmomentum.config.data import DataConfig
from fedmomentum.data import ClientData, Example, client_data, partition_table
from fedmomentum.data.partition import PARTITIONS
from fedmomentum.errors import ConfigError, DataError


def make_rows(count, *, start=0, topics=("sum", "product", "root"), hospitals=("north", "south")):
    return [
        {
            "prompt": f"question {number}",
            "completion": f"answer {number}",
            "topic": topics[number % len(topics)],
            "hospital": hospitals[number % len(hospitals)],
        }
        for number in range(start, start + count)
    ]


def load_clients(*, seed=0, **settings):
    """The clients of a section [data] with these settings."""
    for key in ("source", "test_source"):
        if key in settings:
            settings[key] = str(settings[key])
    if "client_files" in settings:
        settings["client_files"] = {
            client: str(file) for client, file in settings["client_files"].items()
        }
    config = DataConfig(**{"num_clients": 10, "min_examples": 1} | settings)
    return client_data.load_clients(config, seed)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts(examples):
    return [example.prompt for example in examples]


def all_prompts(clients, part):
    return sorted(prompt for client in clients for prompt in prompts(getattr(client, part)))


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "all.jsonl", make_rows(120))


@pytest.mark.parametrize(
    "how",
    [
        {"partition": "iid"},
        {"partition": "dirichlet", "category_column": "topic", "min_examples": 10},
        {"partition": "categories", "category_column": "topic"},
        {"partition": "sizes", "sizes": [3, 2, 1]},
    ],
    ids=lambda how: how["partition"],
)
def test_one_source_is_divided_without_loss_or_overlap(source, how):
    clients = load_clients(source=source, num_clients=3, seed=4, **how)
    assert [client.client_id for client in clients] == ["client-0", "client-1", "client-2"]
    assert sorted(all_prompts(clients, "train") + all_prompts(clients, "test")) == sorted(
        row["prompt"] for row in make_rows(120)
    )
    for client in clients:
        size = len(client.train) + len(client.test)
        assert len(client.test) == max(round(0.1 * size), size >= 10)
    assert load_clients(source=source, num_clients=3, seed=4, **how) == clients
    assert load_clients(source=source, num_clients=3, seed=5, **how) != clients


def test_client_ids_sort_as_numbers(source):
    clients = load_clients(source=source, num_clients=11)
    assert [client.client_id for client in clients] == [
        f"client-{number:02d}" for number in range(11)
    ]


def test_client_column_assigns_rows_to_clients(source):
    clients = load_clients(
        source=source, client_column="hospital", category_column="topic", test_fraction=0.0
    )
    assert [client.client_id for client in clients] == ["north", "south"]
    assert prompts(clients[0].train) == [
        row["prompt"] for row in make_rows(120) if row["hospital"] == "north"
    ]
    assert clients[0].train[0].category == "sum" and clients[0].test == ()


def test_client_files_and_a_client_alone_finds_the_same_split(tmp_path):
    files = {
        "b": write(tmp_path / "b.jsonl", make_rows(30)),
        # Half of what "b" holds too: no client can tell.
        "a": write(tmp_path / "a.jsonl", make_rows(30, start=15)),
    }
    clients = load_clients(client_files=files, test_fraction=0.2, seed=1)
    assert [client.client_id for client in clients] == ["a", "b"]
    assert [len(client.test) for client in clients] == [6, 6]
    for client in clients:
        alone = load_clients(
            client_files={client.client_id: files[client.client_id]}, test_fraction=0.2, seed=1
        )
        assert alone == [client]


def test_prompts_that_clients_files_share_are_warned_of(tmp_path, caplog):
    """They cannot be left out: over a network, no client sees the others' files."""
    files = {
        "north": write(tmp_path / "a.jsonl", make_rows(40)),
        "south": write(tmp_path / "b.jsonl", make_rows(40, start=100)),
    }
    load_clients(client_files=files, test_fraction=0.25)
    assert not caplog.records
    files["east"] = files["north"]
    clients = {c.client_id: c for c in load_clients(client_files=files, test_fraction=0.25)}
    trained = {example.prompt for example in clients["east"].train}
    shared = [example for example in clients["north"].test if example.prompt in trained]
    (message,) = (record.getMessage() for record in caplog.records)
    assert shared and f"{len(shared)} of north's {len(clients['north'].test)}" in message
    assert "of east's" in message and "south" not in message


def test_no_prompt_is_trained_on_and_held_out(tmp_path):
    rows = make_rows(40)
    source = write(tmp_path / "d.jsonl", rows + rows[:30])
    clients = load_clients(source=source, num_clients=4, test_fraction=0.5)
    train, test = all_prompts(clients, "train"), all_prompts(clients, "test")
    assert test and set(train).isdisjoint(test)
    assert len(train) + len(test) == 70
    assert set(test) <= {row["prompt"] for row in rows[30:]}


@pytest.mark.parametrize(
    ("size", "fraction", "held_out"), [(9, 0.01, 0), (10, 0.01, 1), (10, 0.0, 0), (2, 0.99, 1)]
)
def test_how_many_are_held_out(tmp_path, size, fraction, held_out):
    source = write(tmp_path / "d.jsonl", make_rows(size))
    (client,) = load_clients(source=source, num_clients=1, test_fraction=fraction)
    assert len(client.test) == held_out and len(client.train) == size - held_out


def test_shared_test_set_follows_the_clients_categories(source, tmp_path):
    extra = make_rows(12, start=2000, topics=("new",))
    test = write(tmp_path / "test.jsonl", make_rows(60, start=1000) + extra)
    clients = load_clients(
        source=source,
        test_source=test,
        num_clients=3,
        partition="categories",
        category_column="topic",
        categories_per_client=1,
    )
    assert len(all_prompts(clients, "train")) == 120
    assert all_prompts(clients, "test") == sorted(
        row["prompt"] for row in make_rows(60, start=1000) + extra
    )
    for client in clients:
        (topic,) = {example.category for example in client.train}
        assert Counter(example.category for example in client.test) == {topic: 20, "new": 4}


def test_shared_test_set_with_the_client_column(source, tmp_path):
    test = write(tmp_path / "test.jsonl", make_rows(10, start=1000))
    north, south = load_clients(source=source, client_column="hospital", test_source=test)
    assert prompts(north.test) == [
        row["prompt"] for row in make_rows(10, start=1000) if row["hospital"] == "north"
    ]
    assert len(south.test) == 5
    write(test, make_rows(10, start=1000, hospitals=("north", "east")))
    with pytest.raises(
        DataError, match="test.jsonl: column 'hospital' names clients without training .*: east"
    ):
        load_clients(source=source, client_column="hospital", test_source=test)


def test_test_prompts_that_are_trained_on_are_left_out(source, tmp_path, caplog):
    test = write(tmp_path / "test.jsonl", make_rows(20, start=110))
    with caplog.at_level(logging.WARNING):
        clients = load_clients(source=source, num_clients=2, test_source=test)
    assert all_prompts(clients, "test") == sorted(row["prompt"] for row in make_rows(10, start=120))
    assert "10 of 20 test examples left out" in caplog.text
    with pytest.raises(DataError, match="every prompt is also trained on"):
        load_clients(source=source, num_clients=2, test_source=source)


def test_built_in_tasks():
    pytest.importorskip("reasoning_gym")
    names = ["gcd", "chain_sum", "number_sorting", "spell_backward"]
    arguments = {
        "source": "reasoning-gym",
        "tasks": names,
        "num_examples": 1200,
        "num_test_examples": 240,
    }
    clients = load_clients(
        **arguments, num_clients=4, partition="categories", categories_per_client=2, seed=1
    )
    train, test = all_prompts(clients, "train"), all_prompts(clients, "test")
    assert len(train) == 1200 and len(test) == 240 and set(train).isdisjoint(test)
    for client in clients:
        trained = Counter(example.category for example in client.train)
        tested = Counter(example.category for example in client.test)
        assert set(trained) == set(tested) and len(trained) == 2
        assert all(abs(tested[name] - trained[name] / 5) < 1 for name in trained)
    without = load_clients(**arguments | {"num_test_examples": 0}, num_clients=2)
    assert all(client.test == () for client in without)
    with pytest.raises(DataError, match="num-test-examples = 3 must be 0, or at least 4"):
        load_clients(**arguments | {"num_test_examples": 3}, num_clients=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "data.source must be given, or data.client-files"),
        ({"source": "x.jsonl", "client_files": {"a": "x.jsonl"}}, "data.source must be left out"),
        ({"client_files": {}}, "data.source must be given, or data.client-files"),
        ({"client_files": {"a": "x.jsonl"}, "client_column": "c"}, "data.client-column must be"),
        ({"source": "x.jsonl", "tasks": ["gcd"]}, "data.tasks must be left out"),
        (
            {"source": "reasoning-gym", "category_column": "c", "test_source": "t"},
            "data.category-column must be left out with source",
        ),
        ({"source": "reasoning-gym", "test_source": "t"}, "data.test-source must be left out"),
        ({"source": "x.jsonl", "test_fraction": 1.0}, r"data.test-fraction must be in \[0, 1\)"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_clients(**arguments)


def test_a_missing_file_is_refused():
    with pytest.raises(DataError, match="x.jsonl: no such file"):
        load_clients(source="x.jsonl")


def test_the_configuration_knows_every_partition():
    assert tuple(PARTITIONS) == PARTITION_NAMES


def test_dividing_by_category_needs_one(source):
    with pytest.raises(DataError, match='"dirichlet" divides by category; give category-column'):
        load_clients(source=source, partition="dirichlet")


def test_partition_table():
    a, b = Example("p", "c", category="x"), Example("p", "c", category="a")
    clients = [ClientData("one", (a, b, a), (b,)), ClientData("two", (b,), ())]
    assert partition_table(clients) == {
        "one": {"train": {"a": 1, "x": 2}, "test": {"a": 1}},
        "two": {"train": {"a": 1}, "test": {}},
    }


def test_no_turn_of_a_chat_is_trained_on_and_tested(tmp_path):
    """Chats that begin alike differ as prompts of a last turn, and share those of first turns."""
    rows = []
    for number in range(40):
        turns = []
        for turn, question in enumerate((f"start {number // 2}", f"next {number}")):
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": f"{number} {turn}"})
        rows.append({"messages": turns})
    rows += [{"messages": [{**turns[0], "content": f"alone {n}"}, *turns[1:]]} for n in range(20)]
    config = DataConfig(
        source=str(write(tmp_path / "d.jsonl", rows)),
        num_clients=2,
        min_examples=1,
        test_fraction=0.3,
    )

    def shared(loss_on):
        clients = client_data.load_clients(config, 0, loss_on=loss_on)
        starts = {"train": set(), "test": set()}
        for client in clients:
            assert client.test
            starts["train"] |= {example.prompt[0]["content"] for example in client.train}
            starts["test"] |= {example.prompt[0]["content"] for example in client.test}
        return starts["train"] & starts["test"]

    assert shared("last")
    assert not shared("all-assistant")
