"""The method of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmomentum.aggregation.registry import build_method
from fedmomentum.errors import ConfigError

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config


def make_method(config: Config) -> Method:
    """Build the method of the configuration.

    Raises:
        ConfigError: If a name or setting is unknown, or the method refuses a value.
    """
    method = build_method(
        config.method.name, {k.replace("-", "_"): v for k, v in config.method.settings.items()}
    )
    if config.lora.is_mixed and not method.unequal_ranks:
        raise ConfigError(
            f"{method.title} needs every client at one rank; lora.clients gives several"
        )
    if method.reads_base and config.federation.downlink_dtype != "float32":
        raise ConfigError(
            f"{method.title} starts from the base's own directions; they need downlink-dtype "
            "float32"
        )
    return method
