"""RMS norm and SwiGLU against float64, at sizes and magnitudes that would show a careless reduction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.kernels.activation import swiglu
from moesaic.kernels.norm import add_rms_norm, rms_norm


def _rms_norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("width", [1, 7, 7168])
def test_rms_norm_equals_float64(width: int, magnitude: float) -> None:
    x, weight = _random(5, width) * magnitude, _random(width, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), _rms_norm64(x, weight, 1e-6), rtol=1e-5, atol=1e-6)


def test_eps_counts_where_the_input_is_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


def test_statistics_of_bfloat16_are_not_bfloat16() -> None:
    x = _random(4, 4096).bfloat16()
    out = rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 1e-6)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), _rms_norm64(x, torch.ones(4096), 1e-6), rtol=2**-8, atol=0)


def test_the_fused_form_norms_the_sum_and_returns_it() -> None:
    x, residual, weight = _random(3, 16), _random(3, 16, seed=1), _random(16, seed=2)
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight, 1e-6))


def test_no_tokens_are_normed_to_no_tokens() -> None:
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
    assert swiglu(torch.empty(0, 8)).shape == (0, 4)


def test_swiglu_gates_with_the_first_half_and_leaves_its_input() -> None:
    gate_up = _random(3, 4, 10)
    kept = gate_up.clone()
    gate, up = gate_up.double().split(5, dim=-1)
    torch.testing.assert_close(swiglu(gate_up).double(), gate / (1 + (-gate).exp()) * up, rtol=1e-6, atol=1e-6)
    assert torch.equal(gate_up, kept)
