"""The text of an answer is what the chat template was given, whatever the template writes around it."""

import pytest
from tokenizers import AddedToken

from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import answer_prefix, tokenize
from fedmomentum.evaluation.generation import _answer_text
from fedmomentum.evaluation.tasks import GenerationTask
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

TURN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
CLOSE = "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
EMPTY = "'<think>\n\n</think>\n\n'"
TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    # Qwen3: an empty block of reasoning that the model writes
    "qwen3": TURN + "{{ " + EMPTY + " + m.content + '<|im_end|>\n' }}" + CLOSE + PROMPT,
    # Qwen3.5: the prompt opens the block
    "qwen3_5": TURN
    + "{{ '<think>\n' + '\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
    + CLOSE
    + PROMPT.replace("assistant\n", "assistant\n<think>\n"),
    # GLM-4.5
    "glm": TURN + "{{ '<think></think>\n' + m.content + '<|im_end|>\n' }}" + CLOSE + PROMPT,
    # gpt-oss: a channel
    "gpt_oss": TURN
    + "{{ '<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    + CLOSE
    + PROMPT,
}
REASONING = {
    "qwen3": "<think>\nyes? ab!\n</think>\n\n",
    "qwen3_5": "ab? yes!\n</think>\n\n",
    "glm": "<think>ab</think>\n",
    "gpt_oss": "<|channel|>analysis<|message|>ab?<|im_end|><|im_start|>assistant"
    "<|channel|>final<|message|>",
}


def make_tokenizer(template):
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens(
        [AddedToken("<think>", special=False), AddedToken("</think>", special=False)]
    )
    tokenizer.add_tokens(
        [AddedToken(text, special=True) for text in ("<|channel|>", "<|message|>", "<|return|>")]
    )
    return tokenizer


@pytest.fixture(params=TEMPLATES)
def case(request):
    return request.param, make_tokenizer(TEMPLATES[request.param])


PROMPT_MESSAGES = ({"role": "user", "content": "yes or no?"},)


@pytest.mark.parametrize("completion", ["ab", "yes", "no yes no", "a\n\nb"])
def test_a_correct_answer_counts_as_exact(case, completion):
    """The tokens that training teaches are scored as the example's own completion."""
    _, tokenizer = case
    example = Example(PROMPT_MESSAGES, completion)
    rows = tokenize([example], tokenizer, max_length=200, max_truncated_fraction=0, owner="test")
    learned = rows.input_ids[0][rows.num_prompt_tokens[0] :]
    answer = _answer_text(learned, answer_prefix(example.prompt, tokenizer), tokenizer)
    assert answer == completion
    assert GenerationTask([example]).evaluate(example, answer).num_exact == 1
    wrong = _answer_text(tokenizer("zz").input_ids, "", tokenizer)
    assert GenerationTask([example]).evaluate(example, wrong).num_exact == 0


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_is_no_part_of_an_answer(name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    ids = tokenizer(REASONING[name] + "no", add_special_tokens=False).input_ids
    assert _answer_text(ids, answer_prefix(PROMPT_MESSAGES, tokenizer), tokenizer) == "no"
    # An answer that never came is not made up, and plain text has nothing before it.
    assert answer_prefix("yes or no?", tokenizer) == ""


def test_without_a_template_of_its_own_nothing_is_removed():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    ids = tokenizer("<think>a</think> b<|im_end|>", add_special_tokens=False).input_ids
    assert _answer_text(ids, answer_prefix(PROMPT_MESSAGES, tokenizer), tokenizer) == (
        tokenizer.decode(ids, skip_special_tokens=True)
    )
