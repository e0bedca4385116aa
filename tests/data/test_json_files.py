"""JSON files: blank lines, one object, and lists by client."""

import json

import pytest

from fedmomentum.config.data import DataConfig
from fedmomentum.data import read_rows
from fedmomentum.data.client_data import load_clients
from fedmomentum.errors import DataError
from tests.data.dicts import as_dicts


def rows(name, number=3):
    return [{"question": f"{name} {index}?", "answer": "a"} for index in range(number)]


def write(tmp_path, value):
    file = tmp_path / "d.json"
    file.write_text(json.dumps(value, indent=1))
    return file


def load(file, **settings):
    return load_clients(DataConfig(source=str(file), test_fraction=0, **settings), 0)


def test_lists_by_client_are_the_clients(tmp_path):
    file = write(tmp_path, {"south": rows("s"), "north": rows("n", 4)})
    clients = load(file, num_clients=5)
    assert [(client.client_id, len(client.train)) for client in clients] == [
        ("north", 4),
        ("south", 3),
    ]
    assert all("n " in example.prompt[0]["content"] for example in clients[0].train)
    tests = tmp_path / "tests.json"
    tests.write_text(json.dumps({"south": rows("t", 2), "north": rows("u", 1)}))
    clients = load(file, test_source=str(tests))
    assert [len(client.test) for client in clients] == [1, 2]


def test_one_object_is_one_row(tmp_path):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert as_dicts(read_rows(write(tmp_path, chat))) == [chat]
    assert read_rows(write(tmp_path, {"question": "a", "answer": "b"})).num_rows == 1
    pair = {"chosen": chat["messages"], "rejected": chat["messages"]}
    assert load_error(write(tmp_path, pair)).endswith("drop the row")


def load_error(file, **settings):
    with pytest.raises(DataError) as raised:
        load(file, **settings)
    return str(raised.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"train": rows("a"), "test": rows("b")}, "'train', 'test' names a part of a data set"),
        ({"north": rows("a"), "south": []}, "client 'south' has no rows"),
        ({"north": rows("a"), " ": rows("b")}, "a key of the outer object: a client has no name"),
        ({"data": rows("a")}, "the columns data fit no known format"),
        ({"version": 1, "rows": rows("a")}, "the columns version, rows fit no known format"),
    ],
)
def test_objects_that_are_no_lists_by_client_are_refused(value, message, tmp_path):
    assert message in load_error(write(tmp_path, value))


def test_a_client_named_twice_and_a_second_source_of_clients_are_refused(tmp_path):
    file = tmp_path / "d.json"
    text = json.dumps(rows("a"))
    file.write_text(f'{{"north": {text}, "south": {text}, "north": {text}}}')
    assert "the client 'north' comes twice" in load_error(file)
    file = write(tmp_path, {"north": rows("a"), "south": rows("b")})
    assert "leave one of them out" in load_error(file, client_column="office")
    with pytest.raises(DataError, match="says that it is east's"):
        load_clients(DataConfig(client_files={"east": str(file)}), 0)
