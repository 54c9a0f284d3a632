"""More cases of benchmarks/h200.py: a rank's experts in FP8 from end to end, each backend of the products beside the others.

What the table of kernels/grouped_backends.py should say is read off here. Sizes, names and helpers are those of h200_cases.py.
"""

from __future__ import annotations

import h200_cases as base
import torch
from h200_cases import Call, Case, Ready, relative_error
from torch import Tensor

from moesaic.kernels import quant
from moesaic.kernels.grouped_backends import NAMES, Name, unfit_reason
from moesaic.moe.device_experts import Fp8ExpertRunner
from moesaic.moe.dispatcher import ContiguousRows, ExpertRows, MaskedRows
from moesaic.moe.experts import ExpertWeights

LOCAL, RANKS, CHECKED = 8, 32, 64


def expert_cases() -> list[Case]:
    """In the order in which they run: decode's masked layout, then prefill's contiguous one."""
    decode = [_experts(tokens, tokens * base.TOPK // LOCAL, masked=True) for tokens in (128, 32, 64, 256)]
    return decode + [_experts(tokens, tokens * base.TOPK // LOCAL, masked=False) for tokens in (4096, 8192, 16384)]


def _experts(tokens: int, mean: int, *, masked: bool) -> Case:
    """Of a rank of EP 32 that gets as many rows as its own tokens have choices, as many for each expert."""
    each = mean if masked else -(-mean // 128) * 128
    rows, parameters = LOCAL * each, LOCAL * 3 * base.INTERMEDIATE * base.HIDDEN

    def make() -> Ready:
        gate_up, gate_up_scales = base.fp8_weights(LOCAL, 2 * base.INTERMEDIATE, base.HIDDEN)
        down, down_scales = base.fp8_weights(LOCAL, base.HIDDEN, base.INTERMEDIATE)
        weights = ExpertWeights(gate_up=gate_up, down=down, gate_up_scales=gate_up_scales, down_scales=down_scales)
        given = _masked_rows(tokens, each) if masked else _contiguous_rows(each)

        def by(backend: Name) -> Call:
            runner = Fp8ExpertRunner(weights=weights, backends=(backend,), dtype=torch.bfloat16)
            return lambda: runner.run(given)

        ours = by("triton")

        def error() -> float:
            got, count = ours()[0] if masked else ours(), min(CHECKED, each)
            return relative_error(got[:count], _reference(weights, given, count))

        peers = {name: by(name) for name in NAMES if _fits(name)}
        specified = (lambda: base.valid_rows(ours(), [each] * LOCAL)) if masked else None
        return Ready(ours=ours, error=error, peers=peers, specified=specified)

    return Case(
        name=f"fp8_experts_{'masked' if masked else 'contiguous'}",
        size=f"{rows} rows, {LOCAL} experts, triton and others",
        num_bytes=parameters + rows * (3 * base.HIDDEN + 6 * base.INTERMEDIATE),
        num_flops=6 * rows * base.INTERMEDIATE * base.HIDDEN,
        matmul="fp8",
        make=make,
        tolerance=0.03,
        captured=masked,
        in_quick=tokens in (128, 4096),
    )


def _fits(name: Name) -> bool:
    if base.DEVICE == "cpu" or name in ("triton", "torch"):
        return False
    return unfit_reason(name, torch.cuda.get_device_capability()) is None


def _contiguous_rows(each: int) -> ContiguousRows:
    hidden, scales = quant.quantize_per_token(base.random(LOCAL * each, base.HIDDEN), mn_major_scales=True)
    return ContiguousRows(hidden=hidden, counts=[each] * LOCAL, scales=scales)


def _masked_rows(tokens: int, each: int) -> MaskedRows:
    room = RANKS * tokens
    hidden, scales = quant.quantize_per_token(base.random(LOCAL * room, base.HIDDEN))
    hidden = hidden.view(LOCAL, room, base.HIDDEN)
    own = quant.empty_scales(hidden, mn_major=True).copy_(scales.view(LOCAL, room, -1))
    counts = torch.full((LOCAL,), each, device=base.DEVICE)
    return MaskedRows(hidden=hidden, counts=counts, scales=own, expected_rows=each)


def _reference(weights: ExpertWeights, given: ExpertRows, count: int) -> Tensor:
    """The first `count` rows of the first expert by torch."""
    assert given.scales is not None
    hidden, scales = (x[0] if isinstance(given, MaskedRows) else x for x in (given.hidden, given.scales))
    first = ExpertWeights(**{name: tensor[:1] for name, tensor in vars(weights).items()})
    rows = ContiguousRows(hidden=hidden[:count], counts=[count], scales=scales[:count])
    return Fp8ExpertRunner(weights=first, backends=("torch",), dtype=torch.bfloat16).run(rows)
