"""What a run will cost, estimated before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedmomentum.base_model.load_checks import max_positions
from fedmomentum.formats.plan import MemoryUse, Plan, divide_clients
from fedmomentum.lora.half_precision import wire_dtype
from fedmomentum.lora.module_summary import summarize, summarize_left_out
from fedmomentum.objectives.choice import make_objective
from fedmomentum.run.memory import (
    BaseSizes,
    ServerBytes,
    choose_placement,
    estimate,
    simulate_steps,
)
from fedmomentum.run.privacy_checks import describe_privacy
from fedmomentum.run.private_checks import private_warnings
from fedmomentum.run.secure_traffic import num_stand_ins, secure_traffic
from fedmomentum.run.task import count_labels
from fedmomentum.server.selection import sample_size

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config
    from fedmomentum.data.tokenized import TokenizedClient
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.protocol.messages import Description
    from fedmomentum.run.outline import ModelOutline

# Memory of torch and everything else that a server loads.
SERVER_LIBRARIES = 400 * 2**20


def make_plan(
    config: Config, outline: ModelOutline, clients: Sequence[TokenizedClient], method: Method
) -> Plan:
    """Estimate what a run on this machine will cost; see `Plan`."""
    adapter = outline.adapter
    traffic = _traffic(config, adapter, method, len(clients))
    labels = outline.labels
    longest = max(client.train.longest for client in clients)
    longest -= bool(labels)  # a row's label is not a token
    warnings = _warn(config, clients, longest, outline) + private_warnings(config, method)
    place = choose_placement(config, outline)
    host, device = plan_memory(
        config, outline, method, len(clients), _longest(clients, longest, labels)
    )
    names = [client.client_id for client in clients]
    workers = divide_clients(names, config.run.devices)
    plan = _plan(
        config, adapter, method, traffic, len(clients), outline.num_parameters, host.peak, warnings
    )
    return replace(
        plan,
        not_adapted=tuple(summarize_left_out(outline.targets.left_out)),
        labels=_label_counts(config, labels, clients),
        objective=make_objective(config.training, labels).settings,
        device=place.describe(str(outline.device.type if workers else outline.device)),
        workers=workers,
        host_memory=host,
        device_memory=device,
    )


def plan_memory(
    config: Config,
    outline: ModelOutline,
    method: Method,
    num_clients: int,
    longest: tuple[int, int],
) -> tuple[MemoryUse, MemoryUse | None]:
    """Estimate the memory of host and device in each phase; see `memory.estimate`.

    Args:
        config: The configuration.
        outline: The base model and its adapter.
        method: The method.
        num_clients: How many clients there are.
        longest: Number of tokens of the longest example and of the longest answer.
    """
    adapter = outline.adapter
    traffic = _traffic(config, adapter, method, num_clients)
    place = choose_placement(config, outline)
    server = ServerBytes(
        adapter=4 * adapter.num_parameters(),
        update=_update_bytes(config, traffic),
        aggregating=_aggregation_bytes(traffic),
    )
    return estimate(
        config,
        BaseSizes.of(outline.base, adapter, outline.saved),
        place,
        simulate_steps(config, outline, place, longest),
        server,
        adapter.num_parameters(),
        min(len(config.run.devices), num_clients),
    )


def _longest(
    clients: Sequence[TokenizedClient], longest: int, labels: Sequence[str]
) -> tuple[int, int]:
    """Return the lengths of the longest example and answer in tokens; a label counts as one."""
    if labels:
        return longest, 1
    answers = [1]
    for client in clients:
        for ids, num_prompt in zip(
            client.train.input_ids, client.train.num_prompt_tokens, strict=True
        ):
            answers.append(len(ids) - num_prompt)
    return longest, max(answers)


def _warn(
    config: Config, clients: Sequence[TokenizedClient], longest: int, outline: ModelOutline
) -> list[str]:
    """Return warnings that the user should see before hours of training."""
    warnings = []
    short = [c.client_id for c in clients if len(c.train) < config.training.batch_size]
    if short:
        warnings.append(
            f"fewer examples than a batch: {', '.join(short[:5])}{' ...' if len(short) > 5 else ''}"
        )
    if config.evaluation.every and not any(len(client.test) for client in clients):
        warnings.append("no client holds out examples; nothing will be evaluated")
    positions, _ = max_positions(outline.base)
    if positions is not None and longest > positions:
        warnings.append(
            f"the longest example has {longest} tokens and the model was made for {positions}; "
            f"data.max-length = {positions} cuts them"
        )
    unused = config.run.devices[len(clients) :]
    if unused:
        warnings.append(f"fewer clients than run.devices: {', '.join(unused)} will not be used")
    if not outline.is_here:
        devices = ", ".join(dict.fromkeys(config.run.devices)) or outline.device
        warnings.append(
            f"this machine has no {devices}; the plan is for one that has, in "
            f"{str(outline.dtype).removeprefix('torch.')}"
        )
    return warnings


def _label_counts(
    config: Config, labels: Sequence[str], clients: Sequence[TokenizedClient]
) -> dict[str, int | None]:
    """Return each label's number of training examples; None with differential privacy."""
    if config.privacy.dp is not None:
        return dict.fromkeys(labels)
    return dict(count_labels(labels, [client.train for client in clients]))


def served_plan(
    config: Config, model: GlobalModel, method: Method, facts: Mapping[str, Description]
) -> Plan:
    """Estimate what a run over a network will cost; the memory is that of the server."""
    traffic = _traffic(config, model.adapter, method, len(facts))
    # With secure sums, clients do not reveal how many examples they have.
    warnings = [] if config.privacy.secure_aggregation else _warn_of_facts(config, facts)
    warnings += private_warnings(config, method)
    parameters = max(fact.num_parameters for fact in facts.values())
    memory = _aggregation_bytes(traffic) + 2 * _update_bytes(config, traffic) + SERVER_LIBRARIES
    plan = _plan(config, model.adapter, method, traffic, len(facts), parameters, memory, warnings)
    return replace(
        plan,
        labels=dict.fromkeys(model.base.labels),
        objective=make_objective(config.training, model.base.labels).settings,
    )


def _warn_of_facts(config: Config, facts: Mapping[str, Description]) -> list[str]:
    """Return warnings about the numbers of examples that clients report."""
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
    return warnings


def _aggregation_bytes(traffic: _Traffic) -> int:
    """Return the memory of an aggregation.

    Updates are on disk. In memory are a reply as bytes and tensors, outgoing messages both encoded
    and in the message store, a round's base update as bytes and tensors, and the working memory of
    one module's sum.
    """
    return 3 * traffic.uplink + 4 * traffic.adapter + 8 * traffic.residual + 4 * traffic.largest_sum


@dataclass(frozen=True)
class _Traffic:
    """Bytes of an adapter each way, of a round's largest residual, and of dense matrices.

    Also of the largest module's sum in float64, and of all updates of a round.
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
    rank = config.lora.rank
    is_secure = config.privacy.secure_aggregation
    # The number of updates; with secure sums, that of the stand-ins for the clients' updates.
    asked = sample_size(num_clients, config.federation.client_fraction)
    if is_secure:
        asked = num_stand_ins(config, method)
    # Upper bounds, added up over modules.
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
    # Updates are stored in float32, whatever their dtype on the wire.
    numbers = adapter.num_parameters()
    spool = 4 * asked * numbers  # converted to float32
    sent, received = _moment_bytes(config, adapter)
    sent += up.itemsize * numbers
    if is_secure:
        sent, received_in_sums = secure_traffic(config, adapter, method, num_clients)
        received += received_in_sums
        spool = num_clients * sent
    return _Traffic(
        uplink=sent,
        adapter=down.itemsize * numbers + received,
        residual=residual,
        dense=dense,
        largest_sum=largest_sum,
        spool=spool,
    )


def _moment_bytes(config: Config, adapter: Adapter) -> tuple[int, int]:
    """Return the bytes of optimizer moments that a client sends and receives."""
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
    adapter: Adapter,
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
        num_trained=adapter.num_parameters(),
        num_clients=num_clients,
        num_rounds=config.federation.num_rounds,
        method=repr(method),
        uplink_bytes=uplink,
        downlink_bytes=downlink,
        memory_bytes=memory_bytes,
        disk_bytes=(config.run.keep_checkpoints + 1) * uplink
        + 2 * _update_bytes(config, traffic)  # the update's parts, and those in kept recipes
        + traffic.residual
        + traffic.spool,
        adapted=tuple(summarize(adapter.modules)),
        not_adapted=(),
        warnings=((wide,) if downlink > 3 * uplink else ()) + tuple(warnings),
        optimizer_state=config.training.optimizer_state,
        privacy=describe_privacy(config, num_clients),
    )
