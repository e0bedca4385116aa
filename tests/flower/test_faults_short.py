"""A deployment over loopback: coordinator and nodes in processes of their own, TLS, and one node that is killed."""

import signal

import pytest

pytest.importorskip("flwr")

from tests.faults.harness import Asked, Federation, hard_limit, honest, until


@pytest.mark.long
def test_a_node_killed_in_a_round_joins_again_and_every_bit_is_that_of_an_undisturbed_run(tmp_path):
    """It is asked again within the round; hashes, weights and scores equal those of a run in one process."""
    (shared := tmp_path / "shared").mkdir()
    fed = Federation(
        tmp_path / "case", shared, federation={"num_rounds": 2}, evaluation={"every": 0}
    )

    def patient(asked: Asked) -> None:
        """Round 1 lasts until the killed node was asked again."""
        if asked.is_training(1):
            until(lambda: "site1 came back" in fed.log(), "site1 asked again")
        honest(asked)

    with hard_limit(150):
        try:
            fed.steer("site1", 1, "hold")
            fed.key("site0")
            fed.start("site1", raw="site2", act=patient)
            fed.raw("site0").start()
            fed.until_held("site1", 1)
            fed.nodes["site1"].kill(signal.SIGKILL)
            fed.steer("site1", 1, "")
            fed.join("site1")
            fed.check(log=["site1 lost its connection", "site1 came back; it is asked again"])
        finally:
            wrong = fed.close()
    assert not wrong  # nodes left upon Ctrl-C, and no process is left of any
