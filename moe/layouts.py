"""Received tokens to one of the two expert layouts, and expert outputs back to received tokens; shared by all CPU backends."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from moesaic.kernels.permute import RowMap, contiguous_map, from_rows, masked_map, to_rows, weighted_rows
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import ContiguousRows, ExpertRows, MaskedRows


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """How the rows of a dispatch lie: the mode's layout for `num_local` experts, blocks aligned (contiguous rows only).

    `ep_size` ranks share the choices of the received tokens.
    """

    mode: DispatchMode
    num_local: int
    alignment: int
    ep_size: int = 1

    def expected_rows(self, num_choices: int) -> int:
        """Of one expert on average, when `num_choices` fall on those of all ranks."""
        return max(1, -(-num_choices // (self.num_local * self.ep_size)))


@dataclass(frozen=True, kw_only=True)
class Arranged:
    """Rows for the experts and the way back. local_ids int64 [M, K] as they were given to `arrange`."""

    layout: ExpertLayout
    rows: ExpertRows
    row_map: RowMap
    local_ids: Tensor


def arrange(hidden: Tensor, local_ids: Tensor, layout: ExpertLayout) -> Arranged:
    """hidden [M, H], local_ids int64 [M, K] (-1 = not here) -> expert rows.

    The masked layout has room for all M tokens at every expert, as the fixed low-latency layout does. Rows that no choice fills are
    unspecified: every row is computed by itself, and nobody reads what becomes of those.
    """
    row_map, counts = _map(local_ids, layout)
    rows = _as_rows(to_rows(hidden, row_map, zero_padding=False), counts, layout, row_map)
    return Arranged(layout=layout, rows=rows, row_map=row_map, local_ids=local_ids)


@dataclass(frozen=True, kw_only=True)
class ArrangedPart:
    """Rows of some of the received tokens, in a layout of their own.

    origin int64 [num_rows]: which row of the whole each one is (rows that no choice fills: any).
    """

    whole: Arranged
    row_map: RowMap
    counts: list[int] | Tensor
    origin: Tensor

    def pick(self, rows: ExpertRows) -> ExpertRows:
        """Rows [.., any width] in the whole's layout -> this part's."""
        picked = _as_rows(self._pick(rows.hidden), self.counts, self.whole.layout, self.row_map)
        if rows.scales is None:
            return picked
        scales = _as_rows(self._pick(rows.scales), self.counts, self.whole.layout, self.row_map).hidden
        return replace(picked, scales=scales)

    def _pick(self, rows: Tensor) -> Tensor:
        return rows.reshape(self.whole.row_map.num_rows, rows.shape[-1]).index_select(0, self.origin)


def part_of(whole: Arranged, tokens: Tensor) -> ArrangedPart:
    """tokens int64 [M']: the received tokens that the part has, in their order."""
    row_map, counts = _map(whole.local_ids[tokens], whole.layout)
    origin = row_map.row.new_zeros(row_map.num_rows + 1)
    targets = row_map.row if row_map.elsewhere is None else row_map.row.masked_fill(row_map.elsewhere, row_map.num_rows)
    origin.index_copy_(0, targets.flatten(), whole.row_map.row[tokens].flatten())  # choices elsewhere: into a row past the end
    return ArrangedPart(whole=whole, row_map=row_map, counts=counts, origin=origin[: row_map.num_rows])


def _map(local_ids: Tensor, layout: ExpertLayout) -> tuple[RowMap, list[int] | Tensor]:
    """The rows' map and the counts that their layout tells."""
    if layout.mode is DispatchMode.NORMAL:
        return contiguous_map(local_ids, layout.num_local, layout.alignment)
    row_map = masked_map(local_ids, layout.num_local, local_ids.shape[0])
    return row_map, row_map.counts


def _as_rows(flat: Tensor, counts: list[int] | Tensor, layout: ExpertLayout, row_map: RowMap) -> ExpertRows:
    if isinstance(counts, list):
        return ContiguousRows(hidden=flat, counts=counts)
    hidden = flat.view(layout.num_local, len(row_map.row), flat.shape[1])
    return MaskedRows(hidden=hidden, counts=counts, expected_rows=layout.expected_rows(row_map.row.numel()))


def per_choice(expert_rows: Tensor, row_map: RowMap) -> Tensor:
    """Expert outputs in either layout -> [M, K, H], zero where the choice is elsewhere."""
    return from_rows(expert_rows.reshape(row_map.num_rows, expert_rows.shape[-1]), row_map)


def weighted(expert_rows: Tensor, row_map: RowMap, weights: Tensor) -> Tensor:
    """Expert outputs in either layout -> the weighted sum of this rank's experts for each received token, [M, H]."""
    return weighted_rows(expert_rows.reshape(row_map.num_rows, expert_rows.shape[-1]), row_map, weights)
