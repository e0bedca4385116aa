"""`AdapterConfig`: the fields of adapter_config.json that matter, as a validated type."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fedmomentum.errors import AdapterError
from fedmomentum.lora.patterns import Patterns
from fedmomentum.lora.peft_layout import DeclaredTargets
from fedmomentum.utils.schema import Fraction, check_free_form, validation_message

Rank = Annotated[int, Meta(ge=1, le=2**20)]
Alpha = Annotated[float, Meta(gt=0, le=1e9)]
# Text that is displayed and copied: no control characters, which could forge terminal output.
Line = Annotated[str, Meta(max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]
ModuleName = Annotated[str, Meta(min_length=1, max_length=512)]


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that affect the computation; `peft_config.check_config` checks all others.

    The file is untrusted. Defaults are PEFT's. A `lora_alpha` of 0 adds nothing, and a negative one
    subtracts what was learned: PEFT accepts both, but both are mistakes.
    """

    r: Rank = 8
    lora_alpha: Alpha = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    modules_to_save: Annotated[list[ModuleName], Meta(max_length=256)] | None = None
    target_modules: list[str] | str | None = None
    target_parameters: Annotated[list[ModuleName], Meta(max_length=100_000)] | None = None
    base_model_name_or_path: Line | None = None
    revision: Line | None = None
    task_type: Line | None = None
    peft_type: Line | None = None
    fan_in_fan_out: bool | None = False
    lora_dropout: Fraction | None = 0.0

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str) -> AdapterConfig:
        """Return the declared fields of a configuration.

        Args:
            config: JSON values, or the values of a live model's PEFT configuration.
            name: The adapter's name in messages.

        Raises:
            AdapterError: If a field has the wrong type, is out of range, or is nested too deeply.
        """
        where = f"{name}: adapter_config.json"
        if not isinstance(config, Mapping):
            raise AdapterError(f"{where} holds no table")
        known = {key: json_value(config[key]) for key in cls.__struct_fields__ if key in config}
        check_free_form(known, where, AdapterError)
        try:
            return msgspec.convert(known, cls)
        except (msgspec.ValidationError, RecursionError) as problem:
            raise AdapterError(f"{where}: {validation_message(problem, known)}") from problem

    @property
    def targets(self) -> DeclaredTargets:
        """The modules and parameters that PEFT adapts."""
        return DeclaredTargets(self.target_modules, self.target_parameters or ())

    def ranks(self, name: str) -> Patterns[int]:
        """Return the `rank_pattern`, compiled."""
        return Patterns(self.rank_pattern or {}, "rank_pattern", name)

    def alphas(self, name: str) -> Patterns[float]:
        """Return the `alpha_pattern`, compiled."""
        return Patterns(self.alpha_pattern or {}, "alpha_pattern", name)


def json_value(value: Any) -> Any:
    """Convert a value of a PEFT configuration to JSON types.

    Live configurations contain enums and sets. A set becomes a sorted list, so that equal adapters
    have equal files; an empty set becomes None, which means the same to PEFT.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value) or None
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    return value
