"""FP8 experts from end to end: near the exact result, the same from either layout and backend, and whoever quantised the rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import standin_deep_gemm
import torch
from device_kernels import on_each_device, random
from torch import Tensor

from moesaic.kernels.gemm import BlockWeight
from moesaic.kernels.grouped_backends import Name
from moesaic.kernels.quant import dequantize_blocks_reference, quantize_blocks_reference, quantize_per_token_reference
from moesaic.moe.device_experts import Fp8ExpertRunner, PlainDeviceRunner, _backend_for, make_expert_runner
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import ContiguousRows, ExpertRows, MaskedRows
from moesaic.moe.experts import ExpertWeights, TorchExpertRunner
from moesaic.moe.layer import DenseMLP
from moesaic.moe.layouts import Arranged, ExpertLayout, arrange, part_of, per_choice, weighted

HIDDEN, INNER, EXPERTS = 256, 128, 3


def _fp8(width: int, depth: int, seed: int) -> tuple[Tensor, Tensor]:
    pairs = [quantize_blocks_reference(random(width, depth, seed=seed + expert) * depth**-0.5) for expert in range(EXPERTS)]
    return torch.stack([values for values, _ in pairs]), torch.stack([scales for _, scales in pairs])


GATE_UP, DOWN = _fp8(2 * INNER, HIDDEN, 0), _fp8(HIDDEN, INNER, 10)
WEIGHTS = ExpertWeights(gate_up=GATE_UP[0], down=DOWN[0], gate_up_scales=GATE_UP[1], down_scales=DOWN[1])


def _dequantized(dtype: torch.dtype) -> ExpertWeights:
    gate_up, down = (
        torch.stack([dequantize_blocks_reference(*pair, dtype) for pair in zip(*weight, strict=True)]) for weight in (GATE_UP, DOWN)
    )
    return ExpertWeights(gate_up=gate_up, down=down)


def _arranged(mode: DispatchMode, alignment: int = 1, num_tokens: int = 40) -> tuple[Tensor, Tensor, Arranged]:
    hidden = random(num_tokens, HIDDEN, seed=5) * torch.arange(1, num_tokens + 1).unsqueeze(1)  # rows of unlike size
    ids = torch.randint(-1, EXPERTS, (num_tokens, 1), generator=torch.Generator().manual_seed(6))
    return hidden, ids, arrange(hidden, ids, ExpertLayout(mode=mode, num_local=EXPERTS, alignment=alignment))


def _exact(hidden: Tensor, ids: Tensor) -> Tensor:
    """Each token's expert in float64 with the dequantised weights, rows unrounded, [T, H]; zero where the choice is elsewhere."""
    weights, out = _dequantized(torch.float64), torch.zeros(len(hidden), HIDDEN, dtype=torch.float64)
    for token, expert in enumerate(ids[:, 0].tolist()):
        if expert >= 0:
            gate, up = (weights.gate_up[expert] @ hidden[token].double()).split(INNER)
            out[token] = weights.down[expert] @ (gate * gate.sigmoid() * up)
    return out


def _runner(*backends: Any, dtype: torch.dtype = torch.bfloat16) -> Fp8ExpertRunner:
    return Fp8ExpertRunner(weights=WEIGHTS, backends=backends, dtype=dtype)


def _quantized(rows: ExpertRows) -> ExpertRows:
    """The rows as a dispatch in FP8 would deliver them."""
    flat = rows.hidden.reshape(-1, rows.hidden.shape[-1])
    values, scales = quantize_per_token_reference(flat)
    return replace(rows, hidden=values.view(rows.hidden.shape), scales=scales.view(*rows.hidden.shape[:-1], -1))


@pytest.mark.parametrize("mode", DispatchMode)
def test_every_token_is_near_the_exact_result_and_as_good_as_the_simulation(mode: DispatchMode) -> None:
    hidden, ids, arranged = _arranged(mode)
    exact, norm = _exact(hidden, ids), _exact(hidden, ids).norm(dim=1).clamp(min=1e-9)
    got = per_choice(_runner("torch").run(arranged.rows), arranged.row_map)[:, 0].double()
    simulated = TorchExpertRunner(_dequantized(torch.float32), fp8_activations=True).run(arranged.rows)
    as_simulated = per_choice(simulated, arranged.row_map)[:, 0].double()
    error, of_simulation = ((each - exact).norm(dim=1) / norm for each in (got, as_simulated))
    # Rows are rounded twice to 3 mantissa bits, off by up to 6.25 % each time; errors of the many values in a sum partly cancel.
    assert error.max() < 0.08
    assert error.mean() < 0.045
    assert error.mean() < 1.1 * of_simulation.mean()
    assert not got[ids[:, 0] < 0].any()


@on_each_device
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_dense_feed_forward_in_fp8_is_as_near_the_exact_result_as_the_simulation(device: str, backend: Name) -> None:
    def block(weight: tuple[Tensor, Tensor]) -> BlockWeight:
        values, scales = (each[0].to(device) for each in weight)
        return BlockWeight(values=values, scales=scales, backends=(backend,))

    exact, plain = _dequantized(torch.float64), _dequantized(torch.float32)
    x = random(9, HIDDEN, seed=5) * torch.arange(1, 10).unsqueeze(1)
    gate, up = (x.double() @ exact.gate_up[0].t()).split(INNER, dim=1)
    wanted = (gate * gate.sigmoid() * up) @ exact.down[0].t()
    in_fp8, simulated = (
        DenseMLP(gate_up=block(GATE_UP), down=block(DOWN))(x.to(device)).cpu(),
        DenseMLP(gate_up=plain.gate_up[0], down=plain.down[0], fp8_activations=True)(x),
    )
    error, of_simulation = ((each.double() - wanted).norm(dim=1) / wanted.norm(dim=1) for each in (in_fp8, simulated))
    # As for experts: two roundings to 3 mantissa bits, whose errors partly cancel in sums.
    assert error.max() < 0.08
    assert error.mean() < min(0.045, 1.1 * of_simulation.mean())


@pytest.mark.parametrize("mode", DispatchMode)
@pytest.mark.parametrize("fp8", [False, True])
def test_nobody_reads_what_lies_in_rows_that_no_choice_fills(mode: DispatchMode, fp8: bool) -> None:
    _, _, arranged = _arranged(mode, alignment=16)
    clean = _quantized(arranged.rows) if fp8 else arranged.rows
    filled = torch.zeros(arranged.row_map.num_rows, dtype=torch.bool)
    filled[arranged.row_map.row[arranged.row_map.valid]] = True
    assert not filled.all()

    def poisoned(values: Tensor) -> Tensor:
        nan = 0x7F if values.element_size() == 1 else float("nan")
        flat = values.reshape(-1, values.shape[-1]).clone()
        (flat.view(torch.uint8) if values.element_size() == 1 else flat)[~filled] = nan
        return flat.view(values.shape)

    dirty = replace(clean, hidden=poisoned(clean.hidden), scales=None if clean.scales is None else poisoned(clean.scales))
    weights = torch.rand(len(arranged.local_ids), 1, generator=torch.Generator().manual_seed(3))
    runners = [_runner("torch"), TorchExpertRunner(_dequantized(torch.float32), fp8_activations=True)]
    for runner in runners if fp8 else [*runners, PlainDeviceRunner(_dequantized(torch.float32), ["torch"])]:
        one, other = (weighted(runner.run(rows), arranged.row_map, weights) for rows in (clean, dirty))
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", DispatchMode)
def test_rows_that_came_in_fp8_are_taken_as_they_are(mode: DispatchMode) -> None:
    _, _, arranged = _arranged(mode)
    rows, valid = arranged.rows, arranged.row_map
    own, given = (per_choice(_runner("torch").run(each), valid) for each in (rows, _quantized(rows)))
    assert own.dtype is torch.bfloat16
    assert torch.equal(own, given)
    simulated = TorchExpertRunner(_dequantized(torch.float32), fp8_activations=True)
    assert torch.equal(simulated.run(rows), simulated.run(_quantized(rows)))


@pytest.mark.parametrize("mode", DispatchMode)
def test_halves_of_what_the_first_product_gave_take_their_scales_along(mode: DispatchMode) -> None:
    _, _, arranged = _arranged(mode)
    runner = _runner("torch")
    whole, inner = per_choice(runner.run(arranged.rows), arranged.row_map), runner.gate_up(arranged.rows)
    assert inner.hidden.dtype is torch.float8_e4m3fn and inner.hidden.shape[-1] == runner.inner_size
    for tokens in (torch.arange(25), torch.arange(25, 40)):
        part = part_of(arranged, tokens)
        assert torch.equal(per_choice(runner.down(part.pick(inner)), part.row_map), whole[tokens])


def test_no_rows_give_no_rows() -> None:
    assert _runner("torch").run(ContiguousRows(hidden=torch.empty(0, HIDDEN), counts=[0] * EXPERTS)).shape == (0, HIDDEN)
    masked = MaskedRows(hidden=torch.empty(EXPERTS, 0, HIDDEN), counts=torch.zeros(EXPERTS, dtype=torch.long))
    assert _runner("torch").run(masked).shape == (EXPERTS, 0, HIDDEN)


@on_each_device
def test_triton_computes_what_torch_does_in_both_layouts(device: str) -> None:
    weights = ExpertWeights(**{name: tensor.to(device) for name, tensor in vars(WEIGHTS).items()})
    for mode in DispatchMode:
        _, _, arranged = _arranged(mode, num_tokens=6)
        rows = replace(arranged.rows, hidden=arranged.rows.hidden.to(device))
        if isinstance(rows, MaskedRows):
            rows = replace(rows, counts=rows.counts.to(device))
        got = Fp8ExpertRunner(weights=weights, backends=("triton",), dtype=torch.bfloat16).run(rows)
        wanted = _runner("torch").run(arranged.rows)
        error = per_choice(got.cpu(), arranged.row_map).double() - per_choice(wanted, arranged.row_map).double()
        assert error.norm() < 0.02 * wanted.double().nan_to_num().norm()


def test_deep_gemm_gets_aligned_rows_in_both_layouts_in_fp8_and_in_bf16() -> None:
    plain = _dequantized(torch.bfloat16)
    for mode in DispatchMode:
        _, _, arranged = _arranged(mode, alignment=128)
        with standin_deep_gemm.installed():
            eight = _runner("deep_gemm").run(arranged.rows)
            sixteen = PlainDeviceRunner(plain, ("deep_gemm",)).run(replace(arranged.rows, hidden=arranged.rows.hidden.bfloat16()))
        wanted = per_choice(_runner("torch").run(arranged.rows), arranged.row_map).double()
        for got in (eight, sixteen):
            error = per_choice(got, arranged.row_map).double() - wanted
            assert error.norm() < 0.06 * wanted.norm()


def test_rows_of_a_masked_layout_know_how_many_to_expect() -> None:
    hidden, ids = torch.zeros(8, HIDDEN), torch.zeros(8, 2, dtype=torch.long)
    for ep_size, expected in ((1, 4), (2, 2), (64, 1)):
        layout = ExpertLayout(mode=DispatchMode.LOW_LATENCY, num_local=4, alignment=1, ep_size=ep_size)
        rows = arrange(hidden, ids, layout).rows
        assert isinstance(rows, MaskedRows) and rows.expected_rows == expected


def test_the_backend_of_a_product_follows_from_its_rows_per_expert() -> None:
    several = ("deep_gemm", "cutlass", "triton")
    few = ContiguousRows(hidden=torch.empty(4, 8), counts=[4, 0])
    assert _backend_for(few, "fp8", several) == "deep_gemm"
    masked = MaskedRows(hidden=torch.empty(2, 500, 8), counts=torch.tensor([1, 1]), expected_rows=60)
    assert _backend_for(masked, "fp8", several[1:]) == "triton"
    assert _backend_for(replace(masked, expected_rows=None), "fp8", several[1:]) == "cutlass"


def test_runners_are_made_for_the_weights_there_are() -> None:
    plain = _dequantized(torch.float32)
    assert isinstance(make_expert_runner(["torch"], plain, dtype=torch.float32), TorchExpertRunner)
    assert isinstance(make_expert_runner(["triton"], plain, dtype=torch.float32), PlainDeviceRunner)
    assert isinstance(make_expert_runner(["torch"], WEIGHTS, dtype=torch.float32, fp8_activations=True), Fp8ExpertRunner)
    with pytest.raises(ValueError, match=r"backends are \['marlin'\], wanted one or more of deep_gemm, cutlass, triton, torch"):
        make_expert_runner(["marlin"], plain, dtype=torch.float32)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="want FP8 weights for FP8 rows; only 'torch' simulates them"):
        make_expert_runner(["triton"], plain, dtype=torch.float32, fp8_activations=True)
