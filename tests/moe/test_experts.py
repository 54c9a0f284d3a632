"""The expert runner, gate and dense feed-forward: both layouts agree, and FP8 rounding is where it is said to be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.activation import swiglu
from moesaic.kernels.quant import round_to_fp8
from moesaic.kernels.topk import grouped_topk
from moesaic.moe.config import GateConfig
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import ContiguousRows, MaskedRows
from moesaic.moe.experts import ExpertWeights, TorchExpertRunner
from moesaic.moe.gate import Gate
from moesaic.moe.layer import DenseMLP
from moesaic.moe.layouts import ExpertLayout, arrange, per_choice, weighted

HIDDEN, INNER, EXPERTS = 150, 140, 5
"""More than one quantisation block each, the last one ragged."""


def _weights() -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)
    return ExpertWeights(
        gate_up=torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5,
        down=torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) * INNER**-0.5,
    )


WEIGHTS = _weights()


def _rounded_or_not(x: Tensor, fp8: bool) -> Tensor:
    return round_to_fp8(x) if fp8 else x


@settings(max_examples=15, deadline=None)
@given(num_tokens=st.integers(0, 9), fp8=st.booleans(), seed=st.integers(0, 2**31))
def test_both_layouts_give_each_choice_the_same_output(num_tokens: int, fp8: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    ids = torch.randint(-1, EXPERTS, (num_tokens, 1), generator=generator)
    shares = torch.rand(num_tokens, 1, generator=generator)
    runner = TorchExpertRunner(WEIGHTS, fp8_activations=fp8)
    outputs = []
    for mode, alignment in ((DispatchMode.NORMAL, 1), (DispatchMode.NORMAL, 16), (DispatchMode.LOW_LATENCY, 1)):
        arranged = arrange(hidden, ids, ExpertLayout(mode=mode, num_local=EXPERTS, alignment=alignment))
        rows = runner.run(arranged.rows)
        assert rows.shape == arranged.rows.hidden.shape
        outputs.append(per_choice(rows, arranged.row_map))
        torch.testing.assert_close(weighted(rows, arranged.row_map, shares), outputs[-1][:, 0] * shares)
    tolerance = 5e-2 if fp8 else 1e-5  # a value between two FP8 steps may round either way after a different summation
    torch.testing.assert_close(outputs[0], outputs[1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_go_through_their_own_expert_and_are_rounded_before_each_product(fp8: bool) -> None:
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(1))
    counts = [2, 0, 3, 0, 1]
    out = TorchExpertRunner(WEIGHTS, fp8_activations=fp8).run(ContiguousRows(hidden=x, counts=counts))
    expected = []
    for expert, rows in zip((0, 2, 4), x.split([2, 3, 1]), strict=True):
        inner = swiglu(torch.mm(_rounded_or_not(rows, fp8), WEIGHTS.gate_up[expert].t()))
        expected.append(torch.mm(_rounded_or_not(inner, fp8), WEIGHTS.down[expert].t()))
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_fp8_rounding_is_off_unless_asked_for() -> None:
    rows = ContiguousRows(hidden=torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2)), counts=[1] * EXPERTS)
    exact, rounded = (TorchExpertRunner(WEIGHTS, fp8_activations=fp8).run(rows) for fp8 in (False, True))
    assert (exact - rounded).abs().max() > 1e-3
    torch.testing.assert_close(exact, rounded, rtol=0.3, atol=0.3)


@pytest.mark.parametrize("fp8", [False, True])
def test_no_rows_give_no_rows_in_both_layouts(fp8: bool) -> None:
    runner = TorchExpertRunner(WEIGHTS, fp8_activations=fp8)
    assert runner.run(ContiguousRows(hidden=torch.empty(0, HIDDEN), counts=[0] * EXPERTS)).shape == (0, HIDDEN)
    masked = MaskedRows(hidden=torch.empty(EXPERTS, 0, HIDDEN), counts=torch.zeros(EXPERTS, dtype=torch.long))
    assert runner.run(masked).shape == (EXPERTS, 0, HIDDEN)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_shards_of_a_dense_feed_forward_add_up_to_the_whole(fp8: bool) -> None:
    gate_up, down = WEIGHTS.gate_up[0], WEIGHTS.down[0]
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(3))
    whole = DenseMLP(gate_up=gate_up, down=down, fp8_activations=fp8)(x)
    inner = swiglu(torch.nn.functional.linear(_rounded_or_not(x, fp8), gate_up))
    expected = torch.nn.functional.linear(_rounded_or_not(inner, fp8), down)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    if not fp8:
        gate, up = gate_up.chunk(2)
        halves = [DenseMLP(gate_up=torch.cat([gate.chunk(2)[i], up.chunk(2)[i]]), down=down.chunk(2, dim=1)[i])(x) for i in (0, 1)]
        torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-5, atol=1e-5)


def test_the_gate_computes_logits_in_fp32_also_for_bfloat16_hidden_states() -> None:
    generator = torch.Generator().manual_seed(4)
    weight, bias = torch.randn(16, HIDDEN, generator=generator), torch.randn(16, generator=generator) * 0.1
    hidden = torch.randn(7, HIDDEN, generator=generator).bfloat16()
    config = GateConfig(num_experts=16, topk=4, num_groups=4, topk_groups=2, normalize=True, scaling_factor=2.5)
    topk = Gate(config, weight, bias).select(hidden)
    ids, weights = grouped_topk(
        hidden.float() @ weight.t(), bias, num_groups=4, topk_groups=2, topk=4, normalize=True, scaling_factor=2.5
    )
    assert topk.weights.dtype == torch.float32
    assert torch.equal(topk.ids, ids)
    torch.testing.assert_close(topk.weights, weights)
    empty = Gate(config, weight, bias).select(hidden[:0])
    assert empty.ids.shape == empty.weights.shape == (0, 4)
