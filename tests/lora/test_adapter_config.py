"""Adapters from strangers: patterns in linear time and in PEFT's sense, every field checked, nothing non-finite."""

import json
import os
import random
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from transformers import AutoModelForCausalLM

from fedmomentum import aggregate_adapters, read_adapter, write_adapter
from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.cli.inspection import summarize
from fedmomentum.errors import AdapterError, ModelError
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import Adapter
from fedmomentum.lora.patterns import MAX_EXPRESSIONS, Patterns
from fedmomentum.utils.tensors import safetensors_bytes
from tests.tiny import tiny_llama

MODULE = "model.layers.0.self_attn.q_proj"


def write(folder, *, config=None, tensors=None, rank=2, alpha=4):
    """A small adapter's directory; `config` and `tensors` replace what they name, None takes it away."""
    folder.mkdir(exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "base_model_name_or_path": "base",
        **(config or {}),
    }
    factors = {
        f"base_model.model.{MODULE}.lora_A.weight": torch.ones(rank, 6),
        f"base_model.model.{MODULE}.lora_B.weight": torch.ones(8, rank),
        **(tensors or {}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    kept = {name: tensor for name, tensor in factors.items() if tensor is not None}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(kept, ("format", "pt")))
    return folder


# ── patterns ──

ATOMS = (
    "a",
    "b",
    "0",
    "q_proj",
    r"\.",
    ".",
    r"\d",
    r"\w",
    "[ab]",
    "[^a.]",
    "(a|b)",
    "(?:ab)",
    ".*",
    "[0-3]",
    "^",
    "$",
    r"\b",
    "layers",
    "self_attn",
    "(q|k|v)_proj",
    "-",
    "_",
    r"\S",
    "a{2}",
    "a{1,2}",
)
MODULES = (
    "a",
    "b",
    "a.b",
    "ab",
    "q_proj",
    "layers.0.self_attn.q_proj",
    "model.layers.12.self_attn.v_proj",
    "a_b",
    "layers0",
    "aa.bb.0",
    "x.layers.3.a-b",
    "model.layers_0.q_proj",
    "q_projx",
    "xq_proj",
    "aab",
    "a.b.a",
)


def test_patterns_match_what_pefts_own_function_matches():
    """Random expressions over what people write; each that is taken gives PEFT's value for every module."""
    draw = random.Random(0)
    num_compared = 0
    for _ in range(2000):
        keys = []
        for _ in range(draw.randint(1, 3)):
            parts = [
                draw.choice(ATOMS) + draw.choice(("", "", "", "*", "+", "?", "*?", "|"))
                for _ in range(3)
            ]
            keys.append("".join(parts[: draw.randint(1, 3)]))
        table = {key: number for number, key in enumerate(keys)}
        try:
            patterns = Patterns(table, "rank_pattern", "x")
        except AdapterError:
            continue
        for module in MODULES:
            assert patterns.find(module, -1) == table.get(
                get_pattern_key(table.keys(), module), -1
            ), (keys, module)
            num_compared += 1
    assert num_compared > 15_000


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 6},
        {"layers.1.self_attn.q_proj": 6, "q_proj": 3},
        {r".*\.1\..*_proj": 6},
        {"(q|v)_proj": 3},
        {r"^model\.layers\.0\.": 6},
        {r"^model.layers.0.self_attn.q_proj": 6},
        {r"model\.layers\.[1-9]\d*\..*": 6},
        {"layers_1_self_attn.q_proj": 5},
        {r"layers\.(0|2)\.self_attn\.[qv]_proj": 3},
    ],
)
def test_ranks_and_scalings_are_those_of_the_model_that_peft_makes(tmp_path, pattern):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "base"))
    alphas = {key: 7 * value for key, value in pattern.items()}
    config = LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj"],
        rank_pattern=pattern,
        alpha_pattern=alphas,
    )
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert len(adapter.modules) == 4
    for module, matrix in adapter.modules.items():
        layer = model.get_base_model().get_submodule(module)
        assert (
            matrix.rank == layer.r["default"]
            and adapter.scalings[module] == layer.scaling["default"]
        )


@pytest.mark.parametrize(
    "key",
    [
        "(a+)+b",
        "(.*)*x",
        "(a|a)*b",
        r"(\w+\s?)*$",
        "(.+.+)+y",
        "^(([a-z])+.)+[A-Z]([a-z])+$",
        ".*" * 300 + "x",
    ],
)
def test_patterns_that_backtrack_forever_are_matched_at_once(tmp_path, key):
    name = "base_model.model." + "a" * 200 + ".lora_{}.weight"
    more = {name.format("A"): torch.ones(2, 6), name.format("B"): torch.ones(8, 2)}
    folder = write(
        tmp_path / "adapter",
        config={"alpha_pattern": {key: 9}, "rank_pattern": {key: 2}},
        tensors=more,
    )
    started = time.process_time()
    assert read_adapter(folder).scalings[MODULE] in (2.0, 4.5)
    assert list(summarize(folder))
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("[", "is no regular expression"),
        (r"\1", "not supported"),
        ("(?<=a)b", "not supported"),
        (r"(a)\1", "not supported"),
        ("a++", "not supported"),
        ("a{,3}", "not supported"),
        ("[[:alpha:]]", "is no regular expression"),
        ("é", "not supported"),
        ("a" * 2000, "has a key of 2000 char"),
        ("(" * 490 + ")" * 490, "no regular expression|not supported|^$"),
        ("a{1001}", "not supported"),
    ],
)
def test_keys_that_python_and_re2_read_differently_are_refused_by_name(tmp_path, key, match):
    folder = write(tmp_path / "adapter", config={"alpha_pattern": {key: 9}})
    try:
        assert read_adapter(folder).scalings[MODULE] == 2.0
    except AdapterError as error:
        assert "alpha_pattern" in str(error)
        with pytest.raises(AdapterError, match=match):
            read_adapter(folder)
    else:
        assert "^$" in match


def test_thousands_of_modules_named_in_full_are_looked_up():
    keys = [
        f"model.layers.{i // 384}.mlp.experts.{i % 128}.{('up', 'down', 'gate')[i % 3]}_proj"
        for i in range(20_000)
    ]
    table = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    started = time.process_time()
    patterns = Patterns(table, "rank_pattern", "x")
    assert all(patterns.find(key, -1) == number for key, number in table.items())
    assert time.process_time() - started < 5
    with pytest.raises(AdapterError, match="rank_pattern has 1001 regular expressions"):
        Patterns({f"a+{number}": 1 for number in range(MAX_EXPRESSIONS + 1)}, "rank_pattern", "x")


# ── fields ──


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"lora_alpha": 0}, "lora_alpha: Expected `float` > 0.0; got 0$"),
        ({"lora_alpha": -4}, "lora_alpha: Expected `float` > 0"),
        ({"lora_alpha": float("nan")}, "not valid JSON"),
        ({"lora_alpha": "4"}, "lora_alpha: Expected `float`, got `str`"),
        ({"lora_alpha": None}, "lora_alpha: Expected `float`, got `null`"),
        ({"lora_alpha": 1e300}, "lora_alpha: .*<="),
        ({"lora_alpha": 10**400}, "lora_alpha: Number out of range|not valid JSON"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": [4]}, "lora_alpha: Expected `float`, got `array`"),
        ({"r": 2.5}, "r: Expected `int`, got `float`"),
        ({"r": True}, "r: Expected `int`, got `bool`"),
        ({"r": 0}, "r: Expected `int` >= 1"),
        ({"r": "2"}, "r: Expected"),
        ({"rank_pattern": []}, "rank_pattern: Expected `object"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern.*`int`"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern.*> 0"),
        ({"alpha_pattern": "x"}, "alpha_pattern: Expected"),
        ({"use_rslora": "yes"}, "use_rslora: Expected `bool`"),
        ({"modules_to_save": "head"}, "modules_to_save: Expected"),
        ({"modules_to_save": [1]}, "modules_to_save.*Expected `str`"),
        ({"peft_type": 5}, "peft_type: Expected `str"),
        ({"base_model_name_or_path": {}}, "base_model_name_or_path"),
        ({"task_type": ["x"]}, "task_type"),
        (
            {"base_model_name_or_path": "x\n---\nlicense: y"},
            "base_model_name_or_path: Expected `str` matching",
        ),
        ({"target_modules": json.loads("[" * 50 + "]" * 50)}, "nested deeper than"),
        ({"lora_dropout": 2}, "lora_dropout"),
        ({"use_dora": True}, "use_dora = True; only its default, False, is supported"),
        ({"\x1b[2J": 1}, "has \ufffd.2J = 1"),
        ({"megatron_config": "x" * 10_000}, "megatron_config = 'xxx.{80,110}; only its default"),
    ],
)
def test_every_field_is_checked_and_named(tmp_path, config, match):
    folder = write(tmp_path / "adapter", config=config)
    with pytest.raises(AdapterError, match=match) as caught:
        read_adapter(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text", ["[", "[]", "1", "", "{" * 100_000, "[" * 10**6, '{"r": ' + "[" * 10**5, "\ufeff{}"]
)
def test_configurations_that_are_not_json_objects_are_refused(tmp_path, text):
    folder = write(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match="adapter_config.json"):
        read_adapter(folder)


A, B = f"base_model.model.{MODULE}.lora_A.weight", f"base_model.model.{MODULE}.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({A: torch.ones(12)}, "neither a factor"),
        ({A: torch.ones(2, 6, 1)}, "neither a factor"),
        ({A: torch.ones(3, 6)}, "must be"),
        ({A: torch.ones(2, 0)}, "is empty, .2, 0."),
        ({A: None}, "lora_B only"),
        (
            {A: torch.ones(2, 6, dtype=torch.int32), B: torch.ones(8, 2, dtype=torch.int32)},
            "wanted floating point",
        ),
        (
            {
                A: torch.ones(2, 6).to(torch.float8_e4m3fn),
                B: torch.ones(8, 2).to(torch.float8_e4m3fn),
            },
            "wanted floating",
        ),
        ({A: torch.ones(2, 6, dtype=torch.complex64)}, "wanted floating point"),
        ({A: torch.full((2, 6), float("inf"))}, "lora_A of .* holds NaN or Inf"),
        ({A: torch.ones(2, 6).double()}, "dtype"),
        (
            {"base_model.model.head.weight": torch.full((2, 2), float("nan"))},
            "head.weight of modules_to_save holds",
        ),
        (
            {"base_model.model." + "a" * 3000 + ".lora_A.weight": torch.ones(2, 6)},
            "which is no name of a module",
        ),
        (
            {"base_model.model.\x1b[2J.lora_A.weight": torch.ones(2, 6)},
            "which is no name of a module",
        ),
    ],
)
def test_every_tensor_is_checked_and_named(tmp_path, tensors, match):
    folder = write(tmp_path / "adapter", config={"modules_to_save": ["head"]}, tensors=tensors)
    with pytest.raises(AdapterError, match=match):
        read_adapter(folder)


def test_sizes_are_checked_in_the_header_before_any_values_are_read(tmp_path):
    folder = write(tmp_path / "adapter")
    header = {A: {"dtype": "F32", "shape": [2, 2**23], "data_offsets": [0, 2**26]}}
    text = json.dumps(header).encode()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + 2**26)  # takes no room on disk
    with pytest.raises(
        AdapterError, match=r"claims the shape \(2, 8388608\); no layer is so large"
    ):
        read_adapter(folder)
    file.write_bytes((2**25).to_bytes(8, "little") + b" " * 100)
    os.truncate(file, 2**26)
    with pytest.raises(AdapterError, match="claims a header of 33554432 bytes"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "directory", "missing"])
def test_files_of_other_kinds_are_not_waited_for(tmp_path, name, kind):
    folder = write(tmp_path / "adapter")
    file = folder / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "loop":
        file.symlink_to(file)
    elif kind == "directory":
        file.mkdir()
    with pytest.raises(AdapterError, match=f"no {name} in"):
        read_adapter(folder)


def test_a_folder_with_both_an_adapter_and_a_global_model_is_refused(tmp_path):
    folder = write(tmp_path / "both")
    (folder / "global_model.json").write_text("{}")
    with pytest.raises(
        ModelError, match="holds a PEFT adapter .* and global_model.json; move one of them away"
    ):
        list(summarize(folder))


# ── sums ──


@pytest.mark.parametrize(
    "factors",
    [
        (torch.full((8, 2), 1e19), torch.full((2, 6), 1e19)),
        (torch.full((8, 2), 3e38), torch.full((2, 6), 3e38)),
        (torch.full((8, 2), 3e38), torch.full((2, 6), 1e-30)),
        (torch.full((8, 2), 1e-30), torch.full((2, 6), 3e38)),
        (torch.full((8, 2), 1e10), torch.full((2, 6), 1e10)),
    ],
)
@pytest.mark.parametrize(
    "method", ["fedmomentum", "fedit", "flora", "fedexlora", "hetlora", "flexlora"]
)
def test_overflow_is_refused_by_adapter_and_module(tmp_path, factors, method, call):
    write(tmp_path / "good")
    write(tmp_path / "diverged", tensors={B: factors[0], A: factors[1]})
    out = tmp_path / "out"
    code, _, err = call(
        "aggregate", tmp_path / "good", tmp_path / "diverged", "--out", out, "--method", method
    )
    output = " ".join(err.split())
    assert (
        code == 2
        and "Traceback" not in err
        and f"{tmp_path / 'diverged'}: module {MODULE} has factors of norm" in output
    )
    assert not out.exists()


def test_large_and_small_factors_within_the_bound_are_combined_exactly():
    def adapter(size, name):
        generator = torch.Generator().manual_seed(len(name))
        matrix = LowRank(
            size * torch.randn(8, 2, generator=generator),
            torch.randn(2, 6, generator=generator) / 1e3,
        )
        return Adapter({"m": matrix}, {"m": 2.0}, name=name)

    for size in (1e-12, 1e12):
        parts = [adapter(size, "one"), adapter(size, "other")]
        result = aggregate_adapters(parts)
        wanted = sum(part.effective("m").dense() for part in parts) / 2
        got = result.adapter.effective("m").dense()
        if "m" in result.residual:
            residual = result.residual["m"]
            got = got + (
                residual.to(torch.float64).dense()
                if isinstance(residual, LowRank)
                else residual.double()
            )
        assert float((got - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_adapters_of_any_floating_dtype_become_a_model_in_float32(tmp_path, call, dtype):
    for name, size in (("one", 1.0), ("other", 3.0)):
        factors = {B: size * torch.ones(8, 2, dtype=dtype), A: torch.ones(2, 6, dtype=dtype)}
        write(tmp_path / name, tensors=factors)
    code, _, err = call(
        "aggregate", tmp_path / "one", tmp_path / "other", "--out", tmp_path / "out"
    )
    assert code == 0, err
    model = GlobalModel.load(tmp_path / "out")
    effective = model.effective(MODULE)
    got = effective.dense() if isinstance(effective, LowRank) else effective
    assert torch.allclose(
        got, torch.full((8, 6), 8.0, dtype=torch.float64), rtol=1e-6
    )  # 2 * (2 + 6) / 2


@pytest.mark.parametrize(
    "weights", ["1e308,1e308", "1e-320,1e300", "nan,1", "inf,1", "0,1", "-1,1"]
)
def test_weights_that_have_no_finite_shares_are_refused(tmp_path, call, weights):
    for name in ("one", "other"):
        write(tmp_path / name)
    code, _, err = call(
        "aggregate",
        tmp_path / "one",
        tmp_path / "other",
        "--out",
        tmp_path / "out",
        f"--weights={weights}",
    )
    assert (
        code == 2
        and "weights must be positive numbers" in " ".join(err.split())
        and not (tmp_path / "out").exists()
    )


def test_nothing_that_is_not_finite_is_written(tmp_path):
    matrix = LowRank(torch.full((8, 2), float("inf")), torch.ones(2, 6))
    adapter = Adapter({MODULE: matrix}, {MODULE: 2.0}, config={"r": 2}, name="diverged")
    with pytest.raises(
        AdapterError, match=f"diverged: tensor .*{MODULE}.lora_B.weight holds NaN or Inf; nothing"
    ):
        write_adapter(adapter, tmp_path / "adapter")
    with pytest.raises(ModelError, match=f"{MODULE}.lora_B.weight holds NaN or Inf"):
        GlobalModel(BaseIdentity("base"), adapter).save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
