"""What `fedmomentum compare` accepts: methods with their own settings, and seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedmomentum.aggregation.registry import METHODS
from fedmomentum.config.schema import Config, MethodConfig
from fedmomentum.config.toml import apply_overrides
from fedmomentum.config.toml_values import parse_value, split_outside, split_setting
from fedmomentum.errors import ConfigError
from fedmomentum.run.method import make_method
from fedmomentum.run.references import REFERENCES
from fedmomentum.utils.names import readable_name

_METHOD_SECTIONS = ("training", "lora", "federation")
"""Sections that may differ between methods; data and evaluation must be the same for all."""


@dataclass(frozen=True)
class MethodVariant:
    """A method with its settings, or a reference.

    Attributes:
        label: The label as the user wrote it: `fedit`, `fedmomentum:split=singular`, `local`.
        method: The method, with its settings. References run FedIT: the average of one client is
            that client.
        overrides: Settings of the run that apply to this variant only, as `section.key=value`.
    """

    label: str
    method: MethodConfig
    overrides: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`federated`, `centralized` or `local`."""
        name = self.label.partition(":")[0]
        return name if name in REFERENCES else "federated"

    @property
    def directory(self) -> str:
        """Name of the directory of this variant's runs."""
        return readable_name(self.label)


def parse_methods(text: str, config: Config) -> list[MethodVariant]:
    """Parse a comma-separated list of `name` or `name:key=value;key=value`.

    `[method.settings]` applies to the method that `[method]` names.

    Commas, semicolons and colons within quotes and brackets belong to a value.

    A name is that of a built-in method, of a reference, or `module:Class` for the user's own
    method. A key with a dot, such as `training.learning-rate`, is a setting of the run for this
    variant only; any other key is a setting of the method.

    Raises:
        ConfigError: If there are no methods, one is named twice, a method or setting is unknown, a
            reference is given a method's setting, or a setting must be the same for all.
    """
    variants: list[MethodVariant] = []
    try:
        labels = split_outside(text, ",")
    except ConfigError as error:
        raise ConfigError(f"--methods: {error}") from None
    for label in filter(None, (part.strip() for part in labels)):
        name, rest = _split_label(label)
        settings = dict(config.method.settings) if name == config.method.name else {}
        overrides = []
        # Keys with a dot belong to the run, the others to the method.
        for pair in filter(None, (part.strip() for part in split_outside(rest, ";"))):
            key, equals, value = pair.partition("=")
            if not equals:
                raise ConfigError(
                    f"{pair!r} in {label!r} is no setting; write name:key=value;key=value"
                )
            if "." in key:
                overrides.append(pair)
            else:
                settings[key.strip()] = parse_value(value.strip())
        if name in REFERENCES and settings:
            raise ConfigError(f"{name} has no settings of its own; got {label!r}")
        method = MethodConfig("fedit" if name in REFERENCES else name, settings)
        # Data, seeds and evaluation must be the same for all methods.
        for override in overrides:
            names, _ = split_setting(override)
            if names[0] not in _METHOD_SECTIONS or names[:2] == ["federation", "num-rounds"]:
                raise ConfigError(
                    f"{override!r} in {label!r}: only settings of "
                    f"{', '.join(f'[{section}]' for section in _METHOD_SECTIONS)} can differ "
                    "between methods"
                )
        try:
            run_config = replace(apply_overrides(config, overrides), method=method)
            if name not in REFERENCES:
                make_method(run_config)
        except ConfigError as error:
            # The error of an unknown name lists the methods.
            is_unknown = name not in METHODS and ":" not in name
            references = f"; and the references {', '.join(REFERENCES)}" if is_unknown else ""
            raise ConfigError(f"--methods {label}: {error}{references}") from error
        variants.append(MethodVariant(label, method, tuple(overrides)))
    # Two labels must not share a directory, not even on file systems that ignore case.
    directories = [variant.directory.lower() for variant in variants]
    if not variants or len(set(directories)) < len(directories):
        raise ConfigError(
            f"--methods must name methods, each once, e.g. fedmomentum,fedit,local; got {text!r}"
        )
    return variants


def _split_label(label: str) -> tuple[str, str]:
    """Return the name and the settings of a label.

    The name of a user's method contains a colon itself, so settings are recognized by the first
    "=": the colon before its key ends the name.
    """
    before, *values = split_outside(label, "=")
    *names, _ = split_outside(before, ":")
    if not values or not names:
        return label, ""
    name = ":".join(names)
    return name, label[len(name) + 1 :]


def parse_seeds(text: str) -> list[int]:
    """Parse comma-separated nonnegative integers.

    Raises:
        ConfigError: If the text is anything else, or a seed is given twice.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"--seeds must be whole numbers from 0, each once, e.g. 0,1,2; got {text!r}"
        )
    return seeds
