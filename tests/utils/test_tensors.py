"""Tensors as safetensors bytes: views are what the library reads, and nothing else becomes one."""

import json

import pytest
import torch

from fedmomentum.errors import PayloadError
from fedmomentum.utils.tensors import (
    LENGTH_BYTES,
    read_safetensors,
    safetensors_bytes,
    view_safetensors,
)

TENSORS = {
    "b": torch.arange(12.0).view(3, 4),
    "a": torch.randn(5, 2, generator=torch.Generator().manual_seed(0)),
    "empty": torch.zeros(0, 7),
    "scalar": torch.tensor(3.0),
}


def pointers(data: bytes) -> range:
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    assert len(buffer) == len(data)
    import ctypes

    start = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
    return range(start, start + len(data))


def test_float32_tensors_are_views_of_the_bytes():
    data = safetensors_bytes(TENSORS)
    viewed = view_safetensors(data, "x")
    read, _ = read_safetensors(data, "x")
    assert viewed.keys() == read.keys() == TENSORS.keys()
    for name, tensor in viewed.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, TENSORS[name])
        assert not tensor.numel() or tensor.data_ptr() in pointers(data)
    assert not any(tensor.data_ptr() in pointers(data) for tensor in read.values())
    # The bytes live as long as a view of them.
    tensor = view_safetensors(safetensors_bytes(TENSORS), "x")["b"]
    assert torch.equal(tensor, TENSORS["b"])


@pytest.mark.parametrize("metadata", [None, ("key", "value")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_tensors_of_other_dtypes_are_copied(dtype, metadata):
    tensors = {**TENSORS, "c": torch.ones(3, 3, dtype=dtype)}
    data = safetensors_bytes(tensors, metadata)
    viewed = view_safetensors(data, "x")
    assert all(torch.equal(viewed[name], tensors[name]) for name in tensors)


def with_header(header: object, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + body


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": {**F32, "shape": [3]}},  # more than there is
        {"a": {**F32, "data_offsets": [0, 12]}},
        {"a": {**F32, "data_offsets": [8, 16]}},  # a gap, and beyond the end
        {"a": F32, "b": F32},  # two tensors in one place
        {"a": {**F32, "shape": [-2]}},
        {"a": {**F32, "shape": [2**40, 2**40]}},
        {"a": F32, "b": {**F32, "shape": [2**40, 2**40, 0], "data_offsets": [8, 8]}},
        {"a": F32, "b": {**F32, "shape": [0, 2**63], "data_offsets": [8, 8]}},
        {"a": {**F32, "shape": [1], "data_offsets": [0, 4]}},  # less than there is
        {"a": {**F32, "data_offsets": [8, 0]}},
        {"a": []},
        [],
        3,
    ],
)
def test_a_false_header_is_still_refused(header):
    data = with_header(header, torch.ones(2).numpy().tobytes())
    assert torch.equal(
        view_safetensors(with_header({"a": F32}, torch.ones(2).numpy().tobytes()), "x")["a"],
        torch.ones(2),
    )
    for read in (view_safetensors, read_safetensors):
        with pytest.raises(PayloadError):
            read(data, "x")
    for cut in (0, 4, 8, 20, len(data) - 1):
        with pytest.raises(PayloadError):
            view_safetensors(data[:cut], "x")
