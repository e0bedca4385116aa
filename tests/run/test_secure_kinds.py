"""Every kind of training and every method under masks: what comes out is what comes out without."""

import json

import pytest

from fedmomentum.aggregation.registry import METHODS
from fedmomentum.errors import ConfigError
from fedmomentum.lora.adapter import to_tensors
from tests.classifiers import LABELS, classifier_config
from tests.run.test_objectives import chat_rows, pair_rows
from tests.runs import start, tiny_config
from tests.secure_runs import dense_model
from tests.server.test_secure_round import distance, rows

# A sketch of (n - 1) times the rank leaves nothing for later rounds.
SECURE = {"secure_aggregation": True, "max_examples": 100, "sketch_ranks": 2}
NEED_UPDATES = {"hetlora", "fedrotlora"}
SUPPORTED = sorted(METHODS.keys() - NEED_UPDATES)
KINDS = ("completion", "chat", "dpo", "classification", "found-labels", "saved", "epochs")


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
    """The settings of a run of a kind: scaling 3, and modules of several shapes."""
    sections = {"method": {"name": method}, "federation": {"num-rounds": 2}, **sections}
    if kind in ("classification", "found-labels"):
        model = {"labels": list(LABELS)} if kind == "classification" else {}
        return classifier_config(folder, "bert", model=model, **sections)
    if kind == "dpo":
        training = {"objective": "dpo", "dpo-beta": 0.5}
        data = {"client-files": write_clients(folder, pair_rows)}
        return tiny_config(folder, training=training, data=data, **sections)
    if kind == "chat":
        data = {"client-files": write_clients(folder, chat_rows)}
        training = {"loss-on": "all-assistant"}
        return tiny_config(folder, training=training, data=data, **sections)
    if kind == "saved":
        return tiny_config(folder, lora={"modules-to-save": ["lm_head"]}, **sections)
    if kind == "epochs":
        config = {"local-epochs": 0.5, "local-steps": None}
        return tiny_config(folder, training=config, **sections)
    lora = {"target-modules": ["q_proj", "v_proj", "down_proj"]}
    return tiny_config(folder, lora=lora, **sections)


def cases():
    """All pairs of kind and method; most are tried by `make test-long`."""
    every_time = {("found-labels", "fedmomentum"), ("dpo", "flora")}
    pairs = [(kind, method) for kind in KINDS for method in SUPPORTED]
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
    ours, theirs = dense_model(secure.model), dense_model(plain.model)
    if all(float(matrix.norm()) == 0 for matrix in theirs.values()):
        # B stays with the clients; what they share is A.
        ours = {name: t.double() for name, t in to_tensors(secure.model.adapter).items()}
        theirs = {name: t.double() for name, t in to_tensors(plain.model.adapter).items()}
        theirs = {name: tensor for name, tensor in theirs.items() if ".lora_B" not in name}
    assert distance(ours, theirs) < 2e-5
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


@pytest.mark.parametrize("method", sorted(NEED_UPDATES))
def test_what_needs_single_updates_is_refused_before_anything_is_loaded(tmp_path, method):
    config = config_of(tmp_path, "completion", method, privacy=SECURE)
    with pytest.raises(ConfigError, match="needs every client's update by itself"):
        start(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
