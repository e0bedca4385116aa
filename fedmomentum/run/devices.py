"""`run.devices`: the clients of one machine, divided among one process per listed device.

Every worker loads the base model once and runs its clients one after the other. It exchanges the
same bytes that would travel over a network, so the results are bit-identical to those of a single
process, as long as all devices compute the same.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fedmomentum.config.toml import to_toml
from fedmomentum.errors import ModelError
from fedmomentum.formats.plan import divide_clients
from fedmomentum.protocol.transport import Failure
from fedmomentum.run.clients_process import ClientsSetup, encode_client_task
from fedmomentum.run.worker import WorkerExit, WorkerProcess
from fedmomentum.run.worker_process import Frame
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from fedmomentum.config.schema import Config
    from fedmomentum.data.tokenized import TokenizedClient
    from fedmomentum.server.callbacks import Callback

LOG = logging.getLogger("fedmomentum")
SAME_FOR_ALL = ("dtype", "adapted_weights", "attention", "tf32", "base_sha256")
"""Facts about their models that workers must agree on."""


def worker_threads(threads: int, num_workers: int) -> int:
    """Return the CPU threads of each worker: `run.threads`, or its share of all cores for 0."""
    return threads if threads > 0 else max(1, (os.cpu_count() or 1) // num_workers)


@dataclass
class _Worker:
    """One worker, and its work in an exchange.

    Attributes:
        device: Its device, for messages.
        setup: Its first frame.
        process: Its process.
        is_loaded: Whether the process has loaded the model.
        waiting: Clients whose tasks have not been sent to it yet.
        client: The client whose task it is working on.
    """

    device: str
    setup: bytes = field(repr=False)
    process: WorkerProcess
    is_loaded: bool = False
    waiting: deque[str] = field(default_factory=deque)
    client: str | None = None

    def start(self) -> None:
        """Start the process unless it is running; it loads the model in the background."""
        if not self.process.is_running:
            self.process.stop()
            self.is_loaded = False
            self.process.start(self.setup)

    def how_it_ended(self, error: WorkerExit) -> str:
        """Describe how the process ended, for a message."""
        when = "" if self.is_loaded else " while it was loading"
        hint = ""
        if "SIGKILL" in str(error):
            hint = " (the system does that where it is short of memory)"
        return f"its worker on {self.device} ended {error}{when}{hint}"


class DeviceTransport:
    """Workers on this machine, one for each device, which run the clients.

    If a worker dies, the client that it was working on fails. The worker is restarted for its other
    clients, unless it died while loading: then these fail as well, and the next exchange tries
    again.

    Args:
        config: The run's settings.
        clients: The clients with their examples.
        labels: A classifier's labels.
        directory: The run's directory.
        callback: Receives training steps.
    """

    max_payload_bytes = 2**63

    def __init__(
        self,
        config: Config,
        clients: Sequence[TokenizedClient],
        labels: Sequence[str],
        directory: Path,
        callback: Callback,
    ) -> None:
        self._callback = callback
        self._workers: list[_Worker] = []
        self._worker_of: dict[str, _Worker] = {}
        examples = {one.client_id: one for one in clients}
        plans = divide_clients(list(examples), config.run.devices)
        threads = worker_threads(config.run.threads, len(plans))
        for plan in plans:
            own = replace(
                config,
                model=replace(config.model, device=plan.device),
                run=replace(config.run, devices=[], threads=threads),
            )
            setup = ClientsSetup(
                config=to_toml(own),
                labels=tuple(labels),
                directory=str(directory.resolve()),
                clients=tuple(examples[name] for name in plan.clients),
            )
            process = WorkerProcess("fedmomentum.run.clients_process")
            worker = _Worker(plan.device, msgspec.msgpack.encode(setup), process)
            self._workers.append(worker)
            self._worker_of.update(dict.fromkeys(plan.clients, worker))

    # ── starting and ending ──

    def start(self) -> dict[str, Any]:
        """Start the workers, and wait until all have loaded the model.

        Returns:
            What their results depend on: versions, threads, devices, dtype, hashes.

        Raises:
            ModelError: If one cannot load it, or the workers would compute differently.
        """
        facts: list[dict[str, Any]] = []
        try:
            # All load at the same time.
            for worker in self._workers:
                worker.start()
            for worker in self._workers:
                facts.append(self._wait_until_loaded(worker))
            self._check_alike(facts)
        except BaseException:
            self.close()
            raise
        devices = dict.fromkeys(fact["device"] for fact in facts)
        return {**facts[0], "device": ", ".join(devices)}

    def _wait_until_loaded(self, worker: _Worker) -> dict[str, Any]:
        """Return a worker's facts about its model."""
        while True:
            try:
                frame = worker.process.receive(float("inf"))
            except WorkerExit as error:
                raise ModelError(worker.how_it_ended(error)) from error
            if frame is None:
                continue
            letter, body = frame
            if letter == Frame.ERROR:
                detail = json.loads(body)["detail"]
                raise ModelError(f"the worker on {worker.device} cannot load: {detail}")
            self._report(worker, letter, body)
            if letter == Frame.READY:
                facts: dict[str, Any] = json.loads(body)
                return facts

    def _check_alike(self, facts: Sequence[Mapping[str, Any]]) -> None:
        """Refuse workers whose clients would compute differently."""
        for key in SAME_FOR_ALL:
            found = [str(fact[key]) for fact in facts]
            if len(set(found)) > 1:
                listed = ", ".join(
                    f"{worker.device}: {value}"
                    for worker, value in zip(self._workers, found, strict=True)
                )
                raise ModelError(
                    f"the devices of run.devices differ in {key.replace('_', ' ')} ({listed}), so "
                    "a client's result would depend on its device. Set it in [model], or list "
                    "devices of one kind"
                )

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.process.stop()

    # ── exchanging ──

    def clients(self) -> Sequence[str]:
        """Return the clients' names, sorted."""
        return sorted(self._worker_of)

    def connected(self) -> Sequence[str]:
        """Return the clients' names, sorted."""
        return sorted(self._worker_of)

    def send_and_receive(self, tasks: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        """Have every worker do its clients' tasks, sorted by client name."""
        for client in sorted(tasks):
            if client in self._worker_of:
                self._worker_of[client].waiting.append(client)
            else:
                yield client, Failure("missing: no such client is connected")
        try:
            for worker in self._workers:
                yield from self._hand_over(worker, tasks)
            while busy := self._busy():
                # Wait for any worker to report; then handle all that did, in order.
                ready = wait(busy)
                for pipe, worker in busy.items():
                    if pipe in ready:
                        yield from self._take(worker, tasks)
        finally:
            self._abandon()

    def _busy(self) -> dict[Connection, _Worker]:
        """Return the workers that have a task, keyed by their connections."""
        return {worker.process.pipe: worker for worker in self._workers if worker.client}

    def _hand_over(
        self, worker: _Worker, tasks: Mapping[str, bytes]
    ) -> Iterator[tuple[str, Failure]]:
        """Send a worker its next task; yield the failures of tasks that cannot be sent."""
        if not worker.waiting:
            return
        worker.start()
        worker.client = worker.waiting.popleft()
        try:
            worker.process.send(encode_client_task(worker.client, tasks[worker.client]))
        except WorkerExit as error:
            yield from self._fail(worker, error, tasks)

    def _take(
        self, worker: _Worker, tasks: Mapping[str, bytes]
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Take a worker's next frame; yield its client's reply or failure, if that is what it is.

        The worker is sent its next task first, so that it works while a reply is handled.
        """
        client = worker.client
        assert client is not None  # it is busy
        try:
            frame = worker.process.receive(0)
        except WorkerExit as error:
            yield from self._fail(worker, error, tasks)
            return
        if frame is None:
            return
        letter, body = frame
        if letter == Frame.ERROR:
            failure = Failure(printable(json.loads(body)["detail"]))
            worker.client = None
            yield client, failure
        elif letter == Frame.REPLY:
            worker.client = None
            yield from self._hand_over(worker, tasks)
            yield client, body
            return
        else:
            self._report(worker, letter, body)
            return
        yield from self._hand_over(worker, tasks)

    def _fail(
        self, worker: _Worker, error: WorkerExit, tasks: Mapping[str, bytes]
    ) -> Iterator[tuple[str, Failure]]:
        """Yield the failures of clients whose worker has ended; continue with its other clients."""
        failure = Failure(worker.how_it_ended(error))
        failed = [worker.client] if worker.client else []
        worker.client = None
        if not worker.is_loaded:
            failed += worker.waiting
            worker.waiting.clear()
        for client in failed:
            yield client, failure
        yield from self._hand_over(worker, tasks)

    def _report(self, worker: _Worker, letter: bytes, body: bytes) -> None:
        """Pass on a worker's reports other than replies."""
        if letter == Frame.READY:
            worker.is_loaded = True
        elif letter == Frame.STEP:
            self._callback.on_step(**json.loads(body))
        elif letter == Frame.WARNING:
            LOG.warning("%s", body.decode())

    def _abandon(self) -> None:
        """End workers that are still busy: nobody is waiting for their replies anymore."""
        for worker in self._workers:
            worker.waiting.clear()
            if worker.client is not None:
                worker.client = None
                worker.process.stop()
