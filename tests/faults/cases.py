"""The faults, one function each: start, break, and check the result."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedmomentum.flower.certificates import make_server_keys
from fedmomentum.flower.fleet_client import ConnectionLost
from fedmomentum.flower.superlink import SuperLink
from fedmomentum.flower.transport import FlowerTransport
from fedmomentum.protocol.codec import decode_reply, decode_task, encode_task
from fedmomentum.protocol.messages import Task
from fedmomentum.protocol.transport import Failure
from tests.faults.harness import Asked, Federation, honest, until
from tests.runs import altered, describe_task, train_task
from tests.tiny import tiny_llama


class Skipped(Exception):
    """The machine cannot produce this fault; the text says why."""


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        name: for `--only`.
        fault: what is done.
        act: does it and checks what comes of it; returns who saw it and how.
        sections: of the configuration.
        seconds: it may take.
    """

    name: str
    fault: str
    act: Callable[[Federation], str]
    sections: Mapping[str, Mapping[str, Any]]
    seconds: float = 180.0


CASES: list[Case] = []


def case(
    fault: str, *, seconds: float = 180.0, **sections: Mapping[str, Any]
) -> Callable[[Callable[[Federation], str]], Callable]:
    """Register a case under the name of its function."""

    def register(act: Callable[[Federation], str]) -> Callable:
        CASES.append(Case(act.__name__.replace("_", "-"), fault, act, sections, seconds))
        return act

    return register


# ── a client that breaks ──


@case("a client raises in training")
def raises(fed: Federation) -> str:
    fed.steer("site1", 2, "raise")
    fed.start("site0", "site1", raw="site2")
    seen = fed.check(
        fails={("train", 2, "site1")}, messages={(2, "site1"): r"OSError \(its own log says more\)"}
    )
    assert "patients.csv" in fed.nodes["site1"].text(), (
        "the node's own log does not say what happened"
    )
    for text in (fed.log(), fed.server.text(), (fed.out / "metrics.jsonl").read_text()):
        assert "patients" not in text, "a client's paths came to the coordinator"
    return seen


@case("a worker process exits in training")
def worker_exits(fed: Federation) -> str:
    fed.steer("site1", 2, "exit")
    fed.start("site0", "site1", raw="site2")
    return fed.check(
        fails={("train", 2, "site1")}, messages={(2, "site1"): "worker ended with exit code 7"}
    )


@case("a worker process is killed by -9")
def worker_killed(fed: Federation) -> str:
    fed.steer("site1", 2, "hold")
    fed.start("site0", "site1", raw="site2")
    fed.until_held("site1", 2)
    worker = fed.nodes["site1"].child()
    worker.kill()
    fed.until_row(2)
    assert fed.nodes["site1"].child().pid != worker.pid
    return fed.check(
        fails={("train", 2, "site1")}, messages={(2, "site1"): "worker ended by signal SIGKILL"}
    )


@case("a node is killed by -9, and joins again two rounds later", federation={"num_rounds": 4})
def node_killed(fed: Federation) -> str:
    fed.steer("site1", 2, "hold")
    fed.steer("site0", 3, "hold")  # round 3 lasts until the node is back
    fed.start("site0", "site1", raw="site2")
    fed.until_held("site1", 2)
    fed.nodes["site1"].kill()
    fed.until_held("site0", 3)
    assert "site1" in fed.rows()[2]["failures"]
    fed.steer("site1", 2, "")
    fed.join("site1")
    until(lambda: fed.state("site1", "connected"), "site1 connected again")
    fed.steer("site0", 3, "")
    return fed.check(
        fails={("train", 2, "site1"), ("gone", 3, "site1")},
        messages={(2, "site1"): "lost its connection and did not come back in time"},
    )


@case("a node is killed by -9, and joins again within the round")
def node_killed_and_back(fed: Federation) -> str:
    for name in ("site0", "site1"):
        fed.steer(name, 2, "hold")
    fed.start("site0", "site1", raw="site2")
    fed.until_held("site1", 2)
    fed.nodes["site1"].kill()
    return comes_back(fed)


def comes_back(fed: Federation) -> str:
    """Site1 joins again while site0 is still held in the round, and is asked again."""
    fed.steer("site1", 2, "")
    fed.join("site1")
    until(lambda: "site1 came back" in fed.log(), "site1 asked again")
    fed.steer("site0", 2, "")
    fed.check(log=["site1 came back; it is asked again"])
    return "site1 came back; it is asked again"


@case("a client hangs beyond the deadline", federation={"round_timeout": 25.0})
def hangs(fed: Federation) -> str:
    fed.steer("site1", 2, "hold")
    fed.start("site0", "site1", raw="site2")
    fed.until_row(2)
    fed.steer("site1", 2, "")
    seen = fed.check(
        fails={("train", 2, "site1")}, messages={(2, "site1"): "no answer within 25 s"}
    )
    assert "took longer than the round allows; its worker was ended" in fed.nodes["site1"].text()
    return seen


@case("a client answers after the deadline", federation={"round_timeout": 12.0})
def late(fed: Federation) -> str:
    def act(asked: Asked) -> None:
        reply = asked.honest()
        if asked.is_training(2):
            fed.until_row(2)
        asked.answer(reply)

    fed.start("site0", "site1", raw="site2", act=act)
    fed.check(
        fails={("train", 2, "site2")},
        messages={(2, "site2"): "no answer within 12 s"},
        log=[r"site2 answered \d+ s too late; ignored"],
    )
    assert "site2 answered too late; ignored" in fed.server.text()
    return "site2 answered too late; ignored"


# ── a client that answers what it should not ──


@case("a client answers twice, the second time otherwise")
def twice(fed: Federation) -> str:
    second: list[int] = []

    def act(asked: Asked) -> None:
        first = asked.honest()
        asked.answer(first)
        if asked.task.kind == "train":
            other = altered(lambda fields: fields.update(num_examples=1))(
                asked.payload, lambda payload: first
            )
            try:
                asked.answer(other)
            except ConnectionLost as error:  # either it is refused, or it counts for nothing
                asked.raw.lost.append(str(error))
            second.append(asked.task.server_round)

    fed.start("site0", "site1", raw="site2", act=act)
    fed.check(log=["duplicate reply|does not exist"])
    assert second == [1, 2, 3]
    return "Flower's log: duplicate reply"


def tensors(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., bytes]:
    """An honest training reply with the tensors of its A factors altered."""

    def edit(fields: dict[str, Any]) -> None:
        for name, tensor in fields["tensors"].items():
            if "lora_A" in name:
                fields["tensors"][name] = change(tensor).contiguous()

    return altered(edit)


def lies(name: str, fault: str, lie: Callable[..., bytes], pattern: str) -> None:
    """Register a case in which site2 answers with a lie in round 1: refused by name, and the others' run continues."""

    def act(fed: Federation) -> str:
        def answer(asked: Asked) -> None:
            asked.answer(
                lie(asked.payload, asked.raw.step) if asked.is_training(1) else asked.honest()
            )

        fed.key("site1")
        fed.start("site0", raw="site2", act=answer)
        fed.raw("site1").start()
        return fed.check(fails={("train", 1, "site2")}, messages={(1, "site2"): pattern})

    CASES.append(
        Case(name, fault, act, {"federation": {"num_rounds": 2}, "evaluation": {"every": 0}})
    )


lies(
    "another-round",
    "a client answers for another round",
    altered(lambda fields: fields.update(server_round=99)),
    "for server_round 99; expected 1",
)
lies(
    "another-run",
    "a client answers for another run",
    altered(lambda fields: fields.update(run_id="0" * 32)),
    "for run_id '0{32}'; expected",
)
lies(
    "another-name",
    "a client answers in another's name",
    altered(lambda fields: fields.update(client_id="site0")),
    "for client_id 'site0'; expected 'site2'",
)
lies(
    "garbage",
    "garbage bytes",
    lambda payload, honest: b"\x07garbage" * 1000,
    "these are no tensors|not safetensors",
)
lies(
    "terabytes",
    "a header that claims terabytes",
    lambda payload, honest: (2**43).to_bytes(8, "little") + b"{}" * 100,
    f"header claims {2**43} bytes",
)
lies("nan", "NaN in an update", tensors(lambda a: a * float("nan")), "NaN or Inf")
lies("shapes", "tensors of wrong shapes", tensors(lambda a: a[:, :-1]), "has shape")
lies("ranks", "tensors of a wrong rank", tensors(lambda a: a[:-1]), "has shape")
lies(
    "count",
    "an impossible example count, 2^60",
    altered(lambda fields: fields.update(num_examples=2**60)),
    f"num_examples: Expected `int` <= {2**53 - 1}; got {2**60}",
)


@case("an absurd example count, 2^50", federation={"num_rounds": 2, "max_client_weight": 0.6})
def absurd_count(fed: Federation) -> str:
    inflate_count = altered(lambda fields: fields.update(num_examples=2**50))

    def lie(payload: bytes, honest: Callable[[bytes], bytes]) -> bytes:
        return (
            inflate_count(payload, honest)
            if decode_task(payload).kind == "train"
            else honest(payload)
        )

    fed.start(
        "site0",
        "site1",
        raw="site2",
        act=lambda asked: asked.answer(lie(asked.payload, asked.raw.step)),
    )
    fed.check(lies={"site2": lie})
    weights = [row["weights"]["site2"] for row in fed.rows()[1:]]
    assert all(abs(weight - 0.6) < 1e-9 for weight in weights), weights
    return f"its weight was capped at {weights[0]:g}"


@case("a node with another base model", federation={"num_rounds": 2})
def another_base(fed: Federation) -> str:
    other = replace(
        fed.config,
        model=replace(fed.config.model, name=str(tiny_llama(fed.folder / "other", seed=5))),
    )
    fed.key("site2")
    fed.start("site0", raw="site1")
    fed.join("site2", config=other)
    reason = "the base model differs"
    return fed.check(
        configs={"site2": other},
        log=["site2 has another base model"],
        messages={(0, "site2"): reason, (1, "site2"): reason, (2, "site2"): reason},
    )


# ── clients that are not admitted ──


@case("a node whose key is not admitted", federation={"num_rounds": 1})
def unregistered(fed: Federation) -> str:
    stranger = fed.join("site1", admitted=False)
    fed.steer("site0", 1, "hold")
    fed.start("site0")
    pattern = "the server does not admit this node: its public key is not admitted there"
    stranger.wait_for_output(pattern, times=2)  # it keeps trying
    fed.steer("site0", 1, "")
    fed.check()
    return f"the node: {pattern}"


@case("a node that trusts another authority", federation={"num_rounds": 1})
def wrong_authority(fed: Federation) -> str:
    make_server_keys(fed.folder / "other-keys", ["127.0.0.1"])
    fed.steer("site0", 1, "hold")
    fed.start("site0")
    node = fed.join("site1", ca=fed.folder / "other-keys" / "ca.pem", admitted=False)
    pattern = "the server's certificate is not one that --ca vouches for"
    node.wait_for_output(pattern, times=2)  # it keeps trying
    assert "Connected to" not in node.text()
    fed.steer("site0", 1, "")
    fed.check()
    return f"the node: {pattern}"


@case("plain HTTP to the TLS port", federation={"num_rounds": 1})
def plain_http(fed: Federation) -> str:
    fed.steer("site0", 1, "hold")
    fed.start("site0")
    fed.until_held("site0", 1)
    for request in (
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"\x00" * 4096,
    ):
        with socket.create_connection(("127.0.0.1", fed.port), timeout=10) as plain:
            plain.sendall(request)
            try:
                answer = plain.recv(4096)
            except ConnectionError:
                answer = b""
        assert b"HTTP" not in answer, answer
    fed.steer("site0", 1, "")
    fed.check()
    return "the connection is closed without an answer"


@case("Flower's control, runtime and registration paths", federation={"num_rounds": 1})
def closed_paths(fed: Federation) -> str:
    fed.steer("site0", 1, "hold")
    fed.start("site0")
    fed.until_held("site0", 1)
    trust = ssl.create_default_context(cafile=fed.keys / "ca.pem")
    paths = [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/push-messages",
        "/v1/runtime/get-nodes",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/get-run",
        "/v1/fleet/get-fab",
        "/docs",
        "/openapi.json",
        "/",
        "/v1/fleet/../control/start-run",
        "//v1/fleet/register-node",
        "/v1/fleet/register-node/",
    ]
    for path in paths:
        for data in (b"", None):  # POST and GET
            request = urllib.request.Request(
                f"https://127.0.0.1:{fed.port}{path}",
                data=data,
                headers={"Content-Type": "application/protobuf"},
            )
            try:
                with urllib.request.urlopen(request, timeout=10, context=trust) as answer:
                    raise AssertionError(f"{path} answered {answer.status}")
            except urllib.error.HTTPError as error:
                assert error.code == 404, f"{path} answered {error.code}"
    # and a path that is there answers nobody without a signature
    request = urllib.request.Request(
        f"https://127.0.0.1:{fed.port}/v1/fleet/pull-messages",
        data=b"",
        headers={"Content-Type": "application/protobuf"},
    )
    try:
        urllib.request.urlopen(request, timeout=10, context=trust)
        raise AssertionError("a request without a signature was answered")
    except urllib.error.HTTPError as error:
        assert error.code == 401, error.code
    fed.steer("site0", 1, "")
    fed.check()
    return f"404 to all {len(paths)}; 401 without a signature"


@case("a node that speaks for another", federation={"num_rounds": 2})
def speaks_for_another(fed: Federation) -> str:
    tasks: dict[str, Asked] = {}
    refused: list[str] = []

    def victim(asked: Asked) -> None:
        tasks["site1"] = asked
        if asked.is_training(1):  # the other's forgeries come first
            until(lambda: len(refused) == 3, "three forgeries")
        honest(asked)

    def forger(asked: Asked) -> None:
        if asked.is_training(1):
            other = until(
                lambda: "site1" in tasks and tasks["site1"].is_training(1) and tasks["site1"],
                "the victim",
            )
            lie = altered(lambda fields: fields.update(num_examples=1))(
                other.payload, other.raw.step
            )
            for forge in (as_sender, as_node, as_replier):
                message = forge(asked, other, lie)
                try:
                    asked.connection.push(message)
                    refused.append("it was taken, and must count for nothing")
                except ConnectionLost as error:
                    refused.append(str(error))
                finally:
                    asked.connection._node.node_id = asked.message.metadata.dst_node_id
                    asked.connection._lost = None
        honest(asked)

    def as_sender(asked: Asked, other: Asked, lie: bytes) -> Any:
        return other.message_of(lie)  # its envelope names the other; the request, us

    def as_node(asked: Asked, other: Asked, lie: bytes) -> Any:
        asked.connection._node.node_id = (
            other.message.metadata.dst_node_id
        )  # the request names the other; the key, us
        return other.message_of(lie)

    def as_replier(asked: Asked, other: Asked, lie: bytes) -> Any:
        message = other.message_of(lie)  # we answer, in our own name, what the other was asked
        message.metadata.__dict__["_src_node_id"] = asked.message.metadata.dst_node_id
        return message

    fed.key("site2")
    fed.start("site0", raw="site1", act=victim)
    fed.raw("site2", forger).start()
    fed.check()
    assert "403" in refused[0] and "signature" in refused[1], refused
    return "403, 401, and an answer that counts for nothing"


# ── a coordinator that is not honest ──


@case("paths where a coordinator sends names of objects", federation={"round_timeout": 60.0})
def paths_from_server(fed: Federation) -> str:
    """A regular node, and a coordinator of the test that asks it for what it must not do."""
    fed.key("site0")
    payload = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"  # no tensors, and well-formed
    outside = fed.folder / "outside"
    names = [
        "../../x",
        "../x",
        str(outside),
        "..",
        "a/../../x",
        "x" * 64,
        "0" * 63 + "/",
        "..\\x",
        "",
        "x\x00y",
    ]
    with SuperLink(fed.keys, "127.0.0.1", fed.port) as link:
        fed.join("site0")
        transport = FlowerTransport(
            link.grid,
            link,
            round_timeout=60,
            join_timeout=120,
            min_valid_fraction=1.0,
        )
        assert list(transport.clients()) == ["site0"]

        def ask(task: Task) -> bytes | Failure:
            return dict(transport.send_and_receive({"site0": encode_task(task)}))["site0"]

        describe = describe_task()
        reply = decode_reply(ask(describe), describe, 2**20)
        fact = reply.answer
        base = {
            "name": "x",
            "revision": None,
            "sha256": fact.sha256,
            "tokenizer_sha256": fact.tokenizer_sha256,
        }
        assert (fed.store("site0") / "config.toml").is_file()
        before = {path for path in fed.folder.rglob("*")}
        reasons = []
        for name in names:
            for update, adapter in (([], name), ([name], "0" * 64)):
                manifest = {"base_update": update, "adapter": {"A": adapter, "B": "0" * 64}}
                task = train_task(manifest={"base": base, **manifest}, objects={name: payload})
                answer = ask(task)
                assert isinstance(answer, Failure), f"{name!r} in {manifest} was answered"
                assert "PayloadError: a task: request.manifest." in answer.reason, (
                    f"{name!r}: {answer.reason}"
                )
                reasons.append(answer.reason)
        answer = ask(train_task("../../x"))
        assert isinstance(answer, Failure) and "a task for" in answer.reason
        created = (
            {path for path in fed.folder.rglob("*")} - before - {fed.store("site0") / "objects"}
        )
        assert not created, f"the node wrote {created}"
        assert decode_reply(ask(describe), describe, 2**20).answer == reply.answer, (
            "the node no longer answers"
        )
    fed.compared = "the node answers on"
    return f"the node: {reasons[0]}"


# ── a coordinator that dies ──


@case("the coordinator is killed by -9 while it waits for nodes")
def server_killed_waiting(fed: Federation) -> str:
    for name in ("site0", "site1", "site2"):
        fed.key(name)
    fed.start("site0", raw="site1")
    until(
        lambda: fed.state("site0", "connected") and fed.waiting_for() == ["site2"],
        "waiting for site2",
    )
    fed.server.kill()
    return _resumed_after_kill(fed, "site2")


@case("the coordinator is killed by -9 while nodes train")
def server_killed_training(fed: Federation) -> str:
    fed.steer("site0", 2, "hold")
    fed.start("site0", raw="site1")
    fed.until_held("site0", 2)
    fed.server.kill()
    fed.steer("site0", 2, "")
    return _resumed_after_kill(fed)


@case("the coordinator is killed by -9 when all have answered, before it aggregates")
def server_killed_aggregating(fed: Federation) -> str:
    return _killed_where_it_stalls(fed, "aggregate")


@case("the coordinator is killed by -9 between a round's metrics and its manifest")
def server_killed_committing(fed: Federation) -> str:
    return _killed_where_it_stalls(fed, "commit")


def _killed_where_it_stalls(fed: Federation, where: str) -> str:
    fed.key("site0"), fed.key("site1")
    there = fed.folder / "stalled"
    fed.serve(stall=f"{where}:2:{there}")
    fed.join("site0")
    fed.raw("site1").start()
    until(there.exists, f"the coordinator at: {where}")
    assert (
        len(fed.rows()) == {"aggregate": 2, "commit": 3}[where]
        and not (fed.out / "rounds" / "0002.json").exists()
    )
    fed.server.kill()
    return _resumed_after_kill(fed)


def _resumed_after_kill(fed: Federation, *joining: str) -> str:
    """The nodes that were there stay, and find the new coordinator by themselves."""
    fed.serve(resume=True)
    for name in joining:
        fed.join(name)
    fed.check()
    text = fed.nodes["site0"].text()
    assert "Not connected: " in text and len(re.findall("Connected to ", text)) >= 2, text
    return "the node: " + re.findall("Not connected: (.*?)[.(]", text)[0].strip()


# ── disks ──


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], Path]]:
    """A disk of 2 MB at `folder`; yields a function that fills it and returns the file to remove again."""
    folder.mkdir()
    process = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise Skipped(f"no small disk can be made here: {process.stderr.strip()}")

    def fill() -> Path:
        file = folder / "filler"
        with file.open("wb", buffering=0) as out:
            try:
                for size in (65536, 4096, 1):
                    while True:
                        try:
                            out.write(b"x" * size)
                        except OSError:
                            if size == 1:
                                raise
                            break
            except OSError:
                return file
        raise AssertionError("the disk has no end")

    try:
        yield fill
    finally:
        kept = folder.with_name(f"{folder.name}-kept")  # a failed case's files are looked at later
        shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("filler"))
        subprocess.run(["umount", "-l", str(folder)], check=True)


@case("the disk of a client is full", federation={"num_rounds": 4})
def client_disk_full(fed: Federation) -> str:
    with small_disk(fed.store("site1")) as fill:
        fed.steer("site1", 1, "hold")
        fed.steer("site0", 2, "hold")
        fed.start("site0", "site1", raw="site2")
        fed.until_held("site1", 1)
        filler = fill()
        fed.steer("site1", 1, "")
        fed.until_held("site0", 2)
        until(lambda: fed.state("site1") == "failed", "site1 failed in round 2")
        filler.unlink()
        fed.steer("site0", 2, "")
        seen = fed.check(
            fails={("evaluate", 1, "site1"), ("train", 2, "site1")},
            messages={(1, "site1"): "evaluation: OSError", (2, "site1"): "OSError"},
        )
        assert "No space left on device" in fed.nodes["site1"].text()
        fed.nodes["site1"].kill(signal.SIGINT)
        fed.nodes["site1"].exit_code()
    return seen


@case("the disk of the coordinator is full")
def server_disk_full(fed: Federation) -> str:
    with small_disk(fed.out) as fill:
        fed.steer("site0", 2, "hold")
        fed.start("site0", raw="site1")
        fed.until_held("site0", 2)
        filler = fill()
        fed.steer("site0", 2, "")
        code = fed.server.exit_code()
        assert code == 2, f"it ended with {code}"
        output = fed.server.text()
        assert (
            "No space left on device" in output
            and "--resume" in output
            and "Traceback" not in output
        ), output
        filler.unlink()
        fed.serve(resume=True)
        fed.check()
    return f"exit code {code}: No space left on device"


# ── Ctrl-C ──


@case("Ctrl-C of the coordinator, and it resumes")
def interrupted_server(fed: Federation) -> str:
    fed.steer("site0", 2, "hold")
    fed.start("site0", raw="site1")
    fed.until_held("site0", 2)
    fed.server.kill(signal.SIGINT)
    code = fed.server.exit_code(20)
    assert code == 130, f"it ended with {code}"
    words = re.search(r"Continue with:\s+fedmomentum (serve .*--resume)", fed.server.text())
    assert words, fed.server.text()
    assert json.loads((fed.out / "status.json").read_text())["phase"] == "ended"
    fed.steer("site0", 2, "")
    arguments = words[1].split()
    assert arguments[arguments.index("--out") + 1] == str(fed.out) and arguments[
        arguments.index("--port") + 1
    ] == str(fed.port), arguments
    fed.serve(resume=True)
    fed.check()
    return "exit code 130, and how to resume"


@case("Ctrl-C of a node in training, and it joins again", federation={"num_rounds": 3})
def interrupted_node(fed: Federation) -> str:
    fed.steer("site1", 2, "hold")
    fed.steer("site0", 2, "hold")
    fed.start("site0", "site1", raw="site2")
    fed.until_held("site1", 2)
    node = fed.nodes["site1"]
    worker = node.child()
    node.kill(signal.SIGINT)
    code = node.exit_code(20)
    assert code == 130 and "it may join again" in node.text(), (
        f"it ended with {code}: {node.text()}"
    )
    until(
        lambda: not worker.is_running() or worker.status() == "zombie", "the end of its worker", 10
    )
    return f"exit code 130; {comes_back(fed)}"
