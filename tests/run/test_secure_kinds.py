"""Every kind of training and every method under masks: the result is that of the run without."""

import json

import pytest

from fedmomentum.aggregation.registry import METHODS
from fedmomentum.errors import ConfigError
from fedmomentum.lora.adapter import to_tensors
from fedmomentum.run.method import make_method
from fedmomentum.server.checkpoint import RunDirectory
from fedmomentum.server.moments import SharedOptimizer
from tests.classifiers import LABELS, classifier_config
from tests.run.test_objectives import chat_rows, pair_rows
from tests.runs import start, tiny_config
from tests.secure_runs import dense_model
from tests.server.test_secure_round import distance, rows

# A sketch of (n - 1) times the rank leaves nothing for later rounds.
SECURE = {"secure_aggregation": True, "max_examples": 100, "sketch_ranks": 2}
NEED_UPDATES = {"hetlora", "fedrotlora"}
SUPPORTED = sorted(METHODS.keys() - NEED_UPDATES)
KINDS = (
    "completion",
    "chat",
    "dpo",
    "classification",
    "found-labels",
    "saved",
    "epochs",
    "moments",
)


def write_clients(folder, rows_of):
    """A file of 10, 14 and 18 rows for each of three clients."""
    files = {}
    for client in range(3):
        file = folder / f"{rows_of.__name__}-{client}.jsonl"
        lines = [json.dumps(row) + "\n" for row in rows_of(client, 10 + 4 * client)]
        file.write_text("".join(lines))
        files[f"site{client}"] = str(file)
    return files


def config_of(folder, kind, method, **sections):
    """The settings of a run of a kind: scaling 3, and modules of several shapes.

    With its usual epsilon, AdamW's first step has the same length however small a gradient is, so
    that the rounding of one near zero can turn a step around.
    """
    sections = {"method": {"name": method}, "federation": {"num-rounds": 2}, **sections}
    smooth = {"adam_epsilon": 1e-4}
    training = {"arguments": smooth, **sections.pop("training", {})}
    if kind in ("classification", "found-labels"):
        model = {"labels": list(LABELS)} if kind == "classification" else {}
        return classifier_config(folder, "bert", model=model, training=training, **sections)
    if kind == "dpo":
        training |= {"objective": "dpo", "dpo-beta": 0.5}
        data = {"client-files": write_clients(folder, pair_rows)}
        return tiny_config(folder, training=training, data=data, **sections)
    if kind == "chat":
        data = {"client-files": write_clients(folder, chat_rows)}
        training |= {"loss-on": "all-assistant"}
        return tiny_config(folder, training=training, data=data, **sections)
    if kind == "saved":
        lora = {"modules-to-save": ["lm_head"]}
        return tiny_config(folder, lora=lora, training=training, **sections)
    if kind == "epochs":
        training |= {"local-epochs": 0.5, "local-steps": None}
        return tiny_config(folder, training=training, **sections)
    if kind == "moments":
        training |= {"optimizer-state": "shared", "arguments": smooth | {"weight_decay": 0.1}}
        return tiny_config(folder, training=training, **sections)
    lora = {"target-modules": ["q_proj", "v_proj", "down_proj"]}
    return tiny_config(folder, lora=lora, training=training, **sections)


def shares(name):
    """Whether clients can share moments with a method."""
    method = METHODS[name]()
    return not (method.fresh or method.personal_factors or method.prunes)


def cases():
    """All pairs of kind and method; most are tried by `make test-long`."""
    every_time = {("found-labels", "fedmomentum"), ("dpo", "flora"), ("moments", "fedmomentum")}
    pairs = [(kind, method) for kind in KINDS for method in SUPPORTED]
    pairs = [(kind, name) for kind, name in pairs if kind != "moments" or shares(name)]
    return [
        pytest.param(*pair, marks=[] if pair in every_time else [pytest.mark.long])
        for pair in pairs
    ]


@pytest.mark.parametrize(("kind", "method"), cases())
def test_a_secure_run_is_the_run_without(tmp_path, kind, method):
    plain = start(config_of(tmp_path, kind, method), tmp_path / "plain", function=None)
    config = config_of(tmp_path, kind, method, privacy=SECURE)
    secure = start(config, tmp_path / "secure", function=None)

    # Adapter, what is merged, and tensors that are trained in full, to the sums' rounding.
    ours, plain_tensors = dense_model(secure.model), dense_model(plain.model)
    if all(float(matrix.norm()) == 0 for matrix in plain_tensors.values()):
        # B stays with the clients; what they share is A.
        ours = {name: t.double() for name, t in to_tensors(secure.model.adapter).items()}
        plain_tensors = {name: t.double() for name, t in to_tensors(plain.model.adapter).items()}
        plain_tensors = {
            name: tensor for name, tensor in plain_tensors.items() if ".lora_B" not in name
        }
    # Moments travel in bfloat16: a sum's rounding can make another number of a last digit.
    assert distance(ours, plain_tensors) < (1e-3 if kind == "moments" else 2e-5)
    saved = plain.model.adapter.saved
    assert bool(saved) == (kind in ("classification", "found-labels", "saved"))
    for name, tensor in saved.items():
        error = (secure.model.adapter.saved[name] - tensor).norm() / tensor.norm()
        assert float(error) < 1e-6

    # Scores of every kind are those of all clients together, round 0 included.
    for one, other in zip(rows(tmp_path / "secure"), rows(tmp_path / "plain"), strict=True):
        assert one.failures == {} and one.accepted == other.accepted
        total, wanted = one.evaluation.total, other.evaluation.total
        assert (total.num_examples, total.num_tokens) == (wanted.num_examples, wanted.num_tokens)
        assert total.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert (total.margin is None) == (wanted.margin is None) == (kind != "dpo")
        assert total.margin is None or total.margin == pytest.approx(wanted.margin, abs=1e-4)
        assert total.by_label.keys() == wanted.by_label.keys()
        if one.round:
            assert one.train_loss == pytest.approx(other.train_loss, rel=1e-5)


class Stop(BaseException):
    """The process ended."""


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("moments", "fedmomentum"),
        *(
            pytest.param(kind, method, marks=pytest.mark.long)
            for kind in ("classification", "dpo", "chat", "saved", "epochs")
            for method in ("fedmomentum", "fedsalora")
        ),
    ],
)
def test_a_run_that_was_killed_and_resumed_has_the_bits_of_one_that_was_not(tmp_path, kind, method):
    # A sketch that leaves something to the clients, which keep it over the kill.
    config = config_of(tmp_path, kind, method, privacy={**SECURE, "sketch_ranks": 1})
    uninterrupted = start(config, tmp_path / "whole", function=None)

    def stop(event, facts):
        if event == "aggregate" and (tmp_path / "parts" / "rounds" / "0001.json").exists():
            raise Stop

    with pytest.raises(Stop):
        start(config, tmp_path / "parts", function=None, observer=stop)
    resumed_run = start(config, tmp_path / "parts", function=None, resume=True)
    assert resumed_run.model.manifest() == uninterrupted.model.manifest()
    for one, other in zip(rows(tmp_path / "parts"), rows(tmp_path / "whole"), strict=True):
        assert one.evaluation == other.evaluation


@pytest.mark.parametrize("method", sorted(NEED_UPDATES))
def test_settings_that_need_single_updates_are_refused_before_anything_is_loaded(tmp_path, method):
    config = config_of(tmp_path, "completion", method, privacy=SECURE)
    with pytest.raises(ConfigError, match="needs every client's update by itself"):
        start(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("training", [{}, {"optim": "sgd", "optim_args": "momentum=0.9"}], ids=str)
def test_moments_from_sums_are_those_that_clients_send(tmp_path, training):
    """To the three digits that travel: where the last one differs, it is by one, in few numbers."""
    sections = {"federation": {"num-rounds": 1}, "evaluation": {"every": 0}}
    settings = {"optimizer-state": "shared", "arguments": training}
    found = []
    for privacy in ({}, SECURE):
        # With this split, both runs have the same factors; others are free up to signs.
        method = {"settings": {"split": "procrustes"}}
        config = tiny_config(
            tmp_path, training=settings, privacy=privacy, method=method, **sections
        )
        start(config, tmp_path / f"out {len(privacy)}", function=None)
        directory = RunDirectory(tmp_path / f"out {len(privacy)}")
        model, state = directory.resume()
        optimizer = SharedOptimizer.of(config, make_method(config), directory)
        found.append(optimizer.started(state.moments, model.adapter).moments)
        directory.close()
    plain, secure = found
    assert plain.keys() == secure.keys() and plain
    for key, moment in plain.items():
        other = secure[key]
        assert moment.step == other.step and (moment.second is None) == (other.second is None)
        error = (moment.first - other.first).norm() / moment.first.norm()
        assert 0 < float(moment.first.norm()) and float(error) < 2**-8
        if moment.second is not None:
            assert float((moment.second - other.second).norm()) < 2**-8 * float(
                moment.second.norm()
            )
