"""A method from outside the package, by `module:Class`."""

import sys

import pytest

from fedmomentum.aggregation.registry import METHODS, build_method
from fedmomentum.cli.main import app
from fedmomentum.errors import ConfigError
from tests.runs import start, timeless, tiny_config

FILE = """
from dataclasses import dataclass
from fedmomentum.aggregation import Method, ModuleAggregate

@dataclass(frozen=True)
class Mean(Method):
    factor: float = 1.0

    def combine(self, updates, context):
        return ModuleAggregate(updates.mean_factors().scaled(self.factor))

class NoMethod:
    pass
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def test_a_method_from_outside_runs_a_federation(outside):
    config = tiny_config(outside, method={"name": "mine:Mean", "settings": {"factor": 1.0}})
    start(config, outside / "own")
    start(tiny_config(outside, method={"name": "fedit"}), outside / "fedit")
    own, fedit = timeless(outside / "own"), timeless(outside / "fedit")
    assert [row["evaluation"] for row in own] == [row["evaluation"] for row in fedit]
    assert repr(build_method("mine:Mean", {"factor": 0.5})) == "Mean(factor=0.5)"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine:Other", "cannot be imported"),
        ("nowhere:Mean", "cannot be imported"),
        ("mine:NoMethod", "is not a dataclass derived from"),
        ("fedmomentun", "known: fedmomentum, .*module:Class"),
    ],
)
def test_an_object_that_is_not_a_method_is_refused_by_name(outside, name, words):
    with pytest.raises(ConfigError, match=words):
        build_method(name, {})
    with pytest.raises(ConfigError, match="no setting 'x'; it has factor"):
        build_method("mine:Mean", {"x": 1})


def test_the_command_lists_every_method(capsys):
    app(["methods"], standalone_mode=False)
    shown = capsys.readouterr().out
    for name, kind in METHODS.items():
        assert name in shown and (not kind.residual_rank or "P(q)" in shown)
