"""Other libraries' attention gives what ours gives: packed chunks with and without cached prefixes, gaps between contexts."""

from __future__ import annotations

import standin_flashinfer
import torch
from torch import Tensor

from moesaic.kernels.mla_prefill import mla_prefill_reference
from moesaic.kernels.prefill_libraries import FlashInferPrefill, Prefill, sdpa_prefill

CHUNKS = torch.tensor([[0, 7, 0, 0], [7, 1, 16, 11], [8, 5, 32, 4], [13, 16, 48, 16]])
"""First row, rows, first context row, cached before it: contexts begin at pages of 16."""
HEADS, NOPE, ROPE, VALUE, SCALE = 3, 8, 4, 6, 0.3


def _inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return random(29, HEADS, NOPE + ROPE), random(HEADS, NOPE, 80), random(ROPE, 80), random(80, HEADS, VALUE)


def _check(prefill: Prefill, seed: int) -> None:
    inputs = _inputs(seed)
    torch.testing.assert_close(prefill(*inputs, CHUNKS, scale=SCALE), mla_prefill_reference(*inputs, CHUNKS, scale=SCALE))


def test_torchs_own() -> None:
    _check(sdpa_prefill, 0)


def test_flashinfers_is_planned_once_for_the_layers_of_a_step() -> None:
    with standin_flashinfer.installed() as library:
        prefill = FlashInferPrefill(torch.device("cpu"))
        for layer in range(3):
            _check(prefill, layer)
        assert library.num_plans == 1
        inputs = _inputs(5)
        prefill(*inputs, CHUNKS.clone(), scale=SCALE)
        assert library.num_plans == 2, "another step"
