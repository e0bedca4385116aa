"""The section [privacy]: what parties keep from the server and from one another."""

from __future__ import annotations

from dataclasses import dataclass

from fedmomentum.config.fields import option, require, require_at_least

MIN_CLIENTS = 3
"""With two, each could subtract its own values from the sum."""
MAX_CLIENTS = 100
MAX_EXAMPLES = 2**31 // MAX_CLIENTS
"""A sum of so many examples of each client fits 32 bits."""


@dataclass(frozen=True)
class DPConfig:
    """Differential privacy of each client's training; the table switches it on."""

    epsilon: float | None = option(
        None,
        "bound on what all rounds of the run reveal about one unit; each client adds the noise "
        "that this requires for its data. Give this or noise-multiplier; `fedmomentum privacy "
        "plan` shows both",
    )
    noise_multiplier: float | None = option(
        None, "standard deviation of the noise in units of max-grad-norm, for all clients"
    )
    delta: float = option(
        1e-5, "the delta of (epsilon, delta)-differential privacy: well below 1 / a client's units"
    )
    max_grad_norm: float = option(
        1.0, "the gradient of each unit is clipped to this norm, over all trained parameters"
    )
    unit_column: str | None = option(
        None,
        "column of the data that names what is protected, such as a patient, whose rows are then "
        "one unit. If left out, each row is a unit",
    )
    public_units: int | None = option(
        None,
        "at a client: the publicly known number of its units, which sets the sample rate and its "
        "weight (default: the number when its ledger is created, rounded down to two digits)",
    )
    max_rows: int | None = option(
        None,
        "at a client: the most examples in one pass through the model, so that a large batch fits "
        "in memory; nothing else depends on it (default: training.batch-size)",
    )
    budget: float | None = option(
        None,
        "at a client: the epsilon that all runs on its data may spend together, at its delta; "
        "training beyond it is refused",
    )
    ledger: str | None = option(
        None,
        "at a client: the directory of its ledger, `CLIENT.json`, which counts all runs; use the "
        "same for all runs on the same data (default: `privacy` in the client's store, or in the "
        "run's directory)",
    )

    def __post_init__(self) -> None:
        key = "privacy.dp"
        for name in ("epsilon", "noise_multiplier", "max_grad_norm", "budget"):
            value = getattr(self, name)
            is_valid = value is None or 0 < value <= 1e9
            require(is_valid, f"{key}.{name.replace('_', '-')}", value, "above 0, up to 1e9")
        require(0 < self.delta < 1, f"{key}.delta", self.delta, "between 0 and 1")
        has_both = self.epsilon is not None and self.noise_multiplier is not None
        wanted = "left out where noise-multiplier is given"
        require(not has_both, f"{key}.epsilon", self.epsilon, wanted)
        for name in ("public_units", "max_rows"):
            value = getattr(self, name)
            if value is not None:
                require_at_least(f"{key}.{name.replace('_', '-')}", value, 1)
        for name in ("unit_column", "ledger"):
            require(getattr(self, name) != "", f"{key}.{name}", "", "a name, or left out")


@dataclass(frozen=True)
class PrivacyConfig:
    """What clients hide from the server and from one another; see docs/privacy.md."""

    secure_aggregation: bool = option(
        False,
        "the server sees only sums over the clients, never a single client's values. Set at a "
        "client: it takes part only in runs that have it",
    )
    threshold: int | None = option(
        None,
        "how many clients are necessary and sufficient to open a sum (default: more than two "
        "thirds of the round's clients)",
    )
    max_examples: int = option(
        10_000,
        "a public bound on every client's number of training examples; one with more takes no part",
    )
    max_change: float | None = option(
        None,
        "a public bound on how much any one number of the adapter changes in a round; a client "
        "beyond it takes no part (default: the most that the optimizer's steps can do)",
    )
    sketch_ranks: int = option(
        1,
        "for methods that need the sum of products: how much of it a round's sums include, in "
        "multiples of the rank. The rest follows in later rounds; with clients - 1 there is none",
    )
    roster: str | None = option(
        None,
        "at a client over a network: the file of all clients' public keys, which the sites "
        "exchanged among themselves. `fedmomentum keys roster` makes it, and prints the "
        "fingerprint that the sites compare",
    )
    trusts_server: bool = option(
        False,
        "at a client: accept a threshold of more than half of the clients, which is safe only if "
        "the server follows the protocol",
    )

    dp: DPConfig | None = option(
        None,
        "differential privacy, [privacy.dp] below: what clients send reveals little about any one "
        "of their examples. Set at a client: it takes part only in runs that have it",
    )

    def __post_init__(self) -> None:
        if self.threshold is not None:
            # More than half of the clients, of whom there are three at least.
            require_at_least("privacy.threshold", self.threshold, MIN_CLIENTS)
            wanted = f"at most {MAX_CLIENTS}, the most clients of a secure sum"
            require(self.threshold <= MAX_CLIENTS, "privacy.threshold", self.threshold, wanted)
        require(
            1 <= self.max_examples <= MAX_EXAMPLES,
            "privacy.max-examples",
            self.max_examples,
            f"from 1 to {MAX_EXAMPLES}",
        )
        if self.max_change is not None:
            is_valid = 1e-12 <= self.max_change <= 1e12
            require(is_valid, "privacy.max-change", self.max_change, "from 1e-12 to 1e12")
        wanted = f"from 1 to {MAX_CLIENTS - 1}"
        is_valid = 1 <= self.sketch_ranks < MAX_CLIENTS
        require(is_valid, "privacy.sketch-ranks", self.sketch_ranks, wanted)
        if self.roster is not None:
            require(self.roster != "", "privacy.roster", self.roster, "the path of a file")
