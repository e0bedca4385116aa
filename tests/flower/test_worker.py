"""A node's worker: whatever happens to it, the next task is answered; and it never outlives its node.

Most tests run the real process and pipe with a stand-in for model and data, which loads instantly.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import msgspec
import psutil
import pytest
import torch

from fedmomentum.flower.node_callback import NodeCallback, WorkerInfo
from fedmomentum.flower.worker import Worker, WorkerError
from fedmomentum.lora.adapter import PREFIX
from fedmomentum.protocol.codec import decode_reply, encode_task
from fedmomentum.utils.io import canonical_json
from tests.runs import describe_task, tiny_config, train_task

STAND_IN = """#!{python}
import os, signal, subprocess, sys, time
from pathlib import Path
from fedmomentum.errors import DataError, ModelError
from fedmomentum.flower import worker_process

def load(setup, send):
    if (Path(setup["store"]) / "refuse").exists():
        raise ModelError("/srv/models/base is no model")
    send(b"S", b"loading")
    send(b"Y", b'{{"num_train": 5, "num_test": 2, "num_parameters": 7, "dtype": "float32", '
               b'"base_sha256": null}}')
    return step

def step(frame):
    kind, _, what = frame.partition(b" ")
    if kind == b"Tpid":
        return str(os.getpid()).encode()
    if kind == b"Texit":
        os._exit(3)
    if kind == b"Tkill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == b"Thang":
        time.sleep(600)
    if kind == b"Tchild":
        return str(subprocess.Popen(["sleep", "600"]).pid).encode()
    if kind == b"Tdata":
        raise DataError("/srv/data/north.jsonl, line 3: Mrs Miller, born 1951")
    if kind == b"Tlibrary":
        raise RuntimeError("Mrs Miller, born 1951")
    return frame

worker_process.load = load
sys.argv = ["worker", sys.argv[3]]
worker_process.main()
"""


LIGHT = WorkerInfo(5, 2, 7, "float32", None)


class Recorder(NodeCallback):
    """Notes what a worker reports, as (event, what came with it)."""

    def __init__(self, events):
        self.events = events

    def on_message(self, text):
        self.events.append(("message", text))

    def on_warning(self, text):
        self.events.append(("warning", text))

    def on_ready(self, info):
        self.events.append(("ready", info))

    def on_step(self, step, num_steps, loss):
        self.events.append(("step", step))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("data"))


@pytest.fixture
def events():
    return []


@pytest.fixture
def light(config, tmp_path, monkeypatch, events):
    """A worker with the stand-in."""
    script = tmp_path / "stand_in"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    found = Worker(config, "site0", tmp_path / "store", Recorder(events))
    yield found
    found.stop()


def pid(worker) -> int:
    return int(worker.run_task(b"pid", 30))


def has_ended(number, seconds=10.0) -> bool:
    """Whether a process ends within that time (a zombie counts as ended)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_one_process_answers_task_after_task(light, events):
    assert light.wait_until_ready() == LIGHT
    first = pid(light)
    assert first not in (0, os.getpid()) and pid(light) == first
    payload = os.urandom(3 * 2**20)
    assert light.run_task(payload, 30) == b"T" + payload and light.run_smoke_test(30) == b"C"
    assert events == [("message", "loading"), ("ready", LIGHT)]


@pytest.mark.parametrize(
    ("how", "words"), [(b"exit", "with exit code 3"), (b"kill", "by signal SIGKILL")]
)
def test_a_worker_that_dies_says_how_and_the_next_task_is_answered(light, how, words):
    first = pid(light)
    with pytest.raises(WorkerError, match=f"its worker ended {words}$"):
        light.run_task(how, 30)
    assert pid(light) != first


def test_a_worker_that_hangs_is_ended_with_its_children_and_replaced(light):
    first, child = pid(light), int(light.run_task(b"child", 30))
    started = time.monotonic()
    with pytest.raises(
        WorkerError, match="took longer than the round allows; its worker was ended"
    ):
        light.run_task(b"hang", 0.5)
    assert time.monotonic() - started < 20
    assert has_ended(first) and has_ended(child)
    assert pid(light) != first


def test_an_exception_in_a_task_ends_nothing_and_reveals_nothing(light, capfd):
    """The type of the error goes to the server, its full text to the operator of the node."""
    first = pid(light)
    for task, kind, full_text in (
        (b"data", "DataError", "line 3: Mrs Miller"),
        (b"library", "RuntimeError", "Mrs Miller"),
    ):
        with pytest.raises(WorkerError) as raised:
            light.run_task(task, 30)
        assert (
            str(raised.value) == f"{kind} (its own log says more)"
            and full_text in raised.value.detail
        )
    assert pid(light) == first
    assert "RuntimeError: Mrs Miller" in capfd.readouterr().err  # with where it came from


def test_a_worker_that_cannot_load_gives_the_reason_without_the_path(light, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "refuse").touch()
    with pytest.raises(WorkerError) as raised:
        light.wait_until_ready()
    assert str(raised.value) == "ModelError: [path]"
    with pytest.raises(WorkerError):
        light.run_task(b"pid", 30)
    (tmp_path / "store" / "refuse").unlink()  # fixed: the next try works
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            assert pid(light)
            return
        except WorkerError:
            continue
    pytest.fail("it was not restarted")


def test_no_other_process_can_reach_a_worker(light, config, tmp_path):
    """It listens nowhere, and its only socket is in no other process but its node's."""
    other = Worker(config, "site1", tmp_path / "other")
    try:
        pids = [pid(light), pid(other)]

        def sockets(number):
            found = set()
            for handle in os.listdir(f"/proc/{number}/fd"):
                with contextlib.suppress(FileNotFoundError):  # the one that lists them
                    found.add(os.readlink(f"/proc/{number}/fd/{handle}"))
            return {link for link in found if link.startswith("socket:")}

        ours, theirs = sockets(pids[0]), sockets(pids[1])
        assert len(ours) == len(theirs) == 1 and not ours & theirs
        assert not (ours | theirs) & sockets(os.getpid())  # the node holds the other ends
        for number in pids:
            connections = psutil.Process(number).net_connections(kind="all")
            assert all(
                c.family.name == "AF_UNIX" and not c.laddr and c.status == "NONE"
                for c in connections
            )
    finally:
        other.stop()


@pytest.mark.parametrize("task", [b"pid", b"hang"])
def test_a_worker_ends_with_its_node_even_one_that_is_killed(config, tmp_path, task):
    script = tmp_path / "stand_in"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(0o700)
    node = f"""
import sys, threading
from pathlib import Path
from fedmomentum.config.toml import from_dict
from fedmomentum.flower.worker import Worker
sys.executable = {str(script)!r}
worker = Worker(from_dict({{}}), "site0", Path({str(tmp_path / "store")!r}))
worker.wait_until_ready()
print(int(worker.run_task(b"pid", 30)), flush=True)
worker.run_task({task!r}, 600)
threading.Event().wait()
"""
    process = subprocess.Popen([sys.executable, "-c", node], stdout=subprocess.PIPE)
    try:
        number = int(process.stdout.readline())
        assert not has_ended(number, 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert has_ended(number)
    finally:
        process.kill()
        process.stdout.close()


@pytest.fixture(scope="module")
def real(config, tmp_path_factory):
    """A worker with model and data, and the events that it reported."""
    own = {"site0": config.data.client_files["site0"]}
    config = replace(
        config, data=replace(config.data, client_files=own), lora=replace(config.lora, rank=3)
    )
    events = []
    store = tmp_path_factory.mktemp("real") / "store"
    worker = Worker(config, "site0", store, Recorder(events))
    yield worker, store, events
    worker.stop()


def test_a_real_worker_loads_trains_a_step_and_describes_itself(real):
    worker, store, events = real
    facts = worker.wait_until_ready()
    assert facts.num_train == 9 and facts.num_test == 3 and len(facts.base_sha256) == 64
    worker.run_smoke_test(60)
    assert [step for event, step in events if event == "step"] == [1]
    task = describe_task(adapter=True)
    reply = decode_reply(worker.run_task(encode_task(task), 60), task, 2**30)
    assert reply.tensors[
        f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    ].shape == torch.Size([3, 32])
    description = canonical_json(msgspec.to_builtins(reply.answer))
    assert "/" not in description.replace("://", "")  # what the party calls its base is a path
    with pytest.raises(WorkerError, match="a task for site1 came to site0"):
        worker.run_task(encode_task(replace(task, client_id="site1")), 60)


@pytest.mark.long
def test_a_worker_with_another_split_than_at_the_start_of_the_run_warns(real, config):
    """Another seed trains on what was held out: it is reported at the node, and nothing of it to the server."""
    worker, store, events = real
    describe = describe_task(adapter=False)
    worker.set_run(describe.run_id)
    worker.run_task(encode_task(describe), 60)
    assert not [text for event, text in events if event == "warning"]
    later_events = []
    own = replace(config.data, client_files={"site0": config.data.client_files["site0"]})
    other = replace(config, data=own, run=replace(config.run, seed=config.run.seed + 1))
    restarted = Worker(other, "site0", store, Recorder(later_events))
    try:
        restarted.set_run(describe.run_id)
        answer = restarted.run_task(encode_task(describe), 60)
    finally:
        restarted.stop()
    (warning,) = [text for event, text in later_events if event == "warning"]
    assert (
        "of 3 that were held out are trained on now" in warning
        and str(store / "split.json") in warning
    )
    assert f"run.seed was {config.run.seed} and is {config.run.seed + 1}" in warning
    assert b"held" not in answer


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a" * 63, "A" * 64])
def test_tasks_cannot_name_files(real, name):
    """A name that is not a hash is no object's name."""
    worker, store, _ = real
    describe = describe_task()
    assert worker.run_task(encode_task(describe), 60)  # it is loaded, and all it writes is there
    before = {file for file in store.parent.rglob("*") if file.is_file()}
    task = train_task(manifest={"base_update": [name]}, objects={name: b"evil"})
    with pytest.raises(
        WorkerError, match="PayloadError: a task: request.manifest.base_update"
    ) as raised:
        worker.run_task(encode_task(task), 60)
    assert "evil" not in str(raised.value)
    assert {
        file for file in store.parent.rglob("*") if file.is_file()
    } == before and not os.path.exists("/tmp/evil")
