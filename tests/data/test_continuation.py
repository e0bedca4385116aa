"""Whatever the tokenizer: what is trained on is the prompt's own ids, then ids that read on as the text does."""

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedmomentum.data.continuation import continuation_ids
from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import prompt_token_ids, tokenize
from fedmomentum.errors import DataError

WORDS = ["the", "cat", "yes", "no", "play", "ing", "playing", "42", "Q:", "A:", "no-one"]
CHARACTERS = [c for c in string.printable[:95] if c != " "] + ["\n"]
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
BOTH = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
SEPARATED = processors.TemplateProcessing(
    single="<s> $A <unk>", special_tokens=[("<s>", 1), ("<unk>", 0)]
)


def wrapped(tokenizer, post_processor=None):
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def unigram(scheme, split, post_processor=None):
    """As SentencePiece's unigram models are converted (T5, XLM-R, newer Llama-likes)."""
    pieces = [*(f"▁{word}" for word in WORDS), *WORDS]
    vocabulary = [(token, 0.0) for token in SPECIAL.values()] + [("▁", -6.0)]
    vocabulary += [(piece, -2.0 - len(piece) / 100) for piece in pieces] + [
        (c, -8.0) for c in CHARACTERS
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=scheme, split=split
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=scheme, split=split)
    return wrapped(tokenizer, post_processor)


def merges_of(words):
    """BPE's merges that build these words letter by letter, and the pieces that come of it."""
    merges, pieces = [], []
    for word in words:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
                pieces.append(word[:end])
    return merges, pieces


def legacy_llama(post_processor=None):
    """SentencePiece BPE as the first Llamas are converted: a normalizer writes the spaces."""
    merges, pieces = merges_of([*(f"▁{word}" for word in WORDS), *WORDS])
    tokens = [*SPECIAL.values(), "▁", *CHARACTERS, *pieces]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer, post_processor)


def byte_level(add_prefix_space, post_processor=None):
    """As GPT-2, Llama 3, Qwen."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges, pieces = merges_of([*(f"Ġ{word}" for word in WORDS), *WORDS])
    vocabulary = {
        t: i for i, t in enumerate(dict.fromkeys([*SPECIAL.values(), *alphabet, *pieces]))
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, post_processor)


def word_piece(post_processor=None):
    """As BERT; it keeps no blanks."""
    pieces = [*WORDS, *CHARACTERS, *(f"##{piece}" for piece in (*WORDS, *CHARACTERS))]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys([*SPECIAL.values(), *pieces]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return wrapped(tokenizer, post_processor)


SENTENCE_PIECE = {
    f"unigram {scheme}{' split' if split else ''}": unigram(scheme, split)
    for scheme in ("always", "first", "never")
    for split in (False, True)
} | {"legacy llama": legacy_llama()}
LOSSLESS = SENTENCE_PIECE | {
    "unigram with BOS": unigram("always", True, BOS),
    "unigram with BOS and EOS": unigram("first", False, BOTH),
    "legacy llama with BOS": legacy_llama(BOS),
    "legacy llama with BOS and a separator": legacy_llama(SEPARATED),
    "byte level": byte_level(False),
    "byte level with a space in front": byte_level(True),
    "byte level with BOS and EOS": byte_level(False, BOTH),
}
ALL = LOSSLESS | {"word piece": word_piece(), "word piece with separators": word_piece(SEPARATED)}

TEXT = st.lists(
    st.sampled_from([*WORDS, " ", "  ", "\n", ".", "-", "x", ":"]), min_size=1, max_size=6
).map("".join)


def ids_of(tokenizer, prompt, completion):
    tokens = tokenize(
        [Example(prompt, completion)],
        tokenizer,
        max_length=500,
        max_truncated_fraction=0.0,
        owner="north",
    )
    return list(tokens.input_ids[0]), tokens.num_prompt_tokens[0]


def read(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", LOSSLESS)
@given(prompt=TEXT.filter(str.strip), completion=TEXT.filter(str.strip))
@example(prompt="Q: x ", completion="yes")
@example(prompt="Q: x", completion=" yes")
@example(prompt="Q: x  ", completion="  yes")
@example(prompt="Q: x\n", completion="yes")
@example(prompt="play", completion="ing")
@example(prompt="no-", completion="one")
def test_the_ids_read_as_prompt_and_completion_to_the_letter(name, prompt, completion):
    tokenizer = LOSSLESS[name]
    ids, num_prompt = ids_of(tokenizer, prompt, completion)
    assert ids[:num_prompt] == prompt_token_ids(prompt, tokenizer)
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    text = read(tokenizer, ids)
    if name == "byte level with a space in front":
        text = text[1:] if not prompt.startswith((" ", "\n")) else text
    wanted = prompt + completion
    assert text.lstrip(" ") == wanted.lstrip(
        " "
    )  # SentencePiece does not tell a first space from its own
    # and as generation continues from the prompt's ids: with each of the answer's
    assert text.endswith(completion) and read(tokenizer, ids[:num_prompt]).strip() == prompt.strip()


@pytest.mark.parametrize("name", SENTENCE_PIECE)
def test_a_prompt_that_ends_in_a_space_is_learned_with_one(name):
    tokenizer = SENTENCE_PIECE[name]
    ids, num_prompt = ids_of(tokenizer, "Q: the cat ", "yes no")
    prompt, answer = ids[:num_prompt], ids[num_prompt:]
    assert tokenizer.convert_ids_to_tokens(prompt)[-1] == "▁"
    assert tokenizer.convert_ids_to_tokens(answer) == ["yes", "▁no", "</s>"]
    assert read(tokenizer, ids) == "Q: the cat yes no"


@pytest.mark.parametrize("name", ["word piece", "word piece with separators"])
@given(prompt=TEXT.filter(str.strip), completion=TEXT.filter(str.strip))
@example(prompt="play", completion="ing")
@example(prompt="the cat", completion="the")
def test_a_tokenizer_that_strips_blanks_reads_as_it_would_read_the_full_text(
    name, prompt, completion
):
    tokenizer = ALL[name]
    ids, num_prompt = ids_of(tokenizer, prompt, completion)
    assert ids[:num_prompt] == prompt_token_ids(prompt, tokenizer)
    assert tokenizer.unk_token_id not in ids and ids.count(tokenizer.eos_token_id) == 1
    full_ids = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    assert read(tokenizer, ids) == read(tokenizer, full_ids)


def test_a_word_continues_where_the_prompt_ends_inside_it():
    tokenizer = word_piece()
    ids, num_prompt = ids_of(tokenizer, "play", "ing")
    assert tokenizer.convert_ids_to_tokens(ids) == ["play", "##ing", "</s>"] and num_prompt == 1


@pytest.mark.parametrize("name", ALL)
def test_special_tokens_that_close_a_text_are_neither_in_the_prompt_nor_in_the_answer(name):
    tokenizer = ALL[name]
    ids, num_prompt = ids_of(tokenizer, "the cat", " yes")
    tokens = tokenizer.convert_ids_to_tokens(ids)
    begins = "BOS" in name or "separator" in name
    assert tokens.count("<unk>") == 0 and tokens.count("</s>") == 1 and tokens[-1] == "</s>"
    assert tokens.count("<s>") == begins and (tokens[0] == "<s>") == begins


def test_an_answer_that_cannot_be_written_there_is_refused_by_name():
    """A tokenizer that puts a mark in front of every text, and of nothing else."""

    class Marking:
        eos_token_id = 0
        chat_template = None

        def __call__(self, text, add_special_tokens=True):
            if isinstance(text, list):
                return {"input_ids": [self(one)["input_ids"] for one in text]}
            return {"input_ids": [len(text) * 1000, *map(ord, text)]}

        def decode(self, ids, **_):
            return "".join(chr(i) if i < 1000 else "#" for i in ids)

    tokenizer = Marking()
    with pytest.raises(
        DataError, match=r"would read \.\.\.'#a#b' instead of \.\.\.'#ab'. Let the answer begin"
    ):
        continuation_ids(tokenizer("a")["input_ids"], tokenizer("ab")["input_ids"], "b", tokenizer)
    with pytest.raises(
        DataError, match="north, example 0: after this prompt the tokenizer cannot write"
    ):
        tokenize(
            [Example("a", "b")], tokenizer, max_length=9, max_truncated_fraction=0.0, owner="north"
        )


@pytest.mark.parametrize("name", SENTENCE_PIECE)
def test_a_chat_whose_template_ends_in_a_space_is_learned_with_one(name):
    tokenizer = {n: t for n, t in SENTENCE_PIECE.items()}[name]
    template = "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else '' }}{{ m.content }}{% if m.role == 'user' %}"
    template += "{{ ' A: ' }}{% else %}{{ '</s>' }}{% endif %}{% endfor %}"
    tokenizer = wrapped(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    tokenizer.chat_template = template
    ids, num_prompt = ids_of(tokenizer, ({"role": "user", "content": "the cat"},), "yes no")
    assert tokenizer.convert_ids_to_tokens(ids[:num_prompt])[-1] == "▁"
    assert read(tokenizer, ids) == "Q: the cat A: yes no"
