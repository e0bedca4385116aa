"""What a client keeps of its cross terms, if products are summed under masks.

Once the server has committed a round, the client's terms are in the model and must leave what the
client keeps. But the client only learns this with its next task. So after its part in a round it
saves both what it kept before and the round's pending changes; given the outcome, `settled`
combines them. A round's file never changes afterwards: a repeated round starts from the file of the
previous round, so that nothing is lost or counted twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from fedmomentum.aggregation.product_from_sums import ClientChange, next_feedback
from fedmomentum.errors import ModelError
from fedmomentum.global_model.state_file import StateFile, StateHeader, encode_state, read_state
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import Matrix
from fedmomentum.utils.schema import ModulePath, PositiveCount, Size

if TYPE_CHECKING:
    from fedmomentum.aggregation.product_from_sums import MeanChanges


class _Header(StateHeader, frozen=True, kw_only=True):
    """The header of a file.

    Attributes:
        num_examples: The client's weight in the round.
        feedback_limits: Module to the limit on the feedback that was returned in the round.
    """

    num_examples: PositiveCount
    feedback_limits: dict[ModulePath, Size]


@dataclass(frozen=True, eq=False)
class CrossTerms(StateFile):
    """What a client kept of its cross terms before a round, and its changes in that round.

    Attributes:
        client: The client's name.
        run_id: The run's identifier on the wire.
        server_round: The round.
        num_examples: The client's weight in the round.
        changes: Module to its change in the round, with what it kept before as the feedback.
        feedback_limits: Module to the limit on the feedback that was returned in the round.
    """

    KIND: ClassVar[str] = "cross-terms"
    TITLE: ClassVar[str] = "cross terms"
    KEY: ClassVar[str] = "cross_terms"
    HEADER: ClassVar[type[StateHeader]] = _Header

    client: str
    run_id: str
    server_round: int
    num_examples: int
    changes: Mapping[str, ClientChange]
    feedback_limits: Mapping[str, float] = field(default_factory=dict)

    def settled(self, means: MeanChanges | None, *, in_second_sum: bool) -> dict[str, Matrix]:
        """Return what the client keeps, now that the round's outcome is known.

        Args:
            means: The outcome of the round's first sum; None if the round was not committed, or the
                sum does not include this client.
            in_second_sum: Whether the second sum also includes it.

        Raises:
            ModelError: If the outcome has other modules or shapes than the round.
        """
        name = f"client {self.client}: round {self.server_round}"
        kept: dict[str, Matrix] = {}
        for module, change in self.changes.items():
            # The model got nothing from this client: keep what was kept before.
            if means is None:
                if change.feedback is not None:
                    kept[module] = change.feedback
                continue
            mean = means.modules.get(module)
            if mean is None or (mean.b.shape, mean.a.shape) != (change.b.shape, change.a.shape):
                raise ModelError(f"{name}: its outcome is not that of this client's {module}")
            kept[module] = next_feedback(
                change,
                mean,
                in_second_sum=in_second_sum,
                feedback_limit=self.feedback_limits[module],
            )
        return kept

    # ── files ──

    def encode(self) -> bytes:
        """Return the bytes of their file, which includes a checksum of its content."""
        # The changes, and what was kept before in factored or dense form.
        header = _Header(
            client=self.client,
            run_id=self.run_id,
            round=self.server_round,
            num_examples=self.num_examples,
            feedback_limits=dict(self.feedback_limits),
        )
        tensors = {}
        for module, change in self.changes.items():
            tensors[f"{module}.move_b"] = change.b.contiguous()
            tensors[f"{module}.move_a"] = change.a.contiguous()
            if isinstance(change.feedback, LowRank):
                tensors[f"{module}.kept_B"] = change.feedback.B.contiguous()
                tensors[f"{module}.kept_A"] = change.feedback.A.contiguous()
            elif change.feedback is not None:
                tensors[f"{module}.kept"] = change.feedback.contiguous()
        return encode_state(self.KEY, header, tensors)

    @classmethod
    def read(cls, file: Path) -> CrossTerms:
        """Read the cross terms in a file.

        Raises:
            ModelError: If it is missing or damaged.
        """
        header, tensors = read_state(file, cls.KEY, _Header, cls.TITLE)
        # The header names the modules.
        changes = {}
        for module in header.feedback_limits:
            try:
                b = tensors[f"{module}.move_b"]
                a = tensors[f"{module}.move_a"]
                changes[module] = ClientChange(header.num_examples, b, a, _kept(tensors, module))
            except (KeyError, ValueError) as error:
                raise ModelError(f"{file}: {module} is incomplete ({error})") from error
        return cls(
            client=header.client,
            run_id=header.run_id,
            server_round=header.round,
            num_examples=header.num_examples,
            changes=changes,
            feedback_limits=header.feedback_limits,
        )


def _kept(tensors: Mapping[str, Tensor], module: str) -> Matrix | None:
    """Return what a file holds of a module's earlier rounds; None for nothing."""
    if f"{module}.kept_B" in tensors:
        return LowRank(tensors[f"{module}.kept_B"], tensors[f"{module}.kept_A"])
    return tensors.get(f"{module}.kept")
