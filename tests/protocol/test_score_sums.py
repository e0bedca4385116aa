"""Losses and scores under masks: what comes of the sum is what the clients' own would give."""

import numpy as np
import pytest

from fedmomentum.errors import SecureSumError
from fedmomentum.formats.scores import LabelCounts, Score
from fedmomentum.protocol.messages import EvaluateResult, Reply
from fedmomentum.protocol.score_sums import (
    MAX_LOSS,
    ScoreSums,
    loss_blocks,
    loss_values,
    mean_loss,
)
from fedmomentum.secure_sum.messages import encode_message
from fedmomentum.secure_sum.server import SumServer
from fedmomentum.server.replies import Replies
from fedmomentum.server.scoring import pool_scores
from tests.secure_sum.sums import make_parties, make_plan, plain_sum, roster, run_sum

LABELS = ("ab", "cd", "ef")


def under_masks(folder, blocks, values, leaves=None):
    """The sum through the full protocol, and who is in it."""
    plan = make_plan(len(values), parties=sorted(values), blocks=blocks)
    server = SumServer(plan, roster(plan.parties))
    run_sum(server, make_parties(plan, values, folder), leaves)
    return server.result.values


def score(draw, *, num_examples, pairs=False, labels=()):
    num_exact = int(draw.integers(0, num_examples + 1))
    by_label = {}
    if labels:
        # right ones first; each wrong one was taken for the next label
        true = draw.integers(0, len(labels), num_examples)
        predicted = np.where(np.arange(num_examples) < num_exact, true, (true + 1) % len(labels))
        for index, label in enumerate(labels):
            counts = LabelCounts(
                int((true == index).sum()),
                int((predicted == index).sum()),
                int(((true == index) & (predicted == index)).sum()),
            )
            if counts.num_examples or counts.num_predicted:
                by_label[label] = counts
    return Score(
        float(draw.exponential(300)),
        int(draw.integers(num_examples, 50 * num_examples)),
        num_examples,
        num_exact,
        margin=float(draw.normal(0, 40)) if pairs else None,
        by_label=by_label,
    )


def results(draw, n, **kind):
    found = {}
    for index in range(n):
        compared = score(draw, num_examples=int(draw.integers(1, 9)), **kind)
        others = score(draw, num_examples=int(draw.integers(1, 99)), **kind)
        found[f"party {index:02}"] = EvaluateResult(
            compared=compared, total=compared + others, by_category={"secret name": others}
        )
    return found


@pytest.mark.parametrize("n", [3, 10])
@pytest.mark.parametrize("kind", [{}, {"pairs": True}, {"labels": LABELS}])
def test_scores_under_masks_are_those_of_all_clients_together(tmp_path, n, kind):
    client_results = results(np.random.default_rng(n), n, **kind)
    replies = Replies()
    for client, result in client_results.items():
        replies.replies[client] = Reply("run", client, 1, "", frozenset(), 1, "", result)
    wanted = pool_scores(replies, None).scores

    sums = ScoreSums(n, of_pairs="pairs" in kind, labels=kind.get("labels", ()))
    values = {client: sums.values(result) for client, result in client_results.items()}
    record = sums.record(under_masks(tmp_path, sums.blocks(), values))
    for got, expected in ((record.total, wanted.total), (record.compared, wanted.compared)):
        assert (got.num_tokens, got.num_examples, got.num_exact) == (
            expected.num_tokens,
            expected.num_examples,
            expected.num_exact,
        )
        assert got.by_label == expected.by_label
        assert got.nll == pytest.approx(expected.nll, abs=n * 1e-8)
        if "pairs" in kind:
            assert got.margin == pytest.approx(expected.margin, abs=n * 1e-8)
        else:
            assert got.margin is None
    assert record.by_client == {} and record.by_category == {}


def test_the_layout_reveals_nothing_about_a_client(tmp_path):
    """No name of a category, no length: a client without held-out examples sends as much."""
    sums = ScoreSums(3, labels=LABELS)
    full = sums.values(results(np.random.default_rng(1), 1, labels=LABELS)["party 00"])
    empty = sums.values(EvaluateResult())
    assert {k: v.shape for k, v in full.items()} == {k: v.shape for k, v in empty.items()}
    assert not any(value.any() for value in empty.values())
    assert "secret" not in str([encode_message(block) for block in sums.blocks()])


def test_without_held_out_examples_there_is_no_score():
    sums = ScoreSums(3)
    empty = sums.values(EvaluateResult())
    assert sums.record(empty) is None


@pytest.mark.parametrize(
    ("block", "value", "message"),
    [
        ("total counts", [9.0, 2.0, 3.0], "3 exact answers of 2 examples"),
        ("total counts", [9.0, 2.0, -1.0], "a count of -1"),
        ("compared nll, whole", [-5.0], "a negative log-likelihood"),
        ("total labels", [1.0] * 9, "do not add up"),
    ],
)
def test_a_sum_that_cannot_be_a_score_is_refused(block, value, message):
    sums = ScoreSums(3, labels=LABELS)
    draw = np.random.default_rng(3)
    values = dict(sums.values(results(draw, 1, labels=LABELS)["party 00"]))
    values[block] = np.array(value)
    with pytest.raises(SecureSumError, match=message):
        sums.record(values)


def test_the_mean_loss_is_weighted_by_examples_and_as_exact_as_the_sum(tmp_path):
    losses = {"party 00": 2.3456789, "party 01": -0.5, "party 02": 11.75}
    counts = {"party 00": 40, "party 01": 3, "party 02": 900}
    values = {p: loss_values(losses[p], counts[p], 10_000) for p in losses}
    total = under_masks(tmp_path, loss_blocks(3), values)
    wanted = sum(losses[p] * counts[p] for p in losses) / 943
    assert mean_loss(total, 943, 10_000) == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 2 * MAX_LOSS])
def test_a_mean_that_would_leave_a_client_out_is_not_reported(loss):
    values = {
        "a": loss_values(loss, 10, 100),
        "b": loss_values(1.0, 10, 100),
    }
    assert mean_loss(plain_sum(values, ["a", "b"]), 20, 100) is None
    assert mean_loss(values["b"], 10, 100) == pytest.approx(1.0)
