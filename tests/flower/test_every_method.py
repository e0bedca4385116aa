"""Every method over a real deployment on loopback: coordinator and a node in processes of their own, TLS, keys."""

import pytest

from fedmomentum.aggregation.registry import METHODS
from tests.faults.harness import Federation, hard_limit
from tests.runs import timeless


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Base model and data."""
    return tmp_path_factory.mktemp("shared")


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_two_rounds_over_loopback_have_the_bits_of_two_in_process(shared, tmp_path, name):
    """Rows, manifests and objects; site0 is a node with its worker, the two others use its connection from here."""
    fed = Federation(tmp_path / "case", shared, method={"name": name}, federation={"num_rounds": 2})
    with hard_limit(240):
        try:
            for site in ("site0", "site1", "site2"):
                fed.key(site)
            fed.serve()
            fed.join("site0")
            for site in ("site1", "site2"):
                fed.raw(site).start()
            fed.check()
            assert timeless(fed.out) == timeless(
                fed.folder / "reference"
            )  # bytes too, where nothing fails
        finally:
            wrong = fed.close()
    assert not wrong
