"""What follows from right and wrong answers: standard errors, intervals, paired differences."""

import math
import random

import msgspec
import pytest
from lm_eval.api.metrics import mean_stderr

from fedmomentum.formats.benchmark_file import (
    MetricScore,
    ModelScores,
    TaskResult,
    TaskSettings,
    merge_results,
    paired_difference,
)


def score(correct, metric="acc"):
    return MetricScore(metric=metric, correct=correct)


def test_the_standard_error_is_lm_evals():
    draw = random.Random(0)
    for n in (2, 3, 17, 400):
        answers = [draw.randint(0, 1) for _ in range(n)]
        one = score("".join(map(str, answers)))
        assert one.standard_error == pytest.approx(mean_stderr(answers), abs=1e-12)
        assert one.fraction == sum(answers) / n
        low, high = one.interval
        assert 0 <= low < one.fraction < high <= 1 or one.fraction in (0, 1)
    assert score("1").standard_error is None and score("00").standard_error == 0
    assert score("00").interval[1] > 0.6


def test_the_paired_difference_is_agresti_and_mins():
    """Their example: 1600 voters, 794 and 86 and 150 and 570 (rating of a prime minister)."""
    before = "1" * 794 + "1" * 150 + "0" * 86 + "0" * 570
    after = "1" * 794 + "0" * 150 + "1" * 86 + "0" * 570
    value, low, high = paired_difference(score(before), score(after))
    assert value == pytest.approx((86 - 150) / 1600)
    half = 1.959964 * math.sqrt((86 + 150 + 1) - (86 - 150) ** 2 / 1602) / 1602
    assert (low, high) == pytest.approx((-64 / 1602 - half, -64 / 1602 + half), abs=1e-9)
    assert -0.059 < low < -0.058 and -0.022 < high < -0.021  # Wald's is [-.0587, -.0213]


def test_the_interval_of_models_that_agree_is_not_empty():
    for n in (1, 2, 10, 1000):
        value, low, high = paired_difference(score("1" * n), score("1" * n))
        assert value == 0 and -1 <= low < 0 < high <= 1 and low == -high
    value, low, high = paired_difference(score("00"), score("11"))
    assert value == 1 and low < 1 and high <= 1


def test_coverage_is_near_95_percent():
    draw = random.Random(1)
    inside = 0
    for _ in range(1000):
        base = [draw.random() < 0.4 for _ in range(60)]
        other = [right ^ (draw.random() < (0.1 if right else 0.2)) for right in base]
        texts = ["".join(str(int(right)) for right in one) for one in (base, other)]
        _, low, high = paired_difference(score(texts[0]), score(texts[1]))
        inside += low <= 0.6 * 0.2 - 0.4 * 0.1 <= high
    assert 930 <= inside <= 980


SETTINGS = TaskSettings(
    sha256="0" * 64,
    base=None,
    tokenizer=None,
    limit=None,
    num_fewshot=0,
    chat=False,
    truncate=False,
    batch_size=8,
    dtype="float32",
    device="cpu",
    lm_eval="0.4.13",
)


def scores_of(server_round, correct="01"):
    return ModelScores(
        model="base" if server_round is None else "federated",
        round=server_round,
        num_truncated=0,
        num_unfinished=0,
        seconds=1.0,
        scores=[score(correct)],
    )


def test_results_join_those_of_equal_settings_and_replace_others():
    old = TaskResult(task="b", settings=SETTINGS, models=[scores_of(None), scores_of(1)])
    new = TaskResult(task="b", settings=SETTINGS, models=[scores_of(None), scores_of(2, "11")])
    (joined,) = merge_results([old], new)
    assert [model.round for model in joined.federated] == [1, 2]
    assert joined.base.scores == new.base.scores
    (again,) = merge_results([joined], new)
    assert again == joined
    other = msgspec.structs.replace(SETTINGS, sha256="1" * 64)
    (replaced,) = merge_results([joined], msgspec.structs.replace(new, settings=other))
    assert [model.round for model in replaced.federated] == [2]
    limited = msgspec.structs.replace(SETTINGS, limit=2)
    beside = merge_results([joined], msgspec.structs.replace(new, settings=limited))
    assert [result.variant for result in beside] == ["0-shot first 2 float32", "0-shot float32"]
    assert beside[1] == joined
    first = TaskResult(task="a", settings=SETTINGS, models=[scores_of(None)])
    assert [result.task for result in merge_results([joined], first)] == ["a", "b"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([scores_of(None), scores_of(1, "011")], "different numbers of examples"),
        ([scores_of(1), scores_of(1)], "a model is there twice"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(models, message):
    table = msgspec.to_builtins({"task": "a", "settings": SETTINGS, "models": models})
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(table, TaskResult)
    for correct in ("", "012", "0\n"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"metric": "acc", "correct": correct}, MetricScore)
