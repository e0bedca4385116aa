"""The section [privacy]: off by default, and values that no sum could satisfy are refused."""

import pytest

from fedmomentum.config.privacy import MAX_CLIENTS, MAX_EXAMPLES
from fedmomentum.config.toml import from_dict, load_config
from fedmomentum.errors import ConfigError
from fedmomentum.secure_sum.fixed_point import largest_integer
from fedmomentum.secure_sum.messages import MAX_PARTIES


def test_it_is_off_by_default():
    privacy = from_dict({}).privacy
    assert not privacy.secure_aggregation and not privacy.trusts_server
    assert privacy.threshold is None and privacy.roster is None and privacy.sketch_ranks == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("threshold", 2, "privacy.threshold must be at least 3; got 2"),
        ("threshold", 101, "privacy.threshold must be at most 100"),
        ("max-examples", 0, "privacy.max-examples must be from 1 to"),
        ("max-examples", MAX_EXAMPLES + 1, "privacy.max-examples must be from 1 to"),
        ("max-change", 0.0, "privacy.max-change must be from 1e-12"),
        ("max-change", float("nan"), "a finite number"),
        ("sketch-ranks", 0, "privacy.sketch-ranks must be from 1 to 99"),
        ("sketch-ranks", 100, "privacy.sketch-ranks must be from 1 to 99"),
        ("roster", "", "privacy.roster must be the path of a file"),
        ("secure-aggregation", "yes", "privacy.secure-aggregation must be of type bool"),
        ("secure-agregation", True, "did you mean secure-aggregation"),
    ],
)
def test_settings_that_no_sum_could_satisfy_are_refused(key, value, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"privacy": {key: value}})


def test_counts_of_examples_fit_with_any_number_of_clients():
    assert MAX_CLIENTS == MAX_PARTIES
    assert largest_integer(MAX_CLIENTS) >= MAX_EXAMPLES


def test_a_roster_is_looked_for_beside_the_file(tmp_path):
    (tmp_path / "roster.pub").touch()
    file = tmp_path / "job.toml"
    file.write_text('[privacy]\nroster = "roster.pub"\n')
    assert load_config(file).privacy.roster == str(tmp_path / "roster.pub")
