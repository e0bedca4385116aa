"""What each client trains in a round, and the update that its reply holds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from fedmomentum.aggregation.client_adapters import client_start, with_fixed_residual
from fedmomentum.errors import PayloadError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import Adapter, from_tensors, to_tensors
from fedmomentum.lora.half_precision import decode_factors, wire_dtype
from fedmomentum.lora.module_names import EMBEDDING, split_expert
from fedmomentum.lora.peft_layout import is_parameter_target
from fedmomentum.lora.target_names import is_called, is_target
from fedmomentum.protocol.adapter_terms import ClientLora
from fedmomentum.protocol.messages import MEASUREMENTS, OPTIMIZER, Reply, TrainResult, train_result
from fedmomentum.server.reply_checks import check_magnitude, check_measurements, check_training

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config, LoraConfig
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.server.state import ServerState


class UpdateReader:
    """Derives what clients start from, the same way they do, and validates what they send.

    Args:
        model: The global model that the clients load.
        state: The server's state, with the ranks to which a method has pruned clients.
        method: The run's method.
        config: The run's settings.
        server_round: The round.
    """

    def __init__(
        self,
        model: GlobalModel,
        state: ServerState,
        method: Method,
        config: Config,
        server_round: int,
    ) -> None:
        self.model = model
        self._state = state
        self._method = method
        self._lora = config.lora
        self._is_mixed = config.lora.is_mixed or method.prunes
        self._uploads = method.uploaded_factors(server_round)
        self._dtype = wire_dtype(config.federation.uplink_dtype)
        self._shares_moments = config.training.shares_moments
        self._num_probed = len(model.adapter.modules) if config.evaluation.probes else 0

    def lora_config(self, client: str) -> LoraConfig:
        """Return a client's current LoRA configuration, at the rank it was pruned to."""
        configured = self._lora.for_client(client)
        return configured.with_rank(self._state.ranks.get(client, configured.rank))

    def lora(self, client: str) -> ClientLora:
        """Return what a client trains, in the form that tasks use."""
        return ClientLora.of(self.lora_config(client), self._is_mixed)

    def rank(self, client: str) -> int:
        """Return a client's current rank."""
        return self.lora_config(client).rank

    def group(self, client: str) -> str:
        """Return a key shared by all clients that start from the same adapter."""
        return repr((self.lora_config(client), client in self._lora.clients))

    def start(self, client: str) -> tuple[Adapter, dict[str, LowRank]]:
        """Return the adapter that a client trains, and its fixed part; see `client_start`."""
        adapter = self.model.adapter
        if client not in self._lora.clients and not self._is_mixed:
            return adapter, {}
        client_lora = self.lora_config(client)
        modules = list(adapter.modules)
        if client in self._lora.clients:
            modules = [module for module in modules if _is_target(module, client_lora)]
        return client_start(
            self._method,
            adapter,
            modules,
            rank=client_lora.rank,
            scaling=client_lora.scaling,
            is_mixed=self._is_mixed,
        )

    def read(self, reply: Reply) -> Adapter:
        """Return the update in a reply.

        A factor that this round does not ask for is bit for bit the one that clients were sent.

        Raises:
            FedMomentumError: If the reply is invalid; the message names client and tensor.
        """
        name = f"client {reply.client_id}"
        result = train_result(reply)
        check_training(result, name)
        check_measurements(reply.tensors, self._num_probed, name)
        if self._method.prunes:
            _check_next_rank(result, self.rank(reply.client_id), name)

        start, fixed = self.start(reply.client_id)
        factors = {}
        for key, tensor in reply.tensors.items():
            is_moment = self._shares_moments and key.startswith(OPTIMIZER)
            if key not in MEASUREMENTS and not is_moment:
                factors[key] = tensor
        decoded = decode_factors(factors, self._dtype, name)
        unchanged = self._not_uploaded(start)
        unexpected = sorted(decoded.keys() & unchanged.keys())
        if unexpected:
            raise PayloadError(
                f"{name}: tensor {unexpected[0]} was not requested; this round takes "
                f"{self._uploads}"
            )
        update = from_tensors(decoded | unchanged, like=start, name=name)
        check_magnitude(update)
        if "B" not in self._uploads:
            return self._with_global_B(update)
        return with_fixed_residual(update, fixed)

    def _with_global_B(self, update: Adapter) -> Adapter:
        """Return an update of A alone in the units of the global adapter: `s_i B_i A = s B A`.

        A client with another scaling `s_i` got `B_i = s/s_i B`, which rounds; methods that freeze B
        need it to be the same for all clients, bit for bit. A module that the client does not adapt
        has not changed.
        """
        # Start from the global factors, for modules that the client does not adapt.
        adapter = self.model.adapter
        modules = dict(adapter.modules)
        for module, matrix in update.modules.items():
            modules[module] = LowRank(adapter.modules[module].B, matrix.A)
        return replace(update, modules=modules, scalings=dict(adapter.scalings))

    def _not_uploaded(self, start: Adapter) -> dict[str, Tensor]:
        """Return the factors that clients do not upload in this round, as they received them."""
        kinds = [f".lora_{factor}." for factor in "BA" if factor not in self._uploads]
        tensors = to_tensors(start)
        return {key: t for key, t in tensors.items() if any(kind in key for kind in kinds)}


def next_rank(reply: Reply) -> int:
    """Return the (already checked) rank at which a client continues, for methods that prune."""
    rank = train_result(reply).next_rank
    assert rank is not None  # checked when the reply was read
    return rank


def _is_target(module: str, lora: LoraConfig) -> bool:
    """Return whether a client trains a module or expert; without target names it trains all."""
    if not lora.target_modules and not lora.target_parameters:
        return True
    parameter, expert = split_expert(module)
    if expert is not None:
        return any(is_called(parameter, name) for name in lora.target_parameters)
    path = module.removesuffix(EMBEDDING)
    is_module = bool(lora.target_modules) and is_target(path, lora.target_modules)
    return is_module or is_parameter_target(path, lora.target_parameters)


def _check_next_rank(result: TrainResult, rank: int, name: str) -> None:
    """Refuse a missing or increased next rank, for methods that prune."""
    if result.next_rank is None or result.next_rank > rank:
        raise PayloadError(
            f"{name}: its next_rank is {result.next_rank!r}; wanted a whole number from 1 to "
            f"{rank}, its rank now"
        )
