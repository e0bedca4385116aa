"""Probes of matrices: the same numbers whole, by blocks, in factors, and where the matrix is."""

import pytest
import torch

from fedmomentum.linalg import probes
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.probes import probe, probe_vectors, times


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_a_probe_is_the_bilinear_form_by_every_way(dtype, monkeypatch):
    monkeypatch.setattr(probes, "BLOCK_ELEMENTS", 7 * 23)  # some rows at a time
    generator = torch.Generator().manual_seed(0)
    matrix = (10 * torch.randn(61, 23, generator=generator)).to(dtype)
    U, X = probe_vectors("m", (61, 23), 3)
    wanted = torch.stack([u @ matrix.double() @ x for u, x in zip(U.T, X.T, strict=True)])
    assert torch.allclose(probe(matrix, U, X), wanted, rtol=1e-12)
    assert torch.allclose(times(matrix, X), matrix.double() @ X, rtol=1e-12)
    # What a GPU does, here on the CPU.
    assert torch.allclose(probes._probe_on_device(matrix, U, X), wanted, rtol=1e-10)
    if dtype.is_floating_point:
        factored = LowRank(matrix[:, :5], matrix[:5])
        dense = factored.to(torch.float64).dense()
        wanted = (U * (dense @ X)).sum(0)
        assert torch.allclose(probe(factored, U, X), wanted, rtol=1e-10)
        assert torch.allclose(probes._probe_on_device(factored, U, X), wanted, rtol=1e-10)
