"""The sparse feed-forward of a decoder layer: gate, routed experts, shared expert, and what balancing needs to know.

The routed experts of a layer are stacked into two tensors.

Shape letters: B sequences, S positions, T = B * S tokens, H hidden, E experts, K experts per token, R rows of tokens
sorted by expert.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.launch.demo.config import DemoConfig
from moesaic.launch.demo.functions import permute, unpermute
from moesaic.launch.demo.layers import MLP

ROW_ALIGNMENT = 128
"""Rows per expert are padded to multiples of this: oneDNN compiles a kernel for each new matrix shape, which costs more
than the product itself, so shapes must recur."""


@dataclasses.dataclass
class Routing:
    """What the gates did in one forward pass, for balancing. One entry per sparse layer, MTP last."""

    counts: list[Tensor] = dataclasses.field(default_factory=list)
    """[E] int64: tokens per expert."""
    topk_ids: list[Tensor] = dataclasses.field(default_factory=list)
    """[T, K] int64."""
    balance_losses: list[Tensor] = dataclasses.field(default_factory=list)
    """Scalars: the sequence-wise balance loss of the paper, before its weight."""


class Gate(nn.Module):
    """Sigmoid scores, group-limited top-k; the correction bias takes part in the choice only."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size) * 0.02)
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] -> weights [T, K] float32, expert ids [T, K] int64, scores [T, E] float32."""
        c = self.config
        scores = functional.linear(x.float(), self.weight).sigmoid()
        with torch.no_grad():
            choice = (scores + self.e_score_correction_bias).view(len(x), c.n_group, -1)
            groups = choice.topk(2, -1)[0].sum(-1).topk(c.topk_group, -1, sorted=False)[1]
            closed = torch.ones(len(x), c.n_group, dtype=torch.bool).scatter_(1, groups, False)
            choice = choice.masked_fill(closed[..., None], float("-inf")).flatten(1)
            topk_ids = choice.topk(c.num_experts_per_tok, -1)[1]
        weights = scores.gather(1, topk_ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        return weights, topk_ids, scores


class Experts(nn.Module):
    """The routed experts of one layer. gate_up_proj [E, 2 * intermediate, H], down_proj [E, H, intermediate]."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        num, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.randn(num, 2 * inner, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(num, hidden, inner) * inner**-0.5)

    def forward(self, x: Tensor, weights: Tensor, topk_ids: Tensor, counts: Tensor) -> Tensor:
        """x [T, H], weights and topk_ids [T, K], counts [E] -> [T, H]."""
        sources, placed, ends = expert_layout(topk_ids, counts)
        rows = permute(x, sources, placed)
        gate, up = functional.grouped_mm(rows, self.gate_up_proj.to(x.dtype).transpose(1, 2), offs=ends).chunk(2, -1)
        rows = functional.grouped_mm(functional.silu(gate) * up, self.down_proj.to(x.dtype).transpose(1, 2), offs=ends)
        by_token = unpermute(rows, placed).view(*topk_ids.shape, x.shape[1])
        return torch.bmm(weights.to(x.dtype)[:, None], by_token)[:, 0]


def expert_layout(topk_ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by expert, each expert's share padded to ROW_ALIGNMENT.

    topk_ids [T, K], counts [E] -> sources [R] and placed [T * K], as `permute` takes them, and each expert's last row
    plus one, [E] int32.
    """
    flat = topk_ids.flatten()
    order = flat.argsort(stable=True)
    padded = (counts + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
    ends = padded.cumsum(0)
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    sorted_rows = torch.arange(len(flat)) + shift[flat[order]]
    sources = torch.zeros(int(ends[-1]), dtype=torch.int64).index_copy_(0, sorted_rows, order // topk_ids.shape[1])
    return sources, torch.empty_like(order).index_copy_(0, order, sorted_rows), ends.to(torch.int32)


class SparseMLP(nn.Module):
    """Routed experts plus the shared expert."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [B, S, H] -> [B, S, H]; appends to `routing`."""
        flat = x.flatten(0, 1)
        weights, topk_ids, scores = self.gate(flat)
        counts = topk_ids.flatten().bincount(minlength=scores.shape[1])
        routing.counts.append(counts)
        routing.topk_ids.append(topk_ids)
        routing.balance_losses.append(sequence_balance_loss(scores, topk_ids, x.shape[0]))
        out: Tensor = self.experts(flat, weights, topk_ids, counts) + self.shared_experts(flat)
        return out.view_as(x)


def sequence_balance_loss(scores: Tensor, topk_ids: Tensor, num_sequences: int) -> Tensor:
    """The complementary sequence-wise loss (DeepSeek-V3, equations 17 to 20), averaged over sequences, unweighted.

    It is 1 for perfectly even routing. scores [T, E], topk_ids [T, K] -> float32 scalar.
    """
    num_experts = scores.shape[1]
    chosen = torch.zeros_like(scores).scatter_(1, topk_ids, num_experts / topk_ids.shape[1])
    share = scores / scores.sum(-1, keepdim=True)
    frequency = chosen.view(num_sequences, -1, num_experts).mean(1)
    return (frequency * share.view(num_sequences, -1, num_experts).mean(1)).sum(-1).mean()
