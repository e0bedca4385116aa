"""What is known about the model families, on terminals of any width."""

import pytest

from fedmomentum.base_model.families import known_families
from fedmomentum.cli.options import OUT


def collapsed(text: str) -> str:
    """Without a table's borders and line breaks."""
    return "".join(text.replace("│", "").split())


@pytest.mark.parametrize("width", [60, 200])
def test_all_that_is_known_of_a_family_is_shown_uncut(width, call, monkeypatch):
    monkeypatch.setattr(OUT, "_width", width)
    _, shown, _ = call("models", "laguna")
    family = next(known for known in known_families().families if known.family == "laguna")
    for text in (family.kind, *family.adapted, *family.left_out):
        assert collapsed(text) in collapsed(shown)
    assert "…" not in shown
    assert "yes" in shown


def test_every_family_is_listed_with_why_it_is_refused_or_was_not_tried(call):
    _, shown, _ = call("models")
    known = known_families()
    for family in [*known.families, *known.classifiers]:
        assert f"│ {family.family} " in shown
    for kind, not_tried in (
        ("language model", known.not_tried),
        ("sequence classifier", known.classifiers_not_tried),
    ):
        for name, reason in not_tried.items():
            assert collapsed(f"{name}: not tried as a {kind} ({reason})") in collapsed(shown)
    assert "…" not in shown


def test_a_family_is_shown_as_language_model_and_as_classifier(call):
    _, shown, _ = call("models", "mobilebert")
    assert "MobileBertForSequenceClassification" in shown
    _, shown, _ = call("models", "olmo2")
    assert "Olmo2ForCausalLM" in shown
    assert "Olmo2ForSequenceClassification" in shown


def test_a_family_that_was_not_tried_is_reported_with_the_reason(call):
    reason = known_families().not_tried["musicgen"]
    sentence = f"musicgen: not tried as a language model ({reason})"
    code, shown, _ = call("models", "musicgen")
    assert code == 0
    assert sentence in shown.splitlines()


def test_a_name_that_no_family_has_is_refused(call):
    code, _, err = call("models", "lama7")
    assert code == 2
    assert "no family is called 'lama7'" in err
