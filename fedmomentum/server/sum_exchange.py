"""`SumExchange`: run one masked sum with the clients, step by step; a killed sum can be resumed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedmomentum.errors import QuorumError, SecureSumError
from fedmomentum.protocol.messages import Task
from fedmomentum.protocol.secure_messages import SUM_MESSAGE, SumRequest, message_of
from fedmomentum.secure_sum.messages import STEPS, SumPlan
from fedmomentum.secure_sum.server import MAX_REPLY_BYTES, SumServer
from fedmomentum.server.exchange import PAYLOAD_MARGIN, collect, contain_errors
from fedmomentum.server.replies import Replies

if TYPE_CHECKING:
    from fedmomentum.global_model.objects import StoredObject
    from fedmomentum.protocol.transport import Transport
    from fedmomentum.secure_sum.roster import Roster
    from fedmomentum.secure_sum.server import SumResult
    from fedmomentum.server.kept_sums import KeptSum


LOG = logging.getLogger("fedmomentum")
_OPENING = len(STEPS) - 1


class LostSumError(QuorumError):
    """A sum that some clients have opened, but too few to complete it; it cannot be redone."""


@dataclass
class SumExchange:
    """Runs sums with the clients.

    Attributes:
        transport: Reaches the clients.
        roster: The public keys that the server has for them.
        collected: Receives failures, byte counts and times.
        holders: Receives the clients that report having the first sum's outcome.
    """

    transport: Transport
    roster: Roster
    collected: Replies
    holders: set[str] = field(default_factory=set)

    def run(
        self, plan: SumPlan, kept: KeptSum | None = None, means: StoredObject | None = None
    ) -> SumResult:
        """Run a sum to its end.

        Args:
            plan: The sum.
            kept: Stores replies, and holds those from before a kill; None to keep nothing.
            means: The outcome of the first sum, if the clients need it.

        Raises:
            LostSumError: If some clients opened the sum, but too few.
            QuorumError: If too few clients took part in an earlier step.
            PayloadError: If a message is larger than the transport carries.
        """
        server = SumServer(plan, self.roster)
        for step in range(len(STEPS)):
            parties = self._run_step(server, step, plan, kept, means)
            if len(parties) < plan.threshold:
                raise self._too_few(plan, step, len(parties))
            # The next step depends on who took part in this one, so that must survive a kill.
            if kept is not None and kept.ended_with(step) is None:
                kept.end(step, parties)
            try:
                server.advance()
            except SecureSumError as error:
                raise LostSumError(str(error)) from error
        return server.result

    def _run_step(
        self,
        server: SumServer,
        step: int,
        plan: SumPlan,
        kept: KeptSum | None,
        means: StoredObject | None,
    ) -> list[str]:
        """Collect the replies to a step's messages; return the clients with valid ones, sorted."""
        messages = server.messages()
        limit = MAX_REPLY_BYTES + PAYLOAD_MARGIN + 4 * plan.size
        # Replies from before a kill are not requested again.
        replied = set()
        ended = None
        if kept is not None:
            ended = kept.ended_with(step)
            known = kept.replies(step, list(messages), limit)
            for client in known if ended is None else ended:
                try:
                    server.receive(client, known[client])
                except SecureSumError as error:
                    # For example, a key has been replaced in the meantime.
                    raise QuorumError(f"what was kept is of no use: {error}") from error
                replied.add(client)
        if ended is None:
            waiting = {client: messages[client] for client in messages if client not in replied}
            tasks = self._tasks(plan, step, waiting, means)
            for client, reply in collect(self.transport, tasks, self.collected, limit):
                with contain_errors(client, self.collected.failures):
                    message = message_of(dict(reply.tensors), f"client {client}")
                    server.receive(client, message)
                    if kept is not None:
                        kept.keep(step, client, message)
                    replied.add(client)
                if means is not None and means.name in reply.holds:
                    self.holders.add(client)
        for client in sorted(messages.keys() - replied):
            reason = self.collected.failures.get(client, "it had dropped out before a restart")
            self.collected.failures[client] = f"{plan.title}: {reason}"
            LOG.warning("%s: %s gave no %s: %s", plan.title, client, STEPS[step], reason)
        return sorted(replied)

    def _tasks(
        self,
        plan: SumPlan,
        step: int,
        messages: Mapping[str, bytes],
        means: StoredObject | None,
    ) -> dict[str, Task]:
        """Return each client's task for a step; the first step's tasks include `means`."""
        is_first = step == 0 and means is not None
        request = SumRequest(
            number=plan.number,
            attempt=plan.attempt,
            means=means.name if is_first and means is not None else None,
        )
        shared = {means.name: means.data} if is_first and means is not None else {}
        tasks = {}
        for client, message in messages.items():
            objects = {**shared, SUM_MESSAGE: message}
            tasks[client] = Task(plan.run_id, client, plan.server_round, request, objects)
        return tasks

    def _too_few(self, plan: SumPlan, step: int, num_parties: int) -> QuorumError:
        """Return the error for a step in which too few took part, with everyone's reason."""
        failures = self.collected.failures
        reasons = "; ".join(f"{client}: {reason}" for client, reason in sorted(failures.items()))
        text = (
            f"{plan.title}: {num_parties} clients gave their {STEPS[step]}, and "
            f"{plan.threshold} are needed ({reasons})"
        )
        if step == _OPENING:
            return LostSumError(text)
        return QuorumError(text)
