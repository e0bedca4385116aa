"""Prompt, answer and end token are what generation sees; what does not fit is counted, then refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import end_token_id, prompt_token_ids, tokenize, tokenize_parts
from fedmomentum.errors import DataError
from fedmomentum.objectives.collation import IGNORED, completion_batch
from tests.tiny import CHAT_TEMPLATE, END_TOKEN_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHAT = ({"role": "user", "content": "2+2?"},)
TEXT = st.text(alphabet=[chr(i) for i in range(33, 127)], min_size=1, max_size=12)


def tokenize_all(examples, tokenizer=TOKENIZER, *, max_length=200, max_truncated_fraction=0.0):
    return tokenize(
        examples,
        tokenizer,
        max_length=max_length,
        max_truncated_fraction=max_truncated_fraction,
        owner="client-3",
    )


@given(question=TEXT, answer=TEXT, is_chat=st.booleans())
def test_prompt_is_what_generation_sees_and_the_answer_ends(question, answer, is_chat):
    prompt = ({"role": "user", "content": question},) if is_chat else question
    tokens = tokenize_all([Example(prompt, answer)])
    ids, num_prompt = list(tokens.input_ids[0]), tokens.num_prompt_tokens[0]
    assert ids[:num_prompt] == prompt_token_ids(prompt, TOKENIZER)
    assert TOKENIZER.decode(ids[num_prompt:-1]) == answer
    assert (
        ids[-1] == END_TOKEN_ID and ids.count(END_TOKEN_ID) == 1 + is_chat
    )  # the user's turn has its own


def test_chat_is_written_by_the_template():
    tokens = tokenize_all([Example(CHAT, "4")])
    expected = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    assert TOKENIZER.decode(tokens.input_ids[0]) == expected


def test_answer_merged_with_the_prompt_by_the_tokenizer_is_split_where_generation_starts():
    class Merging:
        """One token a word of two characters: "ab" + "cd" splits as "ab|cd", but "a" + "bc" as "ab|c"."""

        eos_token_id = 0
        chat_template = None

        def __init__(self):
            self.texts = {}

        def __call__(self, text, add_special_tokens=True):
            if isinstance(text, list):
                return {"input_ids": [self(one)["input_ids"] for one in text]}
            pieces = [text[i : i + 2] for i in range(0, len(text), 2)]
            ids = [1 + hash(piece) % 10**6 for piece in pieces]
            self.texts.update(zip(ids, pieces, strict=True))
            return {"input_ids": ids}

        def decode(self, ids, **_):
            return "".join(self.texts[index] for index in ids)

    tokenizer = Merging()
    tokens = tokenize_all([Example("a", "bc")], tokenizer)
    assert list(tokens.input_ids[0]) == [
        *tokenizer("a")["input_ids"],
        *tokenizer("bc")["input_ids"],
        0,
    ]
    assert tokens.num_prompt_tokens == (1,)


def test_end_token_is_the_templates_own_not_the_tokenizers():
    template = CHAT_TEMPLATE.replace("<|im_end|>", "<unk>")
    tokenizer = tiny_tokenizer(template)
    assert end_token_id(CHAT, tokenizer) == tokenizer.unk_token_id
    assert end_token_id("2+2?", tokenizer) == tokenizer.eos_token_id
    assert tokenize_all([Example(CHAT, "4")], tokenizer).input_ids[0][-1] == tokenizer.unk_token_id


def test_template_without_end_token_gets_the_tokenizers():
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE.replace("<|im_end|>", ""))
    tokens = tokenize_all([Example(CHAT, "4")], tokenizer)
    assert TOKENIZER.decode(tokens.input_ids[0]).endswith("assistant\n4\n<|im_end|>")


def test_template_that_rewrites_the_conversation_is_refused():
    rewriting = "{% for m in messages %}{{ m['content'] }}{{ messages|length }}{% endfor %}"
    with pytest.raises(DataError, match=r"client-3, example 0: .*differently from the prompt"):
        tokenize_all([Example(CHAT, "4")], tiny_tokenizer(rewriting))


def test_template_error_names_example_and_roles():
    template = (
        "{{ raise_exception('no critic role') if messages[0]['role'] == 'critic' }}" + CHAT_TEMPLATE
    )
    critic = ({"role": "critic", "content": "Hi"}, *CHAT)
    with pytest.raises(
        DataError, match=r"client-3, example 1: .*roles critic, user.*: no critic role"
    ):
        tokenize_all([Example(CHAT, "4"), Example(critic, "4")], tiny_tokenizer(template))


def test_chat_without_template_says_which_setting_to_give():
    tokenizer = tiny_tokenizer(None)
    with pytest.raises(
        DataError, match=r"client-3, example 0: .*no chat template: give plain `prompt`"
    ):
        tokenize_all([Example(CHAT, "4")], tokenizer)
    assert len(tokenize_all([Example("2+2?", "4")], tokenizer)) == 1


def test_truncated_and_lost_examples_are_counted_and_the_lost_dropped():
    examples = [
        Example("ab", "cd", "whole"),
        Example("ab", "cdefgh", "cut"),
        Example("abcdef", "g", "lost"),
    ]
    tokens = tokenize_all(examples, max_length=5, max_truncated_fraction=0.34)
    assert tokens.categories == ("whole", "cut")
    assert tokens.is_truncated == (False, True)
    assert (tokens.num_truncated, tokens.num_lost) == (1, 1)
    assert [len(ids) for ids in tokens.input_ids] == [5, 5]
    assert tokens.input_ids[0][-1] == END_TOKEN_ID != tokens.input_ids[1][-1]


def test_too_many_lost_examples_are_refused_with_numbers():
    examples = [Example("ab", "c"), Example("abcdef", "g")]
    with pytest.raises(
        DataError,
        match=r"client-3: 1 of 2 examples .*max-length = 4 .*has 8 tokens.*raise max-length",
    ):
        tokenize_all(examples, max_length=4, max_truncated_fraction=0.4)
    with pytest.raises(DataError, match="1 of 1"):
        tokenize_all(examples[1:], max_length=4, max_truncated_fraction=1.0)
    with pytest.raises(DataError, match="client-3: no examples"):
        tokenize_all([])


@pytest.mark.parametrize("num_held_out", [0, 1, 2])
def test_lost_examples_of_all_parts_are_counted_together(num_held_out):
    """Whether a client can be used does not depend on which examples it holds out."""
    examples = [Example("ab", "c")] * 3 + [Example("abcdef", "g")]

    def tokenized(examples, fraction):
        parts = {
            "north": examples[: len(examples) - num_held_out],
            "north (held out)": examples[len(examples) - num_held_out :],
        }
        return tokenize_parts(parts, TOKENIZER, max_length=4, max_truncated_fraction=fraction)

    train, test = tokenized(examples, 0.25)
    assert len(train) + len(test) == 3
    assert train.num_lost + test.num_lost == 1
    with pytest.raises(DataError, match="north: 1 of 4 examples .*has 8 tokens, half have"):
        tokenized(examples, 0.24)
    with pytest.raises(DataError, match="north: 1 of 3"):
        # nothing would be left to train on
        tokenize_parts(
            {"north": examples[3:], "north (held out)": examples[:2]},
            TOKENIZER,
            max_length=4,
            max_truncated_fraction=1,
        )


def test_batch_is_padded_on_the_left_and_labels_only_the_completion():
    batch = completion_batch([(5, 6, 7, 8), (5, 9)], [2, 1], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 7, 8], [IGNORED, IGNORED, 9]]
