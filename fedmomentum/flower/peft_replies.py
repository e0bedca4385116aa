"""Reads and validates the replies of clients that send PEFT state dicts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import Message, Metadata, MetricRecord, RecordDict
from torch import Tensor

from fedmomentum.errors import FedMomentumError, PayloadError
from fedmomentum.flower.peft_arrays import ArraySpec, read_tensors
from fedmomentum.lora.adapter import Adapter, check_size
from fedmomentum.lora.peft_folder import from_peft_tensors
from fedmomentum.utils.text import printable

LOG = logging.getLogger("fedmomentum")

MAX_EXAMPLES = 2.0**53
"""The largest weight; float64 cannot represent all larger integers."""
MAX_REASON = 300


@dataclass(frozen=True, eq=False)
class Reply:
    """A valid reply.

    Attributes:
        node_id: The node that sent it.
        weight: Its number of examples.
        content: The records received.
        adapter: The trained adapter; None in a reply to an evaluate message.
        applied: The SHA-256 of the base residual that the client says it applied; None if it does
            not say.
    """

    node_id: int
    weight: float
    content: RecordDict
    adapter: Adapter | None = None
    applied: str | None = None


@dataclass(eq=False)
class Replies:
    """The replies of a round.

    Attributes:
        accepted: The valid replies.
        rejected: Node -> why its reply does not count, including nodes without a reply.
    """

    accepted: list[Reply] = field(default_factory=list)
    rejected: dict[int, str] = field(default_factory=dict)

    def describe_rejected(self) -> str:
        """Return a list of all rejected nodes with reasons."""
        return "; ".join(f"node {node}: {reason}" for node, reason in sorted(self.rejected.items()))


def read_replies(
    messages: Iterable[Message],
    sent: Iterable[Metadata],
    weight_key: str,
    *,
    residual: str | None,
    form: AdapterForm | None = None,
) -> Replies:
    """Read the replies to a round's messages; an invalid one cannot affect the others.

    Args:
        messages: The replies, in any order.
        sent: The metadata of the messages that were sent.
        weight_key: The metric by which replies are weighted.
        residual: The SHA-256 of the base residual that clients must have applied; None if there
            was none to apply.
        form: The form of the adapters; None for replies to evaluate messages, which have none.
    """
    result = Replies()
    # identify nodes by the message answered: the SuperLink's errors bear its own node id
    waiting = {metadata.message_id: metadata.dst_node_id for metadata in sent}
    for message in messages:
        node_id = waiting.pop(message.metadata.reply_to_message_id, None)
        if node_id is None:
            result.rejected.setdefault(
                message.metadata.src_node_id, "it answers no message of this round, or one twice"
            )
            continue
        try:
            result.accepted.append(_read_reply(message, node_id, weight_key, residual, form))
        except FedMomentumError as error:
            result.rejected[node_id] = printable(str(error), MAX_REASON)
        except OSError:  # this machine's fault, not the node's
            raise
        except Exception as error:
            LOG.debug("the reply of node %d could not be read", node_id, exc_info=error)
            result.rejected[node_id] = f"it could not be read ({type(error).__name__})"
    for node_id in waiting.values():
        result.rejected[node_id] = "no reply arrived in time"
    # sort them, so that results are bit-identical whatever the order of arrival
    result.accepted.sort(key=_content_order)
    return result


def _content_order(reply: Reply) -> tuple[str, float, int]:
    """Return the sort key of a reply: its content, since node ids differ between runs."""
    return (reply.adapter.digest() if reply.adapter else "", reply.weight, reply.node_id)


def _read_reply(
    message: Message,
    node_id: int,
    weight_key: str,
    residual: str | None,
    form: AdapterForm | None,
) -> Reply:
    """Validate and return one reply.

    Raises:
        PayloadError: If it is invalid.
        AdapterError: If its arrays are not an adapter that can be combined.
    """
    if not message.has_content():
        reason = printable(str(message.error.reason), MAX_REASON)
        raise PayloadError(f"it failed with code {message.error.code}: {reason}")
    content = message.content
    metrics = _only(content.metric_records, "MetricRecord")
    weight = _weight(metrics, weight_key)
    # a client that did not apply the residual has trained a different model
    applied = _receipt(content)
    if residual is not None and applied != residual:
        what = "without" if applied is None else "with another one than"
        raise PayloadError(
            f"it worked {what} the round's base residual; call apply_base_residual(model, "
            "message.content) in the ClientApp, and put what it returns into the reply"
        )
    adapter = None
    if form is not None:
        arrays = _only(content.array_records, "ArrayRecord")
        adapter = form.adapter(read_tensors(arrays, "its reply", form.specs), f"node {node_id}")
        check_size(adapter)
    return Reply(node_id, weight, content, adapter, applied)


def _only(records: Mapping[str, Any], kind: str) -> Any:
    if len(records) != 1:
        raise PayloadError(f"its reply has {len(records)} {kind}s; wanted one")
    return next(iter(records.values()))


def _weight(metrics: MetricRecord, key: str) -> float:
    """Return the number of examples."""
    value = metrics.get(key)
    if not isinstance(value, (int, float)) or not 0 < value <= MAX_EXAMPLES:  # NaN compares false
        shown = printable(repr(value), 40)
        raise PayloadError(f"its metric {key!r} is {shown}; wanted a number of examples above 0")
    return float(value)


def _receipt(content: RecordDict) -> str | None:
    """Return the SHA-256 from the record returned by `apply_base_residual`."""
    for record in content.config_records.values():
        if set(record) == {"sha256"} and isinstance(record["sha256"], str):
            return record["sha256"]
    return None


def common_metrics(replies: Iterable[Reply]) -> list[RecordDict]:
    """Return the replies' records with only the metrics that all replies have, for averaging.

    A list counts as common only if it has the same length in all replies.
    """
    contents = [reply.content for reply in replies]
    forms = []
    for content in contents:
        metrics = _only(content.metric_records, "MetricRecord")
        lengths = {k: len(v) if isinstance(v, list) else -1 for k, v in metrics.items()}
        forms.append(set(lengths.items()))
    shared = {key for key, _ in set.intersection(*forms)} if forms else set()
    result = []
    for content in contents:
        (name,) = content.metric_records
        metrics = content.metric_records[name]
        kept = MetricRecord({key: metrics[key] for key in metrics if key in shared})
        result.append(RecordDict({**content, name: kept}))
    return result


# ── adapters ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class AdapterForm:
    """The required form of every client's adapter.

    Attributes:
        config: PEFT's configuration, as JSON values.
        specs: The arrays of the PEFT state dict, in order.
    """

    config: Mapping[str, Any]
    specs: Mapping[str, ArraySpec]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of sums: float64 if all factors are float64, otherwise float32."""
        factors = [spec.dtype for key, spec in self.specs.items() if ".lora_" in key]
        is_double = all(dtype == torch.float64 for dtype in factors)
        return torch.float64 if is_double else torch.float32

    def adapter(self, tensors: Mapping[str, Tensor], name: str) -> Adapter:
        """Return the adapter of a PEFT state dict, with its factors in `dtype`.

        Raises:
            AdapterError: See `read_adapter`.
        """
        factors = {key: t.to(self.dtype) if ".lora_" in key else t for key, t in tensors.items()}
        return from_peft_tensors(factors, self.config, name)
