"""What a task says about the adapter that a client trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from fedmomentum.utils.schema import Count, PositiveCount, Schema, Seed, Text

if TYPE_CHECKING:
    from fedmomentum.config.schema import LoraConfig

# The largest number of adapted modules.
MAX_MODULES = 100_000

DType = Literal["float32", "float16", "bfloat16"]
Positive = Annotated[float, Meta(gt=0)]


class ClientLora(Schema, frozen=True, kw_only=True):
    """What one client trains, so that server and client can compare it.

    Attributes:
        rank: The rank of its adapter.
        lora_alpha: The numerator of its scaling.
        target_modules: Its `lora.target-modules`; only compared, never matched to modules.
        target_parameters: Its `lora.target-parameters`; only compared, like the modules.
        mixed: Whether the clients of the run have different ranks.
    """

    rank: PositiveCount
    lora_alpha: Positive
    target_modules: Annotated[list[Text], Meta(max_length=MAX_MODULES)] | Text
    target_parameters: Annotated[list[Text], Meta(max_length=MAX_MODULES)] = []
    mixed: bool

    @classmethod
    def of(cls, lora: LoraConfig, mixed: bool) -> ClientLora:
        """Return the part of a client's settings that both sides must agree on."""
        return cls(
            rank=lora.rank,
            lora_alpha=lora.lora_alpha,
            target_modules=lora.target_modules,
            target_parameters=lora.target_parameters,
            mixed=mixed,
        )


class FreshAdapter(Schema, frozen=True, kw_only=True):
    """The seed from which a client initializes the round's adapter instead of downloading it.

    Attributes:
        seed: The run's seed.
        server_round: The round after which the adapter is drawn.
        dtype: The dtype that its factors are rounded to.
    """

    seed: Seed
    server_round: Count
    dtype: DType
