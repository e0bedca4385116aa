"""`PrivateParty`: a client's settings and ledger for private training, and what it reveals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fedmomentum.data.split import split_fingerprint
from fedmomentum.data.tokenized import EMPTY_EXAMPLES
from fedmomentum.errors import ConfigError
from fedmomentum.privacy.accountant import noise_for
from fedmomentum.privacy.ledger import (
    Budget,
    Ledger,
    LedgerRecord,
    OpenTraining,
    round_down,
)
from fedmomentum.privacy.mechanism import Mechanism, PrivateSettings, group_units
from fedmomentum.protocol.private_messages import EXAMPLE, PrivateTerms
from fedmomentum.training.arguments import count_steps
from fedmomentum.utils.io import sha256
from fedmomentum.utils.names import directory_name

if TYPE_CHECKING:
    from fedmomentum.config.privacy import DPConfig
    from fedmomentum.config.training import LocalTraining
    from fedmomentum.data.tokenized import TokenizedExamples
    from fedmomentum.protocol.messages import Task, TrainRequest


@dataclass
class PrivateParty:
    """A client's differential privacy settings, its units, and its ledger.

    Attributes:
        client_id: The client.
        dp: This client's `[privacy.dp]`.
        train: The examples that it trains on.
        directory: The ledger's directory.
    """

    client_id: str
    dp: DPConfig
    train: TokenizedExamples
    directory: Path
    _units: tuple[tuple[int, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Group the examples by unit."""
        self._units = group_units(self.train.units)

    @cached_property
    def ledger(self) -> Ledger:
        """Its ledger, whose file may not exist yet."""
        unit = self.dp.unit_column or EXAMPLE
        file = self.directory / f"{directory_name(self.client_id)}.json"
        return Ledger(file, self.client_id, unit, Budget(self.dp.budget, self.dp.delta))

    @cached_property
    def begun(self) -> LedgerRecord:
        """The ledger's contents at first access; created if there was no ledger.

        Raises:
            PrivacyError: If it cannot be used.
        """
        return self.ledger.begin(round_down(len(self._units)))

    @property
    def public_units(self) -> int:
        """Its public number of units, which it sends, and by which it is weighted."""
        return self.dp.public_units or self.begun.public_units

    @cached_property
    def _data(self) -> str:
        """A keyed hash of the examples; the key is the ledger's secret salt."""
        return split_fingerprint(self.train, EMPTY_EXAMPLES, self.begun.salt)

    def check_terms(self, terms: PrivateTerms) -> None:
        """Reject a run that protects a different unit from the one configured here.

        Raises:
            ConfigError: If it does.
        """
        unit = self.dp.unit_column or EXAMPLE
        if terms.unit != unit:
            raise ConfigError(
                f"the run protects one {terms.unit}; [privacy.dp] here protects one {unit}. Set "
                "unit-column alike for server and clients"
            )

    def settings(self, terms: PrivateTerms, hyperparameters: LocalTraining) -> PrivateSettings:
        """Return the settings that make a training private.

        Raises:
            ConfigError: See `round_mechanism`.
        """
        mechanism = round_mechanism(terms, hyperparameters, self.public_units)
        max_rows = self.dp.max_rows or hyperparameters.batch_size
        return PrivateSettings(mechanism, self._units, max_rows)

    def task_hash(self, task: Task, request: TrainRequest) -> str:
        """Return a hash of what a task asks for, independent of the objects sent with it."""
        # Which objects are sent depends on what the client has kept.
        asked = msgspec.structs.replace(request, fresh=None, recipes=[])
        head = f"{task.run_id}/{task.server_round}/".encode()
        return sha256(head + msgspec.json.encode(asked, order="sorted"))

    def stored_reply(self, task: Task, request: TrainRequest) -> bytes | None:
        """Return the reply to a task that was already done; None if it was not."""
        _ = self.begun  # there must be a ledger
        return self.ledger.stored_reply(self.task_hash(task, request))

    @contextmanager
    def training(
        self, task: Task, request: TrainRequest, mechanism: Mechanism
    ) -> Iterator[OpenTraining]:
        """Record a training before it starts; see `Ledger.training`.

        Raises:
            PrivacyError: If the ledger refuses it.
        """
        _ = self.begun  # there must be a ledger
        # The same task always means the same training, whichever server asks.
        key = self.task_hash(task, request)
        run = (task.run_id, task.server_round)
        with self.ledger.training(key, *run, mechanism, self._data) as opened:
            yield opened


def round_mechanism(
    terms: PrivateTerms, hyperparameters: LocalTraining, public_units: int
) -> Mechanism:
    """Return the mechanism of one client's training in one round.

    The batch size is the expected number of units per step. Each unit is drawn with probability
    batch size / public units, and epochs are counted in public units, so that nothing here depends
    on the data.

    Raises:
        ConfigError: If the terms name neither epsilon nor noise, delta is too large for the number
            of units, or no noise suffices.
    """
    rate = min(1.0, hyperparameters.batch_size / public_units)
    num_steps = count_steps(public_units, hyperparameters)
    if not terms.delta * public_units < 1:
        raise ConfigError(
            f"privacy.dp.delta = {terms.delta:g} is no less than 1 / {public_units} units: it "
            "would allow to publish a unit as it is; lower it"
        )
    if terms.noise_multiplier is not None:
        noise = terms.noise_multiplier
    elif terms.epsilon is not None:
        # This client may be asked in every round.
        noise = noise_for(terms.epsilon, terms.delta, rate, num_steps * terms.num_rounds)
    else:
        raise ConfigError(
            "the run trains with differential privacy and names neither privacy.dp.epsilon nor "
            "privacy.dp.noise-multiplier; set one of them in the run's settings"
        )
    return Mechanism(noise, rate, num_steps, terms.max_grad_norm, rate * public_units)
