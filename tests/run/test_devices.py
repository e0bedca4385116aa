"""`run.devices`: clients in worker processes give the bits of one process, whatever happens to a worker.

Most tests run the real pipe and a real process with a stand-in for model and data, which loads instantly.
"""

import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fedmomentum.config.toml import apply_overrides, from_dict
from fedmomentum.data.tokenized import EMPTY_EXAMPLES, TokenizedClient, TokenizedExamples
from fedmomentum.errors import ConfigError, ModelError
from fedmomentum.formats.plan import divide_clients
from fedmomentum.protocol.transport import Failure, InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.devices import DeviceTransport, worker_threads
from fedmomentum.run.federated_trainer import FederatedTrainer
from fedmomentum.run.networked import run_federation
from fedmomentum.server.callbacks import Callback
from tests.runs import Events, chain, objects, timeless, tiny_config

STAND_IN = """#!{python}
import json, logging, os, signal, sys, time, tomllib
from pathlib import Path
import msgspec
from fedmomentum.errors import ModelError
from fedmomentum.run import clients_process
from fedmomentum.run.worker_process import Frame

def load(body, send):
    setup = msgspec.msgpack.decode(body, type=clients_process.ClientsSetup)
    config = tomllib.loads(setup.config)
    device = config["model"]["device"]
    folder = Path(setup.directory)
    if (folder / f"refuse-{{device}}").exists():
        raise ModelError("the base does not fit")
    if (folder / f"die-{{device}}").exists():
        os._exit(7)
    dtype = "bfloat16" if (folder / f"bfloat16-{{device}}").exists() else "float32"
    facts = dict(device=device, dtype=dtype, adapted_weights="float32", attention="sdpa",
                 tf32=False, base_sha256="0" * 64, threads=config["run"]["threads"])
    send(Frame.READY, json.dumps(facts).encode())
    examples = {{one.client_id: one.train for one in setup.clients}}
    logging.getLogger("fedmomentum").addHandler(clients_process._WarningFrames(send))

    def answer(frame):
        name, _, payload = frame[1:].partition(b"\\0")
        name = name.decode()
        if payload == b"kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if payload == b"hang":
            time.sleep(600)
        if payload == b"slow":
            time.sleep(0.3)
        if payload == b"error":
            send(Frame.ERROR, clients_process.describe_error(MemoryError("CUDA out of\\nmemory")))
            return None
        if payload == b"step":
            logging.getLogger("fedmomentum").warning("a warning of %s", name)
            step = {{"client": name, "step": 1, "num_steps": 2, "loss": 0.5}}
            send(Frame.STEP, json.dumps(step).encode())
        reply = dict(name=name, device=device, pid=os.getpid(), size=len(payload),
                     ids=examples[name].input_ids)
        return json.dumps(reply).encode()

    return answer

clients_process._load = load
sys.argv = ["worker", sys.argv[3]]
clients_process.main()
"""


class Steps(Callback):
    def __init__(self):
        self.steps = []

    def on_step(self, client, step, num_steps, loss):
        self.steps.append((client, step, num_steps, loss))


def child_pids() -> set[int]:
    """The processes that this one has started and that have not ended."""
    return {child.pid for child in psutil.Process().children()}


def examples(client):
    return TokenizedExamples(((1, 2, client), (3, client)), (1, 1), ("x", "y"), (False, True), 0)


@pytest.fixture
def light(tmp_path, monkeypatch):
    """Makes transports of six clients on three stand-ins; they are closed at the end."""
    script = tmp_path / "stand_in"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    created = []

    def make(devices=("cpu", "cpu:0"), num_clients=5, callback=None, threads=1):
        config = from_dict({"run": {"devices": list(devices), "threads": threads}})
        clients = [
            TokenizedClient(f"c{k}", examples(k), EMPTY_EXAMPLES) for k in range(num_clients)
        ]
        created.append(DeviceTransport(config, clients, (), tmp_path, callback or Callback()))
        return created[-1]

    yield make
    for transport in created:
        transport.close()


def answers(transport, tasks):
    """What came of an exchange: replies as tables, failures as they are."""
    import json

    found = {}
    for client, answer in transport.send_and_receive(tasks):
        assert client not in found
        found[client] = answer if isinstance(answer, Failure) else json.loads(answer)
    return found


# ── who does what ──


def test_clients_are_divided_by_their_names_alone():
    def divided(clients, devices):
        return [(plan.device, *plan.clients) for plan in divide_clients(clients, devices)]

    assert divided(["d", "a", "c", "b", "e"], ["x", "y"]) == [("x", "a", "c", "e"), ("y", "b", "d")]
    assert divided(["b", "a"], ["x", "x", "z"]) == [("x", "a"), ("x", "b")]
    assert divided(["a"], []) == []


def test_threads_are_those_of_the_settings_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert worker_threads(3, 4) == 3
    assert [worker_threads(0, n) for n in (1, 3, 64)] == [16, 5, 1]


def test_each_worker_gets_its_clients_examples_and_does_their_tasks_in_order(light):
    callback = Steps()
    transport = light(callback=callback)
    facts = transport.start()
    assert facts["device"] == "cpu, cpu:0" and facts["threads"] == 1
    assert transport.clients() == ["c0", "c1", "c2", "c3", "c4"]
    big = os.urandom(3 * 2**20)
    found = answers(transport, {"c3": b"x", "c0": b"slow", "c1": big, "c2": b"y", "zz": b""})
    assert found.pop("zz") == Failure("missing: no such client is connected")
    assert {name: reply["device"] for name, reply in found.items()} == {
        "c0": "cpu",
        "c1": "cpu:0",
        "c2": "cpu",
        "c3": "cpu:0",
    }
    assert found["c1"]["size"] == len(big)
    assert found["c2"]["ids"] == [[1, 2, 2], [3, 2]]
    assert found["c0"]["pid"] == found["c2"]["pid"] != found["c1"]["pid"]
    assert list(found).index("c3") < list(found).index("c0")  # as they arrive
    assert not callback.steps


def test_steps_and_warnings_of_a_worker_are_reported_here(light, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fedmomentum"), "propagate", True)
    callback = Steps()
    transport = light(callback=callback, num_clients=2)
    transport.start()
    answers(transport, {"c0": b"step", "c1": b"step"})
    assert sorted(callback.steps) == [("c0", 1, 2, 0.5), ("c1", 1, 2, 0.5)]
    assert {"a warning of c0", "a warning of c1"} <= set(caplog.messages)


def test_what_a_client_raises_reads_as_in_one_process(light):
    def fails(payload):
        raise MemoryError("CUDA out of\nmemory")

    ((_, alone),) = InProcessTransport({"c0": fails}).send_and_receive({"c0": b""})
    transport = light()
    transport.start()
    found = answers(transport, {"c0": b"error", "c2": b"x", "c1": b"x"})
    assert found["c0"] == alone and "MemoryError: CUDA out of" in alone.reason
    assert found["c2"]["name"] == "c2"  # by the same worker


# ── workers that die ──


def test_a_worker_that_dies_fails_one_client_and_a_new_one_continues(light):
    transport = light()
    transport.start()
    before = answers(transport, {"c0": b"x", "c1": b"x"})
    found = answers(transport, {"c0": b"kill", "c1": b"x", "c2": b"x", "c3": b"x", "c4": b"kill"})
    reason = (
        "its worker on cpu ended by signal SIGKILL (the system does that where it is short of "
        "memory)"
    )
    assert found["c0"] == found["c4"] == Failure(reason)
    assert found["c1"]["pid"] == found["c3"]["pid"] == before["c1"]["pid"]
    assert found["c2"]["pid"] != before["c0"]["pid"]
    assert {*answers(transport, dict.fromkeys(transport.clients(), b"x"))} == {*transport.clients()}


def test_a_worker_that_dies_between_exchanges_is_started_again(light):
    transport = light()
    transport.start()
    before = answers(transport, {"c0": b"x"})["c0"]["pid"]
    os.kill(before, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(before)], timeout=5)
    after = answers(transport, {"c0": b"x", "c2": b"x"})
    assert after["c0"]["pid"] == after["c2"]["pid"] != before


@pytest.mark.parametrize(
    ("how", "first", "others"),
    [
        ("die", "its worker on cpu ended with exit code 7 while it was loading", None),
        (
            "refuse",
            "ModelError: the base does not fit",
            "its worker on cpu ended with exit code 2 while it was loading",
        ),
    ],
)
def test_a_worker_that_cannot_load_again_fails_its_clients_until_it_can(
    light, tmp_path, how, first, others
):
    transport = light()
    transport.start()
    (tmp_path / f"{how}-cpu").touch()
    found = answers(transport, {**dict.fromkeys(["c1", "c2", "c4"], b"x"), "c0": b"kill"})
    assert "SIGKILL" in found["c0"].reason and found["c1"]["name"] == "c1"
    assert found["c2"] == Failure(first) and found["c4"] == Failure(others or first)
    (tmp_path / f"{how}-cpu").unlink()
    assert answers(transport, {"c4": b"x"})["c4"]["name"] == "c4"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("refuse-cpu:0", "the worker on cpu:0 cannot load: ModelError: the base does not fit"),
        ("die-cpu:0", "its worker on cpu:0 ended with exit code 7 while it was loading"),
        (
            "bfloat16-cpu:0",
            r"differ in dtype \(cpu: float32, cpu:0: bfloat16\), so a client's result would",
        ),
    ],
)
def test_a_start_that_fails_names_the_device_and_leaves_no_process(light, tmp_path, file, message):
    (tmp_path / file).touch()
    before = child_pids()
    transport = light()
    with pytest.raises(ModelError, match=message):
        transport.start()
    assert child_pids() == before


def test_an_abandoned_exchange_ends_the_busy_workers(light):
    """Later it would be unclear whose reply it was."""
    before = child_pids()
    transport = light()
    transport.start()
    exchange = transport.send_and_receive({"c0": b"x", "c1": b"hang", "c2": b"x"})
    assert next(exchange)[0] == "c0"
    exchange.close()
    assert {*answers(transport, {"c1": b"x", "c0": b"x"})} == {"c0", "c1"}
    transport.close()
    assert child_pids() == before


# ── settings ──


def test_settings_that_contradict_it_are_refused(tmp_path):
    config = from_dict({"run": {"devices": ["cpu", "cpu"]}})
    with pytest.raises(ConfigError, match='model.device must be left out, or "auto", where run.d'):
        apply_overrides(config, ["model.device=cpu"])
    for wrong in (["auto"], ["cpu", "cuda:0"], [""]):
        with pytest.raises(ConfigError, match="run.devices must be devices of one kind"):
            replace(config.run, devices=wrong)
    with pytest.raises(ConfigError, match="run.devices is for fedmomentum run and compare"):
        prepare_client(config, "north", tmp_path)
    with pytest.raises(ConfigError, match="run.devices is for fedmomentum run and compare"):
        run_federation(InProcessTransport({}), config, tmp_path)


def test_a_missing_device_is_refused_by_name_before_anything_is_started(tmp_path):
    config = tiny_config(tmp_path, model={"device": "auto"}, run={"devices": ["cuda:0", "cuda:63"]})
    with pytest.raises(ModelError, match="run.devices: this machine has no cuda"):
        FederatedTrainer(config, tmp_path / "run").prepare()


def test_an_update_filter_stays_in_its_process(tmp_path):
    config = tiny_config(tmp_path, model={"device": "auto"}, run={"devices": ["cpu"]})
    trainer = FederatedTrainer(config, tmp_path / "run", update_filter=object())
    with pytest.raises(ConfigError, match="an update filter is an object of this process"):
        trainer.prepare()


def test_the_plan_says_what_each_device_holds(tmp_path):
    def plan(*devices):
        settings = {"device": "auto", "dtype": "bfloat16"}
        config = tiny_config(tmp_path, model=settings, run={"devices": list(devices)})
        return FederatedTrainer(config, tmp_path / "run").plan()[0]

    one = plan("cuda:5")
    two = plan("cuda:5", "cuda:6", "cuda:5", "cuda:7")
    assert [(w.device, *w.clients) for w in two.workers] == [
        ("cuda:5", "site0"),
        ("cuda:6", "site1"),
        ("cuda:5", "site2"),
    ]
    assert two.device_memory == one.device_memory  # of one worker
    assert any("cuda:7 will not be used" in text for text in two.warnings)
    # The server and three workers on the host, instead of the server and one.
    libraries = 400 * 2**20
    assert two.host_memory.training - one.host_memory.training >= 2 * libraries
    on_cpu = plan("cpu", "cpu")
    assert on_cpu.device_memory is None
    assert on_cpu.host_memory.at_rest > plan("cpu").host_memory.at_rest + libraries


# ── whole runs ──


def real_config(folder: Path, *devices: str):
    return tiny_config(
        folder,
        model={"device": "auto"},
        lora={"clients": {"site1": {"rank": 1, "lora-alpha": 3.0}}},
        training={"optimizer_state": "local"},
        run={"devices": list(devices)},
    )


def stopped_after(server_round):
    """A callback that presses Ctrl-C when that round is committed."""

    def stop(event, facts):
        if event == "row" and facts["round"] == server_round:
            raise KeyboardInterrupt

    return Events(stop)


def same(first: Path, second: Path) -> bool:
    return (
        chain(first) == chain(second)
        and timeless(first) == timeless(second)
        and objects(first) == objects(second)
    )


def test_two_workers_give_the_bits_of_one_process_and_either_continues_the_other(tmp_path):
    """Two rounds in workers, then Ctrl-C; the rest here. Unequal ranks, own states, scaling 3."""
    FederatedTrainer(real_config(tmp_path), tmp_path / "one").train()
    before = child_pids()
    config = real_config(tmp_path, "cpu", "cpu")
    trainer = FederatedTrainer(config, tmp_path / "two", callbacks=[stopped_after(2)])
    run = trainer.prepare()
    assert len(child_pids() - before) == 2 and run.local is None and not run.clients
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert child_pids() == before  # they end with the run
    FederatedTrainer(real_config(tmp_path), tmp_path / "two", resume=True).train()
    assert same(tmp_path / "one", tmp_path / "two")


class Killer(Callback):
    """Kills a worker when the first client trains its first step in a round."""

    def __init__(self, server_round):
        self.server_round = server_round
        self.before = child_pids()
        self.now = 0
        self.killed = ""

    def on_round_begin(self, server_round, clients):
        self.now = server_round

    def on_step(self, client, step, num_steps, loss):
        if self.now == self.server_round and not self.killed:
            self.killed = client
            # The first worker plays the first client of every two.
            workers = sorted(child_pids() - self.before)
            os.kill(workers[int(client == "site1")], signal.SIGKILL)
            time.sleep(0.2)


@pytest.mark.long
@pytest.mark.parametrize("method", ["fedmomentum", "frlora"])
def test_a_run_in_workers_resumed_in_workers_and_one_that_loses_a_worker(tmp_path, method):
    def config(*devices):
        found = replace(real_config(tmp_path, *devices), lora=tiny_config(tmp_path).lora)
        return apply_overrides(found, [f"method.name={method}"])

    FederatedTrainer(config(), tmp_path / "one").train()
    with pytest.raises(KeyboardInterrupt):
        FederatedTrainer(
            config("cpu", "cpu"), tmp_path / "two", callbacks=[stopped_after(1)]
        ).train()
    FederatedTrainer(config("cpu", "cpu", "cpu"), tmp_path / "two", resume=True).train()
    assert same(tmp_path / "one", tmp_path / "two")

    killer = Killer(2)
    FederatedTrainer(config("cpu", "cpu"), tmp_path / "three", callbacks=[killer]).train()
    rows = timeless(tmp_path / "three")
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert "ended by signal SIGKILL" in rows[2]["failures"][killer.killed]
    assert len(rows[2]["failures"]) == 1 and not rows[3]["failures"]
    assert rows[:2] == timeless(tmp_path / "one")[:2]
