"""A client from task to reply: update filters, probes that can be switched off, its store."""

from dataclasses import replace

import msgspec
import pytest
import torch

from fedmomentum.errors import ModelError
from fedmomentum.global_model.client_state import ClientStateFiles
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.personal import PersonalFactors
from fedmomentum.lora.adapter import PREFIX
from fedmomentum.protocol.codec import decode_reply, decode_task, encode_task
from fedmomentum.protocol.messages import BASE_PROBES, EFFECTIVE_PROBES, SECONDS, MissingObjects
from fedmomentum.run.client_setup import prepare_client, smoke_test_task
from tests.runs import nudge, tiny_config


@pytest.fixture
def client(tmp_path):
    config = tiny_config(tmp_path)
    client = prepare_client(config, "site1", tmp_path / "store")
    client.training_function = nudge
    return client


@pytest.fixture
def task(client, tmp_path):
    return decode_task(smoke_test_task(tiny_config(tmp_path), client))


def answer(client, task):
    return decode_reply(client.handle(encode_task(task)), task, 2**40)


class Halved:
    """Half of what the client trained."""

    def __init__(self):
        self.seen = []

    def on_client(self, update):
        self.seen.append((update.client_id, update.server_round))
        modules = {}
        for module, matrix in update.trained.modules.items():
            start = update.start.modules[module]
            modules[module] = replace(
                matrix, B=(matrix.B + start.B) / 2, A=(matrix.A + start.A) / 2
            )
        return replace(update.trained, modules=modules)

    def on_server(self, aggregate, server_round):
        return aggregate


def test_an_update_filter_changes_what_leaves_the_client_and_nothing_else(client, task):
    plain = answer(client, task)
    start = GlobalModel.from_manifest(task.request.manifest, client.store.read, "start").adapter
    client.update_filter = Halved()
    filtered = answer(client, task)
    assert client.update_filter.seen == [("site1", 1)]
    for module, matrix in start.modules.items():
        for kind in "AB":
            key = f"{PREFIX}{module}.lora_{kind}.weight"
            wanted = (plain.tensors[key] + getattr(matrix, kind)) / 2
            assert torch.allclose(filtered.tensors[key], wanted)
            assert not torch.equal(filtered.tensors[key], plain.tensors[key])
    for key in (BASE_PROBES, EFFECTIVE_PROBES):
        assert torch.equal(filtered.tensors[key], plain.tensors[key])


def test_without_a_probe_seed_nothing_is_measured(client, task):
    request = msgspec.structs.replace(task.request, probe_seed=None)
    reply = answer(client, replace(task, request=request))
    assert SECONDS in reply.tensors
    assert not {BASE_PROBES, EFFECTIVE_PROBES} & reply.tensors.keys()


def test_a_private_store_keeps_the_objects_of_the_last_task_and_asks_for_missing_ones(client, task):
    needed = set(task.request.manifest.needed)
    stranger = "0" * 64
    reply = answer(client, replace(task, objects={**task.objects, stranger: b"not asked for"}))
    directory = client.store.directory / "objects"
    assert {file.stem for file in directory.iterdir()} == needed == set(reply.holds)

    lost = sorted(needed)[0]
    (directory / f"{lost}.safetensors").unlink()
    client.store.cache.clear()
    reply = answer(client, replace(task, objects={}))
    assert reply.answer == MissingObjects(missing=[lost])
    assert set(reply.holds) == needed - {lost}


def test_a_task_for_another_client_is_refused(client, task):
    with pytest.raises(ModelError, match="a task for other came to site1"):
        client.handle(encode_task(replace(task, client_id="other")))


def test_client_state_is_kept_by_round_and_pruned_with_the_checkpoints(tmp_path):
    files = ClientStateFiles(tmp_path, "run", PersonalFactors)
    for server_round in (1, 2, 4, 5):
        tensors = {"m.B": torch.full((2, 1), float(server_round))}
        files.save(PersonalFactors("north", "run", server_round, 1, 2.0, False, tensors))
    assert files.clients() == {"north": [1, 2, 4, 5]}
    state = files.load("north", 3)
    assert state is not None and state.server_round == 2 and state.tensors["m.B"][0, 0] == 2
    assert files.load("north", 0) is None and files.load("south", 9) is None
    files.prune({3, 5})
    assert list(files.files("north")) == [2, 5]
    files.discard_after(3)
    assert list(files.files("north")) == [2]
