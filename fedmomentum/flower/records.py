"""The required form of Flower's records, checked before Flower's code uses them.

Each of our messages, whether task or reply, consists of the same few records::

    Message
      RecordDict
        ArrayRecord "payload"     Array "head", Array "body", each in chunks of bytes
        ConfigRecord "limits"     one float, "seconds"

Flower transmits it as a tree of objects named by their SHA-256, each uploaded separately, and
reassembles them on arrival. It would do so with any tree: one with 200,000 children, one whose root
is another client's message, an array that references one chunk a million times. Here, only the form
above is accepted. A reply may also be an error, which is a message without records.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

from flwr.app import MessageType
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata, ObjectTree
from flwr.proto.recorddict_pb2 import ConfigRecord as ConfigRecordProto
from msgspec import Meta

from fedmomentum.errors import PayloadError
from fedmomentum.flower.payloads import MAX_PAYLOAD_BYTES
from fedmomentum.utils.schema import Hash, Schema, parse_json
from fedmomentum.utils.text import printable

HEARTBEAT_SECONDS = 10
"""Flower's shortest interval; a node silent for twice as long counts as disconnected."""
PROBE_SECONDS = 1
"""The interval that `join --check` states, which the server refuses after verifying the node."""
MAX_CHUNKS = MAX_PAYLOAD_BYTES // 2**20 + 2
"""The most chunks per array. Flower's have 5 MB; an environment variable can make them smaller."""
MAX_OBJECT_BYTES = 2**18
"""The largest object that is not a chunk: an array that lists all its chunks."""
MAX_TTL = 366 * 86400.0
"""The longest time to live in seconds: a year."""
EARLIEST = 1740700800.0
"""Flower's own limit: no message is from before March 2025."""
LATEST = 2.0**35
"""A thousand years from now, in seconds; converting later times overflows."""


class RecordDictFields(Schema, frozen=True):
    """The body of a `RecordDict`: the names of its objects."""

    payload: Hash
    limits: Hash


class ArrayRecordFields(Schema, frozen=True):
    """The body of an `ArrayRecord`: the names of its objects."""

    head: Hash
    body: Hash


class ArrayFields(Schema, frozen=True):
    """The body of an `Array`."""

    dtype: Annotated[str, Meta(pattern=r"^uint8\Z")]
    shape: Annotated[
        list[Annotated[int, Meta(ge=0, le=MAX_PAYLOAD_BYTES)]], Meta(min_length=1, max_length=1)
    ]
    stype: Annotated[str, Meta(pattern=r"^bytes\Z")]
    arraychunk_ids: Annotated[
        list[Annotated[int, Meta(ge=0, le=MAX_CHUNKS)]], Meta(max_length=MAX_CHUNKS)
    ]


def is_hash(name: str) -> bool:
    """Return whether a name is a SHA-256 in lower-case hexadecimal."""
    return len(name) == 64 and not set(name) - set("0123456789abcdef")


# ── envelopes ──


def check_metadata(
    metadata: Metadata, *, run_id: int, source: int, destination: int, is_reply: bool
) -> None:
    """Reject an envelope whose fields differ from ours.

    Args:
        metadata: The envelope.
        run_id: Flower's id of the run.
        source: The sending node.
        destination: The receiving node.
        is_reply: Whether it answers a message.

    Raises:
        PayloadError: If a field differs; the message names it.
    """
    expected_fields: dict[str, int | str] = {
        "run_id": run_id,
        "src_node_id": source,
        "dst_node_id": destination,
        "message_type": MessageType.TRAIN,
        "group_id": "",
    }
    for field, expected in expected_fields.items():
        value = getattr(metadata, field)
        if value != expected:
            shown = printable(repr(value), 80)
            raise PayloadError(f"metadata.{field} is {shown}; expected {expected!r}")
    # message ids
    _check_hash(metadata.message_id, "metadata.message_id is")
    answered = metadata.reply_to_message_id
    is_valid = is_hash(answered) if is_reply else answered == ""
    if not is_valid:
        raise PayloadError(f"metadata.reply_to_message_id is {printable(repr(answered), 80)}")
    # times
    if not 0 < metadata.ttl <= MAX_TTL:  # NaN compares false
        raise PayloadError(
            f"metadata.ttl is {metadata.ttl!r}; expected a positive number of seconds"
        )
    if not EARLIEST <= metadata.created_at <= LATEST:
        raise PayloadError(f"metadata.created_at is {metadata.created_at!r}; expected a time")


def check_task(metadata: Metadata, *, node_id: int) -> None:
    """Reject a message whose envelope is not that of a task for this node (called on the node).

    Raises:
        PayloadError: If it is not.
    """
    check_metadata(
        metadata,
        run_id=metadata.run_id,
        source=SUPERLINK_NODE_ID,
        destination=node_id,
        is_reply=False,
    )


def check_envelope(message: MessageProto, tree: ObjectTree) -> None:
    """Reject a message, before its content arrives, whose tree does not fit its type.

    Raises:
        PayloadError: If the tree's root is not the message, an id is not a SHA-256, or the shape
            is wrong.
    """
    has_content = message.HasField("content")
    has_error = message.HasField("error")
    if has_content == has_error:
        raise PayloadError("a message has either content or an error")
    if has_content and message.content.ByteSize():
        raise PayloadError("content comes as objects, not in the envelope")
    if tree.object_id != message.metadata.message_id:
        shown = printable(repr(tree.object_id), 80)
        raise PayloadError(
            f"the object tree's root is {shown}; expected the message, "
            f"{message.metadata.message_id}"
        )
    if not has_error:
        check_tree(tree)
    elif len(tree.children):
        raise PayloadError("an error has no parts")


class _Level(NamedTuple):
    """One level of an object tree, and how many objects it may contain."""

    kind: str
    min_objects: int
    max_objects: int


_LEVELS = (
    _Level("message", 1, 1),
    _Level("record", 1, 1),
    _Level("field", 2, 2),
    _Level("array", 1, 2),  # equal head and body are one object
    _Level("chunk", 0, MAX_CHUNKS),
    _Level("part", 0, 0),
)
"""The message, its record, the record's payload and limits, head and body, their chunks."""


def check_tree(tree: ObjectTree) -> None:
    """Reject a tree whose objects are not those of one of our messages.

    Each level is counted before it is traversed, so a huge tree costs no more than a small one.

    Raises:
        PayloadError: If an id is not a SHA-256, a level has too few or too many objects, or an
            object occurs on two levels.
    """
    seen: set[str] = set()
    nodes = [tree]
    for kind, min_objects, max_objects in _LEVELS:
        if not min_objects <= len(nodes) <= max_objects:
            raise PayloadError(
                f"the object tree has {len(nodes)} objects where a {kind} is expected"
            )
        names = {node.object_id for node in nodes}
        for name in names:
            _check_hash(name, "the object tree names")
        if names & seen:
            raise PayloadError("the object tree names an object twice, at different depths")
        seen |= names
        num_children = sum(len(node.children) for node in nodes)
        if num_children > 2 * MAX_CHUNKS:
            raise PayloadError(
                f"the object tree has {num_children} objects below the {kind}; at most "
                f"{2 * MAX_CHUNKS}"
            )
        nodes = [child for node in nodes for child in node.children]


def tree_names(tree: ObjectTree) -> Iterator[str]:
    """Yield the names of a checked tree's objects."""
    yield tree.object_id
    for child in tree.children:
        yield from tree_names(child)


def _check_hash(name: str, found_in: str) -> None:
    if not is_hash(name):
        raise PayloadError(f"{found_in} {printable(repr(name), 80)}; expected a SHA-256")


# ── objects ──


def check_objects(root: str, contents: Mapping[str, bytes]) -> None:
    """Reject objects that are not the records of one of our messages, before Flower combines them.

    Args:
        root: The name of the message's own object.
        contents: The bytes of all objects in its tree, by name.

    Raises:
        PayloadError: If an object's type, children or body differ from those in our messages.
    """
    message = _parse_object(root, "Message", contents)
    if len(message.children) != 1:
        raise PayloadError(f"a message has {len(message.children)} records; expected one")

    # the record names payload and limits
    record = _parse_object(message.children[0], "RecordDict", contents)
    fields = parse_json(record.body, RecordDictFields, "RecordDict")
    _check_children(record.children, {fields.payload, fields.limits}, "RecordDict")

    # the payload has head and body, within the size limit
    payload = _parse_object(fields.payload, "ArrayRecord", contents)
    arrays = parse_json(payload.body, ArrayRecordFields, "ArrayRecord")
    _check_children(payload.children, {arrays.head, arrays.body}, "ArrayRecord")
    num_bytes = sum(_array_bytes(array, contents) for array in (arrays.head, arrays.body))
    if num_bytes > MAX_PAYLOAD_BYTES:
        raise PayloadError(f"the payload has {num_bytes} bytes; at most {MAX_PAYLOAD_BYTES}")

    # the limits are one number
    limits = _parse_object(fields.limits, "ConfigRecord", contents)
    _check_children(limits.children, set(), "ConfigRecord")
    _check_limits(limits.body)


def _check_limits(body: bytes) -> None:
    """Reject a `ConfigRecord` that holds anything but one finite number, `seconds`."""
    values = [(item.key, item.value) for item in ConfigRecordProto.FromString(body).items]
    keys = [key for key, _ in values]
    if keys != ["seconds"] or values[0][1].WhichOneof("value") != "double":
        raise PayloadError("ConfigRecord holds something other than one number, seconds")
    seconds = values[0][1].double
    if not math.isfinite(seconds) or seconds < 0:
        raise PayloadError(f"limits.seconds is {seconds!r}")


def _array_bytes(name: str, contents: Mapping[str, bytes]) -> int:
    """Return the size of an array, checking that its chunks, with repetitions, add up to it."""
    array = _parse_object(name, "Array", contents)
    fields = parse_json(array.body, ArrayFields, "Array")
    num_chunks = len(array.children)
    has_duplicates = len(set(array.children)) != num_chunks
    if has_duplicates or any(index >= num_chunks for index in fields.arraychunk_ids):
        raise PayloadError("Array.arraychunk_ids names a chunk that is not there")
    # sizes of the chunks, counting repetitions
    sizes = [_chunk_bytes(chunk, contents) for chunk in array.children]
    if set(fields.arraychunk_ids) != set(range(num_chunks)):
        raise PayloadError("Array.arraychunk_ids leaves out a chunk")
    num_bytes = sum(sizes[index] for index in fields.arraychunk_ids)
    if [num_bytes] != fields.shape:
        raise PayloadError(f"Array.shape is {fields.shape}; its chunks have {num_bytes} bytes")
    return num_bytes


def _chunk_bytes(name: str, contents: Mapping[str, bytes]) -> int:
    children, start = _parse_header(name, "ArrayChunk", contents)
    _check_children(children, set(), "ArrayChunk")
    return len(contents[name]) - start


class _Object(NamedTuple):
    """An object: the names of its children and its body."""

    children: list[str]
    body: bytes


def _parse_object(name: str, kind: str, contents: Mapping[str, bytes]) -> _Object:
    """Return an object's children and body, if it has this type and is not too large."""
    children, start = _parse_header(name, kind, contents)
    content = contents[name]
    if len(content) > MAX_OBJECT_BYTES:
        raise PayloadError(f"{kind} has {len(content)} bytes; at most {MAX_OBJECT_BYTES}")
    return _Object(children, content[start:])


def _parse_header(name: str, kind: str, contents: Mapping[str, bytes]) -> tuple[list[str], int]:
    """Return the names of an object's children and where its body starts.

    An object consists of a line of text (its type, its children's names and its body's length), a
    zero byte and the body.
    """
    content = contents.get(name)
    if content is None:
        raise PayloadError(f"{kind} is not among the objects that came")
    end = content.find(b"\0", 0, MAX_OBJECT_BYTES)
    try:
        header = content[: max(end, 0)].decode("ascii")
        object_type, names, size = header.split(" ")
    except ValueError:
        raise PayloadError(f"{kind} has no header") from None
    if object_type != kind:
        raise PayloadError(f"{printable(object_type, 80)} came where {kind} is expected")
    num_bytes = len(content) - end - 1
    if size != str(num_bytes):
        raise PayloadError(f"{kind} says it has {printable(size, 80)} bytes; it has {num_bytes}")
    children = names.split(",") if names else []
    if len(children) > MAX_CHUNKS or not all(map(is_hash, children)):
        raise PayloadError(f"{kind} names children that are not SHA-256")
    return children, end + 1


def _check_children(children: list[str], expected: set[str], kind: str) -> None:
    if set(children) != expected or len(children) != len(expected):
        raise PayloadError(f"{kind} has other children than its body names")
