"""Flower's records from an admitted node that lies, and from a server that does: refused by field, and nothing ends."""

import math
import random
import time
import tracemalloc
from types import SimpleNamespace

import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)  # isort: skip

from fedmomentum.errors import PayloadError
from fedmomentum.flower import join as join_module
from fedmomentum.flower.fleet_client import ConnectionLost
from fedmomentum.flower.join import _reply
from fedmomentum.flower.payloads import pack_payload
from fedmomentum.flower.records import MAX_CHUNKS, check_envelope, check_objects, check_tree
from fedmomentum.flower.transport import FlowerTransport
from fedmomentum.protocol.transport import Failure
from tests.flower.network import (
    Stranger,
    as_node,
    ask,
    connect,
    fetch,
    make_keys,
    payload_of,
    round_trip,
    running,
)
from tests.runs import Events

from flwr.app.message import make_message, remove_content_from_message  # isort: skip
from flwr.common.serde import message_to_proto  # isort: skip
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest  # isort: skip
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest  # isort: skip
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest  # isort: skip
from flwr.proto.message_pb2 import PushObjectRequest  # isort: skip
from flwr.proto.node_pb2 import Node  # isort: skip
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree  # isort: skip


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys"), "north", "south")


@pytest.fixture(scope="module")
def link(keys):
    with running(keys) as found:
        yield found


@pytest.fixture(scope="module")
def stranger(link, keys):
    found = Stranger(link.port, keys)
    yield found
    found.close()


def objects_of(message):
    return {name: part.deflate() for name, part in get_all_nested_objects(message).items()}


def ours(content=None):
    """A message of ours."""
    metadata = Metadata(
        run_id=1,
        message_id="",
        src_node_id=1,
        dst_node_id=5,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=60.0,
        message_type="train",
    )
    return make_message(
        metadata, content=content or pack_payload(b"\x05\0\0\0\0\0\0\0hello world", 3.0)
    )


# ── the shape itself ──


def test_our_own_messages_have_the_expected_shape_whatever_they_contain():
    for payload in (
        b"",
        b"short",
        bytes(20),
        random.Random(0).randbytes(11 * 2**20),
        bytes(11 * 2**20),
    ):
        message = ours(pack_payload(payload, 1.0))
        tree = get_object_tree(message)
        check_tree(tree)
        check_objects(tree.object_id, objects_of(message))


def shape(*levels):
    """A tree with so many objects on each level, all below the first of the level above."""
    number = iter(range(10**7))
    root = ObjectTree(object_id=f"{next(number):064x}")
    above = root
    for count in levels:
        for _ in range(count):
            above.children.append(ObjectTree(object_id=f"{next(number):064x}"))
        above = above.children[0]
    return root


@pytest.mark.parametrize(
    "levels",
    [
        (),
        (2,),
        (1,),
        (1, 1),
        (1, 3),
        (1, 2, 3),
        (1, 2),
        (1, 2, 2, MAX_CHUNKS + 1),
        (1, 2, 2, 1, 1),
        (200_000,),
    ],
    ids=str,
)
def test_trees_of_another_shape_are_refused_and_cost_nothing(levels):
    tree = shape(*levels)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match="the object tree has"):
            check_tree(tree)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**22


def test_a_deep_chain_is_refused():
    tree = ObjectTree(object_id="0" * 64)
    at = tree
    for number in range(1, 90):
        at = at.children.add(object_id=f"{number:064x}")
    with pytest.raises(PayloadError, match="has 1 objects where a field is expected"):
        check_tree(tree)


@pytest.mark.parametrize(
    "name", ["", "x" * 64, "A" * 64, "0" * 63, "0" * 65, "../../x", "0" * 63 + "\n", "٣" * 64]
)
def test_names_that_are_no_hash_are_refused_on_every_level(name):
    for depth in range(5):
        tree = shape(1, 2, 2, 1)
        at = tree
        for _ in range(depth):
            at = at.children[0]
        at.object_id = name
        with pytest.raises(PayloadError, match="expected a SHA-256"):
            check_tree(tree)


def test_an_object_that_lies_within_itself_is_refused():
    tree = shape(1, 2, 2, 1)
    tree.children[0].children[0].children[0].children[0].object_id = tree.object_id
    with pytest.raises(PayloadError, match="names an object twice"):
        check_tree(tree)


def with_head(content, **changes):
    """An object with another type, children or length in its head."""
    head, _, body = content.partition(b"\0")
    kind, children, size = head.decode().split(" ")
    fields = {"kind": kind, "children": children, "size": size, "body": body} | changes
    return (
        f"{fields['kind']} {fields['children']} {fields['size']}".encode() + b"\0" + fields["body"]
    )


def with_body(content, body):
    return with_head(content, body=body, size=len(body))


def named(objects, kind, number=0):
    return [name for name, content in objects.items() if content.startswith(kind.encode() + b" ")][
        number
    ]


BAD_BODIES = [
    (
        "Array",
        b'{"dtype": "uint8", "shape": [5], "stype": "bytes", "arraychunk_ids": [1]}',
        "chunk that is not there",
    ),
    (
        "Array",
        b'{"dtype": "uint8", "shape": [5], "stype": "bytes", "arraychunk_ids": [-1]}',
        "arraychunk_ids",
    ),
    (
        "Array",
        b'{"dtype": "uint8", "shape": [5], "stype": "bytes", "arraychunk_ids": []}',
        "leaves out a chunk",
    ),
    (
        "Array",
        b'{"dtype": "uint8", "shape": [9], "stype": "bytes", "arraychunk_ids": [0]}',
        "its chunks have",
    ),
    ("Array", b'{"dtype": "uint8", "shape": [], "stype": "bytes", "arraychunk_ids": [0]}', "shape"),
    (
        "Array",
        b'{"dtype": "object", "shape": [5], "stype": "bytes", "arraychunk_ids": [0]}',
        "dtype",
    ),
    (
        "Array",
        b'{"dtype": "uint8", "shape": [5], "stype": "numpy.ndarray", "arraychunk_ids": [0]}',
        "stype",
    ),
    (
        "Array",
        b'{"dtype": "uint8", "shape": [%s], "stype": "bytes", "arraychunk_ids": [0]}'
        % (b"9" * 5000),
        "JSON|sh",
    ),
    ("Array", b"[" * 100_000, "JSON|Expected"),
    ("Array", b"\xff\xfe", "JSON"),
    ("Array", b"null", "Expected"),
    ("ArrayRecord", b"{}", "head"),
    ("ArrayRecord", b'{"head": "%s", "body": "%s"}' % (b"0" * 64, b"1" * 64), "other children"),
    ("RecordDict", b'{"payload": 1, "limits": 2}', "Expected"),
    ("RecordDict", b'{"payload": "%s"}' % (b"0" * 64), "limits"),
    ("ConfigRecord", b"", "something other"),
    ("ConfigRecord", b"\xff\xff\xff", "DecodeError|Error"),
]


@pytest.mark.parametrize(("kind", "body", "words"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_objects_with_another_body_are_refused_by_name(kind, body, words):
    message = ours()
    objects = objects_of(message)
    name = named(objects, kind)
    objects[name] = with_body(objects[name], body)
    with pytest.raises(Exception, match=words) as raised:
        check_objects(message.object_id, objects)
    assert type(raised.value).__name__ in ("PayloadError", "DecodeError")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "MetricRecord"}, "MetricRecord came where"),
        ({"kind": "Message"}, "Message came where"),
        ({"kind": "x" * 100_000}, "came where"),
        ({"children": "0" * 64}, "ArrayChunk is not among the objects"),
        (
            {"children": ",".join(["0" * 64] * (MAX_CHUNKS + 1))},
            "not SHA-256|is not there|bytes; at most",
        ),
        ({"children": "nothing"}, "not SHA-256"),
        ({"size": "-1"}, "says it has"),
        ({"size": "9" * 5000}, "says it has"),
        ({"size": "1 2"}, "no header"),
    ],
    ids=range(9),
)
def test_objects_with_another_head_are_refused_by_name(change, words):
    message = ours()
    objects = objects_of(message)
    name = named(objects, "Array")
    objects[name] = with_head(objects[name], **change)
    with pytest.raises(PayloadError, match=words):
        check_objects(message.object_id, objects)


def test_one_chunk_named_a_million_times_is_refused_before_it_is_joined():
    """Five megabytes would become five terabytes."""
    message = ours()
    objects = objects_of(message)
    name = named(objects, "Array")
    body = b'{"dtype": "uint8", "shape": [5000000], "stype": "bytes", "arraychunk_ids": [%s]}'
    objects[name] = with_body(objects[name], body % b",".join([b"0"] * 100_000))
    with pytest.raises(PayloadError, match="arraychunk_ids|length"):
        check_objects(message.object_id, objects)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
def test_limits_that_are_no_duration_are_refused(seconds):
    content = RecordDict(
        {"payload": pack_payload(b"x")["payload"], "limits": ConfigRecord({"seconds": seconds})}
    )
    message = ours(content)
    with pytest.raises(PayloadError, match="limits.seconds"):
        check_objects(message.object_id, objects_of(message))


def test_what_is_not_among_the_objects_is_refused():
    message = ours()
    for missing in objects_of(message):
        objects = objects_of(message)
        del objects[missing]
        with pytest.raises(PayloadError, match="is not among the objects"):
            check_objects(message.object_id, objects)


def test_random_changes_are_refused_or_harmless():
    """A thousand flipped, cut and doubled pieces: PayloadError or protobuf's own error, never anything else."""
    generator, message = random.Random(7), ours()
    valid_objects, refused = objects_of(message), 0
    for _ in range(1000):
        objects = dict(valid_objects)
        name = generator.choice(sorted(objects))
        content = bytearray(objects[name])
        at = generator.randrange(len(content))
        how = generator.randrange(3)
        if how == 0:
            content[at] ^= 1 << generator.randrange(8)
        elif how == 1:
            del content[at : at + generator.randrange(1, 9)]
        else:
            content[at:at] = content[at : at + generator.randrange(1, 9)] or b"x"
        objects[name] = bytes(content)
        try:
            check_objects(message.object_id, objects)
        except PayloadError:
            refused += 1
        except Exception as error:
            assert type(error).__name__ == "DecodeError", repr(error)
            refused += 1
    assert (
        refused > 700
    )  # what passes changed a chunk's bytes, or the message's own body, which the hash covers


# ── an admitted node that lies ──


class Liar:
    """The node north, which has a pending request, and what it sends."""

    def __init__(self, link, keys, stranger):
        self.link, self.stranger, self.keys = link, stranger, keys

    def __enter__(self):
        self.connection = connect(self.link.port, self.keys, "north")
        self.connection.__enter__()
        self.question = ask(self.link, "north", b"task")
        self.message = fetch(self.connection)
        self.node = Node(node_id=self.message.metadata.dst_node_id)
        return self

    def __exit__(self, *error):
        self.connection._lost = None
        self.connection.__exit__(*error)

    def post(self, path, request):
        return self.stranger.post(path, request, headers=self.stranger.signature("north"))

    def request(self, content):
        """A valid answer's request, to be corrupted."""
        with as_node():
            reply = Message(content, reply_to=self.message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[0.0],
        )

    def reason(self):
        """The reason that is given to the code that waits for the answer."""
        (reply,) = self.link.grid.pull_messages([self.question])
        return reply.error.reason


@pytest.fixture
def liar(link, keys, stranger):
    with Liar(link, keys, stranger) as found:
        yield found


def spoil(request, path, value):
    """Set a field, such as `messages_list.0.metadata.ttl`."""
    *way, last = path.split(".")
    at = request
    for step in way:
        at = at[int(step)] if step.isdigit() else getattr(at, step)
    setattr(at, last, value)


SPOILT = [
    ("message_object_trees.0.object_id", "", "root is ''"),
    ("message_object_trees.0.object_id", "x" * 64, "root is 'xxx"),
    ("message_object_trees.0.object_id", "0" * 64, "root is '000"),
    ("message_object_trees.0.children.0.object_id", "../../etc/passwd", "expected a SHA-256"),
    ("messages_list.0.metadata.message_id", "", "message_id is ''"),
    ("messages_list.0.metadata.message_id", "m" * 100_000, "message_id is 'mmm"),
    ("messages_list.0.metadata.run_id", 7, "run_id is 7"),
    ("messages_list.0.metadata.dst_node_id", 7, "dst_node_id is 7"),
    ("messages_list.0.metadata.reply_to_message_id", "", "reply_to_message_id is ''"),
    ("messages_list.0.metadata.group_id", "g" * 100_000, "group_id is 'ggg"),
    ("messages_list.0.metadata.message_type", "query", "message_type is 'query'"),
    ("messages_list.0.metadata.message_type", "\x1b[2J", "message_type is"),
    ("messages_list.0.metadata.ttl", math.nan, "ttl is nan"),
    ("messages_list.0.metadata.ttl", math.inf, "ttl is inf"),
    ("messages_list.0.metadata.ttl", -1.0, "ttl is -1.0"),
    ("messages_list.0.metadata.ttl", 1e300, "ttl is 1e"),
    ("messages_list.0.metadata.created_at", math.nan, "created_at is nan"),
    ("messages_list.0.metadata.created_at", math.inf, "created_at is inf"),
    ("messages_list.0.metadata.created_at", 1e300, "created_at is 1e"),
    ("messages_list.0.metadata.created_at", 0.0, "created_at is 0"),
]


@pytest.mark.parametrize(("path", "value", "words"), SPOILT, ids=lambda value: str(value)[:45])
def test_an_answer_with_a_corrupted_envelope_ends_that_nodes_part(liar, link, path, value, words):
    request = liar.request(pack_payload(b"reply"))
    spoil(request, path, value)
    assert liar.post("push-messages", request).status_code == 403
    reason = liar.reason()
    assert reason.startswith("its answer was refused: ") and words in reason and len(reason) < 400
    assert reason.isprintable()
    assert round_trip(link, liar.connection, "north", b"next", b"answer") == (
        b"next",
        b"answer",
    )


def spoil_children(request):
    request.message_object_trees[0].children.extend(
        [ObjectTree(object_id=f"{n:064x}") for n in range(20_000)]
    )


def spoil_two_trees(request):
    request.message_object_trees.add(object_id="0" * 64)


def spoil_no_tree(request):
    del request.message_object_trees[:]


def spoil_two_messages(request):
    request.messages_list.append(request.messages_list[0])


def spoil_content(request):
    request.messages_list[0].content.items.add(key="x")


def spoil_both(request):
    request.messages_list[0].error.reason = "both"


def spoil_runtime(request):
    request.clientapp_runtime_list[:] = [math.nan]


def spoil_runtimes(request):
    request.clientapp_runtime_list[:] = [0.0] * 10_000


@pytest.mark.parametrize(
    "spoiler",
    [
        spoil_children,
        spoil_two_trees,
        spoil_no_tree,
        spoil_two_messages,
        spoil_content,
        spoil_both,
        spoil_runtime,
        spoil_runtimes,
    ],
)
def test_an_answer_of_another_build_ends_that_nodes_part(liar, link, spoiler):
    request = liar.request(pack_payload(b"reply"))
    spoiler(request)
    assert liar.post("push-messages", request).status_code == 403
    assert liar.reason().startswith("its answer was refused: ")
    assert round_trip(link, liar.connection, "north", b"next", b"answer") == (
        b"next",
        b"answer",
    )


def test_a_tree_of_two_hundred_thousand_is_refused_unread(liar, link):
    request = liar.request(pack_payload(b"reply"))
    names = [ObjectTree(object_id=f"{number:064x}") for number in range(200_000)]
    request.message_object_trees[0].children.extend(names)
    assert liar.post("push-messages", request).status_code == 413
    assert "push-messages takes at most 2097152" in liar.reason()


CONTENTS = [
    RecordDict(),
    RecordDict({"payload": MetricRecord({"x": 1.0}), "limits": ConfigRecord({"seconds": 0.0})}),
    RecordDict(
        {"payload": pack_payload(b"x")["payload"], "limits": ConfigRecord({"seconds": math.nan})}
    ),
    RecordDict({"payload": pack_payload(b"x")["payload"], "limits": ConfigRecord({"other": 0.0})}),
    RecordDict(
        {"payload": pack_payload(b"x")["payload"], "limits": ConfigRecord({"seconds": "soon"})}
    ),
    RecordDict({"other": pack_payload(b"x")["payload"], "limits": ConfigRecord({"seconds": 0.0})}),
    RecordDict(
        {
            "payload": ArrayRecord(
                {
                    "head": Array("uint8", (3,), "bytes", b"x"),
                    "body": Array("uint8", (0,), "bytes", b""),
                }
            ),
            "limits": ConfigRecord({"seconds": 0.0}),
        }
    ),
    RecordDict(
        {
            "payload": ArrayRecord(
                {
                    "head": Array("object", (1,), "bytes", b"x"),
                    "body": Array("uint8", (0,), "bytes", b""),
                }
            ),
            "limits": ConfigRecord({"seconds": 0.0}),
        }
    ),
    RecordDict({"payload": ArrayRecord(), "limits": ConfigRecord({"seconds": 0.0})}),
]


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_an_answer_with_other_records_ends_that_nodes_part(liar, link, content):
    with as_node():
        try:
            liar.connection.push(Message(content, reply_to=liar.message))
        except ConnectionLost:
            liar.connection._lost = None
    reason = liar.reason()
    assert reason.startswith(("its answer was refused: ", "its answer could not be read: ")), reason
    assert round_trip(link, liar.connection, "north", b"next", b"answer") == (
        b"next",
        b"answer",
    )


def test_a_megabyte_of_error_text_becomes_a_line(liar, link):
    """And quickly: nothing on its way to the report takes time that grows with its square."""
    text = "\x1b]0;owned\x07" + "é" * 500_000 + "\n2026-01-01 INFO forged"
    with as_node():
        liar.connection.push(Message(Error(2, text), reply_to=liar.message))
    events = []
    transport = FlowerTransport(
        link.grid,
        link,
        round_timeout=5,
        join_timeout=5,
        min_valid_fraction=1.0,
        callback=Events(lambda event, facts: events.append((event, facts))),
    )
    pending = {"north": SimpleNamespace(message_id=liar.question, disconnected_at=None)}
    # The processor time of this process: a busy machine does not count.
    started = time.process_time()
    ((client, failure),) = transport._collect(pending)
    assert time.process_time() - started < 5
    assert client == "north" and isinstance(failure, Failure)
    assert failure.reason.startswith("\ufffd]0;owned\ufffdéé") and len(failure.reason) == 500
    assert failure.reason.isprintable() or set(failure.reason) - {"\ufffd"} <= set("]0;ownedé…")
    assert events == [("failed", {"client": "north", "reason": failure.reason})]


def test_only_flower_itself_can_report_a_node_as_gone(liar, link):
    """A node that says of itself that it is not available has failed; the round does not wait for it."""
    with as_node():
        liar.connection.push(Message(Error(5, "Node unavailable"), reply_to=liar.message))
    transport = FlowerTransport(
        link.grid, link, round_timeout=5, join_timeout=5, min_valid_fraction=1.0
    )
    pending = {"north": SimpleNamespace(message_id=liar.question, disconnected_at=None)}
    assert list(transport._collect(pending)) == [("north", Failure("Node unavailable"))]


def test_the_same_answer_twice_is_one_answer(liar, link):
    request = liar.request(pack_payload(b"reply"))
    first, second = (liar.post("push-messages", request) for _ in range(2))
    assert first.status_code == second.status_code == 200
    other = liar.request(pack_payload(b"another reply"))
    assert liar.post("push-messages", other).status_code == 200  # and has no effect
    with as_node():
        reply = Message(pack_payload(b"reply"), reply_to=liar.message)
        liar.connection.push(reply)
    assert len(list(link.grid.pull_messages([liar.question]))) <= 1
    assert round_trip(link, liar.connection, "north", b"next", b"answer") == (
        b"next",
        b"answer",
    )


def test_endless_answers_leave_nothing_behind(liar, link):
    """Each would open a session in Flower's memory that nobody closes."""
    sessions = link._state._object_push_sessions
    codes = [
        liar.post("push-messages", liar.request(pack_payload(b"reply %d" % n))).status_code
        for n in range(40)
    ]
    assert codes[:16] == [200] * 16 and set(codes[16:]) == {429}
    before = len(sessions)
    list(link.grid.pull_messages([liar.question]))
    link.withdraw([liar.question])
    link._state.delete_messages({liar.question})
    for number in range(40):  # to a question that is over
        assert (
            liar.post("push-messages", liar.request(pack_payload(b"late %d" % number))).status_code
            == 200
        )
    assert len(sessions) == before


def test_half_an_answer_can_be_discarded(liar, link):
    """As when its node died while it was sending it."""
    state = link._state
    before = len(state.object_store), len(state.message_res_store)
    assert liar.post("push-messages", liar.request(pack_payload(b"half"))).status_code == 200
    assert list(link.grid.pull_messages([liar.question])) == []
    assert liar.question in link.grid._arriving and len(state.object_store) > before[0]
    link.discard(liar.question)
    assert liar.question not in link.grid._arriving
    assert liar.question not in state.message_ins_store
    assert liar.node.node_id not in link.ledger.open_tasks
    assert (len(state.object_store), len(state.message_res_store)) == before
    assert round_trip(link, liar.connection, "north", b"next", b"answer") == (b"next", b"answer")


def test_a_node_cannot_delete_a_message_of_another(liar, link, keys, stranger):
    """Confirming a message deletes it, and so would naming it as a part of an answer and ending that answer."""
    with connect(link.port, keys, "south") as south:
        question = ask(link, "south", b"for south")
        confirm = ConfirmMessageReceivedRequest(
            node=liar.node, run_id=link.grid.run.run_id, message_object_id=question
        )
        assert liar.post("confirm-message-received", confirm).status_code == 404
        request = liar.request(pack_payload(b"reply"))
        request.message_object_trees[0].children[0].object_id = question
        assert liar.post("push-messages", request).status_code == 403
        assert "names another message" in liar.reason()
        message = fetch(south)
        assert message is not None and payload_of(message) == b"for south"


def test_other_requests_with_odd_fields_are_refused(liar, link):
    run_id = link.grid.run.run_id
    node = liar.node
    key = liar.stranger._keys.parent / "north.key"
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    from fedmomentum.flower.keys import load_private_key

    public = public_key_to_bytes(load_private_key(key).public_key())
    for path, request in [
        ("send-node-heartbeat", SendNodeHeartbeatRequest(node=node, heartbeat_interval=1800)),
        ("send-node-heartbeat", SendNodeHeartbeatRequest(node=node, heartbeat_interval=math.nan)),
        ("activate-node", ActivateNodeRequest(public_key=public, heartbeat_interval=1800)),
        ("activate-node", ActivateNodeRequest(public_key=public, heartbeat_interval=math.inf)),
        ("pull-messages", PullMessagesRequest(node=node, message_ids=["x"])),
        ("pull-object", PullObjectRequest(node=node, run_id=7, object_id="0" * 64)),
        ("pull-object", PullObjectRequest(node=node, run_id=run_id, object_id="")),
        ("push-object", PushObjectRequest(node=node, run_id=run_id, object_id="0" * 64)),
        ("push-object", PushObjectRequest(node=node, run_id=run_id, object_id="x", session_id="s")),
        (
            "push-object",
            PushObjectRequest(node=node, run_id=run_id, object_id="0" * 64, session_id="s" * 65),
        ),
    ]:
        assert liar.post(path, request).status_code == 403, (path, request)
    assert list(link.online()) == ["north"]


def test_any_other_exception_ends_that_answer_only(link, keys, monkeypatch):
    """Both nodes have answered; north's cannot be put together, south's counts."""
    with connect(link.port, keys, "north") as north, connect(link.port, keys, "south") as south:
        questions = {name: ask(link, name, b"task") for name in ("north", "south")}
        for name, connection in (("north", north), ("south", south)):
            message = fetch(connection)
            with as_node():
                connection.push(Message(pack_payload(f"of {name}".encode()), reply_to=message))
        from fedmomentum.flower import grid as grid_module

        inflated, calls = grid_module._inflate, []

        def fail_once(message, contents):
            calls.append(message)
            if len(calls) == 1:
                raise RecursionError("\x1b[2Jdeep " + "x" * 10_000)
            return inflated(message, contents)

        monkeypatch.setattr(grid_module, "_inflate", fail_once)
        transport = FlowerTransport(
            link.grid, link, round_timeout=5, join_timeout=5, min_valid_fraction=1.0
        )
        pending = {
            name: SimpleNamespace(message_id=question, disconnected_at=None)
            for name, question in questions.items()
        }
        answers = dict(transport._collect(pending))
        assert answers["south"] == b"of south"
        assert answers["north"].reason.startswith(
            "its answer could not be read: RecursionError: \ufffd[2Jdeep xxx"
        )
        assert not pending and not set(questions.values()) & set(link.grid._arriving)
        assert round_trip(link, north, "north", b"next", b"answer") == (b"next", b"answer")


def test_a_grid_that_raises_ends_one_clients_part(monkeypatch):
    class Broken:
        def pull_messages(self, names):
            (name,) = names
            if name == "bad":
                raise KeyError("\x00")
            return []

    transport = FlowerTransport(
        Broken(), None, round_timeout=5, join_timeout=5, min_valid_fraction=1.0
    )
    pending = {
        name: SimpleNamespace(message_id=name, disconnected_at=None) for name in ("bad", "good")
    }
    ((client, failure),) = transport._collect(pending)
    assert client == "bad" and failure.reason == "its answer could not be read: KeyError: '\\x00'"
    assert list(pending) == ["good"]


# ── a server that lies ──


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("messages_list.0.metadata.ttl", math.nan, "ttl is nan"),
        ("messages_list.0.metadata.created_at", math.inf, "created_at is inf"),
        ("messages_list.0.metadata.dst_node_id", 7, "dst_node_id is 7"),
        ("messages_list.0.metadata.message_type", "reconnect", "message_type is"),
        ("messages_list.0.metadata.message_type", "x" * 10**6, "message_type is"),
        ("messages_list.0.metadata.reply_to_message_id", "0" * 64, "reply_to_message_id"),
        ("message_object_trees.0.object_id", "", "root is ''"),
        ("message_object_trees.0.children.0.object_id", "\x1b[2J", "expected a SHA-256"),
    ],
    ids=lambda value: str(value)[:45],
)
def test_an_odd_message_from_the_server_is_a_lost_connection(
    link, keys, monkeypatch, path, value, words
):
    """The node connects again; neither it nor its worker ends."""
    with connect(link.port, keys, "north") as connection:
        ask(link, "north", b"task")
        honest = connection._client.PullMessages

        def corrupted(request):
            response = honest(request)
            spoil(response, path, value)
            return response

        monkeypatch.setattr(connection._client, "PullMessages", corrupted)
        with pytest.raises(ConnectionLost, match="a message could not be fetched: ") as raised:
            fetch(connection)
        assert (
            words in str(raised.value)
            and len(str(raised.value)) < 500
            and str(raised.value).isprintable()
        )


@pytest.mark.parametrize(
    "answer", [RecursionError("x"), KeyError("x"), AttributeError("x\x1b"), MemoryError()]
)
def test_any_exception_from_an_answer_of_the_server_is_a_lost_connection(
    link, keys, monkeypatch, answer
):
    with connect(link.port, keys, "north") as connection:

        def raises(request):
            raise answer

        monkeypatch.setattr(connection._client, "PullMessages", raises)
        with pytest.raises(ConnectionLost, match="the server's answer cannot be used") as raised:
            fetch(connection)
        assert str(raised.value).isprintable() or "\ufffd" in str(raised.value)


def test_a_refusal_with_an_odd_body_is_a_refusal():
    import httpx

    from fedmomentum.flower.fleet_client import _refusal

    for body in (
        "[" * 100_000,
        "9" * 5000,
        '{"code": %s, "detail": "x"}' % ("9" * 4400),
        "\x1b[2J",
        "",
    ):
        response = httpx.Response(500, text=body, request=httpx.Request("POST", "https://x"))
        assert _refusal(httpx.HTTPStatusError("", request=response.request, response=response)) == (
            "the server answered 500"
        )
    body = '{"code": 1, "detail": "\\u001b[2J%s"}' % ("x" * 3000)
    response = httpx.Response(500, text=body, request=httpx.Request("POST", "https://x"))
    text = _refusal(httpx.HTTPStatusError("", request=response.request, response=response))
    assert text.startswith("the server answered 500: \ufffd[2Jxxx") and len(text) < 300


def test_a_message_that_cannot_even_be_refused_is_a_lost_connection(monkeypatch):
    def app(message, context):
        raise ValueError("no")

    message = ours()
    message.metadata.__dict__["_ttl"] = "soon"
    with pytest.raises(ConnectionLost, match="a message cannot be answered: TypeError"):
        _reply(message, app)
    text = "words " * 1000

    def fail_at_length(message, context):
        raise join_module.WorkerError(text)

    reply = _reply(ours(), fail_at_length)
    assert reply.error.reason == text[:999] + "…"


def test_check_envelope_takes_an_error_without_parts_only():
    message = ours()
    proto = message_to_proto(message)
    proto.ClearField("content")
    with pytest.raises(PayloadError, match="either content or an error"):
        check_envelope(proto, ObjectTree())
    proto.error.reason = "x"
    proto.metadata.message_id = "0" * 64
    with pytest.raises(PayloadError, match="an error has no parts"):
        check_envelope(proto, shape(1))
    check_envelope(proto, shape())
