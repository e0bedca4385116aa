"""Messages reach the template in the form it expects, the same in training and generation."""

import pytest

from fedmomentum.data.chats import parse_chat
from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import prompt_token_ids, tokenize
from fedmomentum.errors import DataError
from tests.data.test_turns import MARKED, labels_of
from tests.tiny import CHAT_TEMPLATE, END_TOKEN_ID, START_TOKEN_ID, tiny_tokenizer

SYSTEM = {"role": "system", "content": "Short."}
ASKED = {"role": "user", "content": "2+2?"}
REFUSING = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHAT_TEMPLATE
SILENT = CHAT_TEMPLATE.replace(
    "{{ '<|im_start|>' + message",
    "{% if message.role != 'system' %}{{ '<|im_start|>' + message",
).replace("<|im_end|>\n' }}{% endfor", "<|im_end|>\n' }}{% endif %}{% endfor")


def tokens_of(example, tokenizer, loss_on="last"):
    return tokenize(
        [example],
        tokenizer,
        max_length=500,
        max_truncated_fraction=0.0,
        owner="north",
        loss_on=loss_on,
    ).example(0)


@pytest.mark.parametrize("template", [REFUSING, SILENT])
@pytest.mark.parametrize("loss_on", ["last", "all-assistant"])
def test_a_system_message_is_prepended_to_the_users_where_a_template_has_none(
    template, loss_on, caplog
):
    tokenizer = tiny_tokenizer(template)
    prompt = (SYSTEM, ASKED)
    one = tokens_of(Example(prompt, "4"), tokenizer, loss_on)
    folded = ({"role": "user", "content": "Short.\n\n2+2?"},)
    assert one.content == tokens_of(Example(folded, "4"), tokenizer, loss_on).content
    assert list(one.input_ids[: one.num_prompt_tokens]) == prompt_token_ids(prompt, tokenizer)
    assert caplog.text.count("has no turn of the system") == 1
    # an empty one says nothing
    empty = ({"role": "system", "content": ""}, ASKED)
    assert prompt_token_ids(empty, tokenizer) == prompt_token_ids((ASKED,), tokenizer)


def test_a_template_that_writes_the_system_gets_it():
    tokenizer = tiny_tokenizer()
    text = tokenizer.decode(prompt_token_ids((SYSTEM, ASKED), tokenizer))
    assert text.startswith("<|im_start|>system\nShort.<|im_end|>")


CALLING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% for key, value in c.function.arguments|items %}{{ ' ' + key + '=' + value|string }}{% endfor %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_arguments_of_tool_calls_reach_the_template_as_objects():
    texts = []
    for arguments in ('{"a": 2, "b": null}', {"a": 2, "b": "None"}):
        call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        caller = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "content": "4", "tool_call_id": "c1"}
        example = Example((ASKED, caller, result), "four")
        tokenizer = tiny_tokenizer(CALLING)
        texts.append(tokenizer.decode(tokens_of(example, tokenizer).input_ids))
        assert caller["tool_calls"][0]["function"]["arguments"] == arguments
    assert "add a=2 b=None<|im_end|>" in texts[0] and texts[0] == texts[1]


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLER = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4", "tool_call_id": "c1"}
NO_RESULTS = CALLING.replace("messages %}", "messages if m.role != 'tool' %}", 1)
NO_TOOLS = "{{ raise_exception('no tools') if messages[-1].role == 'tool' }}" + CHAT_TEMPLATE


@pytest.mark.parametrize("loss_on", ["last", "all-assistant"])
@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        (CHAT_TEMPLATE, (ASKED, CALLER, RESULT), "message 2 holds tool_calls, which this model's"),
        (MARKED, (ASKED, CALLER, RESULT), "message 2 holds tool_calls"),
        (NO_RESULTS, (ASKED, CALLER, RESULT), "message 3 is of the role tool, which this model's"),
        (NO_RESULTS, (ASKED, RESULT), "message 2 is of the role tool.*drop the row"),
        # a template that rejects the result of a call may still drop the call
        (NO_TOOLS, (ASKED, CALLER, ASKED), "message 2 holds tool_calls"),
    ],
)
def test_tool_messages_that_a_template_drops_are_refused(template, prompt, message, loss_on):
    example = Example(prompt, "four", source_row=7)
    with pytest.raises(DataError, match=rf"north, example 0 \(row 7 .*: {message}"):
        tokens_of(example, tiny_tokenizer(template), loss_on)


# Like Cohere's and Qwen3's: the system at the start, then turns of the user and the assistant.
KNOWN_ROLES = (
    "{% if messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    + CHAT_TEMPLATE.replace("messages %}", "messages if message.role in ('user', 'assistant') %}")
)


@pytest.mark.parametrize("loss_on", ["last", "all-assistant"])
@pytest.mark.parametrize("answered", ["before", "not"])
@pytest.mark.parametrize(
    ("template", "messages", "shown"),
    [
        (KNOWN_ROLES, [{"role": "developer", "content": "Short."}, ASKED], "1 is of the role dev"),
        (KNOWN_ROLES, [{"role": "human", "content": "2+2?"}], "1 is of the role human"),
        (KNOWN_ROLES, [SYSTEM, ASKED, {"role": "function", "content": "4"}], "3 is of the role fu"),
        (KNOWN_ROLES, [SYSTEM, ASKED, SYSTEM, ASKED], "3 is of the role system"),
        # a system message that became part of the user's counts
        (SILENT, [SYSTEM, ASKED, SYSTEM, ASKED], "3 is of the role system"),
    ],
)
def test_messages_that_a_template_drops_are_refused(template, messages, shown, answered, loss_on):
    prompt = tuple(messages)
    if answered == "before":
        prompt += ({"role": "assistant", "content": "4"}, ASKED)
    tokenizer = tiny_tokenizer(template)
    with pytest.raises(DataError, match=f"message {shown}.* template does not write"):
        tokens_of(Example(prompt, "four"), tokenizer, loss_on)
    with pytest.raises(DataError, match=f"message {shown}.* template does not write"):
        prompt_token_ids(prompt, tokenizer)


def test_a_system_message_without_a_users_that_it_could_begin_is_refused():
    with pytest.raises(DataError, match=r"message 1 is of the role system.* does not write"):
        tokens_of(Example((SYSTEM,), "four"), tiny_tokenizer(SILENT))


def test_messages_of_any_role_that_a_template_writes_are_read():
    roles = ("developer", "function", "system", "user")
    prompt = tuple({"role": role, "content": f"<{role}>"} for role in roles)
    text = tiny_tokenizer().decode(prompt_token_ids(prompt, tiny_tokenizer()))
    assert all(f"<|im_start|>{role}\n<{role}><|im_end|>" in text for role in roles)
    # an empty message leaves nothing out
    empty = ({"role": "system", "content": ""}, ASKED, {"role": "system", "content": " "}, ASKED)
    prompt_token_ids(empty, tiny_tokenizer(KNOWN_ROLES))


def test_a_template_is_asked_again_after_it_was_replaced():
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="message 2 holds tool_calls"):
        prompt_token_ids((ASKED, CALLER), tokenizer)
    tokenizer.chat_template = CALLING
    assert "add a=2" in tokenizer.decode(prompt_token_ids((ASKED, CALLER), tokenizer))


def test_content_in_parts_is_what_a_template_writes_of_parts():
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?", "image_url": None}]
    chat = parse_chat([{"role": "user", "content": parts}], "messages")
    assert chat.messages == [ASKED]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED], ids=["prefixes", "marks"])
@pytest.mark.parametrize(
    ("weights", "learned"),
    [
        ((0, 1, 1), "bb<|im_end|>ccc<|im_end|>"),
        ((1, 0, 1), "a<|im_end|>ccc<|im_end|>"),
        ((0, 0, 1), "ccc<|im_end|>"),
        ((1, 1, 1), "a<|im_end|>bb<|im_end|>ccc<|im_end|>"),
    ],
)
def test_turns_of_weight_0_carry_no_loss(template, weights, learned):
    prompt = []
    for number, answer in enumerate(("a", "bb")):
        prompt += [{"role": "user", "content": f"{number}?"}]
        prompt += [{"role": "assistant", "content": answer}]
    prompt.append({"role": "user", "content": "2?"})
    turns = tuple(2 * turn + 1 for turn in (0, 1) if weights[turn])
    example = Example(tuple(prompt), "ccc", learned_turns=turns)
    tokenizer = tiny_tokenizer(template)
    one = tokens_of(example, tokenizer, "all-assistant")
    labels = [label for label in labels_of(one) if label != -100]
    assert tokenizer.decode(labels) == learned
    # the row is that of the whole chat
    every = tokens_of(Example(tuple(prompt), "ccc"), tokenizer, "all-assistant")
    assert one.input_ids == every.input_ids
    if not turns:
        assert tokenizer.decode(tokens_of(example, tokenizer).input_ids[-4:-1]) == "ccc"
        return
    with pytest.raises(DataError, match="by its weights the messages .*all-assistant"):
        tokens_of(example, tokenizer)


def test_marks_that_do_not_tell_turns_apart_are_refused():
    twice = ({"role": "user", "content": "?"}, *[{"role": "assistant", "content": "a"}] * 2)
    joined = MARKED.replace("{% endgeneration %}{{ '\n' }}", "{% endgeneration %}").replace(
        "{{ '<|im_start|>' + message['role'] + '\n' }}", ""
    )
    example = Example(twice, "b", learned_turns=())
    with pytest.raises(DataError, match="cover 1 ranges, so that it is not clear"):
        tokens_of(example, tiny_tokenizer(joined), "all-assistant")


@pytest.mark.parametrize("loss_on", ["last", "all-assistant"])
@pytest.mark.parametrize("text", ["A story.", "<|im_start|>A story.<|im_end|>", "A"])
def test_every_token_of_a_text_but_the_first_is_learned(text, loss_on):
    tokenizer = tiny_tokenizer()
    one = tokens_of(Example(None, text), tokenizer, loss_on)
    ids = tokenizer(text)["input_ids"]
    wanted = ids if ids[-1] == END_TOKEN_ID else [*ids, END_TOKEN_ID]
    assert list(one.input_ids) == wanted
    assert (one.num_prompt_tokens, one.gaps) == (1, ())


def test_a_start_token_that_the_tokenizer_adds_occurs_once():
    class Starting:
        """Adds its start token to every text, and knows it in a text."""

        eos_token_id = END_TOKEN_ID
        inner = tiny_tokenizer()

        def __call__(self, text, add_special_tokens=True):
            if isinstance(text, list):
                return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in text]}
            start = [START_TOKEN_ID] if add_special_tokens else []
            return {"input_ids": start + self.inner(text)["input_ids"]}

    for text in ("ab", "<|im_start|>ab"):
        one = tokens_of(Example(None, text), Starting())
        assert Starting.inner.decode(one.input_ids) == "<|im_start|>ab<|im_end|>"
        assert one.num_prompt_tokens == 1
