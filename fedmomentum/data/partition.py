"""Divides examples among simulated clients: each index goes to exactly one client.

Needs only NumPy. Categories are sorted before anything is sampled and each client's indices are
returned in ascending order, so the result depends only on the seed and the order of the examples,
never on Python's hash seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from fedmomentum.errors import DataError

# Usually, a few attempts suffice; if a thousand fail, the settings do not fit the data.
MAX_ATTEMPTS = 1000

Clients = list[list[int]]
"""The indices of each client's examples, ascending."""


@dataclass(frozen=True)
class PartitionSettings:
    """The settings of all partitions; see `partition`."""

    num_clients: int
    min_examples: int
    concentration: float
    categories_per_client: int
    sizes: Sequence[float] | None


def partition(
    categories: Sequence[str],
    *,
    num_clients: int,
    how: str,
    seed: int,
    concentration: float = 0.5,
    min_examples: int = 1,
    categories_per_client: int = 2,
    sizes: Sequence[float] | None = None,
) -> list[list[int]]:
    """Divide the indices of ``categories`` among clients, each index going to exactly one.

    - ``iid``: shuffled and dealt evenly; sizes differ by at most one.
    - ``dirichlet``: each category is divided by proportions sampled from a symmetric Dirichlet
      distribution; a small concentration gives very unequal clients, a large one tends to ``iid``.
    - ``categories``: each client has ``categories_per_client`` categories; each category belongs to
      the same number of clients (within one), which divide its examples evenly.
    - ``sizes``: shuffled and divided in the given proportions, regardless of category.

    Args:
        categories: One label per example; the position is the example's index.
        num_clients: Number of clients, at least 1.
        how: One of `PARTITIONS`.
        seed: The seed of all random choices, at least 0.
        concentration: Dirichlet parameter, above 0; only for ``dirichlet``.
        min_examples: The minimum number of examples per client, at least 1. ``dirichlet`` and
            ``categories`` resample until every client has that many, at most 1000 times.
        categories_per_client: Only for ``categories``.
        sizes: One positive number per client, in any unit; given if and only if ``how`` is
            ``sizes``.

    Returns:
        The indices of each client, ascending.

    Raises:
        DataError: If a setting is out of range, or the data cannot be divided this way; the message
            says what to change.
    """
    if how not in PARTITIONS:
        raise DataError(f"partition {how!r} is unknown; known: {', '.join(PARTITIONS)}")
    if num_clients < 1 or min_examples < 1:
        raise DataError(
            f"num-clients = {num_clients} and min-examples = {min_examples} must both be at least 1"
        )
    if seed < 0:
        raise DataError(f"seed={seed} must be at least 0")
    if (sizes is not None) != (how == "sizes"):
        raise DataError(
            f'sizes belongs to the partition "sizes" and to no other; got {how!r} with '
            f"sizes = {sizes}"
        )
    if len(categories) < num_clients * min_examples:
        raise DataError(
            f"{len(categories)} examples cannot give {num_clients} clients {min_examples} each; "
            "lower num-clients or min-examples, or bring more data"
        )
    # Each partition checks the remaining settings that it uses.
    settings = PartitionSettings(
        num_clients, min_examples, concentration, categories_per_client, sizes
    )
    return PARTITIONS[how](categories, settings, np.random.default_rng(seed))


def divide_in_proportion(
    indices: Sequence[int], proportions: Sequence[float], rng: np.random.Generator
) -> list[list[int]]:
    """Divide shuffled indices in proportion, without bias even if there are few.

    With cumulative fractions c and u uniform in [0, 1), client k gets floor(c_k n + u) -
    floor(c_{k-1} n + u) of the n indices: within one of its exact share, and equal to it in
    expectation. (Cutting at floor(c_k n) would give each category's remainder to the last client,
    and if categories are small, the remainder is everything.)

    Args:
        indices: What to divide.
        proportions: One number per client, nonnegative and not all 0, in any unit.
        rng: Source of the shuffle and of u.

    Returns:
        The indices of each client, ascending.
    """
    cumulative = np.cumsum(np.asarray(proportions, dtype=np.float64))
    fractions = cumulative[:-1] / cumulative[-1]
    cuts = np.floor(fractions * len(indices) + rng.random()).astype(np.int64)
    shuffled = rng.permutation(np.asarray(indices, dtype=np.int64))
    return _ascending(np.split(shuffled, np.minimum(cuts, len(indices))))


# ── one function per partition ────────────────────────────────────────────────────────────────────


def partition_iid(
    categories: Sequence[str], settings: PartitionSettings, rng: np.random.Generator
) -> Clients:
    """Shuffle and deal evenly."""
    return _divide_shuffled(len(categories), np.ones(settings.num_clients), settings, rng)


def partition_by_sizes(
    categories: Sequence[str], settings: PartitionSettings, rng: np.random.Generator
) -> Clients:
    """Shuffle and divide in the given proportions.

    Raises:
        DataError: If the number of sizes differs from that of clients, or a client would get fewer
            than the minimum number of examples.
    """
    sizes = list(settings.sizes or ())
    proportions = np.asarray(sizes, dtype=np.float64)
    are_positive = np.all(np.isfinite(proportions) & (proportions > 0))
    if proportions.shape != (settings.num_clients,) or not are_positive:
        raise DataError(
            f"sizes must hold {settings.num_clients} finite numbers above 0, one a client; got "
            f"{sizes}"
        )
    return _divide_shuffled(len(categories), proportions, settings, rng)


def partition_dirichlet(
    categories: Sequence[str], settings: PartitionSettings, rng: np.random.Generator
) -> Clients:
    """Divide each category by proportions sampled from a symmetric Dirichlet distribution.

    Raises:
        DataError: If the concentration is not above 0, or no attempt gives every client enough
            examples.
    """
    concentration = settings.concentration
    if not (np.isfinite(concentration) and concentration > 0):
        raise DataError(f"concentration = {concentration} must be a finite number above 0")
    groups = _by_category(categories)

    def attempt() -> Clients:
        clients: Clients = [[] for _ in range(settings.num_clients)]
        for indices in groups.values():
            parameters = np.full(settings.num_clients, concentration)
            proportions = rng.dirichlet(parameters).tolist()
            parts = divide_in_proportion(indices, proportions, rng)
            for client, part in zip(clients, parts, strict=True):
                client.extend(part)
        return [sorted(client) for client in clients]

    return _retry(
        attempt,
        settings.min_examples,
        f"dirichlet with concentration {concentration}",
        "raise concentration, or lower num-clients or min-examples",
    )


def partition_by_categories(
    categories: Sequence[str], settings: PartitionSettings, rng: np.random.Generator
) -> Clients:
    """Give each client some of the categories.

    Raises:
        DataError: If the clients cannot have that many categories, or no attempt gives every client
            enough examples.
    """
    groups = _by_category(categories)
    per_client = settings.categories_per_client
    _check_categories(len(groups), settings.num_clients, per_client)

    def attempt() -> Clients:
        # Each client takes the categories with the fewest owners, ties broken at random: no
        # category is left out, and the numbers of owners differ by at most one.
        owners: dict[str, list[int]] = {name: [] for name in groups}
        for client in rng.permutation(settings.num_clients):
            priority = dict(zip(groups, rng.permutation(len(groups)), strict=True))
            ranked = sorted(groups, key=lambda name: (len(owners[name]), priority[name]))
            for name in ranked[:per_client]:
                owners[name].append(int(client))

        # The owners of a category split its examples evenly.
        clients: Clients = [[] for _ in range(settings.num_clients)]
        for name, indices in groups.items():
            parts = divide_in_proportion(indices, [1.0] * len(owners[name]), rng)
            for client, part in zip(owners[name], parts, strict=True):
                clients[client].extend(part)
        return [sorted(indices) for indices in clients]

    return _retry(
        attempt,
        settings.min_examples,
        f"categories with {per_client} per client",
        "raise categories-per-client, or lower num-clients or min-examples",
    )


Partition = Callable[[Sequence[str], PartitionSettings, np.random.Generator], Clients]
PARTITIONS: Mapping[str, Partition] = MappingProxyType(
    {
        "iid": partition_iid,
        "dirichlet": partition_dirichlet,
        "categories": partition_by_categories,
        "sizes": partition_by_sizes,
    }
)
"""The partitions by name; the configuration's names are `fedmomentum.config.data.PARTITIONS`."""


# ── their parts ───────────────────────────────────────────────────────────────────────────────────


def _divide_shuffled(
    num_examples: int,
    proportions: NDArray[np.float64],
    settings: PartitionSettings,
    rng: np.random.Generator,
) -> Clients:
    """Shuffle the indices of all examples and cut them in proportion."""
    indices = rng.permutation(num_examples)
    cuts = np.cumsum(_round_counts(proportions, num_examples))[:-1]
    clients = _ascending(np.split(indices, cuts))
    # Only unequal sizes can leave a client with too few examples.
    smallest = min(range(len(clients)), key=lambda client: len(clients[client]))
    if len(clients[smallest]) < settings.min_examples:
        raise DataError(
            f"sizes: client {smallest} would get {len(clients[smallest])} of {num_examples} "
            f"examples, fewer than min-examples = {settings.min_examples}; raise its size or lower "
            "min-examples"
        )
    return clients


def _round_counts(proportions: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Round proportions to integers that sum to the total.

    Takes floors, then adds one to those with the largest remainders (ties: the first).
    """
    exact = proportions / proportions.sum() * total
    counts: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    num_missing = total - int(counts.sum())
    by_remainder: NDArray[np.int64] = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[:num_missing]] += 1
    return counts


def _retry(attempt: Callable[[], Clients], min_examples: int, what: str, remedy: str) -> Clients:
    """Sample partitions until one gives every client enough examples.

    Raises:
        DataError: If none of `MAX_ATTEMPTS` attempts does.
    """
    best = 0
    for _ in range(MAX_ATTEMPTS):
        clients = attempt()
        smallest = min(len(client) for client in clients)
        if smallest >= min_examples:
            return clients
        best = max(best, smallest)
    raise DataError(
        f"{what}: none of {MAX_ATTEMPTS} draws gave each of {len(clients)} clients {min_examples} "
        f"examples (the best draw's smallest client had {best}); {remedy}"
    )


def _check_categories(num_categories: int, num_clients: int, per_client: int) -> None:
    """Reject numbers of categories and clients that leave a category without a client."""
    if not 1 <= per_client <= num_categories:
        raise DataError(
            f"categories-per-client = {per_client} must lie between 1 and the {num_categories} "
            "categories found"
        )
    if num_clients * per_client < num_categories:
        enough_per_client = -(-num_categories // num_clients)
        enough_clients = -(-num_categories // per_client)
        raise DataError(
            f"{num_clients} clients with {per_client} categories each cannot hold all "
            f"{num_categories}; raise categories-per-client to {enough_per_client} or num-clients "
            f"to {enough_clients}"
        )


def _by_category(categories: Sequence[str]) -> dict[str, list[int]]:
    """Return the indices of each category, sorted by category name."""
    groups: dict[str, list[int]] = {name: [] for name in sorted(set(categories))}
    for index, name in enumerate(categories):
        groups[name].append(index)
    return groups


def _ascending(parts: Sequence[NDArray[np.int64]]) -> Clients:
    """Return each part's indices as a sorted list."""
    return [sorted(int(index) for index in part) for part in parts]
