"""Check `[privacy]` against the other settings, the method and the clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmomentum.config.privacy import MAX_CLIENTS, MIN_CLIENTS
from fedmomentum.config.schema import FederationConfig
from fedmomentum.errors import ConfigError
from fedmomentum.secure_sum.messages import min_threshold
from fedmomentum.server.change_bound import unknown_change
from fedmomentum.server.selection import sample_size
from fedmomentum.training.step_bounds import clipping_norm, max_element_change

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config

SETTING = "privacy.secure-aggregation"


def check_privacy(config: Config, method: Method) -> None:
    """Refuse settings that cannot be used when the server sees only sums.

    Raises:
        ConfigError: If there are any; the message names the setting and what to do.
    """
    if not config.privacy.secure_aggregation:
        return
    # Anything for which the server would need single clients' updates.
    if method.depends_on == "updates":
        raise ConfigError(
            f"{method.title or type(method).__name__} needs every client's update by itself, and "
            f"with {SETTING} the server has sums of them; choose another method.name, or leave "
            f"{SETTING} out"
        )
    if config.lora.clients:
        raise ConfigError(
            f"lora.clients gives clients adapters of their own, and {SETTING} adds up adapters of "
            "one form; leave lora.clients out"
        )
    if config.training.shares_moments:
        check_shared_moments(config)
    if config.run.devices:
        raise ConfigError(
            f"run.devices divides the clients among processes, and with {SETTING} the clients of "
            "one machine share keys that are made in one; leave run.devices out"
        )
    _check_federation(config.federation)
    _check_change(config)


def check_shared_moments(config: Config) -> None:
    """Refuse to sum optimizer moments whose size nothing bounds.

    Raises:
        ConfigError: If nothing bounds them, clients' step counts may differ, or they are sent in
            full.
    """
    key = f"training.optimizer-state = {config.training.optimizer_state}"
    advice = "set it to fresh or local"
    if config.training.optimizer_state == "shared-full":
        raise ConfigError(
            f"{key} has clients send all of their optimizer's moments, and {SETTING} sums up means "
            "of them only; set it to shared, fresh or local"
        )
    if config.training.local_epochs is not None:
        raise ConfigError(
            f"{key} cannot be used with {SETTING} and training.local-epochs: moments are of "
            "movements by step, and where clients make different numbers of steps, sums with and "
            f"without these would tell clients apart; set training.local-steps, or {advice}"
        )
    if config.privacy.dp is not None:
        raise ConfigError(
            f"{key} cannot be used with {SETTING} and [privacy.dp]: the noise makes moments of any "
            f"size, and secure sums count within a public bound; {advice}"
        )
    if clipping_norm(config) is None:
        raise ConfigError(
            f"{key} cannot be used with {SETTING} where gradients are not clipped: moments may be "
            "of any size, and secure sums count within a public bound. Give a max_grad_norm, leave "
            f"training.function out, or {advice}"
        )


def _check_federation(federation: FederationConfig) -> None:
    """Refuse rules for which the server would need single updates or example counts.

    Raises:
        ConfigError: If one of them is set.
    """
    for name, why in (
        ("max_client_weight", "the server does not know how many examples a client has"),
        ("outlier_norm_ratio", "the server cannot tell how far a client moved"),
        ("uplink_dtype", "what clients send are masked integers of 32 bits"),
    ):
        value = getattr(federation, name)
        if value != getattr(FederationConfig(), name):
            key = name.replace("_", "-")
            raise ConfigError(
                f"federation.{key} = {value} cannot be used with {SETTING}: {why}. Leave it out"
            )


def _check_change(config: Config) -> None:
    """Refuse training whose changes nothing bounds, before anything is loaded.

    Raises:
        ConfigError: If no bound is given or known.
    """
    if config.privacy.max_change is not None:
        return
    # Whether a bound exists does not depend on round, steps or sizes.
    hyperparameters = config.training.hyperparameters(1, config.federation.num_rounds)
    bound = max_element_change(hyperparameters, 1, max_magnitude=1.0, largest_tensor=1)
    if config.training.function is not None or bound is None:
        raise ConfigError(unknown_change(config))


def describe_privacy(config: Config, num_clients: int) -> str:
    """Return a plan's text on secure aggregation; empty without it."""
    privacy = config.privacy
    if not privacy.secure_aggregation:
        return ""
    num_sampled = sample_size(num_clients, config.federation.client_fraction)
    threshold = privacy.threshold or min_threshold(num_sampled)
    return (
        f"secure aggregation: the server sees sums over the clients, which {threshold} of a "
        f"round's {num_sampled} open together; nothing of a single client is recorded, and updates "
        "are not screened"
    )


def check_num_clients(config: Config, num_clients: int) -> None:
    """Refuse too few or too many clients for a secure sum.

    Args:
        config: The run's settings.
        num_clients: The total number of clients in the run.

    Raises:
        ConfigError: If a round would have fewer than `MIN_CLIENTS` or more than `MAX_CLIENTS`
            clients, or the threshold does not suit their number.
    """
    privacy = config.privacy
    if not privacy.secure_aggregation:
        return
    fraction = config.federation.client_fraction
    num_sampled = sample_size(num_clients, fraction)
    what = f"{num_clients} clients with federation.client-fraction {fraction:g} are {num_sampled}"
    if num_sampled < MIN_CLIENTS:
        raise ConfigError(
            f"{what} a round, and {SETTING} needs at least {MIN_CLIENTS}: with fewer, each could "
            "compute what another did. Have more clients take part, or leave it out"
        )
    if num_sampled > MAX_CLIENTS:
        raise ConfigError(
            f"{what} a round, and {SETTING} works with up to {MAX_CLIENTS}, as each masks its "
            "values for every other; lower federation.client-fraction"
        )
    if privacy.threshold is not None and not num_sampled / 2 < privacy.threshold <= num_sampled:
        raise ConfigError(
            f"privacy.threshold is {privacy.threshold}, and {what} a round; wanted "
            f"{num_sampled // 2 + 1} to {num_sampled}, or nothing for more than two thirds"
        )
