"""Before the first round of a run whose clients are elsewhere: who holds which base, and the fresh adapter.

The server has no base model. It asks every client what it holds, takes the base that most of them have, and has one
of those make the adapter that all start from: the seed decides its bits, so it does not matter which.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedmomentum.adapter import PREFIX, Adapter, split_tensors
from fedmomentum.aggregation import Method
from fedmomentum.config import Config, LoraConfig
from fedmomentum.errors import AdapterError, FedMomentumError, PayloadError, QuorumError
from fedmomentum.global_model import Blob, GlobalModel
from fedmomentum.identity import BaseIdentity
from fedmomentum.peft_io import check_config
from fedmomentum.transport import Failure, Reply, Task, Transport, decode_reply, encode_task

LOG = logging.getLogger("fedmomentum")
MAX_FACTS_BYTES = 2**20
MAX_ADAPTER_BYTES = 2**33


@dataclass(frozen=True)
class Enrolment:
    """What is known before the first round.

    Attributes:
        model: the untouched model with its fresh adapter.
        facts: client to what it said: `num_train`, `num_test`, `num_parameters`, `threads`, `dtype`, `versions`.
    """

    model: GlobalModel
    facts: Mapping[str, Mapping[str, Any]]


def enrol(transport: Transport, config: Config, run_id: str, method: Method) -> Enrolment:
    """Ask all clients what they hold, and one of those with the commonest base for the adapter to start from.

    Where the method starts from a product that is not zero, the base gives up as much: `-s B A`.

    Raises:
        QuorumError: too few clients, or none that answered with something usable; each with its reason.
    """
    clients = transport.clients()
    replies, failures = _ask(transport, run_id, list(clients), adapter=False)
    facts = {client: _facts(reply) for client, reply in replies.items()}
    bases = Counter(facts[client]["base"]["sha256"] for client in sorted(facts))
    for candidate in sorted(facts, key=lambda c: (-bases[facts[c]["base"]["sha256"]], c)):
        base = BaseIdentity(config.model.name, config.model.revision, **facts[candidate]["base"])
        more, reasons = _ask(transport, run_id, [candidate], adapter=True)
        failures |= reasons
        try:
            if candidate in more:
                start = _first_adapter(more[candidate], config, f"client {candidate}", is_zero=not method.reads_base)
                _tell_differences(facts, base)
                scaled = {m: matrix.scaled(-start.scalings[m]) for m, matrix in start.modules.items()}
                given_up = (Blob.of(scaled),) if method.reads_base else ()
                model = GlobalModel(base, start, given_up, method=repr(method), personal=method.personal)
                return Enrolment(model, facts)
        except FedMomentumError as error:
            failures[candidate] = str(error)
    told = "; ".join(f"{client}: {reason}" for client, reason in sorted(failures.items()))
    raise QuorumError(f"none of {len(clients)} clients could start the run ({told or 'no client is connected'})")


def _ask(
    transport: Transport, run_id: str, clients: list[str], *, adapter: bool
) -> tuple[dict[str, Reply], dict[str, str]]:
    tasks = {c: Task("describe", run_id, c, 0, manifest={}, settings={"adapter": adapter}) for c in clients}
    replies, failures = {}, dict.fromkeys(clients, "no answer in time")
    for client, answer in transport.send_and_receive({client: encode_task(task) for client, task in tasks.items()}):
        if isinstance(answer, Failure):
            failures[client] = answer.reason
            continue
        try:
            reply = decode_reply(answer, tasks[client], MAX_ADAPTER_BYTES if adapter else MAX_FACTS_BYTES)
            _facts(reply)
            replies[client] = reply
            del failures[client]
        except FedMomentumError as error:
            failures[client] = str(error)
    return dict(sorted(replies.items())), failures


def _facts(reply: Reply) -> dict[str, Any]:
    """The facts of a description, if they have the form they should."""
    name, metrics = f"client {reply.client_id}", reply.metrics
    hashes = {key: metrics.get(key) for key in ("sha256", "tokenizer_sha256")}
    if not all(isinstance(value, str) and len(value) == 64 for value in hashes.values()):
        raise PayloadError(f"{name}: its description holds no hashes of its base model and tokenizer")
    counts = {key: metrics.get(key) for key in ("num_parameters", "num_train", "num_test", "threads")}
    if not all(type(value) is int and value >= 0 for value in counts.values()):
        raise PayloadError(f"{name}: its description lacks a count; it holds {counts}")
    versions = metrics.get("versions")
    if not isinstance(versions, dict) or not all(isinstance(v, str) and len(v) < 100 for v in versions.values()):
        raise PayloadError(f"{name}: its description lacks the versions of its packages")
    return {"base": hashes, **counts, "versions": dict(sorted(versions.items())), "dtype": str(metrics.get("dtype"))}


def _first_adapter(reply: Reply, config: Config, name: str, *, is_zero: bool) -> Adapter:
    """The adapter in a description, if it is one that this run's settings make and, if asked, adds nothing yet.

    Raises:
        PayloadError: tensors that are no adapter.
        AdapterError: another rank, scaling or setting than the run's.
    """
    lora = config.lora
    tensors, scalings, settings = reply.tensors, reply.metrics.get("scalings"), reply.metrics.get("adapter_config")
    names = {key.removeprefix(PREFIX) for key in tensors}
    pairs = {key.removesuffix(".lora_A.weight") for key in names if key.endswith(".lora_A.weight")}
    complete = {f"{module}.lora_B.weight" for module in pairs} == {k for k in names if k.endswith(".lora_B.weight")}
    if not pairs or not complete or not all(key.startswith(PREFIX) for key in tensors):
        raise PayloadError(f"{name}: its fresh adapter has no pairs of factors under PEFT's names")
    if not isinstance(scalings, dict) or scalings.keys() != pairs or not isinstance(settings, dict):
        raise PayloadError(f"{name}: its fresh adapter lacks the scalings or settings of its modules")
    modules, saved = split_tensors(tensors)
    if saved and not lora.modules_to_save:
        raise AdapterError(f"{name}: its fresh adapter holds {sorted(saved)[0]}, and this run trains no whole modules")
    wanted = lora.lora_alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank)
    for module, matrix in modules.items():
        good = matrix.dtype == torch.float32 and all(bool(f.isfinite().all()) for f in (matrix.A, matrix.B))
        good = good and not (is_zero and bool(matrix.B.any()))
        if matrix.B.ndim != 2 or matrix.A.ndim != 2 or matrix.rank != lora.rank or not good:
            raise AdapterError(
                f"{name}: module {module} of its fresh adapter has rank {matrix.rank}, or adds something already; "
                f"wanted rank {lora.rank} in float32 with B = 0. Does its configuration have the run's [lora]?"
            )
        if scalings[module] != wanted:
            raise AdapterError(
                f"{name}: module {module} of its fresh adapter has scaling {scalings[module]!r}; wanted {wanted!r}. "
                "Does its configuration have the run's [lora]?"
            )
    _check_settings(settings, lora, name)
    settings = {**settings, "base_model_name_or_path": config.model.name}
    return Adapter(modules, dict(scalings), saved, settings, "global adapter")


def _check_settings(settings: Mapping[str, Any], lora: LoraConfig, name: str) -> None:
    check_config(settings, name)
    if settings.get("auto_mapping") is not None:
        raise AdapterError(f"{name}: its adapter's auto_mapping names a library to import; wanted none")
    for key, wanted in (("r", lora.rank), ("lora_alpha", lora.lora_alpha), ("use_rslora", lora.use_rslora)):
        if settings.get(key) != wanted:
            raise AdapterError(
                f"{name}: its adapter's settings have {key} = {settings.get(key)!r}; wanted {wanted!r}. Does its "
                "configuration have the run's [lora]?"
            )


def _tell_differences(facts: Mapping[str, Mapping[str, Any]], base: BaseIdentity) -> None:
    """Warn of clients that hold another base, or whose libraries may give other last bits."""
    versions = Counter(str(fact["versions"]) for fact in facts.values())
    for client, fact in sorted(facts.items()):
        if fact["base"]["sha256"] != base.sha256:
            LOG.warning(
                "%s holds another base model (SHA-256 %s..., the run's is %s...); it will be left out until it has "
                "the same", client, fact["base"]["sha256"][:16], str(base.sha256)[:16],
            )  # fmt: skip
        elif fact["base"]["tokenizer_sha256"] != base.tokenizer_sha256:
            LOG.warning("%s has another tokenizer or chat template than the others", client)
        if len(versions) > 1:
            LOG.warning("%s has %s", client, ", ".join(f"{k} {v}" for k, v in fact["versions"].items()))
