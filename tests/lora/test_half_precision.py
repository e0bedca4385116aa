"""Factors in 16 bits: what arrives is what was sent, what is lost is reported, and downloads lose nothing."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmomentum.aggregation.aggregate import AggregationResult
from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.errors import ConfigError, PayloadError
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.linalg.low_rank import difference
from fedmomentum.lora.adapter import Adapter, to_tensors
from fedmomentum.lora.half_precision import (
    decode_factors,
    dtype_of,
    encode_factors,
    rounding_error,
    roundtrip,
    wire_dtype,
)
from tests.helpers import random_matrix
from tests.runs import chain, start, timeless, tiny_config
from tests.server.test_server import _tensor, with_faults

HALVES = [torch.float16, torch.bfloat16]
NAME = "base_model.model.q.lora_A.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def adapter(scale=1.0, scaling=2.5):
    modules = {
        "q": random_matrix(24, 40, 4).to(torch.float32),
        "v": random_matrix(16, 40, 4, seed=3).to(torch.float32),
    }
    modules = {name: m.scaled(scale).to(torch.float32) for name, m in modules.items()}
    return Adapter(modules, dict.fromkeys(modules, scaling), {"head": torch.rand(3)}, {}, "one")


@given(st.integers(-60, 60), st.integers(0, 99), st.sampled_from(HALVES))
def test_narrowing_keeps_eleven_bits_whatever_the_size_and_is_stable(power, seed, dtype):
    """float16 alone would flush 2^-30 to zero and overflow at 65504; narrowing again changes no bit."""
    tensor = torch.randn(7, 9, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    sent = encode_factors({NAME: tensor, "other": tensor}, dtype)
    got = decode_factors(sent, dtype, "x")
    assert got.keys() == {NAME, "other"} and got["other"] is tensor and dtype_of(sent) == dtype
    digits = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    error = (got[NAME] - tensor).abs()
    assert bool((error <= digits * tensor.abs() + 2.0**-25 * tensor.abs().max()).all())
    encoded_again = encode_factors(got, dtype)
    assert encoded_again.keys() == sent.keys() and all(
        torch.equal(encoded_again[key], sent[key]) for key in sent
    )


@pytest.mark.parametrize("largest", [65520.0, 32767.99, 32768.0, 1.9999999, 2.0**-140, 0.0])
def test_numbers_at_the_edge_of_a_power_are_stable_too(largest):
    tensor = torch.tensor([[largest, -largest / 3, largest / 1000]])
    sent = encode_factors({NAME: tensor}, torch.float16)
    got = decode_factors(sent, torch.float16, "x")
    assert bool(got[NAME].isfinite().all()) and torch.allclose(got[NAME], tensor, rtol=1e-3)
    assert all(
        torch.equal(value, sent[key]) for key, value in encode_factors(got, torch.float16).items()
    )


def test_an_invalid_factor_in_the_wire_dtype_is_refused_by_name():
    sent = encode_factors({NAME: torch.rand(2, 2)}, torch.float16)
    exponent = NAME + ".exponent"
    for bad in (
        {exponent: sent[exponent]} | {NAME: torch.rand(2, 2)},
        {NAME: sent[NAME]},
        sent | {exponent: torch.tensor([300], dtype=torch.int16)},
        sent | {exponent: torch.tensor([3.0])},
    ):
        with pytest.raises(PayloadError, match=f"client x: tensor {NAME}"):
            decode_factors(bad, torch.float16, "client x")
    for key in ("evil" + exponent, "evil.exponent"):
        with pytest.raises(
            PayloadError, match=f"client x: tensor {key} is the exponent of no factor"
        ):
            decode_factors(sent | {key: sent[exponent]}, torch.float16, "client x")
    with pytest.raises(ConfigError, match="float8"):
        wire_dtype("float8")


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_errors_of_the_adapter_go_into_the_residual(dtype):
    """Law 1 with a scaling: sent adapter + residual = adapter + residual before, in float64."""
    unrounded = adapter(scaling=2.5)
    residual = {"q": random_matrix(24, 40, 3, seed=8).to(torch.float32)}
    start_model = GlobalModel(BaseIdentity("base"), adapter(), adapter_dtype=dtype)
    next_model = start_model.advance(AggregationResult(unrounded, residual, {}, {}, {}), "m")
    assert (
        next_model.adapter_dtype == dtype and rounding_error(unrounded, next_model.adapter) > 1e-5
    )
    for module in unrounded.modules:
        wanted = unrounded.effective(module).dense() + (
            residual[module].dense().double() if module in residual else 0
        )
        got = next_model.effective(module).dense()
        assert float((got - wanted).norm() / wanted.norm()) < 1e-6
    inexact = start_model.advance(AggregationResult(unrounded, {}, {}, {}, {}), "m", exact=False)
    assert inexact.base_update == () and inexact.adapter_objects == next_model.adapter_objects


@pytest.mark.parametrize("dtype", HALVES)
def test_a_folder_keeps_the_bits_that_are_sent(tmp_path, dtype):
    model = GlobalModel(BaseIdentity("base"), adapter(1e-4)).with_wire_dtype(dtype)
    model.save(tmp_path)
    loaded = GlobalModel.load(tmp_path)
    assert loaded.adapter_dtype == dtype and loaded.adapter_objects == model.adapter_objects
    for name, tensor in to_tensors(model.adapter).items():
        assert (
            torch.equal(tensor, to_tensors(loaded.adapter)[name]) and tensor.dtype == torch.float32
        )


def test_rounding_error_is_that_of_the_products():
    one = adapter(scaling=3.0)
    other = roundtrip(one, torch.bfloat16)
    lost = sum((3 * difference(one.modules[m], other.modules[m]).norm()) ** 2 for m in one.modules)
    size = sum((3 * one.modules[m].norm()) ** 2 for m in one.modules)
    assert (
        rounding_error(one, other) == pytest.approx((lost / size) ** 0.5)
        and rounding_error(one, one) == 0
    )


# ── runs ──


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_with_downloads_in_16_bits_a_round_is_as_exact_as_in_32(folder, tmp_path, dtype):
    config = tiny_config(folder, federation={"num_rounds": 2, "downlink_dtype": dtype})
    start(config, tmp_path / "run")
    for row in timeless(tmp_path / "run")[1:]:
        assert row["exactness_error"] < 1e-4 and row["applied_share"] > 0.999
        assert row["downlink_rounding"] > 1e-5 and row["uplink_rounding"] == 0
    assert GlobalModel.load(tmp_path / "run").adapter_dtype == wire_dtype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_uploads_in_16_bits_cost_half_and_report_the_rounding_error(folder, tmp_path, dtype):
    out = {}
    for name in ("float32", dtype):
        config = tiny_config(
            folder, federation={"num_rounds": 2, "uplink_dtype": name}, evaluation={"every": 0}
        )
        run = start(config, tmp_path / name)
        out[name] = timeless(tmp_path / name), run.model.adapter
    numbers = sum(m.B.numel() + m.A.numel() for m in out[dtype][1].modules.values())
    wide, narrow = (out[name][0][1]["uplink_bytes"]["site0"] for name in ("float32", dtype))
    header = 32 + (
        0 if dtype == "bfloat16" else 8 * (2 + 170)
    )  # names of dtypes; exponents and their names
    assert 2 * numbers - header <= wide - narrow <= 2 * numbers
    rows = out[dtype][0]
    assert all(1e-5 < row["uplink_rounding"] < 2e-2 for row in rows[1:])
    assert all(row["downlink_rounding"] == 0 for row in rows[1:])


def test_exactness_includes_the_rounding_of_uploads(folder, tmp_path):
    """The probes are of the weights as trained: what 16 bits took of them shows."""
    config = tiny_config(folder, federation={"num_rounds": 1, "uplink_dtype": "bfloat16"})
    start(config, tmp_path / "run")
    row = timeless(tmp_path / "run")[1]
    assert 0.1 * row["uplink_rounding"] < row["exactness_error"] < 3 * row["uplink_rounding"]


def test_a_run_in_16_bits_resumes_to_the_same_bits(folder, tmp_path):
    settings = {"num_rounds": 3, "uplink_dtype": "float16", "downlink_dtype": "float16"}
    config = tiny_config(folder, federation=settings)
    start(config, tmp_path / "whole")
    short = replace(config, federation=replace(config.federation, num_rounds=2))
    start(short, tmp_path / "parts")
    start(config, tmp_path / "parts", resume=True)
    assert chain(tmp_path / "parts")["0003.json"] == chain(tmp_path / "whole")["0003.json"]


def test_a_client_that_sends_another_dtype_than_requested_is_refused_by_name(folder, tmp_path):
    config = tiny_config(folder, federation={"num_rounds": 1, "uplink_dtype": "float16"})

    def wide(tensors, key):
        tensors[key] = tensors[key].float()

    with_faults(config, tmp_path / "run", {"site1": _tensor(wide)})
    assert (
        "has dtype torch.float32; wanted torch.float16"
        in timeless(tmp_path / "run")[1]["failures"]["site1"]
    )


def test_manifests_of_32_bits_are_as_before(folder, tmp_path):
    start(tiny_config(folder, federation={"num_rounds": 1}), tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "rounds" / "0001.json").read_text())
    assert (
        "adapter_dtype" not in manifest
        and GlobalModel.load(tmp_path / "run").adapter_dtype == torch.float32
    )
