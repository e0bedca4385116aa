"""A worker that outlives the process that uses it: found again, replaced if it does not fit, and never left running."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedmomentum.config.toml import from_dict
from fedmomentum.flower.node_callback import WorkerInfo
from fedmomentum.flower.warm_worker import ADDRESS_FILE, WarmProcess
from fedmomentum.flower.worker import Worker, WorkerError

STAND_IN = """#!{python}
import os, signal, subprocess, sys, time, types
from pathlib import Path

def decode_task(data):
    return types.SimpleNamespace(run_id=data.decode()[:3], server_round=1, kind="train")

sys.modules["fedmomentum.protocol.codec"] = types.SimpleNamespace(decode_task=decode_task)
from fedmomentum.errors import ModelError
from fedmomentum.flower import warm_process, worker_process

def load(setup, send):
    with (Path(setup["store"]) / "loads").open("a") as file:
        file.write(str(os.getpid()) + " ")
    if (Path(setup["store"]) / "refuse").exists():
        raise ModelError("/srv/models/base is no model")
    send(b"Y", b'{{"num_train": 5, "num_test": 2, "num_parameters": 7, "dtype": "float32", '
               b'"base_sha256": null}}')
    runs = []
    def step(frame):
        if frame[:1] == b"I":
            runs.append(frame[1:])
            return None
        if frame == b"Truns":
            return b" ".join(runs)
        if frame == b"Tkill":
            os.kill(os.getpid(), signal.SIGKILL)
        if frame == b"Thang":
            time.sleep(600)
        if frame == b"Tchild":
            return str(subprocess.Popen(["sleep", "600"]).pid).encode()
        return str(os.getpid()).encode()
    return step

worker_process.load = load
sys.argv = ["warm", *sys.argv[3:]]
warm_process.main()
"""
PYTHON = sys.executable
LIGHT = WorkerInfo(5, 2, 7, "float32", None)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A node's store; workers for it are the stand-in, and end with the test."""
    script = tmp_path / "stand_in"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    store = tmp_path / "store"
    yield store
    for number in loads(store):
        if not has_ended(number, 0):
            os.kill(number, signal.SIGKILL)
    if (store / ADDRESS_FILE).exists():
        shutil.rmtree(socket_directory(store), ignore_errors=True)


def loads(store) -> list[int]:
    """The processes that have loaded, in their order."""
    file = store / "loads"
    return list(map(int, file.read_text().split())) if file.exists() else []


def clientapp(store, *, keep_warm=60.0, rank=8) -> Worker:
    """What each ClientApp process makes."""
    config = from_dict({"lora": {"rank": rank}})
    return Worker(config, "site0", store, process=WarmProcess(store, keep_warm))


def ask(store, what=b"pid", seconds=30.0, **settings) -> bytes:
    """One ClientApp's message from beginning to end."""
    worker = clientapp(store, **settings)
    try:
        return worker.run_task(what, seconds)
    finally:
        worker.stop()


def socket_directory(store) -> Path:
    return Path((store / ADDRESS_FILE).read_text()).parent


def has_ended(number, seconds=10.0) -> bool:
    """Whether a process ends within that time (a zombie counts as ended)."""
    end = time.monotonic() + seconds
    while True:
        try:
            if psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)


def test_one_process_answers_one_clientapp_after_the_other(store):
    first_app = clientapp(store)
    first_app.start()  # as the first message does, which has no task: it does not wait
    first_app.stop()
    first = int(ask(store))
    assert first != os.getpid() and [int(ask(store)) for _ in range(3)] == [first] * 3
    assert loads(store) == [first]
    assert clientapp(store).wait_until_ready() == LIGHT
    # each run is announced once, however many messages it has
    assert ask(store, b"runs") == b"pid run" and ask(store, b"runs") == b"pid run"


def test_no_other_user_can_access_its_directory(store):
    ask(store)
    assert socket_directory(store).stat().st_mode & 0o777 == 0o700
    assert store.stat().st_mode & 0o777 == 0o700


def test_another_configuration_has_another_process(store):
    first = int(ask(store))
    directory = socket_directory(store)
    second = int(ask(store, rank=4))
    assert second != first and has_ended(first) and not directory.exists()
    assert int(ask(store, rank=4)) == second


def test_a_task_whose_time_is_up_ends_with_all_that_it_started(store):
    first, child = int(ask(store)), int(ask(store, b"child"))
    with pytest.raises(WorkerError, match="took longer than the round allows"):
        ask(store, b"hang", 0.5)
    assert has_ended(first) and has_ended(child) and not has_ended(int(ask(store)), 0)


def test_a_worker_that_dies_in_a_task_is_replaced(store):
    first = int(ask(store))
    directory = socket_directory(store)
    with pytest.raises(WorkerError, match="its worker ended without a word"):
        ask(store, b"kill")
    assert has_ended(first) and int(ask(store)) != first
    assert not directory.exists()  # what the killed one could not remove


def test_a_process_that_cannot_load_gives_the_reason_without_the_path(store):
    store.mkdir()
    (store / "refuse").touch()
    with pytest.raises(WorkerError) as raised:
        ask(store)
    assert str(raised.value) == "ModelError: [path]" and has_ended(loads(store)[0])
    (store / "refuse").unlink()
    assert int(ask(store)) == loads(store)[1]


@pytest.mark.parametrize("keep_warm", [0.0, 0.5])
def test_it_ends_when_it_has_no_task_for_long_enough(store, keep_warm):
    number = int(ask(store, keep_warm=keep_warm))
    directory = socket_directory(store)
    assert has_ended(number, 5) and not directory.exists()
    assert int(ask(store, keep_warm=keep_warm)) != number


@pytest.mark.parametrize("task", ["pid", "hang"])
def test_it_ends_with_the_supernode_even_one_that_is_killed(store, tmp_path, task):
    """The SuperNode's process starts one for the message, and that one the worker."""
    code = f"""
import sys
from pathlib import Path
from fedmomentum.config.toml import from_dict
from fedmomentum.flower.warm_worker import WarmProcess
from fedmomentum.flower.worker import Worker
sys.executable = {sys.executable!r}
store = Path({str(store)!r})
worker = Worker(from_dict({{}}), "site0", store, process=WarmProcess(store, 600.0))
print(int(worker.run_task(b"pid", 30)), flush=True)
worker.run_task({task.encode()!r}, 600)
"""
    node = f"import subprocess, time; subprocess.run([{PYTHON!r}, '-c', {code!r}]); time.sleep(600)"
    process = subprocess.Popen([PYTHON, "-c", node], stdout=subprocess.PIPE)
    try:
        number = int(process.stdout.readline())
        assert not has_ended(number, 0.3)
        for child in psutil.Process(process.pid).children(recursive=True):
            if child.pid != number:
                child.kill()  # Flower ends its own when the SuperNode is gone
        process.kill()
        process.wait()
        assert has_ended(number)
    finally:
        process.kill()
        process.stdout.close()
