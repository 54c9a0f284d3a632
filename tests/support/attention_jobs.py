"""Attention-TP moves on real collectives, for RankPool."""

from __future__ import annotations

import rank_pool
import torch

from moesaic.attention.dp_attention import AttentionTPGroup


def tokens(num_tokens: int) -> torch.Tensor:
    """Rows [T, 3] that differ everywhere."""
    return torch.arange(3 * num_tokens, dtype=torch.float32).view(num_tokens, 3)


def round_trip_job(rank: int, size: int, token_counts: list[int]) -> list[tuple[int, bool]]:
    """For each count: (rows of this rank's share, whether scattering and gathering gave the rows back)."""
    group = AttentionTPGroup(rank, size, rank_pool.group_of(tuple(range(size))))
    results = []
    for count in token_counts:
        share = group.scatter(tokens(count))
        results.append((len(share), torch.equal(group.gather(share, count), tokens(count))))
    return results


def reduce_job(rank: int, size: int, token_counts: list[int]) -> list[bool]:
    """For each count: whether partial sums add up and column parts come together in rank order."""
    group = AttentionTPGroup(rank, size, rank_pool.group_of(tuple(range(size))))
    results = []
    for count in token_counts:
        summed = group.all_reduce(tokens(count) * (rank + 1))
        joined = group.gather_columns(tokens(count) + 100 * rank)
        expected = torch.cat([tokens(count) + 100 * other for other in range(size)], dim=1)
        right = torch.equal(summed, tokens(count) * (size * (size + 1) // 2)) and torch.equal(joined, expected)
        results.append(right)
    return results
