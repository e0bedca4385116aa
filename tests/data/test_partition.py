import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedmomentum.data.partition import PARTITIONS, divide_in_proportion, partition
from fedmomentum.errors import DataError

LABELS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=120)


@st.composite
def requests(draw):
    """Settings that may or may not fit the labels drawn."""
    how = draw(st.sampled_from(sorted(PARTITIONS)))
    num_clients = draw(st.integers(1, 6))
    sizes = (
        draw(st.lists(st.floats(0.1, 10), min_size=num_clients, max_size=num_clients))
        if how == "sizes"
        else None
    )
    return draw(LABELS), {
        "how": how,
        "num_clients": num_clients,
        "seed": draw(st.integers(0, 2**40)),
        "min_examples": draw(st.integers(1, 3)),
        "concentration": draw(st.sampled_from([0.3, 1.0, 100.0])),
        "categories_per_client": draw(st.integers(1, 5)),
        "sizes": sizes,
    }


@settings(max_examples=150, deadline=None)
@given(requests())
def test_each_index_goes_to_one_client_and_each_client_gets_enough(request):
    labels, how = request
    try:
        clients = partition(labels, **how)
    except DataError:
        assume(False)
    assert sorted(index for client in clients for index in client) == list(range(len(labels)))
    assert len(clients) == how["num_clients"]
    assert all(len(client) >= how["min_examples"] for client in clients)
    assert all(client == sorted(client) for client in clients)
    assert partition(labels, **how) == clients


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(0, 100), st.integers(0, 2**32))
def test_iid_always_fits_and_deals_evenly(num_clients, extra, seed):
    clients = partition([""] * (num_clients + extra), num_clients=num_clients, how="iid", seed=seed)
    counts = [len(client) for client in clients]
    assert max(counts) - min(counts) <= 1


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 8), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
def test_each_client_holds_its_categories_and_each_category_as_many_clients(
    num_clients, num_names, per_client, seed
):
    assume(per_client <= num_names <= num_clients * per_client)
    labels = [f"c{index % num_names}" for index in range(50 * num_names)]
    clients = partition(
        labels,
        num_clients=num_clients,
        how="categories",
        seed=seed,
        categories_per_client=per_client,
    )
    held = [Counter(labels[index] for index in client) for client in clients]
    assert {len(counts) for counts in held} == {per_client}
    holders = Counter(name for counts in held for name in counts)
    assert len(holders) == num_names
    assert max(holders.values()) - min(holders.values()) <= 1
    for name in holders:
        shares = [counts[name] for counts in held if counts[name]]
        assert max(shares) - min(shares) <= 1


def label_skew(labels, clients):
    """Mean total variation distance between each client's labels and the labels of all."""
    names = sorted(set(labels))
    overall = np.array([labels.count(name) for name in names]) / len(labels)
    distances = []
    for client in clients:
        counts = Counter(labels[index] for index in client)
        distances.append(
            np.abs(np.array([counts[name] for name in names]) / len(client) - overall).sum() / 2
        )
    return float(np.mean(distances))


@pytest.mark.parametrize("seed", range(5))
def test_dirichlet_tends_to_iid_with_the_concentration(seed):
    labels = [name for name in "abcdefgh" for _ in range(100)]
    skews, sizes = [], []
    for concentration in (0.05, 1.0, 1e7):
        clients = partition(
            labels, num_clients=5, how="dirichlet", seed=seed, concentration=concentration
        )
        skews.append(label_skew(labels, clients))
        sizes.append([len(client) for client in clients])
    assert skews[0] > skews[1] > skews[2]
    assert skews[0] > 0.4 and skews[2] < 0.02
    # Each of 8 categories gives each client 100/5 examples within one.
    assert all(abs(size - 160) <= 8 for size in sizes[2])


def test_dirichlet_does_not_favour_a_client_when_categories_are_tiny():
    labels = [f"intent-{index}" for index in range(600)]
    clients = partition(labels, num_clients=3, how="dirichlet", seed=0, concentration=1000.0)
    assert all(150 < len(client) < 250 for client in clients)


def test_sizes_follow_the_proportions():
    clients = partition(["x"] * 100, num_clients=3, how="sizes", seed=1, sizes=[5, 3, 2])
    assert [len(client) for client in clients] == [50, 30, 20]


def test_seeds_differ():
    labels = list("abcd") * 10
    for how in ("iid", "dirichlet", "categories"):
        assert partition(labels, num_clients=4, how=how, seed=0) != partition(
            labels, num_clients=4, how=how, seed=1
        )


def test_result_does_not_depend_on_the_hash_seed(monkeypatch):
    code = (
        "from fedmomentum.data.partition import partition\n"
        "for how in ('dirichlet', 'categories'):\n"
        "    print(partition(list('deadbeefcafe') * 5, num_clients=3, how=how, seed=7))"
    )
    outputs = set()
    for hash_seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        outputs.add(
            subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            ).stdout
        )
    assert len(outputs) == 1


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 60),
    st.lists(st.floats(0, 5), min_size=1, max_size=6).filter(lambda values: sum(values) > 1e-3),
    st.integers(0, 2**32),
)
def test_share_covers_and_stays_within_one_of_the_proportions(count, proportions, seed):
    indices = list(range(100, 100 + count))
    parts = divide_in_proportion(indices, proportions, np.random.default_rng(seed))
    assert sorted(index for part in parts for index in part) == indices
    for part, proportion in zip(parts, proportions, strict=True):
        assert abs(len(part) - count * proportion / sum(proportions)) < 1 + 1e-9


def test_division_in_proportion_is_unbiased():
    rng = np.random.default_rng(0)
    counts = np.mean(
        [[len(part) for part in divide_in_proportion([0], [1, 2, 1], rng)] for _ in range(4000)],
        axis=0,
    )
    np.testing.assert_allclose(counts, [0.25, 0.5, 0.25], atol=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"how": "random"}, "'random' is unknown; known: iid, dirichlet, categories, sizes"),
        ({"num_clients": 0}, "num-clients = 0"),
        ({"min_examples": 0}, "min-examples = 0"),
        ({"seed": -1}, "seed=-1"),
        ({"num_clients": 13}, "12 examples cannot give 13 clients 1 each; lower num-clients"),
        ({"how": "dirichlet", "concentration": 0.0}, "concentration = 0.0"),
        ({"how": "dirichlet", "concentration": float("nan")}, "concentration = nan"),
        (
            {"how": "dirichlet", "concentration": 1e-3, "num_clients": 4, "min_examples": 3},
            "none of 1000 draws .* raise concentration, or lower num-clients or min-examples",
        ),
        (
            {"how": "categories", "categories_per_client": 4},
            "categories-per-client = 4 must lie between 1 and the 3 categories",
        ),
        (
            {"how": "categories", "categories_per_client": 1, "num_clients": 2},
            "raise categories-per-client to 2 or num-clients to 3",
        ),
        ({"how": "sizes"}, "sizes"),
        ({"sizes": [1, 1, 1]}, "sizes"),
        ({"how": "sizes", "sizes": [1, 1]}, "3 finite numbers above 0"),
        ({"how": "sizes", "sizes": [1, 1, 0]}, "3 finite numbers above 0"),
        (
            {"how": "sizes", "sizes": [100, 1, 100]},
            "client 1 would get 0 of 12.* fewer than min-examples = 1",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(changes, message):
    arguments = {"num_clients": 3, "how": "iid", "seed": 0} | changes
    with pytest.raises(DataError, match=message):
        partition(list("abc") * 4, **arguments)
