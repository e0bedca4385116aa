"""What correlates with the gain of shared moments: the correlations are right, and the document has them."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mechanism(monkeypatch):
    folders = [str(ROOT / "experiments" / "banking77"), str(ROOT / "experiments")]
    monkeypatch.setattr(sys, "path", [*folders, *sys.path])
    return importlib.import_module("mechanism")


def run(mechanism, method, seed, exact_match, cosine):
    return mechanism.Run("few", method, seed, exact_match, 1.0, cosine, 2.0, 0.9, 1.0)


def test_differences_between_methods_do_not_count_within_them(mechanism):
    """Methods of higher cosine are better, and within a method the seeds of higher cosine are worse."""
    runs = [run(mechanism, mechanism.FRESH, seed, 0.5, 0.0) for seed in range(8)]
    for place, method in enumerate(("fedit", "fedexlora")):
        for seed in range(8):
            step = 0.01 * seed
            runs.append(
                run(mechanism, method, seed, 0.6 + 0.1 * place - step, 0.4 + 0.4 * place + step)
            )
    paired = mechanism.pairs(runs)
    assert len(paired) == 16  # the baseline is not compared with itself
    assert paired[0].gain == pytest.approx(10.0)
    assert paired[8].change["update_cosine"] == pytest.approx(0.8)
    assert mechanism.between(paired, "update_cosine") == pytest.approx(1.0)
    runs[-1] = run(mechanism, "fedexlora", 7, 0.64, 0.87)  # not a perfect line
    correlation, low, high = mechanism.within(mechanism.pairs(runs), "update_cosine")
    assert low < correlation < -0.9 and high < -0.8


def test_a_new_adapter_says_nothing_by_its_energy(mechanism):
    runs = [
        run(mechanism, method, seed, 0.5, 0.0)
        for method in (mechanism.FRESH, "flora", "fedexlora")
        for seed in range(2)
    ]
    paired = mechanism.pairs(runs)
    assert {one.run.method for one in mechanism.usable(paired, "retained_energy")} == {"fedexlora"}
    assert len(mechanism.usable(paired, "update_cosine")) == 4


def test_the_document_has_the_tables_of_the_committed_measures(mechanism):
    text = (ROOT / "docs" / "appendix" / "results.md").read_text()
    for table in mechanism.tables().split("\n\n"):
        assert table.strip() in text
    assert "](results/mechanism.svg)" in text and mechanism.FIGURE.is_file()


def test_the_measures_are_of_the_committed_comparisons(mechanism):
    """Scores by method and seed are those of comparison.csv, where it is committed."""
    committed = [
        name for name in mechanism.SETTINGS if (mechanism.RESULTS / f"moments-{name}").is_dir()
    ]
    assert "few" in committed
    runs = mechanism.read()
    for name in committed:
        scores = mechanism.scores(f"moments-{name}")
        ours = [one for one in runs if one.setting == name]
        assert len(ours) == sum(len(by_seed) for by_seed in scores.values())
        for one in ours:
            assert one.exact_match == scores[one.method][one.seed]
