"""Check `[privacy.dp]` against the other settings."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedmomentum.config.schema import CLASSIFICATION
from fedmomentum.errors import ConfigError
from fedmomentum.training.private_trainer import check_private_arguments

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config

SETTING = "[privacy.dp]"


def choose_private_dtype(config: Config) -> Config:
    """Return the configuration with `model.dtype = "auto"` set to float32 for private training."""
    if config.privacy.dp is None or config.model.dtype != "auto":
        return config
    return replace(config, model=replace(config.model, dtype="float32"))


def check_private_training(config: Config) -> None:
    """Refuse settings that would break differential privacy.

    Raises:
        ConfigError: If there are any; the message names the setting and what to do.
    """
    if config.privacy.dp is None:
        return
    if config.training.function is not None:
        raise ConfigError(
            f"training.function cannot be used with {SETTING}: nothing shows what it does with the "
            "examples; leave one of them out"
        )
    # Optimizers and steps that would use or clip other gradients than the private ones.
    check_private_arguments(config.training.arguments)
    # Rounding must not make one example affect the gradients of others.
    for key, value, wanted in (
        ("model.dtype", config.model.dtype, "float32"),
        ("model.quantization", config.model.quantization, "none"),
        ("model.tf32", config.model.tf32, False),
    ):
        if value not in (wanted, "auto"):
            raise ConfigError(
                f"{key} = {value} cannot be used with {SETTING}: the rounding of one example would "
                "depend on the others of its batch. Leave it out"
            )
    if config.lora.target_parameters:
        raise ConfigError(
            f"lora.target-parameters cannot be used with {SETTING}: experts see the tokens of all "
            "rows mixed; adapt linear modules (lora.target-modules)"
        )
    if config.model.task == CLASSIFICATION and not config.model.labels:
        raise ConfigError(
            f"model.labels must be given with {SETTING}: labels found in the data would reveal "
            'what is in it. Set labels = ["A", "B"]'
        )
    _check_sums(config)


def _check_sums(config: Config) -> None:
    """Refuse secure aggregation if the noise could exceed its public bound.

    Raises:
        ConfigError: If SGD is used without `privacy.max-change`.
    """
    privacy = config.privacy
    is_bounded = privacy.max_change is not None or config.training.arguments.get("optim") != "sgd"
    if privacy.secure_aggregation and not is_bounded:
        raise ConfigError(
            f'with {SETTING} and optim = "sgd" noise can take a step of any length, so the bound '
            "of the secure sums does not follow from the settings; set privacy.max-change"
        )


def check_private_run(config: Config) -> None:
    """Refuse a private run without a noise setting; see also `check_private_training`.

    Raises:
        ConfigError: If neither epsilon nor a noise multiplier is given.
    """
    check_private_training(config)
    dp = config.privacy.dp
    if dp is not None and dp.epsilon is None and dp.noise_multiplier is None:
        raise ConfigError(
            f"{SETTING} must name epsilon or noise-multiplier; got neither. See `fedmomentum "
            "privacy plan`"
        )


def check_private_client(config: Config) -> None:
    """Refuse a networked client without a privacy budget; see also `check_private_training`.

    Raises:
        ConfigError: If it has none.
    """
    check_private_training(config)
    dp = config.privacy.dp
    if dp is not None and dp.budget is None:
        raise ConfigError(
            "privacy.dp.budget must be given at a client: the epsilon that all runs on its data "
            f"may spend together, at delta {dp.delta:g}. The server's settings do not limit it"
        )


def private_warnings(config: Config, method: Method) -> list[str]:
    """Return a plan's warnings about a private run; none for other runs."""
    if config.privacy.dp is None:
        return []
    warnings = [
        f"{SETTING} withholds losses, held-out scores, numbers of examples and categories: nothing "
        "is evaluated, and no round is the best"
    ]
    # Alternating methods train a different factor in every other round.
    factors = {method.trained_factors(server_round) for server_round in (1, 2)}
    if "BA" in factors:
        warnings.append(
            f"{SETTING}: {method.title or type(method).__name__} trains both factors, and the "
            "noise of both multiplies; at a small epsilon FedSVD (method.name = fedsvd), which "
            "trains B against an orthonormal A, was more accurate (docs/privacy.md)"
        )
    return warnings
