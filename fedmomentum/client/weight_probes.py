"""Measurements of a client's live weights: probes, and how much of the merged part takes effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.base_model.weights import BaseWeights, MergedPart
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.probes import BLOCK_ELEMENTS, applied_fraction, probe, probe_vectors, times
from fedmomentum.lora.live_layers import LoraLayer

# Module path to the probe vectors U `(out, num_probes)` and X `(in, num_probes)`.
ProbeVectors = dict[str, tuple[Tensor, Tensor]]


class WeightProbes:
    """Measurements of the adapted modules of one model.

    Only random vectors and pretrained values are cached; live weights are measured in every call.

    Args:
        base_weights: The adapted modules.
    """

    def __init__(self, base_weights: BaseWeights) -> None:
        self._base_weights = base_weights
        self._buffer = torch.empty(BLOCK_ELEMENTS, dtype=torch.float64)
        self._vector_cache: tuple[int, ProbeVectors] = (-1, {})
        self._expected_cache: _Expected | None = None

    def _vectors(self, seed: int) -> ProbeVectors:
        """Return every module's probe vectors, caching those of the last seed.

        All clients of a round use the same seed.
        """
        if self._vector_cache[0] != seed:
            vectors = {}
            for module in self._base_weights.layers:
                shape = self._base_weights.shape(module)
                vectors[module] = probe_vectors(module, shape, seed)
            self._vector_cache = (seed, vectors)
        return self._vector_cache[1]

    def measure(
        self, seed: int, layers: Mapping[str, LoraLayer], fixed_residual: Mapping[str, LowRank]
    ) -> dict[str, dict[str, Tensor]]:
        """Probe the weights that the forward computes with; see `LocalModel.probes`.

        Args:
            seed: The probes' seed.
            layers: The live LoRA layers.
            fixed_residual: The part of the adapter that is added to the base weights.
        """
        base = {}
        effective = {}
        for module, (U, X) in self._vectors(seed).items():
            probes = self._base_weights.probe(module, U, X, self._buffer)
            base[module] = effective[module] = probes
            layer = layers.get(module)
            if layer is not None:
                effective[module] = base[module] + layer.scaling * probe(layer.detached(), U, X)
            # The fixed residual belongs to the adapter, although it is added to the base weight.
            if module in fixed_residual:
                base[module] = base[module] - probe(fixed_residual[module], U, X)
        return {"base": base, "effective": effective}

    def applied_fraction(
        self,
        base_update: Sequence[MergedPart],
        fixed_residual: Mapping[str, LowRank],
        seed: int,
    ) -> float:
        """Return the fraction of `base_update` that takes effect in the layers' forward.

        It is `<f(X) - f_0(X), U X> / <U X, U X>` over all outputs of all modules, for the update
        `U`, the forward `f` of the live layers and `f_0` of the pretrained ones, and a few
        Gaussian inputs `X`. So it reveals what is lost to any rounding in the forward.

        Args:
            base_update: What is merged.
            fixed_residual: What is added besides.
            seed: The probes' seed.
        """
        expected = self._expected(base_update, seed)
        changes = {}
        for module, X in expected.inputs.items():
            outputs = self._base_weights.outputs(module, X).to("cpu", torch.float64)
            changes[module] = outputs - expected.pretrained[module]
            if module in fixed_residual:
                changes[module] -= times(fixed_residual[module], X.to("cpu", torch.float64))
        return applied_fraction(changes, expected.merged)

    def _expected(self, base_update: Sequence[MergedPart], seed: int) -> _Expected:
        """Measure the pretrained weights and the merged parts, once for all clients of a round."""
        objects = tuple(part.name for part in base_update)
        cached = self._expected_cache
        if cached is not None and (cached.seed, cached.objects) == (seed, objects):
            return cached
        vectors = self._vectors(seed)
        # Sort, because the order of a sum affects its last bits.
        inputs = {}
        for module in sorted({module for part in base_update for module in part.matrices}):
            inputs[module] = self._base_weights.inputs(module, vectors[module][1])
        pretrained = {}
        for module, outputs in self._base_weights.pretrained_outputs(inputs).items():
            pretrained[module] = outputs.to("cpu", torch.float64)
        # Multiply the parts on the weights' device, unless it lacks float64.
        merged = {}
        for module, X in inputs.items():
            X_wide = X.to("cpu" if X.device.type == "mps" else X.device).to(torch.float64)
            parts = [part.matrices[module] for part in base_update if module in part.matrices]
            merged[module] = torch.stack([times(part, X_wide) for part in parts]).sum(0).cpu()
        self._expected_cache = _Expected(seed, objects, inputs, pretrained, merged)
        return self._expected_cache


@dataclass(frozen=True, eq=False)
class _Expected:
    """The expected outputs of the layers' forwards.

    Attributes:
        seed: The probes' seed.
        objects: Hashes of the merged update's objects.
        inputs: Module path to its inputs `(in, num_probes)`.
        pretrained: Module path to the outputs `(out, num_probes)` of its pretrained layer.
        merged: Module path to the product of the inputs with everything that was merged.
    """

    seed: int
    objects: tuple[str, ...]
    inputs: dict[str, Tensor]
    pretrained: dict[str, Tensor]
    merged: dict[str, Tensor]
