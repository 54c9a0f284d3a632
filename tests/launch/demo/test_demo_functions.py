"""The hand-written gradients are those of the plain formulas, and the layouts lose nothing."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moesaic.launch.demo.experts import ROW_ALIGNMENT, expert_layout
from moesaic.launch.demo.functions import (
    LOSS_CHUNK,
    QUERY_BLOCK,
    causal_attention,
    chunked_cross_entropy,
    permute,
    rms_norm,
    unpermute,
)
from moesaic.launch.demo.optimizer import orthogonalise


def gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The gradients of a fixed weighted sum of `out`."""
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


@pytest.mark.parametrize("length", [1, QUERY_BLOCK - 1, QUERY_BLOCK, 2 * QUERY_BLOCK + 3])
def test_attention_is_causal_softmax_attention(length: int) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(3, length, 12, requires_grad=True) for _ in range(2))
    v = torch.randn(3, length, 8, requires_grad=True)
    ours = causal_attention(q, k, v, 0.3)
    theirs = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, q, k, v), gradients(theirs, q, k, v), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_cross_entropy_in_chunks_is_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(LOSS_CHUNK + 50, 16, requires_grad=True)
    head = torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(40, (len(hidden),))
    ours, theirs = chunked_cross_entropy(hidden, head, targets), functional.cross_entropy(hidden @ head.t(), targets)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, hidden, head), gradients(theirs, hidden, head), strict=True):
        torch.testing.assert_close(a, b)


def test_rms_norm_has_the_gradients_of_the_formula() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 7, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    ours, theirs = rms_norm(x, weight, 1e-6), functional.rms_norm(x, (16,), weight, 1e-6)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, x, weight), gradients(theirs, x, weight), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_of_experts_are_aligned_and_come_back() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 8, requires_grad=True)
    topk_ids = torch.stack([torch.randperm(6)[:3] for _ in range(len(x))])
    counts = topk_ids.flatten().bincount(minlength=7)
    sources, placed, ends = expert_layout(topk_ids, counts)
    rows = permute(x, sources, placed)
    assert (ends % ROW_ALIGNMENT == 0).all() and rows.shape[0] == ends[-1]
    expert_of_row = torch.searchsorted(ends, placed, right=True)
    assert torch.equal(expert_of_row, topk_ids.flatten())
    back = unpermute(rows, placed)
    assert torch.equal(back, x.repeat_interleave(3, 0))
    ours, theirs = gradients(back, x), gradients(x.repeat_interleave(3, 0), x)
    torch.testing.assert_close(ours, theirs)


def test_muon_updates_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(4, 64, 256)).float())
    assert values.min() > 0.5 and values.max() < 1.4
