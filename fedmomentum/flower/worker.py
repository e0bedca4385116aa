"""A node's worker: a process of its own that holds base model and data, so that neither is loaded for every message.

Node and worker are joined by a socket pair that no other process can open. What goes over it are frames of one
letter and bytes: to the worker `I`, the run that the next tasks belong to, `T`, a task, or `C`, rehearse one; from it
`S`, a line on what it is doing, `W`, a warning, `P`, a training step, `Y`, ready, `R`, a reply, `E`, what went wrong,
in full and in words that may leave the machine. The worker ends with the node, also when the node is killed: the
socket's end is its sign.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedmomentum.config import Config, load_config, to_toml
from fedmomentum.errors import FedMomentumError, public_text
from fedmomentum.terminal import LineFormatter

LOG = logging.getLogger("fedmomentum")

Told = Callable[[str, Mapping[str, Any]], None]
"""Told of what the worker does: `told(event, facts)`; events are `say`, `warning`, `step`, `ready`."""


class WorkerError(Exception):
    """The worker has no answer. The text may leave the machine; `detail` may not.

    Args:
        text: what may be said of it elsewhere.
        detail: the same in full, for whoever runs the node.
    """

    def __init__(self, text: str, detail: str | None = None) -> None:
        super().__init__(text)
        self.detail = text if detail is None else detail


class Worker:
    """The node's side of its worker.

    Args:
        config: the party's configuration.
        client_id: the party's name.
        store: folder for the objects it is sent.
        told: told of progress.
    """

    def __init__(self, config: Config, client_id: str, store: Path, told: Told = lambda event, facts: None) -> None:
        self._config, self._client_id, self._store, self._told = config, client_id, store, told
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._ready = False
        self._run_id: str | None = None
        self._known_run_id: str | None = None  # to the process
        self._facts: Mapping[str, Any] = {}

    def start(self) -> None:
        """Start the process, unless it runs; it loads in the background."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "fedmomentum.flower.worker", str(theirs.fileno())]
        self._store.mkdir(parents=True, exist_ok=True)
        self._store.chmod(0o700)  # what it is sent is for nobody else on this machine
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._pipe, self._ready, self._known_run_id = Connection(ours.detach()), False, None
        setup = {"config": to_toml(self._config), "client_id": self._client_id, "store": str(self._store)}
        self._pipe.send_bytes(json.dumps(setup).encode())

    def wait_until_ready(self) -> Mapping[str, Any]:
        """Wait until model and data are loaded; what they are.

        Raises:
            WorkerError: they cannot be.
        """
        self.start()
        if not self._ready:
            self._facts = json.loads(self._wait(b"Y", float("inf")))
        return self._facts

    def rehearse(self, seconds: float) -> bytes:
        """Do one step of training, as a task would have it done.

        Raises:
            WorkerError: see `ask`.
        """
        return self._ask(b"C", seconds)

    def belong_to(self, run_id: str) -> None:
        """Say which run the tasks from now on belong to: its client's examples must be divided as when it began."""
        self._run_id = run_id

    def ask(self, payload: bytes, seconds: float) -> bytes:
        """The reply to a task.

        Raises:
            WorkerError: the worker refused it, died, or took longer than `seconds`; then it is ended, and a new
                one is started.
        """
        return self._ask(b"T" + payload, seconds)

    def _ask(self, frame: bytes, seconds: float) -> bytes:
        end = time.monotonic() + seconds
        self.start()
        if not self._ready:
            self._wait(b"Y", end)
        assert self._pipe is not None
        try:
            if self._run_id is not None and self._run_id != self._known_run_id:
                self._pipe.send_bytes(b"I" + self._run_id.encode(errors="replace"))
                self._known_run_id = self._run_id
            self._pipe.send_bytes(frame)
        except OSError as error:
            raise self._died() from error
        return self._wait(b"R", end)

    def _wait(self, kind: bytes, end: float) -> bytes:
        assert self._pipe is not None
        while True:
            left = end - time.monotonic()
            try:
                if not self._pipe.poll(min(max(left, 0), 3600.0)):
                    if left > 0:
                        continue
                    self.stop()
                    self.start()
                    raise WorkerError("took longer than the round allows; its worker was ended")
                frame = self._pipe.recv_bytes()
            except (EOFError, OSError) as error:
                raise self._died() from error
            letter, body = frame[:1], frame[1:]
            if letter == b"S":
                self._told("say", {"text": body.decode()})
            elif letter == b"W":
                self._told("warning", {"text": body.decode()})
            elif letter == b"P":
                self._told("step", json.loads(body))
            elif letter == b"E":
                told = json.loads(body)
                raise WorkerError(told["text"], told["detail"])
            else:
                if letter == b"Y":
                    self._ready = True
                    self._told("ready", json.loads(body))
                if letter == kind:
                    return body

    def _died(self) -> WorkerError:
        """The worker is gone: start another for the next task."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        was_ready = self._ready
        self.stop()
        if was_ready:
            self.start()
        how = f"by signal {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"
        return WorkerError(f"its worker ended {how}" + ("" if was_ready else " while it was loading"))

    def stop(self) -> None:
        """End the process and all it started."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = self._pipe = None
        self._ready = False


# ── in the worker's process ──────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    """Load, say so, and answer tasks until the node ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the node's; it ends us
    shown = logging.StreamHandler()
    shown.setFormatter(LineFormatter("%(message)s"))  # a task's names, and an error's text, may hold anything
    LOG.addHandler(shown)
    pipe = Connection(int(sys.argv[1]))
    setup = json.loads(pipe.recv_bytes())
    tasks = _Inbox(pipe)
    try:
        step = _load(setup, tasks.send)
    except Exception as error:
        tasks.send(b"E", _told(error))
        sys.exit(2)
    while True:
        try:
            answer = step(tasks.next())
        except Exception as error:  # whatever a task does, the next one finds the worker
            tasks.send(b"E", _told(error))
        else:
            if answer is not None:
                tasks.send(b"R", answer)


class _Inbox:
    """Tasks as they come; the end of the node is the end of this process, whatever it is doing."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()
        self._tasks: list[bytes] = []
        self._some = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                frame = self._pipe.recv_bytes()
            except (EOFError, OSError):
                os._exit(0)
            with self._some:
                self._tasks.append(frame)
                self._some.notify()

    def next(self) -> bytes:
        with self._some:
            self._some.wait_for(lambda: bool(self._tasks))
            return self._tasks.pop(0)

    def send(self, letter: bytes, body: bytes) -> None:
        with self._lock:
            try:
                self._pipe.send_bytes(letter + body)
            except OSError:
                os._exit(0)


def _load(setup: Mapping[str, str], send: Callable[[bytes, bytes], None]) -> Callable[[bytes], bytes | None]:
    """Load model and data; the function from a frame to a reply's bytes, if there is to be one."""
    from fedmomentum.client import client_step
    from fedmomentum.data.split import compare_split
    from fedmomentum.live import quiet_libraries
    from fedmomentum.run import prepare_party, rehearsal

    store = Path(setup["store"])
    file = store / "config.toml"
    file.write_text(setup["config"])

    def on_step(client: str, step: int, steps: int, loss: float) -> None:
        send(b"P", json.dumps({"step": step, "steps": steps, "loss": loss}).encode())

    config = load_config(file)
    with quiet_libraries():
        client, local = prepare_party(
            config, setup["client_id"], store, on_step=on_step, say=lambda text: send(b"S", text.encode())
        )
    facts = {
        "num_train": len(client.train), "num_test": len(client.test), "num_parameters": local.num_parameters,
        "dtype": str(local.dtype).removeprefix("torch."), "base_sha256": local.identity.sha256,
    }  # fmt: skip
    send(b"Y", json.dumps(facts).encode())

    def step(frame: bytes) -> bytes | None:
        if frame[:1] == b"I":
            run_id = frame[1:].decode()
            if problem := compare_split(store, run_id, client.train, client.test, seed=config.run.seed):
                send(b"W", problem.encode())
            return None
        with quiet_libraries():
            payload = rehearsal(config, client, local) if frame[:1] == b"C" else frame[1:]
            return client_step(payload, client, local)

    return step


def _told(error: Exception) -> bytes:
    """An error in two versions; one that nobody expected is also shown here with where it came from."""
    if not isinstance(error, FedMomentumError):
        LOG.exception("the worker failed")
    return json.dumps({"text": public_text(error), "detail": f"{type(error).__name__}: {error}"}).encode()


if __name__ == "__main__":
    main()
