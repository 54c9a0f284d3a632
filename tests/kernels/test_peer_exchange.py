"""The low-latency exchange in Triton, with several ranks as windows of one process: everybody gets what the reference says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_kernels import assert_quantized, on_each_device, poisoned, random, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.peer_exchange import (
    Dispatched,
    PeerLate,
    PeerLayout,
    PeerWindow,
    combine_reference,
    dispatch_reference,
)
from moesaic.kernels.quant import dequantize_per_token_reference
from moesaic.kernels.triton import peer_exchange

SEEDS = st.integers(0, 2**31 - 1)


def _windows(layout: PeerLayout, device: str, **changes: Any) -> list[PeerWindow]:
    """One window per rank, all on one device. Rows start as NaN, counts, flags and what returns as zeros."""
    memory = [torch.zeros(layout.num_bytes + 128, dtype=torch.uint8, device=device) for _ in range(layout.num_ranks)]
    own = [x[-x.data_ptr() % 128 :][: layout.num_bytes] for x in memory]
    for x in own:
        x[: layout.counts_at] = 0xFF
    peers = torch.tensor([x.data_ptr() for x in own], device=device)
    words = [torch.zeros(3, dtype=torch.int32, device=device) for _ in own]
    return [
        PeerWindow(layout=layout, rank=rank, own=own[rank], peers=peers, step=words[rank][:1], late=words[rank][1:], **changes)
        for rank in range(layout.num_ranks)
    ]


def _inputs(layout: PeerLayout, seed: int, device: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """hidden, distinct global ids with some -1, and weights of every rank, whose numbers of tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    hidden, topk_ids, weights = [], [], []
    for rank in range(layout.num_ranks):
        tokens = int(torch.randint(0, layout.max_tokens + 1, (1,), generator=generator))
        hidden.append(random(tokens, layout.hidden, seed=seed + rank, dtype=layout.dtype, device=device))
        ids = torch.rand(tokens, layout.num_experts, generator=generator).topk(layout.topk).indices
        topk_ids.append(torch.where(torch.rand(ids.shape, generator=generator) < 0.2, -1, ids).contiguous().to(device))
        weights.append(torch.rand(ids.shape, generator=generator).to(device))
    return hidden, topk_ids, weights


def _exchange(windows: list[PeerWindow], hidden: list[Tensor], ids: list[Tensor], weights: list[Tensor]) -> tuple[list[Any], ...]:
    """One step of all ranks: what each received, its experts' outputs (twice the row), and its sums."""
    with poisoned():
        for own, x, choices in zip(windows, hidden, ids, strict=True):
            peer_exchange.dispatch_send(x, choices, own)
        received = [peer_exchange.dispatch_receive(own) for own in windows]
        outputs = [_experts(own, windows[0].layout.dtype) for own in received]
        for own, rows, output in zip(windows, received, outputs, strict=True):
            peer_exchange.combine_send(output, rows, own)
        sums = [peer_exchange.combine_receive(choices, w, own) for choices, w, own in zip(ids, weights, windows, strict=True)]
    for own in windows:
        own.raise_if_late()
    return received, outputs, sums


def _experts(received: Dispatched, dtype: torch.dtype) -> Tensor:
    """Twice each valid row; NaN elsewhere."""
    out = torch.full(received.x.shape, float("nan"), dtype=dtype, device=received.x.device)
    for expert, count in enumerate(received.counts.tolist()):
        values = dequantize_per_token_reference(received.x[expert, :count], received.scales[expert, :count], dtype)
        out[expert, :count] = values * 2
    return out


def _on_cpu(received: Dispatched) -> Dispatched:
    return Dispatched(x=received.x.cpu(), scales=received.scales.cpu(), counts=received.counts.cpu(), origin=received.origin.cpu())


@on_each_device
@settings(max_examples=8, deadline=None)
@given(
    ranks=st.integers(1, 4),
    local=st.integers(1, 3),
    most=st.integers(1, 5),
    hidden=st.sampled_from([128, 384]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=SEEDS,
    data=st.data(),
)
def test_rows_arrive_in_order_and_come_back_weighted_step_after_step(
    *, device: str, ranks: int, local: int, most: int, hidden: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    topk = data.draw(st.integers(1, min(ranks * local, 3)))
    layout = PeerLayout(num_ranks=ranks, num_local=local, max_tokens=most, topk=topk, hidden=hidden, dtype=dtype)
    windows = _windows(layout, device)
    for step in range(2):
        rows, ids, weights = _inputs(layout, seed + step, device)
        received, outputs, sums = _exchange(windows, rows, ids, weights)
        expected = dispatch_reference([x.cpu() for x in rows], [x.cpu() for x in ids], layout)
        for got, wanted in zip(map(_on_cpu, received), expected, strict=True):
            assert torch.equal(got.counts, wanted.counts)
            for expert, count in enumerate(wanted.counts.tolist()):
                origin = wanted.origin[expert, :count]
                assert torch.equal(got.origin[expert, :count], origin)
                sources = origin.div(most * topk, rounding_mode="floor").tolist()
                tokens = origin.remainder(most * topk).div(topk, rounding_mode="floor").tolist()
                if count:
                    exact = torch.stack([rows[source][token].cpu() for source, token in zip(sources, tokens, strict=True)])
                    assert_quantized(got.x[expert, :count], got.scales[expert, :count], exact.double())
        cpu_outputs, cpu_weights = [x.cpu() for x in outputs], [x.cpu() for x in weights]
        for got, wanted in zip(
            sums, combine_reference(cpu_outputs, [_on_cpu(x) for x in received], cpu_weights, layout), strict=True
        ):
            torch.testing.assert_close(got.cpu().float(), wanted.float(), rtol=2**-7, atol=1e-5)


@on_each_device
def test_a_token_does_not_depend_on_its_batch_and_a_second_run_gives_the_same_bits(device: str) -> None:
    layout = PeerLayout(num_ranks=3, num_local=2, max_tokens=6, topk=2, hidden=256)
    hidden, ids, weights = _inputs(layout, 4, device)
    hidden[0] = random(5, 256, seed=1, dtype=torch.bfloat16, device=device)
    ids[0], weights[0] = (x[0][:1].repeat(5, 1) for x in (ids, weights))
    whole, again = (_exchange(_windows(layout, device), hidden, ids, weights)[2] for _ in range(2))
    assert all(map(same_bits, whole, again))
    alone = [x[:0] for x in hidden], [x[:0] for x in ids], [x[:0] for x in weights]
    for one, all_of_them in zip(alone, (hidden, ids, weights), strict=True):
        one[0] = all_of_them[0][2:3].contiguous()
    assert same_bits(_exchange(_windows(layout, device), *alone)[2][0], whole[0][2:3])


@on_each_device
def test_a_rank_that_does_not_come_is_named(device: str) -> None:
    layout = PeerLayout(num_ranks=3, num_local=1, max_tokens=2, topk=1, hidden=128)
    windows = _windows(layout, device, most_polls=3)
    hidden, ids, _ = _inputs(layout, 0, device)
    for rank in (0, 2):
        peer_exchange.dispatch_send(hidden[rank], ids[rank], windows[rank])
    received = peer_exchange.dispatch_receive(windows[0])
    assert received.counts.tolist() == [0]
    with pytest.raises(PeerLate, match="rank 1 did not come to the dispatch in time") as caught:
        windows[0].raise_if_late()
    assert (caught.value.rank, caught.value.operation) == (1, "dispatch")
    windows[2].raise_if_late()
    ones = torch.zeros(1, 1, dtype=torch.int64, device=device)
    assert peer_exchange.combine_receive(ones, ones.float(), windows[0]).isnan().all()
    # A rank without tokens waits too, or its next dispatch could meet this one at a rank that is still reading.
    assert not len(peer_exchange.combine_receive(ones[:0], ones[:0].float(), windows[2]))
    with pytest.raises(PeerLate, match="rank 0 did not come to the combine in time"):
        windows[2].raise_if_late()


def _send(**changes: Any) -> object:
    layout = PeerLayout(num_ranks=1, num_local=2, max_tokens=2, topk=1, hidden=128)
    arguments = {
        "hidden": torch.ones(1, 128).bfloat16(),
        "topk_ids": torch.zeros(1, 1).long(),
        "window": _windows(layout, "cpu")[0],
    }
    return peer_exchange.dispatch_send(**(arguments | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _send(hidden=torch.ones(1, 128)), "hidden is float32, wanted bfloat16"),
        (lambda: _send(hidden=torch.ones(3, 128).bfloat16()), "the number of tokens is 3, wanted 0 to 2"),
        (lambda: _send(topk_ids=torch.zeros(1, 2).long()), r"topk_ids has shape \[1, 2\], wanted \[1, 1\]"),
        (lambda: PeerLayout(num_ranks=1, num_local=1, max_tokens=1, topk=1, hidden=100), "hidden is 100, wanted a multiple of 128"),
        (lambda: PeerLayout(num_ranks=0, num_local=1, max_tokens=1, topk=1, hidden=128), "num_ranks is 0, wanted 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
