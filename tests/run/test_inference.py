"""A result in use: its numbers are the run's own, with the run's dtype and the adapter's tokenizer; none is hidden."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmomentum.config.data import DataConfig
from fedmomentum.errors import DataError, ModelError
from fedmomentum.run.evaluate import evaluate_on
from fedmomentum.run.inference import LoadSettings, ModelPair
from fedmomentum.run.saved_model import open_result
from tests.runs import rewritten, start, timeless, tiny_config
from tests.tiny import CHAT_TEMPLATE, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("use")


@pytest.fixture(scope="module")
def finished(folder):
    start(tiny_config(folder, federation={"num_rounds": 2}), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def adapter(folder, finished):
    """The run's result as one PEFT adapter."""
    from fedmomentum.global_model.export import export_adapter

    export_adapter(open_result(finished).model, folder / "adapter", base_directory=folder / "base")
    return folder / "adapter"


def same(score, row):
    assert (score.num_examples, score.num_tokens, score.num_exact) == tuple(
        row[key] for key in ("num_examples", "num_tokens", "num_exact")
    )
    assert score.nll == pytest.approx(row["nll"], rel=1e-6)


def test_evaluating_a_run_gives_the_runs_own_numbers(finished):
    comparison = evaluate_on(open_result(finished), None, LoadSettings())
    first, *_, last = timeless(finished)
    for scored, row in (
        (comparison.base, first["evaluation"]),
        (comparison.tuned, last["evaluation"]),
    ):
        same(scored.all.total, row["total"])
        assert scored.by_client.keys() == row["by_client"].keys() and len(scored.by_client) == 3
        assert (
            scored.all.by_category.keys() == row["by_category"].keys()
            and len(row["by_category"]) == 2
        )
        for client, score in scored.by_client.items():
            same(score, row["by_client"][client])
        for category, score in scored.all.by_category.items():
            same(score, row["by_category"][category])
    assert comparison.tuned.all.total.nll != comparison.base.all.total.nll


def test_an_adapter_gives_the_same_numbers_on_the_same_examples(folder, finished, adapter):
    data = str(folder / "site0.jsonl")
    run = evaluate_on(open_result(finished), data, LoadSettings(dtype="float32"))
    plain = evaluate_on(open_result(adapter), data, LoadSettings(dtype="float32"))
    assert plain.tuned.all.total.nll == pytest.approx(run.tuned.all.total.nll, rel=1e-6)
    assert plain.base.all.total.nll == run.base.all.total.nll


def test_the_runs_own_examples_must_be_unchanged(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    rewritten(
        copy / "rounds" / "0002.json",
        lambda table: table["run"]["data"]["site1"].update(held_out="0" * 64),
    )
    with pytest.raises(
        DataError, match=r"made with other data; it differs for site1 \(held-out examples\)"
    ):
        evaluate_on(open_result(copy), None, LoadSettings())


def made_with(run: Path, copy: Path, old: str, new: str) -> Path:
    """A copy of the run as it would be with another setting; the checkpoint's settings are what counts."""
    shutil.copytree(run, copy)

    def change(table):
        assert old in table["run"]["settings"]
        table["run"]["settings"] = table["run"]["settings"].replace(old, new, 1)

    rewritten(copy / "rounds" / "0002.json", change)
    return copy


def test_dtype_and_device_are_the_runs(finished, adapter, tmp_path):
    assert ModelPair(open_result(finished), LoadSettings()).model.dtype == torch.float32
    assert (
        ModelPair(open_result(finished), LoadSettings(dtype="bfloat16")).model.dtype
        == torch.bfloat16
    )
    half = made_with(finished, tmp_path / "half", 'dtype = "float32"', 'dtype = "bfloat16"')
    assert ModelPair(open_result(half), LoadSettings()).model.dtype == torch.bfloat16
    assert ModelPair(open_result(half), LoadSettings(dtype="float32")).model.dtype == torch.float32
    # what `auto` came to where the run was made
    auto = made_with(finished, tmp_path / "auto", 'dtype = "float32"', 'dtype = "auto"')
    for dtype in ("bfloat16", "float32"):
        rewritten(auto / "environment.json", lambda table, dtype=dtype: table.update(dtype=dtype))
        assert str(ModelPair(open_result(auto), LoadSettings()).model.dtype) == f"torch.{dtype}"
    (auto / "environment.json").unlink()
    with pytest.raises(
        ModelError, match="environment.json is missing; it says in which dtype the run was"
    ):
        ModelPair(open_result(auto), LoadSettings())
    other_device = made_with(
        finished, tmp_path / "elsewhere", 'device = "cpu"', 'device = "cuda:7"'
    )
    with pytest.raises(ModelError, match="'cuda:7' cannot be used: .* Give another by --device"):
        ModelPair(open_result(other_device), LoadSettings())
    assert (
        ModelPair(open_result(other_device), LoadSettings(device="cpu")).model.device.type == "cpu"
    )


OTHER_TEMPLATE = CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|> ")


def with_template(adapter, copy):
    shutil.copytree(adapter, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = OTHER_TEMPLATE
    tokenizer.save_pretrained(copy)
    return copy


def test_an_adapters_own_tokenizer_and_template_are_used(folder, adapter, tmp_path):
    assert OTHER_TEMPLATE != CHAT_TEMPLATE
    own = with_template(adapter, tmp_path / "own")
    assert ModelPair(open_result(own), LoadSettings()).tokenizer.chat_template == OTHER_TEMPLATE
    template_only = tmp_path / "template"
    template_only.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, template_only)
    assert (
        ModelPair(open_result(template_only), LoadSettings()).tokenizer.chat_template
        == CHAT_TEMPLATE
    )
    (template_only / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    assert (
        ModelPair(open_result(template_only), LoadSettings()).tokenizer.chat_template
        == OTHER_TEMPLATE
    )
    data = str(folder / "site0.jsonl")
    losses = {
        str(path): evaluate_on(open_result(path), data, LoadSettings()).tuned.all.total.nll
        for path in (adapter, own, template_only)
    }
    assert losses[str(own)] == losses[str(template_only)] != losses[str(adapter)]


def test_a_base_without_a_template_is_asked_with_the_adapters(tmp_path):
    """Tokens for chats were added to a base of plain text, as many fine-tunes do."""
    base = tiny_llama(tmp_path / "base", chat_template=None)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|user|>{% endif %}"
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    saved = ["embed_tokens", "lm_head"]
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=saved)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")

    result = open_result(tmp_path / "adapter")
    pair = ModelPair(result, LoadSettings())
    text = pair.tokenizer.apply_chat_template(chat, tokenize=False)
    with pair.tuned():
        assert pair.tokenizer.apply_chat_template(chat, tokenize=False) == text
        assert len(pair.tokenizer) == len(tokenizer)
    assert len(pair.tokenizer) < len(tokenizer)
    comparison = evaluate_on(result, str(tmp_path / "chats.jsonl"), LoadSettings())
    assert comparison.base.all.total.num_examples == comparison.tuned.all.total.num_examples == 1


def test_tokens_that_the_model_does_not_have_are_refused(adapter, tmp_path, call):
    copy = tmp_path / "more"
    shutil.copytree(adapter, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(copy)
    for text, wanted in (("ab", 0), ("a <extra> b", 2)):
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps({"prompt": text, "completion": "cd"}) + "\n")
        for words in (["evaluate", copy, "--data", file], ["generate", copy, "--prompt", text]):
            code, _, err = call(*words)
            assert code == wanted and "Traceback" not in err, err
            assert wanted == 0 or "100" in err, err


def test_another_tokenizer_than_the_runs_is_reported(folder, finished, tmp_path, caplog):
    other = tmp_path / "base"
    shutil.copytree(folder / "base", other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = OTHER_TEMPLATE
    tokenizer.save_pretrained(other)
    ModelPair(open_result(finished), LoadSettings(base=str(other)))
    assert "the tokenizer or chat template in" in caplog.text
    caplog.clear()
    ModelPair(open_result(finished), LoadSettings())
    assert caplog.text == ""


def rows_of(file, lengths, answer="cd"):
    file.write_text(
        "".join(json.dumps({"prompt": "a" * n, "completion": answer}) + "\n" for n in lengths)
    )
    return file


def test_rows_that_are_too_long_are_counted(finished, tmp_path, call):
    # a token a character; the answer is two characters and the end
    file = rows_of(tmp_path / "long.jsonl", [10, 20, 38, 39, 40, 41, 60])
    code, printed, err = call("evaluate", finished, "--data", file, "--max-length", "40")
    assert code == 0 and "4 examples" in printed, err
    output = " ".join(printed.split())
    assert "3 more are left out: the prompt alone is too long for 40 tokens" in output
    assert "2 of the answers are cut at 40 tokens and never exact" in output
    code, printed, _ = call("evaluate", finished, "--data", file, "--max-length", "128")
    assert (
        code == 0
        and "7 examples" in printed
        and "left out" not in printed
        and "cut at" not in printed
    )
    code, printed, _ = call(
        "evaluate", finished, "--data", file, "--max-length", "40", "--generate"
    )
    assert (
        code == 0
        and "4 examples, answers generated" in printed
        and "3 more are left out" in printed
    )
    for more in ([], ["--generate"]):
        code, _, err = call(
            "evaluate", finished, "--data", rows_of(file, [200]), "--max-length", "40", *more
        )
        assert code == 2 and "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "--limit", "0"], "--limit must be at least 1; got 0"),
        (["evaluate", "--limit", "-1"], "--limit must be at least 1; got -1"),
        (["evaluate", "--max-length", "0"], "--max-length must be at least 2; got 0"),
        (
            ["evaluate", "--max-length", "257"],
            "--max-length is 257, and the model can see 256 tokens",
        ),
        (["evaluate", "--dtype", "int8"], "choose auto, float32"),
        (["evaluate", "--device", "tpu"], "'tpu' cannot be used"),
        (["evaluate", "--round", "9"], "keeps the rounds"),
        (["evaluate", "--category-column", "kind"], "is a column of --data"),
        (["evaluate", "--split", "test"], "--split is 'test', a part of --data, and without"),
        (
            ["evaluate", "--split", "dev", "--data", __file__],
            "--split is 'dev', and " + __file__ + " has no splits",
        ),
        (
            ["generate", "--prompt", "ab", "--max-new-tokens", "0"],
            "--max-new-tokens must be at least 1; got 0",
        ),
        (
            ["generate", "--prompt", "ab", "--max-new-tokens", "-3"],
            "--max-new-tokens must be at least 1; got -3",
        ),
        (
            ["generate", "--prompt", "ab", "--max-new-tokens", "256"],
            "passes the 256 that the model can see",
        ),
        (["generate", "--prompt", " "], "a --prompt is empty"),
    ],
)
def test_invalid_numbers_are_refused(finished, call, words, message):
    code, _, err = call(words[0], finished, *words[1:])
    assert code == 2 and message in err.replace("\n", " ") and "Traceback" not in err, err


def test_a_client_whose_held_out_prompts_are_all_too_long_is_left_out_as_in_the_run(tmp_path):
    def write(client, prompts):
        rows = [{"prompt": prompt, "completion": "ab"} for prompt in prompts]
        (tmp_path / f"{client}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / f"{client}.jsonl")

    # prompts that occur twice are never held out
    files = {
        "north": write("north", [f"n{number}" for number in range(8)]),
        "south": write("south", ["s", "s", *["x" * 60 + str(number) for number in range(6)]]),
    }
    data = DataConfig(
        client_files=files, max_length=40, max_truncated_fraction=1.0, test_fraction=0.25
    )
    config = tiny_config(tmp_path, federation={"num_rounds": 1})
    start(replace(config, data=data), tmp_path / "run")
    result = open_result(tmp_path / "run")
    comparison = evaluate_on(result, None, LoadSettings())
    assert list(comparison.tuned.by_client) == ["north"]
    assert (comparison.tuned.all.total.num_examples, comparison.num_lost) == (2, 2)
    lost = r"north \(held out\), south \(held out\): 4 of 4 examples lose .*: raise max-length, or"
    with pytest.raises(DataError, match=lost) as caught:
        evaluate_on(result, None, LoadSettings(), max_length=2)
    assert "max-truncated-fraction" not in str(caught.value)


def test_the_limit_takes_the_first(folder, finished, tmp_path):
    lines = (folder / "site0.jsonl").read_text().splitlines()
    (tmp_path / "two.jsonl").write_text("\n".join(lines[:2]) + "\n")
    limited = evaluate_on(
        open_result(finished), str(folder / "site0.jsonl"), LoadSettings(), limit=2
    )
    two = evaluate_on(open_result(finished), str(tmp_path / "two.jsonl"), LoadSettings())
    assert limited.tuned == two.tuned and limited.tuned.all.total.num_examples == 2


def test_round_and_client_are_refused_where_there_are_none(adapter, call):
    for words, message in (
        (["--round", "3"], "has no rounds; leave out --round"),
        (["--client", "x"], "leave out --client"),
    ):
        code, _, err = call("generate", adapter, "--prompt", "ab", *words)
        assert code == 2 and message in err
    code, _, err = call("evaluate", adapter)
    assert code == 2 and "give the examples to evaluate" in err


def test_another_base_is_refused(finished, tmp_path, call):
    code, _, err = call("evaluate", finished, "--base", tiny_llama(tmp_path / "other", seed=9))
    assert code == 2 and "base model differs" in err
