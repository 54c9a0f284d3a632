"""What benchmarks/rank_slice.py counts and assumes: operations, bytes, rows and published times."""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moesaic.overlap.operations import Operation

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import slice_network as network
from slice_cases import DEEPSEEK_V3, TINY, Case, tiny_cases
from slice_roofline import GROUPS, step_work, weight_bytes
from slice_run import RankSlice, SliceStep
from slice_traffic import RankPlace, assign_tokens, busiest_shares, expected_received, expert_counts
from slice_wire import HostWire

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> RankSlice:
    return RankSlice(TINY, tiny_cases()[0], device=CPU, dtype=torch.bfloat16, wire=HostWire())


class OperationCounter:
    """A recorder that says how many floating-point operations each of the model's operations made torch do."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.flops: dict[str, int] = {}
        self._counter = counter
        self._before, self._name = 0, ""

    def enter(self, operation: Operation, micro_batch: int) -> None:
        self._before, self._name = self._counter.get_total_flops(), operation.name

    def leave(self) -> None:
        self.flops[self._name] = self.flops.get(self._name, 0) + self._counter.get_total_flops() - self._before


@pytest.mark.parametrize("balancedness", [1.0, 0.5])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_roofline_counts_the_operations_that_are_done(phase: Any, balancedness: float, tiny: RankSlice) -> None:
    case = Case(phase=phase, ep_size=8, num_slots=24, num_tokens=12, context=64, balancedness=balancedness)
    step = SliceStep(TINY, case, tiny.group, dtype=torch.bfloat16)
    step.become("alone")
    with FlopCounterMode(display=False) as counter:
        counted = OperationCounter(counter)
        tiny.model.forward(step.inputs, step.pool, recorder=counted)
    share = case.share(TINY)
    if phase == "prefill":  # torch's reference computes what causality masks, too
        share = replace(share, num_pairs=12 * 12)
    else:  # and all rows of the masked block
        share = replace(share, num_rows=share.num_local * 8 * 12)
    work = step_work(TINY, share)
    for group in ("attention", "gate", "experts", "shared", "dense", "head"):
        assert sum(counted.flops.get(name, 0) for name in GROUPS[group]) == work[group].num_flops, group


def test_the_roofline_knows_the_bytes_of_every_weight(tiny: RankSlice) -> None:
    weights = tiny.weights
    layers = list(weights.layers)
    counted = weight_bytes(TINY, num_local=3)
    assert counted["attention"] == sum(_bytes(layer.attention) + _bytes(layer.norm) for layer in layers)
    assert counted["dense"] == sum(_bytes(layer.dense) for layer in layers)
    assert counted["gate"] == sum(_bytes(layer.sparse.gate) for layer in layers if layer.sparse is not None)
    assert counted["experts"] == sum(_bytes(layer.sparse.experts) for layer in layers if layer.sparse is not None)
    assert counted["shared"] == sum(_bytes(layer.sparse.shared) for layer in layers if layer.sparse is not None)
    assert counted["head"] == _bytes(weights.embedding) + _bytes(weights.head)


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if not is_dataclass(value):
        return 0
    return sum(_bytes(getattr(value, field.name)) for field in fields(value))


def test_deepseek_v3_has_the_weights_that_it_has() -> None:
    """All 256 experts, one byte each but for embedding, head, kv_b_proj (two) and gates (four): 671e9 parameters."""
    attention, gate, experts, shared, dense, head = (
        weight_bytes(DEEPSEEK_V3, 256)[group] for group in ("attention", "gate", "experts", "shared", "dense", "head")
    )
    kv_up = 61 * 128 * 256 * 512
    assert attention - kv_up + gate / 4 + experts + shared + dense + head / 2 == pytest.approx(671e9, rel=2e-3)


def test_the_busiest_rank_gets_its_rows_and_every_expert_distinct_tokens() -> None:
    place = RankPlace(ep_size=8, num_slots=24, num_experts=16, topk=4)
    assert expert_counts(place, 30, 1.0, 0).tolist() == [40, 40, 40]
    for pattern in range(3):
        counts = expert_counts(place, 30, 0.6, pattern)
        assert counts.sum() == 200
        ids = assign_tokens(counts, 240, 4, pattern)
        assert [(ids == expert).any(axis=1).sum() for expert in range(3)] == [(ids == expert).sum() for expert in range(3)]
        assert [(ids == expert).sum() for expert in range(3)] == counts.tolist()
        assert ((ids >= 0).sum(axis=1) > 0).all()
        assert len(ids) == pytest.approx(expected_received(counts.tolist(), 240), rel=0.1)


def test_the_local_experts_share_the_rows_as_they_share_the_demand() -> None:
    place = RankPlace(ep_size=32, num_slots=288, num_experts=256, topk=8)
    shares, counts = busiest_shares(place, 3), expert_counts(place, 128, 0.7, 3)
    np.testing.assert_allclose(counts / counts.sum(), shares, atol=1 / counts.sum())
    assert shares.max() > 1.2 / place.num_local


def test_a_balancedness_that_no_rank_can_reach_is_refused() -> None:
    place = RankPlace(ep_size=4, num_slots=16, num_experts=16, topk=4)
    with pytest.raises(ValueError, match=r"balancedness 0.2 is not in \[0.25, 1\]"):
        expert_counts(place, 10, 0.2, 0)


def test_communication_takes_the_published_times_and_lies_between_them() -> None:
    def exchange(ep_size: int, num_tokens: int, balancedness: float = 1.0) -> network.Exchange:
        return network.Exchange(
            ep_size=ep_size, num_tokens=num_tokens, hidden=7168, topk=8, topk_groups=4, balancedness=balancedness
        )

    for ep_size, (dispatch_us, combine_us) in network.LOW_LATENCY_US.items():
        assert network.low_latency_s("dispatch", exchange(ep_size, 128)) == pytest.approx(dispatch_us * 1e-6)
        assert network.low_latency_s("combine", exchange(ep_size, 128)) == pytest.approx(combine_us * 1e-6)
    assert 173e-6 < network.low_latency_s("dispatch", exchange(72, 128)) < 192e-6
    assert network.low_latency_s("dispatch", exchange(72, 32)) == network.low_latency_s("dispatch", exchange(72, 128))
    twice = network.low_latency_s("dispatch", exchange(72, 256))
    assert twice == pytest.approx(2 * network.low_latency_s("dispatch", exchange(72, 128)))
    assert network.low_latency_s("dispatch", exchange(72, 256, 0.5)) == pytest.approx(2 * twice)
    assert network.low_latency_s("dispatch", exchange(1, 128)) == network.normal_s("combine", exchange(1, 128)) == 0
    copies = 4 * (1 - 0.75**8)  # nodes of a token, of four
    assert network.normal_s("combine", exchange(32, 4096)) == pytest.approx(4096 * copies * 7168 * 2 / 57e9)
    assert network.normal_s("dispatch", exchange(8, 4096)) == pytest.approx(4096 * 8 * (1 - (7 / 8) ** 8) * 7392 / 153e9)
