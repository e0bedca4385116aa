"""adapter_config.json: what an adapter says of itself, as a declared type. It comes from strangers."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fedmomentum.errors import AdapterError
from fedmomentum.patterns import Patterns
from fedmomentum.schema import Fraction, check_free_form, readable

Rank = Annotated[int, Meta(ge=1, le=2**20)]
Alpha = Annotated[float, Meta(gt=0, le=1e9)]
Line = Annotated[str, Meta(max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]
"""Text that is shown and written on: no control characters, which could forge lines of a file or a terminal."""
ModuleName = Annotated[str, Meta(min_length=1, max_length=512)]


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that decide something; others are looked at by `peft_io.check_config`.

    Defaults are PEFT's. A `lora_alpha` of 0 adds nothing and a negative one takes away what was learned: PEFT computes
    with both, and both are slips.
    """

    r: Rank = 8
    lora_alpha: Alpha = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    modules_to_save: Annotated[list[ModuleName], Meta(max_length=256)] | None = None
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
            config: JSON values, or PEFT's own of a live model.
            name: what to call the adapter in messages.

        Raises:
            AdapterError: If a field has another type, is out of range, or the whole is nested too deep.
        """
        where = f"{name}: adapter_config.json"
        if not isinstance(config, Mapping):
            raise AdapterError(f"{where} holds no table")
        known = {key: _plain(config[key]) for key in cls.__struct_fields__ if key in config}
        check_free_form(known, where, AdapterError)
        try:
            return msgspec.convert(known, cls)
        except (msgspec.ValidationError, RecursionError) as problem:
            raise AdapterError(f"{where}: {readable(problem)}") from problem

    def ranks(self, name: str) -> Patterns[int]:
        """Return the `rank_pattern`, compiled."""
        return Patterns(self.rank_pattern or {}, "rank_pattern", name)

    def alphas(self, name: str) -> Patterns[float]:
        """Return the `alpha_pattern`, compiled."""
        return Patterns(self.alpha_pattern or {}, "alpha_pattern", name)


def _plain(value: Any) -> Any:
    """PEFT's live configurations hold enumerations that are texts, and sets."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, (set, frozenset)) else value
