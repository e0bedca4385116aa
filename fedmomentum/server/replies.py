"""`Replies`: the outcome of one request to several clients."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedmomentum.protocol.messages import SECONDS, Reply


@dataclass
class Replies:
    """The outcome of one request to several clients.

    Attributes:
        replies: Client to its reply, without its factors.
        failures: Client to the reason why it gave no usable reply.
        uplink_bytes: Client to the bytes of its payloads, including refused ones.
        downlink_bytes: Client to the bytes of the tasks it was sent.
        encode_seconds: Time spent encoding, decoding and checking payloads.
        wait_seconds: Time spent waiting for clients.
    """

    replies: dict[str, Reply] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    uplink_bytes: dict[str, int] = field(default_factory=dict)
    downlink_bytes: dict[str, int] = field(default_factory=dict)
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0

    @property
    def loading_seconds(self) -> float:
        """How long the clients took to load the model, summed over those that report it."""
        replies = [reply.tensors for reply in self.replies.values()]
        return sum(float(tensors[SECONDS][0]) for tensors in replies if SECONDS in tensors)
