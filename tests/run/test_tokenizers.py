"""A tokenizer or template in an adapter's directory counts, in a merged export too."""

from transformers import AutoTokenizer

from fedmomentum.cli.main import app
from fedmomentum.run.saved_model import open_result
from fedmomentum.run.tokenizers import own_tokenizer
from tests.lora.adapter_cases import write_adapter
from tests.tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

OTHER_TEMPLATE = CHAT_TEMPLATE.replace("<|im_start|>", "<unk>")


def test_what_the_adapters_directory_holds_is_exported(tmp_path):
    base = tiny_llama(tmp_path / "base")
    plain = write_adapter(base, tmp_path / "plain", {})
    assert own_tokenizer(open_result(plain), base) is None

    template = write_adapter(base, tmp_path / "template", {})
    (template / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    with_tokenizer = write_adapter(
        base, tmp_path / "whole", {"base_model_name_or_path": "/elsewhere"}
    )
    tiny_tokenizer(OTHER_TEMPLATE).save_pretrained(with_tokenizer)
    for directory in (template, with_tokenizer):
        own = own_tokenizer(open_result(directory), base)
        assert own.chat_template == OTHER_TEMPLATE

    out = tmp_path / "merged"
    words = [
        "export",
        str(with_tokenizer),
        "--base",
        str(base),
        "--to",
        "merged",
        "--out",
        str(out),
    ]
    app(words, standalone_mode=False)
    assert AutoTokenizer.from_pretrained(out).chat_template == OTHER_TEMPLATE
    assert AutoTokenizer.from_pretrained(base).chat_template == CHAT_TEMPLATE
