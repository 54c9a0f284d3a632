"""More cases of benchmarks/h200.py: replica choice by the batch, embedding, sampling, and the peer exchange.

As h200_cases.py, whose sizes, names and helpers these share.
"""

from __future__ import annotations

from importlib.util import find_spec

import h200_cases as base
import torch
from h200_cases import Case, Ready, relative_error
from torch import Tensor

from moesaic.kernels import balanced_choice, embedding, grouped_gemm, peer_exchange, quant, sampling

REDUNDANT = 32


def step_cases() -> list[Case]:
    """In the order in which they run."""
    return [
        *(_balanced(tokens, ranks) for tokens, ranks in ((128, 32), (128, 72), (32, 32), (256, 72), (4096, 32))),
        *(_embed(tokens) for tokens in (128, 4096, 16384)),
        *(case for tokens in (128, 32, 256) for case in _sampling(tokens)),
        _peers(128),
        *(case for tokens in (128, 256) for scaled in (True, False) for case in _cute(tokens, scaled)),
    ]


def _balanced(tokens: int, ranks: int) -> Case:
    """One rank's choices, by the counts of all; a few experts are much in demand."""

    def make() -> Ready:
        experts = base.EXPERTS
        demand = torch.rand(experts) ** 4 + 0.01
        popular = torch.multinomial(demand, REDUNDANT, replacement=True)
        slots = torch.cat([torch.arange(experts), popular])[torch.randperm(experts + REDUNDANT)]
        table = balanced_choice.BalancedTable.of(slots, num_experts=experts, num_gpus=ranks, most_gpus=8, device=base.DEVICE)
        batch = [torch.multinomial(demand.expand(tokens, -1), base.TOPK) for _ in range(ranks)]
        counts = torch.stack([balanced_choice.count_choices_reference(ids, experts).total for ids in batch]).to(base.DEVICE)
        ids = batch[0].to(base.DEVICE)
        own = balanced_choice.count_choices(ids, experts)

        def on_the_cpu() -> Tensor:
            return balanced_choice.choose_balanced_reference(ids, own, counts, table, rank=0)

        def ours() -> Tensor:
            return balanced_choice.choose_balanced(ids, own, counts, table, rank=0)

        return Ready(
            ours=ours, error=lambda: (ours() != on_the_cpu()).float().mean().item(), peers={"Python on the CPU": on_the_cpu}
        )

    return Case(
        name="choose_balanced",
        size=f"{tokens} tokens, EP {ranks}",
        num_bytes=ranks * base.EXPERTS * 8 + tokens * base.TOPK * 16,
        make=make,
        tolerance=0.0,
        in_quick=(tokens, ranks) == (128, 32),
        target_us=10.0 if tokens <= 256 else None,
    )


def _embed(tokens: int) -> Case:
    def make() -> Ready:
        table = base.random(base.VOCABULARY, base.HIDDEN)
        ids = torch.randint(0, base.VOCABULARY, (tokens,), device=base.DEVICE)
        return Ready(
            ours=lambda: embedding.embed(ids, table),
            error=lambda: relative_error(embedding.embed(ids, table), table[ids]),
            peers={"torch": lambda: torch.nn.functional.embedding(ids, table)},
        )

    return Case(
        name="embed",
        size=f"{tokens} tokens",
        num_bytes=tokens * (base.HIDDEN * 4 + 8),
        make=make,
        tolerance=0.0,
        in_quick=tokens == 128,
        target=0.85 if tokens >= 4096 else None,
    )


def _sampling(tokens: int) -> list[Case]:
    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        seed, position = (torch.randint(0, 2**40, (tokens,), device=base.DEVICE) for _ in range(2))
        return base.random(tokens, base.VOCABULARY), torch.rand(tokens, device=base.DEVICE) + 0.5, seed, position

    def greedy() -> Ready:
        logits, *_ = inputs()

        def error() -> float:
            """Of the values: torch's argmax takes any of several largest."""
            return relative_error(sampling.greedy_tokens(logits)[1], logits.amax(dim=-1))

        return Ready(
            ours=lambda: sampling.greedy_tokens(logits), error=error, peers={"torch argmax": lambda: logits.argmax(dim=-1)}
        )

    def random() -> Ready:
        arguments = inputs()

        def error() -> float:
            """Share of draws that differ: where two scores are equal within roundings."""
            differ = sampling.sample_tokens(*arguments) != sampling.sample_tokens_reference(*arguments)
            return differ.float().mean().item()

        return Ready(
            ours=lambda: sampling.sample_tokens(*arguments),
            error=error,
            peers={"torch": lambda: sampling.sample_tokens_reference(*arguments)},
        )

    size, num_bytes = f"{tokens} rows of {base.VOCABULARY}", tokens * base.VOCABULARY * 2
    quick = tokens == 128
    return [
        Case(name="greedy_tokens", size=size, num_bytes=num_bytes, make=greedy, in_quick=quick),
        Case(name="sample_tokens", size=size, num_bytes=2 * num_bytes, make=random, tolerance=0.02, in_quick=quick),
    ]


def _peers(tokens: int) -> Case:
    """Dispatch and combine of one rank that holds a node's share of experts: all but NVLink."""
    local = base.EXPERTS // 8

    def make() -> Ready:
        layout = peer_exchange.PeerLayout(
            num_ranks=1, num_local=local, max_tokens=tokens, topk=min(base.TOPK, local), hidden=base.HIDDEN
        )
        own = torch.zeros(layout.num_bytes + 128, dtype=torch.uint8, device=base.DEVICE)
        own = own[-own.data_ptr() % 128 :][: layout.num_bytes]
        words = torch.zeros(3, dtype=torch.int32, device=base.DEVICE)
        peers = torch.tensor([own.data_ptr()], device=base.DEVICE)
        window = peer_exchange.PeerWindow(layout=layout, rank=0, own=own, peers=peers, step=words[:1], late=words[1:])
        hidden = base.random(tokens, base.HIDDEN)
        ids = torch.rand(tokens, local, device=base.DEVICE).topk(layout.topk).indices
        weights = torch.rand(tokens, layout.topk, device=base.DEVICE)
        outputs = base.random(local, layout.room, base.HIDDEN)

        def ours() -> Tensor:
            from moesaic.kernels.triton import peer_exchange as device

            device.dispatch_send(hidden, ids, window)
            device.combine_send(outputs, device.dispatch_receive(window), window)
            return device.combine_receive(ids, weights, window)

        def error() -> float:
            [expected] = peer_exchange.dispatch_reference([hidden.cpu()], [ids.cpu()], layout)
            [exact] = peer_exchange.combine_reference([outputs.cpu()], [expected], [weights.cpu()], layout)
            got = ours().cpu()
            window.raise_if_late()
            return relative_error(got, exact)

        return Ready(ours=ours, error=error)

    rows = tokens * min(base.TOPK, local)
    moved = tokens * base.HIDDEN * 4 + rows * base.HIDDEN * (3 + 6)
    return Case(name="peer exchange", size=f"{tokens} tokens, 1 rank of {local} experts", num_bytes=moved, make=make, in_quick=True)


def _cute(tokens: int, scaled: bool) -> list[Case]:
    """The CuTe DSL products beside Triton's, at the sizes of a decode rank of EP 32; none where CuTe DSL isn't importable."""
    if find_spec("cutlass") is None:
        return []
    experts, room, mean = 8, 32 * tokens, tokens * base.TOPK // 8
    width, depth = 2 * base.INTERMEDIATE, base.HIDDEN

    def make() -> Ready:
        from moesaic.kernels.cute import grouped_gemm as cute

        x, counts = base.random(experts, room, depth), torch.full((experts,), mean, device=base.DEVICE)
        if scaled:
            weight, scales = base.fp8_weights(experts, width, depth)
            values, own = quant.quantize_per_token_reference(x.view(-1, depth))
            values, own = values.view(x.shape), quant.empty_scales(x, mn_major=True).copy_(own.view(experts, room, -1))
            arguments = (values, own, weight, scales, counts)
            ours, triton = cute.grouped_gemm_fp8_masked, grouped_gemm.grouped_gemm_fp8_masked
        else:
            arguments = (x, base.random(experts, width, depth), counts)
            ours, triton = cute.grouped_gemm_masked, grouped_gemm.grouped_gemm_masked

        def by_triton() -> Tensor:
            return triton(*arguments, expected_rows=mean)

        return Ready(
            ours=lambda: ours(*arguments)[:, :mean],
            error=lambda: relative_error(ours(*arguments)[:, :mean], by_triton()[:, :mean]),
            peers={"triton": by_triton},
        )

    value_bytes = 1 if scaled else 2
    return [
        Case(
            name=f"cute grouped_gemm{'_fp8' if scaled else ''}_masked",
            size=f"EP 32, {tokens} tokens, {experts} x {mean} rows, [{width}, {depth}]",
            num_bytes=experts * (width * depth + mean * depth) * value_bytes + experts * mean * width * 2,
            num_flops=2 * experts * mean * width * depth,
            matmul="fp8" if scaled else "bf16",
            make=make,
            in_quick=tokens == 128,
            captured=False,
        )
    ]
