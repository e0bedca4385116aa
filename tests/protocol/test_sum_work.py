"""What clients of one sum must have in common is in the hash of their work, and nothing else is."""

from dataclasses import replace

import msgspec
import pytest
from msgspec import structs

from fedmomentum.protocol.codec import decode_task, encode_task
from fedmomentum.protocol.messages import EvaluateRequest, TrainRequest
from fedmomentum.protocol.sum_work import evaluation_work, projection_work, training_work
from tests.secure_runs import Federation

PERSONAL = {
    TrainRequest: {"fresh", "recipes", "seed", "probe_seed", "secure.outcome"},
    EvaluateRequest: {"fresh", "recipes", "probe_seed", "means"},
}
"""What an honest server may give each client its own value of."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The tasks of one client in one round, as it receives them."""
    folder = tmp_path_factory.mktemp("work")
    federation = Federation(folder, federation={"num_rounds": 1}, evaluation={"every": 1})
    found = {}

    def note(task):
        found[type(task.request)] = task

    federation.before = note
    federation.run(folder / "out")
    return found


def another(value):
    """A different value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return {**value, "more": 1}
    if isinstance(value, list | tuple):
        return type(value)([*value, "f" * 64])
    return "f" * 64  # in place of None


def variants(struct, prefix=""):
    """Field to the struct with another value of that field; nested structs field by field."""
    for field in structs.fields(struct):
        value = getattr(struct, field.name)
        if field.name == "secure":
            for name, inner in variants(value, f"{field.name}."):
                yield name, structs.replace(struct, **{field.name: inner})
        else:
            yield prefix + field.name, structs.replace(struct, **{field.name: another(value)})


@pytest.mark.parametrize("kind", [TrainRequest, EvaluateRequest])
def test_every_field_but_a_clients_own_changes_the_hash(tasks, kind, monkeypatch):
    hash_of = training_work if kind is TrainRequest else evaluation_work
    request = tasks[kind].request
    wanted = hash_of(request)
    # Hash without decoding, since not every altered value is valid.
    monkeypatch.setattr(
        "fedmomentum.protocol.sum_work.msgspec.json.decode", lambda data, type: msgspec.Raw(data)
    )
    before = hash_of(request)
    seen = set()
    for name, changed in variants(request):
        seen.add(name)
        assert (hash_of(changed) == before) == (name in PERSONAL[kind]), name
    assert PERSONAL[kind] <= seen and len(wanted) == 64


def test_the_hash_is_that_of_the_request_as_it_arrives(tasks):
    """Whole numbers where the type is a float: a server's own objects may have them."""
    task = tasks[TrainRequest]
    request = structs.replace(
        task.request,
        arguments={"weight_decay": 0},
        secure=structs.replace(task.request.secure, max_change=1),
    )
    received = decode_task(encode_task(replace(task, request=request)))
    assert training_work(received.request) == training_work(request)


def test_the_kinds_of_work_differ(tasks):
    hashes = {
        training_work(tasks[TrainRequest].request),
        evaluation_work(tasks[EvaluateRequest].request),
        projection_work("0" * 64, "0" * 64),
        projection_work("0" * 64, "1" * 64),
        projection_work("1" * 64, "0" * 64),
    }
    assert len(hashes) == 5
