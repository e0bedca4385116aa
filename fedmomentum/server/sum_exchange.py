"""`SumExchange`: one sum under masks with the clients, step by step, and again after a kill."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedmomentum.errors import QuorumError, SecureSumError
from fedmomentum.protocol.messages import Task
from fedmomentum.protocol.secure_messages import SUM_MESSAGE, SumRequest, message_of
from fedmomentum.secure_sum.messages import SumPlan
from fedmomentum.secure_sum.server import MAX_REPLY_BYTES, STEPS, SumServer
from fedmomentum.server.exchange import PAYLOAD_MARGIN, collect, containing
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
    """A sum that some clients have opened, and too few for the rest: nobody can make it again."""


@dataclass
class SumExchange:
    """Runs sums with the clients.

    Attributes:
        transport: Reaches the clients.
        roster: The public keys that the server has for them.
        collected: Gets failures, bytes and seconds.
        holders: Gets the clients that say that they have the first sum's outcome.
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
            kept: Where replies are kept, and what came before a kill; None to keep nothing.
            means: The outcome of the first sum, where the clients need it.

        Raises:
            LostSumError: If too few clients opened the sum, and others did.
            QuorumError: If too few clients took part in a step before.
            PayloadError: If a message is larger than the transport carries.
        """
        server = SumServer(plan, self.roster)
        for step in range(len(STEPS)):
            parties = self._run_step(server, step, plan, kept, means)
            if len(parties) < plan.threshold:
                raise self._too_few(plan, step, len(parties))
            # What the end of a step means for the next must be known again after a kill.
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
        """Collect the replies to a step's messages; return whose are valid, sorted."""
        messages = server.messages()
        limit = MAX_REPLY_BYTES + PAYLOAD_MARGIN + 4 * plan.size
        # What came before a kill is not asked for again.
        replied = set()
        ended = None
        if kept is not None:
            ended = kept.ended_with(step)
            known = kept.replies(step, list(messages), limit)
            for client in known if ended is None else ended:
                try:
                    server.receive(client, known[client])
                except SecureSumError as error:
                    # Such as a key that has been replaced meanwhile.
                    raise QuorumError(f"what was kept is of no use: {error}") from error
                replied.add(client)
        if ended is None:
            waiting = {client: messages[client] for client in messages if client not in replied}
            tasks = self._tasks(plan, step, waiting, means)
            for client, reply in collect(self.transport, tasks, self.collected, limit):
                with containing(client, self.collected.failures):
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
        """Return each client's task of a step; the first one brings what the sum needs."""
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
        """Return the error of a step in which too few took part, with everybody's reason."""
        failures = self.collected.failures
        reasons = "; ".join(f"{client}: {reason}" for client, reason in sorted(failures.items()))
        text = (
            f"{plan.title}: {num_parties} clients gave their {STEPS[step]}, and "
            f"{plan.threshold} are needed ({reasons})"
        )
        if step == _OPENING:
            return LostSumError(text)
        return QuorumError(text)
