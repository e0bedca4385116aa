"""Every key is checked, and an error names the nearest one that exists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmomentum.config.__main__ import render_reference
from fedmomentum.config.toml import (
    SECTIONS,
    apply_overrides,
    changed_keys,
    from_dict,
    load_config,
    to_dict,
    to_toml,
)
from fedmomentum.errors import ConfigError

MINIMAL = {"data": {"source": "reasoning-gym"}}


def write(folder, text):
    file = folder / "run.toml"
    file.write_text(text)
    return file


def test_toml_round_trips(tmp_path):
    config = from_dict(
        {
            "data": {
                "client-files": {'odd "name" \\ é': "x\n.jsonl"},
                "partition": "sizes",
                "sizes": [1, 2.5],
            },
            "training": {
                "local-epochs": 1.5,
                "arguments": {"weight_decay": 0.01, "optim": "adamw_torch"},
            },
            "method": {"settings": {"split": "aligned", "energy": 0.99}},
            "lora": {"target-modules": ["q_proj", "v_proj"]},
        }
    )
    reloaded = load_config(write(tmp_path, to_toml(config)))
    assert reloaded == config and changed_keys(reloaded, config) == []


@given(st.text(max_size=30))
def test_any_text_round_trips(tmp_path_factory, text):
    config = from_dict({"data": {"source": text or "x", "client-column": text}})
    reloaded = load_config(write(tmp_path_factory.mktemp("t"), to_toml(config)))
    assert reloaded.data.client_column == text


def test_overrides_replace_the_files_values(tmp_path):
    file = write(tmp_path, '[data]\nsource = "reasoning-gym"\n')
    config = load_config(
        file,
        [
            "federation.num-rounds=7",
            "method.name=fedit",
            'lora.target-modules=["a"]',
            "method.settings.energy=0.5",
            "training.learning-rate=1",
            "model.name=some/model",
        ],
    )
    assert (
        config.federation.num_rounds == 7
        and config.method.name == "fedit"
        and config.lora.target_modules == ["a"]
    )
    assert config.method.settings == {"energy": 0.5} and config.training.learning_rate == 1.0
    assert config.model.name == "some/model"


def test_overrides_name_clients_with_dots_in_quotes(tmp_path):
    file = write(tmp_path, '[data.client-files]\n"north.eu" = "a.jsonl"\nsouth = "b.jsonl"\n')
    changed = [
        'data.client-files."north.eu"=c.jsonl',
        "data.client-files.'a=b'=d=e.jsonl",
        'lora.clients . "north.eu".rank = 2',
        "data.client-files.o'neil=f.jsonl",
        "data.client-files.south=",
    ]
    config = load_config(file, changed)
    assert config.data.client_files == {
        "north.eu": "c.jsonl",
        "a=b": "d=e.jsonl",
        "o'neil": "f.jsonl",
    }
    assert config.lora.clients == {"north.eu": {"rank": 2}}
    without = apply_overrides(config, ['data.client-files."north.eu"='])
    assert sorted(without.data.client_files) == ["a=b", "o'neil"]


def test_a_number_given_for_a_text_is_refused_with_how_to_quote_it(tmp_path):
    file = write(tmp_path, "")
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["model.revision=1234567"])
    hint = "got 1234567, a number; a text is put in quotes, on the command line "
    assert str(caught.value).endswith(hint + "'model.revision=\"1234567\"'")
    assert load_config(file, ['model.revision="1234567"']).model.revision == "1234567"


def test_paths_are_relative_to_the_configuration_file(tmp_path):
    (tmp_path / "a.jsonl").touch()
    config = load_config(
        write(tmp_path, '[data.client-files]\na = "a.jsonl"\nb = "/elsewhere/b.jsonl"\n')
    )
    assert config.data.client_files == {"a": str(tmp_path / "a.jsonl"), "b": "/elsewhere/b.jsonl"}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"dta": {}}, "unknown section: dta; did you mean data"),
        (
            {"federation": {"num-round": 3}},
            r"unknown key in \[federation\]: num-round; did you mean num-rounds",
        ),
        ({"federation": {"num_rounds": 3}}, "did you mean num-rounds"),
        ({"lora": {"zzz": 3}}, "known: rank, lora-alpha"),
        ({"lora": {"rank": "8"}}, "lora.rank must be of type int; got '8'"),
        ({"lora": {"rank": True}}, "lora.rank must be of type int"),
        ({"lora": {"rank": 0}}, "lora.rank must be at least 1; got 0"),
        ({"lora": 3}, r"lora must be a table, \[lora\]"),
        ({"data": {"source": "a", "client-files": {"a": "b"}}}, "data.source"),
        ({"data": {"source": "a", "partition": "random"}}, "iid, dirichlet, categories or sizes"),
        (
            {"training": {"local-steps": 1, "local-epochs": 1.0}},
            "left out where local-epochs is given",
        ),
        ({"training": {"learning-rate": 0}}, "above 0"),
        ({"training": {"learning-rate-schedule": "step"}}, "constant, linear or cosine"),
        ({"federation": {"client-fraction": 1.5}}, r"in \(0, 1\]"),
        ({"federation": {"min-valid-fraction": 0}}, "federation.min-valid-fraction"),
        ({"run": {"threads": -1}}, "run.threads"),
    ],
)
def test_mistakes_are_refused_by_name(tables, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({**MINIMAL, **tables})


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        ("federation", "participation", "client-fraction"),
        ("federation", "quorum", "min-valid-fraction"),
        ("federation", "max-client-share", "max-client-weight"),
        ("federation", "max-norm-ratio", "outlier-norm-ratio"),
        ("data", "max-lost-share", "max-truncated-fraction"),
        ("run", "keep-rounds", "keep-checkpoints"),
        ("federation", "round-seconds", "round-timeout"),
        ("federation", "join-seconds", "join-timeout"),
    ],
)
def test_keys_that_were_renamed_are_refused_with_their_new_name(section, old, new):
    message = rf"unknown key in \[{section}\]: {old}; it is called {new} now"
    with pytest.raises(ConfigError, match=message):
        from_dict({section: {old: 1}})
    assert getattr(getattr(from_dict({}), section), new.replace("-", "_")) is not None


def test_files_that_are_no_configuration_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_config(write(tmp_path, "a = "))
    with pytest.raises(ConfigError, match="is no regular file"):
        load_config(tmp_path)
    for override in ("rounds", "rounds=3", "=3"):
        with pytest.raises(ConfigError, match="write section.key=value"):
            load_config(write(tmp_path, ""), [override])


def test_learning_rate_falls_over_the_rounds_to_a_tenth():
    for schedule, middle in (("constant", 1.0), ("linear", 0.55), ("cosine", 0.55)):
        training = from_dict(
            {**MINIMAL, "training": {"learning-rate": 1.0, "learning-rate-schedule": schedule}}
        ).training
        assert training.learning_rate_at(1, 5) == pytest.approx(1.0) and training.learning_rate_at(
            1, 1
        ) == pytest.approx(1.0)
        assert training.learning_rate_at(3, 5) == pytest.approx(middle)
        assert training.learning_rate_at(5, 5) == pytest.approx(
            1.0 if schedule == "constant" else 0.1
        )


def test_every_key_is_documented():
    text = render_reference()
    for section, values in to_dict(from_dict(MINIMAL)).items():
        assert f"## [{section}]" in text
        for key in values:
            assert f"| `{key}` |" in text
    assert all(kind.__doc__ for kind in SECTIONS.values())


def test_the_shipped_configuration_is_valid():
    from pathlib import Path

    config = load_config(Path(__file__).parents[2] / "fedmomentum" / "configs" / "default.toml")
    assert config.data.source == "reasoning-gym" and config.method.name == "fedmomentum"


def test_overrides_without_a_value_leave_a_key_out(tmp_path):
    file = write(
        tmp_path,
        '[data]\nsource = "d.jsonl"\n[data.columns]\nquestion = "q"\nanswer = "a"\n'
        "[training]\nlocal-steps = 20\n[method.settings]\nenergy = 0.5\n",
    )
    words = ["training.local-steps=", "training.local-epochs=2", "method.settings.energy= "]
    config = load_config(file, [*words, "data.columns.answer=", "lora.rank="])
    assert (config.training.local_steps, config.training.local_epochs) == (None, 2.0)
    assert config.method.settings == {} and config.data.columns == {"question": "q"}
    assert config.lora.rank == load_config(file).lora.rank
    # of a configuration that has every key, too
    changed = apply_overrides(config, ["training.local-epochs="])
    assert (changed.training.local_steps, changed.training.local_epochs) == (10, None)
    # an empty text is a value
    assert load_config(file, ['data.columns.answer=""']).data.columns["answer"] == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.local-stpes=", "unknown key in .training.: local-stpes; did you mean local-st"),
        ("trainnig.local-steps=", "unknown section: trainnig; did you mean training"),
        ("method.settings.energy=", "there is no method.settings.energy to leave out"),
        ("training.local-steps.x=", "there is no training.local-steps.x to leave out"),
        ("local-steps=", "is no setting; write section.key=value"),
    ],
)
def test_only_existing_keys_can_be_left_out(override, message, tmp_path):
    file = write(tmp_path, '[data]\nsource = "d.jsonl"\n[training]\nlocal-steps = 20\n')
    with pytest.raises(ConfigError, match=message):
        load_config(file, [override])
