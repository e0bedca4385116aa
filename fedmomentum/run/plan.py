"""What a run will cost, estimated before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fedmomentum.base_model.devices import emulates_bfloat16
from fedmomentum.base_model.load_checks import max_positions
from fedmomentum.formats.plan import MemoryUse, Plan, divide_clients
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
from fedmomentum.run.task import count_labels
from fedmomentum.run.traffic import Traffic, plan_traffic

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
# Warn if the downlink is more than this many times the uplink.
WIDE_DOWNLINK = 3


def make_plan(
    config: Config, outline: ModelOutline, clients: Sequence[TokenizedClient], method: Method
) -> Plan:
    """Estimate what a run on this machine will cost; see `Plan`."""
    adapter = outline.adapter
    traffic = plan_traffic(config, adapter, method, len(clients))
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
    traffic = plan_traffic(config, adapter, method, num_clients)
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
    is_bfloat16 = outline.dtype == torch.bfloat16
    if outline.is_here and is_bfloat16 and emulates_bfloat16(outline.device):
        warnings.append(
            f"bfloat16 may be emulated on this machine's {outline.device}, which takes several "
            "times as long as float32; set model.dtype to float32 or auto, unless memory is short"
        )
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
    traffic = plan_traffic(config, model.adapter, method, len(facts))
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


def _aggregation_bytes(traffic: Traffic) -> int:
    """Return the memory of an aggregation.

    Updates are on disk. In memory are a reply as bytes and tensors, outgoing messages both encoded
    and in the message store, a round's base update as bytes and tensors, and the working memory of
    one module's sum.
    """
    return 3 * traffic.uplink + 4 * traffic.adapter + 8 * traffic.residual + 4 * traffic.largest_sum


def _update_bytes(config: Config, traffic: Traffic) -> int:
    """Return the largest size of `base_update`, in bytes."""
    return min(2 * traffic.dense, config.federation.num_rounds * traffic.residual)


def _plan(
    config: Config,
    adapter: Adapter,
    method: Method,
    traffic: Traffic,
    num_clients: int,
    num_parameters: int,
    memory_bytes: int,
    warnings: Sequence[str],
) -> Plan:
    """Assemble the plan, with a warning if the residual makes the downlink large."""
    uplink, downlink = traffic.uplink, traffic.downlink
    if method.residual_rank and downlink > WIDE_DOWNLINK * uplink:
        wide = f"the residual makes the downlink up to {downlink / uplink:.1f} times the uplink"
        if method.lighter_residual:
            wide = f"{wide}; {method.lighter_residual}"
        warnings = [wide, *warnings]
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
        disk_bytes=(config.run.keep_checkpoints + 1) * traffic.adapter
        + 2 * _update_bytes(config, traffic)  # the update's parts, and those in kept recipes
        + traffic.residual
        + traffic.spool,
        adapted=tuple(summarize(adapter.modules)),
        not_adapted=(),
        warnings=tuple(warnings),
        optimizer_state=config.training.optimizer_state,
        privacy=describe_privacy(config, num_clients),
    )
