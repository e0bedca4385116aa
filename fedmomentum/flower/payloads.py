"""Payloads in Flower's records: how tasks and replies are packed into Flower's messages."""

from __future__ import annotations

import math
from typing import NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from fedmomentum.protocol.transport import Failure

MAX_PAYLOAD_BYTES = 2**31 - 2**20
"""The largest payload. Flower has carried 2.2 GiB, with four times that in the node's memory."""


def pack_payload(payload: bytes, timeout: float = 0.0) -> RecordDict:
    """Return a payload as a Flower record, which Flower itself splits into 5 MB parts.

    The payload's header and body are separate arrays: all clients that need the same objects are
    sent the same body, and Flower's store keeps equal parts only once, so its size does not grow
    with the number of clients.

    Args:
        payload: An encoded task or reply, in safetensors format.
        timeout: How many seconds the answer may take.
    """
    # a safetensors file begins with the header's length in 8 bytes
    header_end = 8 + int.from_bytes(payload[:8], "little")
    split = min(header_end, len(payload))
    arrays = {"head": _as_array(payload[:split]), "body": _as_array(payload[split:])}
    limits = ConfigRecord({"seconds": float(timeout)})
    return RecordDict({"payload": ArrayRecord(arrays), "limits": limits})


def _as_array(data: bytes) -> Array:
    return Array("uint8", (len(data),), "bytes", data)


class Unpacked(NamedTuple):
    """The content of a Flower record: a payload and how many seconds its answer may take."""

    payload: bytes
    timeout: float


def unpack_payload(content: RecordDict) -> Unpacked:
    """Return the payload of a Flower record and how many seconds its answer may take.

    Raises:
        ValueError: If the record is malformed.
    """
    try:
        payload = content["payload"]
        limits = content["limits"]
        if not isinstance(payload, ArrayRecord) or not isinstance(limits, ConfigRecord):
            raise TypeError("other records")
        seconds = limits["seconds"]
        if not isinstance(seconds, float) or not 0 <= seconds < math.inf:
            raise TypeError("no duration")
        return Unpacked(payload["head"].data + payload["body"].data, seconds)
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError("a message without a payload") from error


def read_reply(reply: Message) -> bytes | Failure | None:
    """Return a reply's payload, or why there is none; None if Flower says the node is gone.

    Raises:
        Exception: Whatever Flower's records raise if they are damaged.
    """
    if reply.has_error():
        error = reply.error
        is_from_flower = reply.metadata.src_node_id == SUPERLINK_NODE_ID
        if is_from_flower and error.code == ErrorCode.NODE_UNAVAILABLE:
            return None
        return Failure(str(error.reason or f"Flower's error {error.code}"))
    try:
        return unpack_payload(reply.content).payload
    except ValueError as error:
        return Failure(f"its answer could not be read: {error}")
