"""The declared shape of Flower's records, as we send them: checked before anything of Flower's uses them.

A message of ours, a task or a reply, is always the same few records, whichever way it goes::

    Message
      RecordDict
        ArrayRecord "payload"     Array "head", Array "body", each in chunks of bytes
        ConfigRecord "limits"     one float, "seconds"

Flower carries it as a tree of objects named by their SHA-256, each uploaded for itself, and puts them together again
on arrival. It would do so with any tree: one of 200,000 children, one whose root is another client's message, an
array that names one chunk a million times. Nothing but the shape above passes here. A reply may also be an error,
which is a message without records.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

from flwr.app import MessageType
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata, ObjectTree
from flwr.proto.recorddict_pb2 import ConfigRecord as ConfigRecordProto
from msgspec import Meta

from fedmomentum.errors import PayloadError
from fedmomentum.flower.transport import MAX_PAYLOAD_BYTES
from fedmomentum.schema import Hash, Schema, parse_json, printable

MAX_CHUNKS = MAX_PAYLOAD_BYTES // 2**20 + 2
"""Of one array. Flower's chunks have 5 MB; smaller ones may be asked for in the environment."""
MAX_PART_BYTES = 2**18
"""The largest object that is no chunk: the array that names all its chunks."""
MAX_TTL = 366 * 86400.0
EARLIEST = 1740700800.0
"""Flower's own limit: no message is older than March 2025."""
LATEST = 2.0**35
"""Seconds; a thousand years from now. What lies beyond overflows conversions of time."""


class Fields(Schema, frozen=True):
    """The body of a `RecordDict`: names to objects."""

    payload: Hash
    limits: Hash


class Arrays(Schema, frozen=True):
    """The body of an `ArrayRecord`: names to objects."""

    head: Hash
    body: Hash


class ArrayFields(Schema, frozen=True):
    """The body of an `Array`."""

    dtype: Annotated[str, Meta(pattern=r"^uint8\Z")]
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=MAX_PAYLOAD_BYTES)]], Meta(min_length=1, max_length=1)]
    stype: Annotated[str, Meta(pattern=r"^bytes\Z")]
    arraychunk_ids: Annotated[list[Annotated[int, Meta(ge=0, le=MAX_CHUNKS)]], Meta(max_length=MAX_CHUNKS)]


def is_hash(name: str) -> bool:
    """Return whether this is a SHA-256 in lower-case hexadecimal."""
    return len(name) == 64 and not set(name) - set("0123456789abcdef")


def check_metadata(metadata: Metadata, *, run_id: int, source: int, destination: int, is_reply: bool) -> None:
    """Refuse an envelope with other fields than ours.

    Args:
        metadata: The envelope.
        run_id: Flower's number of the run.
        source: The node that sends it.
        destination: The node that it is for.
        is_reply: Whether it answers a message.

    Raises:
        PayloadError: If it has other fields; the message names the field.
    """
    wanted: dict[str, int | str] = {
        "run_id": run_id,
        "src_node_id": source,
        "dst_node_id": destination,
        "message_type": MessageType.TRAIN,
        "group_id": "",
    }
    for field, value in wanted.items():
        if (got := getattr(metadata, field)) != value:
            raise PayloadError(f"metadata.{field} is {printable(repr(got), 80)}; wanted {value!r}")
    if not is_hash(metadata.message_id):
        raise PayloadError(f"metadata.message_id is {printable(repr(metadata.message_id), 80)}; wanted a SHA-256")
    answered = metadata.reply_to_message_id
    if not (is_hash(answered) if is_reply else answered == ""):
        raise PayloadError(f"metadata.reply_to_message_id is {printable(repr(answered), 80)}")
    if not 0 < metadata.ttl <= MAX_TTL:  # NaN compares false
        raise PayloadError(f"metadata.ttl is {metadata.ttl!r}; wanted a positive number of seconds")
    if not EARLIEST <= metadata.created_at <= LATEST:
        raise PayloadError(f"metadata.created_at is {metadata.created_at!r}; wanted a time")


def check_envelope(message: MessageProto, tree: ObjectTree) -> None:
    """Refuse a message, still without its content, whose tree is not the one that its kind has.

    Raises:
        PayloadError: If the tree's root is not the message, an id is no SHA-256, or the shape is another.
    """
    has_content, has_error = message.HasField("content"), message.HasField("error")
    if has_content == has_error:
        raise PayloadError("a message has either content or an error")
    if has_content and message.content.ByteSize():
        raise PayloadError("content comes as objects, not in the envelope")
    if tree.object_id != message.metadata.message_id:
        raise PayloadError(
            f"the object tree's root is {printable(repr(tree.object_id), 80)}; wanted the message, "
            f"{message.metadata.message_id}"
        )
    if has_error:
        if len(tree.children):
            raise PayloadError("an error has no parts")
        return
    check_tree(tree)


def check_tree(tree: ObjectTree) -> None:
    """Refuse a tree of other objects than a message of ours has.

    Every level is counted before it is entered, so a huge tree costs no more than a small one.

    Raises:
        PayloadError: If an id is no SHA-256, a level has too few or too many objects, or an object lies on two levels.
    """
    seen: set[str] = set()
    level = [tree]
    # the message, its record, arrays and limits, head and body (one object where both are equal), their chunks
    for kind, least, most in (
        ("message", 1, 1), ("record", 1, 1), ("field", 2, 2), ("array", 1, 2), ("chunk", 0, MAX_CHUNKS), ("part", 0, 0)
    ):  # fmt: skip
        if not least <= len(level) <= most:
            raise PayloadError(f"the object tree has {len(level)} objects where a {kind} is wanted")
        names = {node.object_id for node in level}
        for name in names:
            if not is_hash(name):
                raise PayloadError(f"the object tree names {printable(repr(name), 80)}; wanted a SHA-256")
        if names & seen:
            raise PayloadError("the object tree names an object twice, at different depths")
        seen |= names
        count = sum(len(node.children) for node in level)
        if count > 2 * MAX_CHUNKS:
            raise PayloadError(f"the object tree has {count} objects below the {kind}; at most {2 * MAX_CHUNKS}")
        level = [child for node in level for child in node.children]


def check_objects(root: str, contents: Mapping[str, bytes]) -> None:
    """Refuse objects that are not the records of a message of ours, before Flower puts them together.

    Args:
        root: The name of the message's own object.
        contents: Name to bytes, of all objects of its tree.

    Raises:
        PayloadError: If an object has another type, other children or another body than a message of ours has there.
    """
    record = _only(_children(root, "Message", contents), "a message", "record")
    names, body = _part(record, "RecordDict", contents)
    fields = parse_json(body, Fields, "RecordDict")
    _same(names, {fields.payload, fields.limits}, "RecordDict")

    names, body = _part(fields.payload, "ArrayRecord", contents)
    arrays = parse_json(body, Arrays, "ArrayRecord")
    _same(names, {arrays.head, arrays.body}, "ArrayRecord")
    total = sum(_array_bytes(array, contents) for array in (arrays.head, arrays.body))
    if total > MAX_PAYLOAD_BYTES:
        raise PayloadError(f"the payload has {total} bytes; at most {MAX_PAYLOAD_BYTES}")

    names, body = _part(fields.limits, "ConfigRecord", contents)
    _same(names, set(), "ConfigRecord")
    limits = ConfigRecordProto.FromString(body)
    values = [(item.key, item.value) for item in limits.items]
    if len(values) != 1 or values[0][0] != "seconds" or values[0][1].WhichOneof("value") != "double":
        raise PayloadError("ConfigRecord holds something else than one number, seconds")
    if not math.isfinite(values[0][1].double) or values[0][1].double < 0:
        raise PayloadError(f"limits.seconds is {values[0][1].double!r}")


def _array_bytes(name: str, contents: Mapping[str, bytes]) -> int:
    """Return how many bytes an array has, if its chunks, each as often as it is named, add up to what it says."""
    names, body = _part(name, "Array", contents)
    fields = parse_json(body, ArrayFields, "Array")
    if any(number >= len(names) for number in fields.arraychunk_ids) or len(set(names)) != len(names):
        raise PayloadError("Array.arraychunk_ids names a chunk that is not there")
    sizes = [_chunk_bytes(chunk, contents) for chunk in names]
    if set(fields.arraychunk_ids) != set(range(len(names))):
        raise PayloadError("Array.arraychunk_ids leaves out a chunk")
    total = sum(sizes[number] for number in fields.arraychunk_ids)
    if [total] != fields.shape:
        raise PayloadError(f"Array.shape is {fields.shape}; its chunks have {total} bytes")
    return total


def _chunk_bytes(name: str, contents: Mapping[str, bytes]) -> int:
    names, start = _head(name, "ArrayChunk", contents)
    _same(names, set(), "ArrayChunk")
    return len(contents[name]) - start


def _part(name: str, kind: str, contents: Mapping[str, bytes]) -> tuple[list[str], bytes]:
    """Return an object's children and body."""
    names, start = _head(name, kind, contents)
    content = contents[name]
    if len(content) > MAX_PART_BYTES:
        raise PayloadError(f"{kind} has {len(content)} bytes; at most {MAX_PART_BYTES}")
    return names, content[start:]


def _children(name: str, kind: str, contents: Mapping[str, bytes]) -> list[str]:
    return _part(name, kind, contents)[0]


def _head(name: str, kind: str, contents: Mapping[str, bytes]) -> tuple[list[str], int]:
    """Return an object's children, and where its body starts.

    An object is a line of text, its type, its children's names and its body's length, then a zero byte and the body.
    """
    content = contents.get(name)
    if content is None:
        raise PayloadError(f"{kind} is not among the objects that came")
    end = content.find(b"\0", 0, MAX_PART_BYTES)
    try:
        got, children, size = content[: max(end, 0)].decode("ascii").split(" ")
    except ValueError:
        raise PayloadError(f"{kind} has no head") from None
    if got != kind:
        raise PayloadError(f"{printable(got, 80)} came where {kind} is wanted")
    if size != str(len(content) - end - 1):
        raise PayloadError(f"{kind} says it has {printable(size, 80)} bytes; it has {len(content) - end - 1}")
    names = children.split(",") if children else []
    if len(names) > MAX_CHUNKS or not all(map(is_hash, names)):
        raise PayloadError(f"{kind} names children that are no SHA-256")
    return names, end + 1


def _only(names: list[str], whose: str, what: str) -> str:
    if len(names) != 1:
        raise PayloadError(f"{whose} has {len(names)} {what}s; wanted one")
    return names[0]


def _same(got: list[str], wanted: set[str], kind: str) -> None:
    if set(got) != wanted or len(got) != len(wanted):
        raise PayloadError(f"{kind} has other children than its body names")


def tree_names(tree: ObjectTree) -> Iterator[str]:
    """Yield the names of a checked tree's objects."""
    yield tree.object_id
    for child in tree.children:
        yield from tree_names(child)


def check_task(metadata: Metadata, *, node_id: int) -> None:
    """Refuse, at a node, a message whose envelope is not that of a task for this node.

    Raises:
        PayloadError: If it is not.
    """
    run_id = metadata.run_id
    check_metadata(metadata, run_id=run_id, source=SUPERLINK_NODE_ID, destination=node_id, is_reply=False)
