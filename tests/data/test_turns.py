"""All turns of the assistant are learned: exactly those, with the tokens of use and of TRL."""

import json
import re
from pathlib import Path

import pytest
import torch
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fedmomentum.data import read_rows, to_examples
from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import prompt_token_ids, tokenize
from fedmomentum.data.turns import gaps_between
from fedmomentum.errors import DataError
from fedmomentum.objectives.collation import next_token_pairs
from fedmomentum.objectives.objective import CausalLM
from tests.tiny import CHAT_TEMPLATE, END_TOKEN_ID, PAD_TOKEN_ID, tiny_llama, tiny_tokenizer

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The same text as `CHAT_TEMPLATE`, with marks around what the assistant generates."""
TEMPLATES = {"marks": MARKED, "prefixes": CHAT_TEMPLATE}
CHATS = [
    [("user", "2+2?"), ("assistant", "4")],
    [
        ("system", "Short."),
        ("user", "2+2?"),
        ("assistant", "4"),
        ("user", "and 3+3, my dear friend?"),
        ("assistant", "six"),
    ],
    [
        ("user", "a"),
        ("assistant", "b"),
        ("tool", "found: c"),
        ("assistant", "dd"),
        ("user", "e"),
        ("assistant", "f"),
    ],
]
TEXT = st.text(alphabet=[chr(i) for i in range(33, 127)], min_size=1, max_size=8)


def messages_of(chat):
    return [{"role": role, "content": content} for role, content in chat]


def example_of(chat):
    *prompt, answer = messages_of(chat)
    return Example(tuple(prompt), answer["content"])


def tokenized(chats, template, *, max_length=200, loss_on="all-assistant", fraction=0.0):
    return tokenize(
        [example_of(chat) for chat in chats],
        tiny_tokenizer(template),
        max_length=max_length,
        max_truncated_fraction=fraction,
        owner="north",
        loss_on=loss_on,
    )


def labels_of(example):
    """A row's labels, one a token."""
    labels = list(example.input_ids)
    labels[: example.num_prompt_tokens] = [-100] * example.num_prompt_tokens
    for start, end in example.gaps:
        labels[start:end] = [-100] * (end - start)
    return labels


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), system=st.booleans())
@settings(max_examples=25, deadline=None)
def test_learned_are_the_assistants_texts_and_their_ends(template, turns, system):
    chat = [("system", "Hi")] if system else []
    for question, answer in turns:
        chat += [("user", question), ("assistant", answer)]
    example = tokenized([chat], template).example(0)
    tokenizer = tiny_tokenizer(template)
    learned = [token for token in labels_of(example) if token != -100]
    assert tokenizer.decode(learned) == "".join(f"{answer}<|im_end|>" for _, answer in turns)
    # Each turn begins where generation would, after the very same tokens.
    for position, (role, _) in enumerate(chat):
        if role == "assistant":
            header = prompt_token_ids(tuple(messages_of(chat[:position])), tokenizer)
            assert list(example.input_ids[: len(header)]) == header
            assert labels_of(example)[len(header) - 1] == -100 != labels_of(example)[len(header)]


def test_one_turn_has_the_labels_of_the_last_one():
    last = tokenized(CHATS[:1], CHAT_TEMPLATE, loss_on="last").example(0)
    every = tokenized(CHATS[:1], CHAT_TEMPLATE).example(0)
    assert labels_of(every) == [*labels_of(last), -100]  # the newline after the end token


def test_plain_text_has_one_answer():
    tokens = {}
    for loss_on in ("last", "all-assistant"):
        tokens[loss_on] = tokenize(
            [Example("2+2=", "4"), example_of(CHATS[1]), Example("3+3=", "6")],
            tiny_tokenizer(),
            max_length=200,
            max_truncated_fraction=0.0,
            owner="north",
            loss_on=loss_on,
        )
    for row in (0, 2):
        assert tokens["last"].example(row) == tokens["all-assistant"].example(row)
    assert tokens["last"].example(1) != tokens["all-assistant"].example(1)


def test_cut_where_an_answer_loses_a_part_and_lost_where_nothing_is_left():
    full = tokenized(CHATS[1:2], CHAT_TEMPLATE).example(0)
    first_end = full.gaps[0][0]
    last_start = full.gaps[0][1]
    # Losing the newline at the end does no harm; losing a token of the last answer does.
    assert not tokenized(CHATS[1:2], CHAT_TEMPLATE, max_length=200).is_truncated[0]
    not_cut = tokenized(CHATS[1:2], CHAT_TEMPLATE, max_length=len(full.input_ids) - 1)
    assert not not_cut.is_truncated[0]
    for length in (first_end - 1, first_end, last_start, len(full.input_ids) - 2):
        cut = tokenized(CHATS[1:2], CHAT_TEMPLATE, max_length=length).example(0)
        assert cut.is_truncated
        assert labels_of(cut) == labels_of(full)[:length]
    with pytest.raises(DataError, match="1 of 1 examples lose their complete answer"):
        tokenized(CHATS[1:2], CHAT_TEMPLATE, max_length=full.num_prompt_tokens)


def test_gaps_are_cut_with_the_row():
    learned = [(2, 4), (6, 8), (9, 12)]
    assert gaps_between(learned, 13) == ((4, 6), (8, 9), (12, 13))
    assert gaps_between(learned, 12) == ((4, 6), (8, 9))
    assert gaps_between(learned, 7) == ((4, 6),)
    assert gaps_between(learned, 5) == ((4, 5),)
    assert gaps_between(learned, 3) == ()


STRIPPING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{{ message['content'].split('</think>')[-1] }}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_template_that_removes_earlier_reasoning_is_refused_by_row_and_turn():
    thinking = [
        ("user", "2+2?"),
        ("assistant", "<think>hm</think>4"),
        ("user", "3+3?"),
        ("assistant", "6"),
    ]
    pattern = r"north, example 1: the assistant's turn 1 of 2 \(message 2\): .*earlier reasoning"
    with pytest.raises(DataError, match=pattern):
        tokenized([CHATS[1], thinking], STRIPPING)
    # Without reasoning nothing is removed; and the last turn alone is learned in any case.
    assert len(tokenized([CHATS[1]], STRIPPING)) == 1
    assert len(tokenized([thinking], STRIPPING, loss_on="last")) == 1


@pytest.mark.parametrize(
    ("template", "chat", "pattern"),
    [
        (
            CHAT_TEMPLATE,
            [("assistant", "Hello!"), ("user", "2+2?"), ("assistant", "4")],
            r"turn 1 of 2 \(message 1\) stands before any other",
        ),
        (
            CHAT_TEMPLATE.replace("assistant\n'", "assistant\n<unk>'"),
            CHATS[1],
            r"turn 1 of 2 \(message 3\): .*differently from the prompt",
        ),
        (
            CHAT_TEMPLATE.replace(
                "'<|im_end|>\n'",
                "('' if message['role'] == 'assistant' and not loop.last else '<|im_end|>')",
            ),
            CHATS[1],
            r"turn 1 of 2 \(message 3\): .*differently when other turns follow",
        ),
        (
            CHAT_TEMPLATE.replace("<|im_end|>", ""),
            CHATS[1],
            r"turn 1 of 2 \(message 3\): .*writes no '<\|im_end\|>' at its end",
        ),
        (
            MARKED.replace("+ '<|im_end|>' }}{% endg", "}}{% endg").replace(
                "%}{{ '\n' }}", "%}{{ '<|im_end|>\n' }}"
            ),
            CHATS[1],
            r"last turn: the generation marks .* leave out '<\|im_end\|>'",
        ),
        (
            MARKED.replace("== 'assistant' %}", "== 'assistant' and loop.last %}"),
            CHATS[1],
            r"generation marks of the chat template cover 1 of the assistant's 2 turns",
        ),
    ],
)
def test_templates_that_do_not_mark_turns_are_refused_by_name(template, chat, pattern):
    with pytest.raises(DataError, match=r"north, example 0: .*" + pattern):
        tokenized([chat], template)


# ── TRL ──


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny"), chat_template=MARKED)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("max_length", [200, 60])
def test_ids_masks_and_losses_are_those_of_trl(template, max_length, folder, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            assistant_only_loss=True,
            max_length=max_length,
            per_device_train_batch_size=len(CHATS),
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"messages": messages_of(chat)} for chat in CHATS]),
        processing_class=tiny_tokenizer(MARKED),
    )
    trl_batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(CHATS))])
    ours = tokenized(CHATS, template, max_length=max_length)
    for row, length in enumerate(trl_batch["attention_mask"].sum(dim=1).tolist()):
        example = ours.example(row)
        assert list(example.input_ids) == trl_batch["input_ids"][row, :length].tolist()
        assert labels_of(example) == trl_batch["labels"][row, :length].tolist()

    model.eval()
    objective = CausalLM("all-assistant")
    batch = objective.collate([ours.example(row) for row in range(len(CHATS))], PAD_TOKEN_ID)
    with torch.no_grad():
        loss = objective.loss(objective.predict(model, batch))
        reference = trainer.compute_loss(model, trl_batch)
    assert loss.num_targets == int((trl_batch["labels"] != -100).sum())
    assert float(loss.nll) / loss.num_targets == pytest.approx(float(reference), rel=1e-6)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_of_prompt_and_completion_the_completion_is_learned_as_by_trl(template, folder, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    *prompt, answer = messages_of(CHATS[1])
    row = {"prompt": prompt, "completion": [answer]}
    settings = {"assistant_only_loss": True, "max_length": 200, "use_cpu": True, "bf16": False}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=SFTConfig(output_dir=str(tmp_path), report_to="none", **settings),
        train_dataset=Dataset.from_list([row]),
        processing_class=tiny_tokenizer(MARKED),
    )
    trl_batch = trainer.data_collator([trainer.train_dataset[0]])
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(row) + "\n")
    limits = {"max_length": 200, "max_truncated_fraction": 0, "owner": "north"}
    ours = tokenize(
        to_examples(read_rows(file)), tiny_tokenizer(template), loss_on="all-assistant", **limits
    ).example(0)
    labels = [label for label in labels_of(ours) if label != -100]
    assert tiny_tokenizer().decode(labels) == "six<|im_end|>"
    assert labels == [label for label in trl_batch["labels"][0].tolist() if label != -100]


def tokenizer_of(family, kind=""):
    """A tiny tokenizer with the special tokens of a real template, as TRL has it."""
    folder = Path(trl.__file__).parent / "chat_templates"
    template = (folder / f"{family}{kind}.jinja").read_text()
    tokenizer = tiny_tokenizer(template)
    names = re.findall(r"<\|[^<>|]*\|>|<(?:start|end)_of_turn>|<\uff5c[^>]*\uff5c>", template)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(names))})
    return tokenizer


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("cohere", "<|END_OF_TURN_TOKEN|>"),
        ("gemma3", "<end_of_turn>"),
        ("lfm2", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("phi3", "<|end|>"),
        ("qwen2_5", "<|im_end|>"),
        ("qwen3_instruct_2507", "<|im_end|>"),
        ("deepseekv3", None),
        ("gptoss", None),
        ("qwen3", None),
    ],
)
def test_templates_of_real_models_are_learned_by_prefixes_or_refused(family, end):
    def learned(tokenizer):
        limits = {"max_length": 2000, "max_truncated_fraction": 0.0, "owner": "north"}
        chat = [example_of(CHATS[1])]
        tokens = tokenize(chat, tokenizer, loss_on="all-assistant", **limits).example(0)
        return tokenizer.decode([token for token in labels_of(tokens) if token != -100])

    tokenizer = tokenizer_of(family)
    if end is None:
        with pytest.raises(DataError, match=r"example 0: the assistant's turn 1 of 2"):
            learned(tokenizer)
    else:
        assert learned(tokenizer) == f"4{end}six{end}"
    # With marks every one of them is learned; they may include what stands around an answer.
    marked = learned(tokenizer_of(family, "_training"))
    assert re.search(r"4<.*six<", marked, flags=re.DOTALL)
    assert "Short." not in marked and "friend" not in marked


def test_template_that_writes_no_text_is_refused():
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% endfor %}"
    with pytest.raises(DataError, match="example 0: the chat template does not write the text"):
        tokenized(CHATS[:1], template)


def test_only_columns_with_a_label_are_projected_and_the_loss_is_that_of_all(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    examples = tokenized(CHATS, CHAT_TEMPLATE)
    objective = CausalLM("all-assistant")
    batch = objective.collate([examples.example(row) for row in range(3)], PAD_TOKEN_ID)
    with torch.no_grad():
        predictions = objective.predict(model, batch)
        ours = objective.loss(predictions)
    longest = max(
        len(example.input_ids) - example.num_prompt_tokens
        for example in map(examples.example, range(3))
    )
    assert predictions.logits.shape[1] == len(batch["columns"]) < longest
    # Row by row, unpadded and with all logits.
    nll = 0.0
    for row in range(3):
        example = examples.example(row)
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0].float()
        labels = torch.tensor(labels_of(example))
        nll += float(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
        assert END_TOKEN_ID in labels
    assert float(ours.nll) == pytest.approx(nll, rel=1e-6)
    # A model that projects everything gives the same.
    full = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0),
    ).logits
    logits, labels = next_token_pairs(full, batch)
    assert torch.equal(labels, predictions.labels)
    assert torch.allclose(logits, predictions.logits, atol=1e-10)


def test_rows_of_any_depth_are_read_and_tool_turns_are_the_templates(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"},
        {"role": "assistant", "content": "four"},
    ]
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    (example,) = to_examples(read_rows(file), where="d.jsonl")
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '[' + c.function.name + ' ' + c.function.arguments.a|string + ']' }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)
    tokens = tokenize(
        [example],
        tokenizer,
        max_length=200,
        max_truncated_fraction=0.0,
        owner="north",
        loss_on="all-assistant",
    )
    learned = [token for token in labels_of(tokens.example(0)) if token != -100]
    assert tokenizer.decode(learned) == "[add 2]<|im_end|>four<|im_end|>"


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"tool_calls": []}, "message 2 of the prompt: tool_calls must be a list of objects"),
        ({"tool_calls": "add"}, "message 2 of the prompt: tool_calls must be a list of objects"),
        ({"tool_calls": [{"function": {"arguments": {"a": None}}}]}, "message 2 .* hold a null"),
        ({"role": "user", "tool_calls": [{}]}, "message 2: must have exactly role and content"),
        ({"tool_call_id": "x"}, "message 2: must have exactly role and content, and perhaps tool"),
    ],
)
def test_tool_messages_of_another_shape_are_refused_by_row_and_turn(change, pattern, tmp_path):
    messages = messages_of(CHATS[1])[1:]
    messages[1] |= change
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match=rf"d.jsonl: row 1: .*{pattern}"):
        to_examples(read_rows(file), where="d.jsonl")


def test_refused_turn_is_named_with_the_row_of_its_file(tmp_path):
    file = tmp_path / "d.jsonl"
    rows = [{"messages": messages_of(chat)} for chat in CHATS]
    rows[2]["messages"][1]["content"] = "<think>hm</think>4"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = to_examples(read_rows(file), where="d.jsonl")
    with pytest.raises(
        DataError, match=r"north, example 1 \(row 3 of its source\): the assistant's turn 1 of 3"
    ):
        tokenize(
            [examples[0], examples[2]],
            tiny_tokenizer(STRIPPING),
            max_length=200,
            max_truncated_fraction=0.0,
            owner="north",
            loss_on="all-assistant",
        )


def test_definitions_of_tools_and_a_call_as_the_answer_are_refused_by_row(tmp_path):
    rows = [{"messages": messages_of(CHATS[0]), "tools": []} for _ in range(2)]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(to_examples(read_rows(file), where="d.jsonl")) == 2
    rows[1]["tools"] = [{"type": "function"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="d.jsonl: row 2: column 'tools' holds"):
        to_examples(read_rows(file), where="d.jsonl")
    rows[1] = {"messages": [*messages_of(CHATS[0])[:1], {"role": "assistant", "tool_calls": [{}]}]}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="d.jsonl: row 2: the last message.*holds tool_calls"):
        to_examples(read_rows(file), where="d.jsonl")
