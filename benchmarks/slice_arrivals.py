"""What one dispatch brings to this rank, as tensors: from rows of each expert to the maps that the loopback dispatcher copies by.

T tokens per rank, K choices, M received tokens, R expert rows. Knows no streams and no times.
"""

from __future__ import annotations

from dataclasses import dataclass

import bare_import  # noqa: F401  before anything of moesaic
import numpy as np
import torch
from slice_traffic import RankPlace, assign_tokens
from torch import Tensor

from moesaic.kernels.permute import RowMap, contiguous_map


@dataclass(frozen=True, kw_only=True)
class MaskedArrivals:
    """Low-latency mode. spread: from own tokens to the valid rows of the block [E_local, N * T]; back: from those to the K partial
    results of each own token.
    """

    counts: list[int]
    spread: RowMap
    back: RowMap


@dataclass(frozen=True, kw_only=True)
class TokenArrivals:
    """Normal mode. source int64 [M]: the own token whose values each received one has; row_map: from received tokens to expert
    rows, with weights [M, K]; back: from their M weighted sums to the partial results of each own token, added up with
    back_weights [T, K] of 1. counts with the padding of each expert's rows.
    """

    counts: list[int]
    source: Tensor
    row_map: RowMap
    weights: Tensor
    back: RowMap
    back_weights: Tensor


def token_arrivals(
    place: RankPlace, counts: list[int], num_tokens: int, pattern: int, device: torch.device, *, alignment: int = 1
) -> TokenArrivals:
    """For `counts` rows of each expert, which begin at multiples of `alignment`; `pattern` is the seed of whose they are."""
    ids = torch.from_numpy(assign_tokens(np.array(counts), num_tokens * place.ep_size, place.topk, pattern)).to(device)
    row_map, padded = contiguous_map(ids, place.num_local, alignment)
    owners = np.random.default_rng(pattern).integers(0, place.ep_size, (num_tokens, place.topk))
    repeated = np.tril(owners[:, :, None] == owners[:, None, :], -1).any(axis=2)  # a rank returns one sum for a token, not two
    return TokenArrivals(
        counts=padded,
        source=torch.arange(len(ids), device=device) % num_tokens,
        row_map=row_map,
        weights=torch.full((len(ids), place.topk), 1 / place.topk, device=device),
        back=_in_turn(torch.arange(len(ids), device=device), torch.from_numpy(repeated).to(device), len(ids)),
        back_weights=torch.ones(num_tokens, place.topk, device=device),
    )


def masked_arrivals(place: RankPlace, counts: list[int], num_tokens: int, device: torch.device) -> MaskedArrivals:
    """For `counts` rows of each expert."""
    room = place.ep_size * num_tokens
    num_rows = place.num_local * room
    rows = torch.cat([torch.arange(count) + expert * room for expert, count in enumerate(counts)]).to(device)
    width = -(-len(rows) // num_tokens)
    targets = torch.full((num_tokens * width,), num_rows, device=device)  # one past the end: nowhere
    targets[: len(rows)] = rows
    row = targets.view(num_tokens, width)
    spread = RowMap(
        row=row,
        elsewhere=row == num_rows,
        counts=torch.tensor(counts, device=device),
        num_rows=num_rows,
        tokens=torch.arange(num_tokens, device=device).repeat_interleave(width),
        targets=targets,
    )
    none = torch.zeros(num_tokens, place.topk, dtype=torch.bool, device=device)
    return MaskedArrivals(counts=counts, spread=spread, back=_in_turn(rows, none, num_rows))


def _in_turn(rows: Tensor, elsewhere: Tensor, num_rows: int) -> RowMap:
    """`rows`, again and again, as the partial results [T, K] of own tokens, but for those that are `elsewhere`."""
    turn = torch.arange(elsewhere.numel(), device=elsewhere.device) % max(len(rows), 1)
    row = rows[turn].view(elsewhere.shape)
    return RowMap(row=row, elsewhere=elsewhere, counts=rows[:0], num_rows=num_rows, tokens=rows[:0], targets=None)
