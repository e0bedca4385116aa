"""A client that restarts with another split of its examples is detected, and no other."""

import json
import stat
from dataclasses import replace

import pytest

from fedmomentum.data.split import FILE, compare_split, split_fingerprint
from fedmomentum.data.tokenized import TokenizedExamples


def examples(*numbers):
    return TokenizedExamples(
        tuple((number, number + 1, 7) for number in numbers),
        (1,) * len(numbers),
        ("",) * len(numbers),
        (False,) * len(numbers),
        0,
    )


TRAIN, TEST = examples(*range(20)), examples(*range(100, 105))


def test_the_same_split_gives_no_warning_in_any_order(tmp_path):
    assert compare_split(tmp_path, "run", TRAIN, TEST, seed=0) is None
    assert compare_split(tmp_path, "run", examples(*reversed(range(20))), TEST, seed=0) is None
    assert (
        compare_split(tmp_path, "run", TRAIN, examples(*reversed(range(100, 105))), seed=0) is None
    )


def test_examples_that_were_held_out_and_are_trained_on_are_counted(tmp_path):
    compare_split(tmp_path, "run", TRAIN, TEST, seed=0)
    text = compare_split(
        tmp_path, "run", examples(*range(3, 20), 100, 101, 102), examples(0, 1, 2, 103, 104), seed=1
    )
    assert text is not None and "3 of 5 that were held out are trained on now" in text
    assert "run.seed was 0 and is 1" in text and f"remove {tmp_path / FILE}" in text
    text = compare_split(
        tmp_path, "run", examples(*range(20), 104), TEST, seed=0
    )  # what the run began with counts
    assert (
        text is not None
        and "1 of 5 that were held out are trained on now" in text
        and "run.seed" not in text
    )


def test_other_data_of_which_none_was_held_out_gives_a_milder_warning(tmp_path):
    compare_split(tmp_path, "run", TRAIN, TEST, seed=0)
    text = compare_split(tmp_path, "run", examples(*range(25)), TEST, seed=0)
    assert text == (
        "the examples differ from those this run began with: 20 examples were trained on and 5 "
        "held out, now 25 and 5. "
        "None that was held out is trained on now"
    )
    moved = replace(
        TRAIN, num_prompt_tokens=(2,) * 20
    )  # the same tokens, divided otherwise into prompt and answer
    assert compare_split(tmp_path, "run", moved, TEST, seed=0) is not None


def test_another_run_starts_from_scratch(tmp_path):
    compare_split(tmp_path, "run", TRAIN, TEST, seed=0)
    assert compare_split(tmp_path, "another", TEST, TRAIN, seed=0) is None
    assert compare_split(tmp_path, "another", TRAIN, TEST, seed=0) is not None


def test_the_file_does_not_reveal_the_examples(tmp_path):
    """Digests under a secret of the client, which only its owner can read."""
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        compare_split(folder, "run", TRAIN, TEST, seed=0)
        assert stat.S_IMODE((folder / FILE).stat().st_mode) == 0o600
    one, other = (json.loads((tmp_path / name / FILE).read_text()) for name in ("one", "other"))
    assert one["salt"] != other["salt"] and not set(one["held_out"]) & set(other["held_out"])
    assert len(one["held_out"]) == 5


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 10**6, b'{"run_id": 1}'])
def test_a_damaged_file_is_reported_and_rebuilt(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    text = compare_split(tmp_path, "run", TRAIN, TEST, seed=0)
    assert (
        text.startswith(str(tmp_path / FILE))
        and "Whether the examples are divided as before is not known" in text
    )
    assert compare_split(tmp_path, "run", TRAIN, TEST, seed=0) is None
    assert compare_split(tmp_path, "run", TEST, TRAIN, seed=0) is not None


def test_a_fingerprint_depends_on_the_division_and_the_key():
    one = split_fingerprint(TRAIN, TEST, "run")
    assert one == split_fingerprint(examples(*reversed(range(20))), TEST, "run") and len(one) == 64
    others = [
        split_fingerprint(TRAIN, TEST, "other"),
        split_fingerprint(TEST, TRAIN, "run"),
        split_fingerprint(examples(*range(19)), examples(*range(100, 105), 19), "run"),
        split_fingerprint(TRAIN, examples(), "run"),
    ]
    assert len({one, *others}) == 5
