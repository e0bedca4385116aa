"""Before the first round over a network: agree on the base model and the first adapter.

The server has no base model. It asks every client what it has, takes the base and the adapted
modules that most of them agree on, and has one client of that majority create the adapter that all
start from. The seed determines its bits, so it does not matter which client.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.base_model.quantization import ON_LOADING
from fedmomentum.errors import AdapterError, ModelError, PayloadError, QuorumError
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.lora.adapter import PREFIX, Adapter, split_tensors
from fedmomentum.lora.peft_config import check_config
from fedmomentum.protocol.messages import DescribeRequest, Description, Reply, Task
from fedmomentum.server.exchange import collect, contain_errors
from fedmomentum.server.replies import Replies
from fedmomentum.server.reply_checks import check_magnitude
from fedmomentum.utils.io import canonical_json
from fedmomentum.utils.text import joined_reasons, printable

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config, LoraConfig
    from fedmomentum.protocol.transport import Transport


LOG = logging.getLogger("fedmomentum")
MAX_DESCRIPTION_BYTES = 2**24
MAX_ADAPTER_BYTES = 2**33


@dataclass(frozen=True)
class Handshake:
    """What is known before the first round.

    Attributes:
        model: The base model with a fresh adapter.
        descriptions: Client to its description of itself.
    """

    model: GlobalModel
    descriptions: Mapping[str, Description]


def handshake(transport: Transport, config: Config, run_id: str, method: Method) -> Handshake:
    """Ask all clients what they have, and one of the majority for the first adapter.

    If the method starts from a nonzero product, the base is reduced by the same: `-s B A`.

    Raises:
        QuorumError: If too few clients are there, no majority has the same base and modules, or
            nobody in it sends a usable adapter; the message has each client's reason.
    """
    clients = list(transport.clients())
    # First ask what everyone has; only then for one adapter, which may be large.
    replies, failures = _ask(transport, run_id, clients, config, adapter=False)
    descriptions = {client: _description(reply) for client, reply in replies.items()}
    for candidate in _majority(descriptions, failures):
        agreed = descriptions[candidate]
        more, reasons = _ask(transport, run_id, [candidate], config, adapter=True)
        failures |= reasons
        if candidate not in more:
            continue
        with contain_errors(candidate, failures):
            # The first client of the majority with a usable adapter starts the run.
            start = _first_adapter(more[candidate], agreed, config, is_zero=not method.reads_base)
            base = BaseIdentity(
                config.model.name,
                config.model.revision,
                agreed.sha256,
                agreed.tokenizer_sha256,
                agreed.labels,
                agreed.quantization,
            )
            _warn_of_differences(descriptions, agreed)
            scaled = {m: matrix.scaled(-start.scalings[m]) for m, matrix in start.modules.items()}
            given_up = (StoredObject.of(scaled),) if method.reads_base else ()
            model = GlobalModel(
                base, start, given_up, method=repr(method), personal=method.personal_factors
            )
            return Handshake(model, descriptions)
    raise QuorumError(
        f"none of {len(clients)} clients could start the run "
        f"({joined_reasons(failures) or 'no client is connected'})"
    )


def _structure(description: Description) -> str:
    """Return what all clients must have in common: the base model and the trained modules."""
    shapes = {module: list(shape) for module, shape in description.shapes.items()}
    quantization = str(description.quantization)
    return canonical_json(
        [description.sha256, quantization, shapes, description.scalings, description.saved_shapes]
    )


def _majority(descriptions: Mapping[str, Description], failures: Mapping[str, str]) -> list[str]:
    """Return the largest group of clients that agree on the base and the adapted modules, sorted.

    Raises:
        QuorumError: If the two largest groups tie: without a base of its own, the server cannot
            tell which is right.
    """
    # Clients that describe the same base model and adapter form a group.
    groups: dict[str, list[str]] = {}
    for client, description in sorted(descriptions.items()):
        groups.setdefault(_structure(description), []).append(client)
    ordered = sorted(groups.values(), key=lambda members: -len(members))
    if len(ordered) > 1 and len(ordered[0]) == len(ordered[1]):
        groups_text = "; ".join(
            f"{', '.join(members)}: base SHA-256 {descriptions[members[0]].sha256[:16]}..., "
            f"{len(descriptions[members[0]].shapes)} modules adapted"
            for members in ordered
        )
        others = f"; {joined_reasons(failures)}" if failures else ""
        raise QuorumError(
            "the clients disagree on the base model or on what is adapted, and no group is larger "
            f"than the others ({groups_text}{others}). Give all of them the same base and the same "
            "[lora], or remove the one that is wrong"
        )
    return ordered[0] if ordered else []


def _ask(
    transport: Transport, run_id: str, clients: Sequence[str], config: Config, *, adapter: bool
) -> tuple[dict[str, Reply], dict[str, str]]:
    """Ask clients to describe themselves; return usable replies, and why others gave none."""
    is_secure = config.privacy.secure_aggregation
    tasks = {}
    for client in clients:
        tasks[client] = Task(
            run_id, client, 0, DescribeRequest(adapter=adapter, is_secure=is_secure)
        )
    limit = MAX_ADAPTER_BYTES if adapter else MAX_DESCRIPTION_BYTES
    collected = Replies()
    replies = {}
    for client, reply in collect(transport, tasks, collected, limit):
        with contain_errors(client, collected.failures):
            _check_labels(reply, config.model.labels)
            _check_quantization(reply, config.model.quantization)
            _check_description(reply, config.lora)
            if reply.tensors and not adapter:
                raise PayloadError(
                    f"client {client}: its description holds tensors; none were requested"
                )
            replies[client] = reply
    return dict(sorted(replies.items())), collected.failures


def _description(reply: Reply) -> Description:
    assert isinstance(reply.answer, Description)  # the answer to a request to describe
    return reply.answer


def _check_labels(reply: Reply, wanted: Sequence[str]) -> None:
    """Check that a client's classifier has the run's labels, in the same order, and a fitting head.

    Raises:
        ModelError: If its labels differ, including labels in a run without a classifier.
        PayloadError: If no tensor that it trains in full has one row per label.
    """
    name = f"client {reply.client_id}"
    description = _description(reply)
    if list(description.labels) != list(wanted):
        raise ModelError(
            f"{name}: its classifier's labels are {_listed(description.labels)}; the run's are "
            f"{_listed(wanted)}. Give both sides the same model.task and model.labels, in one order"
        )
    if wanted and not any(
        shape[:1] == [len(wanted)] for shape in description.saved_shapes.values()
    ):
        raise PayloadError(
            f"{name}: no tensor that it trains in full has {len(wanted)} rows, one for each label"
        )


def _check_quantization(reply: Reply, setting: str) -> None:
    """Check that a client quantizes the base model as the run does.

    Raises:
        ModelError: If it does not.
    """
    got = _description(reply).quantization
    if got != ON_LOADING.get(setting):
        raise ModelError(
            f"client {reply.client_id}: what it does with the base model's weights on loading is "
            f"{got or 'none'}; the run's model.quantization is {setting}. Give both sides the same"
        )


def _listed(labels: Sequence[str]) -> str:
    return printable(", ".join(map(repr, labels)), 300) if labels else "none"


def _check_description(reply: Reply, lora: LoraConfig) -> None:
    """Check that a client would train what this run's settings ask for.

    Raises:
        FedMomentumError: If it would not; the message names the module or setting.
    """
    name = f"client {reply.client_id}"
    description = _description(reply)
    hint = "Does its configuration have the run's [lora]?"
    if not description.shapes or description.shapes.keys() != description.scalings.keys():
        raise PayloadError(
            f"{name}: its description misses the scalings or the shapes of its modules"
        )
    if description.saved_shapes and not lora.modules_to_save and not description.labels:
        raise AdapterError(
            f"{name}: its adapter holds {min(description.saved_shapes)}; this run trains no whole "
            "modules"
        )
    for module, (out_size, in_size) in description.shapes.items():
        if lora.rank > min(out_size, in_size):
            raise AdapterError(
                f"{name}: module {module} is {out_size} x {in_size}; too small for rank {lora.rank}"
            )
        if description.scalings[module] != lora.scaling:
            raise AdapterError(
                f"{name}: module {module} has scaling {description.scalings[module]!r}; wanted "
                f"{lora.scaling!r}. {hint}"
            )
    _check_settings(description.adapter_config, lora, name)


def _first_adapter(reply: Reply, agreed: Description, config: Config, *, is_zero: bool) -> Adapter:
    """Return the adapter in a description if all clients can start from it.

    Args:
        reply: The reply with the adapter's tensors.
        agreed: What the client described before, in agreement with the majority.
        config: The run's settings.
        is_zero: Whether the adapter's product must be zero.

    Raises:
        PayloadError: If its tensors are not those agreed on.
        AdapterError: If a module's product must be zero but is not, or parts of it can never train.
    """
    name = f"client {reply.client_id}"
    description = _description(reply)
    if _structure(description) != _structure(agreed):
        raise PayloadError(f"{name}: it described another base or other modules before")
    _check_tensors(reply.tensors, agreed, config.lora.rank, name)
    modules, saved = split_tensors(reply.tensors)
    settings = {**description.adapter_config, "base_model_name_or_path": config.model.name}
    adapter = Adapter(modules, dict(description.scalings), saved, settings, name)
    check_magnitude(adapter)
    for module, matrix in modules.items():
        if is_zero and bool(matrix.B.any()):
            raise AdapterError(
                f"{name}: module {module} of its fresh adapter adds something already; wanted B = 0"
            )
        # If A is rank-deficient and B is zero, the missing directions never train.
        if int(torch.linalg.matrix_rank(matrix.A.to(torch.float64), rtol=1e-6)) < matrix.rank:
            raise AdapterError(
                f"{name}: module {module} of its fresh adapter has rows of A that depend on each "
                "other"
            )
    return Adapter(modules, dict(description.scalings), saved, settings, "global adapter")


def _check_tensors(
    tensors: Mapping[str, Tensor], agreed: Description, rank: int, name: str
) -> None:
    """Check the names, shapes and dtypes of a fresh adapter.

    Raises:
        PayloadError: If a tensor is missing, unknown, or not what was agreed on; the message says
            what was received and what was wanted.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for module, (out_size, in_size) in agreed.shapes.items():
        wanted[f"{PREFIX}{module}.lora_B.weight"] = (out_size, rank)
        wanted[f"{PREFIX}{module}.lora_A.weight"] = (rank, in_size)
    for key, shape in agreed.saved_shapes.items():
        wanted[PREFIX + key] = tuple(shape)
    for key in sorted(wanted.keys() | tensors.keys()):
        if key not in wanted:
            raise PayloadError(
                f"{name}: its fresh adapter holds {key[:200]!r}, which it did not describe"
            )
        tensor = tensors.get(key)
        got = "missing" if tensor is None else f"{tuple(tensor.shape)} in {tensor.dtype}"
        good = (
            tensor is not None
            and tuple(tensor.shape) == wanted[key]
            and tensor.dtype == torch.float32
        )
        if not good:
            raise PayloadError(
                f"{name}: tensor {key} of its fresh adapter is {got}; wanted {wanted[key]} in "
                "float32"
            )


def _check_settings(settings: Mapping[str, Any], lora: LoraConfig, name: str) -> None:
    """Check that a client's adapter has the rank, alpha and scaling rule of the run."""
    check_config(settings, name)
    if settings.get("auto_mapping") is not None:
        raise AdapterError(
            f"{name}: its adapter's auto_mapping names a library to import; wanted none"
        )
    for key, wanted in (
        ("r", lora.rank),
        ("lora_alpha", lora.lora_alpha),
        ("use_rslora", lora.use_rslora),
    ):
        if settings.get(key) != wanted:
            raise AdapterError(
                f"{name}: its adapter's settings have {key} = {settings.get(key)!r}; wanted "
                f"{wanted!r}. Does its configuration have the run's [lora]?"
            )


def _warn_of_differences(descriptions: Mapping[str, Description], agreed: Description) -> None:
    """Warn of clients with a different base, or with library versions that may change last bits."""
    versions = Counter(
        canonical_json(description.versions) for description in descriptions.values()
    )
    for client, description in sorted(descriptions.items()):
        if description.sha256 != agreed.sha256:
            LOG.warning(
                "%s has another base model (SHA-256 %s..., the run's is %s...); it will be left "
                "out until it has the same",
                client,
                description.sha256[:16],
                agreed.sha256[:16],
            )
        elif _structure(description) != _structure(agreed):
            LOG.warning(
                "%s adapts other modules than the run; it will be left out until its [lora] is the "
                "run's",
                client,
            )
        elif description.tokenizer_sha256 != agreed.tokenizer_sha256:
            LOG.warning("%s has another tokenizer or chat template than the others", client)
        if len(versions) > 1:
            LOG.warning(
                "%s has %s",
                client,
                ", ".join(f"{k} {v}" for k, v in sorted(description.versions.items())),
            )
