"""The model that a client trains: a base model with one live adapter, set to a global model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedmomentum.aggregation.client_adapters import client_start, initialize_adapter
from fedmomentum.base_model.base_weights import choose_weight_format, make_base_weights
from fedmomentum.base_model.classifier import head_modules
from fedmomentum.base_model.library_errors import translate_out_of_memory
from fedmomentum.base_model.weight_slots import find_owners
from fedmomentum.client.loaded_base import LoadedBase
from fedmomentum.client.weight_probes import WeightProbes
from fedmomentum.errors import ConfigError
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.linear_modules import find_linear_modules
from fedmomentum.lora.live_layers import LoraLayer, lora_layers
from fedmomentum.lora.peft_model import (
    attach_adapter,
    copy_adapter,
    detach_adapter,
    load_adapter,
)
from fedmomentum.lora.target_checks import find_saved_modules, names_to_save
from fedmomentum.lora.targets import Targets, choose_targets
from fedmomentum.utils.quantized import num_parameters

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import LoraConfig, ModelConfig
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.lora.peft_model import PeftModel


class LocalModel:
    """The base model of this process with one live adapter, which can be set to any global model.

    Args:
        model: The base model's name, dtype and device.
        lora: The run's adapter, which is attached unless `client_lora` is given.
        seed: The seed of the adapter's initialization.
        client_lora: What this client trains, if less than the run's adapter.
        loaded: The base model, if this process has already loaded it.
        takes_loaded: Whether nothing else uses `loaded`, so that it may be modified and no weight
            is in memory twice. Otherwise its weights are shared, except in adapted modules.

    Raises:
        ModelError: If the base model cannot be found or loaded.
        AdapterError: If the adapter does not fit the base model.
        ConfigError: If the client adapts a module that the run does not.
    """

    def __init__(
        self,
        model: ModelConfig,
        lora: LoraConfig,
        *,
        seed: int,
        client_lora: LoraConfig | None = None,
        loaded: LoadedBase | None = None,
        takes_loaded: bool = False,
    ) -> None:
        takes_loaded = takes_loaded or loaded is None
        loaded = loaded or LoadedBase.from_config(model, model.labels, lora.modules_to_save)
        self.directory = loaded.directory
        self.identity = loaded.identity
        self.tokenizer = loaded.tokenizer
        base = loaded.model if takes_loaded else loaded.copy()
        # A classifier's head is trained in full, in addition to what the user names.
        self._head = head_modules(base, self.directory) if self.identity.labels else []
        self.num_parameters = num_parameters(base)
        self.dtype = base.dtype

        # The run's adapter determines which modules the federation adapts, and their shapes. A
        # matrix too small for the run's rank is left out for all clients.
        saved = find_saved_modules(base, names_to_save(self._head, lora.modules_to_save))
        self._choose_targets = partial(
            choose_targets,
            find_linear_modules(base),
            rank=lora.rank,
            saved=saved,
            head=self._head,
        )
        self.targets = self._choose_targets(lora.target_modules, parameters=lora.target_parameters)
        with translate_out_of_memory(f"an adapter on {model.name} does not fit"):
            self.peft = self._attach(base, lora, self.targets, seed)
        self.fresh: Adapter = self.adapter("fresh adapter")

        # This client may train fewer modules of it, at a lower rank.
        self.client_lora = replace(client_lora or lora, clients={})
        self.is_mixed = lora.is_mixed
        self._seed = seed
        self._attached_lora = replace(lora, clients={})
        self._layers = lora_layers(self.peft)
        self._reattach(self.client_lora)
        self._refuse_extra_modules()

        live = self.peft.get_base_model()
        owners = find_owners(live, self.fresh.modules)
        self.weight_format = choose_weight_format(model.adapted_weights, live)
        self.base_weights = make_base_weights(
            owners, self.directory, weight_format=self.weight_format, model=live
        )
        # For a client of lower rank: the part of the adapter that it does not train.
        self._fixed_residual: dict[str, LowRank] = {}
        self._weight_probes = WeightProbes(self.base_weights)

    def _attach(self, base: Any, lora: LoraConfig, targets: Targets, seed: int) -> PeftModel:
        """Attach a new adapter with these settings to a base model."""
        return attach_adapter(
            base,
            rank=lora.rank,
            lora_alpha=lora.lora_alpha,
            target_modules=targets,
            dropout=lora.dropout,
            use_rslora=lora.use_rslora,
            modules_to_save=names_to_save(self._head, lora.modules_to_save),
            seed=seed,
        )

    def _reattach(self, lora: LoraConfig) -> None:
        """Replace the current adapter with one of these settings, on the same base."""
        if lora != self._attached_lora:
            targets = self._choose_targets(lora.target_modules, parameters=lora.target_parameters)
            self.peft = self._attach(detach_adapter(self.peft), lora, targets, self._seed)
            self._layers = lora_layers(self.peft)
            self._attached_lora = lora

    def _refuse_extra_modules(self) -> None:
        extra_modules = sorted(self._layers.keys() - self.fresh.modules.keys())
        if extra_modules:
            raise ConfigError(
                f"target-modules {self.client_lora.target_modules} of a client adapt "
                f"{extra_modules[0]}, which the run's lora.target-modules do not include; a client "
                "can train fewer modules than the run, not others"
            )

    # ── adapters and global models ──

    def adapter(self, name: str = "adapter") -> Adapter:
        """Return a copy of the live adapter."""
        return copy_adapter(self.peft, name)

    def initial_global_model(self, method: Method) -> GlobalModel:
        """Return the global model before round 1: this base and the method's initial adapter."""
        adapter, change = initialize_adapter(method, self.fresh, self.base_weights.pretrained)
        config = {**self.fresh.config, "base_model_name_or_path": self.identity.name}
        adapter = replace(adapter, config=config, name="global adapter")
        base_update = (StoredObject.of(change),) if change else ()
        return GlobalModel(
            base=self.identity,
            adapter=adapter,
            base_update=base_update,
            method=repr(method),
            personal=method.personal_factors,
        )

    def load_global_model(
        self,
        model: GlobalModel,
        method: Method | None = None,
        client_lora: LoraConfig | None = None,
    ) -> None:
        """Set the base weights and the live adapter to a global model.

        A client of lower rank trains part of the global adapter. If the method keeps tails, the
        rest is added to its base weights, so that the effective weights are the global model's.

        Args:
            model: The global model.
            method: Derives the client's part; needed if this client trains less than the whole
                adapter.
            client_lora: What to train if the method has pruned the rank of `self.client_lora`.

        Raises:
            ModelError: If the global model belongs to another base.
            AdapterError: If its adapter differs from the attached one in modules, ranks or
                scalings.
        """
        model.base.check(self.identity)
        client_lora = client_lora or self.client_lora
        self._reattach(client_lora)

        start = model.adapter
        self._fixed_residual = {}
        is_mixed = self.is_mixed or (method is not None and method.prunes)
        if method is not None and (is_mixed or not self._trains_all_of(model, client_lora)):
            start, self._fixed_residual = client_start(
                method,
                model.adapter,
                self._layers,
                rank=client_lora.rank,
                scaling=client_lora.scaling,
                is_mixed=is_mixed,
            )

        own = StoredObject.of(self._fixed_residual) if self._fixed_residual else None
        self.base_weights.apply(model.base_update, own)
        load_adapter(self.peft, start)

    def _trains_all_of(self, model: GlobalModel, client_lora: LoraConfig) -> bool:
        """Return whether the client adapts all modules of the model, with one of its scalings."""
        has_same_modules = self._layers.keys() == model.adapter.modules.keys()
        return has_same_modules and client_lora.scaling in model.adapter.scalings.values()

    @contextmanager
    def base_alone(self) -> Iterator[PeftModel]:
        """Yield the original base model: nothing merged, and the adapter disabled.

        A global model must be loaded before any further work.
        """
        self.base_weights.apply([])
        with self.peft.disable_adapter():
            yield self.peft

    # ── live factors ──

    @property
    def layers(self) -> Mapping[str, LoraLayer]:
        """The live LoRA layer of every adapted module."""
        return self._layers

    def live_factors(self) -> list[LowRank]:
        """Return the live factors themselves, sorted by module, with their gradients."""
        return [layer.factors for _, layer in sorted(self._layers.items())]

    def parameter_names(self, kinds: str) -> dict[str, str]:
        """Return `<module>.<kind>` to the factor's name among the model's parameters."""
        names = {id(parameter): name for name, parameter in self.peft.named_parameters()}
        result = {}
        for module, layer in sorted(self._layers.items()):
            for kind in kinds:
                result[f"{module}.{kind}"] = names[id(layer.parameter(kind))]
        return result

    def trained_parameters(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Return the parameters that hold these factors, by their names.

        Args:
            names: `<module>.<kind>` to the parameter's name, as `parameter_names` returns it.
        """
        parameters: dict[str, Tensor] = {}
        for key, name in names.items():
            module, _, kind = key.rpartition(".")
            parameters[name] = self._layers[module].parameter(kind)
        return parameters

    def view(self, key: str, tensor: Tensor) -> Tensor:
        """Return a view of the factor `<module>.<kind>` in a tensor of its parameter's shape.

        The experts of a 3-D parameter share the parameters that hold their factors.
        """
        module, _, kind = key.rpartition(".")
        return self._layers[module].view(kind, tensor)

    def personal_factors(self, kinds: str) -> dict[str, Tensor]:
        """Return the live factors of these kinds, `B` or `A`, by `<module>.<kind>`."""
        factors = {}
        for module, layer in sorted(self._layers.items()):
            for kind in kinds:
                factors[f"{module}.{kind}"] = layer.factor(kind)
        return factors

    @contextmanager
    def training_only(self, kinds: str) -> Iterator[None]:
        """Within the block, freeze factors of all kinds but these."""
        frozen_kinds = [kind for kind in "BA" if kind not in kinds]
        frozen = [layer.parameter(k) for layer in self._layers.values() for k in frozen_kinds]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    # ── probes ──

    def probes(self, seed: int) -> dict[str, dict[str, Tensor]]:
        """Measure the live weights by random bilinear forms, in float64.

        Every call measures the current weights; results are not cached, since weights may change.

        Returns:
            Module path to its probes, for `base`, the base weight `W` without the adapter, and for
            `effective`, `W + scaling * B A`.
        """
        return self._weight_probes.measure(seed, self._layers, self._fixed_residual)

    def applied_fraction(self, model: GlobalModel, seed: int) -> float:
        """Return the fraction of `base_update` that takes effect in the layers' forward.

        Args:
            model: The loaded global model, which has a `base_update`.
            seed: The probes' seed.
        """
        return self._weight_probes.applied_fraction(model.base_update, self._fixed_residual, seed)
