"""The client side of `FedMomentumStrategy`: adds the base residual to a live PEFT model.

::

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = ...  # any PeftModel
        receipt = apply_base_residual(model, message.content)
        set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
        ...
        content = RecordDict({"arrays": ..., "metrics": ..., "receipt": receipt})
        return Message(content, reply_to=message)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedmomentum.base_model.base_weights import choose_weight_format, make_base_weights
from fedmomentum.base_model.hub import resolve_base
from fedmomentum.base_model.weight_slots import find_owners
from fedmomentum.errors import AdapterError, ModelError, PayloadError
from fedmomentum.flower.peft_arrays import RESIDUAL_KEY, STATE_KEY, digest, read_residual
from fedmomentum.lora.live_layers import lora_layers

if TYPE_CHECKING:
    from fedmomentum.base_model.weights import BaseWeights
    from fedmomentum.linalg.matrix import Matrix
    from fedmomentum.lora.peft_model import PeftModel


HELD = "_fedmomentum_base_weights"
"""The attribute of a base model that remembers what was added to its weights."""
SENDER = "the server's base residual"


def apply_base_residual(
    model: PeftModel,
    content: RecordDict,
    *,
    base: Path | str | None = None,
    adapted_weights: str = "auto",
) -> ConfigRecord:
    """Set the base weights of a model to the pretrained ones plus the message's base residual.

    The message holds the sum of all rounds' residuals. Applying the same message again therefore
    changes nothing, and a model that has missed rounds ends up bit-identical to all others. If the
    message has no residual, the model is not touched.

    Args:
        model: A model with one unmerged adapter, whose factors are left unchanged.
        content: The content of a train or evaluate message; servers with other strategies send no
            residual.
        base: The base model, as a directory or Hub name; by default, what the model was loaded
            from.
        adapted_weights: How to store the adapted modules, as in the setting
            `model.adapted-weights`: `auto`, `float32` or `as-loaded`.

    Returns:
        A receipt for what was applied. Put it into the reply; replies without it are not counted.

    Raises:
        PayloadError: If the residual does not match the server's description or the model.
        AdapterError: If the model is not a PEFT model, or its adapter is merged.
        ModelError: If the base model cannot be found, or its weights cannot be stored this way.
    """
    if not hasattr(model, "get_base_model"):
        raise AdapterError(f"wanted a PeftModel; got {type(model).__name__}")
    layers = lora_layers(model)
    if any(layer.layer.merged for layer in layers.values()):
        raise AdapterError("the adapter is merged into the base; call unmerge_adapter() first")

    # what arrived must be what the server says it sent
    record = content.array_records.get(RESIDUAL_KEY, ArrayRecord())
    sha256 = digest(record)
    state = content.config_records.get(STATE_KEY)
    if state is not None and state.get("sha256") != sha256:
        raise PayloadError(
            f"{SENDER} is not the one of which the message has the hash; was the record "
            f"{RESIDUAL_KEY} removed or changed on the way, by a mod?"
        )
    shapes = {module: layer.factors.shape for module, layer in layers.items()}
    matrices = read_residual(record, shapes, SENDER)

    # pretrained weights plus the sum, regardless of what was there before
    base_model: Any = model.get_base_model()
    held: BaseWeights | None = getattr(base_model, HELD, None)
    if held is None and matrices:
        held = make_base_weights(
            find_owners(base_model, layers),
            _directory(base_model, base),
            weight_format=choose_weight_format(adapted_weights, base_model),
            model=base_model,
        )
        setattr(base_model, HELD, held)
    if held is not None:
        held.apply([_Residual.of(sha256, matrices)] if matrices else [])
    return ConfigRecord({"sha256": sha256})


def _directory(base_model: Any, base: Path | str | None) -> Path:
    """Return the directory that a live model was loaded from."""
    if base is not None:
        return resolve_base(str(base))
    config = base_model.config
    name = getattr(config, "_name_or_path", "")
    if not name:
        raise ModelError(
            "the model does not say what it was loaded from; give apply_base_residual its "
            "directory or hub name as `base`"
        )
    return resolve_base(name, getattr(config, "_commit_hash", None))


@dataclass(frozen=True)
class _Residual:
    """A `MergedPart`."""

    name: str
    matrices: Mapping[str, Matrix]

    @classmethod
    def of(cls, sha256: str, matrices: Mapping[str, Matrix]) -> _Residual:
        """Return the part in float32, the dtype of stored base weights."""
        return cls(sha256, {module: m.to(torch.float32) for module, m in matrices.items()})
