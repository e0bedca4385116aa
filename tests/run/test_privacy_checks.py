"""What cannot be done on sums alone is refused by name, before anything is loaded."""

import pytest

from fedmomentum.aggregation.method import Method
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.config.toml import from_dict
from fedmomentum.errors import ConfigError
from fedmomentum.run.privacy_checks import check_num_clients, check_privacy
from fedmomentum.run.setup import make_method
from fedmomentum.run.training_checks import choose_optimizer_state

SECURE = {"secure-aggregation": True}


def secure(privacy=None, **sections):
    return from_dict({"privacy": SECURE | (privacy or {}), **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": {"name": "hetlora"}}, "HetLoRA needs every client's update by itself"),
        ({"method": {"name": "fedrotlora"}}, "FedRot-LoRA needs every client's update by itself"),
        ({"lora": {"clients": {"a": {"rank": 2}}}}, "lora.clients gives clients adapters"),
        (
            {"training": {"optimizer-state": "shared", "arguments": {"max_grad_norm": 0}}},
            "optimizer-state = shared cannot be used .* where gradients are not clipped",
        ),
        (
            {"training": {"optimizer-state": "shared", "function": "own:train"}},
            "optimizer-state = shared cannot be used .* where gradients are not clipped",
        ),
        (
            {"training": {"optimizer-state": "shared", "local-epochs": 1}},
            "and training.local-epochs: .* would tell clients apart",
        ),
        (
            {"training": {"optimizer-state": "shared-full"}},
            "optimizer-state = shared-full has clients send all",
        ),
        ({"federation": {"max-client-weight": 0.5}}, "federation.max-client-weight = 0.5 cannot"),
        ({"federation": {"outlier-norm-ratio": 3.0}}, "federation.outlier-norm-ratio = 3.0"),
        ({"federation": {"uplink-dtype": "float16"}}, "federation.uplink-dtype = float16"),
        ({"training": {"function": "own:train"}}, "how far training.function, own:train can"),
        ({"training": {"arguments": {"optim": "lion_32bit"}}}, "optim = 'lion_32bit' can change"),
        (
            {"training": {"arguments": {"optim": "sgd", "max_grad_norm": 0}}},
            "max_grad_norm = 0 can change",
        ),
    ],
)
def test_settings_that_sums_do_not_support_are_refused_by_name(sections, message):
    config = secure(**sections)
    with pytest.raises(ConfigError, match=message):
        check_privacy(config, make_method(config))
    check_privacy(from_dict(sections), make_method(config))


def test_with_an_explicit_bound_any_training_function_is_accepted():
    training = {"function": "own:train", "arguments": {"optim": "lion_32bit"}}
    config = secure({"max-change": 0.5}, training=training)
    check_privacy(config, make_method(config))


def test_a_custom_method_is_refused_until_it_declares_what_it_depends_on():
    class Own(Method):
        title = "Own"

        def combine(self, updates, context):
            raise NotImplementedError

    with pytest.raises(ConfigError, match="Own needs every client's update by itself"):
        check_privacy(secure(), Own())


def test_auto_shares_moments_where_their_size_is_known():
    method = METHODS["fedmomentum"]()
    assert method.shares_moments

    def chosen(config):
        return choose_optimizer_state(config, method).training.optimizer_state

    assert chosen(secure()) == chosen(from_dict({})) == "shared"
    epochs = {"local-epochs": 1}
    assert chosen(secure(training=epochs)) == "fresh"
    unclipped = {"arguments": {"max_grad_norm": 0}}
    assert chosen(secure(training=unclipped)) == "fresh"
    assert chosen(from_dict({"training": unclipped})) == "shared"
    # Noise of any size, which no gradient clipping bounds.
    private = {"dp": {"epsilon": 1.0}}
    assert chosen(secure(private)) == "fresh"
    with pytest.raises(ConfigError, match=r"and \[privacy.dp\]: the noise makes moments of any"):
        config = secure(private, training={"optimizer-state": "shared"})
        check_privacy(config, method)


@pytest.mark.parametrize(
    ("num_clients", "fraction", "threshold", "message"),
    [
        (2, 1.0, None, "2 clients with federation.client-fraction 1 are 2 a round"),
        (5, 0.4, None, "are 2 a round, and privacy.secure-aggregation needs at least 3"),
        (101, 1.0, None, "works with up to 100"),
        (4, 1.0, 5, "privacy.threshold is 5, .* wanted 3 to 4"),
        (10, 1.0, 5, "privacy.threshold is 5, .* wanted 6 to 10"),
    ],
)
def test_too_few_or_too_many_clients_are_refused(num_clients, fraction, threshold, message):
    federation = {"client-fraction": fraction}
    table = {} if threshold is None else {"threshold": threshold}
    with pytest.raises(ConfigError, match=message):
        check_num_clients(secure(table, federation=federation), num_clients)
    check_num_clients(from_dict({"federation": federation}), num_clients)


@pytest.mark.parametrize(("num_clients", "threshold"), [(3, None), (3, 3), (100, 51), (10, 6)])
def test_enough_clients_are_not_refused(num_clients, threshold):
    table = {} if threshold is None else {"threshold": threshold}
    check_num_clients(secure(table), num_clients)
