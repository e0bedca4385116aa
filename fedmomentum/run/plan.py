"""What a run will cost, estimated before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedmomentum.base_model.load_checks import max_positions
from fedmomentum.formats.plan import Plan
from fedmomentum.lora.half_precision import wire_dtype
from fedmomentum.lora.module_summary import summarize, summarize_left_out
from fedmomentum.objectives.choice import make_objective
from fedmomentum.run.task import count_labels

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.client.client import Client
    from fedmomentum.client.local_model import LocalModel
    from fedmomentum.config.schema import Config
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.protocol.messages import Description


def make_plan(
    config: Config, local: LocalModel, model: GlobalModel, clients: Sequence[Client], method: Method
) -> Plan:
    """Estimate what a run on this machine will cost; see `Plan`."""
    traffic = _traffic(config, model.adapter, method, len(clients))
    labels = local.identity.labels
    longest = max(client.train.longest for client in clients)
    longest -= bool(labels)  # a row's label is no token
    # Activations of a training step: some 24 vectors a layer and token, and the logits.
    text = local.peft.config.get_text_config()
    width = getattr(text, "hidden_size", 1024) * getattr(text, "num_hidden_layers", 24)
    activations = (
        config.training.batch_size * longest * (24 * width * local.dtype.itemsize + 4 * 1024)
    )
    # Both answers of a pair are rows of the batch.
    if config.training.objective == "dpo":
        activations *= 2
    # Adapted weights of a 16-bit base have a float32 copy.
    weights = local.num_parameters * local.dtype.itemsize + (
        traffic.dense if local.dtype.itemsize < 4 else 0
    )
    warnings = []
    # What the user should know before hours of training.
    short = [c.client_id for c in clients if len(c.train) < config.training.batch_size]
    if short:
        warnings.append(
            f"fewer examples than a batch: {', '.join(short[:5])}{' ...' if len(short) > 5 else ''}"
        )
    if config.evaluation.every and not any(len(client.test) for client in clients):
        warnings.append("no client holds out examples; nothing will be evaluated")
    positions, _ = max_positions(local.peft.get_base_model())
    if positions is not None and longest > positions:
        warnings.append(
            f"the longest example has {longest} tokens and the model was made for {positions}; "
            f"data.max-length = {positions} cuts them"
        )
    # The adapter, its gradient and the moments of Adam; and the libraries themselves.
    memory = weights + 4 * traffic.uplink + activations + 700 * 2**20
    plan = _plan(
        config, model, method, traffic, len(clients), local.num_parameters, memory, warnings
    )
    return replace(
        plan,
        not_adapted=tuple(summarize_left_out(local.targets.left_out)),
        labels=count_labels(labels, [client.train for client in clients]),
    )


def served_plan(
    config: Config, model: GlobalModel, method: Method, facts: Mapping[str, Description]
) -> Plan:
    """Estimate what a run over a network will cost; its memory is the server's."""
    traffic = _traffic(config, model.adapter, method, len(facts))
    warnings = []
    short = [
        client for client, fact in facts.items() if fact.num_train < config.training.batch_size
    ]
    if short:
        warnings.append(
            f"fewer examples than a batch: {', '.join(short[:5])}{' ...' if len(short) > 5 else ''}"
        )
    if config.evaluation.every and not any(fact.num_test for fact in facts.values()):
        warnings.append("no client holds out examples; nothing will be evaluated")
    # updates are on disk: in memory are a reply as bytes and tensors, what is sent in the message
    # store and as it is encoded, the base update and what a round makes of it as bytes and tensors,
    # and one module's sum at work
    memory = (
        3 * traffic.uplink
        + 4 * traffic.adapter
        + 8 * traffic.residual
        + 2 * _update_bytes(config, traffic)
    )
    memory += 4 * traffic.largest_sum + 400 * 2**20
    parameters = max(fact.num_parameters for fact in facts.values())
    plan = _plan(config, model, method, traffic, len(facts), parameters, memory, warnings)
    return replace(plan, labels=dict.fromkeys(model.base.labels))


@dataclass(frozen=True)
class _Traffic:
    """Bytes of an adapter each way, of the largest residual of a round, and of dense matrices.

    And of the largest module's sum in float64, and of all updates of a round.
    """

    uplink: int
    adapter: int
    residual: int
    dense: int
    largest_sum: int
    spool: int


def _traffic(config: Config, adapter: Adapter, method: Method, num_clients: int) -> _Traffic:
    up, down = (
        wire_dtype(config.federation.uplink_dtype),
        wire_dtype(config.federation.downlink_dtype),
    )
    rank, asked = (
        config.lora.rank,
        max(1, math.ceil(config.federation.client_fraction * num_clients - 1e-9)),
    )
    # Upper bounds, module by module.
    residual = dense = largest_sum = 0
    for matrix in adapter.modules.values():
        out_size, in_size = matrix.shape
        largest = asked * rank + (
            2 * rank if down.itemsize < 4 else 0
        )  # rounding an adapter adds twice its rank
        factors = (out_size + in_size) * (min(largest, out_size, in_size) - rank)
        residual += 4 * min(factors, out_size * in_size) if method.exact else 0
        dense += 4 * out_size * in_size
        largest_sum = max(
            largest_sum, 8 * min((out_size + in_size) * asked * rank, out_size * in_size)
        )
    # Updates are stored in float32, whatever the wire's dtype.
    numbers = adapter.num_parameters()
    spool = 4 * asked * numbers  # widened to float32
    sent, received = _moment_bytes(config, adapter)
    return _Traffic(
        uplink=up.itemsize * numbers + sent,
        adapter=down.itemsize * numbers + received,
        residual=residual,
        dense=dense,
        largest_sum=largest_sum,
        spool=spool,
    )


def _moment_bytes(config: Config, adapter: Adapter) -> tuple[int, int]:
    """Return the bytes of the optimizer's moments that a client sends, and that it is sent."""
    state = config.training.optimizer_state
    # SGD has no second moments.
    num_seconds = 0 if config.training.arguments.get("optim") == "sgd" else 1
    numbers = 0
    means = 0
    for matrix in adapter.modules.values():
        out_size, in_size = matrix.shape
        numbers += matrix.rank * (out_size + in_size)
        means += num_seconds * (out_size + in_size + 2 * matrix.rank)
    if state == "shared-full":
        full = 4 * (1 + num_seconds) * numbers
        return full, full
    if state == "shared":
        return 2 * means, 2 * (numbers + means)
    return 0, 0


def _update_bytes(config: Config, traffic: _Traffic) -> int:
    """Return the largest size of `base_update`, in bytes."""
    return min(2 * traffic.dense, config.federation.num_rounds * traffic.residual)


def _plan(
    config: Config,
    model: GlobalModel,
    method: Method,
    traffic: _Traffic,
    num_clients: int,
    num_parameters: int,
    memory_bytes: int,
    warnings: Sequence[str],
) -> Plan:
    uplink, downlink = traffic.uplink, traffic.adapter + traffic.residual
    wide = (
        f"the residual makes the downlink up to {downlink / uplink:.1f} times the uplink; an "
        "energy below 1 in [method.settings] bounds it, carrying the rest on"
    )
    # On disk: the kept adapters, the base update with its recipes, one round's updates.
    return Plan(
        model=config.model.name,
        num_parameters=num_parameters,
        num_trained=model.adapter.num_parameters(),
        num_clients=num_clients,
        num_rounds=config.federation.num_rounds,
        method=repr(method),
        uplink_bytes=uplink,
        downlink_bytes=downlink,
        memory_bytes=memory_bytes,
        disk_bytes=(config.run.keep_checkpoints + 1) * uplink
        + 2 * _update_bytes(config, traffic)  # the list, and what the kept recipes name
        + traffic.residual
        + traffic.spool,
        adapted=tuple(summarize(model.adapter.modules)),
        not_adapted=(),
        warnings=((wide,) if downlink > 3 * uplink else ()) + tuple(warnings),
        optimizer_state=config.training.optimizer_state,
        objective=make_objective(config.training, model.base.labels).settings,
    )
