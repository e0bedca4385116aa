"""Divides examples among simulated clients: each index to exactly one client, decided by the seed alone.

Needs NumPy only. Categories are sorted before any draw and each client's indices come back ascending, so the
result depends on the seed and on the order of the examples, never on hash seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmomentum.errors import DataError

PARTITIONS = ("iid", "dirichlet", "categories", "sizes")
"""The known ways to divide examples."""

# At usual settings one draw in a few succeeds; where a thousand fail, the settings do not fit the data.
_MAX_DRAWS = 1000

Clients = list[list[int]]


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
    """Divide the indices of ``categories`` among clients: a disjoint cover of ``range(len(categories))``.

    - ``iid``: shuffled and dealt evenly; sizes differ by at most one.
    - ``dirichlet``: each category is divided by proportions drawn from a symmetric Dirichlet distribution; a
      small concentration gives very unequal clients, a large one tends to ``iid``.
    - ``categories``: each client holds ``categories_per_client`` categories, each category being held by equally
      many clients (within one), which share its examples evenly.
    - ``sizes``: shuffled and divided in the given proportions, whatever the categories.

    Args:
        categories: One label an example; the position is the example's index.
        num_clients: Number of clients, at least 1.
        how: One of `PARTITIONS`.
        seed: Decides everything drawn, at least 0.
        concentration: Dirichlet parameter, above 0; only for ``dirichlet``.
        min_examples: Each client gets at least so many, at least 1. ``dirichlet`` and ``categories`` are
            redrawn until it is so, at most 1000 times.
        categories_per_client: Only for ``categories``.
        sizes: One positive number a client, in any unit; given if and only if ``how`` is ``sizes``.

    Returns:
        For each client its indices, ascending.

    Raises:
        DataError: A setting is out of range, or the data cannot be divided so; it says what to change.
    """
    if how not in PARTITIONS:
        raise DataError(f"partition {how!r} is unknown; known: {', '.join(PARTITIONS)}")
    if num_clients < 1 or min_examples < 1:
        raise DataError(f"num_clients={num_clients} and min_examples={min_examples} must both be at least 1")
    if seed < 0:
        raise DataError(f"seed={seed} must be at least 0")
    if (sizes is not None) != (how == "sizes"):
        raise DataError(f'sizes belongs to the partition "sizes" and to no other; got {how!r} with sizes={sizes}')
    if len(categories) < num_clients * min_examples:
        raise DataError(
            f"{len(categories)} examples cannot give {num_clients} clients {min_examples} each; "
            "lower num_clients or min_examples, or bring more data"
        )
    rng = np.random.default_rng(seed)
    if how == "dirichlet":
        if not (np.isfinite(concentration) and concentration > 0):
            raise DataError(f"concentration={concentration} must be a finite number above 0")
        return _redraw(
            lambda: _dirichlet(categories, num_clients, concentration, rng),
            min_examples,
            f"dirichlet with concentration {concentration}",
            "raise concentration, or lower num_clients or min_examples",
        )
    if how == "categories":
        _check_categories(len(set(categories)), num_clients, categories_per_client)
        return _redraw(
            lambda: _by_category(categories, num_clients, categories_per_client, rng),
            min_examples,
            f"categories with {categories_per_client} per client",
            "raise categories_per_client, or lower num_clients or min_examples",
        )
    proportions = np.ones(num_clients) if sizes is None else _check_sizes(sizes, num_clients)
    indices = rng.permutation(len(categories))
    clients = _ascending(np.split(indices, np.cumsum(_round_counts(proportions, len(indices)))[:-1]))
    smallest = min(range(num_clients), key=lambda client: len(clients[client]))
    if len(clients[smallest]) < min_examples:
        raise DataError(
            f"sizes: client {smallest} would get {len(clients[smallest])} of {len(categories)} examples, fewer "
            f"than min_examples={min_examples}; raise its share or lower min_examples"
        )
    return clients


def share(indices: Sequence[int], proportions: Sequence[float], rng: np.random.Generator) -> list[list[int]]:
    """Divide shuffled indices in proportion; without bias, however few there are.

    With cumulative shares c and u uniform in [0, 1), client k gets floor(c_k n + u) - floor(c_{k-1} n + u) of the
    n indices: within one of its exact share, and equal to it on average. (Cutting at floor(c_k n) would send
    each category's remainder to the last client, which is everything when categories are small.)

    Args:
        indices: What to divide.
        proportions: One number a client, not negative and not all 0, in any unit.
        rng: Source of the shuffle and of u.

    Returns:
        For each client its indices, ascending.
    """
    cumulative = np.cumsum(np.asarray(proportions, dtype=np.float64))
    cuts = np.floor(cumulative[:-1] / cumulative[-1] * len(indices) + rng.random()).astype(np.int64)
    shuffled = rng.permutation(np.asarray(indices, dtype=np.int64))
    return _ascending(np.split(shuffled, np.minimum(cuts, len(indices))))


def _redraw(draw: Callable[[], Clients], min_examples: int, what: str, remedy: str) -> Clients:
    best = 0
    for _ in range(_MAX_DRAWS):
        clients = draw()
        smallest = min(len(client) for client in clients)
        if smallest >= min_examples:
            return clients
        best = max(best, smallest)
    raise DataError(
        f"{what}: none of {_MAX_DRAWS} draws gave each of {len(clients)} clients {min_examples} examples "
        f"(the best draw's smallest client had {best}); {remedy}"
    )


def _dirichlet(categories: Sequence[str], num_clients: int, concentration: float, rng: np.random.Generator) -> Clients:
    clients: Clients = [[] for _ in range(num_clients)]
    for indices in _by_name(categories).values():
        proportions = rng.dirichlet(np.full(num_clients, concentration)).tolist()
        for client, part in zip(clients, share(indices, proportions, rng), strict=True):
            client.extend(part)
    return [sorted(client) for client in clients]


def _by_category(categories: Sequence[str], num_clients: int, per_client: int, rng: np.random.Generator) -> Clients:
    groups = _by_name(categories)
    holders: dict[str, list[int]] = {name: [] for name in groups}
    # Each client takes the categories with the fewest holders, ties by lot: no category is left out, and the
    # numbers of holders differ by at most one.
    for client in rng.permutation(num_clients):
        lot = dict(zip(groups, rng.permutation(len(groups)), strict=True))
        for name in sorted(groups, key=lambda name: (len(holders[name]), lot[name]))[:per_client]:
            holders[name].append(int(client))
    clients: Clients = [[] for _ in range(num_clients)]
    for name, indices in groups.items():
        for client, part in zip(holders[name], share(indices, [1.0] * len(holders[name]), rng), strict=True):
            clients[client].extend(part)
    return [sorted(client) for client in clients]


def _check_categories(num_categories: int, num_clients: int, per_client: int) -> None:
    if not 1 <= per_client <= num_categories:
        raise DataError(
            f"categories_per_client={per_client} must lie between 1 and the {num_categories} categories found"
        )
    if num_clients * per_client < num_categories:
        raise DataError(
            f"{num_clients} clients with {per_client} categories each cannot hold all {num_categories}; "
            f"raise categories_per_client to {-(-num_categories // num_clients)} or num_clients to "
            f"{-(-num_categories // per_client)}"
        )


def _check_sizes(sizes: Sequence[float], num_clients: int) -> NDArray[np.float64]:
    values = np.asarray(sizes, dtype=np.float64)
    if values.shape != (num_clients,) or not np.all(np.isfinite(values) & (values > 0)):
        raise DataError(f"sizes must hold {num_clients} finite numbers above 0, one a client; got {list(sizes)}")
    return values


def _round_counts(proportions: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole counts that sum to total: floors, then one more to the largest remainders (ties: the first)."""
    exact = proportions / proportions.sum() * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]] += 1
    return counts


def _by_name(categories: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {name: [] for name in sorted(set(categories))}
    for index, name in enumerate(categories):
        groups[name].append(index)
    return groups


def _ascending(parts: Sequence[NDArray[np.int64]]) -> Clients:
    return [sorted(int(index) for index in part) for part in parts]
